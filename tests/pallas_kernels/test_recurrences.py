"""What every form of every operator promises, because all are recurrences over tokens.

`Operator.run` is compiled once per form and shape: most of this file's time is compilation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.eight_devices import on_eight_devices
from tests.golden_arrays import assert_close, relative_error
from tests.pallas_kernels.operators import FORMS, OPERATORS, SSD, WKV7, flip
from tests.thin import slow, thin

each = pytest.mark.parametrize("operator", [pytest.param(x, id=name) for name, x in OPERATORS.items()])
both_ways = pytest.mark.parametrize("reverse", (False, True))
in_pieces = pytest.mark.parametrize("form", ("chunked/4", pytest.param("segmented", marks=pytest.mark.slow)))
pytestmark = pytest.mark.optimised

FLOAT32 = {"final", "state", "dlog_w", "dlog_a"}  # whatever the inputs are
EXACT = {"allmask": 5e-4, "masked": 2e-5}  # what float32 costs where tokens are the same; 5e-6 elsewhere


def check_float64(operator, form, arguments, reverse, kind, dtype):
    """Everything against the float64 loop, and of the right dtype."""
    result, expected = operator.run(form, reverse)(*arguments), operator.loop(*arguments, reverse=reverse)
    assert set(result) == set(expected)
    for name, x in result.items():
        assert x.dtype == ("float32" if name in FLOAT32 else dtype) and x.shape == expected[name].shape, name
        bound = EXACT.get(kind, 5e-6) if x.dtype == jnp.float32 else 3e-3
        assert relative_error(x, expected[name]) < bound, (kind, name)


LOOPS = [(1, False, "float32"), (63, True, "float32"), (100, False, "float32"), (63, False, "bfloat16")]


# The chunks with all lengths, the definition with one.
@each
@pytest.mark.parametrize(
    "form, length, reverse, dtype",
    [
        *(("chunked", *loop) for loop in LOOPS),
        *(("associative", *loop) for loop in LOOPS[1:]),
        ("reference", *LOOPS[1]),
        *(
            slow((form, *loop))
            for form, loops in (("associative", LOOPS[:1]), ("reference", [LOOPS[0], *LOOPS[2:]]))
            for loop in loops
        ),
    ],
)
def test_float64_loop(length, reverse, dtype, form, operator):
    """Outputs, final state and every gradient, of all kinds of inputs; bfloat16 costs what it is rounded by."""
    for kind in operator.kinds:
        check_float64(operator, form, operator.arguments(kind, operator.shape(length), dtype), reverse, kind, dtype)


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize(
    "operator, length, form",
    [
        *(
            pytest.param(x, n, form, id=f"{name}-{n}-{form}")
            for name, x in OPERATORS.items()
            for n, form in [*((1024, form) for form in FORMS), *((8192, form) for form in ("chunked", "segmented"))]
        ),
        pytest.param(WKV7, 8192, "split", id="wkv7-8192-split"),
    ],
)
def test_long_sequences(operator, length, form, dtype, reverse):
    """As above; one sequence whose time axis is in segments, too."""
    for kind in operator.kinds:
        arguments = operator.arguments(kind, operator.shape(length, batch=1), dtype)
        check_float64(operator, form, arguments, reverse, kind, dtype)


@each
@in_pieces
def test_reverse_is_flip_run_flip(form, operator):
    """Also in the gradients; and both equal the definition."""
    arguments = operator.arguments()
    backward = operator.run(form, reverse=True)(*arguments)
    flipped = operator.run(form)(*flip(arguments))
    expected = {name: x[:, ::-1] if name not in ("final", "state") else x for name, x in flipped.items()}
    assert_close(backward, expected, 2e-6)
    assert_close(backward, operator.loop(*arguments, reverse=True), 3e-6)


@each
@both_ways
@in_pieces
def test_gradients_are_causal(form, reverse, operator):
    """Output 17 hears every token up to its own, and no other; across chunks and segments."""
    inputs, state, d_out, d_final = operator.arguments()
    at = np.arange(37)[:, None, None] == 17
    result = operator.run(form, reverse)(inputs, state, np.where(at, 1 + d_out, 0), 0 * d_final)
    times = np.arange(37)
    for name in operator.names:
        reached = np.abs(result[f"d{name}"]).reshape(2, 37, -1).sum((0, 2)) > 0
        expected = times == 17 if name == operator.reads else times >= 17 if reverse else times <= 17
        np.testing.assert_array_equal(reached, expected, name)


@each
@pytest.mark.parametrize("form, reverse", thin([(form, reverse) for form in FORMS for reverse in (False, True)], 3))
def test_state_is_handed_over(form, reverse, operator):
    """Two runs, the second from the first's state, are one run."""
    inputs, state, *_ = operator.arguments(shape=operator.shape(46))
    op = jax.jit(functools.partial(operator.op, reverse=reverse, implementation=form))
    left, right = ({name: x[:, span] for name, x in inputs.items()} for span in (slice(0, 23), slice(23, 46)))
    first, second = (right, left) if reverse else (left, right)
    out_1, middle = op(**first, initial_state=state)
    out_2, final = op(**second, initial_state=middle)
    out = np.concatenate([out_2, out_1] if reverse else [out_1, out_2], 1)
    whole, whole_final = op(**inputs, initial_state=state)
    assert_close({"out": out, "final": final}, {"out": whole, "final": whole_final}, 2e-6)


@each
@both_ways
@in_pieces
def test_padding_is_a_no_op(form, reverse, operator):
    """Tokens that decay nothing and write nothing leave the state alone, leading or trailing, whatever they read."""
    inputs, state, d_out, d_final = operator.arguments()
    inside = np.arange(37) < 30
    padded = {
        name: np.where(inside.reshape(1, -1, *(1,) * (x.ndim - 2)), x, 0) if name in operator.writes else x
        for name, x in inputs.items()
    }
    result = operator.run(form, reverse)(padded, state, d_out, d_final)
    part = {name: x[:, :30] for name, x in inputs.items()}
    expected = operator.loop(part, state, d_out[:, :30], d_final, reverse=reverse)
    assert_close({"out": result[operator.out][:, :30]}, {"out": expected[operator.out]}, 5e-6)
    assert_close(result, {"final": expected["final"]}, 5e-6)


@each
def test_transformations(operator):
    """A scan over remat over vmap of the default, which chooses at lowering, gives the plain gradients."""
    inputs, state, d_out, _ = operator.arguments(shape=operator.shape(19))
    doubled = jax.tree.map(lambda x: np.stack([x, x / 2]), (inputs, state))

    def loss(inputs, state):
        out, final = operator.op(**inputs, initial_state=state)
        return jnp.sum(out * d_out) + jnp.sum(final)

    def wrapped(inputs, state):
        some = jax.checkpoint(lambda inputs, state: jnp.sum(jax.vmap(loss)(inputs, state)))
        repeated = jax.tree.map(lambda x: x[None], (inputs, state))
        return jax.lax.scan(lambda total, x: (total + some(*x), None), 0.0, repeated)[0]

    gradients = jax.jit(jax.grad(wrapped, (0, 1)))(*doubled)
    plain = jax.jit(jax.grad(loss, (0, 1)))
    for i in range(2):
        expected = plain(*jax.tree.map(lambda x, i=i: x[i], doubled))
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_less(relative_error(x[i], y), 2e-6), gradients, expected)


def test_over_devices():
    """Batch and heads that are split over devices stay so, forward and backward, and say what one device says."""
    code = """
import jax, numpy as np
from tests.pallas_kernels.operators import SSD, WKV7

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for operator, shape in ((WKV7, (8, 24, 2, 8, 8)), (SSD, (8, 24, 4, 8, 2, 8))):
    arguments = operator.arguments(shape=shape)
    for form in ("chunked", "associative"):
        run = operator.run(form)
        alone = run(*arguments)
        with jax.set_mesh(mesh):
            place = lambda x: jax.P("data", None, "model") if x.shape[1] == 24 else jax.P("data", "model")
            there = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, place(x))), arguments)
            program = run.lower(*there).compile()
            assert not any(name in program.as_text() for name in ("all-gather", "all-to-all", "collective-permute"))
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), program(*there), alone)
print("right")
"""
    assert on_eight_devices(code).strip() == "right"


@each
def test_no_state_means_zeros(operator):
    inputs, state, *cotangents = operator.arguments()
    out, final = jax.jit(operator.op)(**inputs)
    expected = operator.loop(inputs, 0 * state, *cotangents)
    assert_close({"out": out, "final": final}, {"out": expected[operator.out], "final": expected["final"]}, 5e-6)


@each
def test_compiles_once(operator):
    traces = []

    @jax.jit
    def op(inputs):
        traces.append(1)
        return operator.op(**inputs)

    inputs, *_ = operator.arguments()
    op(inputs)
    op(jax.tree.map(lambda x: x / 2, inputs))
    assert len(traces) == 1


@pytest.mark.parametrize("operator, shape", [(WKV7, (1, 1024, 2, 64, 64)), (SSD, (1, 1024, 2, 64, 1, 64))])
def test_no_token_states_are_kept(operator, shape):
    """Forward and backward of the chunk scan take a tenth of the definition's temporary memory."""
    inputs, *_ = operator.arguments(shape=shape)
    memory = {}
    for form in ("reference", "chunked"):
        loss = lambda inputs, form=form: jnp.sum(operator.op(**inputs, implementation=form)[0])
        compiled = jax.jit(jax.grad(loss)).lower(inputs).compile()
        memory[form] = compiled.memory_analysis().temp_size_in_bytes
    assert 10 * memory["chunked"] <= memory["reference"], memory


@each
def test_no_tokens(operator):
    empty = {name: x[:, :0] for name, x in operator.arguments()[0].items()}
    with pytest.raises(ValueError, match="T is 0"):
        operator.op(**empty)
