"""Every form of ssd against the authors' numbers, and what is ssd's alone; test_recurrences.py has the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.shapes import KINDS, random_inputs
from tests.golden_arrays import assert_close, golden
from tests.pallas_kernels.float64_ssd import token_loop
from tests.pallas_kernels.operators import FORMS, SSD

pytestmark = pytest.mark.optimised
run, small = SSD.run, SSD.arguments


@pytest.mark.parametrize("form", FORMS)
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


@pytest.mark.parametrize("worst, reverse", ((-np.inf, False), (-1e30, True), (-1e3, False)))
@pytest.mark.parametrize("form", LONG_FORMS)
def test_no_decay_is_too_strong(form, worst, reverse):
    """Not even minus infinity, in one token of three; and every gradient stays right."""
    inputs, *others = small(shape=LONG)
    third = np.arange(150)[:, None] % 3 == 0
    some = [inputs | {"log_a": np.where(third, np.float32(x), inputs["log_a"])} for x in (worst, -1e3)]
    assert_close(run(form, reverse)(some[0], *others), token_loop(some[1], *others, reverse), 5e-6)


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
        ssd(**{**random_inputs(SSD.small), **change})
