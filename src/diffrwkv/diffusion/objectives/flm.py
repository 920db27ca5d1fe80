"""The flow language model's loss (FLM, arXiv 2602.16813; david3684/flm d89a02f, algo.py)."""

import dataclasses

from diffrwkv.diffusion.objectives.base import Timed
from diffrwkv.diffusion.processes.flow import Flow


@dataclasses.dataclass(frozen=True)
class FLM(Timed):
    """The cross-entropy of every token at times spread evenly: no bound on a likelihood, so judge its samples.

    Attributes:
      time_eps: the earliest time. Samples begin at 0, so keep it small: of 50,000 tokens, gamma is .51 at 1e-3 already.
      low_discrepancy: as of `Timed`.
    """

    time_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.process, Flow):
            raise TypeError(f"FLM needs the process Flow, not {type(self.process).__name__}.")
