"""Block after block with keys and values that are frozen meanwhile: Fast-dLLM's caches (arXiv 2505.22618, section 3.2).

For models of attention that were trained on whole sequences. When a block begins, one pass over the whole canvas gives
the keys and values of all positions; while the block is filled, those of the others stay what they were:

    prefix    of the positions before the block; a pass goes over the block and all behind it
    dual      of the positions before and behind it; a pass goes over the block alone

Approximate: above the first layer, keys and values of other positions depend on the block too. `BlockCached` is exact,
for models that were trained for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffrwkv.checks import BLOCK, check_choice
from diffrwkv.diffusion.samplers.base import Samples, Wrapper
from diffrwkv.diffusion.samplers.common import blanks, join_traces, time_of_share, traces_of_blocks
from diffrwkv.diffusion.samplers.guidance import Guided

CACHES = ("prefix", "dual")


class FrozenFns(NamedTuple):
    """The face "frozen": a network of attention whose keys and values can be kept.

    Attributes:
      refresh: (tokens int32 [B, L], t float32 [B], valid bool [B, L] or None) -> the keys and values of all positions.
      denoise: (tokens int32 [B, L], n int32, t float32 [B], the keys and values, valid) -> output float [B, b, V] of
        block n of the tokens.
    """

    refresh: Callable[..., Any]
    denoise: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class FrozenCache(Wrapper):
    """Fills a canvas from left to right in blocks, with an approximate cache; the caches are told above.

    The canvas is padded on the right to whole blocks, and the network is told so in `valid`. `passes` are those over a
    block and those over the canvas, one for each block with blanks. The trace has those of all blocks one after
    another.

    Attributes:
      sampler: one of the face "denoise", without guidance; its options are about one block, `num_steps` too.
      block: positions in a block.
      cache: "prefix" or "dual"; how the network is to be called, which `FrozenFns` do.
    """

    face: ClassVar[str] = "frozen"

    block: int = 32
    cache: str = "dual"

    def __post_init__(self):
        BLOCK.check("block", self.block)
        check_choice("cache", self.cache, CACHES)
        super().__post_init__()
        if isinstance(self.sampler, Guided):
            raise ValueError("A frozen cache needs a sampler without guidance, which masks what is cached, not Guided.")

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        length, added = canvas.shape[1], -canvas.shape[1] % self.block
        if added:
            valid = jnp.ones(canvas.shape, bool) if valid is None else valid
            canvas, valid = (jnp.pad(x, ((0, 0), (0, added))) for x in (canvas, valid))
        batch, mask_id = len(canvas), process.mask_id
        blank = blanks(canvas, mask_id, valid)
        blocks = blank.reshape(batch, -1, self.block).any(axis=2)  # [B, N]
        passes = blocks.sum(axis=1, dtype=jnp.int32)

        def time(tokens):
            """Of the whole canvas: that of the sampler is of its block."""
            return time_of_share(process.schedule, blank & (tokens == mask_id), blank)

        def part(x, n):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, n * self.block, self.block, 1)

        def fill_block(n, tokens):
            frozen = network.refresh(tokens, time(tokens), valid)

            def whole(z):
                return jax.lax.dynamic_update_slice_in_dim(tokens, z, n * self.block, 1)

            def denoise(z, _):
                now = whole(z)
                return network.denoise(now, n, time(now), frozen, valid)

            def show(z):
                on_step(whole(z)[:, :length])

            own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            options = {"valid": part(valid, n), "return_trace": return_trace, "on_step": show if on_step else None}
            return self.sampler(process, denoise, own, part(tokens, n), **options)

        def step(n, carry):
            def fill(tokens, passes, traces):
                samples = fill_block(n, tokens)
                tokens = jax.lax.dynamic_update_slice_in_dim(tokens, samples.tokens, n * self.block, 1)
                if return_trace:
                    traces = jax.lax.dynamic_update_slice_in_dim(traces, samples.trace[None], n, 0)
                return tokens, passes + samples.passes, traces

            return jax.lax.cond(blocks[:, n].any(), fill, lambda *kept: kept, *carry)

        traces = None
        if return_trace:
            one = jax.eval_shape(lambda: fill_block(jnp.int32(0), canvas))
            traces = traces_of_blocks(canvas, self.block, len(one.trace))
        tokens, passes, traces = jax.lax.fori_loop(0, blocks.shape[1], step, (canvas, passes, traces))
        trace = join_traces(traces, canvas, tokens)[:, :, :length] if return_trace else None
        return Samples(tokens[:, :length], passes, trace)
