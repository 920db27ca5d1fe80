"""Block after block, each from the state of those before it: text of any length at a constant cost per block.

For models that were trained by block diffusion (BD3-LM, arXiv 2503.09573; `objectives.BlockDiffusion`). A block is
filled by any of the diffusion samplers, whose network sees the block and the state of the text before it. When it is
full, one more pass over the block takes the state past it. The state is exact: the logits are those of a pass over the
whole text. With recurrent mixers it has a constant size.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffrwkv.checks import BLOCK, TOKEN
from diffrwkv.diffusion.samplers.common import (
    Samples,
    blanks,
    check_call,
    join_traces,
    traces_of_blocks,
)
from diffrwkv.diffusion.samplers.guidance import Guided


class BlockFns(NamedTuple):
    """What a network is to a sampler that goes block by block.

    Attributes:
      denoise: (z_t int32 [B, b], t float32 [B], state, valid bool [B, b] or None) -> logits float [B, b, V].
      context: (tokens int32 [B, b], state, valid) -> the state after them.
    """

    denoise: Any
    context: Any


@dataclasses.dataclass(frozen=True)
class BlockCached:
    """Fills a canvas from left to right in blocks, with an exact cache.

        sampler = BlockCached(Ancestral(num_steps=16), block=16)
        samples = sampler(BlockFns(denoise, context), state, keys, canvas, mask_id=mask_id)

    Attributes:
      sampler: one of `SAMPLERS` for diffusion models; its options are about one block, `num_steps` too.
      block: positions in a block. The last block of a canvas may be shorter.
      stop_id: a token (EOS) that ends a sequence when it is generated behind all that is given, or None. The block that
        it is in is finished; blanks in later blocks stay masked.
    """

    causal: ClassVar[bool] = False

    sampler: Any
    block: int
    stop_id: int | None = None

    def __post_init__(self):
        BLOCK.check("block", self.block)
        if self.stop_id is not None:
            TOKEN.check("stop_id", self.stop_id)
        if getattr(self.sampler, "causal", True):
            raise ValueError(f"Blocks are filled by a sampler of a diffusion model, not {type(self.sampler).__name__}.")
        if isinstance(self.sampler, Guided):
            raise ValueError("Guidance masks what is given, which the state of a block-cached text cannot forget.")

    def next_block(self, fns, state, keys, number, canvas, *, mask_id, valid=None, return_trace=False):
        """Fills one block, and takes the state past it: for text without an end.

        Args:
          fns: `BlockFns`.
          state: of the text before this block.
          keys: key array [B], one per sequence.
          number: which block it is, int32; may be traced. A block's noise is its own.
          canvas: int32 [B, block].
          mask_id, valid, return_trace: as for `Ancestral`.

        Returns:
          (`Samples` of the block, whose passes lack that of the context; the state).
        """
        samples = self._fill(fns, state, keys, number, canvas, mask_id, valid, return_trace)
        return samples, fns.context(samples.tokens, state, valid)

    def __call__(self, fns, state, keys, canvas, *, mask_id, valid=None, return_trace=False, on_step=None) -> Samples:
        """Fills in the masks of `canvas`.

        Args:
          fns: `BlockFns`.
          state: before the first position, with room for ceil(L / block) blocks.
          keys, canvas, mask_id, valid, return_trace: as for `Ancestral`.
          on_step: called with the sequence [B, L] before each network pass that fills blanks.

        Returns:
          `Samples`. `passes` are over one block each, those of the context among them: one for each block that has
          blanks behind it. The trace has those of all blocks one after another.
        """
        check_call(keys, canvas, mask_id, valid)
        batch, length = canvas.shape
        number = -(-length // self.block)
        padding = ((0, 0), (0, number * self.block - length))
        if valid is None and padding[1][1]:
            valid = jnp.ones(canvas.shape, bool)
        whole = jnp.pad(canvas, padding)
        real = None if valid is None else jnp.pad(valid, padding)
        blank = blanks(whole, mask_id, real)
        positions = jnp.arange(whole.shape[1])
        last = jnp.max(jnp.where(blank, positions // self.block, -1), axis=1)  # [B], block
        ends = None
        if self.stop_id is not None:
            given = ~blank & (whole != self.stop_id) & (True if real is None else real)
            ends = blank & (positions > jnp.max(jnp.where(given, positions, -1), axis=1, keepdims=True))

        def part(x, n):
            return jax.lax.dynamic_slice_in_dim(x, n * self.block, self.block, 1)

        def wanted(n, open_, real):
            """Where to generate: finished sequences have no blank any more."""
            valid = jnp.broadcast_to(open_[:, None], (batch, self.block))
            return valid if real is None else valid & part(real, n)

        def some_left(carry):
            n, _, _, open_, *_ = carry
            return (open_ & (n <= last)).any()

        def step(carry):
            n, state, tokens, open_, passes, traces = carry
            here = part(tokens, n)
            seen = None if real is None else part(real, n)

            def denoise(z, t, state, valid):
                if on_step is not None:
                    on_step(jax.lax.dynamic_update_slice_in_dim(tokens, z, n * self.block, 1)[:, :length])
                return fns.denoise(z, t, state, valid)

            watched = fns._replace(denoise=denoise)
            samples = self._fill(watched, state, keys, n, here, mask_id, seen, return_trace, wanted(n, open_, real))
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, samples.tokens, n * self.block, 1)
            if return_trace:
                traces = jax.lax.dynamic_update_slice_in_dim(traces, samples.trace[None], n, 0)
            passes = passes + samples.passes + (open_ & (n < last)).astype(jnp.int32)
            if self.stop_id is not None:
                open_ = open_ & ~((samples.tokens == self.stop_id) & part(ends, n)).any(axis=1)
            more = (open_ & (n < last)).any()
            state = jax.lax.cond(more, lambda: fns.context(samples.tokens, state, seen), lambda: state)
            return n + 1, state, tokens, open_, passes, traces

        traces = None
        if return_trace:
            one = jax.eval_shape(lambda: self._fill(fns, state, keys, 0, part(whole, 0), mask_id, None, True))
            traces = traces_of_blocks(whole, self.block, len(one.trace))
        carry = (jnp.int32(0), state, whole, jnp.ones(batch, bool), jnp.zeros(batch, jnp.int32), traces)
        _, _, tokens, _, passes, traces = jax.lax.while_loop(some_left, step, carry)
        trace = None if traces is None else join_traces(traces, canvas, tokens[:, :length])
        return Samples(tokens[:, :length], passes, trace)

    def _fill(self, fns, state, keys, number, canvas, mask_id, valid, return_trace, wanted=None):
        """`Samples` of one block; the network is told `valid`, the sampler fills the blanks that are `wanted`."""
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)

        def denoise(z, t):
            return fns.denoise(z, t, state, valid)

        wanted = valid if wanted is None else wanted
        return self.sampler(denoise, own, canvas, mask_id=mask_id, valid=wanted, return_trace=return_trace)
