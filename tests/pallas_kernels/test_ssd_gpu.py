"""The GPU kernels of ssd against a float64 loop, run on a GPU or interpreted on a CPU; and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import products, walks
from pallas_kernels.ssd import ssd, ssd_blocks
from pallas_kernels.ssd.pallas_gpu import parts_of, ssd_pallas_gpu, unsupported
from pallas_kernels.ssd.shapes import random_inputs
from tests.eight_devices import on_eight_devices
from tests.golden_arrays import assert_close, relative_error
from tests.pallas_kernels.float64_ssd import NAMES, token_loop
from tests.pallas_kernels.operators import SSD, check_mapped, lowered_for_hopper

INTERPRET = not products.has_tensor_cores()
FLOAT32 = {"final", "state", "dlog_a"}  # the others are bfloat16


def drawn(kind, shape):
    return SSD.arguments(kind, shape, "bfloat16")


@functools.partial(jax.jit, static_argnames=("reverse", "parts"))
def run(inputs, state, d_y, d_final, *, reverse=False, parts=None):
    """Everything that token_loop returns."""
    op = lambda tokens, state: ssd_pallas_gpu(*tokens, state, reverse, parts=parts, interpret=INTERPRET)
    (y, final), pull = jax.vjp(op, tuple(inputs[name] for name in NAMES), state)
    gradients, d_state = pull((y.dtype.type(1) * d_y, d_final))
    return {"y": y, "final": final, "state": d_state} | {f"d{x}": d for x, d in zip(NAMES, gradients, strict=True)}


@pytest.mark.parametrize(
    "kind, shape, reverse, parts",
    [
        ("random", (2, 1, 2, 16, 1, 16), True, None),
        ("random", (1, 63, 4, 16, 2, 32), False, None),  # more groups than one, and fewer than heads
        ("masked", (1, 100, 2, 32, 1, 16), True, 1),
        ("masked", (2, 300, 2, 16, 2, 16), False, 3),
        ("resets", (1, 300, 2, 16, 1, 16), True, 9),  # more parts than chunks
        ("strong", (1, 150, 1, 16, 1, 16), False, 2),
        pytest.param("masked", (1, 8192, 2, 64, 1, 128), True, None, marks=pytest.mark.slow),
    ],
)
def test_float64_loop(kind, shape, reverse, parts):
    """Outputs, final state and every gradient, with the time axis in one or in several parts."""
    arguments = drawn(kind, shape)
    result, expected = run(*arguments, reverse=reverse, parts=parts), token_loop(*arguments, reverse)
    for name, x in result.items():
        assert x.dtype == ("float32" if name in FLOAT32 else "bfloat16") and x.shape == expected[name].shape, name
        assert relative_error(x, expected[name]) < (1e-5 if name in FLOAT32 else 3e-3), name


@pytest.mark.parametrize("reverse", (False, True))
def test_no_decay_is_too_strong(reverse):
    """Not even minus infinity, in one token of three."""
    inputs, *others = drawn("random", (1, 150, 2, 16, 1, 16))
    third = np.arange(150)[:, None] % 3 == 0
    some = [inputs | {"log_a": np.where(third, np.float32(x), inputs["log_a"])} for x in (-np.inf, -1e3)]
    assert_close(run(some[0], *others, reverse=reverse, parts=2), token_loop(some[1], *others, reverse), 3e-3)


def test_under_vmap_and_remat():
    def loss(inputs, state, d_y):
        tokens = [inputs[name] for name in NAMES]
        y, final = ssd_pallas_gpu(*tokens, state, parts=2, interpret=INTERPRET)
        return jnp.sum(y.astype(jnp.float32) * d_y) + jnp.sum(final)

    check_mapped(loss, *drawn("random", (4, 70, 2, 16, 1, 16))[:3])


def test_over_devices():
    """Each device launches its own sequences and heads."""
    code = """
import jax, numpy as np
from tests.pallas_kernels.test_ssd_gpu import drawn, run

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for groups in (1, 2):
    arguments = drawn("random", (2, 70, 4, 16, groups, 16))
    alone = run(*arguments, parts=2)
    with jax.set_mesh(mesh):
        def place(x):
            heads = [axis for axis, size in enumerate(x.shape) if size == 4]
            return jax.P("data", *("model" if axis in heads else None for axis in range(1, x.ndim)))
        there = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, place(x))), arguments)
        split = run(*there, parts=2)
    assert split["y"].sharding.spec[0] == "data" and split["y"].sharding.spec[2] == "model", split["y"].sharding
    jax.tree.map(lambda x, y: np.testing.assert_allclose(*(np.float32(z) for z in (x, y)), atol=1e-2), split, alone)
print("right")
"""
    assert on_eight_devices(code).strip() == "right"


def shapes(length, dtype="bfloat16"):
    """Of inputs by name."""
    inputs = jax.eval_shape(lambda: random_inputs((1, length, 24, 64, 1, 128), dtype=dtype))
    return {name: inputs[name] for name in NAMES}


@pytest.fixture
def ampere(monkeypatch):
    """A process with a GPU that has tensor cores."""
    monkeypatch.setattr(products, "has_tensor_cores", lambda: True)


@pytest.mark.parametrize("length, forward, both", [(100, 1, 3), (4096, 2, 6)])
def test_lowers_for_a_gpu(ampere, length, forward, both):
    """The default, with a launch for each pass over the tokens; in parts, their maps too."""

    def gradients(inputs):
        (y, _), pull = jax.vjp(lambda inputs: ssd(**inputs), inputs)
        return pull((y, jnp.zeros((1, 24, 64, 128))))

    count = lambda op: lowered_for_hopper(op, shapes(length)).count("@__gpu$xla.gpu.triton")
    assert count(lambda inputs: ssd(**inputs)) == forward
    assert count(gradients) == both


def test_what_runs_where(ampere):
    """The kernels where they take the inputs; no kernel on a CPU."""
    op = lambda inputs: ssd(**inputs)
    assert "triton" not in lowered_for_hopper(op, shapes(100, "float32"))
    assert "triton" not in lowered_for_hopper(lambda inputs: ssd(**inputs, chunk_size=32), shapes(100))
    assert "custom_call" not in jax.jit(op).trace(shapes(100)).lower(lowering_platforms=("cpu",)).as_text()
    with pytest.raises(ValueError, match="bfloat16, not float32"):
        jax.eval_shape(lambda inputs: ssd(**inputs, implementation="pallas_gpu"), shapes(100, "float32"))
    with pytest.raises(ValueError, match="chunks of 64 tokens, not 32"):
        jax.eval_shape(lambda inputs: ssd(**inputs, implementation="pallas_gpu", chunk_size=32), shapes(100))


def test_a_gpu_that_is_none(monkeypatch):
    monkeypatch.setattr(products, "has_tensor_cores", lambda: False)
    with pytest.raises(ValueError, match="compute capability 8"):
        ssd(**random_inputs((1, 8, 1, 16, 1, 16), dtype="bfloat16"), implementation="pallas_gpu")
    with pytest.raises(ValueError, match="ssd_blocks has no form 'pallas_gpu'"):
        ssd_blocks(**random_inputs((1, 8, 1, 16, 1, 16), dtype="bfloat16"), implementation="pallas_gpu", block=4)


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        ((1, 4, 2, 64, 1, 128), "bfloat16", None),
        ((0, 4, 2, 64, 1, 128), "bfloat16", "nothing to do"),
        ((1, 4, 2, 64, 1, 128), "float32", "bfloat16, not float32"),
        ((1, 4, 2, 48, 1, 128), "bfloat16", "powers of two"),
        ((1, 4, 2, 8, 1, 128), "bfloat16", "powers of two"),
        ((1, 4, 2, 128, 1, 128), "bfloat16", "at most 8192"),
        ((1 << 16, 4, 1, 16, 1, 16), "bfloat16", "rows"),
    ],
)
def test_unsupported(shape, dtype, reason):
    batch, length, heads, size, groups, width = shape
    x, b = (jax.ShapeDtypeStruct((batch, length, *z), dtype) for z in ((heads, size), (groups, width)))
    said = unsupported(x, b, b)
    assert said is None if reason is None else reason in said


def test_parts(monkeypatch):
    """As many as a GPU runs at once, of four chunks at least."""
    monkeypatch.setattr(walks, "multiprocessors", lambda: 132)
    assert parts_of((1, 65536, 24, 64)) == 11
    assert parts_of((1, 4096, 24, 64)) == 11
    assert parts_of((1, 1024, 24, 64)) == 4
    assert parts_of((1, 1, 24, 64)) == 1
    assert parts_of((4, 65536, 24, 64)) == 2
    assert parts_of((8, 4096, 24, 64)) == 1
    with pytest.raises(ValueError, match="1 or more parts"):
        inputs, state, *_ = drawn("random", (1, 4, 1, 16, 1, 16))
        ssd_pallas_gpu(*(inputs[name] for name in NAMES), state, parts=0)
