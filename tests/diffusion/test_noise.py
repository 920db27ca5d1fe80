"""Rare events must be as likely as they should be; naive float32 noise fails this."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffrwkv.diffusion import noise

pytestmark = pytest.mark.optimised


def naive_gumbel_from_bits(bits):
    """What jax.random.gumbel computes by default: -log(-log(u)), u a multiple of 2^-23."""
    u = (bits[0] >> 9).astype(jnp.float32) * 2.0**-23
    return -jnp.log(-jnp.log(jnp.maximum(u, jnp.finfo(jnp.float32).tiny)))


def exact_gumbel_from_bits(bits):
    return noise.gumbel_from_uniform(noise.uniform_from_bits(bits))


def rare_wins(gumbel_from_bits, rare_bits):
    """How often the rarer of two tokens, p = e^-18, is drawn, given that its noise is in the top
    2^-20 of its law.

    Only then can it be drawn at all, but for a chance of 1e-9; so a test can look where plain
    counting would need 1e10 draws. Returns the wins and the draws.
    """
    n = 200_000
    random = np.random.default_rng(0)
    common = random.integers(0, 2**32, (2, n), np.uint32)
    rare = random.integers(0, 2**32, (2, n), np.uint32)
    rare[0] = rare_bits(rare[0] >> 20)
    wins = gumbel_from_bits(jnp.asarray(rare)) - 18.0 > gumbel_from_bits(jnp.asarray(common))
    return int(wins.sum()), n


def test_the_tail_has_its_probability_and_naive_noise_loses_it():
    # P(win and noise in the top 2^-20) / 2^-20; the rest of the law adds nothing that matters.
    expected = np.exp(-18.0) / (1 + np.exp(-18.0)) * 2.0**20
    wins, n = rare_wins(exact_gumbel_from_bits, lambda low12: low12)  # top: u near 0
    assert scipy.stats.binomtest(wins, n, expected).pvalue > 1e-3, (wins, n * expected)
    wins, n = rare_wins(naive_gumbel_from_bits, lambda low12: (2**20 - 1) * 2**12 + low12)  # top: u near 1
    assert scipy.stats.binomtest(wins, n, expected).pvalue < 1e-12, (wins, n * expected)


def test_the_gumbel_tail_is_right_digit_by_digit():
    high = np.asarray([0, 0, 1, 77, 2**20, 2**31, 2**32 - 1], np.uint32)
    low = np.asarray([0, 2**31, 5, 2**32 - 1, 3, 0, 0], np.uint32)
    u = (high.astype(np.longdouble) * 2**32 + low + np.longdouble(0.5)) / np.longdouble(2) ** 64
    exact = -np.log(-np.log1p(-u))
    got = exact_gumbel_from_bits(jnp.asarray(np.stack([high, low])))
    np.testing.assert_allclose(got[:-1], exact[:-1].astype(np.float64), rtol=1e-6)
    assert got[0] > 44 and np.isfinite(got).all()


def test_uniform_stays_inside_and_is_fine_near_zero():
    bits = jnp.asarray([[0, 0, 2**32 - 1], [0, 1, 2**32 - 1]], jnp.uint32)
    u = noise.uniform_from_bits(bits)
    np.testing.assert_allclose(u, [2.0**-65, 1.5 * 2.0**-64, 1 - 2.0**-24], rtol=1e-7)
    u = np.asarray(noise.uniform(jax.random.key(0), (100_000,)), np.float64)
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    # A coarse uniform has few distinct mantissas among its small values; here they are all
    # different.
    small = u[u < 2**-10]
    assert (small * 2**23 % 1 != 0).mean() > 0.9


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_categorical_has_the_law_of_its_logits(shape):
    logits = jnp.asarray([0.3, -jnp.inf, 2.0, -3.0, 0.0])
    n = 20_000
    keys = jax.random.split(jax.random.key(1), n)
    logits_here = jnp.broadcast_to(logits, (*shape, 5))
    draws = jax.jit(jax.vmap(lambda key: noise.categorical(key, logits_here)))(keys)
    assert draws.shape == (n, *shape) and draws.dtype == jnp.int32
    counts = np.bincount(np.asarray(draws).ravel(), minlength=5)
    assert counts[1] == 0
    p = np.asarray(jax.nn.softmax(logits), np.float64)[[0, 2, 3, 4]]
    counts = counts[[0, 2, 3, 4]]
    assert scipy.stats.chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-3
