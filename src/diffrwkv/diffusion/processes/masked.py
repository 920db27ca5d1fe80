"""Masked (absorbing) diffusion: a token is replaced by the mask, and stays masked (MDLM, arXiv 2406.07524).

The network's output is either of

    "mean"   logits of p(x_i | z_t) at a masked position (MDLM's SUBS parameterisation). What the bound weighs is a
             cross-entropy.
    "score"  log p_t(z_i -> y) / p_t(z) + log(e^sigma - 1) + log N, N real tokens (SEDD, arXiv 2310.16834, with the
             shift of its authors' code). The bound is their score entropy; the true score is
             p(x_i = y | z_t) / (e^sigma - 1), for which the two bounds are one.

Under both, the softmax of the output over real tokens is p(x_i | z_t): what samples from one kind samples from the
other.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffrwkv.diffusion.cross_entropy import cross_entropy
from diffrwkv.diffusion.noise import uniform
from diffrwkv.diffusion.processes.base import (
    LogLinear,
    Reversible,
    Schedule,
    Scored,
    Vocabulary,
    check_outputs,
    check_schedule,
)

OUTPUTS = ("mean", "score")


class Absorbing(Reversible):
    """What holds of every process whose noise is the mask, however it comes: the output's softmax is p(x_i | z_t)."""

    @property
    def mask_id(self):
        return self.vocabulary.mask_id

    def noised(self, z):
        return z == self.mask_id

    def with_masks(self, key, x, probability, free=None):
        """x, each token replaced by the mask with its probability, independently; `free` as of `noise`."""
        masked = uniform(key, x.shape) < probability
        if free is not None:
            masked &= free
        return jnp.where(masked, jnp.asarray(self.mask_id, x.dtype), x)

    def start(self, keys, canvas, blank):
        del keys
        return jnp.where(blank, self.mask_id, canvas)

    def predict(self, output, z, t):
        """The mask is never predicted, and a position that shows a token is certain of it."""
        del t
        predicted = jax.nn.log_softmax(self.vocabulary.without_mask(output), axis=-1)
        return jnp.where(self.noised(z)[..., None], predicted, self.shown(z))

    def shown(self, z):
        """The law of a position that shows a token, which stays, float32 [B, L, V]."""
        return jnp.where(self.vocabulary.one_hot(z, bool), 0.0, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Masked(Absorbing, Scored):
    """The process; how its output is read is told above.

    Attributes:
      vocabulary: of the tokens.
      schedule: 1 - alpha_t is the probability that a token is masked at t.
      output: "mean" or "score".
      clock: as of `Scored`.
    """

    apart: ClassVar[bool] = True

    vocabulary: Vocabulary
    schedule: Schedule = LogLinear()
    output: str = "mean"
    clock: str = "t"

    def __post_init__(self):
        check_schedule(self)
        check_outputs(self, OUTPUTS)

    def noise(self, key, x, t, free=None):
        """Every token replaced by the mask with probability 1 - alpha_t, independently."""
        return self.with_masks(key, x, self.schedule.mask_probability(t), free)

    def nats(self, output, x, z, t):
        weight = self.schedule.weight(t)
        if self.output == "mean":
            nats = weight * cross_entropy(output, x, self.mask_id)
        else:
            # s_y - log r of the paper's score s, r = 1 / (e^sigma - 1), so that no difference of large numbers is taken
            relative = self._relative(output)
            right = jnp.take_along_axis(relative, x[..., None], axis=-1)[..., 0]
            nats = weight * (jnp.exp(jax.nn.logsumexp(relative, axis=-1)) - right - 1)
        return jnp.where(z == self.mask_id, nats, 0.0)

    # --- sampling ---------------------------------------------------------------------------------

    def forward_law(self, log_p, s):
        shown = log_p + jnp.log(self.schedule.alpha(s))[..., None]
        hidden = jnp.log(self.schedule.mask_probability(s))[..., None]
        return jnp.where(self.vocabulary.is_mask(), hidden, shown)

    def reverse_law(self, log_p, z, t, s):
        """A mask takes a token with probability (m_t - m_s) / m_t, m = 1 - alpha (MDLM, section 3.2.2)."""
        m_t, m_s = self.schedule.mask_probability(t), self.schedule.mask_probability(s)
        revealed = log_p + jnp.log((m_t - m_s) / m_t)[..., None]
        hidden = jnp.log(m_s / m_t)[..., None]
        law = jnp.where(self.vocabulary.is_mask(), hidden, revealed)
        return jnp.where((z == self.mask_id)[..., None], law, self.shown(z))

    def _relative(self, output):
        """log of the score over 1 / (e^sigma - 1): p(x | z) of a network that is right, float32 [B, L, V]."""
        if self.output == "mean":
            return jax.nn.log_softmax(self.vocabulary.without_mask(output), axis=-1)
        return self.vocabulary.without_mask(output) - math.log(self.vocabulary.real)

    def score(self, output, z, t):
        sigma = self.schedule.sigma(t)[..., None]
        log_r = -sigma - jnp.log(-jnp.expm1(-sigma))  # of 1 / (e^sigma - 1)
        return jnp.where(self.vocabulary.one_hot(z, bool), 0.0, self._relative(output) + log_r)

    def euler_law(self, output, z, t, s):
        share = (t - s) * self.schedule.weight(t)  # sigma' / (e^sigma - 1), finite where sigma is not
        return self._step(output, z, share)

    def analytic_law(self, output, z, t, s):
        m_t, m_s = self.schedule.mask_probability(t), self.schedule.mask_probability(s)
        return self._step(output, z, (m_t - m_s) / m_t)  # (e^(sigma_t - sigma_s) - 1) / (e^sigma_t - 1)

    def _step(self, output, z, share):
        """A mask takes y with the probability share * score(y) (e^sigma - 1)."""
        taken = share[..., None] * jnp.exp(self._relative(output))
        is_mask = self.vocabulary.is_mask()
        law = jnp.where(is_mask, jnp.maximum(1 - taken.sum(axis=-1, keepdims=True), 0.0), taken)
        law /= law.sum(axis=-1, keepdims=True)
        return jnp.where((z == self.mask_id)[..., None], law, jnp.exp(self.shown(z)))
