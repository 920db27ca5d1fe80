"""The states between blocks: every form of wkv7_blocks and ssd_blocks against the operators run block after block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd import ssd, ssd_blocks
from pallas_kernels.ssd.chunked import ssd_blocks_associative
from pallas_kernels.ssd.shapes import random_inputs as ssd_inputs
from pallas_kernels.wkv7 import wkv7, wkv7_blocks
from pallas_kernels.wkv7.chunked import wkv7_blocks_associative
from pallas_kernels.wkv7.shapes import random_inputs as wkv7_inputs
from tests.golden_arrays import relative_error

OPERATORS = {
    "wkv7": (wkv7, wkv7_blocks, lambda length: wkv7_inputs((2, length, 2, 8), value_size=5)),
    "ssd": (ssd, ssd_blocks, lambda length: ssd_inputs((2, length, 4, 8, 2, 5))),
}
SEGMENTED = {"wkv7": wkv7_blocks_associative, "ssd": ssd_blocks_associative}
FORMS = ("reference", "chunked", "associative", "segmented", "None")


def one_after_another(operator, inputs, state, block):
    """The definition: a Python loop over blocks, each from the state of the one before."""
    length = next(iter(inputs.values())).shape[1]
    outs, states = [], []
    for start in range(0, length, block):
        part = {name: x[:, start : start + block] for name, x in inputs.items()}
        states.append(state)
        out, state = operator(**part, initial_state=state, implementation="reference")
        outs.append(out)
    return jnp.concatenate(outs, 1), jnp.stack([*states, state], 1)


def everything(run, inputs, state, cotangents):
    results, pull = jax.vjp(run, inputs, state)
    return results, pull(cotangents)


@functools.cache
def drawn(name, length, block):
    """(inputs, state, cotangents, the results of the definition and its gradients), the same for every form."""
    operator, _, make = OPERATORS[name]
    inputs = make(length)
    state = inputs.pop("initial_state")
    slow = functools.partial(one_after_another, operator, block=block)
    shapes = jax.eval_shape(slow, inputs, state)
    keys = jax.random.split(jax.random.key(length), 2)
    cotangents = tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True))
    expected = jax.jit(everything, static_argnums=0)(slow, inputs, state, cotangents)
    return inputs, state, cotangents, expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length, block", [(1, 1), (15, 5), pytest.param(96, 32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPERATORS)
def test_states_between_blocks(name, length, block, form):
    """Outputs, states, and the gradients that flow into both, on blocks that are no power of two too."""
    _, blocks, _ = OPERATORS[name]
    inputs, state, cotangents, expected = drawn(name, length, block)

    def fast(inputs, state):
        if form == "segmented":
            return SEGMENTED[name](**inputs, initial_state=state, block=block, chunk_size=4, segment=16)
        implementation = None if form == "None" else form
        return blocks(**inputs, block=block, initial_state=state, implementation=implementation)

    actual = jax.jit(everything, static_argnums=0)(fast, inputs, state, cotangents)
    assert actual[0][1].shape[1] == length // block + 1
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert relative_error(a, e) < 2e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_no_state_means_zeros(name):
    _, blocks, make = OPERATORS[name]
    inputs = make(6)
    zeros = jnp.zeros_like(inputs.pop("initial_state"))
    expected = blocks(**inputs, block=3, initial_state=zeros)
    for actual, expected_ in zip(blocks(**inputs, block=3), expected, strict=True):
        np.testing.assert_array_equal(actual, expected_)


@pytest.mark.parametrize("block", [0, 4, -1, 2.0])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_block_must_divide_the_length(name, block):
    _, blocks, make = OPERATORS[name]
    with pytest.raises(ValueError, match="divides the 6 tokens"):
        blocks(**make(6), block=block)


def test_kernels_do_not_give_these_states():
    with pytest.raises(ValueError, match="no form 'pallas_tpu'"):
        wkv7_blocks(**wkv7_inputs((1, 64, 1, 8)), block=32, implementation="pallas_tpu")
