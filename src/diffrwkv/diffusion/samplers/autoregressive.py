"""Autoregressive sampling: one token after another, each from the model's state after those before it.

The yardstick for diffusion's samplers. The network runs once per token on that token alone; what came before is in its
state (a cache of keys and values, or a recurrent state), so a token costs the same wherever it stands.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffrwkv.diffusion.samplers.common import (
    Samples,
    check_call,
    check_logits,
    check_truncation,
    draw,
    trace_of_reveals,
    without_mask,
)


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Draws token i from the logits at the token before it; the first from those at the mask id, which starts a text.

    The call is one `lax.while_loop` over positions: put it inside `jax.jit`.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_p, top_k: nucleus, in (0, 1], and how many tokens to keep, 0 for all; see `common.truncate`.
    """

    causal: ClassVar[bool] = True

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        check_truncation(self.temperature, self.top_p, self.top_k)

    def __call__(self, step_fn, state, keys, canvas, *, mask_id, return_trace=False, on_step=None) -> Samples:
        """Fills in the masks of `canvas` from left to right.

        Args:
          step_fn: (tokens int32 [B, 1], state) -> (logits float [B, 1, V], state).
          state: before the first token, with room for L of them.
          keys: key array [B], one per sequence, from `sequence_keys`.
          canvas: int32 [B, L]; mask_id where to generate. A given token is kept, and seen by those after it only.
          mask_id: the mask's token, a Python int. It is never drawn.
          return_trace: also return the sequence after every position.
          on_step: called with the sequence [B, L] before each position.

        Returns:
          `Samples`. `passes` counts the tokens up to a sequence's last blank: the network runs on each, by itself.
        """
        check_call(keys, canvas, mask_id, None)
        batch, length = canvas.shape
        blank = canvas == mask_id
        needed = jnp.max(jnp.where(blank, jnp.arange(1, length + 1, dtype=jnp.int32), 0), axis=1)  # [B]

        def some_left(carry):
            return carry[0] < needed.max()

        def step(carry):
            position, before, state, tokens = carry
            if on_step is not None:
                on_step(tokens)
            logits, state = step_fn(before[:, None], state)
            check_logits(logits, (batch, 1), mask_id)
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
            drawn, _ = draw(own, without_mask(logits[:, 0], mask_id), self.temperature, self.top_p, self.top_k)
            token = jnp.where(blank[:, position], drawn, canvas[:, position])
            return position + 1, token, state, tokens.at[:, position].set(token)

        start = jnp.full(batch, mask_id, canvas.dtype)
        *_, tokens = jax.lax.while_loop(some_left, step, (jnp.int32(0), start, state, canvas))
        trace = None
        if return_trace:
            revealed = jnp.where(blank, jnp.arange(1, length + 1, dtype=jnp.int32), 0)
            trace = trace_of_reveals(canvas, tokens, revealed, length)
        return Samples(tokens, needed, trace)
