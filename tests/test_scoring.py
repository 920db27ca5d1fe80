"""The score of a text: against enumeration on a tiny law, its errors, and real denoisers in slow definitions."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrwkv
from diffrwkv import scoring
from diffrwkv.config import UserError
from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.objectives.chain_rule import ChainRule
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.times import early_times, strata
from tests.known_run import LENGTH, MASK, exact, ids, index, log_p, make, real

EPS = 1e-3


def expected(x, given=0, block=LENGTH, seed=0):
    """The mean of MDLM's bound on the tokens of x behind those that are given: all masks, all times, by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    log_t = math.log(EPS) * (1 - nodes) / 2
    times, weights = np.exp(log_t), weights * -math.log(EPS) / 2 * np.exp(log_t) / (1 - EPS)
    total = 0.0
    for first in range(0, len(x), block):
        free = range(max(first, given), min(first + block, len(x)))
        for masks in itertools.product([False, True], repeat=len(free)):
            hidden = [i for i, m in zip(free, masks, strict=True) if m]
            state = [MASK if i in hidden or i >= first + block else x[i] for i in range(len(x))]
            state += [MASK] * (LENGTH - len(x))
            nats = -sum(log_p(state, i, seed)[x[i]] for i in hidden)
            m = (1 - EPS) * times
            total += (weights / times * m ** len(hidden) * (1 - m) ** (len(free) - len(hidden)) * nats).sum()
    return total


CASES = [("aabb", 0, LENGTH), ("abba", 2, LENGTH), ("baab", 1, LENGTH), ("abab", 0, 3), ("bbab", 0, 2), ("babb", 1, 2)]


@pytest.mark.optimised
@pytest.mark.parametrize(("text", "given", "block"), CASES)
def test_the_mean_is_that_of_all_masks_and_times(text, given, block):
    r = make(sizes=None if block == LENGTH else block)
    [s] = scoring.score(r, text[given:], prompts=text[:given], draws=100_000, batch_size=5000)
    assert (s.tokens, s.windows, s.draws, s.exact) == (LENGTH - given, 1, 100_000, False)
    assert s.error < 0.03 and abs(s.nats - expected(ids(text), given, block)) < 4 * s.error


@pytest.mark.optimised
@pytest.mark.parametrize(("text", "given", "block"), CASES[1::2])
def test_intervals_hold_as_often_as_they_say(text, given, block):
    r = make(sizes=None if block == LENGTH else block)
    found = scoring.score(r, [text[given:]] * 300, prompts=text[:given], draws=256, batch_size=4800, seed=3)
    mean = expected(ids(text), given, block)
    held = np.mean([abs(s.nats - mean) < 1.96 * s.error for s in found])
    assert 0.9 <= held <= 0.99


def test_early_times_cost_less():
    """The error of as many draws is smaller than with uniform times, for a text of many tokens."""
    rng, variance = np.random.default_rng(0), {}
    u = strata(rng, 20_000, 1)[:, 0]
    for name, (t, w) in {
        "early": early_times(u, EPS),
        "even": (EPS + (1 - EPS) * u, np.ones_like(u)),
    }.items():
        nats = w / t * rng.binomial(64, (1 - EPS) * t)
        assert abs(nats.mean() - 64) < 4 * nats.std() / len(u) ** 0.5
        variance[name] = np.square(nats[::2] - nats[1::2]).mean()
    assert variance["early"] < 0.6 * variance["even"]


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["udlm", "sedd_absorb", "sedd_uniform"])
def test_other_objectives_by_enumeration_of_their_noise(name):
    r = make(name)
    objective, x, given = r.objective.validation, jnp.array([ids("abab")]), 1
    symbols = [MASK] if name == "sedd_absorb" else [0, 1]
    choices = list(itertools.product([None, *symbols], repeat=3))
    states = jnp.array([[0, *(xi if s is None else s for xi, s in zip(ids("bab"), c, strict=True))] for c in choices])
    drawn = jnp.array([[s is not None for s in c] for c in choices])
    counted = jnp.broadcast_to(jnp.arange(4) >= given, states.shape)

    @jax.jit
    def mean(t):
        m = objective.process.schedule.mask_probability(t) / len(symbols)
        q = jnp.where(drawn, m, 1 - m * len(symbols)).prod(axis=1)
        output, z, times = r.params[index(states)], states, jnp.full((1, 1), t)
        return (q * objective.loss_at(output, jnp.tile(x, (len(z), 1)), z, times, counted).nats).sum()

    nodes, weights = np.polynomial.legendre.leggauss(100)
    log_t = math.log(EPS) * (1 - nodes) / 2
    weights = weights * -math.log(EPS) / 2 * np.exp(log_t) / (1 - EPS)
    found = sum(w * float(mean(jnp.float32(t))) for w, t in zip(weights, np.exp(log_t), strict=True))
    [s] = scoring.score(r, "bab", prompts="a", draws=100_000, batch_size=5000)
    assert s.error < 0.01 * s.nats and abs(s.nats - found) < 4 * s.error


def test_from_left_to_right_it_is_the_likelihood():
    r = make("autoregressive")
    for text in ("abba", "bab", "b"):
        for given in range(len(text)):
            [s] = scoring.score(r, text[given:], prompts=text[:given], draws=3)
            assert s.exact and s.error == 0 and s.draws == 1 and s.tokens == len(text) - given
            assert s.nats == pytest.approx(exact(ids(text), given), rel=1e-5)
    assert s.ppl == pytest.approx(math.exp(s.nelbo)) and s.bpc == pytest.approx(s.nelbo / math.log(2))


def test_masked_blocks_of_one_token_are_exact():
    r = make(sizes=1)
    for text in ("abba", "bab", "b"):
        x = ids(text)
        nats = [-log_p([*x[:i], *[MASK] * (LENGTH - i)], i)[x[i]] for i in range(len(x))]
        [s] = scoring.score(r, text)
        assert s.exact and s.error == 0 and s.nats == pytest.approx(sum(nats), rel=1e-5)
    told = make(sizes=1)
    told.model.time_conditioning = True  # then what it says at t = 1 is not all it says
    assert not scoring.is_exact(scoring.bounding(told))
    assert scoring.is_exact(scoring.bounding(make(sizes=4), 1)) and not scoring.is_exact(scoring.bounding(make()))


def test_the_chain_rule_is_for_masks_alone():
    vocabulary = Vocabulary(3, MASK)
    with pytest.raises(TypeError, match="ChainRule needs masks"):
        ChainRule(Masked(vocabulary, output="score"))
    with pytest.raises(ValueError, match="blocks of 1 token"):
        ChainRule(Masked(vocabulary), Blocks((2,)))
    scored = make("sedd_absorb", 1)
    assert not scoring.is_exact(scoring.bounding(scored))


def test_a_first_token_that_is_given_is_not_counted():
    x = ids("abba")
    nats = [-log_p([*x[:i], *[MASK] * (LENGTH - i)], i)[x[i]] for i in range(len(x))]
    [s] = scoring.score(make(sizes=1, keep_first=True), "abba")
    assert (s.tokens, s.characters, s.words) == (3, 3, 0) and s.nats == pytest.approx(sum(nats[1:]), rel=1e-5)
    with pytest.raises(UserError, match="text 2 is one token"):
        scoring.score(make(sizes=1, keep_first=True), ["ab", "a"])


@pytest.mark.parametrize("context", [0, 1, 2, 3, None])
def test_a_long_text_is_scored_in_windows(context):
    """Each token once, given those before it in its window: `exact` of each, added up."""
    r, x = make("autoregressive"), ids("abbabaabbaab")
    text = "".join("ab"[i] for i in x)
    step = LENGTH - (2 if context is None else context)
    nats, at = exact(x[:LENGTH]), LENGTH
    while at < len(x):
        known = x[at - (LENGTH - step) : at]
        nats += exact([*known, *x[at : at + step]], len(known))
        at += step
    [s] = scoring.score(r, text, context=context)
    assert s.nats == pytest.approx(nats, rel=1e-5) and s.tokens == len(x) == s.characters
    assert s.windows == 1 + -(-(len(x) - LENGTH) // step)
    assert scoring.score(r, [text, "ab"], context=context)[0] == s  # whatever stands beside it


@pytest.mark.parametrize(("given", "size"), [(0, 1), (0, 9), (3, 4), (3, 5), (9, 4), (20, 6), (20, 30), (1, 100)])
@pytest.mark.parametrize("context", [0, 1, 4, 7])
def test_windows_cover_a_text_once(given, size, context):
    body, at = 8, 0
    for before, start, stop in scoring.windows_of(given, size, body, context):
        assert start == at < stop and stop - start + before <= body
        assert min(context, given + start) <= before <= given + start
        at = stop
    assert at == size
    if given + size <= body:
        assert list(scoring.windows_of(given, size, body, context)) == [(given, 0, size)]


def test_strata_are_even_and_come_in_pairs():
    u = strata(np.random.default_rng(0), 12, 5)
    assert u.shape == (12, 5) and (u >= 0).all() and (u < 1).all()
    parts = np.floor(u * 6).astype(int)
    np.testing.assert_array_equal(parts[::2], parts[1::2])
    np.testing.assert_array_equal(np.sort(parts[::2], axis=0), np.tile(np.arange(6)[:, None], (1, 5)))
    assert len({tuple(column) for column in parts.T}) > 1


# --- Real denoisers ---------------------------------------------------------------------------------


TEXTS = ["A text of 35 bytes, this one: café.", "no"]


@pytest.mark.parametrize(
    ("pattern", "name", "sizes", "wrap"),
    [
        ("rwkv7", "autoregressive", None, False),
        ("attention", "mdlm", 1, True),
        pytest.param("causal_attention", "autoregressive", None, True, marks=pytest.mark.slow),
        pytest.param("birwkv7", "mdlm", 1, True, marks=pytest.mark.slow),
        pytest.param("bimamba2", "mdlm", 1, False, marks=pytest.mark.slow),
    ],
)
def test_exact_scores_are_those_of_each_text_alone(pattern, name, sizes, wrap):
    """Padding, the batch and what is given change nothing: the slow definition knows none of them."""
    r = real(pattern, name, sizes, wrap=wrap)
    prompts = ["", "Once "]
    found = scoring.score(r, TEXTS, prompts=prompts, batch_size=2)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def nats(x, start, stop):
        if name == "autoregressive":
            shifted = jnp.pad(x, ((0, 0), (1, 0)), constant_values=258)[:, :-1]
            logits = r.model.apply({"params": r.params}, shifted, jnp.zeros(1))
        else:
            at = jnp.arange(x.shape[1])
            z = jnp.where((at >= start) & (at < stop), 258, x)
            logits = r.model.apply({"params": r.params}, z, jnp.zeros(1), clean=x, block=1)
        log_q = jax.nn.log_softmax(logits[0, :, :258])
        return -jnp.take_along_axis(log_q, x[0, :, None], axis=1)[:, 0]

    for s, text, prompt in zip(found, TEXTS, prompts, strict=True):
        given, ids = r.tokenizer.encode(prompt), r.tokenizer.encode(text)
        bos, eos = ([256], [257]) if wrap else ([], [])
        x = np.concatenate([bos, given, ids, eos]).astype(np.int32)[None]
        start = len(bos) + len(given)
        expected = np.asarray(nats(x, start, start + len(ids)), np.float64)[start : start + len(ids)].sum()
        assert s.nats == pytest.approx(expected, rel=1e-5)
        assert (s.tokens, s.characters, s.words) == (len(text.encode()), len(text), len(text.split()))


@pytest.mark.parametrize(
    ("pattern", "sizes"), [("attention", 16), pytest.param("birwkv7", None, marks=pytest.mark.slow)]
)
def test_longer_rows_and_padding_keep_the_estimate(pattern, sizes):
    """The mean over draws of a text alone, and of it beside a longer one, padded: equal within their errors."""
    r = real(pattern, sizes=sizes)
    alone = scoring.score(r, TEXTS[1], prompts="say ", draws=512, batch_size=64)[0]
    beside = scoring.score(r, [TEXTS[1], TEXTS[1] + TEXTS[0]], prompts="say ", draws=512, batch_size=1024, seed=1)[0]
    assert alone.error < 0.1 * alone.nats
    assert abs(alone.nats - beside.nats) < 4 * math.hypot(alone.error, beside.error)


# --- Bad input --------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_any_compute(monkeypatch, capsys):
    r = make()
    monkeypatch.setattr(scoring, "estimate", lambda *a, **k: pytest.fail("computed"))
    for texts, options, told in [
        ("abc", {}, r"text 1: character 'c'"),
        (["ab", ""], {}, "text 2 is empty"),
        (["ab", 3], {}, "text 2 must be a string, got int"),
        ("ab", {"prompts": "x"}, "prompt 1: character 'x'"),
        (["ab", "b"], {"prompts": ["a"]}, "1 prompts for 2 texts"),
        ("ab", {"draws": 3}, "draws must be even, got 3"),
        ("ab", {"draws": 0}, "draws must be at least 1"),
        ("ab", {"seed": -1}, "seed"),
        ("ab", {"length": 1}, "length = 1 leaves no room"),
        ("ab", {"context": 4}, "context must be an integer from 0 to 3, got 4"),
        ("ab", {"context": 1.5}, "context must be an integer"),
        ("ab", {"block_size": 2}, "block_size needs blocks"),
        ("ab", {"batch_size": 2**40}, "batch_size = .* is too large"),
    ]:
        with pytest.raises(UserError, match=told):
            scoring.score(r, texts, **options)
    with pytest.raises(UserError, match="block_size must be an integer of at least 0"):
        scoring.score(make(sizes=2), "ab", block_size=-1)
    with pytest.raises(UserError, match="'flm' bounds no likelihood"):
        scoring.score(make("flm"), "ab")
    with pytest.raises(UserError, match="No config.json"):
        diffrwkv.score("/no/such/folder", "ab")
    assert diffrwkv.score(r, []) == []


def test_rows_beyond_training_are_scored_and_told(capsys):
    r = make("autoregressive", length=3)
    [s] = scoring.score(r, "abba", length=4)
    assert s.windows == 1 and s.nats == pytest.approx(exact(ids("abba")), rel=1e-5)
    assert "Rows of up to 4 tokens: the model was trained on 3." in capsys.readouterr().err
