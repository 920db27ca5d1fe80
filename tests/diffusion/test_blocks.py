"""Block after block: the law, the passes, what ends a text; the network is exact and its state is the text itself."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.samplers import (
    SAMPLERS,
    Ancestral,
    Autoregressive,
    BlockCached,
    BlockFns,
    Confidence,
    FirstHitting,
    FrozenCache,
    FrozenFns,
    Guided,
    Pipelined,
    WindowFns,
    sequence_keys,
)
from tests.diffusion.unknown_process import Unknown
from tests.thin import thin

SYMBOLS, MASK, LENGTH, BLOCK = 4, 4, 5, 2
PROCESS = Masked(Vocabulary(SYMBOLS + 1, MASK))
STATES = np.array(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
JOINT = np.random.default_rng(0).dirichlet(np.full(len(STATES), 0.3))
MATCHES = jnp.asarray(np.concatenate([STATES[..., None] == np.arange(SYMBOLS), np.ones((*STATES.shape, 1))], axis=-1))


def posterior(z):
    """Logits [B, LENGTH, 5] of the exact p(x_i | what z shows), the mask's above all."""
    agree = jnp.einsum("biv,siv->bs", jax.nn.one_hot(z, SYMBOLS + 1), MATCHES.astype(jnp.float32))
    weights = jnp.where(agree > LENGTH - 0.5, jnp.asarray(JOINT, jnp.float32), 0.0)
    marginals = jnp.einsum("bs,siv->biv", weights, MATCHES[..., :SYMBOLS].astype(jnp.float32))
    logits = jnp.log(jnp.maximum(marginals, 1e-30) / weights.sum(axis=1)[:, None, None])
    return jnp.concatenate([logits, jnp.full((*z.shape, 1), 9.0)], axis=-1)


def start(batch, room):
    """The state before the first position: no text, and its length."""
    return jnp.full((batch, max(room, LENGTH)), MASK, jnp.int32), jnp.zeros(batch, jnp.int32)


def put(state, z):
    text, length = state
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, 0))(text, z, length)


def denoise(z, t, state, valid):
    """What the whole text would give: the blocks that are not there yet are masked."""
    logits = jnp.pad(posterior(put(state, z)[:, :LENGTH]), ((0, 0), (0, BLOCK), (0, 0)))
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, z.shape[1], 0))(logits, state[1])


def context(z, state, valid):
    return put(state, z), state[1] + z.shape[1]


FNS = BlockFns(start, denoise, context)


@functools.partial(jax.jit, static_argnames=("sampler", "return_trace", "process"))
def generate(sampler, keys, canvas, valid=None, return_trace=True, process=PROCESS):
    return sampler(process, FNS, keys, canvas, valid=valid, return_trace=return_trace)


def canvases():
    """Nothing given, a prompt, scattered tokens, everything given."""
    canvas = np.full((4, LENGTH), MASK, np.int32)
    canvas[1, :3], canvas[2, 1::3], canvas[3] = 2, 1, [3, 0, 1, 2, 3]
    return jnp.asarray(canvas)


def fits(tokens, law):
    """P-value of samples [N, LENGTH] under a law over STATES."""
    index = (tokens * SYMBOLS ** np.arange(LENGTH)[::-1]).sum(axis=1)
    observed, expected = np.bincount(index, minlength=len(STATES)), law * len(tokens)
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def test_an_exact_sampler_has_the_law_of_the_text():
    """The last block is a shorter one, and no block sees what follows it: so only the joint law can fit."""
    canvas = jnp.full((40_000, LENGTH), MASK, jnp.int32)
    tokens = generate(BlockCached(FirstHitting(), BLOCK), sequence_keys(0, len(canvas)), canvas, None, False).tokens
    assert fits(np.asarray(tokens), JOINT) > 1e-3
    assert fits(np.asarray(tokens), np.roll(JOINT, 1)) < 1e-9


@pytest.mark.parametrize(
    "name", thin(sorted(n for n, cls in SAMPLERS.items() if cls.face == "denoise" and issubclass(Masked, cls.needs)))
)
def test_every_sampler_fills_blocks(name):
    canvas, keys = canvases(), sequence_keys(1, 4)
    sampler = BlockCached(SAMPLERS[name](), BLOCK)
    samples = generate(sampler, keys, canvas)
    tokens, trace, passes = (np.asarray(x) for x in (samples.tokens, samples.trace, samples.passes))
    given = np.asarray(canvas) != MASK
    assert (tokens != MASK).all() and (tokens[given] == np.asarray(canvas)[given]).all()
    assert (trace[0] == np.asarray(canvas)).all() and (trace[-1] == tokens).all()
    assert ((trace == np.asarray(canvas)) | ~given).all()
    assert passes[3] == 0 and (passes[:3] > 0).all()
    alone = generate(sampler, keys[1:2], canvas[1:2])
    np.testing.assert_array_equal(alone.tokens[0], tokens[1])
    assert alone.passes[0] == passes[1]


def test_blocks_of_noise_that_is_no_mask():
    """Every step of every block that has blanks, in order, and what is given stays."""
    sampler, canvas = BlockCached(Ancestral(num_steps=3), BLOCK), canvases()
    samples = generate(sampler, sequence_keys(3, 4), canvas, process=Unknown(PROCESS))
    assert samples.passes.tolist() == [3 * 4 + 2, 2 * 4 + 2, 2 * 4 + 1, 0]
    assert ((canvas == MASK) | (samples.trace == canvas)).all() and (samples.tokens != MASK).all()
    np.testing.assert_array_equal(samples.trace[-1], samples.tokens)


def test_blocks_come_in_order_in_the_trace():
    trace = np.asarray(generate(BlockCached(Ancestral(num_steps=3), BLOCK), sequence_keys(2, 4), canvases()).trace)
    assert len(trace) == 3 * 3 + 1
    for n in range(3):
        assert (trace[3 * (n + 1), 0, : BLOCK * (n + 1)] != MASK).all()
        assert (trace[3 * n, 0, BLOCK * n :] == MASK).all()


def test_passes_count_those_of_the_context():
    """One for each position here (threshold 1), and one for each block that has blanks behind it."""
    sampler = BlockCached(Confidence(rule="threshold", threshold=1.0), BLOCK)
    passes = generate(sampler, sequence_keys(0, 4), canvases()).passes
    assert passes.tolist() == [5 + 2, 2 + 2, 3 + 1, 0]


def test_block_after_block_is_the_whole():
    """`next_block`, called as long as one likes, gives what the loop gives."""
    sampler, keys = BlockCached(FirstHitting(), BLOCK), sequence_keys(4, 2)
    canvas = jnp.full((2, 4), MASK, jnp.int32)
    whole = generate(sampler, keys, canvas, None, False)
    state, parts = start(2, 4), []
    for n in range(2):
        samples, state = sampler.next_block(PROCESS, FNS, state, keys, n, canvas[:, :BLOCK])
        parts.append(samples.tokens)
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), whole.tokens)


def test_padding_is_left_alone_and_changes_nothing():
    sampler, keys = BlockCached(FirstHitting(), BLOCK), sequence_keys(5, 4)
    valid = jnp.arange(LENGTH)[None] < jnp.array([3, 5, 2, 5])[:, None]
    padded = jnp.where(valid, canvases(), 0)
    samples = generate(sampler, keys, padded, valid)
    np.testing.assert_array_equal(samples.tokens[~valid], 0)
    for row, length in ((0, 3), (2, 2)):
        alone = generate(sampler, keys[row : row + 1], canvases()[row : row + 1, :length])
        np.testing.assert_array_equal(samples.tokens[row, :length], alone.tokens[0])
        assert samples.passes[row] == alone.passes[0]


def test_a_text_ends_with_the_block_of_its_end():
    """Generated behind all that is given, and nowhere else; the other sequences go on."""
    keys = sequence_keys(6, 64)
    canvas = jnp.full((64, LENGTH), MASK, jnp.int32).at[:32, 2].set(1)
    whole = generate(BlockCached(FirstHitting(), BLOCK), keys, canvas)
    ended = generate(BlockCached(FirstHitting(), BLOCK, stop_id=0), keys, canvas)
    stops = 0
    for row in range(64):
        text = np.asarray(whole.tokens[row])
        ends = [i for i in range(3 if row < 32 else 0, LENGTH) if text[i] == 0]
        stop = LENGTH if not ends else (ends[0] // BLOCK + 1) * BLOCK
        np.testing.assert_array_equal(ended.tokens[row, :stop], text[:stop])
        assert (np.asarray(ended.tokens[row, stop:]) == MASK).all()
        if stop < LENGTH:
            assert ended.passes[row] < whole.passes[row]
            stops += 1
    assert stops > 10


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="block must be"):
        BlockCached(Ancestral(), 0)
    with pytest.raises(ValueError, match="not Autoregressive"):
        BlockCached(Autoregressive(), 4)
    with pytest.raises(ValueError, match="Guidance"):
        BlockCached(Guided(Ancestral(), 1.0), 4)
    with pytest.raises(ValueError, match="nothing to generate"):
        BlockCached(Ancestral(), 4)(PROCESS, FNS, sequence_keys(0, 1), jnp.zeros((1, 0), jnp.int32))
    assert dataclasses.replace(BlockCached(Ancestral(), 4), block=2).block == 2


# --- several blocks at once ---------------------------------------------------------------------------------------


def denoise_window(z, t, state, valid):
    """Each block of the window given the text and the blocks of the window before it, as they are."""
    logits = []
    for w in range(0, z.shape[1], BLOCK):
        logits.append(denoise(z[:, : w + BLOCK], t, state, valid)[:, w:])
    return jnp.concatenate(logits, axis=1)


def plain_pipeline(sampler, canvas):
    """D2F's decoding of one sequence, token by token in NumPy, at temperature 0: (tokens, passes)."""
    b, blocks = sampler.block, -(-LENGTH // sampler.block)
    text = canvas.copy()
    inside = [list(range(n * b, min(LENGTH, n * b + b))) for n in range(blocks)]
    share = lambda n: 1 - sum(text[i] == MASK for i in inside[n]) / b
    predict = jax.jit(lambda z: jax.nn.softmax(posterior(z)[..., :SYMBOLS], axis=-1))
    last = max((i // b for i in range(LENGTH) if text[i] == MASK), default=-1)
    first = added = passes = 0

    def take_done():
        nonlocal first, passes
        while (text == MASK).any() and first < last and share(first) == 1:
            first, passes = first + 1, passes + 1

    take_done()
    added = first
    while (text == MASK).any():
        grows = (share(added - 1) if added else share(0)) >= sampler.add_at
        grows = grows and added <= last and added - first < min(sampler.window, blocks)
        added = max(added + grows, first + 1)
        before, shares = text.copy(), [share(n) for n in range(blocks)]
        passes += 1
        for n in range(first, min(added, blocks)):
            seen = before.copy()
            seen[inside[n][-1] + 1 :] = MASK
            p = np.asarray(predict(jnp.asarray(seen)[None]))[0]
            masked = [i for i in inside[n] if before[i] == MASK]
            kept = [i for i in masked if p[i].max() > sampler.threshold]
            if masked and not kept and (n == first or shares[n - 1] >= sampler.activate_at):
                kept = [max(masked, key=lambda i: p[i].max())]
            for i in kept:
                text[i] = p[i].argmax()
        take_done()
    return text, passes


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.6},
        {"threshold": 0.4, "window": 2, "add_at": 0.5},
        {"threshold": 0.9, "activate_at": 0.5, "add_at": 0.01},
        {"threshold": 0.3, "window": 1},
    ],
)
def test_the_pipeline_is_d2fs(options):
    """Tokens and passes of each sequence of a batch, against the plain version of it alone."""
    rng = np.random.default_rng(1)
    canvas = np.where(rng.random((12, LENGTH)) < 0.7, MASK, rng.integers(SYMBOLS, size=(12, LENGTH))).astype(np.int32)
    canvas[:2], canvas[2] = MASK, [0, 1, 2, 3, 0]
    sampler = Pipelined(BLOCK, **options)

    @jax.jit
    def run(keys, canvas):
        return sampler(PROCESS, WindowFns(start, denoise_window, context), keys, canvas, return_trace=True)

    samples = run(sequence_keys(0, 12), jnp.asarray(canvas))
    for row in range(12):
        tokens, passes = plain_pipeline(sampler, canvas[row])
        np.testing.assert_array_equal(samples.tokens[row], tokens)
        assert samples.passes[row] == passes
    np.testing.assert_array_equal(samples.trace[-1], samples.tokens)
    assert samples.passes[2] == 0


# --- what is frozen -----------------------------------------------------------------------------------------------


def denoise_frozen(tokens, n, t, frozen, valid):
    """The block as it is, the rest as it was when the block began."""
    assert valid is None or valid.shape == tokens.shape
    inside = jnp.arange(tokens.shape[1]) // BLOCK == n
    logits = posterior(jnp.where(inside, tokens, frozen)[:, :LENGTH])
    logits = jnp.pad(logits, ((0, 0), (0, tokens.shape[1] - LENGTH), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(logits, n * BLOCK, BLOCK, 1)


FROZEN = FrozenFns(lambda tokens, t, valid: tokens, denoise_frozen)


def test_a_frozen_cache_pads_what_blocks_do_not_divide():
    """The network sees whole blocks, the caller its canvas."""
    sampler, keys, padding = FrozenCache(FirstHitting(), BLOCK), sequence_keys(7, 4), ((0, 0), (0, 1))
    run = jax.jit(lambda canvas, valid: sampler(PROCESS, FROZEN, keys, canvas, valid=valid, return_trace=True))
    samples = run(canvases(), None)
    padded = run(jnp.pad(canvases(), padding), jnp.pad(jnp.ones((4, LENGTH), bool), padding))
    for ours, theirs in zip(samples, (padded.tokens[:, :-1], padded.passes, padded.trace[:, :, :-1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert samples.passes.tolist() == [5 + 3, 2 + 2, 3 + 2, 0]
    given = np.asarray(canvases()) != MASK
    assert (samples.tokens != MASK).all() and (np.asarray(samples.tokens)[given] == np.asarray(canvases())[given]).all()


# --- what is seen meanwhile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, network",
    [
        (BlockCached(Ancestral(num_steps=4), BLOCK), FNS),
        (FrozenCache(Ancestral(num_steps=4), BLOCK), FROZEN),
        (Pipelined(BLOCK, threshold=0.6), WindowFns(start, denoise_window, context)),
    ],
    ids=["blocks", "frozen", "pipelined"],
)
def test_on_step_sees_what_the_trace_has(sampler, network):
    seen = []
    show = lambda z: jax.debug.callback(lambda z: seen.append(np.array(z)), z, ordered=True)
    options = {"return_trace": True, "on_step": show}
    samples = jax.jit(lambda k, c: sampler(PROCESS, network, k, c, **options))(sequence_keys(1, 4), canvases())
    jax.effects_barrier()
    for row in range(4):
        states = [np.asarray(samples.trace)[:, row], [*(z[row] for z in seen), samples.tokens[row]]]
        trace, told = ([z for z, _ in itertools.groupby(map(tuple, np.asarray(s).tolist()))] for s in states)
        assert told == trace and (len(told) > 1 or row == 3)


def test_bad_options_of_the_pipeline_are_named():
    for options in ({"threshold": 0.0}, {"threshold": 1.5}, {"add_at": 0}, {"activate_at": 2}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Pipelined(4, **options)
