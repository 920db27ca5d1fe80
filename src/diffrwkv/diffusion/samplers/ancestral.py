"""Ancestral sampling: the reverse process on a grid of times.

A step from t to s < t draws each position of z_s from `Process.reverse_law` (D3PM, arXiv 2107.03006, section 3.1; MDLM,
arXiv 2406.07524, section 3.2.2): the network predicts the clean text from z_t, and every position moves apart from the
others, so it is exact for one position, and for all of them as the steps grow in number.

Masked diffusion is sampled so in fewer passes. A masked position takes a token of p(x | z_t) with probability
(m_t - m_s) / m_t, m = 1 - alpha, else it stays; and a position that shows a token keeps it. Two facts follow. *When* a
position is revealed does not depend on what is shown, so all those steps can be drawn before the network ever runs: a
position is still masked after step i with probability m(t_i) / m(t_0), and one uniform number per position says at
which step that ends. And a position is revealed once, so it needs noise for one draw only. Hence
  - a step at which a sequence reveals nothing needs no network pass. MDLM's cache saves such passes
    when its network does not look at t; here the pass that remains is at the very t of its step, so
    a network that looks at t is served exactly too;
  - each sequence of a batch can jump to its own next eventful step, so that a batch costs the
    passes of its busiest sequence rather than the union of all steps at which any sequence changes;
  - nothing of size [B, L, V] lives from one pass to the next, and noise, temperature and top-p
    touch the few positions that are revealed.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffrwkv.checks import check_flag
from diffrwkv.diffusion.deferred import deferring
from diffrwkv.diffusion.noise import likeliest, uniform
from diffrwkv.diffusion.processes import Masked, Reversible
from diffrwkv.diffusion.samplers.base import Sampler, Samples, watched
from diffrwkv.diffusion.samplers.common import (
    blanks,
    canvas_keys,
    check_grid,
    check_truncation,
    draw_due,
    trace_of_reveals,
    truncated_law,
)
from diffrwkv.diffusion.samplers.grid import even_times, walk


@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
    """The reverse process, step by step, with prompts and infilling; how it runs is told above.

    A canvas with blanks takes at most num_steps + 1 passes, and num_steps + 1 where noise is no mask: then every
    position moves at every step.

    Attributes:
      num_steps: steps T of the time grid 1 = t_0 > ... > t_T = eps, evenly spaced. What may still be noise after them
        takes its most probable token ("noise removal"), in one more pass.
      cache: skip the passes of steps at which a sequence reveals nothing, for at most min(T + 1, blanks) passes. False
        runs the network at every step until nothing is masked, as the peers' plain sampler does. The samples are the
        same, token for token. It is about masks: with other noise every step has its pass.
      temperature: divides the logits; 0 takes the most probable token.
      top_p, top_k: nucleus of p(x | z_t), in (0, 1], and how many tokens to keep, 0 for all; see `common.truncate`.
      eps: the last time.
    """

    needs: ClassVar[type] = Reversible

    num_steps: int = 128
    cache: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eps: float = 1e-5

    def __post_init__(self):
        check_grid(self.num_steps, self.eps)
        check_flag("cache", self.cache)
        check_truncation(self.temperature, self.top_p, self.top_k)

    def times(self):
        """float32 [T + 1], the grid."""
        return even_times(self.num_steps, self.eps)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        fill = self._reveal if isinstance(process, Masked) else self._walk
        return fill(process, watched(network, on_step), keys, canvas, valid, return_trace)

    # --- masks: from one eventful step to the next ------------------------------------------------

    def _reveal(self, process, denoise, keys, canvas, valid, return_trace):
        batch, length = canvas.shape
        times = self.times()
        blank = blanks(canvas, process.mask_id, valid)
        reveal_keys, token_keys = canvas_keys(keys, length)
        reveal_step = jnp.where(blank, self._reveal_steps(process.schedule, reveal_keys), 0)
        # A draw costs a random number for each token of the vocabulary, and few positions are due in a step.
        width = 4 + 2 * -(-length // self.num_steps)

        def some_left(carry):
            return carry[2].any()

        def next_step(carry):
            step, z, left, passes = carry
            if self.cache:
                step = jnp.where(left, reveal_step, self.num_steps + 1).min(axis=1)
            else:
                step = step + 1
            output = deferring(denoise)(z, times[step - 1])
            process.vocabulary.check_output(output, z.shape)
            due = left & (reveal_step == step[:, None])
            z, _ = draw_due(
                process.vocabulary,
                output,
                token_keys,
                z,
                due,
                step > self.num_steps,
                width=width,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
            )
            return step, z, left & ~due, passes + left.any(axis=1).astype(jnp.int32)

        zeros = jnp.zeros((batch,), jnp.int32)
        _, tokens, _, passes = jax.lax.while_loop(some_left, next_step, (zeros, canvas, blank, zeros))
        trace = None
        if return_trace:
            # The last step and the noise removal after it are one entry.
            revealed = jnp.minimum(reveal_step, self.num_steps)
            trace = trace_of_reveals(canvas, tokens, revealed, self.num_steps)
        return Samples(tokens, passes, trace)

    def _reveal_steps(self, schedule, keys):
        """The step, 1 to num_steps + 1, at which each position of keys [B, L] is revealed."""
        masked = schedule.mask_probability(self.times())
        still_masked = masked[1:] / masked[0]
        u = jax.vmap(uniform)(keys.reshape(-1)).reshape(keys.shape)
        steps_before = self.num_steps - jnp.searchsorted(still_masked[::-1], u, side="right")
        return steps_before.astype(jnp.int32) + 1

    # --- any noise: every step ----------------------------------------------------------------------

    def _walk(self, process, denoise, keys, canvas, valid, return_trace):
        def step(i, output, z, t, s, keys):
            law = truncated_law(process.predict(output, z, t), self.temperature, self.top_p, self.top_k)
            return process.reverse(keys, z, law, t, s)

        def last(output, z, t, keys):
            return jnp.where(process.noised(z), likeliest(process.predict(output, z, t)), z)

        return walk(process, denoise, keys, canvas, valid, self.times(), step, last, return_trace)
