"""Several blocks at once: a block begins before the one in front of it is done (D2F, arXiv 2508.09192, section 4).

A window of active blocks moves over the text. All of them are predicted in one pass, each given the finished text and
what the active blocks before it show so far. A block is added when the last one shows a share `add_at` of its tokens.
While its predecessor shows less than `activate_at`, it keeps only predictions above `threshold`; after that also its
best one, so that it always moves. The first block that is finished is taken into the state, which is exact for it.

Approximate: tokens of a pass are predicted apart from each other, the order depends on what is predicted, and a block
is predicted behind masks, which only a model trained for it (D2F's distillation) has seen there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffrwkv.checks import BLOCK, POSITIVE_FRACTION, TOKEN
from diffrwkv.diffusion.samplers.base import Sampler, Samples
from diffrwkv.diffusion.samplers.common import (
    blanks,
    check_truncation,
    draw,
    fold_step,
    position_keys,
    probability_of,
    time_of,
    trace_of_reveals,
)


class WindowFns(NamedTuple):
    """The face "window": a network that reads a text block after block, and sees several that are not done.

    Attributes:
      start: (batch, room) -> the state before the first position, with room for so many.
      denoise: (z_t int32 [B, W b], t float32 [B, W], state, valid bool [B, W b]) -> output float [B, W b, V], that of
        each block given the state and the blocks of z_t before it.
      context: (tokens int32 [B, b], state, valid bool [B, b]) -> the state after them.
    """

    start: Callable[..., Any]
    denoise: Callable[..., Any]
    context: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Pipelined(Sampler):
    """D2F's pipelined decoding, for models of block diffusion; how it runs is told above.

    Each sequence has a window of its own, so that a sample does not depend on its batch. `passes` are over a window, or
    over a finished block. The trace has L + 1 entries, the sequence after each of its own passes over a window.

    Attributes:
      block: positions in a block. None: whoever calls must know them first, as of `stop_id`, and replace it.
      window: most blocks that are active at once. With 1, add_at and activate_at do nothing and are refused.
      add_at: share of its positions that the last block must show before another is added; in (0, 1].
      activate_at: share that its predecessor must show before a block always keeps its best prediction; in (0, 1].
      threshold: confidence, softmax(logits) at the candidate, above which a prediction is kept; in (0, 1].
      temperature, top_p, top_k: of the candidates; see `common.truncate`.
      stop_id: a token (EOS) behind which nothing is generated, or None, as of `BlockCached`.
    """

    face: ClassVar[str] = "window"

    block: int | None = None
    window: int = 4
    add_at: float = 0.1
    activate_at: float = 0.95
    threshold: float = 0.9
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop_id: int | None = None

    def __post_init__(self):
        if self.block is not None:
            BLOCK.check("block", self.block)
        BLOCK.check("window", self.window)
        for name in ("add_at", "activate_at", "threshold"):
            POSITIVE_FRACTION.check(name, getattr(self, name))
        for name in ("add_at", "activate_at"):
            if self.window == 1 and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} does nothing with window = 1, one block at a time: leave it out.")
        check_truncation(self.temperature, self.top_p, self.top_k)
        if self.stop_id is not None:
            TOKEN.check("stop_id", self.stop_id)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        if self.block is None:
            raise ValueError(
                "Pipelined needs the positions of a block: give it one, dataclasses.replace(.., block=16)."
            )
        schedule = process.schedule
        batch, length = canvas.shape
        b, N = self.block, -(-length // self.block)
        W = min(self.window, N)
        # W blocks of nothing behind the end, so that a window never leaves the array.
        padding = ((0, 0), (0, (N + W) * b - length))
        real = jnp.pad(jnp.ones(canvas.shape, bool) if valid is None else valid, padding)
        whole = jnp.pad(canvas, padding)
        blank = blanks(whole, process.mask_id, real)
        positions = jnp.arange((N + W) * b, dtype=jnp.int32)
        last = jnp.max(jnp.where(blank, positions // b, -1), axis=1)  # the last block with blanks
        given = ~blank & real & (whole != (-1 if self.stop_id is None else self.stop_id))
        behind = positions > jnp.max(jnp.where(given, positions, -1), axis=1, keepdims=True)
        rows = jnp.arange(batch)[:, None]

        def shown(revealed):
            """The share of its positions that each block shows, [B, N + W]; 1 for padding."""
            return (revealed != 0).reshape(batch, N + W, b).mean(axis=2)

        def ready(first, revealed):
            """Sequences whose first active block is done and that have blanks left."""
            done = jnp.take_along_axis(shown(revealed), first[:, None], axis=1)[:, 0] == 1
            return done & (first < last) & (revealed == 0).any(axis=1)

        def take(carry):
            """Takes finished blocks into the state, one after another."""

            def some_ready(carry):
                _, _, first, revealed, _ = carry
                return ready(first, revealed).any()

            def one(carry):
                tokens, state, first, revealed, passes = carry
                moving = ready(first, revealed)
                at = first[:, None] * b + jnp.arange(b)
                after = network.context(tokens[rows, at], state, real[rows, at])

                def pick(new, old):
                    return jnp.where(moving.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

                moved = moving.astype(jnp.int32)
                return tokens, jax.tree.map(pick, after, state), first + moved, revealed, passes + moved

            return jax.lax.while_loop(some_ready, one, carry)

        def some_left(carry):
            return (carry[3] == 0).any()

        def next_pass(carry):
            tokens, state, first, revealed, passes, step, added = carry
            left = revealed == 0
            share = shown(revealed)
            newest = jnp.take_along_axis(share, jnp.maximum(added - 1, 0)[:, None], axis=1)[:, 0]
            grows = (newest >= self.add_at) & (added <= last) & (added - first < W)
            added = jnp.maximum(added + grows.astype(jnp.int32), first + 1)

            blocks = first[:, None] + jnp.arange(W)  # [B, W]
            at = (blocks[:, :, None] * b + jnp.arange(b)).reshape(batch, W * b)
            active = jnp.repeat(blocks < added[:, None], b, axis=1)
            z, masked = tokens[rows, at], left[rows, at] & active
            if on_step is not None:
                on_step(tokens[:, :length])
            masks = schedule.mask_probability(jnp.ones(())) * (1 - share[rows, blocks])
            output = network.denoise(z, time_of(schedule, masks), state, real[rows, at] & active)
            process.vocabulary.check_output(output, z.shape)
            _, token_keys = position_keys(keys, at)
            flat = process.vocabulary.without_mask(output).reshape(batch * W * b, -1)
            drawn, _ = draw(fold_step(token_keys, step).reshape(-1), flat, self.temperature, self.top_p, self.top_k)
            confidence = probability_of(drawn, flat).reshape(batch, W, b)
            masked, drawn = masked.reshape(batch, W, b), drawn.reshape(batch, W * b)
            confidence = jnp.where(masked, confidence, -1.0)
            kept = masked & (confidence > self.threshold)
            before = share[rows, jnp.maximum(blocks - 1, 0)]
            sure = (before >= self.activate_at) | (blocks == first[:, None])
            best = jnp.arange(b) == jnp.argmax(confidence, axis=2)[:, :, None]
            kept |= masked & best & sure[:, :, None] & ~kept.any(axis=2, keepdims=True)
            kept = kept.reshape(batch, W * b)

            open_ = left.any(axis=1)
            passes = passes + open_.astype(jnp.int32)
            step = step + open_.astype(jnp.int32)
            tokens = tokens.at[rows, at].set(jnp.where(kept, drawn, z))
            revealed = revealed.at[rows, at].set(jnp.where(kept, step[:, None], revealed[rows, at]))
            if self.stop_id is not None:
                ends = (tokens == self.stop_id) & blank & behind & (revealed > 0)
                end = jnp.min(jnp.where(ends, positions // b, N + W), axis=1, keepdims=True)
                revealed = jnp.where((revealed == 0) & (positions // b > end), -1, revealed)
            tokens, state, first, revealed, passes = take((tokens, state, first, revealed, passes))
            return tokens, state, first, revealed, passes, step, added

        zeros = jnp.zeros(batch, jnp.int32)
        # 0 where a blank is masked, then the pass that revealed it; -1 where nothing is to be generated.
        revealed = jnp.where(blank, 0, -1)
        state = network.start(batch, (N + self.window) * b)
        start = take((whole, state, zeros, revealed, zeros))
        carry = jax.lax.while_loop(some_left, next_pass, (*start, zeros, start[2]))
        tokens, revealed, passes = carry[0][:, :length], carry[3][:, :length], carry[4]
        trace = trace_of_reveals(canvas, tokens, jnp.maximum(revealed, 0), length) if return_trace else None
        return Samples(tokens, passes, trace)
