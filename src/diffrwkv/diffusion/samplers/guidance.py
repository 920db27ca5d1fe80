"""Classifier-free guidance towards what is given, without a second network (LLaDA, arXiv 2502.09992, appendix)."""

import dataclasses

import jax.numpy as jnp

from diffrwkv.checks import AT_LEAST_0
from diffrwkv.diffusion.samplers.base import Wrapper
from diffrwkv.diffusion.samplers.common import blanks


def guide(denoise, given, vocabulary, scale):
    """A denoiser whose logits are u + (scale + 1) (c - u): c those of z_t, u those of z_t with `given` masked.

    Args:
      denoise: (z_t int32 [B, L], t float32 [B]) -> logits float [B, L, V].
      given: bool [B, L], the prompt.
      vocabulary: of the tokens.
      scale: a Python float, w of the paper. 0 is `denoise`.

    Returns:
      a denoiser that takes two passes, one after the other, and float32 logits.
    """

    def guided(z, t):
        conditional = denoise(z, t)
        vocabulary.check_output(conditional, z.shape)
        conditional = conditional.astype(jnp.float32)
        unconditional = denoise(jnp.where(given, vocabulary.mask_id, z), t).astype(jnp.float32)
        return unconditional + (scale + 1) * (conditional - unconditional)

    return guided


@dataclasses.dataclass(frozen=True)
class Guided(Wrapper):
    """A masked diffusion sampler with guidance: `Guided(Confidence(block=32), scale=1.5)` is called as `Confidence` is.

    The prompt is what the canvas gives. `passes` counts both passes of a step.

    Attributes:
      sampler: one of the face "denoise".
      scale: at least 0; how far to go beyond the conditional logits. 0 runs the sampler as it is, at one pass a step.
    """

    scale: float

    def __post_init__(self):
        super().__post_init__()
        AT_LEAST_0.check("the guidance scale", self.scale)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        options = {"valid": valid, "return_trace": return_trace, "on_step": on_step}
        if self.scale == 0:
            return self.sampler(process, network, keys, canvas, **options)
        given = ~blanks(canvas, process.mask_id, valid)
        if valid is not None:
            given &= valid
        guided = guide(network, given, process.vocabulary, self.scale)
        samples = self.sampler(process, guided, keys, canvas, **options)
        return samples._replace(passes=2 * samples.passes)
