"""Steps of the reverse process by Tweedie's formula for a score (SEDD, arXiv 2310.16834, section 4.2 and algorithm 3).

Undoing a part of the noise on the score, and weighing it with how likely that part leads to z_t, gives the law of z_s:
for one position the exact one, whatever the step, where the score is.
"""

import dataclasses

from diffrwkv.diffusion.samplers.euler import Euler


@dataclasses.dataclass(frozen=True)
class Analytic(Euler):
    """Every position moves at every step: num_steps + 1 passes.

    Attributes:
      num_steps, eps: as of `Euler`; the last pass is this very step to where no noise is left.
    """

    def _law(self, process, output, z, t, s):
        return process.analytic_law(output, z, t, s)
