"""What every process promises, against laws that are enumerated; and masked SEDD against its authors' code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffrwkv.diffusion.objectives import GIDD, OBJECTIVES, Diffusion
from diffrwkv.diffusion.processes import (
    PROCESSES,
    Hybrid,
    Masked,
    NextToken,
    Reversible,
    Scheduled,
    Scored,
    TokenMasked,
    Uniform,
    Vocabulary,
)
from diffrwkv.diffusion.processes.masked import Absorbing
from diffrwkv.diffusion.samplers import sequence_keys
from diffrwkv.diffusion.schedules import SCHEDULES, Cosine, Linear, LogLinear
from tests.diffusion.known_law import (
    MASK,
    NOISE,
    REAL,
    SYMBOLS,
    VOCABULARY,
    forward,
    known_law,
    noise_of,
    processes,
    reverse,
)
from tests.golden_arrays import golden

PROCESSES_HERE = processes(Cosine())
LAW = known_law(2)
Z = jnp.asarray(LAW.states, jnp.int32)
T, S = 0.6, 0.35


CHECKS = []  # [(check, its arguments beside the name)]: a process from outside goes through them too


def each(**choices):
    """A check of each process by its name in PROCESSES_HERE, and of each of the choices for one more argument."""

    def mark(check):
        for argument, values in choices.items():
            check = pytest.mark.parametrize(argument, values)(check)
        CHECKS.extend((check, {a: value}) for a, values in choices.items() for value in values)
        CHECKS.extend([(check, {})] * (not choices))
        return pytest.mark.parametrize("name", PROCESSES_HERE)(check)

    return mark


def column(t):
    return jnp.full((len(Z), 1), t, jnp.float32)


def possible(process):
    """bool [Z]: the states that can be; what is said of the others has no meaning."""
    return (Z != MASK).all(axis=1) | bool(noise_of(process)[MASK] > 0)


def predicted(process, t=T):
    """`predict` of the perfect network's output, [Z, L, V]."""
    output = jnp.asarray(LAW.output(process, t), jnp.float32)
    return process.predict(output, Z, column(t)), output


def test_the_table_has_every_process():
    assert {type(p) for p in PROCESSES_HERE.values()} == {p for p in PROCESSES.values() if issubclass(p, Reversible)}


@each()
def test_predict_is_the_posterior(name):
    process = PROCESSES_HERE[name]
    log_p, _ = predicted(process)
    assert log_p.dtype == jnp.float32
    expected = LAW.posterior(process, T)
    ok = np.asarray(possible(process))
    np.testing.assert_allclose(np.exp(log_p)[ok], expected[ok], atol=2e-6)
    assert (log_p[..., MASK] == -jnp.inf).all()


@each()
def test_forward_law_is_the_law_of_noise(name):
    process = PROCESSES_HERE[name]
    x = jnp.asarray(REAL)
    certain = jnp.where(jnp.arange(SYMBOLS + 1) == x[:, None], 0.0, -jnp.inf)[:, None]
    law = np.exp(process.forward_law(certain, jnp.full((SYMBOLS, 1), T)))[:, 0]
    np.testing.assert_allclose(law, forward(process, T), atol=1e-6)
    z = jax.jit(process.noise)(jax.random.key(1), jnp.broadcast_to(x[:, None], (SYMBOLS, 20_000)), jnp.full((3, 1), T))
    for row, expected in zip(np.asarray(z), law, strict=True):
        counts = np.bincount(row, minlength=SYMBOLS + 1)
        assert counts[expected == 0].sum() == 0
        expected = expected[expected > 0].astype(np.float64)
        counts = counts[counts > 0]
        assert scipy.stats.chisquare(counts, counts.sum() * expected / expected.sum()).pvalue > 1e-3


@each()
def test_reverse_law_is_bayes_rule_for_one_position(name):
    """Of any law of x, not of the perfect network's alone."""
    process = PROCESSES_HERE[name]
    p = np.insert(np.random.default_rng(3).dirichlet(np.ones(SYMBOLS), size=Z.shape), MASK, 0, axis=-1)
    z = np.asarray(Z)
    if isinstance(process, Absorbing):  # a token that shows is certain
        p = np.where((z == MASK)[..., None], p, np.eye(SYMBOLS + 1)[z])
    expected = reverse(process, p, z, T, S)
    log_p = np.log(np.maximum(p, 1e-300))
    law = np.exp(process.reverse_law(jnp.asarray(log_p, jnp.float32), Z, column(T), column(S)))
    ok = np.asarray(possible(process))
    np.testing.assert_allclose(law[ok], expected[ok], atol=2e-6)
    np.testing.assert_allclose(law[ok].sum(axis=-1), 1, atol=1e-5)


@each()
def test_a_draw_of_the_reverse_law_needs_its_key_alone(name):
    process = PROCESSES_HERE[name]
    log_p, _ = predicted(process)
    keys = jax.random.split(jax.random.key(0), Z.shape)
    z = process.reverse(keys, Z, log_p, column(T), column(S))
    assert z.shape == Z.shape and z.dtype == jnp.int32
    half = process.reverse(keys[8:], Z[8:], log_p[8:], column(T)[8:], column(S)[8:])
    np.testing.assert_array_equal(half, z[8:])


@each()
def test_score_is_the_ratio_of_probabilities(name):
    process = PROCESSES_HERE[name]
    if not isinstance(process, Scored):
        pytest.skip("has no score")
    _, output = predicted(process)
    score = np.exp(process.score(output, Z, column(T)))
    p = LAW.p @ LAW.likelihoods(process, T).prod(axis=-1)  # of z
    for k in np.flatnonzero(possible(process)):
        z = LAW.states[k]
        for i in range(LAW.length):
            if isinstance(process, Masked) and z[i] != MASK:
                continue  # from a token that shows nothing leads back
            for y in [*REAL, z[i]]:
                other = z.copy()
                other[i] = y
                assert score[k, i, y] == pytest.approx(p[LAW.index(other)] / p[k], rel=1e-4, abs=1e-6), (z, i, y)


@each()
def test_the_analytic_step_is_the_reverse_law_and_euler_approaches_it(name):
    process = PROCESSES_HERE[name]
    if not isinstance(process, Scored):
        pytest.skip("has no score")
    log_p, output = predicted(process)
    ok = np.asarray(possible(process))

    def error(law, s):
        exact = np.exp(process.reverse_law(log_p, Z, column(T), column(s)))
        made = np.asarray(law(output, Z, column(T), column(s)))
        np.testing.assert_allclose(made[ok].sum(axis=-1), 1, atol=1e-5)
        return np.abs(made - exact)[ok].max()

    assert error(process.analytic_law, S) < 5e-6 and error(process.analytic_law, T - 0.01) < 5e-6
    large, small = error(process.euler_law, T - 0.02), error(process.euler_law, T - 0.01)
    assert 3 < large / small < 5 and small > 1e-5  # second order in one step


@each(t=[0.1, 0.5, 0.9])
def test_the_bound_of_the_perfect_network_is_the_information_that_noise_takes(name, t):
    """The mean of `nats` is -dI(x; z_t) / dt, so that its integral is the entropy of the text."""
    process, h = PROCESSES_HERE[name], 1e-3
    before, after = (LAW.information(process, time) for time in (t - h, t + h))
    _, output = predicted(process, t)
    nats = jax.vmap(lambda x: process.nats(output, jnp.broadcast_to(x, Z.shape), Z, column(t)))
    nats = np.asarray(jax.jit(nats)(jnp.asarray(LAW.texts, jnp.int32))).sum(axis=-1)  # [X, Z]
    q = LAW.likelihoods(process, t).prod(axis=-1)
    mean = np.where(q > 0, LAW.p[:, None] * q * nats, 0.0).sum()
    assert mean == pytest.approx((before - after) / (2 * h), rel=2e-3)


@each()
def test_times_may_differ_between_positions(name):
    process = PROCESSES_HERE[name]
    x, key = jnp.zeros((3, 4), jnp.int32), jax.random.key(0)
    t = jnp.asarray(np.random.default_rng(0).uniform(0.2, 0.9, (3, 4)), jnp.float32)
    output = jax.random.normal(key, (3, 4, SYMBOLS + 1))
    z = process.noise(key, x, t)
    laws = [
        lambda process, z, t, o: process.nats(o, jnp.zeros_like(z), z, t),
        lambda process, z, t, o: process.predict(o, z, t),
        lambda process, z, t, o: process.forward_law(process.predict(o, z, t), t / 2),
        lambda process, z, t, o: process.reverse_law(process.predict(o, z, t), z, t, t / 2),
    ]
    if isinstance(process, Scored):
        laws += [lambda process, z, t, o: process.euler_law(o, z, t, t * 0.9)]
        laws += [lambda process, z, t, o: process.analytic_law(o, z, t, t / 2)]
    for law in laws:
        whole = law(process, z, t, output)
        for i in range(4):
            alone = law(process, z[:, i : i + 1], t[:, i : i + 1], output[:, i : i + 1])
            np.testing.assert_allclose(whole[:, i], alone[:, 0], rtol=1e-6)


@each()
def test_what_may_not_be_noised_is_not(name):
    process = PROCESSES_HERE[name]
    x, free = jnp.full((2, 500), REAL[0]), jnp.arange(500)[None] % 3 == jnp.asarray([[0], [1]])
    z = process.noise(jax.random.key(0), x, jnp.ones((2, 1)), free)
    assert (z == x)[~free].all() and (z != x)[free].any() and z.dtype == x.dtype


@each()
def test_the_start_is_noise_where_blank_and_knows_nothing_of_the_batch(name):
    process = PROCESSES_HERE[name]
    keys, canvas = sequence_keys(0, 6), jnp.full((6, 700), MASK, jnp.int32).at[:, ::3].set(REAL[2])
    blank = canvas == MASK
    z = process.start(keys, canvas, blank)
    assert (z == canvas)[~blank].all() and z.dtype == jnp.int32
    np.testing.assert_array_equal(process.start(keys[2:], canvas[2:, :100], blank[2:, :100]), z[2:, :100])
    counts, law = np.bincount(np.asarray(z)[np.asarray(blank)], minlength=SYMBOLS + 1), noise_of(process)
    assert counts[law == 0].sum() == 0
    if (law > 0).sum() > 1:
        assert scipy.stats.chisquare(counts[law > 0], counts.sum() * law[law > 0]).pvalue > 1e-3
        assert not (z[0] == z[1]).all()


@each(schedule=sorted(SCHEDULES))
def test_everything_is_finite_from_the_first_time_to_the_last(name, schedule):
    process = PROCESSES_HERE[name]
    if isinstance(process, Scheduled):
        process = dataclasses.replace(process, schedule=SCHEDULES[schedule]())
    elif schedule != min(SCHEDULES):
        pytest.skip("has no schedule")
    t = jnp.asarray([[1e-5], [1e-3], [0.5], [1 - 2**-24], [1.0]])
    output = 8 * jax.random.normal(jax.random.key(1), (len(t), 6, SYMBOLS + 1))
    x = jnp.broadcast_to(jnp.asarray(REAL * 2), (len(t), 6))
    z = jnp.where(jnp.arange(6) < 3, x, MASK if noise_of(process)[MASK] > 0 else REAL[0])
    value, slope = jax.value_and_grad(lambda o: process.nats(o, x, z, t).sum())(output)
    assert jnp.isfinite(value) and jnp.isfinite(slope).all() and (process.nats(output, x, z, t) >= -1e-4).all()
    assert (slope[..., MASK] == 0).all()
    log_p = process.predict(output, z, t)
    for law in (log_p, process.reverse_law(log_p, z, t, t / 2), process.reverse_law(log_p, z, t, jnp.zeros_like(t))):
        np.testing.assert_allclose(jnp.exp(law).sum(axis=-1), 1, atol=1e-4)
    assert jnp.isfinite(process.condition(t)).all()
    for law in (process.euler_law, process.analytic_law) if isinstance(process, Scored) else ():
        made = law(output, z, t, t / 2)
        np.testing.assert_allclose(made.sum(axis=-1), 1, atol=1e-4)
        assert (made >= 0).all()


# Masked, with a score


def absorb(process):
    """(x, z, t, output) of SEDD's absorbing golden arrays: the mask is their last state."""
    arrays = golden("sedd_absorb_3x9x13.npz")
    x, z, t = (jnp.asarray(arrays[k]) for k in ("x0", "xt", "t"))
    return arrays, x, z, t[:, None], jnp.asarray(arrays["raw_logits"])


def normalised(law):
    law = np.maximum(law, 0)
    return law / law.sum(axis=-1, keepdims=True)


def test_masked_score_entropy_is_that_of_sedd():
    process = Masked(Vocabulary(14, 13), LogLinear(), "score")
    arrays, x, z, t, output = absorb(process)
    nats = lambda output: process.nats(output, x, z, t)
    np.testing.assert_allclose(process.condition(t)[:, 0], arrays["sigma"], rtol=1e-5)
    np.testing.assert_allclose(nats(output), arrays["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda o: nats(o).sum())(output), arrays["grad_raw_logits"], rtol=1e-5, atol=1e-6
    )
    masked = arrays["xt"] == 13
    score = np.where(np.isfinite(process.score(output, z, t)), process.score(output, z, t), 0)
    np.testing.assert_allclose(score[masked], arrays["log_score"][masked], rtol=1e-5, atol=1e-6)


def test_masked_steps_are_those_of_sedd():
    process = Masked(Vocabulary(14, 13), LogLinear(), "score")
    arrays, _, z, t, output = absorb(process)
    s = t - arrays["dt"][:, None]
    for name, law in (("euler", process.euler_law), ("analytic", process.analytic_law)):
        expected = normalised(arrays[f"{name}_probs"])
        np.testing.assert_allclose(law(output, z, t, s), expected, rtol=1e-4, atol=2e-6, err_msg=name)
    # The last step, to sigma = 0, is a draw from p(x | z).
    last = np.exp(process.predict(output, z, t))[..., :13]
    np.testing.assert_allclose(last, normalised(arrays["denoise_probs"]), rtol=1e-4, atol=1e-6)


def test_the_score_of_a_mean_has_the_loss_of_mdlm():
    """SEDD with s = log p - log(e^sigma - 1) is MDLM."""
    mean, score = (Masked(Vocabulary(14, 13), LogLinear(), output) for output in ("mean", "score"))
    _, x, z, t, output = absorb(mean)
    p = jax.nn.log_softmax(mean.vocabulary.without_mask(output), axis=-1)
    as_score = jnp.where(jnp.isfinite(p), p + np.log(13), 0.0)
    np.testing.assert_allclose(score.score(as_score, z, t), mean.score(output, z, t), atol=1e-5)
    np.testing.assert_allclose(score.nats(as_score, x, z, t), mean.nats(output, x, z, t), rtol=1e-6, atol=1e-6)


# Masks and uniform noise


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_the_largest_share_of_uniform_noise_is_what_was_asked_for(gamma):
    process = Hybrid(VOCABULARY, Linear(), uniform_share=0.3, gamma=gamma)
    certain = jnp.where(jnp.arange(SYMBOLS + 1) == REAL[0], 0.0, -jnp.inf)[None, None]
    other = [float(jnp.exp(process.forward_law(certain, jnp.float32([[t]])))[0, 0, REAL[1]]) for t in (0.4, 0.5, 0.6)]
    assert other[1] == pytest.approx(0.3 / SYMBOLS, rel=1e-5) and max(other) == other[1]


@pytest.mark.parametrize("gamma", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_hybrid_noise_is_a_markov_process_of_these_rates(schedule, gamma):
    """The noise added from s to t is never negative, and between near times it is what the bound is weighed with."""
    process, eye = Hybrid(VOCABULARY, schedule, uniform_share=0.4, gamma=gamma), np.eye(SYMBOLS + 1)
    kinds = jnp.asarray([[MASK, REAL[0]]])
    for t in (0.05, 0.3, 0.7, 0.95):
        for s in (0.01, t / 2, t - 1e-3):
            (kept_t, noise_t), (kept_s, noise_s) = (NOISE[Hybrid](process, time, np) for time in (t, s))
            added = (noise_t - (kept_t / kept_s)[:, None] * noise_s)[0]
            assert added.min() > -1e-12 and added.sum() + (kept_t / kept_s)[0] * eye[0].sum() == pytest.approx(1)
        rate = np.asarray(process._rate(kinds, jnp.float32([[t]])))[0]
        np.testing.assert_allclose(added[kinds[0]] / 1e-3, rate, rtol=0.03)


def test_the_bound_of_hybrid_noise_is_that_of_gidd():
    """In the words of its paper: a divergence of the laws of z_t, and one of the token that shows."""
    process, t, h = Hybrid(VOCABULARY, Linear(), uniform_share=0.4), 0.37, 2e-3
    _, output = predicted(process, t)
    output = output + jax.random.normal(jax.random.key(0), output.shape)
    mu = np.exp(np.asarray(jax.nn.log_softmax(VOCABULARY.without_mask(output)), np.float64))
    (before, n_before), (kept, noise), (after, n_after) = (NOISE[Hybrid](process, u, np) for u in (t - h, t, t + h))
    slope = lambda a, b: (b - a) / (2 * h)
    # (beta pi)' - alpha'/alpha beta pi
    rate = (slope(n_before, n_after) - slope(before, after)[0] / kept[0] * noise)[0]
    for x in REAL:
        q = kept * np.eye(SYMBOLS + 1)[x] + noise[0]
        q_mu = kept * mu + noise[0]
        kl = (q * np.log(q / q_mu)).sum(axis=-1)
        ratio = q[LAW.states] / np.take_along_axis(q_mu, LAW.states[..., None], axis=-1)[..., 0]
        expected = rate[LAW.states] / q[LAW.states] * (kl + ratio - 1 - np.log(ratio))
        nats = process.nats(output, jnp.full_like(Z, x), Z, column(t))
        np.testing.assert_allclose(nats, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("t", [1e-4, 0.02, 0.6, 0.999])
def test_hybrid_noise_of_a_large_vocabulary_loses_no_digits(t):
    """The bound, and a short step, in float64; a mask, the right token and a wrong one, the network sure or not."""
    size = 50_258
    ids = np.arange(size)
    process, rng = Hybrid(Vocabulary(size, size - 1)), np.random.default_rng(0)
    x = np.array([[7, 7, 7] * 2])
    z = np.array([[size - 1, 7, 40_000] * 2])
    logits = (np.array([1, 1, 1, 9, 9, 9])[:, None] * rng.normal(size=(6, size))).astype(np.float32)
    mu = np.exp(logits.astype(np.float64)) * (ids < size - 1)
    mu /= mu.sum(axis=-1, keepdims=True)

    def weights(t):
        a, m = 1 - np.float64(np.float32(t)), np.float64(np.float32(t))
        return a, m, 2 / 9 * np.sqrt(a * m)

    def law(p, t):
        a, m, u = weights(t)
        return np.where(ids < size - 1, a * p + u / (size - 1), m)

    a, m, u = weights(t)
    rate = np.where(z[0] == size - 1, 1 / a, (0.5 / m + 0.5 / a) * u / (size - 1)) / (1 + u)
    here = np.arange(6), z[0]
    log_s, log_r = (np.log(q / q[here][:, None]) for q in (law(mu, t), law(x[0][:, None] == ids, t)))
    change = log_s - log_r
    change[here] = 0
    expected = rate * (np.exp(log_r) * (np.expm1(change) - change)).sum(axis=-1)
    given = jnp.asarray(logits)[None], jnp.asarray(z), jnp.full((1, 1), t, jnp.float32)
    nats = process.nats(given[0], jnp.asarray(x), *given[1:])
    np.testing.assert_allclose(nats[0], expected, rtol=2e-3)

    s = t * (1 - 1e-3)
    a_s, m_s, u_s = weights(s)
    added = np.where(z[0] == size - 1, m - m_s, (u * a_s - u_s * a) / (size - 1))[:, None]
    back = law(mu, s) * (added + (z[0][:, None] == ids) * a * (1 + u_s))
    back /= back.sum(axis=-1, keepdims=True)
    made = np.exp(process.reverse_law(process.predict(*given), *given[1:], jnp.full((1, 1), s, jnp.float32)))[0]
    assert np.abs(made - back).sum(axis=-1).max() < 1e-4


def test_little_uniform_noise_is_masked_diffusion():
    masked, hybrid = Masked(VOCABULARY, Cosine()), Hybrid(VOCABULARY, Cosine(), uniform_share=1e-12)
    output = jax.random.normal(jax.random.key(0), (*Z.shape, SYMBOLS + 1))
    x = jnp.where(Z == MASK, REAL[1], Z)
    given = (output, x, Z, column(T))
    at_masks = Z == MASK
    np.testing.assert_allclose(hybrid.nats(*given)[at_masks], masked.nats(*given)[at_masks], rtol=1e-4)
    np.testing.assert_allclose(hybrid.nats(*given)[~at_masks], 0, atol=1e-6)
    laws = [p.reverse_law(p.predict(output, Z, column(T)), Z, column(T), column(S)) for p in (hybrid, masked)]
    np.testing.assert_allclose(*map(jnp.exp, laws), atol=1e-5)


@pytest.mark.parametrize("t", [1e-4, 1e-2, 0.4])
def test_what_hybrid_noise_has_done_before_the_earliest_time_is_counted(t):
    """By a decoder that takes all tokens for equally probable; and of the tokens that count alone."""
    process = Hybrid(VOCABULARY, Linear())
    q = forward(process, t)  # [SYMBOLS, V]
    expected = -(q * np.log(q / q.sum(axis=0))).sum(axis=1)
    np.testing.assert_allclose(process.nats_before(jnp.asarray(REAL)[None], jnp.float32(t))[0], expected, rtol=1e-4)
    objective, counted = GIDD(process, time_eps=t), jnp.asarray([[True, False, True]])
    x, output = jnp.asarray([REAL]), jnp.zeros((1, 3, SYMBOLS + 1))
    loss = objective.loss_at(output, x, x, jnp.full((1, 1), 0.5), counted)
    plain = process.nats(output, x, x, jnp.full((1, 1), 0.5))
    np.testing.assert_allclose(loss.token_nats, jnp.where(counted, plain + expected, 0.0), rtol=1e-4)
    np.testing.assert_allclose(loss.nats, loss.token_nats.sum(axis=1), rtol=1e-6)
    assert loss.tokens.tolist() == [2]


# What is refused


def test_what_a_process_refuses():
    with pytest.raises(TypeError, match="Masked's schedule must be a Schedule, got str"):
        Masked(VOCABULARY, "loglinear")
    with pytest.raises(ValueError, match="Uniform's output must be one of leave_one_out, score, got 'mean'"):
        Uniform(VOCABULARY, Linear(), "mean")
    with pytest.raises(ValueError, match="needs 2 tokens beside the mask, got 1"):
        Uniform(Vocabulary(2, 0))
    for process in (NextToken(VOCABULARY), TokenMasked(VOCABULARY)):
        with pytest.raises(TypeError, match=f"Diffusion needs a process with a schedule, not {type(process).__name__}"):
            Diffusion(process)
    with pytest.raises(TypeError, match="GIDD needs the process Hybrid, not Masked"):
        GIDD(Masked(VOCABULARY))
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 2\], got 2.5"):
        Hybrid(VOCABULARY, gamma=2.5)
    with pytest.raises(ValueError, match="uniform_share must be in"):
        Hybrid(VOCABULARY, uniform_share=0.0)
    with pytest.raises(ValueError, match="needs 2 tokens beside the mask, got 1"):
        Hybrid(Vocabulary(2, 0))
    with pytest.raises(ValueError, match="mask_id must be below"):
        Vocabulary(4, 4)


def test_names_stand_for_processes():
    for name, entry in OBJECTIVES.items():
        assert entry.process in PROCESSES.values(), name
