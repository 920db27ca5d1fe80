"""Ancestral sampling: the reverse process of masked diffusion on a grid of times.

For a masked position the step from t to s < t is (MDLM, arXiv 2406.07524), with m = 1 - alpha,

    q(z_s = token) = p(token | z_t) (m_t - m_s) / m_t        q(z_s = mask) = m_s / m_t

and a position that shows a token keeps it. `posterior` is this definition, and the tests hold the
sampler to it.

What the loop does instead follows from two facts. *When* a position is revealed does not depend on
what is shown, so all those steps can be drawn before the network ever runs: a position is still
masked after step i with probability m(t_i) / m(t_0), and one uniform number per position says at
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
import numpy as np

from diffrwkv.checks import check_flag
from diffrwkv.diffusion.noise import uniform
from diffrwkv.diffusion.samplers.common import (
    Samples,
    blanks,
    canvas_keys,
    check_call,
    check_grid,
    check_logits,
    check_schedule,
    check_truncation,
    draw_due,
    trace_of_reveals,
)
from diffrwkv.diffusion.schedules import LogLinear, Schedule


def posterior(p_x0, masked_t, masked_s, mask_id):
    """q(z_s | z_t) for a masked position, unnormalised: its sum is masked_t.

    Args:
      p_x0: float [B, L, V], p(x | z_t), with probability 0 for the mask.
      masked_t: float [B], mask probability at t. MDLM's cached sampler takes t itself, its plain
        one (1 - eps) t; the normalised result is the same.
      masked_s: float [B], mask probability at s.
      mask_id: the mask's token.

    Returns:
      float [B, L, V].
    """
    shown = p_x0 * (masked_t - masked_s)[:, None, None]
    return shown.at[:, :, mask_id].set(masked_s[:, None])


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """MDLM's ancestral sampler, with prompts and infilling; how it runs is told above.

        sampler = Ancestral(num_steps=64)

        @jax.jit
        def generate(params, keys, canvas):
            return sampler(lambda z, t: model.apply(params, z, t), keys, canvas, mask_id=mask_id)

        canvas = jnp.full((4, 256), mask_id).at[:, :len(prompt)].set(prompt)
        samples = generate(params, sequence_keys(seed, 4), canvas)

    A sampler is hashable and holds no arrays, so it may also be a static argument. The call is one
    `lax.while_loop`: put it inside `jax.jit`, as above, or it compiles anew each time.

    Attributes:
      num_steps: steps T of the time grid 1 = t_0 > ... > t_T = eps, evenly spaced. What is still
        masked after them takes its most probable token ("noise removal"), in one more pass.
      cache: skip the passes of steps at which a sequence reveals nothing, for at most min(T + 1,
        blanks) passes. False runs the network at every step until nothing is masked, as the peers'
        plain sampler does. The samples are the same, token for token.
      temperature: divides the logits; 0 takes the most probable token.
      top_p, top_k: nucleus of p(x | z_t), in (0, 1], and how many tokens to keep, 0 for all; see `common.truncate`.
      eps: the last time.
      schedule: gives the mask probabilities; the one of the objective.
    """

    causal: ClassVar[bool] = False

    num_steps: int = 128
    cache: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eps: float = 1e-5
    schedule: Schedule = LogLinear()

    def __post_init__(self):
        check_grid(self.num_steps, self.eps)
        check_flag("cache", self.cache)
        check_truncation(self.temperature, self.top_p, self.top_k)
        check_schedule(self.schedule)

    def __call__(self, denoise_fn, keys, canvas, *, mask_id, valid=None, return_trace=False) -> Samples:
        """Fills in the masks of `canvas`.

        Args:
          denoise_fn: (z_t int32 [B, L], t float32 [B]) -> logits float [B, L, V], V > mask_id.
          keys: key array [B], one per sequence, from `sequence_keys`. A sequence's sample depends
            on its key, its canvas and its logits alone: not on the batch, and not on padding to its
            right.
          canvas: int32 [B, L]; mask_id where to generate, a token where one is given, at any
            positions. Given tokens never change. A canvas without masks comes back after 0 passes.
          mask_id: the mask's token, a Python int. It is never drawn.
          valid: bool [B, L] or None. Where False nothing is generated. `denoise_fn` must know of it
            by itself.
          return_trace: also return the sequence after every step.

        Returns:
          `Samples`.
        """
        check_call(keys, canvas, mask_id, valid)
        batch, length = canvas.shape
        times = jnp.asarray(np.linspace(1, self.eps, self.num_steps + 1), jnp.float32)
        blank = blanks(canvas, mask_id, valid)
        reveal_keys, token_keys = canvas_keys(keys, length)
        reveal_step = jnp.where(blank, self._reveal_steps(reveal_keys, times), 0)
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
            logits = denoise_fn(z, times[step - 1])
            check_logits(logits, z.shape, mask_id)
            due = left & (reveal_step == step[:, None])
            z, _ = draw_due(
                logits,
                token_keys,
                z,
                due,
                step > self.num_steps,
                mask_id,
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

    def _reveal_steps(self, keys, times):
        """The step, 1 to num_steps + 1, at which each position of keys [B, L] is revealed."""
        masked = self.schedule.mask_probability(times)
        still_masked = masked[1:] / masked[0]
        u = jax.vmap(uniform)(keys.reshape(-1)).reshape(keys.shape)
        steps_before = self.num_steps - jnp.searchsorted(still_masked[::-1], u, side="right")
        return steps_before.astype(jnp.int32) + 1
