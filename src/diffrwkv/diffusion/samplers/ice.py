"""ICE's answer-first exit: think until the answer is sure, then write it at once (arXiv 2508.10736).

The blanks are thinking first and answer last. Passes fill the thinking only. As soon as the network's mean confidence
in the answer reaches a threshold, or no thinking is left to fill, the whole answer is decoded in one parallel step.
Approximate.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffrwkv.checks import COUNT, POSITIVE_FRACTION
from diffrwkv.diffusion.samplers.common import Samples, blanks, check_call, without_mask
from diffrwkv.diffusion.samplers.confidence import fill
from diffrwkv.diffusion.samplers.early_exit import EarlyExit, last_blanks


@dataclasses.dataclass(frozen=True)
class ICE(EarlyExit):
    """`Confidence` with the rule "steps" on the thinking, and an exit by the confidence in the answer.

    Confidence in the answer is the mean over its blanks of the largest probability. The step that decodes the answer
    gives the thinking that is still masked its most probable tokens as well, so no mask is left.

    Attributes:
      answer_length: the last so many blanks of a sequence are its answer. A sequence with no more blanks than these has
        nothing to think about and takes one pass.
      threshold: mean confidence in (0, 1] at which to write the answer.
      num_steps, block, score, temperature, top_p, top_k, schedule: as of `Confidence`, for the thinking.
    """

    answer_length: int = 8
    threshold: float = 0.9

    def __post_init__(self):
        COUNT.check("answer_length", self.answer_length)
        POSITIVE_FRACTION.check("threshold", self.threshold)
        super().__post_init__()

    def __call__(self, denoise_fn, keys, canvas, *, mask_id, valid=None, return_trace=False) -> Samples:
        """Fills in the masks of `canvas`. Arguments, errors and result as for `Confidence`."""
        check_call(keys, canvas, mask_id, valid)
        answer = last_blanks(blanks(canvas, mask_id, valid), self.answer_length)

        def sure(logits, left, passes, planned):
            largest = jax.nn.softmax(without_mask(logits, mask_id), axis=-1).max(axis=-1)
            number = jnp.maximum(answer.sum(axis=1, dtype=jnp.float32), 1.0)
            mean = jnp.where(answer, largest, 0.0).sum(axis=1) / number
            return (mean >= self.threshold) | ~(left & ~answer).any(axis=1)

        return fill(
            self.steps(),
            denoise_fn,
            keys,
            canvas,
            mask_id=mask_id,
            valid=valid,
            return_trace=return_trace,
            answer=answer,
            leave=sure,
        )
