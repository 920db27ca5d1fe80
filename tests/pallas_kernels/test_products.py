"""Products in passes over bfloat16: emulated, on what a diffusion model eats; and where the operators ask for them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import products
from pallas_kernels.choices import segments_of
from pallas_kernels.products import HIGHEST, SIX_PASSES, THREE_PASSES, einsum, matmul, precise
from pallas_kernels.ssd import chunked as ssd_chunked
from pallas_kernels.ssd import ssd, ssd_blocks
from pallas_kernels.ssd.shapes import random_inputs as ssd_inputs
from pallas_kernels.wkv7 import chunked as wkv7_chunked
from pallas_kernels.wkv7 import wkv7, wkv7_bidirectional, wkv7_blocks
from pallas_kernels.wkv7.shapes import random_inputs as wkv7_inputs
from tests.golden_arrays import relative_error
from tests.pallas_kernels.float64_wkv7 import NAMES, token_loop


def in_passes(product, parts):
    """`product` of two float32 arrays, each a sum of so many bfloat16: what XLA makes of BF16_BF16_F32_X3 and X6."""

    def cut(x):
        cuts = []
        for _ in range(parts):
            cuts.append(jax.lax.optimization_barrier(x.astype(jnp.bfloat16).astype(jnp.float32)))
            x = x - cuts[-1]
        return cuts

    def run(x, y):
        pairs = itertools.product(enumerate(cut(x)), enumerate(cut(y)))
        return sum(product(a, b) for (i, a), (j, b) in reversed(list(pairs)) if i + j < parts)

    return run


# Of float32 results, by the kind of inputs: the definition's own five times, as in test_wkv7.py; with bfloat16 inputs
# the kernels' bounds.
SIX = {"random": 1e-5, "strong": 1e-5, "masked": 5e-5, "allmask": 5e-4}
THREE = {"random": 1e-4, "strong": 1e-4, "masked": 1e-4, "allmask": 1e-4}


@pytest.mark.parametrize("kind", SIX)
@pytest.mark.parametrize("dtype, parts", [("bfloat16", 2), ("float32", 3)])
def test_wkv7_in_passes(dtype, parts, kind, monkeypatch):
    """Outputs and all gradients against float64: bfloat16's rounding is all that three passes add to."""
    monkeypatch.setattr(wkv7_chunked, "matmul", in_passes(matmul, parts))
    inputs = wkv7_inputs((1, 192, 1, 64), kind, dtype=dtype)
    state = inputs.pop("initial_state")
    d_out, d_final = wkv7_inputs((1, 192, 1, 64), dtype=dtype, seed=1)["v"], 0.3 * state[..., ::-1]

    @jax.jit
    def run(inputs, state):
        op = functools.partial(wkv7, mild=True, implementation="associative")
        (out, final), pull = jax.vjp(lambda inputs, state: op(**inputs, initial_state=state), inputs, state)
        gradients, d_state = pull((d_out, d_final))
        return {"out": out, "final": final, "state": d_state} | {f"d{name}": gradients[name] for name in NAMES}

    expected = token_loop(inputs, state, d_out, d_final)
    for name, x in run(inputs, state).items():
        bound = 3e-3 if x.dtype == jnp.bfloat16 else (THREE if dtype == "bfloat16" else SIX)[kind]
        assert relative_error(x, expected[name]) < bound, name


@pytest.mark.parametrize("kind", ("masked", "resets"))
@pytest.mark.parametrize("dtype, parts, bound", [("bfloat16", 2, 1e-4), ("float32", 3, 5e-6)])
def test_ssd_in_passes(dtype, parts, bound, kind, monkeypatch):
    inputs = ssd_inputs((1, 150, 4, 16, 1, 16), kind, dtype=dtype)
    same = lambda z: z.astype("float32")

    def run(implementation, inputs):
        op = lambda inputs: ssd(**inputs, implementation=implementation)
        (y, final), pull = jax.vjp(op, inputs)
        return final, pull((jnp.cos(y), jnp.sin(final)))[0]

    exact = jax.jit(functools.partial(run, "reference"))(jax.tree.map(same, inputs))
    product = lambda equation: in_passes(functools.partial(einsum, equation), parts)
    monkeypatch.setattr(ssd_chunked, "einsum", lambda equation, x, y: product(equation)(x, y))
    result = jax.jit(functools.partial(run, "associative"))(inputs)
    for x, y in zip(*map(jax.tree.leaves, (result, exact)), strict=True):
        assert relative_error(x, y) < (5e-3 if x.dtype == jnp.bfloat16 else bound)


def _wkv7(inputs):
    return wkv7(**inputs, mild=True)


def _named(inputs):
    return wkv7(**inputs, implementation="associative")


def _both(inputs):
    ways = (tuple(inputs[name] for name in NAMES),) * 2
    return wkv7_bidirectional(*ways, mild=True)


def _blocks(inputs):
    return wkv7_blocks(**inputs, block=16, mild=True)


def _ssd(inputs):
    return ssd(**inputs)


def _ssd_blocks(inputs):
    return ssd_blocks(**inputs, block=16)


@pytest.mark.parametrize("dtype, passes", [("bfloat16", 3), ("float32", 6)])
@pytest.mark.parametrize("op", (_wkv7, _named, _both, _blocks, _ssd, _ssd_blocks))
def test_where_there_are_tensor_cores(op, dtype, passes, monkeypatch):
    """Every product forward and backward for a GPU, and none for another platform."""
    make, shape = (ssd_inputs, (1, 128, 2, 8, 1, 8)) if "ssd" in op.__name__ else (wkv7_inputs, (1, 128, 1, 8))
    inputs = make(shape, dtype=dtype)

    def counts(platform):
        def run(inputs):
            results, pull = jax.vjp(op, inputs)
            return pull(results)

        text = jax.jit(run).trace(inputs).lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        told = f"num_primitive_operations = {passes}"
        # The definition in place of what is too strong reads and writes its state with HIGHEST.
        return sum(told in line for line in lines), sum("algorithm" not in line for line in lines)

    assert counts("cuda")[0] == 0  # in a process without a GPU
    monkeypatch.setattr(products, "has_tensor_cores", lambda: True)
    by_passes, plain = counts("cuda")
    assert by_passes >= 20 and (plain == 0 or op is _named)
    assert counts("cpu")[0] == 0 and counts("tpu")[0] == 0


@pytest.mark.parametrize(
    "backend, capability, expected",
    [
        ("gpu", "8.0", True),
        ("gpu", "8.9", True),
        ("gpu", "12.0", True),
        ("gpu", "7.5", False),
        ("gpu", "gfx90a", False),
        ("cpu", "8.0", False),
    ],
)
def test_which_gpus_have_them(backend, capability, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"compute_capability": capability})])
    assert products.has_tensor_cores.__wrapped__() == expected


def test_precise_is_undone():
    x = jnp.ones((2, 2))
    text = lambda: str(jax.make_jaxpr(matmul)(x, x))
    with pytest.raises(RuntimeError), precise(SIX_PASSES):
        with precise(THREE_PASSES):
            assert "X3" in text()
        assert "X6" in text()
        raise RuntimeError
    assert "HIGHEST" in text() and HIGHEST is jax.lax.Precision.HIGHEST


@pytest.mark.parametrize(
    "pieces, width, segment, expected",
    [(10, 4, 16, (3, 4)), (10, 4, 17, (3, 4)), (10, 64, 1, (10, 1)), (1, 64, 10**9, (1, 1)), (64, 64, 200, (22, 3))],
)
def test_segments(pieces, width, segment, expected):
    assert segments_of(pieces, width, segment) == expected


def test_segments_fill_an_accelerator_and_stay_in_a_cache():
    """The fewer sequences there are, the more of each at once; as many numbers whatever the shape."""
    for shape, value in (((1, 65536, 12, 64), 64), ((8, 4096, 12, 64), 64), ((32, 256, 4, 32), 128)):
        batch, _, heads, key = shape
        for on_cpu, numbers in ((True, 2**18), (False, 2**23)):
            tokens = wkv7_chunked.segment_of(shape, value, on_cpu)
            np.testing.assert_allclose(tokens * batch * heads * max(key, value), numbers, rtol=0.01)
