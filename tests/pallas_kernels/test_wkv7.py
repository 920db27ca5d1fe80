"""Every form of wkv7 against the authors' numbers, and what is wkv7's alone; test_recurrences.py has the rest."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.wkv7 import wkv7, wkv7_bidirectional, wkv7_blocks
from pallas_kernels.wkv7.chunked import LONGEST_ALONE, _rows
from pallas_kernels.wkv7.shapes import KINDS, random_inputs
from tests.golden_arrays import ELSEWHERE, FOLDER, assert_close, relative_error
from tests.pallas_kernels.float64_wkv7 import NAMES, token_loop
from tests.pallas_kernels.operators import FORMS, WKV7
from tests.thin import slow

pytestmark = pytest.mark.optimised
# golden/rwkv7/README.md: what a fair float32 program errs; five times that is allowed.
FAIR = {"random": 2e-6, "mixdecay": 2e-6, "flip": 2e-6, "strong": 2e-6, "masked": 1e-5, "allmask": 1e-4}
FOLDERS = (ELSEWHERE / "rwkv7", FOLDER)
CASES = sorted({path.name: path for folder in FOLDERS for path in folder.glob("wkv7_*.npz")}.items())

run, small = WKV7.run, WKV7.arguments
PARALLEL = ("chunked", "associative")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", [pytest.param(path, id=name[5:-4]) for name, path in CASES])
def test_golden(path, form):
    """Outputs, final state and every gradient of RWKV-7's authors' loop, float64."""
    with np.load(path) as file:
        arrays = dict(file)
    inputs = {name: jnp.asarray(arrays[name], "float32") for name in NAMES if name != "log_w"}
    log_w = -np.exp(-0.5) / (1 + np.exp(-arrays["w_raw"].astype(np.float64)))
    inputs["log_w"] = jnp.asarray(log_w, "float32")
    batch, _, heads, size = inputs["r"].shape
    # Theirs is (B, H, V, K).
    state, d_final = (
        jnp.asarray(arrays[x], "float32").mT if x in arrays else jnp.zeros((batch, heads, size, size))
        for x in ("s0", "dsT")
    )
    result = run(form)(inputs, state, jnp.asarray(arrays["do"], "float32"), d_final)
    expected = {"out": arrays["o"], "final": arrays["sT"].swapaxes(-1, -2)}
    expected |= {f"d{name}": arrays[f"d{name}"] for name in NAMES}
    if "ds0" in arrays:
        expected["state"] = arrays["ds0"].swapaxes(-1, -2)
    assert_close(result, expected, 5 * FAIR[path.name.split("_")[1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", PARALLEL)
def test_statistics(form, kind):
    """Masked, all-masked and quickly forgetting sequences stay finite and right, both ways and in every gradient."""
    arguments = small(kind, (1, 80, 1, 64, 64))
    tolerance = {"masked": 5e-5, "allmask": 5e-4}.get(kind, 1e-5)
    for_loop = {name: arguments[0][name] for name in NAMES}
    result = run(form)(*arguments)
    assert all(np.isfinite(x).all() for x in result.values())
    loop = token_loop(for_loop, arguments[1])
    assert_close({name: result[name] for name in loop}, loop, tolerance)
    assert_close(result, run("reference")(*arguments), tolerance)


def decaying(inputs, log_w):
    """The inputs with a log_w everywhere, or with one drawn out of several for each number."""
    drawn = np.random.default_rng(0).choice(np.float32(np.atleast_1d(log_w)), inputs["log_w"].shape)
    return inputs | {"log_w": jnp.asarray(drawn)}


DECAYS = (-1, -6, -30, -1e4, -np.inf, (0, -0.3, -1, -6, -30, -1e4, -np.inf), (0.5, -0.6, 6, -6))


@pytest.mark.parametrize(
    "form, length, reverse",
    [
        *(("chunked", length, reverse) for length, reverse in ((1, False), (63, True), (100, False), (300, True))),
        *(("associative", length, reverse) for length, reverse in ((63, True), (100, False), (300, True))),
        ("reference", 63, True),
        *map(slow, [("reference", 1, False), ("reference", 100, False), ("reference", 300, True)]),
        slow(("associative", 1, False)),
    ],
)
def test_no_decay_is_too_strong(length, reverse, form):
    """Not even minus infinity; and what a trace cannot refuse, a log_w above 0, is the recurrence's growing state."""
    arguments = small(shape=(1, length, 1, 8, 5))
    for log_w in DECAYS[: None if length == 1 else -1]:  # a hundred tokens of growth leave float32
        inputs, *rest = decaying(arguments[0], log_w), *arguments[1:]
        result = run(form, reverse, mild=False)(inputs, *rest)
        assert_close(result, token_loop(inputs, *rest, reverse=reverse), 1e-5)


@pytest.fixture
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _both(tokens, half, state, **options):
    return wkv7_bidirectional(tokens, half, initial_states=(state, state), **options)


def _single(tokens, half, state, **options):  # chunks whose final state is not wanted
    options |= {"final_state": False}
    return wkv7(*tokens, **options), wkv7(*half, initial_state=state, **options)


def _mapped(tokens, half, state, **options):
    op = functools.partial(wkv7, **options)
    one = jax.tree.map(lambda x: x[:, None], (tokens, state))
    return jax.vmap(lambda tokens, state: op(*tokens, initial_state=state))(*one)


def _blocks(tokens, half, state, **options):
    return wkv7_blocks(*half, block=4, initial_state=state, **options)


@pytest.mark.parametrize(
    "form, call",
    [*(("chunked", x) for x in (_both, _single, _mapped, _blocks)), *(("associative", x) for x in (_mapped, _blocks))],
)
def test_strong_decays_in_other_calls(form, call, compiled_quickly):
    """Both directions, single chunks without states, vmap, states between blocks; out and gradients; bfloat16 too."""
    inputs, state, *_ = small(shape=(2, 12, 1, 8, 5))
    inputs = decaying(inputs, DECAYS[5])
    tokens = tuple(inputs[name] for name in NAMES)

    def everything(tokens, state, form):
        def run(tokens, state):
            half = tuple(x.astype("bfloat16") for x in tokens)
            return call(tokens, half, state, implementation=form)

        results, pull = jax.vjp(run, tokens, state)
        return results, pull(jax.tree.map(jnp.cos, results))

    fast, slow = (jax.tree.leaves(jax.jit(everything, static_argnums=2)(tokens, state, x)) for x in (form, "reference"))
    for x, y in zip(fast, slow, strict=True):
        assert relative_error(x, y) < (1e-2 if y.dtype == jnp.bfloat16 else 1e-5)


def test_a_promise_of_mild_decays_spares_a_program():
    inputs, *_ = small("strong")
    texts = [jax.jit(functools.partial(wkv7, mild=mild)).lower(**inputs).as_text() for mild in (False, True)]
    assert texts[0].count("stablehlo.while") > texts[1].count("stablehlo.while")
    np.testing.assert_array_equal(*(jax.jit(functools.partial(wkv7, mild=mild))(**inputs)[0] for mild in (False, True)))


@pytest.mark.parametrize("log_w, mild, message", [(1e-3, False, "log_w <= 0"), (0.3, True, "<= 0"), (-6, True, "mild")])
def test_what_is_known_is_refused(log_w, mild, message):
    inputs, *_ = small()
    log_w = jnp.asarray(inputs["log_w"]).at[1, 3, 1, 2].set(log_w)
    with pytest.raises(ValueError, match=message):
        wkv7(**inputs | {"log_w": log_w}, mild=mild)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda r: wkv7(**inputs | {"log_w": log_w, "r": r}, mild=mild))(inputs["r"])


@pytest.mark.parametrize("reverse, stateful", [(False, False), (True, True), slow((False, True)), slow((True, False))])
@pytest.mark.parametrize(
    "batch, length, stretches", [(96, 5, 2), (67, 5, 1), (1, 5, 1), (32, 17, 2), (3, LONGEST_ALONE, 1)]
)
def test_many_short_sequences(batch, length, stretches, reverse, stateful, compiled_quickly):
    """Blocks of one chunk whose final state is not wanted, some at a time: the definition's, gradients too."""
    inputs, state, d_out, _ = small("masked", (batch, length, 2, 32, 20))
    assert batch // _rows(jnp.zeros((batch, max(8, length), 2, 32))) == stretches

    def everything(form):
        def op(inputs, state):
            given = {"initial_state": state} if stateful else {}
            out, final = wkv7(**inputs, **given, final_state=False, reverse=reverse, mild=True, implementation=form)
            assert final is None
            return out

        out, pull = jax.vjp(op, inputs, state)
        gradients, d_state = pull(d_out)
        return {"out": out} | {name: gradients[name] for name in NAMES} | ({"state": d_state} if stateful else {})

    assert_close(*(jax.jit(everything, static_argnums=0)(form) for form in ("chunked", "reference")), 5e-6)


@pytest.mark.parametrize("length, wanted, chunks", [(17, False, 1), (17, True, 2), (LONGEST_ALONE + 1, False, 4)])
def test_a_short_sequence_is_one_chunk(length, wanted, chunks):
    """Where no state is wanted."""
    op = lambda inputs: wkv7(**inputs, final_state=wanted, mild=True, implementation="chunked")[0]
    text = str(jax.make_jaxpr(op)(random_inputs((1, length, 2, 32))))
    assert re.findall(r"length=(\d+)", text) == [str(chunks)]


def lowered(platform, shape, implementation=None, **options):
    """The program of the operator on another platform, as text."""
    op = jax.jit(functools.partial(wkv7, implementation=implementation, **options))
    return op.trace(**random_inputs(shape)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ("cpu", "cuda", "tpu"))
def test_chosen_at_lowering(platform):
    """The default lowers to the chunk scan for CPU and, without a kernel, to the associative form elsewhere."""
    shape = (1, 256, 1, 20)  # a head size that no kernel takes
    count = {form: lowered(platform, shape, form).count("dot_general") for form in (None, *PARALLEL)}
    chosen, other = PARALLEL if platform == "cpu" else PARALLEL[::-1]
    assert count[None] == count[chosen] != count[other]


def test_kernel_chosen_at_lowering():
    assert "wkv7_forward" in lowered("tpu", (1, 256, 1, 32))
    assert "wkv7_forward" not in lowered("tpu", (1, 256, 1, 32), chunk_size=8)  # too small for it
    assert "wkv7_forward" not in lowered("cpu", (1, 256, 1, 32))


def test_both_directions():
    """Two different directions in one call are two calls."""
    (forward, state, *_), (backward, *_) = small(), small("masked")
    ways = [tuple(inputs[name] for name in NAMES) for inputs in (forward, backward)]
    both = jax.jit(wkv7_bidirectional)(*ways, initial_states=(state, None))
    alone = jax.jit(wkv7)(**forward, initial_state=state), jax.jit(functools.partial(wkv7, reverse=True))(**backward)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), both, alone)
    with pytest.raises(ValueError, match="one shape"):
        wkv7_bidirectional(ways[0], [x[:, :5] for x in ways[1]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": jnp.zeros((2, 37, 2, 9))}, "make them agree"),
        ({"v": jnp.zeros((2, 36, 2, 5))}, "make them agree"),
        ({"k": jnp.zeros((37, 2, 8))}, r"\[B, T, H, K\]"),
        ({"a": jnp.zeros((2, 37, 2, 8), jnp.int32)}, "a is int32"),
        ({"b": jnp.zeros((2, 37, 2, 8), jnp.float16)}, "b is float16"),
        ({"initial_state": jnp.zeros((2, 2, 5, 8))}, "initial_state"),
        ({"implementation": "pallas"}, "reference, chunked, associative"),
        ({"implementation": "pallas_tpu"}, "runs on a TPU and this process has cpu"),
        ({"implementation": "pallas_gpu"}, "runs on Hopper GPUs .* this process has cpu"),
        ({"implementation": "chunk"}, "no implementation 'chunk'"),
        ({"chunk_size": 24}, "chunk_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 16, "implementation": "reference"}, "no chunks"),
        ({"reverse": jnp.bool_(True)}, "reverse"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        wkv7(**{**random_inputs((2, 37, 2, 8), value_size=5), **change})
