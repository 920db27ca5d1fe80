"""Euler's steps along a flow from noise to one-hot vectors (FLM, arXiv 2602.16813; david3684/flm, algo.py)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.checks import GRID
from diffrwkv.diffusion.noise import likeliest
from diffrwkv.diffusion.processes import Flow, Process
from diffrwkv.diffusion.samplers.base import Sampler, Samples
from diffrwkv.diffusion.samplers.common import blanks, canvas_keys


@dataclasses.dataclass(frozen=True)
class FlowEuler(Sampler):
    """z += (gamma_s - gamma_t) (p - z) / (1 - gamma_t), p the network's law at t < s; at the end argmax p.

    Chance enters in the noise at the start alone: as many samples as there are seeds, and no temperature. A given token
    is its one-hot vector at every step. While z flows, the sequence that is watched and traced is argmax z.

    Attributes:
      num_steps: of the grid of times from 0 to 1, evenly spaced, and network passes.
    """

    needs: ClassVar[type[Process]] = Flow

    num_steps: int = 128

    def __post_init__(self):
        GRID.check("num_steps", self.num_steps)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        vocabulary = process.vocabulary
        blank = blanks(canvas, vocabulary.mask_id, valid)
        given = vocabulary.one_hot(canvas)
        t = jnp.asarray(np.linspace(0, 1, self.num_steps + 1), jnp.float32)
        gamma = process.gamma(t)
        steps = jnp.where(blank.any(axis=1), self.num_steps, 0).astype(jnp.int32)

        def step(i, carry):
            z, tokens, trace = carry
            if on_step is not None:
                on_step(tokens)
            output = network(z, jnp.broadcast_to(t[i], len(canvas)))
            vocabulary.check_output(output, canvas.shape)
            p = jax.nn.softmax(vocabulary.without_mask(output), axis=-1)
            z = jnp.where(i == self.num_steps - 1, p, euler(z, p, gamma[i], gamma[i + 1]))
            z = jnp.where(blank[..., None], z, given)
            best = likeliest(vocabulary.without_mask(z))
            tokens = jnp.where(blank, best, canvas)
            return z, tokens, None if trace is None else trace.at[i + 1].set(tokens)

        noise = process.start(canvas_keys(keys, canvas.shape[1])[1])
        z = jnp.where(blank[..., None], noise, given)
        trace = jnp.tile(canvas, (self.num_steps + 1, 1, 1)) if return_trace else None
        _, tokens, trace = jax.lax.fori_loop(0, steps.max(), step, (z, canvas, trace))
        return Samples(tokens, steps, trace)


def euler(z, p, gamma, after):
    """z after a step from gamma to `after`, p being the law of the clean token: all float32 [..., V] or scalars."""
    return z + (after - gamma) * (p - z) / (1 - gamma + 1e-5)
