"""Block after block with keys and values that are frozen meanwhile: Fast-dLLM's caches (arXiv 2505.22618, section 3.2).

For models of attention that were trained on whole sequences. When a block begins, one pass over the whole canvas gives
the keys and values of all positions; while the block is filled, those of the others stay what they were:

    prefix    of the positions before the block; a pass goes over the block and all behind it
    dual      of the positions before and behind it; a pass goes over the block alone

Approximate: above the first layer, keys and values of other positions depend on the block too. `BlockCached` is exact,
for models that were trained for it.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffrwkv.checks import BLOCK, check_choice
from diffrwkv.diffusion.samplers.common import (
    Samples,
    blanks,
    check_call,
    join_traces,
    time_of_share,
    traces_of_blocks,
)
from diffrwkv.diffusion.samplers.guidance import Guided

CACHES = ("prefix", "dual")


class FrozenFns(NamedTuple):
    """What a network is to a sampler with a frozen cache.

    Attributes:
      refresh: (tokens int32 [B, L], t float32 [B], valid bool [B, L] or None) -> the keys and values of all positions.
      denoise: (tokens int32 [B, L], n int32, t float32 [B], the keys and values, valid) -> logits float [B, b, V] of
        block n of the tokens.
    """

    refresh: Any
    denoise: Any


@dataclasses.dataclass(frozen=True)
class FrozenCache:
    """Fills a canvas from left to right in blocks, with an approximate cache; the caches are told above.

    Attributes:
      sampler: one of `SAMPLERS` for diffusion models; its options are about one block, `num_steps` too.
      block: positions in a block; must divide the canvas (the caller pads it).
      cache: "prefix" or "dual"; how the network is to be called, which `FrozenFns` do.
    """

    causal: ClassVar[bool] = False

    sampler: Any
    block: int = 32
    cache: str = "dual"

    def __post_init__(self):
        BLOCK.check("block", self.block)
        check_choice("cache", self.cache, CACHES)
        if getattr(self.sampler, "causal", True) or isinstance(self.sampler, Guided):
            name = type(self.sampler).__name__
            raise ValueError(f"A frozen cache needs a sampler of a diffusion model without guidance, not {name}.")

    def __call__(self, fns, keys, canvas, *, mask_id, valid=None, return_trace=False, on_step=None) -> Samples:
        """Fills in the masks of `canvas`.

        Args:
          fns: `FrozenFns`.
          keys, canvas, mask_id, valid, return_trace: as for `Ancestral`.
          on_step: called with the sequence [B, L] before each pass over a block.

        Returns:
          `Samples`, whose passes are those over a block and those over the canvas, one for each block with blanks. The
          trace has those of all blocks one after another.
        """
        check_call(keys, canvas, mask_id, valid)
        batch, length = canvas.shape
        if length % self.block:
            raise ValueError(f"Blocks of {self.block} do not divide the {length} positions of the canvas: pad it.")
        blank = blanks(canvas, mask_id, valid)
        blocks = blank.reshape(batch, -1, self.block).any(axis=2)  # [B, N]
        passes = blocks.sum(axis=1, dtype=jnp.int32)

        def time(tokens):
            """Of the whole canvas: that of the sampler is of its block."""
            return time_of_share(self.sampler.schedule, blank & (tokens == mask_id), blank)

        def part(x, n):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, n * self.block, self.block, 1)

        def fill_block(n, tokens):
            frozen = fns.refresh(tokens, time(tokens), valid)

            def denoise(z, _):
                now = jax.lax.dynamic_update_slice_in_dim(tokens, z, n * self.block, 1)
                if on_step is not None:
                    on_step(now)
                return fns.denoise(now, n, time(now), frozen, valid)

            own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            options = {"mask_id": mask_id, "valid": part(valid, n), "return_trace": return_trace}
            return self.sampler(denoise, own, part(tokens, n), **options)

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
        tokens, passes, traces = jax.lax.fori_loop(0, length // self.block, step, (canvas, passes, traces))
        return Samples(tokens, passes, join_traces(traces, canvas, tokens) if return_trace else None)
