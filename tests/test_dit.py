"""`block="dit"` is MDLM's Transformer: its network, losses and samplers, with its weights, give its own numbers.

The weights are too large to be committed (tests/golden_arrays.py says where they are looked for). What needs no network
is held to the same numbers in tests/diffusion.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion.objectives import Diffusion
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.schedules import LogLinear
from diffrwkv.layers import sinusoidal
from diffrwkv.mixers.attention import rotary
from diffrwkv.weights import FORMATS
from tests.golden_arrays import golden, relative_error

pytestmark = pytest.mark.optimised
TOLERANCE = 1e-5
SCHEDULE = LogLinear()


class Network:
    """The golden weights in our model; `golden` is what they gave in theirs."""

    def __init__(self):
        self.golden = golden("mdlm_dit.npz")
        state = {name[2:]: value for name, value in self.golden.items() if name.startswith("w/")}
        self.fields, params = FORMATS["mdlm"].model(state), FORMATS["mdlm"].to_params(state)
        self.mask_id = self.fields["vocab_size"] - 1
        self.process = Masked(Vocabulary(self.fields["vocab_size"], self.mask_id), SCHEDULE)
        self.compiled = {}
        for mode in MODES:
            model = Denoiser(**self.fields | {"time_conditioning": mode == "timecond"})
            run = lambda z, sigma, model=model: model.apply({"params": params}, z, sigma, capture_intermediates=True)
            self.compiled[mode] = jax.jit(run)

    def logits(self, mode, z, sigma):
        return self.compiled[mode](jnp.asarray(z, jnp.int32), jnp.asarray(sigma))[0]

    def log_probs(self, mode, z, sigma):
        return self.process.predict(self.logits(mode, z, sigma), jnp.asarray(z, jnp.int32), None)

    def inside(self, mode, z, sigma):
        """What each module returned."""
        return self.compiled[mode](jnp.asarray(z, jnp.int32), jnp.asarray(sigma))[1]["intermediates"]


# Their time_conditioning True, and False, under which the network sees sigma = 0; the names of the logits of each.
MODES = {"timecond": "logits_raw", "default": "logits_raw_sigma0"}
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def network():
    return Network()


def close(ours, theirs, tolerance=TOLERANCE):
    """Within `tolerance` of the largest number, and as a whole."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert relative_error(ours, theirs) < tolerance
    assert np.abs(ours - theirs).max() < tolerance * max(1.0, np.abs(theirs).max())


# --- the network ------------------------------------------------------------------------------------------------


@each_mode
def test_logits(network, mode):
    close(network.logits(mode, network.golden["xt"], network.golden["sigma"]), network.golden[MODES[mode]])


def test_log_probs(network):
    g = network.golden
    ours, theirs = np.asarray(network.log_probs("timecond", g["xt"], g["sigma"])), g["log_probs_subs"]
    possible = theirs > -1e5  # they write -1e6 for what cannot be
    np.testing.assert_array_equal(np.isfinite(ours), possible)
    close(ours[possible], theirs[possible])


def test_what_is_inside(network):
    g = network.golden
    close(sinusoidal(jnp.asarray(g["sigma"]), 256), g["timestep_embedding"])
    inside = network.inside("timecond", g["xt"], g["sigma"])
    close(inside["time_embedding"]["__call__"][0], g["cond_vector"])
    close(inside["block_0"]["__call__"][0][0], g["block0_out"])
    length, width = g["rotary_cos"].shape
    unit = jnp.zeros((1, length, 1, width)).at[..., : width // 2].set(1)  # turned, it is (cos, sin)
    cos, sin = jnp.split(rotary(unit, jnp.arange(length))[0, :, 0], 2, axis=-1)
    close(jnp.concatenate([cos, cos], -1), g["rotary_cos"])
    close(jnp.concatenate([sin, sin], -1), g["rotary_sin"])


# --- losses -----------------------------------------------------------------------------------------------------


@each_mode
def test_losses(network, mode):
    g = golden("mdlm_loss.npz")
    x, z_t = (jnp.asarray(g[name], jnp.int32) for name in ("x0", "xt"))
    t = jnp.asarray(g["t"])
    logits = network.logits(mode, z_t, SCHEDULE.sigma(t))
    loss = Diffusion(network.process).loss_at(logits, x, z_t, t[:, None])
    close(loss.token_nats, g[f"token_loss_{mode}"])
    if mode == "timecond":
        close(loss.nats.sum() / loss.tokens.sum(), g["loss_timecond"])


# --- samplers ---------------------------------------------------------------------------------------------------


def draw(q, u):
    """argmax q / Exp: their `_sample_categorical` for given uniforms, in float32 as there."""
    return np.argmax(np.asarray(q) / (np.float32(1e-10) - np.log(u + np.float32(1e-10))), axis=-1)


def step(network, mode, sampler, z, t, s, u):
    """(p_x0, q_xs, z_s) of one step from t to s, float32 [B] each.

    Their q_xs, of what a mask becomes, sums to the probability of a mask, which their cached sampler takes to be t.
    """
    z = np.asarray(z)
    log_p = network.log_probs(mode, z, SCHEDULE.sigma(t))
    law = network.process.reverse_law(log_p, jnp.full(z.shape, network.mask_id), t[:, None], s[:, None])
    q_xs = jnp.exp(law) * (t if sampler == "cache" else SCHEDULE.mask_probability(t))[:, None, None]
    return jnp.exp(log_p), q_xs, np.where(z == network.mask_id, draw(q_xs, u), z)


@each_mode
@pytest.mark.parametrize("sampler", ["cache", "ddpm"])
def test_a_step(network, mode, sampler):
    g = golden("mdlm_sampler_step.npz")
    t = jnp.asarray(g["t"])
    p_x0, q_xs, z_s = step(network, mode, sampler, g["xt"], t, t - g["dt"], g["u"])
    if sampler == "cache":
        close(p_x0, g[f"cache_p_x0_{mode}"])
    close(q_xs, g[f"{sampler}_q_xs_{mode}"])
    np.testing.assert_array_equal(z_s, g[f"{sampler}_x_next_{mode}"])


@pytest.mark.parametrize("sampler", ["cache", "ddpm"])
def test_a_trajectory(network, sampler):
    """Six steps from all masks, and the most probable token where a mask is left."""
    g = golden("mdlm_sampler_traj.npz")
    name = {"cache": "ddpm_cache", "ddpm": "ddpm"}[sampler]
    steps, times = int(g["num_steps"]), g["timesteps"]
    np.testing.assert_allclose(times, np.linspace(1, float(g["eps"]), steps + 1), rtol=2e-7)
    dt = (1 - float(g["eps"])) / steps
    z = np.full(g[f"{name}_final"].shape, network.mask_id)
    for i in range(steps):
        t = jnp.full(1, times[i])
        _, _, z = step(network, "default", sampler, z, t, t - dt, g["u"][i])
        np.testing.assert_array_equal(z, g[f"{name}_traj"][i], err_msg=f"step {i}")
    sigma = SCHEDULE.sigma(jnp.full(1, times[steps]))
    final = np.argmax(network.log_probs("default", z, sigma), axis=-1)
    np.testing.assert_array_equal(final, g[f"{name}_final"])
    assert (final != network.mask_id).all()
