"""Autoregressive sampling: one token after another, each from the model's state after those before it.

The yardstick for diffusion's samplers. The network runs once per token on that token alone; what came before is in its
state (a cache of keys and values, or a recurrent state), so a token costs the same wherever it stands.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffrwkv.diffusion.processes import NextToken
from diffrwkv.diffusion.samplers.base import Sampler, Samples
from diffrwkv.diffusion.samplers.common import blanks, check_truncation, draw, trace_of_reveals


class StepFns(NamedTuple):
    """The face "step": a network that reads a text one token after another.

    Attributes:
      start: (batch, room) -> the state before the first token, with room for so many.
      step: (tokens int32 [B, 1], state) -> (logits float [B, 1, V], the state after them).
    """

    start: Callable[..., Any]
    step: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Autoregressive(Sampler):
    """Draws token i from the logits at the token before it; the first from those at the mask id, which starts a text.

    A given token is kept, and seen by those after it only. `passes` counts the tokens up to a sequence's last blank:
    the network runs on each, by itself. The trace has an entry for each position.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_p, top_k: nucleus, in (0, 1], and how many tokens to keep, 0 for all; see `common.truncate`.
    """

    face: ClassVar[str] = "step"
    needs: ClassVar[type] = NextToken

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        check_truncation(self.temperature, self.top_p, self.top_k)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        batch, length = canvas.shape
        vocabulary = process.vocabulary
        blank = blanks(canvas, vocabulary.mask_id, valid)
        needed = jnp.max(jnp.where(blank, jnp.arange(1, length + 1, dtype=jnp.int32), 0), axis=1)  # [B]

        def some_left(carry):
            return carry[0] < needed.max()

        def step(carry):
            position, before, state, tokens = carry
            if on_step is not None:
                on_step(tokens)
            logits, state = network.step(before[:, None], state)
            vocabulary.check_output(logits, (batch, 1))
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
            drawn, _ = draw(own, vocabulary.without_mask(logits[:, 0]), self.temperature, self.top_p, self.top_k)
            token = jnp.where(blank[:, position], drawn, canvas[:, position])
            return position + 1, token, state, tokens.at[:, position].set(token)

        first = jnp.full(batch, vocabulary.mask_id, canvas.dtype)
        state = network.start(batch, length)
        *_, tokens = jax.lax.while_loop(some_left, step, (jnp.int32(0), first, state, canvas))
        trace = None
        if return_trace:
            revealed = jnp.where(blank, jnp.arange(1, length + 1, dtype=jnp.int32), 0)
            trace = trace_of_reveals(canvas, tokens, revealed, length)
        return Samples(tokens, needed, trace)
