"""Duo's curriculum: the discrete process of a Gaussian one, and what the network is shown of it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion.objectives import Blocks, Diffusion, Duo
from diffrwkv.diffusion.objectives.duo import alpha_of_gamma
from diffrwkv.diffusion.processes import Masked, Uniform, Vocabulary

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "duo_curriculum_V66.npz")
VOCABULARY = Vocabulary(7, 3)
PROCESS = Uniform(VOCABULARY)


def test_alpha_is_duos():
    gamma = jnp.asarray(GOLDEN["gamma"], jnp.float32)
    alpha, drawn, slope = alpha_of_gamma(gamma, 66)
    np.testing.assert_allclose(alpha, GOLDEN["alpha"], rtol=1e-5)
    np.testing.assert_allclose(drawn, 1 - GOLDEN["alpha"], atol=1e-6)
    np.testing.assert_allclose(slope * (GOLDEN["gamma_max"] - GOLDEN["gamma_min"]), GOLDEN["dalpha_dt"], rtol=1e-4)
    many = alpha_of_gamma(jnp.linspace(-6.0, 0.0, 13), 50_257)
    assert all(np.isfinite(x).all() for x in many) and (np.diff(many[0]) <= 0).all()


def test_the_argmax_of_the_latent_has_the_law_of_uniform_noise():
    duo = Duo(PROCESS, gamma_min=-2.0, gamma_max=0.5)
    x = jnp.full((1, 200_000), 5)
    t = jnp.full((1, 1), 0.6)
    z, soft = duo.soft_noise(jax.random.key(0), x, t, 10)
    alpha = float(duo.curriculum(t)[0][0, 0])
    share = np.bincount(np.asarray(z[0]), minlength=7) / z.shape[1]
    law = np.where(np.arange(7) == 5, alpha, 0) + (1 - alpha) / 6 * (np.arange(7) != 3)
    assert (np.abs(share - law) < 4 * np.sqrt(law * (1 - law) / z.shape[1]) + 1e-12).all() and 0.2 < alpha < 0.8
    np.testing.assert_array_equal(jnp.argmax(soft, -1), z)
    assert (soft[..., 3] == 0).all()


def record(duo, step, t, valid=None, **options):
    seen = []

    def denoise(z, told, **blocks):
        seen.append((z, told))
        return jnp.log(jnp.arange(1.0, 8.0)) * jnp.ones((*z.shape[:2], 1))

    x = jnp.asarray([[0, 1, 2, 4, 5, 6, 0, 1]] * 2)
    loss = duo.loss(denoise, jax.random.key(1), x, t, valid, step=step, **options)
    return x, loss, *seen[0]


def test_soft_tokens_first_then_udlm():
    duo = Duo(PROCESS, curriculum_steps=10)
    t = jnp.asarray([0.3, 0.8])
    _, early, soft, told = record(duo, 0, t)
    assert soft.shape == (2, 8, 7) and ((soft > 0.001) & (soft < 0.999)).any()
    np.testing.assert_allclose(PROCESS.schedule.mask_probability(told), duo.curriculum(t)[1], rtol=1e-5)
    _, late, hard, told = record(duo, 10, t)
    assert set(np.unique(hard)) == {0.0, 1.0}
    np.testing.assert_array_equal(told, t)
    plain = Diffusion(PROCESS)
    z = jnp.argmax(hard, -1)
    x, _, *_ = record(duo, 10, t)
    logits = jnp.log(jnp.arange(1.0, 8.0)) * jnp.ones((2, 8, 1))
    np.testing.assert_allclose(late.token_nats, plain.loss_at(logits, x, z, t[:, None]).token_nats, rtol=1e-6)
    assert not np.allclose(early.token_nats, late.token_nats)
    temperatures = [np.asarray(record(duo, step, t)[2]).max(-1).mean() for step in (0, 5, 9)]
    assert sorted(temperatures) == temperatures, "surer as tau falls"
    assert duo.validation == plain


def test_padding_and_blocks():
    duo = Duo(PROCESS, Blocks((4,)), curriculum_steps=10)
    valid = jnp.arange(8)[None] < jnp.asarray([[8], [5]])
    x, loss, soft, told = record(duo, 3, jnp.asarray([[0.2, 0.9], [0.5, 0.7]]), valid)
    np.testing.assert_array_equal(soft[1, 5:], jax.nn.one_hot(x[1, 5:], 7))
    assert told.shape == (2, 2) and loss.tokens.tolist() == [8, 5] and (loss.token_nats[1, 5:] == 0).all()
    one, other = duo.curriculum(jnp.asarray([0.2, 0.9]))[2]
    assert one != other and np.isfinite(loss.nats).all()


def test_what_it_refuses():
    with pytest.raises(TypeError, match="uniform noise"):
        Duo(Masked(VOCABULARY))
    with pytest.raises(TypeError, match="leave-one-out"):
        Duo(Uniform(VOCABULARY, output="score"))
    for options, told in (
        ({"gamma_min": 0.0}, "below gamma_max"),
        ({"tau_end": 0.0}, "tau_end"),
        ({"curriculum_steps": 0}, "curriculum"),
    ):
        with pytest.raises(ValueError, match=told):
            Duo(PROCESS, **options)
