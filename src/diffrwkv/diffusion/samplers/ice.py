"""ICE's answer-first exit: think until the answer is sure, then write it at once (arXiv 2508.10736).

The blanks are thinking first and answer last. Passes fill the thinking only. As soon as the network's mean confidence
in the answer reaches a threshold, or no thinking is left to fill, the whole answer is decoded in one parallel step.
Approximate.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffrwkv.checks import COUNT, POSITIVE_FRACTION
from diffrwkv.diffusion.samplers.base import watched
from diffrwkv.diffusion.samplers.common import blanks
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
      num_steps, block, score, temperature, top_p, top_k: as of `Confidence`, for the thinking.
    """

    answer_length: int = 8
    threshold: float = 0.9

    def __post_init__(self):
        COUNT.check("answer_length", self.answer_length)
        POSITIVE_FRACTION.check("threshold", self.threshold)
        super().__post_init__()

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        answer = last_blanks(blanks(canvas, process.mask_id, valid), self.answer_length)

        def sure(logits, left, passes, planned):
            largest = jax.nn.softmax(logits, axis=-1).max(axis=-1)
            number = jnp.maximum(answer.sum(axis=1, dtype=jnp.float32), 1.0)
            mean = jnp.where(answer, largest, 0.0).sum(axis=1) / number
            return (mean >= self.threshold) | ~(left & ~answer).any(axis=1)

        call = (process, watched(network, on_step), keys, canvas, valid, return_trace)
        return fill(self.steps(), *call, answer=answer, leave=sure)
