"""Fast-dLLM's caches: exact where nothing can have changed, and then what is frozen and what is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import generation, sharding
from diffrwkv.data import tokenizers
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion.objectives import Diffusion
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.samplers import (
    CACHES,
    Ancestral,
    Autoregressive,
    Confidence,
    FrozenCache,
    Guided,
    sequence_keys,
)
from diffrwkv.networks import frozen_fns
from tests.random_parameters import random_parameters

VOCABULARY, MASK, BLOCK, LENGTH = 19, 18, 4, 12
OBJECTIVE = Diffusion(Masked(Vocabulary(VOCABULARY, MASK)))


@functools.cache
def network(num_layers, scan_layers=False):
    options = {"pattern": "attention", "channel_mixer": "mlp", "block": "dit", "mixers": {"attention": {"head_dim": 8}}}
    model = Denoiser(VOCABULARY, 16, num_layers, time_conditioning=True, scan_layers=scan_layers, **options)
    return model, random_parameters(model, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))


def canvases():
    """Nothing given, a prompt, scattered tokens, everything given."""
    canvas = np.full((4, LENGTH), MASK, np.int32)
    canvas[1, :6], canvas[2, 1::3], canvas[3] = 2, 1, 5
    return jnp.asarray(canvas)


def generate(sampler, num_layers, keys, canvas, valid=None, return_trace=False):
    return compiled(sampler, num_layers, return_trace)(network(num_layers)[1], keys, canvas, valid)


@functools.cache
def compiled(sampler, num_layers, return_trace):
    model, _ = network(num_layers)

    def run(params, keys, canvas, valid):
        fns = frozen_fns(model, OBJECTIVE, params, sampler, valid)
        return sampler(OBJECTIVE.process, fns, keys, canvas, valid=valid, return_trace=return_trace)

    return jax.jit(run)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_a_fresh_cache_is_exact(cache, scan_layers):
    """Right after it was filled, and padding, which has a length of its own in each row, changes nothing."""
    model, params = network(3, scan_layers)
    x = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCABULARY)
    t, valid = jnp.array([0.3, 0.8]), jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [10]])
    whole = jax.jit(lambda x: model.apply({"params": params}, x, t, valid=valid))(x)
    fns = frozen_fns(model, OBJECTIVE, params, FrozenCache(Ancestral(), BLOCK, cache), valid)
    run = jax.jit(lambda n: fns.denoise(x, n, t, fns.refresh(x, t, valid), valid))
    for n in range(LENGTH // BLOCK):
        here = slice(n * BLOCK, (n + 1) * BLOCK)
        np.testing.assert_allclose(run(n)[0], whole[0, here], atol=2e-5)
        real = min(BLOCK, 10 - n * BLOCK)
        np.testing.assert_allclose(run(n)[1, :real], whole[1, here][:real], atol=2e-5)


@pytest.mark.parametrize("cache", CACHES)
def test_what_is_frozen(cache):
    """A token that changes behind the block is seen through the prefix cache and not through the dual one."""
    model, params = network(2)
    x = jax.random.randint(jax.random.key(0), (1, LENGTH), 0, VOCABULARY)
    t, fns = jnp.array([0.5]), frozen_fns(model, OBJECTIVE, params, FrozenCache(Ancestral(), BLOCK, cache), None)
    run = jax.jit(lambda old, new: fns.denoise(new, 1, t, fns.refresh(old, t, None), None))
    at = lambda position: run(x, x.at[0, position].set((x[0, position] + 1) % VOCABULARY))
    changed = [bool((jnp.abs(at(position) - run(x, x)) > 1e-6).any()) for position in (0, BLOCK, LENGTH - 1)]
    assert changed == [False, True, cache == "prefix"]


@functools.cache
def without_a_cache():
    """(tokens, passes) of the canvases in the same blocks, each pass over the whole canvas."""
    model, params = network(1)

    @jax.jit
    def plain(keys, canvas):
        blank = canvas == MASK
        passes = 0
        for n in range(LENGTH // BLOCK):
            here = slice(n * BLOCK, (n + 1) * BLOCK)

            def denoise(z, t, here=here, canvas=canvas):
                whole = canvas.at[:, here].set(z)
                left = ((whole == MASK) & blank).sum(axis=1) / jnp.maximum(blank.sum(axis=1), 1)
                return model.apply({"params": params}, whole, left)[:, here]

            own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            samples = Confidence(num_steps=3, temperature=1.0)(OBJECTIVE.process, denoise, own, canvas[:, here])
            canvas, passes = canvas.at[:, here].set(samples.tokens), passes + samples.passes
        return canvas, passes + blank.reshape(4, -1, BLOCK).any(axis=2).sum(axis=1)

    return plain(sequence_keys(0, 4), canvases())


@pytest.mark.parametrize("cache", CACHES)
def test_one_layer_is_exact(cache):
    """Its keys and values are of the tokens themselves, and no other block changes meanwhile."""
    sampler = FrozenCache(Confidence(num_steps=3, temperature=1.0), BLOCK, cache)
    samples = generate(sampler, 1, sequence_keys(0, 4), canvases())
    tokens, passes = without_a_cache()
    np.testing.assert_array_equal(samples.tokens, tokens)
    np.testing.assert_array_equal(samples.passes, passes)
    assert samples.passes[3] == 0


def test_the_trace_has_the_blocks_in_order():
    samples = generate(FrozenCache(Ancestral(num_steps=3), BLOCK), 1, sequence_keys(1, 4), canvases(), None, True)
    trace, given = np.asarray(samples.trace), np.asarray(canvases()) != MASK
    assert len(trace) == 3 * (LENGTH // BLOCK) + 1
    assert (trace[0] == canvases()).all() and (trace[-1] == samples.tokens).all()
    for n in range(LENGTH // BLOCK):
        assert (trace[3 * (n + 1), :, : BLOCK * (n + 1)] == samples.tokens[:, : BLOCK * (n + 1)]).all()
        assert ((trace[3 * n] == MASK) | given)[:, BLOCK * n :].all()


@pytest.mark.parametrize("cache", CACHES)
def test_padding_and_the_batch_change_nothing(cache):
    sampler, keys = FrozenCache(Ancestral(num_steps=4), BLOCK, cache), sequence_keys(1, 4)
    valid = jnp.arange(LENGTH)[None] < jnp.array([[8], [12], [4], [12]])
    samples = generate(sampler, 2, keys, jnp.where(valid, canvases(), 0), valid)
    np.testing.assert_array_equal(samples.tokens[~valid], 0)
    for row, length in ((0, 8), (2, 4), (1, 12)):
        alone = generate(sampler, 2, keys[row : row + 1], canvases()[row : row + 1, :length])
        np.testing.assert_array_equal(samples.tokens[row, :length], alone.tokens[0])
        assert samples.passes[row] == alone.passes[0]


def test_the_sampler_pads_what_blocks_do_not_divide():
    model, params = network(1)
    tokenizer = tokenizers.Char("".join(map(chr, range(97, 97 + MASK))))
    sampler = FrozenCache(Ancestral(num_steps=4), BLOCK)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    generator = generation.Generator(model, OBJECTIVE, sampler, tokenizer, mesh)
    samples = generator(params, np.asarray(canvases())[:, :10], seed=1)
    valid = jnp.arange(LENGTH)[None] < jnp.full((4, 1), 10)
    expected = generate(sampler, 1, sequence_keys(1, 4), jnp.where(valid, canvases(), 0), valid)
    np.testing.assert_array_equal(samples.tokens, expected.tokens[:, :10])


def test_bad_input_is_named():
    for change, message in (
        ({"cache": "suffix"}, "prefix, dual"),
        ({"block": 0}, "block must be"),
        ({"sampler": Autoregressive()}, "not Autoregressive"),
        ({"sampler": Guided(Ancestral(), 1.0)}, "not Guided"),
    ):
        with pytest.raises(ValueError, match=message):
            FrozenCache(**{"sampler": Ancestral()} | change)
