"""What the samplers that leave `Confidence` early share: its options, and which blanks are the answer."""

import dataclasses

import jax.numpy as jnp

from diffrwkv.checks import GRID
from diffrwkv.diffusion.samplers.base import Sampler
from diffrwkv.diffusion.samplers.confidence import Confidence


def last_blanks(blank, number):
    """bool [B, L]: the last `number` blanks of each sequence, all of them for None."""
    if number is None:
        return blank
    after = jnp.cumsum(blank[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
    return blank & (after <= number)


@dataclasses.dataclass(frozen=True)
class EarlyExit(Sampler):
    """The options of `Confidence` with the rule "steps"; what makes a sampler leave it is the subclass's.

    Attributes:
      num_steps, block, score, temperature, top_p, top_k: as of `Confidence`.
    """

    num_steps: int = 128
    block: int | None = None
    score: str = "probability"
    _: dataclasses.KW_ONLY  # a subclass's own options stand before these
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        GRID.check("num_steps", self.num_steps)
        self.steps()

    def steps(self):
        """The `Confidence` that runs until the exit. Raises as it does."""
        shared = (field.name for field in dataclasses.fields(EarlyExit))
        return Confidence(**{name: getattr(self, name) for name in shared})
