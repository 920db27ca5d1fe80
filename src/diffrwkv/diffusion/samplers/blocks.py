"""Block after block, each from the state of those before it: text of any length at a constant cost per block.

For models that were trained by block diffusion (BD3-LM, arXiv 2503.09573; the layout `Blocks`). A block is
filled by any sampler of the face "denoise", whose network sees the block and the state of the text before it. When it
is full, one more pass over the block takes the state past it. The state is exact: the logits are those of a pass over
the whole text. With recurrent mixers it has a constant size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffrwkv.checks import BLOCK, TOKEN
from diffrwkv.diffusion.processes import Process
from diffrwkv.diffusion.samplers.base import Samples, Wrapper
from diffrwkv.diffusion.samplers.common import blanks, join_traces, traces_of_blocks
from diffrwkv.diffusion.samplers.guidance import Guided


class BlockFns(NamedTuple):
    """The face "block": a network that reads a text block after block.

    Attributes:
      start: (batch, room) -> the state before the first position, with room for so many.
      denoise: (z_t int32 [B, b], t float32 [B], state, valid bool [B, b] or None) -> output float [B, b, V].
      context: (tokens int32 [B, b], state, valid) -> the state after them.
    """

    start: Callable[..., Any]
    denoise: Callable[..., Any]
    context: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class BlockCached(Wrapper):
    """Fills a canvas from left to right in blocks, with an exact cache.

        sampler = BlockCached(Ancestral(num_steps=16), block=16)
        samples = sampler(process, BlockFns(start, denoise, context), keys, canvas)

    `passes` are over one block each, those of the context among them: one for each block that has blanks behind it. The
    trace has those of all blocks one after another.

    Attributes:
      sampler: one of the face "denoise"; its options are about one block, `num_steps` too.
      block: positions in a block. The last block of a canvas may be shorter.
      stop_id: a token (EOS) that ends a sequence when it is generated behind all that is given, or None. The block that
        it is in is finished; blanks in later blocks stay masked.
    """

    face: ClassVar[str] = "block"
    needs: ClassVar[type] = Process

    block: int
    stop_id: int | None = None

    def __post_init__(self):
        BLOCK.check("block", self.block)
        if self.stop_id is not None:
            TOKEN.check("stop_id", self.stop_id)
        super().__post_init__()
        if isinstance(self.sampler, Guided):
            raise ValueError("Guidance masks what is given, which the state of a block-cached text cannot forget.")

    def next_block(self, process, network, state, keys, number, canvas, *, valid=None, return_trace=False):
        """Fills one block, and takes the state past it: for text without an end.

        Args:
          process: what noise is.
          network: `BlockFns`; its `start` is not called.
          state: of the text before this block.
          keys: key array [B], one per sequence.
          number: which block it is, int32; may be traced. A block's noise is its own.
          canvas: int32 [B, block].
          valid, return_trace: as of any sampler.

        Returns:
          (`Samples` of the block, whose passes lack that of the context; the state).
        """
        samples = self._fill_block(process, network, state, keys, number, canvas, valid, return_trace=return_trace)
        return samples, network.context(samples.tokens, state, valid)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        batch, length = canvas.shape
        number = -(-length // self.block)
        padding = ((0, 0), (0, number * self.block - length))
        if valid is None and padding[1][1]:
            valid = jnp.ones(canvas.shape, bool)
        whole = jnp.pad(canvas, padding)
        real = None if valid is None else jnp.pad(valid, padding)
        blank = blanks(whole, process.vocabulary.mask_id, real)
        positions = jnp.arange(whole.shape[1])
        last = jnp.max(jnp.where(blank, positions // self.block, -1), axis=1)  # [B], block
        ends = None
        if self.stop_id is not None:
            given = ~blank & (whole != self.stop_id) & (True if real is None else real)
            ends = blank & (positions > jnp.max(jnp.where(given, positions, -1), axis=1, keepdims=True))

        def part(x, n):
            return jax.lax.dynamic_slice_in_dim(x, n * self.block, self.block, 1)

        def some_left(carry):
            n, _, _, open_, *_ = carry
            return (open_ & (n <= last)).any()

        def step(carry):
            n, state, tokens, open_, passes, traces = carry
            here = part(tokens, n)
            seen = None if real is None else part(real, n)
            wanted = jnp.broadcast_to(open_[:, None], here.shape)  # finished sequences have no blank any more
            wanted = wanted if seen is None else wanted & seen

            def show(z):
                on_step(jax.lax.dynamic_update_slice_in_dim(tokens, z, n * self.block, 1)[:, :length])

            options = {"wanted": wanted, "return_trace": return_trace, "on_step": show if on_step else None}
            samples = self._fill_block(process, network, state, keys, n, here, seen, **options)
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, samples.tokens, n * self.block, 1)
            if return_trace:
                traces = jax.lax.dynamic_update_slice_in_dim(traces, samples.trace[None], n, 0)
            passes = passes + samples.passes + (open_ & (n < last)).astype(jnp.int32)
            if self.stop_id is not None:
                open_ = open_ & ~((samples.tokens == self.stop_id) & part(ends, n)).any(axis=1)
            more = (open_ & (n < last)).any()
            state = jax.lax.cond(more, lambda: network.context(samples.tokens, state, seen), lambda: state)
            return n + 1, state, tokens, open_, passes, traces

        state, traces = network.start(batch, number * self.block), None
        if return_trace:
            first = (process, network, state, keys, 0, part(whole, 0), None)
            one = jax.eval_shape(lambda: self._fill_block(*first, return_trace=True))
            traces = traces_of_blocks(whole, self.block, len(one.trace))
        carry = (jnp.int32(0), state, whole, jnp.ones(batch, bool), jnp.zeros(batch, jnp.int32), traces)
        _, _, tokens, _, passes, traces = jax.lax.while_loop(some_left, step, carry)
        trace = None if traces is None else join_traces(traces, canvas, tokens[:, :length])
        return Samples(tokens[:, :length], passes, trace)

    def _fill_block(self, process, network, state, keys, number, canvas, valid, *, wanted=None, **options):
        """`Samples` of one block; the network is told `valid`, the sampler fills the blanks that are `wanted`."""
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)

        def denoise(z, t):
            return network.denoise(z, t, state, valid)

        return self.sampler(process, denoise, own, canvas, valid=valid if wanted is None else wanted, **options)
