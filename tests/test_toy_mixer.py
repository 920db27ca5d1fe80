"""A mixer from outside the package, one class and one entry, in every check of test_mixers and in the denoiser."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.blocks import before_blocks
from diffrwkv.denoiser import Denoiser
from diffrwkv.layers import Projection, torch_uniform
from diffrwkv.mixers import MIXERS, Place
from tests import test_block_diffusion, test_mixers, tiny


class RunningMean(nn.Module):
    """A matrix times the mean of all positions so far."""

    causal: ClassVar[bool] = True
    zero_output: ClassVar[bool] = False

    place: Place
    scale: float = 1.0

    @nn.compact
    def __call__(self, x, shared=None, *, valid=None, state=None, context=None, keep_state=True):
        B, L, D = x.shape
        state = self.empty_state(B, L) if state is None else state
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        sums = state["sum"][:, None] + jnp.cumsum(x.astype(jnp.float32), axis=1)
        counts = state["count"][:, None] + jnp.arange(1, L + 1)
        mean = self.scale * sums / counts[..., None]
        y = Projection(D, torch_uniform(D), ("heads", "embed"), self.place.dtype, name="output")(mean)
        real = L if valid is None else valid.sum(axis=1, dtype=jnp.int32)
        after = {"sum": sums[:, -1], "count": state["count"] + real}
        if not keep_state:
            return y, shared, None
        if context is None:
            return y, shared, after
        starts = state["count"][:, None] + context.block * jnp.arange(context.blocks(L))
        return y, shared, ({"sum": before_blocks(sums, state["sum"], context), "count": starts.reshape(-1)}, after)

    def empty_state(self, batch, room):
        return {"sum": jnp.zeros((batch, self.place.dim)), "count": jnp.zeros(batch, jnp.int32)}

    def flops(self, length):
        return 2.0 * self.place.dim


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MIXERS, "running_mean", RunningMean)
    monkeypatch.setitem(tiny.MIXERS, "running_mean", {"scale": 2.0})


def test_a_mixer_from_outside_passes_what_every_mixer_does():
    mixer = test_mixers.prepared("running_mean", tiny.fast("running_mean"))
    for check in test_mixers.CHECKS:
        check(mixer)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_denoiser_takes_a_mixer_from_outside(scan_layers):
    """Beside another one, token by token as at once."""
    model, params = test_block_diffusion.build(
        "running_mean,rwkv7",
        4,
        mixers=tiny.MIXERS,
        scan_layers=scan_layers,
        remat=True,
        channel_mixers={"rwkv7": {"shift": "previous"}},
    )
    assert model.causal
    z, _ = test_block_diffusion.texts()
    step = jax.jit(lambda z, state: model.apply({"params": params}, z, state=state, method="with_state"))
    state, logits = model.empty_state(2, z.shape[1]), []
    for token in z.T:
        part, state = step(token[:, None], state)
        logits.append(part)
    whole = jax.jit(lambda z: model.apply({"params": params}, z))(z)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, atol=1e-5)


def test_blocks_behind_a_mixer_from_outside():
    """All at once is one after another."""
    model, params = test_block_diffusion.build("running_mean", mixers=tiny.MIXERS)
    x, z = test_block_diffusion.texts()
    t = jnp.zeros((2, 3))
    at_once = test_block_diffusion.in_blocks(model, params, block=4)(z, x, t)
    one_by_one = test_block_diffusion.one_after_another(model, params, z, x, t, 4, True)
    np.testing.assert_allclose(at_once, one_by_one, atol=1e-5)


def test_without_an_entry_it_is_no_choice(monkeypatch):
    monkeypatch.delitem(MIXERS, "running_mean")
    with pytest.raises(ValueError, match="unknown mixer 'running_mean'"):
        Denoiser(9, pattern="running_mean")
