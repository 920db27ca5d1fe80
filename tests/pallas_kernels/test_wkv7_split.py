"""The time axis of wkv7 in segments: equal to the operator in one piece, in every output and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.wkv7 import api, wkv7, wkv7_bidirectional
from pallas_kernels.wkv7.shapes import random_inputs
from pallas_kernels.wkv7.split import choose_parts, split, wkv7_pallas_gpu_split
from tests.eight_devices import on_eight_devices
from tests.golden_arrays import assert_close, relative_error
from tests.pallas_kernels.float64_wkv7 import NAMES, token_loop
from tests.pallas_kernels.operators import lowered_for_hopper, wkv7_and_gradients

BOTH = (False, True)


def direction(shape, kind="random", seed=0, value_size=None, dtype="float32"):
    """(tokens, state, d_out, d_final) of one direction."""
    inputs = random_inputs(shape, kind, value_size=value_size, seed=seed, dtype=dtype)
    state = inputs["initial_state"]
    d_out = random_inputs(shape, value_size=value_size, seed=seed + 1, dtype=dtype)["v"]
    return tuple(inputs[name] for name in NAMES), state, d_out, 0.3 * state[..., ::-1]


def plain(ways, states, reverse, form):
    """Each direction in one piece."""
    each = zip(ways, states, reverse, strict=True)
    return tuple(wkv7(*x, initial_state=s, reverse=way, mild=True, implementation=form) for x, s, way in each)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def everything(directions, reverse, form, parts, chunk_size=64):
    """Per direction out, final state and all gradients, by name."""
    tokens, states, d_out, d_final = zip(*directions, strict=True)
    run = functools.partial(plain, reverse=reverse, form=form)
    op = lambda ways, states: split(run, ways, states, reverse, parts, chunk_size)
    return wkv7_and_gradients(op, tokens, states, d_out, d_final)


@pytest.mark.parametrize("form", ("chunked", "associative"))
@pytest.mark.parametrize("kind", ("random", "masked", "allmask"))
@pytest.mark.parametrize("length, parts", [(1, 2), (63, 5), (100, 3), (1000, 5)])
def test_float64_loop(length, parts, kind, form):
    """Two directions of different inputs; segments that are cut short, empty, and no multiple of anything."""
    directions = [direction((2, length, 1, 16), kind, seed, 5) for seed in (0, 10)]
    results = everything(directions, BOTH, form, parts, 16)
    for result, (tokens, state, d_out, d_final), reverse in zip(results, directions, BOTH, strict=True):
        expected = token_loop(dict(zip(NAMES, tokens, strict=True)), state, d_out, d_final, reverse)
        if kind == "allmask":  # a small difference of large numbers, whose digits float32 lacks in one piece too
            assert relative_error(result["db"], expected.pop("db")) < 5e-3
        assert_close(result, expected, {"random": 2e-6, "masked": 1e-5, "allmask": 2e-5}[kind])
        assert all(x.dtype == jnp.float32 for x in result.values())


def test_the_definition_in_segments():
    """With a state that JAX differentiates itself through, all gradients, and no direction but one."""
    (given,) = [direction((1, 20, 2, 8), value_size=5)]
    for reverse in BOTH:
        pieces, whole = (everything([given], (reverse,), "reference", parts, 4)[0] for parts in (3, 1))
        assert_close(pieces, whole, 2e-6)


def test_transformations():
    """Under vmap, scan and remat; no final state is wanted, so its cotangent is zero."""
    tokens, state, d_out, _ = direction((2, 40, 1, 8), value_size=8)

    def loss(tokens, state, parts):
        run = functools.partial(plain, reverse=(True,), form="chunked")
        op = lambda tokens, state: split(run, (tokens,), (state,), (True,), parts, 8)[0][0]
        body = jax.checkpoint(lambda x, _: (op((*tokens[:3], x, *tokens[4:]), state), None))
        return jnp.sum(jax.lax.scan(body, tokens[3], length=2)[0] * d_out[:1])

    def gradients(parts):
        one = jax.tree.map(lambda x: x[:, None], (tokens, state))
        return jax.jit(jax.vmap(jax.grad(functools.partial(loss, parts=parts), (0, 1))))(*one)

    jax.tree.map(lambda x, y: np.testing.assert_array_less(relative_error(x, y), 2e-6), gradients(3), gradients(1))


def test_over_devices():
    """A batch that is split over devices stays so: no segment moves."""
    code = """
import functools, jax, numpy as np
from pallas_kernels.partition import devices_of
from tests.pallas_kernels.test_wkv7_split import *
given = direction((8, 40, 1, 8))
alone = everything([given], (False,), "chunked", 2, 8)
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
    assert devices_of("btgk", (8, 40, 1, 8)) == 4 and devices_of("btgk", (1, 40, 6, 8)) == 2
    there = jax.device_put(given, jax.NamedSharding(mesh, jax.P("data")))
    program = everything.lower([there], (False,), "chunked", 2, 8).compile()
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), program([there]), alone)
print("right")
"""
    assert on_eight_devices(code).strip() == "right"


@pytest.mark.parametrize("parts", (0, -1, 2.0, None))
def test_bad_parts(parts):
    tokens, state, *_ = direction((1, 4, 1, 8))
    with pytest.raises(ValueError, match="1 or more parts"):
        split(functools.partial(plain, reverse=(False,), form="chunked"), (tokens,), (state,), (False,), parts)


@pytest.mark.parametrize(
    "blocks, length, parts",
    [
        (24, 65536, 11),  # both directions of one sequence of 12 heads
        (12, 131072, 22),
        (24, 8192, 11),
        (24, 1024, 4),
        (24, 128, 1),  # another launch would not pay
        (48, 65536, 5),  # 6 would be more blocks than the GPU holds
        (66, 65536, 4),
        (133, 65536, 1),
        (192, 4096, 1),
        (1, 65536, 79),
        (1, 1, 1),
    ],
)
def test_number_of_parts(blocks, length, parts):
    assert choose_parts(blocks, length, 132) == parts


# The Hopper kernel; its numbers are tested in test_wkv7_gpu.py.


def lowered(op, length):
    """The program of op(ways, states), of both directions of 2 heads, for a Hopper GPU."""
    token = {name: jax.ShapeDtypeStruct((1, length, 2, 64), "bfloat16") for name in NAMES}
    token["log_w"] = jax.ShapeDtypeStruct((1, length, 2, 64), "float32")
    state = jax.ShapeDtypeStruct((1, 2, 64, 64), "float32")
    return lowered_for_hopper(op, (tuple(token.values()),) * 2, (state,) * 2)


@pytest.mark.parametrize(
    "length, options, count",
    [(65536, {"parts": 1}, 2), pytest.param(256, {"parts": 3}, 4, marks=pytest.mark.slow), (65536, {}, 4)],
)
def test_lowers_for_hopper(length, options, count):
    """In one piece a kernel each way; in parts one more, for what they do to the state."""

    def loss(tokens, states):
        results = wkv7_pallas_gpu_split(tokens, states, BOTH, **options)
        return sum(jnp.sum(out) + jnp.sum(final) for out, final in results)

    text = lowered(jax.grad(loss, (0, 1)), length)
    assert text.count("mosaic_gpu_v2") == count or text.count("@mosaic_gpu") == count
    assert ("tensor<1x2x32x64x64xf32>" in text) == (options == {})  # maps of 32 parts


@pytest.mark.parametrize("implementation", (None, "pallas_gpu"))
def test_the_operator_is_split(implementation, monkeypatch):
    monkeypatch.setattr(api, "_is_hopper", lambda: True)
    op = lambda ways, states: wkv7_bidirectional(*ways, initial_states=states, implementation=implementation)
    maps = "tensor<1x2x33x64x64xf32>"  # of 33 parts
    assert maps in lowered(op, 66 * 1024)
    assert "x64x64xf32" not in lowered(op, 128).replace("1x2x64x64xf32", "").replace("1x2x1x64x64xf32", "")
