"""Every form of ssd against the authors' numbers, against a float64 loop, and for what it promises.

`run` below is compiled once per form and shape: most of this file's time is compilation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd import IMPLEMENTATIONS, ssd
from pallas_kernels.ssd.chunked import ssd_associative
from pallas_kernels.ssd.shapes import KINDS, random_inputs
from tests.golden_arrays import assert_close, golden, relative_error

pytestmark = pytest.mark.optimised
NAMES = ("x", "log_a", "b", "c")
SMALL = (2, 37, 4, 8, 2, 5)  # not a multiple of any chunk
PARALLEL = ("chunked", "associative")


@functools.cache
def run(form, reverse=False):
    """(inputs, state, cotangents) -> y, final state and all gradients, compiled.

    form: an implementation, with "/C" for a chunk size; "segmented" is "associative" in three segments.
    """
    implementation, _, size = form.partition("/")

    def op(inputs, state):
        if form == "segmented":
            tokens = [inputs[name] for name in NAMES]
            return ssd_associative(*tokens, state, reverse, chunk_size=4, segment=16)
        return ssd(
            **inputs,
            initial_state=state,
            reverse=reverse,
            implementation=implementation,
            chunk_size=int(size) if size else None,
        )

    @jax.jit
    def everything(inputs, state, d_y, d_final):
        (y, final), pull = jax.vjp(op, inputs, state)
        gradients, d_state = pull((y.dtype.type(1) * d_y, d_final))
        return {"y": y, "final": final, "state": d_state} | {f"d{name}": gradients[name] for name in NAMES}

    return everything


def small(kind="random", shape=SMALL, dtype="float32"):
    """Arguments of `run`."""
    # NumPy arrays: what JAX did to them outside of a jit would be compiled, operation by operation.
    inputs = jax.tree.map(np.asarray, random_inputs(shape, kind, dtype=dtype))
    state = inputs.pop("initial_state")
    d_y = np.asarray(random_inputs(shape, dtype=dtype, seed=1)["x"])
    return inputs, state, d_y, np.float32(0.3) * state[:, ::-1]


def flip(arguments):
    inputs, state, d_y, d_final = arguments
    return {name: z[:, ::-1] for name, z in inputs.items()}, state, d_y[:, ::-1], d_final


def token_loop(inputs, state, d_y, d_final, reverse=False):
    """The definition and its gradients in NumPy, float64, one token after another."""
    x, log_a, b, c, state, d_y, d_state = (
        np.asarray(z, np.float64) for z in (*(inputs[name] for name in NAMES), state, d_y, d_final)
    )
    heads, groups = x.shape[2], b.shape[2]
    b, c = (np.repeat(z, heads // groups, 2) for z in (b, c))
    a = np.exp(log_a)[..., None, None]
    steps = list(range(x.shape[1]))
    steps = steps[::-1] if reverse else steps
    y, states = np.zeros(x.shape), [state]
    for t in steps:
        states.append(a[:, t] * states[-1] + x[:, t, ..., None] * b[:, t, :, None])
        y[:, t] = np.einsum("bhpn,bhn->bhp", states[-1], c[:, t])
    d_x, d_log_a, d_b, d_c = (np.zeros(z.shape) for z in (x, log_a, b, c))
    for i, t in reversed(list(enumerate(steps))):
        d_c[:, t] = np.einsum("bhpn,bhp->bhn", states[i + 1], d_y[:, t])
        d_state = d_state + d_y[:, t, ..., None] * c[:, t, :, None]
        d_x[:, t] = np.einsum("bhpn,bhn->bhp", d_state, b[:, t])
        d_b[:, t] = np.einsum("bhpn,bhp->bhn", d_state, x[:, t])
        d_state = a[:, t] * d_state
        d_log_a[:, t] = np.sum(d_state * states[i], (-2, -1))
    d_b, d_c = (z.reshape(*z.shape[:2], groups, -1, z.shape[-1]).sum(3) for z in (d_b, d_c))
    result = {"y": y, "final": states[-1], "state": d_state}
    return result | {"dx": d_x, "dlog_a": d_log_a, "db": d_b, "dc": d_c}


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ("ssd_2x64x3x16x8", "ssd_1x96x2x32x16_s0"))
def test_golden(name, form):
    """Outputs, final state and every gradient of Mamba-2's authors' minimal program, float64; a group per head."""
    arrays = golden(name + ".npz")
    theirs = {"x": "X", "log_a": "A", "b": "B", "c": "C"}
    inputs = {name: jnp.asarray(arrays[key]) for name, key in theirs.items()}
    zeros = jnp.zeros(arrays["final_state"].shape)
    state = jnp.asarray(arrays["S0"][:, 0]) if "S0" in arrays else zeros
    result = run(form)(inputs, state, jnp.asarray(arrays["dY"]), zeros)
    expected = {"y": arrays["Y"], "final": arrays["final_state"]}
    expected |= {f"d{name}": arrays[f"d{key}"] for name, key in theirs.items()}
    if "dS0" in arrays:
        expected["state"] = arrays["dS0"][:, 0]
    assert_close(result, expected, 2e-6)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("length, reverse", ((1, False), (63, True), (100, False)))
def test_float64_loop(length, form, reverse):
    """In every gradient, with three heads to a group."""
    arguments = small(shape=(2, length, 6, 8, 2, 5))
    result = run(form, reverse)(*arguments)
    assert result["y"].shape == (2, length, 6, 8) and result["final"].shape == (2, 6, 8, 5)
    assert_close(result, token_loop(*arguments, reverse), 2e-6)


LONG = (1, 150, 4, 8, 1, 16)
LONG_FORMS = ("reference", "chunked/128", "associative")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", LONG_FORMS)
def test_statistics(form, kind):
    """Masked, suddenly and always forgetting sequences are finite and right, in every gradient."""
    arguments = small(kind, LONG)
    result = run(form)(*arguments)
    assert all(np.isfinite(z).all() for z in result.values())
    assert_close(result, token_loop(*arguments), 5e-6)


@pytest.mark.parametrize("worst", (-np.inf, -1e30, -1e3))
@pytest.mark.parametrize("form", LONG_FORMS)
def test_no_decay_is_too_strong(form, worst):
    """Not even minus infinity, in one token of three; and every gradient stays right."""
    inputs, *others = small(shape=LONG)
    third = np.arange(150)[:, None] % 3 == 0
    some = [inputs | {"log_a": np.where(third, np.float32(x), inputs["log_a"])} for x in (worst, -1e3)]
    assert_close(run(form)(some[0], *others), token_loop(some[1], *others), 5e-6)


@pytest.mark.parametrize("form", ("chunked/4", "segmented"))
def test_reverse_is_flip_run_flip(form):
    """Also in the gradients; and both equal the definition."""
    arguments = small()
    backward = run(form, reverse=True)(*arguments)
    flipped = run(form)(*flip(arguments))
    expected = {name: z[:, ::-1] if name not in ("final", "state") else z for name, z in flipped.items()}
    assert_close(backward, expected, 1e-6)
    assert_close(backward, token_loop(*arguments, reverse=True), 2e-6)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("form", ("chunked/4", "segmented"))
def test_gradients_are_causal(form, reverse):
    """Output 17 hears every token up to its own, and no other; across chunks and segments."""
    inputs, state, d_y, d_final = small()
    at = np.arange(37)[:, None, None] == 17
    result = run(form, reverse)(inputs, state, np.where(at, 1 + d_y, 0), 0 * d_final)
    times = np.arange(37)
    for name in NAMES:
        reached = np.abs(result[f"d{name}"]).reshape(2, 37, -1).sum((0, 2)) > 0
        expected = times == 17 if name == "c" else times >= 17 if reverse else times <= 17
        np.testing.assert_array_equal(reached, expected, name)


@pytest.mark.parametrize("form, reverse", (("chunked", False), ("associative", True)))
def test_state_is_handed_over(form, reverse):
    """Two runs, the second from the first's state, are one run."""
    inputs, state, *_ = small(shape=(2, 46, 4, 8, 2, 5))
    op = jax.jit(functools.partial(ssd, reverse=reverse, implementation=form))
    left, right = ({name: z[:, span] for name, z in inputs.items()} for span in (slice(0, 23), slice(23, 46)))
    first, second = (right, left) if reverse else (left, right)
    y_1, middle = op(**first, initial_state=state)
    y_2, final = op(**second, initial_state=middle)
    y = np.concatenate([y_2, y_1] if reverse else [y_1, y_2], 1)
    whole, whole_final = op(**inputs, initial_state=state)
    assert_close({"y": y, "final": final}, {"y": whole, "final": whole_final}, 2e-6)


@pytest.mark.parametrize("form", PARALLEL)
def test_bfloat16(form):
    """The inputs' rounding is all that bfloat16 costs: the state is float32, and so is what is computed."""
    arguments = small(dtype="bfloat16")
    result = run(form)(*arguments)
    exact = token_loop(*arguments)
    for name, z in result.items():
        assert z.dtype == ("float32" if name in ("final", "state", "dlog_a") else "bfloat16"), name
    assert_close(result, exact, 3e-3)
    assert relative_error(result["final"], exact["final"]) < 2e-6


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("form", ("chunked/4", "segmented"))
def test_padding_is_a_no_op(form, reverse):
    """Tokens of x = log_a = 0 leave the state alone, leading or trailing, whatever b and c are."""
    inputs, state, d_y, d_final = small()
    inside = (np.arange(37) < 30)[None, :, None]
    padded = inputs | {
        "x": np.where(inside[..., None], inputs["x"], 0),
        "log_a": np.where(inside, inputs["log_a"], 0),
    }
    result = run(form, reverse)(padded, state, d_y, d_final)
    expected = token_loop({name: z[:, :30] for name, z in inputs.items()}, state, d_y[:, :30], d_final, reverse)
    assert_close({"y": result["y"][:, :30], "final": result["final"]}, {x: expected[x] for x in ("y", "final")}, 2e-6)


def test_transformations():
    """A scan over remat over vmap of the default, which chooses at lowering, gives the plain gradients."""
    inputs, state, d_y, _ = small(shape=(2, 19, 2, 8, 1, 5))
    doubled = jax.tree.map(lambda z: np.stack([z, z / 2]), (inputs, state))

    def loss(inputs, state):
        y, final = ssd(**inputs, initial_state=state)
        return jnp.sum(y * d_y) + jnp.sum(final)

    def wrapped(inputs, state):
        some = jax.checkpoint(lambda inputs, state: jnp.sum(jax.vmap(loss)(inputs, state)))
        repeated = jax.tree.map(lambda z: z[None], (inputs, state))
        return jax.lax.scan(lambda total, z: (total + some(*z), None), 0.0, repeated)[0]

    gradients = jax.jit(jax.grad(wrapped, (0, 1)))(*doubled)
    plain = jax.jit(jax.grad(loss, (0, 1)))
    for i in range(2):
        expected = plain(*jax.tree.map(lambda z, i=i: z[i], doubled))
        jax.tree.map(lambda z, y, i=i: np.testing.assert_array_less(relative_error(z[i], y), 2e-6), gradients, expected)


def test_no_state_means_zeros():
    inputs, state, *cotangents = small()
    y, final = jax.jit(ssd)(**inputs)
    expected = token_loop(inputs, 0 * state, *cotangents)
    assert_close({"y": y, "final": final}, {name: expected[name] for name in ("y", "final")}, 2e-6)


def test_no_token_states_are_kept():
    """Forward and backward of the default, a chunk scan here, take a tenth of the definition's temporary memory."""
    inputs = random_inputs((1, 1024, 2, 64, 1, 64))
    memory = {}
    for form in ("reference", None):
        loss = lambda inputs, form=form: jnp.sum(ssd(**inputs, implementation=form)[0])
        compiled = jax.jit(jax.grad(loss)).lower(inputs).compile()
        memory[form] = compiled.memory_analysis().temp_size_in_bytes
    assert 10 * memory[None] <= memory["reference"], memory


@pytest.mark.parametrize("platform", ("cpu", "cuda", "tpu"))
def test_chosen_at_lowering(platform):
    """The default lowers to the chunk scan for CPU and to the associative form for accelerators."""
    inputs = random_inputs((1, 256, 1, 32, 1, 16))

    def operations(implementation):
        op = jax.jit(functools.partial(ssd, implementation=implementation))
        text = op.trace(**inputs).lower(lowering_platforms=(platform,)).as_text()
        return [text.count(name) for name in ("dot_general", "stablehlo.while", "stablehlo.multiply")]

    chosen = "chunked" if platform == "cpu" else "associative"
    other = "associative" if platform == "cpu" else "chunked"
    assert operations(None) == operations(chosen) != operations(other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"log_a": jnp.zeros((2, 37, 3))}, "make them agree"),
        ({"b": jnp.zeros((2, 36, 2, 5))}, "make them agree"),
        ({"c": jnp.zeros((2, 37, 2, 6))}, "make them agree"),
        ({"b": jnp.zeros((2, 37, 3, 5)), "c": jnp.zeros((2, 37, 3, 5))}, "3 for 4 heads"),
        ({"b": jnp.zeros((2, 37, 0, 5)), "c": jnp.zeros((2, 37, 0, 5))}, "0 for 4 heads"),
        ({"x": jnp.zeros((37, 4, 8))}, r"x of \[B, T, H, P\]"),
        ({"log_a": jnp.full((2, 37, 4), 1e-3)}, "log_a <= 0"),
        ({"log_a": jnp.zeros((2, 37, 4, 1))}, r"log_a of \[B, T, H\]"),
        ({"x": jnp.zeros((2, 37, 4, 8), jnp.int32)}, "x is int32"),
        ({"c": jnp.zeros((2, 37, 2, 5), jnp.float16)}, "c is float16"),
        ({"initial_state": jnp.zeros((2, 4, 5, 8))}, "initial_state"),
        ({"implementation": "pallas"}, "reference, chunked, associative"),
        ({"chunk_size": 24}, "chunk_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 16, "implementation": "reference"}, "no chunks"),
        ({"reverse": jnp.bool_(True)}, "reverse"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ssd(**{**random_inputs(SMALL), **change})


def test_no_tokens():
    empty = {name: z[:, :0] for name, z in small()[0].items()}
    with pytest.raises(ValueError, match="T is 0"):
        ssd(**empty)
