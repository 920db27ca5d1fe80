"""Euler steps of the reverse process that a score drives (SEDD, arXiv 2310.16834, section 4.2 and algorithm 2).

A step draws each position from [z_s = z_t] + (t - s) sigma'_t Q(y, z_t) s(y): first order, for a process whose score is
known. `Analytic` costs the same and is exact for one position.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffrwkv.diffusion.noise import draw_law
from diffrwkv.diffusion.processes import Scored
from diffrwkv.diffusion.samplers.base import Sampler, watched
from diffrwkv.diffusion.samplers.common import check_grid
from diffrwkv.diffusion.samplers.grid import even_times, walk


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    """Every position moves at every step: num_steps + 1 passes.

    Attributes:
      num_steps: steps T of the time grid 1 = t_0 > ... > t_T = eps, evenly spaced. One more pass then draws each
        position from p(x | z), the step to where no noise is left.
      eps: the last time.
    """

    needs: ClassVar[type] = Scored

    num_steps: int = 128
    eps: float = 1e-5

    def __post_init__(self):
        check_grid(self.num_steps, self.eps)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        def step(i, output, z, t, s, keys):
            del i
            return draw_law(keys, jnp.log(self._law(process, output, z, t, s)))

        def last(output, z, t, keys):
            return draw_law(keys, process.predict(output, z, t))

        times, denoise = even_times(self.num_steps, self.eps), watched(network, on_step)
        return walk(process, denoise, keys, canvas, valid, times, step, last, return_trace)

    def _law(self, process, output, z, t, s):
        return process.euler_law(output, z, t, s)
