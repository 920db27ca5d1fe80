"""The kernels around wkv7 against NumPy in float64: run where they belong, interpreted elsewhere; and lowered.

Interpretation proves the numbers, and lowering that Mosaic and Triton take the program; benchmarks/compile_tpu.py and
benchmarks/compile_gpu.py compile it.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.time_mix import LowRank, api, finish, operands, pallas_gpu, pallas_tpu, token_mixes
from pallas_kernels.time_mix.kernels import finish_kernel, operands_kernel, token_mixes_kernel
from tests.eight_devices import on_eight_devices
from tests.golden_arrays import relative_error
from tests.pallas_kernels import float64_time_mix as float64
from tests.pallas_kernels.operators import lowered_for_hopper
from tests.pallas_kernels.test_time_mix import check, low_rank, projections

PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
KERNELS = tuple(PLATFORMS)
B, K = 2, 64
# length, heads, dtype: one token; an odd number of them; more than a block, and of channels as well
CASES = [(1, 1, "float32"), (63, 2, "bfloat16"), (131, 3, "float32")]


def form(kernel):
    return f"{'named' if PLATFORMS[kernel] == jax.default_backend() else 'interpreted'}:{kernel}"


@pytest.fixture
def draw(request):
    rng = np.random.default_rng(zlib.crc32(request.node.name.encode()))
    return lambda *shape: rng.normal(size=shape)


def tolerance(dtype):
    return 1e-5 if dtype == "float32" else 2e-2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "sides, length, heads, dtype",
    [(("previous", "next"), *case) for case in CASES] + [(("previous",), *CASES[2])],
)
def test_token_mixes(sides, length, heads, dtype, kernel, draw):
    inputs = draw(B, length, K * heads), draw(3, len(sides), K * heads)
    op = lambda x, mu: token_mixes_kernel(x, mu, sides, form(kernel))
    check(op, lambda x, mu: float64.token_mixes(x, mu, None, sides), inputs, draw, dtype, tolerance(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "blended, masked, same, length, heads, dtype",
    [
        (True, False, False, *CASES[0]),
        (True, True, False, *CASES[1]),
        (True, True, False, *CASES[2]),
        (False, False, True, *CASES[2]),
    ],
)
def test_operands(blended, masked, same, length, heads, dtype, kernel, draw):
    shape = B, length, K * heads
    k, v, raw = projections(shape, 3 if blended else 2, draw, masked=same)
    if length > 1 and blended:  # a rank that is no power of two
        raw = low_rank(shape, (32, 16, 48), draw)
    vectors = tuple(draw(K * heads) for _ in range(4))
    blend = (draw(*shape), draw(K * heads)) if blended else None
    valid = np.arange(length) < np.array([[length], [length // 2]]) if masked else None
    if masked:  # padding may hold anything that is finite
        k[1, length // 2 :] = 0

    def op(k, v, raw, vectors, blend):
        mask = None if valid is None else jnp.asarray(valid)
        return operands_kernel(k, v, raw, blend, vectors, mask, K, 1.5, form(kernel))

    exact = lambda k, v, raw, vectors, blend: float64.operands(k, v, raw, *vectors, blend, K, 1.5, valid)
    check(op, exact, (k, v, raw, vectors, blend), draw, dtype, tolerance(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "ways, gated, length, heads, dtype",
    [(2, True, *CASES[2]), (2, True, *CASES[1]), (2, False, *CASES[0]), (1, False, *CASES[2])],
)
def test_finish(ways, gated, length, heads, dtype, kernel, draw):
    flat = B, length, K * heads
    sides = tuple((*(draw(B, length, heads, K) for _ in range(4)), draw(*flat)) for _ in range(ways))
    vectors = tuple(tuple(draw(K * heads) for _ in range(3)) for _ in range(ways))
    merge = (draw(*flat), draw(K * heads)) if gated else None
    if gated:
        gates = [low_rank(flat, (32,), draw) for _ in sides]
        sides = tuple((*side[:4], gate) for side, gate in zip(sides, gates, strict=True))
        merge = low_rank(flat, (16,), draw), merge[1]
    op = lambda sides, vectors, merge: finish_kernel(sides, vectors, merge, form(kernel))
    check(op, float64.finish, (sides, vectors, merge), draw, dtype, tolerance(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_key_of_zeros_has_a_gradient(kernel):
    zeros, vector = jnp.zeros((1, 2, K)), jnp.ones(K)

    def total(k):
        return sum(
            x.sum() for x in operands_kernel(k, zeros, (zeros, zeros), None, (vector,) * 4, None, K, 1.0, form(kernel))
        )

    value, gradient = jax.value_and_grad(total)(zeros)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def layer(forms):
    """All pieces of a layer: (x [B, T, D], vector [D], valid) -> y."""

    def maps(x, count=1):
        up = jnp.linspace(-1, 1, 32 * x.shape[-1]).reshape(32, -1)
        return LowRank(x[..., :64], (up,) * count, (0, 32, 16)[:count])

    def run(x, vector, valid):
        mu = jnp.stack([vector, 2 * vector])[:, None].repeat(2, 1)
        (r, _), (k, v) = token_mixes_kernel(x, mu, ("previous", "next"), forms)
        made = operands_kernel(k, v, maps(r, 3), (v, vector), (vector,) * 4, valid, K, 1.0, forms)
        side = made[0].astype(x.dtype), made[1], made[2], r.reshape(made[0].shape), maps(k)
        return finish_kernel((side, side), ((vector,) * 3,) * 2, (maps(v), vector), forms)

    return run


def everything(forms):
    """A layer, and its gradients."""

    def run(x, vector, valid):
        y, pull = jax.vjp(lambda x, vector: layer(forms)(x, vector, valid), x, vector)
        return y, pull(y)

    return run


def arguments(batch, length, heads, dtype="float32"):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(batch, length, K * heads)), dtype)
    return x, jnp.asarray(rng.normal(size=K * heads), "float32"), jnp.asarray(rng.random((batch, length)) < 0.8)


def test_under_vmap_and_remat(kernel="pallas_gpu"):
    """A mapped axis is a part of the batch, and launches follow one another where vectors are mapped."""
    x, vector, valid = arguments(4, 5, 1)
    x, vectors = x.reshape(2, 2, 5, K), jnp.stack([vector, -vector])
    results = []
    for forms in (form(kernel), ()):
        run = lambda x, vector, forms=forms: layer(forms)(x, vector, valid[:2])
        gradients = jax.grad(lambda *z, run=run: jnp.sum(jax.checkpoint(run)(*z) ** 2), (0, 1))
        both = lambda x, vectors, run=run, g=gradients: (
            jax.vmap(g, (0, None))(x, vectors[0]),
            jax.vmap(run)(x, vectors),
        )
        results.append(jax.jit(both)(x, vectors))
    for result, plain in zip(*map(jax.tree.leaves, results), strict=True):
        assert relative_error(result, plain) < 1e-4


SPLIT = """
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.golden_arrays import relative_error
from tests.pallas_kernels.test_time_mix_kernels import arguments, everything

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
given = arguments(4, 20, 2)
whole = jax.jit(everything(()))(*given)
jax.set_mesh(mesh)
split = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, (P("data"), P(), P("data")))]
result = jax.jit(everything("interpreted:pallas_tpu"))(*split)
assert result[0].sharding.spec[0] == "data", result[0].sharding
for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(whole), strict=True):
    assert relative_error(x, y) < 1e-4
print("split")
"""


def test_split_over_devices():
    """Each device launches its own part of the batch, and of the heads; sums over tokens are those of all devices."""
    assert on_eight_devices(SPLIT).split() == ["split"]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("shape", [(2, 256, 12), (1, 63, 3), (1, 1, 1)])
def test_lowers_for_a_tpu(shape, dtype):
    text = jax.jit(everything(("pallas_tpu",))).trace(*arguments(*shape, dtype)).lower(lowering_platforms=("tpu",))
    assert text.as_text().count("tpu_custom_call") == 6


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_lowers_for_a_gpu(dtype):
    text = lowered_for_hopper(everything(("pallas_gpu",)), *arguments(2, 100, 3, dtype))
    assert text.count("@__gpu$xla.gpu.triton") == 6


def test_a_cpu_gets_the_plain_form():
    """Of a program that has the TPU's kernels too."""
    x, vector, valid = arguments(2, 9, 1)
    assert "custom_call" not in jax.jit(everything(("pallas_tpu",))).trace(x, vector, valid).lower().as_text()


def test_what_runs_where(monkeypatch):
    x, mu = jnp.zeros((1, 4, 128)), jnp.zeros((2, 1, 128))
    assert api._choice("token_mixes", None, (x,)) == ("pallas_tpu",)  # if the program should be lowered for one
    monkeypatch.setattr(api, "_is_gpu", lambda: True)
    assert api._choice("token_mixes", None, (x,)) == KERNELS
    assert api._choice("token_mixes", None, (x,), unfit="it takes no carry") == "fused"
    assert api._choice("token_mixes", None, (x.astype("float16"),)) == "fused"
    assert api._choice("token_mixes", None, (x[:, :0],)) == "fused"
    assert api._choice("finish", None, (x,), 48) == "fused"  # heads of 48
    assert api._choice("token_mixes", "pallas_gpu", (x,)) == "named:pallas_gpu"
    with pytest.raises(ValueError, match="token_mixes cannot run 'pallas_gpu' here: it takes no carry"):
        token_mixes(x, mu, carry=x[:, 0], implementation="pallas_gpu")
    with pytest.raises(ValueError, match="on a TPU and this process has cpu"):
        token_mixes(x, mu, implementation="pallas_tpu")


def test_a_gpu_that_is_none():
    heads, flat, vector = jnp.zeros((1, 4, 2, 64)), jnp.zeros((1, 4, 128)), jnp.zeros(128)
    with pytest.raises(ValueError, match="compute capability 8"):
        finish(((heads,) * 4 + (flat,),), ((vector,) * 3,), implementation="pallas_gpu")
    with pytest.raises(ValueError, match="compute capability 8"):
        named = dict.fromkeys(("w0", "a0", "k_k", "k_a"), vector)
        operands(flat, flat, (flat, flat), **named, head_dim=64, implementation="pallas_gpu")


def test_unsupported():
    assert "power of two" in pallas_gpu.unsupported((1, 4, 96), 48)
    assert "power of two" in pallas_gpu.unsupported((1, 4, 8))
    assert "rows" in pallas_gpu.unsupported((1 << 16, 4, 64))
    assert "multiples of 16" in pallas_gpu.unsupported((1, 4, 192), 64, (32, 24))
    assert "divides 128" in pallas_tpu.unsupported((1, 4, 96), 48)
    assert pallas_gpu.unsupported((1, 4, 192), 64) is None and pallas_tpu.unsupported((1, 4, 192), 64) is None
