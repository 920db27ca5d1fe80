"""Bounds and samplers with a perfect network, against the law of the text itself.

The text has 1 to 3 tokens of 3 symbols, so that everything is enumerated: `known_law`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.objectives import Diffusion
from diffrwkv.diffusion.processes import Masked, Scheduled, Scored, Uniform
from diffrwkv.diffusion.samplers import Analytic, Ancestral, Euler, FirstHitting, Psi, sequence_keys
from diffrwkv.diffusion.schedules import Cosine, Geometric, Linear, LogLinear
from tests.diffusion.known_law import MASK, SYMBOLS, VOCABULARY, known_law, processes
from tests.thin import thin

DRAWS = 200_000
PROCESSES = processes()


def each(step=1):
    return pytest.mark.parametrize("name", thin(PROCESSES, step))


# Samplers


def p_value(process, sampler, length, network=None, draws=DRAWS, expected=None):
    """Of the texts that the sampler draws, under their law, or under `expected`, [Z]."""
    law = known_law(length)
    if expected is None:
        expected = np.zeros(len(law.states))
        expected[law.index(law.texts)] = law.p

    @jax.jit
    def run(keys):
        canvas = jnp.full((draws, length), MASK, jnp.int32)
        return law.index(sampler(process, network or law.denoise(process), keys, canvas).tokens)

    counts = np.bincount(run(sequence_keys(2, draws)), minlength=len(law.states))
    can = expected > 0
    assert counts[~can].sum() == 0
    return scipy.stats.chisquare(counts[can], draws * expected[can] / expected[can].sum()).pvalue


def total_variation(expected, law):
    return np.abs(expected[law.index(law.texts)] - law.p).sum() / 2


FEW_STEPS = [
    Ancestral(num_steps=3),
    Analytic(num_steps=3),
    Psi(num_steps=3, kappa=0.3),
    Psi(num_steps=4, strategy="cap", eta=0.4),
    Psi(num_steps=4, strategy="rescale", eta=0.6, t_on=0.8, t_off=0.2),
    Psi(num_steps=6, strategy="loop", eta=0.2, t_on=0.6, t_off=0.2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sampler"),  # the last three differ in their grid alone, which knows no output and little of the process
    [
        (name, sampler)
        for name, process in PROCESSES.items()
        for sampler in FEW_STEPS[: None if name in ("masked, mean", "uniform, leave one out") else 3]
        if sampler.fits(process)
    ],
    ids=lambda v: v if isinstance(v, str) else f"{type(v).__name__} {getattr(v, 'strategy', '')}",
)
def test_samplers_take_the_steps_of_their_definition(name, sampler):
    """Two tokens, few steps: whatever they do in parallel, and at the first and last step, shows in the law."""
    process, law = PROCESSES[name], known_law(2)
    if isinstance(sampler, Psi):
        times, kappa = (np.asarray(a, np.float64) for a in sampler.grid(process.schedule))
        assert 0 <= kappa.min() < 1 and (np.diff(times) <= 0).all() and len(kappa) == sampler.num_steps
    else:
        times, kappa = np.linspace(1, 1e-5, sampler.num_steps + 1), None
    expected = law.sampled(process, times, kappa, most_probable=isinstance(sampler, Ancestral))
    assert total_variation(expected, law) > 0.02  # so few steps are not exact
    assert p_value(process, sampler, 2, expected=expected) > 1e-3


@each(2)
def test_for_one_token_those_steps_are_exact(name):
    process, law = PROCESSES[name], known_law(1)
    for times, kappa in (([1, 1e-5], None), ([1, 0.6, 0.5, 0.2], [0.1, 1.0, 0.6])):
        assert total_variation(law.sampled(process, times, kappa), law) < 1e-4
    for sampler in (Psi(num_steps=2, kappa=0.5), Analytic(num_steps=1)):
        assert not sampler.fits(process) or p_value(process, sampler, 1) > 1e-3


@each(2)
def test_for_more_tokens_they_become_exact(name):
    """With an error of first order in the length of a step."""
    process, law = PROCESSES[name], known_law(2)
    error = lambda steps, kappa: total_variation(
        law.sampled(process, np.linspace(1, 1e-5, steps + 1), np.full(steps, kappa)), law
    )
    coarse, fine = error(256, 1.0), error(512, 1.0)
    least, most = (1.6, 4e-3) if name == "hybrid" else (1.8, 2e-3)  # its noise falls as sqrt(t), too fast at the end
    assert least < coarse / fine < 2.2 and fine < most
    assert error(512, 0.99) < most


@pytest.mark.parametrize("output", ["mean", "score"])
def test_masked_ancestral_sampling_becomes_exact(output):
    """Here it takes a pass or two, however many steps."""
    assert p_value(Masked(VOCABULARY, Linear(), output), Ancestral(num_steps=1000), 2) > 1e-3


@pytest.mark.parametrize("name", thin(name for name, process in PROCESSES.items() if isinstance(process, Scored)))
def test_euler_steps_become_exact(name):
    process = processes(LogLinear(0.05))[name]
    p = lambda steps, draws: p_value(process, Euler(num_steps=steps), 1, draws=draws)
    assert p(64, DRAWS // 8) > 1e-3
    if name.startswith("uniform"):  # under this schedule a mask's step is exact
        assert p(2, DRAWS) < 1e-6


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("output", ["mean", "score"])
def test_first_hitting_is_exact(output, length):
    process = Masked(VOCABULARY, Cosine(), output)
    law = known_law(length)
    table = jnp.asarray(law.output(process, 0.5), jnp.float32)  # with masks it does not depend on the time
    network = lambda z, t: table[law.index(z)]
    assert p_value(process, FirstHitting(), length, network) > 1e-3


def posterior_as_mean(length):
    """A network that says E[x | z] where E[x | z without the position] is wanted."""
    process, law = Uniform(VOCABULARY, Linear(), "leave_one_out"), known_law(length)

    def network(z, t):
        alpha = process.schedule.alpha(t[0])
        mu = law.leave_one_out(process, t[0], jnp)
        seen = jnp.asarray(law.states)[..., None] == jnp.arange(SYMBOLS + 1)
        log_p = jnp.log(jnp.maximum(mu * (alpha * seen + (1 - alpha) / SYMBOLS), 1e-30))
        return log_p[law.index(z)]

    return process, network


def test_the_posterior_in_place_of_the_leave_one_out_law_does_not_fit():
    process, network = posterior_as_mean(1)
    for sampler in (Psi(num_steps=4, kappa=1.0), Analytic(num_steps=4)):
        assert p_value(process, sampler, 1, draws=DRAWS // 4) > 1e-3
        assert p_value(process, sampler, 1, network, draws=DRAWS // 4) < 1e-6


# Bounds

EARLIEST = 1e-3


def bound(process, law, network):
    """The mean of the bound over texts, noise and times from EARLIEST to 1, by enumeration and quadrature in log t."""
    nodes, weights = np.polynomial.legendre.leggauss(120)
    log_t = math.log(EARLIEST) * (1 - nodes) / 2
    times, weights = np.exp(log_t), weights * -math.log(EARLIEST) / 2 * np.exp(log_t)
    x, z = (jnp.asarray(a, jnp.int32) for a in (law.texts, law.states))
    shape = (len(x), len(z), law.length)

    @jax.jit
    def nats(t):
        output = jnp.broadcast_to(network(z, t[None]), (*shape[:1], *z.shape, SYMBOLS + 1)).reshape(-1, law.length, 4)
        pairs = (jnp.broadcast_to(a, shape).reshape(-1, law.length) for a in (x[:, None], z[None]))
        of_pairs = process.nats(output, *pairs, jnp.full((1, 1), t)).sum(axis=-1).reshape(shape[:2])
        q = law.likelihoods(process, t, jnp).prod(axis=-1)
        return (jnp.asarray(law.p)[:, None] * jnp.where(q > 0, q * of_pairs, 0.0)).sum()

    return sum(w * float(nats(jnp.float32(t))) for t, w in zip(times, weights, strict=True))


def exact(process, law):
    """What the bound is for the perfect network: all that z says of x at EARLIEST, but not what it says at 1."""
    return law.information(process, EARLIEST) - law.information(process, 1.0)


SCHEDULES = (LogLinear(), Cosine(), Geometric(sigma_min=1e-4))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        (name, schedule)
        for name, process in PROCESSES.items()
        for schedule in SCHEDULES[: None if isinstance(process, Scheduled) else 1]
    ],
    ids=str,
)
def test_bounds_of_the_perfect_network_are_tight(name, schedule):
    process, law = processes(schedule)[name], known_law(2)
    found = bound(process, law, law.denoise(process))
    assert found == pytest.approx(exact(process, law), rel=1e-3)
    before = process.nats_before(jnp.asarray(law.texts), jnp.float32(EARLIEST))
    if before is None:
        assert abs(found - law.entropy) < 0.02  # but for the ends of time it is the entropy
    else:
        before = float(before.sum(axis=1) @ law.p)
        assert law.entropy < found + before < law.entropy + before


@each()
def test_bounds_of_another_network_are_bounds(name):
    process, law = processes(LogLinear())[name], known_law(2)
    perfect = law.denoise(process)
    for seed, scale in ((0, 0.1), (1, 1.0)):
        off = scale * jax.random.normal(jax.random.key(seed), (len(law.states), law.length, SYMBOLS + 1))
        found = bound(process, law, lambda z, t, off=off: perfect(z, t) + off[law.index(z)])
        assert found > exact(process, law) + 0.05 * scale**2


def test_the_bound_of_the_posterior_in_place_of_the_leave_one_out_law_is_loose():
    process, network = posterior_as_mean(2)
    assert bound(process, known_law(2), network) > exact(process, known_law(2)) + 0.05


def test_a_longer_text():
    for name in ("masked, mean", "uniform, leave one out", "hybrid"):
        process, law = PROCESSES[name], known_law(3)
        assert bound(process, law, law.denoise(process)) == pytest.approx(exact(process, law), rel=1e-3)


@pytest.mark.parametrize("output", ["mean", "score"])
def test_masked_blocks_of_one_token_are_the_chain_rule(output):
    law, process = known_law(3), Masked(VOCABULARY, Linear(), output)
    objective = Diffusion(process, Blocks(sizes=(1,)))
    x = jnp.asarray(law.texts, jnp.int32)
    table = jnp.asarray(law.output(process, 0.5), jnp.float32)

    def denoise(z, t, *, clean, block, causal_context):
        """Each position sees the clean tokens before it, and its own noised one."""
        assert block == 1 and causal_context
        i, j = jnp.arange(3)[:, None], jnp.arange(3)
        seen = jnp.where(j < i, clean[:, None], jnp.where(j == i, z[:, None], MASK))  # [B, L, L]
        return table[law.index(seen), jnp.arange(3)]

    # At t = 1 all is masked, and the weight is 1.
    loss = jax.jit(functools.partial(objective.loss, denoise))(jax.random.key(0), x, jnp.ones((len(x), 3)))
    np.testing.assert_allclose(loss.nats, -np.log(law.p), rtol=1e-5)
    # At any other time a mask is as much rarer as its weight is larger.
    t, masks = jnp.full((len(x), 3), 0.25), jnp.full_like(x, MASK)
    output = denoise(masks, t, clean=x, block=1, causal_context=True)
    np.testing.assert_allclose(0.25 * objective.loss_at(output, x, masks, t).nats, -np.log(law.p), rtol=1e-5)
