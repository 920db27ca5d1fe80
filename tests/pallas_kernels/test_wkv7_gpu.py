"""The Hopper kernel of wkv7 against a float64 loop, run on a GPU or interpreted on a CPU; and compiled for CUDA.

Interpretation checks the arithmetic and where everything is read and written; it knows no races.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.compile_gpu import figures, instructions
from pallas_kernels.wkv7 import pallas_gpu
from pallas_kernels.wkv7.pallas_gpu import unsupported, wkv7_pallas_gpu
from pallas_kernels.wkv7.shapes import random_inputs
from tests.golden_arrays import relative_error
from tests.pallas_kernels.float64_wkv7 import NAMES, token_loop
from tests.pallas_kernels.operators import lowered_for_hopper, wkv7_and_gradients

BOTH = (False, True)
# What bfloat16 results allow, and what float32 ones do: the pairs of bfloat16 hold 2^-17.
TOLERANCE = {"random": 3e-3, "strong": 3e-3, "masked": 3e-3, "allmask": 2e-2}
FLOAT32 = {"final": 1e-5, "state": 1e-5, "dlog_w": 2e-4}

INTERPRET = jax.default_backend() != "gpu"
interpreted = pytest.mark.skipif(
    INTERPRET and not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} cannot interpret Mosaic GPU; 0.11 can",
)


def arguments(kind, length, seed=0, batch=1, heads=1):
    """(tokens, state, d_out, d_final) of one direction."""
    shape = (batch, length, heads, 64)
    inputs = random_inputs(shape, kind, dtype="bfloat16", seed=seed)
    state = inputs["initial_state"]
    d_out = random_inputs(shape, dtype="bfloat16", seed=seed + 1)["v"]
    return tuple(inputs[name] for name in NAMES), state, d_out, 0.3 * state[..., ::-1]


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(directions, reverse, parts=1):
    """Everything that token_loop returns, per direction."""
    tokens, states, d_out, d_final = zip(*directions, strict=True)
    op = lambda tokens, states: wkv7_pallas_gpu(tokens, states, reverse, parts=parts, interpret=INTERPRET)
    return wkv7_and_gradients(op, tokens, states, d_out, d_final)


def check(result, direction, reverse, tolerance):
    """Every array of a direction's result against float64."""
    tokens, state, d_out, d_final = direction
    expected = token_loop(dict(zip(NAMES, tokens, strict=True)), state, d_out, d_final, reverse)
    errors = {name: relative_error(result[name], x) for name, x in expected.items()}
    assert all(error <= FLOAT32.get(name, tolerance) for name, error in errors.items()), (reverse, errors)


@interpreted
@pytest.mark.parametrize(
    "kind, length, batch, heads",
    [
        ("random", 1, 1, 1),
        ("strong", 63, 1, 1),
        ("masked", 64, 1, 1),
        ("random", 20, 2, 2),
        ("allmask", 100, 1, 1),
        ("masked", 257, 1, 1),
        pytest.param("masked", 1024, 1, 1, marks=pytest.mark.slow),
    ],
)
def test_float64_loop(kind, length, batch, heads):
    """Outputs, final state and every gradient; a launch of two directions whose inputs differ."""
    directions = [arguments(kind, length, seed, batch, heads) for seed in (0, 10)]
    for result, direction, reverse in zip(run(directions, BOTH), directions, BOTH, strict=True):
        check(result, direction, reverse, TOLERANCE[kind])
        for name, x in result.items():
            assert x.dtype == ("float32" if name in FLOAT32 else "bfloat16"), name


@interpreted
@pytest.mark.parametrize(
    "kind, length, parts, batch, heads, ways",
    [
        ("masked", 150, 2, 1, 1, BOTH),
        pytest.param("random", 130, 3, 2, 2, BOTH, marks=pytest.mark.slow),
        pytest.param("strong", 257, 9, 1, 1, BOTH, marks=pytest.mark.slow),  # more parts than chunks
        pytest.param("allmask", 300, 5, 1, 1, BOTH, marks=pytest.mark.slow),
        pytest.param("masked", 8192, 8, 1, 1, (True,), marks=pytest.mark.slow),
    ],
)
def test_parts_of_the_time_axis(kind, length, parts, batch, heads, ways):
    """Side by side, of unequal lengths; outputs, final state and every gradient."""
    directions = [arguments(kind, length, 10 * i, batch, heads) for i in range(len(ways))]
    for result, direction, reverse in zip(run(directions, ways, parts), directions, ways, strict=True):
        check(result, direction, reverse, TOLERANCE[kind])


@interpreted
def test_parts_without_gradients():
    """Only the maps that are needed are made."""
    tokens, state, d_out, d_final = arguments("random", 100)
    op = jax.jit(lambda *x: wkv7_pallas_gpu(*x, (True,), parts=2, interpret=INTERPRET))
    ((out, final),) = op((tokens,), (state,))
    expected = token_loop(dict(zip(NAMES, tokens, strict=True)), state, d_out, d_final, True)
    assert relative_error(out, expected["out"]) < TOLERANCE["random"]
    assert relative_error(final, expected["final"]) < FLOAT32["final"]


@pytest.mark.parametrize("parts", (0, -1, 2.0, None))
def test_bad_parts(parts):
    tokens, state, *_ = arguments("random", 5)
    with pytest.raises(ValueError, match="1 or more parts"):
        wkv7_pallas_gpu((tokens,), (state,), (False,), parts=parts)


@interpreted
def test_what_float32_cannot_hold_is_not_a_number():
    """A decay that is too strong in one channel, in a launch whose other direction is right."""
    strong, other = [arguments("random", 20, seed) for seed in (0, 10)]
    tokens = list(strong[0])
    tokens[1] = tokens[1].at[..., 5].set(-6.0)
    first, second = run([(tuple(tokens), *strong[1:]), other], BOTH)
    check(second, other, True, TOLERANCE["random"])
    for name in ("out", "final", "state", "dr", "dlog_w", "dk", "da", "db"):
        assert np.isnan(np.asarray(first[name], np.float32)).any(), name


@pytest.fixture
def one_multiprocessor(monkeypatch):
    """A GPU on which one launch of both directions saves no wave of blocks."""
    jax.clear_caches()
    monkeypatch.setattr(pallas_gpu, "multiprocessors", lambda: 1)
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "blocks, together", [(24, True), (66, True), (67, False), (96, False), (133, True), (264, False)]
)
def test_backward_is_one_launch_where_that_saves_a_wave(blocks, together):
    """Of so many blocks a direction."""
    assert (pallas_gpu.waves(2 * blocks) < 2 * pallas_gpu.waves(blocks)) == together


@interpreted
def test_backward_in_two_launches(one_multiprocessor):
    directions = [arguments("random", 70, seed) for seed in (0, 10)]
    for parts in (1, 2):
        for found, given, reverse in zip(run(directions, BOTH, parts), directions, BOTH, strict=True):
            check(found, given, reverse, TOLERANCE["random"])


@interpreted
def test_one_launch_is_two():
    directions = [arguments("random", 70, seed) for seed in (0, 10)]
    together = run(directions, BOTH)
    for i, reverse in enumerate(BOTH):
        (alone,) = run(directions[i : i + 1], (reverse,))
        jax.tree.map(np.testing.assert_array_equal, together[i], alone)
        check(alone, directions[i], reverse, TOLERANCE["random"])


@interpreted
def test_vmap():
    """A mapped axis is a part of the batch."""
    tokens, state, *_ = arguments("random", 20, batch=2)
    op = lambda tokens, state: wkv7_pallas_gpu((tokens,), (state,), (False,), interpret=INTERPRET)
    mapped = jax.jit(jax.vmap(op))(jax.tree.map(lambda x: x[:, None], tokens), state[:, None])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:, 0], y), mapped, jax.jit(op)(tokens, state))


@interpreted
@pytest.mark.slow
def test_gradients_of_parts_under_vmap():
    tokens, state, d_out, _ = arguments("random", 70, batch=2)

    def loss(tokens, state, d_out, parts):
        ((out, _),) = wkv7_pallas_gpu((tokens,), (state,), (True,), parts=parts, interpret=INTERPRET)
        return jnp.sum(out * d_out)

    def gradients(parts):
        one = jax.tree.map(lambda x: x[:, None], (tokens, state, d_out))
        return jax.jit(jax.vmap(jax.grad(functools.partial(loss, parts=parts), (0, 1))))(*one)

    for x, y in zip(jax.tree.leaves(gradients(2)), jax.tree.leaves(gradients(1)), strict=True):
        assert x.dtype == y.dtype
        assert relative_error(x, y) < (5e-3 if y.dtype == jnp.bfloat16 else 1e-4)


@interpreted
def test_forward_without_gradients():
    """Saves no states, and says the same."""
    tokens, state, d_out, d_final = arguments("masked", 100)
    op = jax.jit(lambda tokens, state: wkv7_pallas_gpu((tokens,), (state,), (True,), interpret=INTERPRET))
    ((out, final),) = op(tokens, state)
    (expected,) = run([(tokens, state, d_out, d_final)], (True,))
    np.testing.assert_array_equal(out, expected["out"])
    np.testing.assert_array_equal(final, expected["final"])


@pytest.mark.parametrize("reverse, parts", [((True,), 1), pytest.param(BOTH, 1, marks=pytest.mark.slow), (BOTH, 2)])
def test_lowers_for_hopper(reverse, parts):
    """Forward and backward in a rematerialised scan under vmap, without a GPU: two kernels, and in parts their maps."""

    @jax.checkpoint
    def layer(tokens, states):
        results = wkv7_pallas_gpu(tokens, states, reverse, parts=parts)
        return sum(jnp.sum(out) + jnp.sum(final) for out, final in results)

    def loss(tokens, states):
        return jax.lax.scan(lambda total, _: (total + layer(tokens, states), None), 0.0, length=2)[0]

    tokens, state, *_ = jax.eval_shape(lambda: arguments("random", 100, batch=2, heads=2))
    mapped = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    given = jax.tree.map(mapped, ((tokens,) * len(reverse), (state,) * len(reverse)))
    text = lowered_for_hopper(jax.vmap(jax.grad(loss, (0, 1))), *given)
    count = 2 * parts
    assert text.count("mosaic_gpu_v2") == count or text.count("@mosaic_gpu") == count


def test_lowers_for_hopper_in_two_launches(one_multiprocessor):
    """Backward, with its maps in one."""
    tokens, state, *_ = jax.eval_shape(lambda: arguments("random", 100))

    def loss(tokens, states):
        return sum(jnp.sum(out) for out, _ in wkv7_pallas_gpu(tokens, states, BOTH, parts=2))

    text = lowered_for_hopper(jax.grad(loss, (0, 1)), (tokens,) * 2, (state,) * 2)
    assert text.count("mosaic_gpu_v2") == 5 or text.count("@mosaic_gpu") == 5


def compiled_for_hopper(tmp_path, *options):
    """Rows of `benchmarks.compile_gpu`, without a GPU."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("jax's plugin for CUDA 13, which has the compiler, is not installed")
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.compile_gpu", "--out", str(out), *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("name", ["birwkv", "bimamba_hybrid"])
def test_a_pass_compiles(tmp_path, name):
    """ssd's products in passes over bfloat16 once did not."""
    [row] = compiled_for_hopper(tmp_path, "--only", "passes", "--names", name, "--lengths", "512", "--size", "peer")
    assert row["kernels_layer"] > 0 and row["L"] == 512


def test_no_kernel_is_serialised(tmp_path):
    """A kernel whose products wait for each other is right, and slow."""
    rows = compiled_for_hopper(tmp_path, "--only", "kernels")
    assert len(rows) == 16
    for row in rows:
        assert not row["serialised"], row
        assert row["shared_bytes"] <= 232448 and row["registers"] <= 255, row
        assert row["blocks_a_multiprocessor"] == (1 if row["program"] == "wkv7 backward" else 2), row


def test_walks_stay_in_registers(tmp_path):
    """The kernels through Triton: a state that is spilled is read from memory at each chunk."""
    rows = compiled_for_hopper(tmp_path, "--only", "walks")
    assert len(rows) == 8
    for row in rows:
        assert row["kernels"] <= 7 and row["spill_stores"] < 4096, row


def test_what_the_compiler_prints():
    text = """Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function 'one_mosaic_gpu_kernel'
ptxas info    : Compiling entry function 'one_mosaic_gpu_kernel' for 'sm_90a'
    304 bytes stack frame, 300 bytes spill stores, 336 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR44].tnspB, RZ, !UPT ;
.L_x_2:
        /*0020*/                   F2FP.BF16.F32.PACK_AB R3, R4, R5 ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
Resources(smem_scratch_bytes=2048, tmem_scratch_cols=0)
ptxas info    : Compiling entry function 'two_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""
    found = figures(text)
    assert found["one"] == {
        "launches": 1,
        "serialised": True,
        "reason": "insufficient register resources for the function 'one_mosaic_gpu_kernel'",
        "registers": 255,
        "spill_stores": 300,
        "spill_loads": 336,
        "shared_bytes": 1024,
        "blocks_a_multiprocessor": 2,
        "instructions": 4,
        "code": 4,
        "wgmma": 1,
        "conversions": 1,
        "barriers": 0,
    }
    assert found["two"]["serialised"] is False and found["two"]["instructions"] is None
    assert found["two"]["shared_bytes"] == 2048
    with pytest.raises(ValueError, match="no kernel"):
        figures("nothing")


def test_a_loop_within_the_loop_over_chunks():
    """Runs five times, and one before it does not count."""
    product, other = "/*0010*/ HGMMA.64x64x16.F32.BF16 R24, R4, R8 ;", "/*0020*/ FADD R1, R2, R3 ;"
    lines = [".L_x_0:", product, "/*0030*/ @P0 BRA `(.L_x_0) ;", ".L_x_1:", *[product] * 20, ".L_x_2:", product, other]
    lines += ["/*0040*/ @P0 BRA `(.L_x_2) ;", other, "/*0050*/ @P1 BRA `(.L_x_1) ;", "/*0060*/ EXIT ;"]
    found = instructions("\n".join(lines))
    assert found["code"] == 25 and found["instructions"] == 25 + 4 * 3 and found["wgmma"] == 25


@pytest.mark.skipif(hasattr(plgpu, "InterpretGPUParams"), reason="this jax interprets Mosaic GPU")
def test_interpretation_needs_a_newer_jax():
    tokens, state, *_ = arguments("random", 1)
    with pytest.raises(NotImplementedError, match="newer"):
        wkv7_pallas_gpu((tokens,), (state,), (False,), interpret=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": jnp.zeros((1, 5, 1, 32), jnp.bfloat16)}, "K is 32"),
        ({"v": jnp.zeros((1, 5, 1, 80), jnp.bfloat16)}, "V is 80"),
        ({"a": jnp.zeros((1, 5, 1, 64), jnp.float32)}, "bfloat16, not bfloat16, float32"),
        ({"log_w": jnp.zeros((1, 5, 1, 64), jnp.bfloat16)}, "log_w in float32, not bfloat16"),
    ],
)
def test_unsupported(change, message):
    tokens, state, *_ = arguments("random", 5)
    assert unsupported(tokens) is None
    tokens = tuple((dict(zip(NAMES, tokens, strict=True)) | change).values())
    assert message in unsupported(tokens)
    with pytest.raises(ValueError, match=message):
        wkv7_pallas_gpu((tokens,), (state,), (False,))


def test_chunk_size():
    tokens, state, *_ = arguments("random", 5)
    with pytest.raises(ValueError, match="64 tokens, not 32"):
        wkv7_pallas_gpu((tokens,), (state,), (False,), chunk_size=32)
