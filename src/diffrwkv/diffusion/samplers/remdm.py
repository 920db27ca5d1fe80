"""ReMDM: ancestral sampling that may take a token back (arXiv 2503.00307).

With m = 1 - alpha, the step from t to s < t (its equation 6) has a remasking probability sigma <= sigma_max =
min(1, m_s / alpha_t):

    a generated token   is masked again with probability sigma
    a mask              takes a token of p(x | z_t) with probability (m_t - m_s + sigma alpha_t) / m_t, else it stays

which for sigma = 0 is `Ancestral`, and for a sigma that does not look at the tokens leaves the share of masks at each
time as the schedule has it.

    cap       sigma = min(eta, sigma_max)
    rescale   sigma = eta sigma_max
    conf      sigma_i = sigma_max softmax(-psi)_i over the generated tokens, psi_i the probability that token i was
              drawn with: what was unlikely when it was drawn is likelier to be taken back
    loop      alpha rises from 0 to alpha_on while t > t_on, without remasking; stays there until t_off, with
              sigma = min(eta, sigma_max), so that tokens are taken back and drawn anew; then rises to 1

Approximate: tokens revealed in the same step are drawn apart from each other, and remasking makes more of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.checks import INSIDE, POSITIVE_FRACTION, check_choice
from diffrwkv.diffusion.deferred import deferring
from diffrwkv.diffusion.noise import NO_TOKEN, uniform
from diffrwkv.diffusion.samplers.base import Sampler, Samples, watched
from diffrwkv.diffusion.samplers.common import (
    blanks,
    canvas_keys,
    check_grid,
    check_truncation,
    draw_due,
    fold_step,
    most_remasked,
    settle,
    time_of,
)

STRATEGIES = ("cap", "rescale", "conf", "loop")


@dataclasses.dataclass(frozen=True)
class ReMDM(Sampler):
    """Ancestral sampling with remasking; the strategies are told above.

    A step at which a sequence reveals nothing needs no network pass, whether it remasks or not. Given tokens are never
    remasked. A sequence is finished after the last step and not before, for until then a token may be taken back; it
    takes at most num_steps + 1 passes. The trace is kept in the loop: num_steps + 1 canvases of memory.

    The process's schedule gives alpha, but for loop, which has its own; the network is told the time at which the
    schedule has it.

    Attributes:
      num_steps: steps of the time grid, as in `Ancestral`; what is masked after them takes its most probable token.
      strategy: "cap", "rescale", "conf" or "loop".
      eta: of cap, rescale and loop alone; in (0, 1] (None: 0.02).
      t_on, t_off, alpha_on: of loop alone; 0 < t_off < t_on < 1, alpha_on in (0, 1) (None: 0.55, 0.05, 0.9).
      temperature, top_p, top_k: of p(x | z_t); see `common.truncate`. psi is the probability after them.
      eps: the last time.
    """

    num_steps: int = 128
    strategy: str = "cap"
    eta: float | None = None
    t_on: float | None = None
    t_off: float | None = None
    alpha_on: float | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eps: float = 1e-5

    def __post_init__(self):
        check_grid(self.num_steps, self.eps)
        check_choice("strategy", self.strategy, STRATEGIES)
        settle(self, "strategy", eta=(["cap", "rescale", "loop"], 0.02))
        settle(self, "strategy", t_on=(["loop"], 0.55), t_off=(["loop"], 0.05), alpha_on=(["loop"], 0.9))
        if self.eta is not None:
            POSITIVE_FRACTION.check("eta", self.eta)
        if self.loop is not None:
            for name in ("t_on", "t_off", "alpha_on"):
                INSIDE.check(name, getattr(self, name))
            t_on, t_off, _ = self.loop
            if t_off >= t_on:
                raise ValueError(f"t_off must be below t_on, got {t_off} and {t_on}.")
        check_truncation(self.temperature, self.top_p, self.top_k)

    @property
    def loop(self) -> tuple[float, float, float] | None:
        """(t_on, t_off, alpha_on) of the strategy that has them."""
        if self.t_on is None or self.t_off is None or self.alpha_on is None:
            return None
        return self.t_on, self.t_off, self.alpha_on

    def grid(self, schedule):
        """(times [T + 1] that the network is told, alpha_t [T], m_t [T], m_s [T], sigma [T]) of the T steps, float32.

        For conf sigma is sigma_max, which each sequence shares out among its tokens.
        """
        t = np.linspace(1, self.eps, self.num_steps + 1)
        takes_back = np.ones(self.num_steps, bool)
        if self.loop is not None:
            t_on, t_off, alpha_on = self.loop
            rise, fall = (1 - t) / (1 - t_on) * alpha_on, 1 - t / t_off * (1 - alpha_on)
            alpha = jnp.asarray(np.where(t > t_on, rise, np.where(t > t_off, alpha_on, fall))).astype(jnp.float32)
            masked = 1 - alpha
            takes_back = (t[:-1] > t_off) & (t[:-1] <= t_on)
            times = time_of(schedule, masked)
        else:
            times = jnp.asarray(t, jnp.float32)
            alpha, masked = schedule.alpha(times), schedule.mask_probability(times)
        alpha_t, m_t, m_s = alpha[:-1], masked[:-1], masked[1:]
        sigma_max = most_remasked(alpha_t, m_s)
        eta = 1.0 if self.eta is None else self.eta
        sigma = jnp.minimum(eta, sigma_max) if self.strategy in ("cap", "loop") else eta * sigma_max
        return times, alpha_t, m_t, m_s, jnp.where(takes_back, sigma, 0.0)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        denoise, mask_id = deferring(watched(network, on_step)), process.mask_id
        batch, length = canvas.shape
        steps = self.num_steps
        times, alpha_t, m_t, m_s, sigma = self.grid(process.schedule)
        blank = blanks(canvas, mask_id, valid)
        rows = jnp.arange(batch)
        change_keys, token_keys = canvas_keys(keys, length)
        width = 4 + 2 * -(-length // steps)

        def changes(step, z, psi):
            """(what is revealed, what is remasked) in each sequence's next step, bool [B, L]."""
            hidden = blank & (z == mask_id)
            i = jnp.minimum(step, steps - 1)
            if self.strategy == "conf":
                shown = blank & ~hidden
                share = jnp.where(shown, jnp.exp(-psi), 0.0)
                remask = sigma[i][:, None] * share / jnp.maximum(share.sum(axis=1, keepdims=True), 1e-30)
                reveal = (m_t[i] - m_s[i]) / m_t[i]
            else:
                remask = sigma[i][:, None]
                reveal = (m_t[i] - m_s[i] + sigma[i] * alpha_t[i]) / m_t[i]
            u = jax.vmap(jax.vmap(uniform))(fold_step(change_keys, i))
            on_grid = (step < steps)[:, None]
            revealed = hidden & ((u < reveal[:, None]) | (step == steps)[:, None])
            return revealed, blank & ~hidden & (z != NO_TOKEN) & (u < remask) & on_grid

        def record(trace, step, z, moved):
            if trace is None:
                return None
            # The last step and the noise removal after it are one entry.
            entry = jnp.where(moved, jnp.minimum(step + 1, steps), steps + 1)
            return trace.at[entry, rows].set(z, mode="drop")

        def walk(carry):
            """Takes all steps that need no network pass."""

            def idle(step, z, psi):
                revealed, remasked = changes(step, z, psi)
                return (step <= steps) & ~revealed.any(axis=1), remasked

            def some_idle(carry):
                return idle(*carry[:3])[0].any()

            def next_step(carry):
                step, z, psi, trace = carry
                moved, remasked = idle(step, z, psi)
                z = jnp.where(moved[:, None] & remasked, mask_id, z)
                return step + moved.astype(jnp.int32), z, psi, record(trace, step, z, moved)

            return jax.lax.while_loop(some_idle, next_step, carry)

        def some_left(carry):
            return (carry[0] <= steps).any()

        def next_pass(carry):
            step, z, psi, trace, passes = carry
            moved = step <= steps
            output = denoise(z, times[jnp.minimum(step, steps)])
            process.vocabulary.check_output(output, z.shape)
            revealed, remasked = changes(step, z, psi)
            z, p = draw_due(
                process.vocabulary,
                output,
                fold_step(token_keys, step),
                jnp.where(remasked, mask_id, z),
                revealed & moved[:, None],
                step == steps,
                width=width,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
            )
            psi = jnp.where(revealed, p, psi)
            trace = record(trace, step, z, moved)
            moved = moved.astype(jnp.int32)
            return *walk((step + moved, z, psi, trace)), passes + moved

        trace = jnp.repeat(canvas[None], steps + 1, axis=0) if return_trace else None
        start = jnp.where(blank.any(axis=1), 0, steps + 1)
        carry = walk((start, canvas, jnp.zeros(canvas.shape, jnp.float32), trace))
        *_, passes = carry = jax.lax.while_loop(some_left, next_pass, (*carry, jnp.zeros((batch,), jnp.int32)))
        return Samples(carry[1], passes, carry[3])
