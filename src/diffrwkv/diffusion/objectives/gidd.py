"""GIDD's bound (arXiv 2503.04482), of masks and uniform noise at once."""

import dataclasses

from diffrwkv.diffusion.objectives.base import Diffusion
from diffrwkv.diffusion.processes.hybrid import Hybrid


@dataclasses.dataclass(frozen=True)
class GIDD(Diffusion):
    """The NELBO of `Hybrid`, with what is left before the earliest time (`Hybrid.nats_before`).

    Attributes:
      time_eps: the earliest time. Uniform noise comes early, U ~ t^(gamma / 2): at 1e-3 about one token in 150 is
        replaced already, with the defaults, and of it the bound knows no more than how likely that is.
      low_discrepancy, mask_rates, search_mask_rates: as of `Diffusion`.
    """

    time_eps: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.process, Hybrid):
            raise TypeError(f"GIDD needs the process Hybrid, not {type(self.process).__name__}.")
