"""Classifier-free guidance towards what is given, without a second network (LLaDA, arXiv 2502.09992, appendix)."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp

from diffrwkv.checks import AT_LEAST_0
from diffrwkv.diffusion.samplers.common import Samples, blanks, check_call, check_logits


def guide(denoise_fn, given, mask_id, scale):
    """A denoiser whose logits are u + (scale + 1) (c - u): c those of z_t, u those of z_t with `given` masked.

    Args:
      denoise_fn: (z_t int32 [B, L], t float32 [B]) -> logits float [B, L, V].
      given: bool [B, L], the prompt.
      mask_id: the mask's token.
      scale: a Python float, w of the paper. 0 is `denoise_fn`.

    Returns:
      a denoiser that takes two passes, one after the other, and float32 logits.
    """

    def guided(z, t):
        conditional = denoise_fn(z, t)
        check_logits(conditional, z.shape, mask_id)
        conditional = conditional.astype(jnp.float32)
        unconditional = denoise_fn(jnp.where(given, mask_id, z), t).astype(jnp.float32)
        return unconditional + (scale + 1) * (conditional - unconditional)

    return guided


@dataclasses.dataclass(frozen=True)
class Guided:
    """A sampler with guidance: `Guided(Confidence(block=32), scale=1.5)` is called as `Confidence` is.

    The prompt is what the canvas gives. `passes` counts both passes of a step.

    Attributes:
      sampler: one of `SAMPLERS` that takes a `denoise_fn`.
      scale: at least 0; how far to go beyond the conditional logits. 0 runs the sampler as it is, at one pass a step.
    """

    causal: ClassVar[bool] = False

    sampler: Callable[..., Samples]
    scale: float

    def __post_init__(self):
        if getattr(self.sampler, "causal", True):
            raise ValueError(f"Guidance needs a sampler of a diffusion model, not {type(self.sampler).__name__}.")
        AT_LEAST_0.check("the guidance scale", self.scale)

    def __call__(self, denoise_fn, keys, canvas, *, mask_id, valid=None, **options: Any) -> Samples:
        """Fills in the masks of `canvas`. Arguments and errors as for `sampler`."""
        if self.scale == 0:
            return self.sampler(denoise_fn, keys, canvas, mask_id=mask_id, valid=valid, **options)
        check_call(keys, canvas, mask_id, valid)
        given = ~blanks(canvas, mask_id, valid)
        if valid is not None:
            given &= valid
        guided = guide(denoise_fn, given, mask_id, self.scale)
        samples = self.sampler(guided, keys, canvas, mask_id=mask_id, valid=valid, **options)
        return samples._replace(passes=2 * samples.passes)
