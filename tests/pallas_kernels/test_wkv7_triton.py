"""The Triton kernels of wkv7 against a float64 loop, run on a GPU or interpreted on a CPU; and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import products, walks
from pallas_kernels.wkv7 import api, wkv7, wkv7_bidirectional
from pallas_kernels.wkv7.pallas_triton import parts_of, unsupported, wkv7_pallas_triton
from pallas_kernels.wkv7.shapes import random_inputs
from tests.eight_devices import on_eight_devices
from tests.golden_arrays import relative_error
from tests.pallas_kernels.float64_wkv7 import NAMES, token_loop
from tests.pallas_kernels.operators import WKV7, check_mapped, lowered_for_hopper, wkv7_and_gradients

INTERPRET = not products.has_tensor_cores()
FLOAT32 = {"final": 1e-5, "state": 1e-5, "dlog_w": 2e-4}  # the others are bfloat16


def drawn(kind, shape):
    """(tokens, state, d_out, d_final) of [B, T, H, K] and V."""
    inputs, *others = WKV7.arguments(kind, shape, "bfloat16")
    return tuple(inputs[name] for name in NAMES), *others


@functools.partial(jax.jit, static_argnames=("reverse", "parts"))
def run(tokens, state, d_out, d_final, *, reverse=False, parts=None):
    """Everything that token_loop returns."""
    op = lambda tokens, states: wkv7_pallas_triton(tokens, states, (reverse,), parts=parts, interpret=INTERPRET)
    return wkv7_and_gradients(op, (tokens,), (state,), (d_out,), (d_final,))[0]


def check(arguments, reverse, parts):
    tokens, *others = arguments
    result = run(*arguments, reverse=reverse, parts=parts)
    expected = token_loop(dict(zip(NAMES, tokens, strict=True)), *others, reverse)
    assert set(result) == set(expected)
    for name, x in result.items():
        assert x.dtype == ("float32" if name in FLOAT32 else "bfloat16") and x.shape == expected[name].shape, name
        assert relative_error(x, expected[name]) < FLOAT32.get(name, 4e-3), name


@pytest.mark.parametrize(
    "kind, shape, reverse, parts",
    [
        ("random", (2, 1, 2, 16, 16), True, None),
        ("strong", (1, 63, 2, 32, 16), False, None),
        ("allmask", (1, 100, 1, 16, 32), True, 1),
        ("masked", (2, 100, 2, 16, 16), False, 3),
        ("masked", (1, 63, 1, 64, 64), True, 9),  # more parts than chunks
        pytest.param("masked", (1, 4096, 2, 64, 64), False, None, marks=pytest.mark.slow),
    ],
)
def test_float64_loop(kind, shape, reverse, parts):
    """Outputs, final state and every gradient, with the time axis in one or in several parts."""
    check(drawn(kind, shape), reverse, parts)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("kind", WKV7.kinds)
def test_every_kind(kind, reverse):
    check(drawn(kind, (1, 150, 2, 64, 64)), reverse, 2)


def test_both_directions():
    """The second, of a sequence that is turned, says what the first does."""
    first, second = (drawn("random", (1, 20, 1, 16, 16))[:2] for _ in range(2))
    ways = first[0], tuple(x[:, ::-1] for x in second[0])
    op = jax.jit(lambda *x: wkv7_pallas_triton(*x, (False, True), interpret=INTERPRET))
    (out, final), (turned, same) = op(ways, (first[1], second[1]))
    assert relative_error(out, turned[:, ::-1]) < 3e-3
    assert relative_error(final, same) < 1e-4


def test_what_float32_cannot_hold_is_not_a_number():
    tokens, *others = drawn("random", (1, 20, 2, 16, 16))
    strong = np.array(tokens[1])
    strong[:, :, 1, 5] = -6
    result = run((tokens[0], strong, *tokens[2:]), *others)
    for name in ("out", "final", "state", "dr", "dlog_w", "dk", "da", "db"):
        heads = 1 if name in ("final", "state") else 2
        finite = np.isfinite(np.float32(result[name])).all(axis=tuple(set(range(4)) - {heads}))
        assert finite.tolist() == [True, False], name


def test_under_vmap_and_remat():
    def loss(tokens, state, d_out):
        ((out, final),) = wkv7_pallas_triton((tokens,), (state,), (True,), parts=2, interpret=INTERPRET)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(final)

    check_mapped(loss, *drawn("random", (4, 40, 1, 16, 16))[:3])


def test_over_devices():
    """Each device launches its own sequences and heads."""
    code = """
import jax, numpy as np
from tests.pallas_kernels.test_wkv7_triton import drawn, run

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
arguments = drawn("random", (2, 40, 4, 16, 16))
alone = run(*arguments, parts=2)
with jax.set_mesh(mesh):
    place = lambda x: jax.P("data", None, "model") if x.shape[1] == 40 else jax.P("data", "model")
    there = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, place(x))), arguments)
    split = run(*there, parts=2)
assert split["out"].sharding.spec[:3] == ("data", None, "model"), split["out"].sharding
jax.tree.map(lambda x, y: np.testing.assert_allclose(*(np.float32(z) for z in (x, y)), atol=1e-2), split, alone)
print("right")
"""
    assert on_eight_devices(code).strip() == "right"


def shapes(length, size=64, dtype="bfloat16"):
    """Of inputs by name."""
    inputs = jax.eval_shape(lambda: random_inputs((1, length, 12, size), dtype=dtype))
    return {name: inputs[name] for name in NAMES}


@pytest.fixture
def ampere(monkeypatch):
    """A process with a GPU that has tensor cores and is not of Hopper's kind."""
    monkeypatch.setattr(products, "has_tensor_cores", lambda: True)
    monkeypatch.setattr(api, "_is_hopper", lambda: False)


def triton_calls(op, given):
    return lowered_for_hopper(op, given).count("@__gpu$xla.gpu.triton")


@pytest.mark.parametrize("length, forward, both", [(100, 1, 3), (4096, 2, 6)])
def test_lowers_for_a_gpu(ampere, length, forward, both):
    """The default, with a launch for each pass over the tokens; in parts, their maps too."""

    def gradients(inputs):
        (out, _), pull = jax.vjp(lambda inputs: wkv7(**inputs, mild=True), inputs)
        return pull((out, jnp.zeros((1, 12, 64, 64))))

    assert triton_calls(lambda inputs: wkv7(**inputs, mild=True), shapes(length)) == forward
    assert triton_calls(gradients, shapes(length)) == both


def test_what_runs_where(ampere, monkeypatch):
    """These kernels where they take the inputs and no better ones do; no kernel on a CPU."""
    op = lambda inputs: wkv7(**inputs, mild=True)
    both = lambda inputs: wkv7_bidirectional(*(tuple(inputs[name] for name in NAMES),) * 2, mild=True)
    assert triton_calls(both, shapes(100)) == 2
    assert triton_calls(op, shapes(100, 48)) == 0 == triton_calls(op, shapes(100, dtype="float32"))
    assert triton_calls(lambda inputs: wkv7(**inputs, mild=True, chunk_size=64), shapes(100)) == 0
    assert "custom_call" not in jax.jit(op).trace(shapes(100)).lower(lowering_platforms=("cpu",)).as_text()
    with pytest.raises(ValueError, match="chunks of 16 tokens, not 64"):
        jax.eval_shape(lambda inputs: wkv7(**inputs, implementation="pallas_triton", chunk_size=64), shapes(100))
    monkeypatch.setattr(api, "_is_hopper", lambda: True)
    assert triton_calls(op, shapes(100)) == 0
    assert triton_calls(op, shapes(100, 32)) == 1


def test_strong_decays_are_the_definitions(ampere):
    """Without a promise there is a loop of no or one step beside the kernel."""
    text = lowered_for_hopper(lambda inputs: wkv7(**inputs), shapes(100))
    assert text.count("@__gpu$xla.gpu.triton") == 1 and "stablehlo.while" in text


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        ((1, 4, 2, 64, 64), "bfloat16", None),
        ((0, 4, 2, 64, 64), "bfloat16", "nothing to do"),
        ((1, 4, 2, 64, 64), "float32", "bfloat16, not float32"),
        ((1, 4, 2, 48, 64), "bfloat16", "powers of two"),
        ((1, 4, 2, 64, 128), "bfloat16", "powers of two"),
        ((1, 4, 1 << 16, 16, 16), "bfloat16", "rows"),
    ],
)
def test_unsupported(shape, dtype, reason):
    *tokens, key, value = shape
    r, v = (jax.ShapeDtypeStruct((*tokens, size), dtype) for size in (key, value))
    said = unsupported((r, r, r, v, r, r))
    assert said is None if reason is None else reason in said


def test_parts(monkeypatch):
    """As many as a GPU runs at once, of sixteen chunks at least."""
    monkeypatch.setattr(walks, "multiprocessors", lambda: 132)
    assert parts_of((1, 65536, 12, 64)) == 22
    assert parts_of((1, 1024, 12, 64)) == 4
    assert parts_of((1, 1, 12, 64)) == 1
    assert parts_of((8, 4096, 12, 64)) == 1
    assert parts_of((16, 4096, 12, 64)) == 1
    tokens, state, *_ = drawn("random", (1, 4, 1, 16, 16))
    with pytest.raises(ValueError, match="1 or more parts"):
        wkv7_pallas_triton((tokens,), (state,), (False,), parts=0)
    with pytest.raises(ValueError, match="chunks of 16"):
        wkv7_pallas_triton((tokens,), (state,), (False,), 64)
