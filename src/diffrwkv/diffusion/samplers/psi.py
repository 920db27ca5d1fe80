"""Psi-samplers: predictor and corrector in one step (The Diffusion Duality, chapter II; s-sahoo/duo).

A step from t to s draws each position from

    kappa q(z_s | z_t) + (1 - kappa) sum over x of q(z_s | x) p(x | z_t)

The first law is the reverse process, `Ancestral`'s: it holds on to what z_t says. The second one forgets z_t for a
prediction that is noised anew, so that an early mistake can be taken back. Both lead from the law of z_t to that of
z_s, so their mixture does too, for any kappa. For masked diffusion it is ReMDM's step (arXiv 2503.00307) with
sigma = (1 - kappa) (1 - alpha_s); the strategies but the first choose that sigma as ReMDM does, and kappa by it: at
least 0, where ReMDM, with a sigma above 1 - alpha_s, masks more than a mixture can.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from diffrwkv.checks import FRACTION, INSIDE, POSITIVE_FRACTION, check_choice, check_flag
from diffrwkv.diffusion.noise import draw_law, likeliest
from diffrwkv.diffusion.processes import Scheduled
from diffrwkv.diffusion.samplers.base import Sampler, watched
from diffrwkv.diffusion.samplers.common import check_grid, check_truncation, most_remasked, settle, truncated_law
from diffrwkv.diffusion.samplers.grid import even_times, walk

STRATEGIES = ("constant", "cap", "rescale", "loop")
LEAST = 1e-30  # instead of 0, by which nothing is divided


@dataclasses.dataclass(frozen=True)
class Psi(Sampler):
    """Every position moves at every step: num_steps + 1 passes.

    Attributes:
      num_steps: steps T of the time grid; one more pass turns what is left into clean tokens.
      strategy: how kappa is chosen, with alpha and sigma as above.
          "constant"  `kappa`
          "cap"       sigma = min(eta, (1 - alpha_s) / alpha_t)
          "rescale"   sigma = eta min(1, (1 - alpha_s) / alpha_t)
          "loop"      the time falls to where alpha = `alpha_on`, stays there while sigma = `eta`, and falls to eps
      kappa: of "constant"; 1 is the reverse process alone, 0 the corrector alone. None is 0.95.
      eta: how much to redo. None is 0.02.
      t_on, t_off: kappa is 1 at the steps whose evenly spaced time is above t_on, or not above t_off (Duo: 0.5 and 0.1
        with a constant kappa); in (0, 1). None is 0.55 and 0.05 in "loop", else no limit.
      alpha_on: of "loop". None is 0.9.
      greedy_tail: the last pass takes the most probable token, which gives a likelier text of less variety; else it
        draws one.
      temperature: divides the logits of p(x | z_t); 0 takes the most probable token.
      top_p, top_k: see `common.truncate`.
      eps: the last time.
    """

    needs: ClassVar[type] = Scheduled

    num_steps: int = 128
    strategy: str = "constant"
    kappa: float | None = None
    eta: float | None = None
    t_on: float | None = None
    t_off: float | None = None
    alpha_on: float | None = None
    greedy_tail: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eps: float = 1e-5

    def __post_init__(self):
        check_grid(self.num_steps, self.eps)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_flag("greedy_tail", self.greedy_tail)
        check_truncation(self.temperature, self.top_p, self.top_k)
        settle(
            self,
            "strategy",
            kappa=(("constant",), 0.95),
            eta=(("cap", "rescale", "loop"), 0.02),
            alpha_on=(("loop",), 0.9),
        )
        loop = self.strategy == "loop"
        if loop:
            settle(self, "strategy", t_on=(("loop",), 0.55), t_off=(("loop",), 0.05))
        for name, among in (
            ("kappa", FRACTION),
            ("eta", POSITIVE_FRACTION),
            ("t_on", INSIDE),
            ("t_off", INSIDE),
            ("alpha_on", INSIDE),
        ):
            if getattr(self, name) is not None:
                among.check(name, getattr(self, name))
        t_on, t_off = self._window()
        if t_off >= t_on:
            raise ValueError(f"t_off must be below t_on, got {t_off} and {t_on}.")
        if loop and t_off <= self.eps:
            raise ValueError(f"t_off must be above eps, got {t_off} and {self.eps}.")

    def _window(self):
        """(t_on, t_off), numbers."""
        return 1.0 if self.t_on is None else self.t_on, 0.0 if self.t_off is None else self.t_off

    def grid(self, schedule):
        """(The times, float32 [T + 1], never rising; kappa of each step, float32 [T])."""
        even = np.linspace(1, self.eps, self.num_steps + 1)
        t_on, t_off = self._window()
        on = (even[:-1] > t_off) & (even[:-1] <= t_on)
        times = even_times(self.num_steps, self.eps)
        fixed, eta, alpha_on = (float(x or 0) for x in (self.kappa, self.eta, self.alpha_on))  # None does not count
        if self.strategy == "loop":
            held = jnp.clip(schedule.time(jnp.float32(1 - alpha_on)), self.eps, 1.0)
            falls = held + (1 - held) * ((even - t_on) / (1 - t_on))
            ends = self.eps + (held - self.eps) * ((even - self.eps) / (t_off - self.eps))
            times = jnp.where(even > t_on, falls, jnp.where(even > t_off, held, ends)).astype(jnp.float32)
        if self.strategy == "constant":
            kappa = jnp.full((self.num_steps,), fixed, jnp.float32)
        else:
            alpha_t, m_s = schedule.alpha(times[:-1]), schedule.mask_probability(times[1:])
            most = most_remasked(alpha_t, m_s)
            sigma = {"cap": jnp.minimum(eta, most), "rescale": eta * most, "loop": jnp.full_like(most, eta)}[
                self.strategy
            ]
            kappa = jnp.clip(1 - sigma / jnp.maximum(m_s, LEAST), 0.0, 1.0)
        return times, jnp.where(on, kappa, 1.0)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        times, kappa = self.grid(process.schedule)

        def step(i, output, z, t, s, keys):
            log_p = process.predict(output, z, t)
            log_p = truncated_law(log_p, self.temperature, self.top_p, self.top_k)
            back, anew = process.reverse_law(log_p, z, t, s), process.forward_law(log_p, s)
            return draw_law(keys, jnp.logaddexp(jnp.log(kappa[i]) + back, jnp.log1p(-kappa[i]) + anew))

        def last(output, z, t, keys):
            log_p = process.predict(output, z, t)
            if self.greedy_tail:
                return likeliest(log_p)
            return draw_law(keys, truncated_law(log_p, self.temperature, self.top_p, self.top_k))

        denoise = watched(network, on_step)
        return walk(process, denoise, keys, canvas, valid, times, step, last, return_trace)
