"""Masked diffusion with a schedule of its own for each token (GenMD4, arXiv 2406.04329, section 6).

The clean token v still shows at t with probability alpha_v(t) = 1 - (1 - eps) t^w_v. That a token is masked tells of
what it is, the more the earlier it is: p(x_i | z_t) depends on t, and a network must be told it.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffrwkv.checks import INSIDE
from diffrwkv.diffusion.processes.base import Vocabulary
from diffrwkv.diffusion.processes.masked import Absorbing


@dataclasses.dataclass(frozen=True)
class TokenMasked(Absorbing):
    """The process; the network's output is logits of p(x_i | z_t) at a masked position.

    Attributes:
      vocabulary: of the tokens.
      powers: w, a number above 0 for each of the V ids, the mask's without meaning: a tuple, or within a transformation
        of JAX an array. None: they are still to be learned, and nothing can be computed.
      eps: alpha(1), of every token.
    """

    needs_time: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    vocabulary: Vocabulary
    powers: Any = None
    eps: float = 1e-4

    def __post_init__(self):
        INSIDE.check("eps", self.eps)

    @property
    def w(self):
        """The powers, float32 [V]."""
        if self.powers is None:
            raise ValueError("The schedules of this process are learned: take that of `Objective.settled(state)`.")
        return jnp.asarray(self.powers, jnp.float32)

    def log_masked(self, t, x=None):
        """log(1 - alpha(t)) of the clean tokens x, [B, L], or of all, [..., V]; float32."""
        if x is None:
            return jnp.log1p(-self.eps) + self.w * jnp.log(t)[..., None]
        return jnp.log1p(-self.eps) + self.w[x] * jnp.log(t)

    def noise(self, key, x, t, free=None):
        """Each token replaced by the mask with its own probability, independently."""
        return self.with_masks(key, x, jnp.exp(self.log_masked(t, x)), free)

    def log_noise(self, x, z, t):
        """log q(z_t | x) of every position, float32 [B, L]."""
        masked = self.log_masked(t, x)
        return jnp.where(self.noised(z), masked, _log_one_minus_exp(masked))

    def nats(self, output, x, z, t):
        """(w_x (-log p_x - 1) + sum_v w_v p_v) / t at a mask (appendix of the paper).

        Where all w are the same it is w / t times the cross-entropy.
        """
        log_p = jax.nn.log_softmax(self.vocabulary.without_mask(output), axis=-1)
        right = jnp.take_along_axis(log_p, x[..., None], axis=-1)[..., 0]
        nats = (self.w[x] * (-right - 1) + jnp.exp(log_p) @ self.w) / t
        return jnp.where(self.noised(z), nats, 0.0)

    def nats_before(self, x, t):
        """The cross-entropy of what is masked at t, under the law that its schedules alone give: a token as probable as
        it is likely to be masked. It keeps w from leaving more and more to be shown before t.
        """
        log_masked = self.log_masked(jnp.asarray(t))
        log_p = jax.nn.log_softmax(self.vocabulary.without_mask(log_masked))
        return -jnp.exp(log_masked[x]) * log_p[x]

    # --- sampling ---------------------------------------------------------------------------------

    def forward_law(self, log_p, s):
        masked = self.log_masked(s)
        return self._with_mask(log_p + _log_one_minus_exp(masked), log_p + masked)

    def reverse_law(self, log_p, z, t, s):
        """A mask over v is still there at s with probability (s / t)^w_v."""
        stays = self.w * jnp.log(s / t)[..., None]
        law = self._with_mask(log_p + _log_one_minus_exp(stays), log_p + stays)
        return jnp.where(self.noised(z)[..., None], law, self.shown(z))

    def _with_mask(self, shown, hidden):
        """The law `shown` [..., V], and of the mask the sum of `hidden`; both in logarithms."""
        hidden = jax.nn.logsumexp(hidden, axis=-1, keepdims=True)
        return jnp.where(self.vocabulary.is_mask(), hidden, shown)


def _log_one_minus_exp(x):
    """log(1 - e^x) for x <= 0, with a finite gradient where x < 0."""
    return jnp.log(-jnp.expm1(x))
