"""Products in passes over bfloat16: emulated, on what a diffusion model eats; and where the operators ask for them."""

import functools
import itertools

import jax
import jax.numpy as jnp
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
from tests.pallas_kernels.float64_wkv7 import NAMES
from tests.pallas_kernels.operators import OPERATORS


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


# Of float32 results: what is asked of a float32 program in test_wkv7.py, and with bfloat16 inputs of the kernels.
SIX = {"masked": 5e-5, "allmask": 5e-4}
THREE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype, parts", [("bfloat16", 2), ("float32", 3)])
@pytest.mark.parametrize("name, kind", [(name, kind) for name, x in OPERATORS.items() for kind in x.kinds])
def test_in_passes(name, kind, dtype, parts, monkeypatch):
    """Outputs and all gradients against float64: three passes are hidden by bfloat16, six add nothing."""
    operator = OPERATORS[name]
    monkeypatch.setattr(wkv7_chunked, "matmul", in_passes(matmul, parts))
    product = lambda equation: in_passes(functools.partial(einsum, equation), parts)
    monkeypatch.setattr(ssd_chunked, "einsum", lambda equation, x, y: product(equation)(x, y))
    arguments = operator.arguments(kind, (1, 192, 1, 64, 64) if name == "wkv7" else (1, 192, 2, 32, 1, 64), dtype)
    result = operator.run.__wrapped__(operator, "associative")(*arguments)
    for name, expected in operator.loop(*arguments).items():
        six = SIX.get(kind, 1e-5)
        bound = 3e-3 if result[name].dtype == jnp.bfloat16 else THREE if dtype == "bfloat16" else six
        assert relative_error(result[name], expected) < bound, name


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


@pytest.mark.parametrize(
    "op, dtype, passes",
    [
        *((op, "bfloat16", 3) for op in (_wkv7, _named, _both, _blocks, _ssd, _ssd_blocks)),
        *((op, "float32", 6) for op in (_wkv7, _ssd)),
    ],
)
def test_where_there_are_tensor_cores(op, dtype, passes, monkeypatch):
    """Every product forward and backward for a GPU, and none for another platform."""
    make, shape = (ssd_inputs, (1, 128, 2, 8, 1, 8)) if "ssd" in op.__name__ else (wkv7_inputs, (1, 128, 1, 8))
    inputs = make(shape, dtype=dtype)

    def traced():
        def run(inputs):
            results, pull = jax.vjp(op, inputs)
            return pull(results)

        return jax.jit(run).trace(inputs)

    def counts(program, platform):
        text = program.lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        told = f"num_primitive_operations = {passes}"
        # The definition in place of what is too strong reads and writes its state with HIGHEST.
        return sum(told in line for line in lines), sum("algorithm" not in line for line in lines)

    assert counts(traced(), "cuda")[0] == 0  # in a process without a GPU
    monkeypatch.setattr(products, "has_tensor_cores", lambda: True)
    program = traced()
    by_passes, plain = counts(program, "cuda")
    assert by_passes >= (15 if op in (_ssd, _ssd_blocks) else 20)
    assert plain == 0 or op in (_named, _ssd, _ssd_blocks)  # ssd's sums over a chunk
    assert counts(program, "cpu")[0] == 0


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
    text = lambda: jax.jit(lambda x: matmul(x, x)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(RuntimeError), precise(SIX_PASSES):
        with precise(THREE_PASSES):
            assert "num_primitive_operations = 3" in text()
        assert "num_primitive_operations = 6" in text()
        raise RuntimeError
    assert "precision = [HIGHEST, HIGHEST]" in text() and HIGHEST is jax.lax.Precision.HIGHEST


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
            token = batch * heads * max(key, value)
            assert numbers - token < tokens * token <= numbers
