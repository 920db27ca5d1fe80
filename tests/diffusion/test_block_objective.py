"""Block diffusion's loss and times, against BD3-LM's own numbers and what they must be."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion.objectives import Blocks, Diffusion, from_config, least_variance
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.schedules import SCHEDULES, LogLinear
from diffrwkv.diffusion.times import times_from_uniform

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "bd3_logits.npz")
MASK = 9


def objective(sizes=(4,), causal_context=True, keep_first=False, mask_id=MASK, schedule=None, **options):
    process = Masked(Vocabulary(mask_id + 1, mask_id), schedule or LogLinear())
    return Diffusion(process, Blocks(sizes, causal_context, keep_first), **options)


def uniform(z, t, **how):
    return jnp.zeros((*z.shape, MASK + 1))


@pytest.mark.parametrize("name, keep_first", [("nobos", False), ("default", True)])
def test_loss_is_bd3s(name, keep_first):
    x, t = jnp.asarray(GOLDEN["x0"], jnp.int32), jnp.asarray(GOLDEN["t"])
    mask_id, block = int(GOLDEN["mask_index"]), int(GOLDEN["block_size"])
    z = jnp.asarray(GOLDEN["xt"], jnp.int32)
    counted = jnp.ones(x.shape, bool)
    if keep_first:
        z, counted = z.at[:, 0].set(x[:, 0]), counted.at[:, 0].set(False)
    theirs = objective(mask_id=mask_id, sizes=(block,), keep_first=keep_first)
    loss = theirs.loss_at(jnp.asarray(GOLDEN[f"logits_{name}"]), x, z, t, counted)
    np.testing.assert_allclose(loss.token_nats, GOLDEN[f"token_loss_{name}"], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(loss.nats.sum() / loss.tokens.sum(), GOLDEN[f"loss_eval_{name}"], rtol=1e-5)


def test_times_are_bd3s():
    u = jnp.asarray(GOLDEN["u_time"]).reshape(-1)
    t = np.repeat(np.asarray(times_from_uniform(u)).reshape(GOLDEN["u_time"].shape), 4, axis=1)
    np.testing.assert_allclose(t, GOLDEN["t_antithetic"], rtol=1e-5)


@pytest.mark.parametrize("length, blocks", [(12, 3), (13, 4), (3, 1)])
def test_each_block_has_its_time_and_together_they_cover_the_interval(length, blocks):
    t = np.sort(np.asarray(objective().times(jax.random.key(0), 5, length)).reshape(-1))
    assert t.shape == (5 * blocks,)
    edges = 1e-3 + (1 - 1e-3) * np.arange(5 * blocks + 1) / (5 * blocks)
    assert (t >= edges[:-1] - 1e-6).all() and (t <= edges[1:] + 1e-6).all()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_clipped_times_mask_the_shares_that_were_asked_for(name):
    schedule = SCHEDULES[name]()
    t = objective(schedule=schedule, mask_rates=(0.3, 0.8)).times(jax.random.key(1), 50, 12)
    rates = np.asarray(schedule.mask_probability(t))
    assert rates.min() > 0.3 - 1e-3 and rates.max() < 0.8 + 1e-3 and abs(rates.mean() - 0.55) < 0.01
    traced = jax.jit(lambda rates: objective(schedule=schedule).times(jax.random.key(1), 50, 12, {"mask_rates": rates}))
    np.testing.assert_allclose(traced(jnp.array([0.3, 0.8])), t, rtol=1e-5)


def test_tokens_of_a_block_are_masked_at_its_time():
    """And the network is told the clean text, the time of each block, and how it was cut."""
    x = jax.random.randint(jax.random.key(0), (500, 10), 0, MASK)
    t = jnp.tile(jnp.array([[0.1, 0.9, 0.5]]), (500, 1))

    def denoise(z, t_, *, clean, block, causal_context):
        assert z.shape == x.shape and t_.shape == t.shape and block == 4 and causal_context is False
        np.testing.assert_array_equal(clean, x)
        return uniform(z, t_)

    loss = objective(causal_context=False).loss(denoise, jax.random.key(1), x, t)
    shares = np.asarray(loss.noised).mean(axis=0)
    np.testing.assert_allclose(shares, [0.1] * 4 + [0.9] * 4 + [0.5] * 2, atol=0.08)
    where = np.asarray(loss.noised)[:, 8]
    np.testing.assert_allclose(np.asarray(loss.token_nats)[where, 8], math.log(MASK) / 0.5, rtol=1e-5)
    assert loss.tokens.tolist() == [10] * 500


@pytest.mark.parametrize("block", [1, 4, 0])
def test_a_uniform_denoiser_scores_log_v(block):
    """Whatever the blocks; the expectation, over many draws."""
    loss_of = objective(sizes=(block,))
    x = jax.random.randint(jax.random.key(0), (64, 10), 0, MASK)

    @jax.jit
    def draw(key):
        k_t, k_mask = jax.random.split(key)
        loss = loss_of.loss(uniform, k_mask, x, loss_of.times(k_t, 64, 10))
        return loss.nats.sum() / loss.tokens.sum()

    draws = jax.vmap(draw)(jax.random.split(jax.random.key(1), 300))
    error = float(draws.std()) / 300**0.5
    exact = math.log(MASK) * (1 - 1e-3)  # the log-linear schedule masks the share 1 - eps at t = 1
    assert abs(float(draws.mean()) - exact) < 4 * error


def test_one_block_is_the_whole():
    x = jax.random.randint(jax.random.key(0), (8, 10), 0, MASK)
    logits = jax.random.normal(jax.random.key(1), (8, 10, MASK + 1))
    whole = objective(sizes=(0,))
    mdlm = Diffusion(whole.process)
    t = whole.times(jax.random.key(2), 8, 10)
    np.testing.assert_array_equal(t[:, 0], mdlm.times(jax.random.key(2), 8, 10))
    ours = whole.loss(lambda z, t, **how: logits, jax.random.key(3), x, t)
    theirs = mdlm.loss(lambda z, t: logits, jax.random.key(3), x, t[:, 0])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_padding_and_a_given_first_token_do_not_count():
    x = jax.random.randint(jax.random.key(0), (4, 10), 0, MASK)
    valid = jnp.arange(10)[None] < jnp.array([3, 10, 1, 7])[:, None]
    kept = objective(keep_first=True)
    seen = []
    loss = kept.loss(lambda z, t, **how: seen.append(z) or uniform(z, t), jax.random.key(1), x, jnp.ones((4, 3)), valid)
    assert loss.tokens.tolist() == [2, 9, 0, 6]
    shown = np.asarray(seen[0]) == np.asarray(x)
    assert shown[:, 0].all() and shown[~np.asarray(valid)].all() and not shown[1, 1:].any()


def test_forms_and_validation():
    mixed = objective(sizes=(4, 16, 0), mask_rates=(0.2, 0.7), search_mask_rates=True)
    assert [form.layout.sizes for form in mixed.forms] == [(4,), (16,), (0,)]
    assert mixed.validation == objective()
    assert [form.layout.block(10) for form in mixed.forms] == [4, 10, 10]
    assert Diffusion(mixed.process).forms == (Diffusion(mixed.process),)
    assert hash(mixed) is not None and dataclasses.replace(mixed.layout, sizes=7).sizes == (7,)


def test_sizes_by_the_step():
    """Each of them from its own step on, whatever the key; drawn where no step is said, all of them."""
    scheduled = Blocks((32, 1, 4), begins=(400, 0, 200))
    keys = jax.random.split(jax.random.key(0), 60)
    taken = [scheduled.sizes[int(scheduled.form(keys[0], jnp.int32(s)))] for s in (0, 199, 200, 399, 400, 10**6)]
    assert taken == [1, 1, 4, 4, 32, 32]
    assert [form.sizes for form in scheduled.forms] == [(32,), (1,), (4,)] and not scheduled.forms[0].begins
    assert objective().layout.form(keys[0], jnp.int32(3)) == 0
    drawn = jax.vmap(lambda key: Blocks((32, 1, 4)).form(key, 0))(keys)
    assert set(drawn.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("begins", [(0,), (0, 1, 2), (1, 2), (0, 0), (0, -1), (0.5, 0), "early"])
def test_steps_that_say_no_schedule_are_named(begins):
    with pytest.raises(ValueError, match="begins must"):
        Blocks((4, 1), begins=begins)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sizes": ()}, "sizes must be the lengths"),
        ({"sizes": (4, -1)}, "sizes must be the lengths"),
        ({"sizes": (2.5,)}, "sizes must be the lengths"),
        ({"mask_rates": (0.5, 0.5)}, "mask_rates must be"),
        ({"mask_rates": (0.5, 1.5)}, "mask_rates must be"),
        ({"time_eps": 0}, "time_eps must be"),
        ({"mask_id": -1}, "vocabulary's size"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_from_config_takes_lists():
    sections = {"layouts": {"blocks": {"sizes": [4, 16]}}, "objectives": {"mdlm": {"mask_rates": [0, 1]}}}
    built = from_config(Vocabulary(MASK + 1, MASK), name="mdlm", layout="blocks", sections=sections)
    assert built == objective(sizes=(4, 16))


def test_the_range_of_least_variance():
    """Noise that is large at both ends: the widths that are tried leave one range in the middle."""
    rng = np.random.default_rng(0)
    rates = rng.uniform(size=20_000)
    nats = rng.normal(size=rates.size) * np.where((rates > 0.25) & (rates < 0.75), 0.1, 5.0)
    assert least_variance(rates, nats) == (0.25, 0.75)
    assert least_variance(np.append(rates, np.nan), np.append(nats, 1e9)) == (0.25, 0.75)
    assert least_variance(rates[:1], nats[:1]) == (0.0, 1.0)


def test_nats_of_blocks():
    x = jax.random.randint(jax.random.key(0), (3, 10), 0, MASK)
    loss = objective().loss(uniform, jax.random.key(1), x, jnp.ones((3, 3)))
    nats = objective().layout.sums(loss.token_nats)
    assert nats.shape == (3, 3)
    np.testing.assert_allclose(nats, math.log(MASK) * np.array([[4, 4, 2]] * 3), rtol=1e-5)


@pytest.mark.parametrize("times", [(4,), (4, 2), (3, 3)])
def test_times_that_are_not_one_per_block_are_refused(times):
    with pytest.raises(ValueError, match=r"the times \(4, 3\), got .*times"):
        objective().loss(uniform, jax.random.key(0), jnp.zeros((4, 10), jnp.int32), jnp.ones(times))
