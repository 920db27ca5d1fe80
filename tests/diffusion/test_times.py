import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.schedules import SCHEDULES, LogLinear, Polynomial
from diffrwkv.diffusion.times import sample_times, times_from_uniform

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "mdlm_loss.npz")
MASK = 9
VOCABULARY = Vocabulary(MASK + 1, MASK)


def test_times_match_mdlm():
    u = jnp.asarray(GOLDEN["u_time"])
    eps = float(GOLDEN["sampling_eps"])
    np.testing.assert_allclose(times_from_uniform(u, eps=eps), GOLDEN["t_antithetic"], rtol=1e-5)
    np.testing.assert_allclose(times_from_uniform(u, low_discrepancy=False, eps=eps), GOLDEN["t_iid"], rtol=1e-5)


def test_masking_rule_matches_mdlm():
    moved = GOLDEN["u"] < np.asarray(LogLinear().mask_probability(jnp.asarray(GOLDEN["t"])))[:, None]
    np.testing.assert_array_equal(moved, GOLDEN["move"])
    np.testing.assert_array_equal(np.where(moved, 29, GOLDEN["x0"]), GOLDEN["xt"])


@pytest.mark.parametrize("n", [1, 7, 64])
def test_low_discrepancy_puts_one_time_in_each_stratum_of_the_global_batch(n):
    eps = 1e-3
    for seed in range(20):
        t = np.asarray(sample_times(jax.random.key(seed), n, eps=eps), np.float64)
        assert t.dtype == np.float64 and t.shape == (n,) and t.min() >= eps - 1e-9 and t.max() <= 1
        strata = np.floor((t - eps) / (1 - eps) * n - 1e-6 * (np.arange(n) + 1) / n)
        assert (np.abs(strata - np.arange(n)) <= 1).all()
        edges = eps + (1 - eps) * np.arange(n + 1) / n
        assert (t >= edges[:-1] - 1e-6).all() and (t <= edges[1:] + 1e-6).all()


def test_independent_times_do_not_cover_evenly():
    t = np.asarray(sample_times(jax.random.key(0), 64, low_discrepancy=False))
    assert len(set(np.floor(t * 64))) < 55
    assert sample_times(jax.random.key(0), 5).dtype == jnp.float32


def test_no_sequences_no_times():
    with pytest.raises(ValueError, match="at least one"):
        sample_times(jax.random.key(0), 0)


@pytest.mark.parametrize("eps", [1.0, -0.1, float("nan"), 1 - 1e-12])
def test_times_begin_inside(eps):
    with pytest.raises(ValueError, match="eps must be in"):
        sample_times(jax.random.key(0), 4, eps=eps)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_tokens_are_masked_with_the_schedules_probability(name):
    schedule = SCHEDULES[name]()
    x = jnp.asarray(np.random.default_rng(1).integers(0, MASK, (5, 8001)), jnp.int32)
    t = jnp.asarray([0.02, 0.3, 0.5, 0.8, 1.0])
    z = Masked(VOCABULARY, schedule).noise(jax.random.key(2), x, t[:, None])
    assert z.dtype == x.dtype and z.shape == x.shape
    masked = np.asarray(z == MASK)
    np.testing.assert_array_equal(np.asarray(z)[~masked], np.asarray(x)[~masked])
    p = np.asarray(schedule.mask_probability(t))
    assert (np.abs(masked.mean(axis=1) - p) <= 4 * np.sqrt(p * (1 - p) / 8001) + 1e-4).all()


def test_time_zero_masks_nothing_and_what_may_not_be_masked_is_not():
    x = jnp.zeros((2, 1000), jnp.int32)
    z = Masked(VOCABULARY, Polynomial(3.0)).noise(jax.random.key(0), x, jnp.zeros((2, 1)))
    np.testing.assert_array_equal(z, x)
    maskable = jnp.arange(1000)[None] % 3 == jnp.asarray([[0], [1]])
    z = Masked(VOCABULARY, SCHEDULES["linear"]()).noise(jax.random.key(0), x, jnp.ones((2, 1)), maskable)
    np.testing.assert_array_equal(z == MASK, maskable)
