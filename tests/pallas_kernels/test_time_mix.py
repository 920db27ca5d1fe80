"""Every form of what stands around wkv7 against NumPy in float64, outputs and the gradient of every input.

A gradient is held to float64 differences along a random direction of each input.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.time_mix import LowRank, channel_shift, finish, operands, token_mixes
from pallas_kernels.time_mix.api import PLAIN
from tests.golden_arrays import relative_error
from tests.pallas_kernels import float64_time_mix as float64

B, H, K = 2, 3, 8
D = H * K
FORMS = [("reference", 63), *((form, length) for form in PLAIN[1:] for length in (1, 63, 100))]


@pytest.fixture
def draw(request):
    rng = np.random.default_rng(zlib.crc32(request.node.name.encode()))
    return lambda *shape: rng.normal(size=shape)


def check(op, exact, inputs, draw, dtype="float32", tolerance=1e-5):
    """op(*inputs) against exact(*inputs) [trees of arrays, float64], and the gradient of each array."""
    leaves, tree = jax.tree.flatten(inputs)
    if dtype == "bfloat16":  # both are to see the same numbers
        leaves = [np.asarray(jnp.asarray(x, dtype if x.ndim > 2 else "float32"), np.float64) for x in leaves]

    def cast(x):
        return jnp.asarray(x, dtype if x.ndim > 2 else "float32")

    def run(*leaves):
        return op(*jax.tree.unflatten(tree, leaves))

    results, pull = jax.vjp(jax.jit(run), *map(cast, leaves))
    expected = jax.tree.leaves(exact(*jax.tree.unflatten(tree, leaves)))
    d = [draw(*x.shape) for x in expected]
    if dtype == "bfloat16":
        d = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in d]
    flat, shape = jax.tree.flatten(results)
    for result, value in zip(flat, expected, strict=True):
        assert relative_error(np.asarray(result.astype("float32")), value) < tolerance
    gradients = pull(jax.tree.unflatten(shape, [jnp.asarray(x, y.dtype) for x, y in zip(d, flat, strict=True)]))
    step = 1e-5
    for i, gradient in enumerate(gradients):
        assert gradient.dtype == cast(leaves[i]).dtype and gradient.shape == leaves[i].shape
        direction = draw(*leaves[i].shape)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step * direction if i == j else x for j, x in enumerate(leaves)]
            ends.append(sum(map(np.vdot, jax.tree.leaves(exact(*jax.tree.unflatten(tree, moved))), d)))
        slope = (ends[0] - ends[1]) / (2 * step)
        gradient = np.asarray(gradient.astype("float32"), np.float64)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(direction.size)
        assert abs((gradient * direction).sum() - slope) < tolerance * max(size, 1e-3), i


@pytest.mark.parametrize("implementation, length", FORMS)
@pytest.mark.parametrize("sides", [("previous",), ("next",), ("previous", "next"), ("previous", "previous")])
def test_token_mixes(length, sides, implementation, draw):
    inputs = (draw(B, length, D), draw(4, len(sides), D))
    if "previous" not in sides:
        op = functools.partial(token_mixes, sides=sides, implementation=implementation)
        check(op, lambda x, mu: float64.token_mixes(x, mu, None, sides), inputs, draw)
        return
    op = lambda x, mu, carry: token_mixes(x, mu, sides=sides, carry=carry, implementation=implementation)
    check(op, lambda *x: float64.token_mixes(*x, sides), (*inputs, draw(B, D)), draw)
    x, mu = (jnp.asarray(x, "float32") for x in inputs)
    zeros = op(x, mu, jnp.zeros((B, D)))
    np.testing.assert_array_equal(op(x, mu, None), zeros)


@pytest.mark.parametrize("implementation, length", FORMS)
@pytest.mark.parametrize("both", [False, True, "blocks"])
def test_channel_shift(length, both, implementation, draw):
    block = {1: 1, 63: 9, 100: 4}[length] if both == "blocks" else None
    options = {"block": block, "implementation": implementation}
    op = lambda x, mu, mu_next, carry: channel_shift(x, mu, mu_next, carry=carry, **options)
    inputs = (draw(B, length, D), draw(D), draw(D) if both else None, draw(B, D))
    check(op, functools.partial(float64.channel_shift, block=block), inputs, draw)


def projections(shape, count, draw, masked=False):
    """(k, v, raw) of operands."""
    k, v, *raw = (draw(*shape) for _ in range(2 + count))
    if masked:  # as a canvas of masks looks: every token the same
        k, v, *raw = (np.broadcast_to(x[:, :1], x.shape).copy() for x in (k, v, *raw))
    return k, v, tuple(raw)


def low_rank(shape, ranks, draw):
    """A LowRank whose columns do not begin at hidden's first, nor end at its last."""
    batch, length, width = shape
    starts = [3 + sum(ranks[:i]) for i in range(len(ranks))]
    ups = tuple(draw(rank, width) / np.sqrt(rank) for rank in ranks)
    return LowRank(draw(batch, length, sum(ranks) + 5), ups, tuple(starts))


@pytest.mark.parametrize("implementation, length", FORMS)
@pytest.mark.parametrize("case", ["plain", "blend", "low rank", "valid", "masked", "bfloat16"])
def test_operands(length, case, implementation, draw):
    shape = B, length, D
    k, v, raw = projections(shape, 2 if case == "plain" else 3, draw, case == "masked")
    vectors = [draw(D) for _ in range(4)]
    blend = None if case == "plain" else (draw(*shape), draw(D))
    if case in ("low rank", "bfloat16"):
        raw = low_rank(shape, (4, 2, 3), draw)
    valid = np.arange(length) < np.array([[length], [length // 2]]) if case == "valid" else None

    def op(k, v, raw, vectors, blend):
        named = dict(zip(("w0", "a0", "k_k", "k_a"), vectors, strict=True))
        options = {"head_dim": K, "a_scale": 1.5, "implementation": implementation}
        return operands(k, v, raw, **named, blend=blend, valid=valid, **options)

    exact = lambda k, v, raw, vectors, blend: float64.operands(k, v, raw, *vectors, blend, K, 1.5, valid)
    rounded = case == "bfloat16"
    inputs = k, v, raw, vectors, blend
    check(op, exact, inputs, draw, "bfloat16" if rounded else "float32", 2e-2 if rounded else 1e-5)


@pytest.mark.parametrize("implementation", PLAIN)
def test_a_key_of_zeros_has_a_gradient(implementation):
    """A masked canvas can have one; dividing by its length would make NaN of it."""
    zeros, vector = jnp.zeros((1, 2, D)), jnp.ones(D)

    def total(k):
        named = {"w0": vector, "a0": vector, "k_k": vector, "k_a": vector}
        return sum(
            x.sum() for x in operands(k, zeros, (zeros, zeros), **named, head_dim=K, implementation=implementation)
        )

    value, gradient = jax.value_and_grad(total)(zeros)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("count, gated", [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("length, dtype", [(1, "float32"), (63, "float32"), (100, "bfloat16")])
def test_finish(length, dtype, count, gated, implementation, draw):
    heads = (B, length, H, K)
    sides = tuple((draw(*heads), draw(*heads), draw(*heads), draw(*heads), draw(B, length, D)) for _ in range(count))
    vectors = tuple((draw(D), draw(D), draw(D)) for _ in range(count))
    merge = (draw(B, length, D), draw(D)) if gated else None
    if gated and length > 1:
        gate, raw = (low_rank((B, length, D), (4,), draw) for _ in range(2))
        sides, merge = (*sides[:-1], (*sides[-1][:4], gate)), (raw, draw(D))
    op = lambda sides, vectors, merge: finish(sides, vectors, merge=merge, implementation=implementation)
    check(op, float64.finish, (sides, vectors, merge), draw, dtype, 2e-2 if dtype == "bfloat16" else 1e-5)


def test_under_vmap_and_remat(draw):
    x, mu = jnp.asarray(draw(3, B, 5, D), "float32"), jnp.asarray(draw(2, 1, D), "float32")

    def total(x, mu):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(jax.checkpoint(token_mixes)(x, mu)))

    mapped = jax.vmap(jax.grad(total, (0, 1)), (0, None))(x, mu)
    each = [jax.grad(total, (0, 1))(y, mu) for y in x]
    for result, expected in zip(mapped, zip(*each, strict=True), strict=True):
        assert relative_error(result, np.stack(expected)) < 1e-6


X, MU, VECTOR, HEADS = jnp.zeros((2, 3, 4)), jnp.zeros((2, 1, 4)), jnp.zeros(4), jnp.zeros((2, 3, 2, 2))
FOUR = {"w0": VECTOR, "a0": VECTOR, "k_k": VECTOR, "k_a": VECTOR}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: token_mixes(X, MU, sides=("left",)), "sides out of"),
        (lambda: token_mixes(X, MU, sides=("previous", "next")), r"mu \[N, 2, D\]"),
        (lambda: token_mixes(X, MU, sides=("next",), carry=X[:, 0]), "leave it out"),
        (lambda: token_mixes(X, MU, carry=X[:1, 0]), r"carry \[B, D\]"),
        (lambda: token_mixes(X, MU, implementation="fast"), "no implementation 'fast'"),
        (lambda: channel_shift(X, VECTOR, VECTOR[:3]), "mu_next"),
        (lambda: channel_shift(X, VECTOR, VECTOR, block=2), "divides the 3 tokens"),
        (lambda: operands(X, X[:1], (X, X), **FOUR, head_dim=2), "one shape"),
        (lambda: operands(X, X, (X, X), **FOUR, head_dim=3), "divides D"),
        (lambda: operands(X, X, (X, X), **(FOUR | {"k_a": VECTOR[:1]}), head_dim=2), "k_a"),
        (lambda: operands(X, X, (X, X), **FOUR, head_dim=2, valid=X[0] > 0), "valid"),
        (lambda: operands(X, X, (X,), **FOUR, head_dim=2), "raw of w and a"),
        (lambda: operands(X, X, (X, X), **FOUR, head_dim=2, blend=(X, VECTOR)), "raw of w, a and gate"),
        (lambda: operands(X, X, LowRank(X, (X[0],), (0,)), **FOUR, head_dim=2), "1 maps.*of 2"),
        (lambda: operands(X, X, LowRank(X, (X[0],) * 2, (0, 2)), **FOUR, head_dim=2), "from column 2"),
        (lambda: finish((), ()), "one or two"),
        (lambda: finish(((HEADS,) * 3 + (HEADS[:1], X),), ((VECTOR,) * 3,)), "of one shape"),
        (lambda: finish(((HEADS,) * 4 + (X[:1],),), ((VECTOR,) * 3,)), "gate"),
        (lambda: finish(((HEADS,) * 4 + (LowRank(X[:1], (X[0],), (0,)),),), ((VECTOR,) * 3,)), "its hidden"),
        (lambda: finish(((HEADS,) * 4 + (X,),), ((VECTOR, VECTOR, X),)), "r_k"),
        (lambda: finish(((HEADS,) * 4 + (X,),), ((VECTOR,) * 3,), merge=(X, X)), "merge"),
        (lambda: finish(((HEADS,) * 4 + (X,),), ((VECTOR,) * 3,), merge=(X[:1], VECTOR)), "merge of raw"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
