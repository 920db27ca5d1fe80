"""The TPU kernel of wkv7 against float64: run on a TPU, interpreted elsewhere; and lowered for a TPU.

Interpretation proves the numbers and lowering that Mosaic takes the program; benchmarks/compile_tpu.py compiles it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.wkv7 import api, wkv7_bidirectional
from pallas_kernels.wkv7.pallas_tpu import unsupported, wkv7_pallas_tpu
from pallas_kernels.wkv7.shapes import KINDS, random_inputs
from tests.eight_devices import on_eight_devices
from tests.golden_arrays import assert_close, relative_error
from tests.pallas_kernels.float64_wkv7 import NAMES, token_loop
from tests.pallas_kernels.operators import wkv7_and_gradients

BOTH = (False, True)
INTERPRET = jax.default_backend() != "tpu"


def arguments(shape, kind="random", dtype="float32", ways=2, value_size=None):
    """tokens, states, d_outs and d_finals of one or two directions that have nothing in common."""
    tokens, states, d_outs = [], [], []
    for seed in range(ways):
        inputs = random_inputs(shape, kind, value_size=value_size, dtype=dtype, seed=seed)
        states.append(inputs.pop("initial_state"))
        tokens.append(tuple(inputs[name] for name in NAMES))
        d_outs.append(random_inputs(shape, value_size=value_size, dtype=dtype, seed=10 + seed)["v"])
    return tuple(tokens), tuple(states), tuple(d_outs), tuple(0.3 * s[:, ::-1] for s in states)


@functools.cache
def run(reverse, chunk_size=64):
    """(tokens, states, d_outs, d_finals) -> per direction a dict of outputs, final state and all gradients."""

    @jax.jit
    def everything(tokens, states, d_outs, d_finals):
        op = functools.partial(wkv7_pallas_tpu, reverse=reverse, chunk_size=chunk_size, interpret=INTERPRET)
        return wkv7_and_gradients(op, tokens, states, d_outs, d_finals)

    return everything


def exact(arguments, reverse):
    return [
        token_loop(dict(zip(NAMES, tokens, strict=True)), *rest, reverse=way)
        for tokens, *rest, way in zip(*arguments, reverse, strict=True)
    ]


FORWARD = ("out", "final")


def check(results, expected, forward, gradients):
    for result, truth in zip(results, expected, strict=True):
        assert all(np.isfinite(x).all() for x in result.values())
        assert_close({n: result[n] for n in FORWARD}, {n: truth[n] for n in FORWARD}, forward)
        rest = set(truth) - set(FORWARD)
        assert_close({n: result[n] for n in rest}, {n: truth[n] for n in rest}, gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", (1, 63, 64, 100, 257))
def test_float32(length, kind):
    given = arguments((1, length, 2, 64), kind)
    forward, gradients = (1e-4, 1e-3) if kind == "allmask" else (1e-5, 1e-4)
    check(run(BOTH)(*given), exact(given, BOTH), forward, gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", (64, 257))
def test_bfloat16(length, kind):
    """The rounding of the results is all that bfloat16 costs."""
    given = arguments((1, length, 2, 64), kind, "bfloat16")
    results, expected = run(BOTH)(*given), exact(given, BOTH)
    check(results, expected, 3e-3, 3e-3)
    for result, truth in zip(results, expected, strict=True):
        assert result["out"].dtype == result["dk"].dtype == jnp.bfloat16
        for name in ("final", "state", "dlog_w"):  # float32
            assert relative_error(result[name], truth[name]) < 3e-4, name


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", ("random", "masked", "allmask"))
def test_a_thousand_tokens(kind, dtype):
    given = arguments((1, 1024, 2, 64), kind, dtype)
    forward, gradients = (1e-4, 1e-3) if kind == "allmask" else (1e-5, 1e-4)
    if dtype == "bfloat16":
        forward, gradients = 5e-3, 5e-3
    check(run(BOTH)(*given), exact(given, BOTH), forward, gradients)


def test_what_float32_cannot_hold_is_not_a_number():
    """A decay that is too strong in one channel of one head of the second direction; the first is right."""
    tokens, *rest = given = arguments((1, 64, 2, 64))
    strong = tokens[1][1].at[0, :, 1, 5].set(-6.0)
    first, second = run(BOTH)((tokens[0], (tokens[1][0], strong, *tokens[1][2:])), *rest)
    check([first], exact(given, BOTH)[:1], 1e-5, 1e-4)
    for name in ("out", "final", "state", "dr", "dlog_w", "dk", "da", "db"):
        assert np.isnan(np.asarray(second[name])).any(), name


@pytest.mark.parametrize("strongest", (-6.0, -np.inf, -0.5))
def test_the_operator_takes_any_decay(strongest, monkeypatch):
    """What the kernel does not say, the operator does: by the definition where no promise was made."""
    kernel = functools.partial(wkv7_pallas_tpu, interpret=INTERPRET)
    here = api.KERNELS["pallas_tpu"]._replace(launch=kernel, runs=lambda: True)
    monkeypatch.setitem(api.KERNELS, "pallas_tpu", here)
    tokens, *others = arguments((1, 20, 2, 64))
    strong = tokens[1][1].at[0, ::3, 1, 5].set(strongest)
    tokens = tokens[0], (tokens[1][0], strong, *tokens[1][2:])

    @functools.partial(jax.jit, static_argnums=0)
    def run(mild, tokens, states, d_outs, d_finals):
        both = functools.partial(wkv7_bidirectional, mild=mild, implementation="pallas_tpu", chunk_size=16)
        op = lambda ways, states: both(*ways, initial_states=states)
        return wkv7_and_gradients(op, tokens, states, d_outs, d_finals)

    results = run(False, tokens, *others)
    check(results, exact((tokens, *others), BOTH), 1e-5, 1e-4)
    same = jax.tree.map(np.array_equal, results, run(True, tokens, *others))
    assert all(jax.tree.leaves(same)) == (strongest == -0.5)  # the kernel's own numbers, to the last bit


@pytest.mark.parametrize("reverse", ((False,), (True,)))
def test_one_direction(reverse):
    given = arguments((2, 100, 2, 64), ways=1)
    check(run(reverse)(*given), exact(given, reverse), 1e-5, 1e-4)


@pytest.mark.parametrize("heads, key, value", [(3, 64, 64), (1, 64, 64), (4, 32, 32), (2, 32, 64), (1, 128, 128)])
def test_head_sizes(heads, key, value):
    """Groups of four, two and one head, and heads that do not fill their group."""
    given = arguments((2, 40, heads, key), value_size=value)
    check(run(BOTH, 16)(*given), exact(given, BOTH), 1e-5, 1e-4)


def test_transformations():
    """vmap, where a mapped axis is a part of the batch and what is not mapped is repeated, under remat, under scan."""
    tokens, states, *_ = arguments((2, 20, 2, 64), ways=1)
    doubled = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), tokens)
    op = functools.partial(wkv7_pallas_tpu, reverse=(True,), chunk_size=16, interpret=INTERPRET)
    loss = lambda tokens, states: sum(jnp.sum(out**2) + jnp.sum(final) for out, final in op(tokens, states))
    mapped = jax.checkpoint(lambda tokens, states: jnp.sum(jax.vmap(loss, (0, None))(tokens, states)))

    def scanned(tokens, states):
        once = jax.tree.map(lambda x: x[None], tokens)
        return jax.lax.scan(lambda total, x: (total + mapped(x, states), None), 0.0, once)[0]

    gradients = jax.jit(jax.grad(scanned))(doubled, states)
    plain = jax.jit(jax.grad(loss))
    for i in range(2):
        expected = plain(jax.tree.map(lambda x, i=i: x[i], doubled), states)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=1e-4), gradients, expected)


SPLIT = """
import functools, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.pallas_kernels.test_wkv7_tpu import BOTH, arguments
from pallas_kernels.wkv7.pallas_tpu import wkv7_pallas_tpu

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
tokens, states, d_outs, d_finals = arguments((4, 40, 4, 64))

@jax.jit
def everything(tokens, states):
    op = functools.partial(wkv7_pallas_tpu, reverse=BOTH, chunk_size=16, interpret=True)
    results, pull = jax.vjp(op, tokens, states)
    return results, pull(tuple(zip(d_outs, d_finals)))

whole = everything(tokens, states)
jax.set_mesh(mesh)
per_token, per_state = P("data", None, "model"), P("data", "model")
split = jax.tree.map(
    lambda x: jax.device_put(x, NamedSharding(mesh, per_token if x.shape[1] == 40 else per_state)), (tokens, states)
)
compiled = everything.lower(*split).compile()
assert "all-gather" not in compiled.as_text(), "the batch or the heads are gathered"
result = compiled(*split)
out = result[0][0][0]
assert out.sharding.spec[0] == "data" and out.addressable_shards[0].data.shape == (2, 40, 2, 64), out.sharding
jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), whole, result)

# Inside a shard_map the arrays are a device's own.
inside = jax.shard_map(
    lambda t, s: wkv7_pallas_tpu(t, s, BOTH, 16, interpret=True), mesh=mesh,
    in_specs=(per_token, per_state), out_specs=((per_token, per_state),) * 2, check_vma=False,
)
jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), whole[0], jax.jit(inside)(tokens, states))
print("split")
"""


def test_split_over_devices():
    """Batch and heads stay where they are: each device launches its own part, under jit and inside shard_map."""
    assert on_eight_devices(SPLIT).split() == ["split"]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("reverse", ((False,), (True,), BOTH))
def test_lowers(reverse, dtype):
    """Forward and backward become Mosaic programs, without a TPU."""
    tokens, states, *_ = arguments((2, 256, 4, 64), dtype=dtype, ways=len(reverse))

    def everything(tokens, states):
        results, pull = jax.vjp(functools.partial(wkv7_pallas_tpu, reverse=reverse), tokens, states)
        return results, pull(results)

    text = jax.jit(everything).trace(tokens, states).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2 and "wkv7_forward" in text and "wkv7_backward" in text


def test_unsupported():
    tokens, *_ = arguments((1, 2, 2, 20), ways=1)
    assert "multiples of 8" in unsupported(tokens[0])
    assert unsupported(arguments((1, 2, 2, 64), ways=1)[0][0]) is None
