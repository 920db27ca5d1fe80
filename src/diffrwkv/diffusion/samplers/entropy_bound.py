"""Entropy-bounded sampling: a step keeps the predictions that are all but independent, and noises the rest anew.

Positions are taken by rising entropy of p(x_i | z_t) while the entropies of those before sum to no more than a bound.
Drawing them apart from each other then costs at most about that many nats: what several tokens know of each other is no
more than the sum of their entropies without the largest. So an easy text takes few steps (the entropy-bounded rule of
DiffusionGemma, google-deepmind/gemma, gemma/diffusion/_sampler.py and _early_stopping.py; for masks Ben-Hamu et al.,
arXiv 2505.24857). The others are drawn from the law of z at the next time, of x ~ p(x | z_t): DiffusionGemma noises
them wholly.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffrwkv.array_types import PerToken, Positions
from diffrwkv.checks import AT_LEAST_0
from diffrwkv.diffusion.noise import draw_law, likeliest
from diffrwkv.diffusion.processes import Reversible
from diffrwkv.diffusion.samplers.base import Sampler, Samples, watched
from diffrwkv.diffusion.samplers.common import (
    blanks,
    canvas_keys,
    check_grid,
    check_truncation,
    entropies,
    fold_step,
    truncated_law,
)
from diffrwkv.diffusion.samplers.grid import even_times


def within_bound(entropy: PerToken, among: Positions, bound: float) -> Positions:
    """bool [B, L]: positions by rising entropy while those before sum to at most the bound; at least one `among`.

    Args:
      entropy: float32 [B, L].
      among: bool [B, L].
      bound: a Python float.
    """
    order = jnp.argsort(jnp.where(among, entropy, jnp.inf), axis=-1)
    rising = jnp.take_along_axis(jnp.where(among, entropy, 0.0), order, axis=-1)
    before = jnp.cumsum(rising, axis=-1) - rising
    taken = jnp.take_along_axis(before <= bound, jnp.argsort(order, axis=-1), axis=-1)
    return taken & among


@dataclasses.dataclass(frozen=True)
class EntropyBound(Sampler):
    """At most num_steps + 1 passes; a sequence that is sure of its text is done before.

    Attributes:
      num_steps: steps T of the time grid 1 = t_0 > ... > t_T = eps, evenly spaced. What may still be noise after them
        takes its most probable token, in one more pass.
      bound: nats; 0 keeps one position a step (and all that are certain).
      stop: a sequence is done, with the most probable tokens, when they are those of the pass before and their mean
        entropy in nats is at most this. (DiffusionGemma compares them with the canvas, where a mask is never one.)
        Where noise is a mask it is also done, as ever, when no mask is left.
      temperature, top_p, top_k: of the drawn tokens, see `common.truncate`; entropies are those without.
      eps: the last time.
    """

    needs: ClassVar[type] = Reversible

    num_steps: int = 128
    bound: float = 0.1
    stop: float = 0.005
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eps: float = 1e-5

    def __post_init__(self):
        check_grid(self.num_steps, self.eps)
        AT_LEAST_0.check("bound", self.bound)
        AT_LEAST_0.check("stop", self.stop)
        check_truncation(self.temperature, self.top_p, self.top_k)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        denoise, steps = watched(network, on_step), self.num_steps
        batch, length = canvas.shape
        times = even_times(steps, self.eps)
        blank = blanks(canvas, process.vocabulary.mask_id, valid)
        noise_or_token, which = canvas_keys(keys, length)

        def some_left(carry):
            return carry[2].any()

        def next_step(carry):
            i, z, left, passes, trace, before = carry
            t, s = (jnp.broadcast_to(times[jnp.minimum(j, steps)], (batch, 1)) for j in (i, i + 1))
            output = denoise(z, t[:, 0])
            process.vocabulary.check_output(output, z.shape)
            log_p = process.predict(output, z, t)
            best = likeliest(log_p)
            entropy = jnp.where(blank, entropies(log_p), 0.0)
            mean = entropy.sum(axis=1) / jnp.maximum(blank.sum(axis=1), 1).astype(jnp.float32)
            sure = (mean <= self.stop) & ((best == before) | ~blank).all(axis=1)

            def move():
                law = truncated_law(log_p, self.temperature, self.top_p, self.top_k)
                token_keys, again_keys = (fold_step(k, jnp.broadcast_to(i, (batch,))) for k in (which, noise_or_token))
                drawn = draw_law(token_keys, law)
                again = draw_law(again_keys, process.forward_law(law, s))
                return jnp.where(within_bound(entropy, blank, self.bound), drawn, again)

            def remove_noise():
                return jnp.where(process.noised(z), best, z)

            moved = jnp.where(sure[:, None], best, jax.lax.cond(i < steps, move, remove_noise))
            z = jnp.where(blank & left[:, None], moved, z)
            passes += left.astype(jnp.int32)
            left &= ~sure & (i < steps) & (process.noised(z) & blank).any(axis=1)
            if return_trace:
                # The last step and the noise removal after it are one entry.
                trace = trace.at[jnp.minimum(i + 1, steps)].set(z)
            return i + 1, z, left, passes, trace, best

        z = process.start(keys, canvas, blank)
        trace = jnp.repeat(canvas[None], steps + 1, axis=0) if return_trace else None
        zeros = jnp.zeros((batch,), jnp.int32)
        start = jnp.int32(0), z, blank.any(axis=1), zeros, trace, jnp.full_like(canvas, -1)
        _, tokens, _, passes, trace, _ = jax.lax.while_loop(some_left, next_step, start)
        if trace is not None:
            after = jnp.arange(steps + 1)[:, None, None] >= jnp.maximum(passes, 1)[None, :, None]
            trace = jnp.where(after, tokens, trace)
        return Samples(tokens, passes, trace)
