"""Uniform-state diffusion against the code of SEDD and Duo, and where float32 is at its limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.objectives import Diffusion
from diffrwkv.diffusion.processes import Uniform, Vocabulary
from diffrwkv.diffusion.schedules import Geometric, LogLinear
from tests.golden_arrays import golden

SIZE = 13  # of the golden arrays, which have no mask
WIDE = Vocabulary(50_258, 50_257)


def original(name, output, mask_id):
    """(process, arrays, x, z, t, the network's output), the mask among the tokens, what it is told must not matter."""
    arrays = golden(name)
    moved = lambda tokens: jnp.asarray(tokens + (tokens >= mask_id))
    raw = jnp.asarray(np.insert(arrays["raw_logits"], mask_id, 9.0, axis=-1))
    process = Uniform(Vocabulary(SIZE + 1, mask_id), LogLinear(), output)
    return process, arrays, moved(arrays["x0"]), moved(arrays["xt"]), jnp.asarray(arrays["t"])[:, None], raw


def without(mask_id, array):
    return np.delete(np.asarray(array), mask_id, axis=-1)


def normalised(law):
    law = np.maximum(law, 0)
    return law / law.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("mask_id", [SIZE, 4])
@pytest.mark.parametrize("name, output", [("sedd_uniform", "score"), ("duo_uniform", "leave_one_out")])
def test_losses_are_the_originals(name, output, mask_id):
    process, arrays, x, z, t, raw = original(f"{name}_3x9x13.npz", output, mask_id)
    loss = lambda raw: process.nats(raw, x, z, t)
    np.testing.assert_allclose(loss(raw), arrays["loss"], rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda raw: loss(raw).sum())(raw)
    np.testing.assert_allclose(without(mask_id, slope), arrays["grad_raw_logits"], rtol=1e-5, atol=1e-6)
    assert (slope[..., mask_id] == 0).all()
    of_all = Diffusion(process).loss_at(raw, x, z, t)
    np.testing.assert_allclose(of_all.nats, arrays["loss"].sum(axis=1), rtol=1e-5)
    assert of_all.tokens.tolist() == [9, 9, 9] and of_all.noised.all()


@pytest.mark.parametrize("mask_id", [SIZE, 4])
def test_steps_are_those_of_sedd(mask_id):
    process, arrays, _, z, t, raw = original("sedd_uniform_3x9x13.npz", "score", mask_id)
    s = t - arrays["dt"][:, None]
    np.testing.assert_allclose(process.condition(t)[:, 0], arrays["sigma"], rtol=1e-5)
    np.testing.assert_allclose(without(mask_id, process.score(raw, z, t)), arrays["log_score"], rtol=1e-6)
    for kind, law in (("euler", process.euler_law), ("analytic", process.analytic_law)):
        expected = normalised(arrays[f"{kind}_probs"])
        np.testing.assert_allclose(without(mask_id, law(raw, z, t, s)), expected, rtol=1e-4, atol=1e-6, err_msg=kind)
    # The last step, to sigma = 0, is a draw from p(x | z).
    last = without(mask_id, jnp.exp(process.predict(raw, z, t)))
    np.testing.assert_allclose(last, normalised(arrays["denoise_probs"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask_id", [SIZE, 4])
def test_posteriors_are_those_of_duo(mask_id):
    process, arrays, _, z, t, raw = original("duo_uniform_3x9x13.npz", "leave_one_out", mask_id)
    log_p = process.predict(raw, z, t)
    np.testing.assert_allclose(without(mask_id, jnp.exp(log_p)), arrays["posterior_0"], rtol=1e-5, atol=1e-6)
    law = process.reverse_law(log_p, z, t, jnp.asarray(arrays["s"])[:, None])
    np.testing.assert_allclose(without(mask_id, jnp.exp(law)), arrays["posterior_s"], rtol=1e-5, atol=1e-6)


def test_one_network_under_both_meanings():
    """The score of a leave-one-out law has its loss, its posterior and its steps."""
    mean, _, x, z, t, raw = original("duo_uniform_3x9x13.npz", "leave_one_out", 4)
    score = Uniform(mean.vocabulary, mean.schedule, "score")
    as_score = jnp.where(jnp.arange(SIZE + 1) == 4, 0.0, mean.score(raw, z, t))
    np.testing.assert_allclose(score.nats(as_score, x, z, t), mean.nats(raw, x, z, t), rtol=1e-5, atol=1e-6)
    for law in ("euler_law", "analytic_law"):
        np.testing.assert_allclose(
            getattr(score, law)(as_score, z, t, t / 2), getattr(mean, law)(raw, z, t, t / 2), atol=1e-6
        )
    np.testing.assert_allclose(jnp.exp(score.predict(as_score, z, t)), jnp.exp(mean.predict(raw, z, t)), atol=1e-6)


# At the size of GPT-2's vocabulary


def wide_case(output, sigma):
    """Positions of three kinds: not noised; noised; noised, and the network is sure of the truth."""
    schedule = Geometric(sigma_min=1e-4)
    t = math.log(sigma / 1e-4) / math.log(20 / 1e-4)
    process = Uniform(WIDE, schedule, output)
    x, z = jnp.asarray([[5, 5, 5]], jnp.int32), jnp.asarray([[5, 700, 700]], jnp.int32)
    logits = np.random.default_rng(0).normal(size=(1, 3, WIDE.size))
    logits[0, 0, 5] += 14
    logits[0, 2, 5] += 14
    return process, x, z, jnp.full((1, 1), t, jnp.float32), logits


def reference(x, z, sigma, dsigma, logits):
    """(nats, log p(x | z), scores) in float64, by the definitions."""
    n = WIDE.real
    mu = np.exp(logits[..., :n] - logits[..., :n].max(axis=-1, keepdims=True))
    mu /= mu.sum(axis=-1, keepdims=True)
    alpha, u = math.exp(-sigma), -math.expm1(-sigma) / n
    take = lambda a, index: np.take_along_axis(a, np.asarray(index)[..., None], axis=-1)
    of_noised = alpha * mu + u
    of_clean = np.full(mu.shape, u)
    np.put_along_axis(of_clean, np.asarray(x)[..., None], alpha + u, axis=-1)
    s, r = of_noised / take(of_noised, z), of_clean / take(of_clean, z)
    terms = s - r + r * np.log(r / s)
    np.put_along_axis(terms, np.asarray(z)[..., None], 0.0, axis=-1)
    posterior = mu * u
    np.put_along_axis(posterior, np.asarray(z)[..., None], take(mu, z) * (alpha + u), axis=-1)
    return dsigma / n * terms.sum(axis=-1), np.log(posterior / posterior.sum(axis=-1, keepdims=True)), np.log(s)


@pytest.mark.parametrize("sigma", [1e-4, 0.03, 1.0, 19.9])
@pytest.mark.parametrize("output", ["leave_one_out", "score"])
def test_float32_is_enough_at_50257_tokens(output, sigma):
    process, x, z, t, logits = wide_case(output, sigma)
    sigma, dsigma = (float(f(t)[0, 0]) for f in (process.schedule.sigma, process.schedule.dsigma))
    nats, log_p, log_s = reference(x, z, sigma, dsigma, logits)
    told = jnp.asarray(
        logits if output == "leave_one_out" else np.append(log_s, np.ones((1, 3, 1)), axis=-1), jnp.float32
    )
    value, slope = jax.value_and_grad(lambda o: process.nats(o, x, z, t).sum())(told)
    assert jnp.isfinite(slope).all()
    np.testing.assert_allclose(process.nats(told, x, z, t), nats, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(value, nats.sum(), rtol=2e-4, atol=1e-6)
    ours = np.exp(process.predict(told, z, t), dtype=np.float64)[..., : WIDE.real]
    # A score that is all but flat says no more than this in float32: its rounding is 1e-3 of what tells tokens apart.
    assert np.abs(ours - np.exp(log_p)).sum(axis=-1).max() < (3e-3 if output == "score" and sigma > 2 else 2e-6)


def test_the_original_form_of_sedd_fails_there():
    """1 - N / (e^sigma - 1 + N), the authors' ratio, is 0 in float32, and its log is not finite; ours is."""
    process, x, z, t, _ = wide_case("score", 1e-4)
    theirs = 1 - np.float32(WIDE.real) / (np.float32(math.expm1(1e-4)) + np.float32(WIDE.real))
    assert theirs == 0
    assert jnp.isfinite(process.nats(jnp.zeros((1, 3, WIDE.size)), x, z, t)).all()


@pytest.mark.parametrize("t", [1e-5, 1.0])
@pytest.mark.parametrize("output", ["leave_one_out", "score"])
def test_ends_of_time_at_50257_tokens(output, t):
    process = Uniform(WIDE, LogLinear(), output)
    _, x, z, _, logits = wide_case(output, 1.0)
    told, t = jnp.asarray(logits, jnp.float32), jnp.full((1, 1), t)
    log_p = process.predict(told, z, t)
    for law in (log_p, process.reverse_law(log_p, z, t, t * 0.9), process.forward_law(log_p, t)):
        np.testing.assert_allclose(jnp.exp(law).sum(axis=-1), 1, atol=1e-3)
    value, slope = jax.value_and_grad(lambda o: process.nats(o, x, z, t).sum())(told)
    assert jnp.isfinite(value) and jnp.isfinite(slope).all()


# The objectives of that name


def test_objectives_by_name():
    vocabulary = Vocabulary(SIZE + 1, 4)
    udlm = objectives.from_config(vocabulary, name="udlm")
    assert udlm == Diffusion(Uniform(vocabulary, LogLinear(), "leave_one_out"))
    sections = {"schedules": {"geometric": {"sigma_min": 1e-4}}}
    sedd = objectives.from_config(vocabulary, name="sedd_uniform", sections=sections)
    assert sedd == Diffusion(Uniform(vocabulary, Geometric(sigma_min=1e-4), "score", "sigma"))


@pytest.mark.parametrize("name", ["udlm", "sedd_uniform"])
def test_padding_is_neither_noised_nor_counted(name):
    objective = objectives.from_config(Vocabulary(SIZE + 1, 4), name=name)
    x = jnp.zeros((4, 10), jnp.int32)
    valid = jnp.arange(10)[None] < jnp.asarray([10, 3, 7, 1])[:, None]
    t = objective.times(jax.random.key(0), 4, 10)
    seen = []

    def denoise(z, t):
        seen.append((z, t))
        return jax.random.normal(jax.random.key(7), (4, 10, SIZE + 1))

    loss = objective.loss(denoise, jax.random.key(1), x, t, valid)
    ((z, told),) = seen
    assert (z == x)[~valid].all() and (z != 4).all() and (z != x).any()
    np.testing.assert_array_equal(told, objective.process.condition(t))
    assert (loss.token_nats == 0)[~valid].all() and loss.tokens.tolist() == [10, 3, 7, 1]
    np.testing.assert_array_equal(loss.noised, valid)
