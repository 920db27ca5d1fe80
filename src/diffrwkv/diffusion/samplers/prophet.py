"""Prophet: stop denoising when the answer is settled (arXiv 2508.19982, section 4).

An answer is often decided long before the last blank of the text around it is filled. So every pass looks at the gap
between the two largest logits over the answer's positions, and when its mean is wide enough all blanks take their most
probable token at once. Early in the text the gap must be wider. Approximate, like the confidence sampler that it ends.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffrwkv.checks import COUNT, POSITIVE, as_tuple
from diffrwkv.diffusion.samplers.base import watched
from diffrwkv.diffusion.samplers.common import blanks
from diffrwkv.diffusion.samplers.confidence import fill
from diffrwkv.diffusion.samplers.early_exit import EarlyExit, last_blanks


@dataclasses.dataclass(frozen=True)
class Prophet(EarlyExit):
    """`Confidence` with the rule "steps", until the answer is settled.

    The gap is averaged over those of the answer's blanks that are still masked: at a position that shows a token the
    logits of a masked diffusion model mean nothing, and the token is decided. So an answer without a mask left is
    settled too.

    Attributes:
      answer_length: the last so many blanks of a sequence are its answer; None: all blanks.
      gaps: mean gap of the logits to stop at, in the first, second and last third of the planned passes.
      num_steps, block, score, temperature, top_p, top_k: as of `Confidence`.
    """

    answer_length: int | None = None
    gaps: tuple[float, float, float] = (7.5, 5.0, 2.5)

    def __post_init__(self):
        if self.answer_length is not None:
            COUNT.check("answer_length", self.answer_length)
        object.__setattr__(self, "gaps", as_tuple("gaps", self.gaps))  # a config has lists
        if len(self.gaps) != 3:
            raise ValueError(f"gaps must be three numbers above 0, got {self.gaps}.")
        for gap in self.gaps:
            POSITIVE.check("each of gaps", gap)
        super().__post_init__()

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        answer = last_blanks(blanks(canvas, process.mask_id, valid), self.answer_length)

        def settled(logits, left, passes, planned):
            largest, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
            open_ = answer & left
            number = jnp.maximum(open_.sum(axis=1, dtype=jnp.float32), 1.0)
            gap = jnp.where(open_, largest - second, 0.0).sum(axis=1) / number
            early, middle, late = self.gaps
            needed = jnp.where(3 * passes < planned, early, jnp.where(3 * passes < 2 * planned, middle, late))
            return (gap >= needed) | ~open_.any(axis=1)

        call = (process, watched(network, on_step), keys, canvas, valid, return_trace)
        return fill(self.steps(), *call, leave=settled)
