"""The loop of the samplers that move every position at every step of a grid of times."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.array_types import Array, Keys, Logits, TokenKeys, Tokens, TokenTimes, Valid
from diffrwkv.diffusion.noise import NO_TOKEN
from diffrwkv.diffusion.processes import Reversible
from diffrwkv.diffusion.samplers.base import Samples
from diffrwkv.diffusion.samplers.common import blanks, canvas_keys, fold_step


def even_times(num_steps: int, eps: float) -> Array:
    """float32 [num_steps + 1], evenly spaced from 1 to eps."""
    return jnp.asarray(np.linspace(1, eps, num_steps + 1), jnp.float32)


def walk(
    process: Reversible,
    denoise: Callable[[Tokens, Array], Logits],
    keys: Keys,
    canvas: Tokens,
    valid: Valid | None,
    times: Array,
    step: Callable[[Array, Logits, Tokens, TokenTimes, TokenTimes, TokenKeys], Tokens],
    last: Callable[[Logits, Tokens, TokenTimes, TokenKeys], Tokens],
    return_trace: bool,
) -> Samples:
    """Fills the blanks of a canvas along a grid of times, in T + 1 passes.

    Args:
      process, keys, canvas, valid, return_trace: as of `base.Sampler`.
      denoise: the face of the network.
      times: float32 [T + 1], never rising.
      step: (i, output [B, L, V], z [B, L], t [B, 1], s [B, 1], keys [B, L]) -> z at s = times[i + 1], t = times[i].
      last: (output, z, t, keys) -> clean tokens, from z at times[T].

    Returns:
      `Samples`; the last step and the pass after it are one entry of the trace.
    """
    batch, length = canvas.shape
    steps = len(times) - 1
    blank = blanks(canvas, process.vocabulary.mask_id, valid)
    _, token_keys = canvas_keys(keys, length)

    def some_left(carry):
        return carry[0] <= steps

    def next_step(carry):
        i, z, trace = carry
        t, s = (jnp.broadcast_to(times[jnp.minimum(j, steps)], (batch, 1)) for j in (i, i + 1))
        output = denoise(z, t[:, 0])
        process.vocabulary.check_output(output, z.shape)
        own = fold_step(token_keys, jnp.broadcast_to(i, (batch,)))
        moved = jax.lax.cond(
            i < steps, lambda: step(i, output, z, t, s, own), lambda: last(output, z, t, own).astype(z.dtype)
        )
        z = jnp.where(blank & (z != NO_TOKEN), moved, z)
        if return_trace:
            trace = trace.at[jnp.minimum(i + 1, steps)].set(z)
        return i + 1, z, trace

    z = process.start(keys, canvas, blank)
    trace = jnp.repeat(canvas[None], steps + 1, axis=0) if return_trace else None
    first = jnp.where(blank.any(), 0, steps + 1).astype(jnp.int32)
    _, tokens, trace = jax.lax.while_loop(some_left, next_step, (first, z, trace))
    passes = jnp.where(blank.any(axis=1), steps + 1, 0).astype(jnp.int32)
    return Samples(tokens, passes, trace)
