"""Every sampler against its paper's algorithm, written plainly, one sequence at a time, and fed with the same noise.

And those that are exact against the law of the data.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffrwkv.diffusion.noise import gumbel_from_uniform, uniform
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.samplers import (
    ICE,
    Ancestral,
    Confidence,
    FirstHitting,
    Guided,
    Prophet,
    ReMDM,
    sequence_keys,
)
from diffrwkv.diffusion.schedules import Cosine, Linear, LogLinear

VOCABULARY, MASK, LENGTH, BATCH, STEPS = 7, 5, 12, 4, 14
PROCESS = Masked(Vocabulary(VOCABULARY, MASK))
TABLE = np.random.default_rng(0).normal(size=(LENGTH, VOCABULARY, VOCABULARY, VOCABULARY)).astype(np.float32) * 2


def network(z, t, table=TABLE, xp=np):
    """Logits [B, L, V] from each position, its two neighbours and the time, on NumPy or JAX."""
    left, right = xp.pad(z, ((0, 0), (1, 0)))[:, :-1], xp.pad(z, ((0, 0), (0, 1)))[:, 1:]
    return table[xp.arange(LENGTH)[None], left, right] * (1 + t)[:, None, None]


def log_probs(z, t, guidance=0.0, given=None):
    """float64 [L, V] for one sequence [L], the mask left out."""
    logits = network(z[None], np.float32([t]))[0].astype(np.float64)
    if guidance:
        prompt_masked = network(np.where(given, MASK, z)[None], np.float32([t]))[0].astype(np.float64)
        logits = prompt_masked + (guidance + 1) * (logits - prompt_masked)
    logits[:, MASK] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def canvases():
    """Nothing given, a prompt, scattered givens, everything given."""
    canvas = np.full((BATCH, LENGTH), MASK, np.int32)
    canvas[1, :3] = 2
    canvas[2, 1::4] = 4
    canvas[3] = 1
    return canvas


@functools.cache
def noise():
    """The noise of seed 0: u [B, L], gumbel [B, L, V], and the same for each step: u [B, L, S], gumbel [B, L, S, V]."""

    def fold(keys, numbers):
        return jax.vmap(jax.random.fold_in, (None, 0))(keys, numbers)

    @jax.jit
    @jax.vmap
    def draw(key):
        when, what = (fold(key, 2 * jnp.arange(LENGTH, dtype=jnp.uint32) + i) for i in (0, 1))
        steps = jnp.arange(STEPS, dtype=jnp.uint32)
        when_steps, what_steps = (jax.vmap(fold, (0, None))(keys, steps) for keys in (when, what))
        gumbel = lambda key: gumbel_from_uniform(uniform(key, (VOCABULARY,)))
        each = jax.vmap(jax.vmap(uniform))
        return jax.vmap(uniform)(when), jax.vmap(gumbel)(what), each(when_steps), jax.vmap(jax.vmap(gumbel))(what_steps)

    return [np.asarray(x, np.float64) for x in draw(sequence_keys(0, BATCH))]


def check(sampler, plain, process=PROCESS):
    """The sampler's tokens, passes and trace are those of plain(canvas [L], noise of its sequence) -> [z, ...]."""

    @jax.jit
    def run(keys, canvas):
        denoise = functools.partial(network, table=jnp.asarray(TABLE), xp=jnp)
        return sampler(process, denoise, keys, canvas, return_trace=True)

    canvas = canvases()
    samples = run(sequence_keys(0, BATCH), jnp.asarray(canvas))
    for i in range(BATCH):
        states, passes = [canvas[i]], 0
        if (canvas[i] == MASK).any():
            states, passes = plain(canvas[i], [x[i] for x in noise()])
        trace = np.asarray(samples.trace[:, i])
        states = states + [states[-1]] * (len(trace) - len(states))
        np.testing.assert_array_equal(trace, np.stack(states), err_msg=f"sequence {i}")
        np.testing.assert_array_equal(samples.tokens[i], states[-1])
        assert samples.passes[i] == passes, (i, passes)
    return samples


# First hitting


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()])
def test_first_hitting(schedule):
    def plain(z, noise):
        u, gumbel, *_ = noise
        states, masked = [z], [i for i in range(LENGTH) if z[i] == MASK]
        m = float(schedule.mask_probability(jnp.float32(1)))
        levels = m * u
        while masked:
            n = len(masked)
            # Of the paper's two draws, u is the ratio of levels to the n-th power, and the position is any of n.
            position = max(masked, key=lambda i: levels[i])
            u_n = (levels[position] / m) ** n
            m = m * u_n ** (1 / n)
            t = float(schedule.time(jnp.float32(m)))
            z = z.copy()
            z[position] = (log_probs(z, t) + gumbel)[position].argmax()
            masked.remove(position)
            states.append(z)
        return states, len(states) - 1

    check(FirstHitting(), plain, dataclasses.replace(PROCESS, schedule=schedule))


def test_first_hitting_is_the_limit_of_ancestral_sampling():
    canvas = jnp.asarray(canvases())

    def run(sampler):
        fixed = lambda z, t: network(z, jnp.zeros_like(t), jnp.asarray(TABLE), jnp)
        return jax.jit(lambda keys: sampler(PROCESS, fixed, keys, canvas))(sequence_keys(0, BATCH))

    exact, fine = run(FirstHitting()), run(Ancestral(num_steps=100_000))
    np.testing.assert_array_equal(exact.tokens, fine.tokens)
    np.testing.assert_array_equal(exact.passes, fine.passes)


# Confidence, and what leaves it early


def share_time(masked, blank):
    """The time at which LogLinear masks this share of what it masks at 1."""
    return masked.sum() / blank.sum()


def predict(p, z, gumbel, u, score, temperature):
    """LLaDA: candidates [L] and their confidence [L] from log p [L, V]."""
    if temperature:
        exponential = np.exp(-gumbel)
        candidates = (np.exp(p) / exponential**temperature).argmax(axis=-1)
    else:
        candidates = p.argmax(axis=-1)
    p = np.exp(p)
    descending = -np.sort(-p, axis=-1)
    confidence = {
        "probability": p[np.arange(LENGTH), candidates],
        "margin": descending[:, 0] - descending[:, 1],
        "entropy": (p * np.log(np.maximum(p, 1e-300))).sum(axis=-1),
        "random": u,
    }[score]
    return candidates, confidence


def plain_confidence(
    canvas,
    noise,
    *,
    num_steps=128,
    block=LENGTH,
    score="probability",
    rule="steps",
    threshold=0.9,
    factor=1.0,
    temperature=0.0,
    guidance=0.0,
    answer=(),
    leave=lambda p, z, passes, planned: False,
):
    """LLaDA's loop over blocks and steps, with Fast-dLLM's rules. `answer` are blanks that no step may fill."""
    *_, u, gumbel = noise
    blank, z, states, passes = canvas == MASK, canvas, [canvas], 0
    stepped = [i for i in range(LENGTH) if blank[i] and i not in answer]
    first = stepped[0] if stepped else 0
    blocks = [[i for i in stepped if start <= i < start + block] for start in range(first, LENGTH, block)]
    planned = sum(min(num_steps, len(b)) for b in blocks)
    if not stepped:
        blocks = [list(answer)]  # one pass, which leaves
    for b in blocks:
        step = 0
        while any(z[i] == MASK for i in b):
            masked = [i for i in b if z[i] == MASK]
            p = log_probs(z, share_time(z == MASK, blank), guidance, ~blank)
            now, z = z, z.copy()
            if leave(p, now, passes, planned):
                z[now == MASK] = p.argmax(axis=-1)[now == MASK]
                return [*states, z], passes + 1
            candidates, confidence = predict(p, now, gumbel[:, passes], u[:, passes], score, temperature)
            ranked = sorted(masked, key=lambda i: -confidence[i])
            if rule == "steps":
                number = len(b) // num_steps + (step < len(b) % num_steps)
            elif rule == "threshold":
                number = max(1, sum(confidence[i] >= threshold for i in masked))
            else:
                fits = [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - confidence[ranked[n - 1]]) < factor]
                number = max(fits, default=1)
            for i in ranked[:number]:
                z[i] = candidates[i]
            states.append(z)
            passes, step = passes + 1, step + 1
    if (z == MASK).any():  # only an answer is left
        p = log_probs(z, share_time(z == MASK, blank))
        z = np.where(z == MASK, p.argmax(axis=-1), z)
        return [*states, z], passes + 1
    return states, passes


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 3, "block": 5, "temperature": 0.7},
        {"num_steps": 3, "block": 4, "score": "margin"},
        {"num_steps": 7, "score": "entropy", "temperature": 1.0},
        {"num_steps": 5, "score": "random"},
        {"rule": "threshold", "threshold": 0.75, "block": 6},
        {"rule": "factor", "factor": 1.2},
        {"rule": "factor", "factor": 1.2, "score": "margin", "temperature": 0.5},
    ],
    ids=str,
)
def test_confidence(options):
    samples = check(Confidence(**options), functools.partial(plain_confidence, **options))
    blanks = (canvases() == MASK).sum(axis=1)[:3]
    assert (samples.passes[:3] < blanks).any()  # so several are kept at once


def test_guidance():
    options = {"num_steps": 5, "block": 4}
    plain = functools.partial(plain_confidence, **options, guidance=1.5)
    check(Guided(Confidence(**options), scale=1.5), lambda *a: (lambda s, n: (s, 2 * n))(*plain(*a)))


def last_blanks(canvas, number):
    return [i for i in range(LENGTH) if canvas[i] == MASK][-number:]


@pytest.mark.parametrize(
    "options", [{"gaps": (2.2, 1.9, 1.5)}, {"answer_length": 2, "num_steps": 4, "block": 6}], ids=str
)
def test_prophet(options):
    steps = {k: v for k, v in options.items() if k in ("num_steps", "block")}
    gaps, number = options.get("gaps", (7.5, 5.0, 2.5)), options.get("answer_length", LENGTH)

    def plain(canvas, noise):
        answer = last_blanks(canvas, number)

        def leave(p, z, passes, planned):
            if not (masked := [i for i in answer if z[i] == MASK]):
                return True
            top = -np.sort(-p[masked], axis=-1)
            progress = passes / planned
            return (top[:, 0] - top[:, 1]).mean() >= gaps[0 if progress < 1 / 3 else 1 if progress < 2 / 3 else 2]

        return plain_confidence(canvas, noise, **steps, leave=leave)

    samples = check(Prophet(**options), plain)
    full = [plain_confidence(canvas, [x[0] for x in noise()], **steps)[1] for canvas in canvases()[:3]]
    assert (samples.passes[:3] < np.asarray(full)).any()


@pytest.mark.parametrize(
    "options", [{"answer_length": 3, "threshold": 0.85}, {"answer_length": 2, "threshold": 1.0}], ids=str
)
def test_ice(options):
    def plain(canvas, noise):
        answer = last_blanks(canvas, options["answer_length"])

        def leave(p, z, passes, planned):
            return np.exp(p[answer]).max(axis=-1).mean() >= options["threshold"]

        return plain_confidence(canvas, noise, num_steps=6, block=5, answer=answer, leave=leave)

    samples = check(ICE(num_steps=6, block=5, **options), plain)
    if options["threshold"] == 1:  # never sure: the answer comes whole, after all the thinking
        before = np.asarray(samples.trace)[samples.passes[0] - 1, 0]
        assert (before[-2:] == MASK).all() and (before[:-2] != MASK).all()


# ReMDM


@pytest.mark.parametrize(
    "options, schedule",
    [
        ({"strategy": "cap", "eta": 0.2}, LogLinear()),
        ({"strategy": "rescale", "eta": 0.3}, Cosine()),
        ({"strategy": "conf"}, LogLinear()),
        ({"strategy": "loop", "eta": 0.1}, LogLinear()),
    ],
    ids=str,
)
def test_remdm(options, schedule):
    num_steps, strategy = STEPS - 1, options["strategy"]
    eta, remasked = options.get("eta", 0.02), []

    def alpha(t):
        if strategy != "loop":
            return float(schedule.alpha(jnp.float32(t)))
        if t > 0.55:
            return (1 - t) * 0.9 / 0.45
        return 0.9 if t > 0.05 else 1 - t * 0.1 / 0.05

    def told(t):
        return t if strategy != "loop" else min(float(schedule.time(jnp.float32(1 - alpha(t)))), 1.0)

    def plain(z, noise):
        *_, u, gumbel = noise
        blank, states, passes, psi = z == MASK, [z], 0, np.zeros(LENGTH)
        grid = np.linspace(1, 1e-5, num_steps + 1)
        for step, (t, s) in enumerate(itertools.pairwise(grid)):
            a_t, a_s = alpha(t), alpha(s)
            largest = 1.0 if a_t == 0 else min(1.0, (1 - a_s) / a_t)
            shown = blank & (z != MASK)
            if strategy == "conf":
                weights = np.where(shown, np.exp(-psi), 0)
                sigma = largest * weights / max(weights.sum(), 1e-30)
            else:
                in_loop = 0.05 < t <= 0.55
                one = {"cap": min(eta, largest), "rescale": eta * largest, "loop": min(eta, largest) * in_loop}
                sigma = np.full(LENGTH, one[strategy])
            p, after = log_probs(z, told(t)), z.copy()
            for i in np.flatnonzero(blank):
                if shown[i]:
                    if u[i, step] < sigma[i]:
                        after[i] = MASK
                        remasked.append(i)
                elif u[i, step] < (a_s - (1 - sigma[i]) * a_t) / (1 - a_t):
                    after[i] = (p[i] + gumbel[i, step]).argmax()
                    psi[i] = np.exp(p[i, after[i]])
            passes += bool(((z == MASK) & (after != MASK)).any())
            z = after
            states.append(z)
        if (z == MASK).any():
            states[-1] = np.where(z == MASK, log_probs(z, told(grid[-1])).argmax(axis=-1), z)
            passes += 1
        return states, passes

    check(ReMDM(num_steps=num_steps, **options), plain, dataclasses.replace(PROCESS, schedule=schedule))
    assert len(remasked) > 3


# Against the law of the data

SYMBOLS, SITES, DRAWS = 4, 6, 200_000


@functools.cache
def known_law():
    """The law of 4 symbols at 6 sites, [4^6], and log p(x_i | z) of every partial sequence, [5^6, 6, 5]."""
    joint = np.random.default_rng(1).gamma(4.0, size=(SYMBOLS,) * SITES) + 0.5
    joint *= np.exp(0.5 * np.add.outer(*[np.sin(np.arange(SYMBOLS ** (SITES // 2)))] * 2)).reshape(joint.shape)
    joint /= joint.sum()
    total = joint  # with the mask as a fifth symbol that stands for any
    for axis in range(SITES):
        total = np.concatenate([total, total.sum(axis=axis, keepdims=True)], axis=axis)
    states = np.indices(total.shape).reshape(SITES, -1).T
    table = np.full((len(states), SITES, SYMBOLS + 1), -np.inf)
    for site, symbol in itertools.product(range(SITES), range(SYMBOLS)):
        filled = states.copy()
        filled[:, site] = symbol
        table[:, site, symbol] = np.log(total[tuple(filled.T)] / total[tuple(states.T)])
    return joint.ravel(), table.astype(np.float32)


def p_value(sampler, draws, **schedule):
    law, table = known_law()
    process = Masked(Vocabulary(SYMBOLS + 1, SYMBOLS), **schedule)

    @jax.jit
    def run(keys, table):
        denoise = lambda z, t: table[z @ (SYMBOLS + 1) ** jnp.arange(SITES - 1, -1, -1)]
        canvas = jnp.full((draws, SITES), SYMBOLS, jnp.int32)
        return sampler(process, denoise, keys, canvas).tokens @ SYMBOLS ** jnp.arange(SITES - 1, -1, -1)

    counts = np.bincount(run(sequence_keys(2, draws), jnp.asarray(table)), minlength=len(law))
    return scipy.stats.chisquare(counts, law * draws).pvalue


@pytest.mark.parametrize(
    "sampler, options",
    [
        (FirstHitting(), {"schedule": Linear()}),
        pytest.param(Ancestral(num_steps=5000), {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_exact_samplers_have_the_law_of_the_data(sampler, options):
    assert known_law()[0].min() * DRAWS > 1  # 4096 cells, 49 draws for each on average
    assert p_value(sampler, DRAWS, **options) > 1e-3


def test_few_steps_do_not():
    assert p_value(Ancestral(num_steps=4), DRAWS // 10) < 1e-6
