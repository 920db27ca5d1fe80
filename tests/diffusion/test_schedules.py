"""Every schedule of the dict: against the original arrays, and against itself."""

import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion.schedules import SCHEDULES, Cosine, CosineSquared, Geometric, LogLinear

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "mdlm_noise.npz")
NAMES = sorted(SCHEDULES)


@pytest.mark.parametrize(
    "name, schedule",
    [
        ("loglinear", LogLinear()),
        ("cosine", Cosine()),
        ("cosinesqr", CosineSquared()),
        ("geometric", Geometric(1e-3, 20.0)),
    ],
)
def test_noise_and_rate_match_mdlm(name, schedule):
    t = jnp.asarray(GOLDEN["t"])
    np.testing.assert_allclose(schedule.sigma(t), GOLDEN[f"{name}_total"], rtol=1e-5, atol=1e-6)
    # At t = 1 the original's float32 loses digits that ours keeps: alpha = 1 - 0.999, cos(pi/2) and
    # sin(pi) are not exact there. The next tests hold that end to float64.
    early = GOLDEN["t"] < 0.99
    np.testing.assert_allclose(schedule.dsigma(t)[early], GOLDEN[f"{name}_rate"][early], rtol=1e-5)


def test_rates_at_the_end_are_exact():
    one = jnp.ones(1)
    np.testing.assert_allclose(LogLinear().dsigma(one), 999.0, rtol=1e-6)
    np.testing.assert_allclose(Cosine().dsigma(one), 999.0 * math.pi / 2, rtol=1e-6)
    assert CosineSquared().dsigma(one) == 0


def test_loglinear_matches_mdlm():
    t = jnp.asarray(GOLDEN["t"])
    np.testing.assert_allclose(LogLinear().mask_probability(t), GOLDEN["loglinear_move_chance"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(LogLinear().weight(t), GOLDEN["loglinear_weight"], rtol=1e-5)
    np.testing.assert_allclose(LogLinear().sigma(t), GOLDEN["loglinear_total_f64"], rtol=2e-6)
    np.testing.assert_allclose(LogLinear().dsigma(t), GOLDEN["loglinear_rate_f64"], rtol=2e-6)


def test_time_undoes_mask_probability_as_in_mdlms_importance_sampling():
    # Their transformation spaces log(mask probability) evenly in t.
    t = GOLDEN["t"].astype(np.float64)
    first, last = (
        np.log1p(-np.exp(-GOLDEN["loglinear_sigma_min"])),
        np.log1p(-np.exp(-GOLDEN["loglinear_sigma_max"])),
    )
    times = LogLinear().time(jnp.exp(jnp.asarray(t * last + (1 - t) * first, jnp.float32)))
    np.testing.assert_allclose(times, GOLDEN["loglinear_importance_t"], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_closed_forms_agree_with_float64_derivatives(name):
    schedule = SCHEDULES[name]()
    t = np.linspace(0.01, 0.99, 50)
    h = 1e-3
    alpha = {s: np.asarray(schedule.alpha(jnp.asarray(t + s * h, jnp.float32)), np.float64) for s in (-1, 0, 1)}
    t = jnp.asarray(t, jnp.float32)
    masked, slope = schedule.mask_probability(t), schedule.dalpha(t)
    np.testing.assert_allclose(masked, 1 - alpha[0], atol=2e-7)
    np.testing.assert_allclose(slope, (alpha[1] - alpha[-1]) / (2 * h), rtol=2e-3, atol=3e-4)
    np.testing.assert_allclose(schedule.weight(t), -slope / masked, rtol=2e-6)
    np.testing.assert_allclose(schedule.sigma(t), -np.log(alpha[0]), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(schedule.dsigma(t), -slope / schedule.alpha(t), rtol=1e-5)
    assert (np.diff(alpha[0]) < 0).all()
    early = t[t < 0.6]  # later Geometric's mask probability is 1 in float32
    np.testing.assert_allclose(schedule.time(schedule.mask_probability(early)), early, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_digits_are_lost_at_the_ends(name):
    schedule = SCHEDULES[name]()
    t = jnp.asarray([1e-6, 1e-4, 1e-3], jnp.float32)
    exact = {
        "loglinear": 1 / t, "linear": 1 / t, "cosine": 2 / t, "cosine_squared": 2 / t, "maskgit": 1
        / t, "polynomial": 2 / t, "geometric": math.log(20 / 1e-3) * jnp.ones_like(t),
    }  # fmt: skip
    if name in exact:
        np.testing.assert_allclose(schedule.weight(t), exact[name], rtol=1e-2 if name == "geometric" else 1e-5)
    if name == "loglinear":
        np.testing.assert_array_equal(schedule.weight(t), 1 / t)
    masked = np.asarray(schedule.mask_probability(t), np.float64)
    assert (masked > 0).all() and (masked < 0.01).all()
    # The weight times the mask probability is the slope, to float32 and not to 1e-7 / mask
    # probability.
    np.testing.assert_allclose(schedule.weight(t) * masked, -schedule.dalpha(t), rtol=1e-5)
    end = schedule.alpha(jnp.asarray([1.0], jnp.float32))
    assert 0 <= float(end[0]) <= 1.0001e-3
    assert np.isfinite(np.asarray(schedule.weight(jnp.asarray([1.0], jnp.float32)))).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_is_a_hashable_value(name):
    assert SCHEDULES[name]() == SCHEDULES[name]()
    assert hash(SCHEDULES[name]()) == hash(SCHEDULES[name]())
    assert SCHEDULES[name].__doc__


@pytest.mark.parametrize(
    "name, options",
    [
        ("loglinear", {"eps": 1.0}),
        ("cosine", {"eps": -1e-3}),
        ("polynomial", {"power": 0.0}),
        ("geometric", {"sigma_min": 2.0, "sigma_max": 1.0}),
    ],
)
def test_bad_schedules_are_refused(name, options):
    with pytest.raises(ValueError):
        SCHEDULES[name](**options)
