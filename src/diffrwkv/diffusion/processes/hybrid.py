"""Masks and uniform noise at once: a token is masked, or replaced by any other (GIDD, arXiv 2503.04482).

    q(z_t | x) ~ a_t [z_t = x] + m_t [z_t = mask] + U_t / N [z_t is no mask],      U_t = B (a_t m_t)^(gamma / 2)

a_t is a schedule's alpha_t, m_t = 1 - a_t, N the number of real tokens, x itself among them; the three sum to 1 + U_t.
B is chosen so that the share of uniform noise, U_t / (1 + U_t), is `uniform_share` where it is largest, at a_t = 1/2.
With the linear schedule this is GIDD's mixture (section 4). At both ends there is none of it: a sample begins as masks
and ends as text. In between a token that shows may be wrong, so that a sample can correct itself.

For gamma <= 2 this is a Markov process. With a prime for the slope by t, a token becomes a mask at the rate g(mask),
and any real token at the rate g(y), whatever it was before:

    g(mask) = -a'_t / a_t / (1 + U_t)
    g(y)    = -a'_t ((gamma / 2) / m_t + (1 - gamma / 2) / a_t) U_t / N / (1 + U_t)

The network's output is logits of mu(y) = p(x_i = y | z_t without its token i), as of `Uniform`: at a mask it is
p(x_i | z_t). The bound is that of the rates in continuous time,

    g(z) sum over y != z of r(y) phi(s(y) / r(y)),   phi(u) = u - 1 - log u

y being the mask too; s(y) = q(y) / q(z) where q is the law above of x ~ mu, r(y) the same of the clean token. It is
GIDD's (section 3), g(z) / q(z | x) (KL(q(. | x), q) + q(z | x) / q(z) - 1 - log q(z | x) / q(z)), in a form that takes
no difference of large numbers. It is trained as it is: the authors' weights, which bound its largest terms, are not
here. Uniform noise comes early, so what the integral lacks before its earliest time is counted (`nats_before`).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffrwkv.checks import Range
from diffrwkv.diffusion.noise import uniform
from diffrwkv.diffusion.processes.base import (
    Schedule,
    Scheduled,
    Vocabulary,
    check_schedule,
    check_two_tokens,
    finite_rate,
    log,
    start_keys,
)
from diffrwkv.diffusion.schedules import Linear

SHARE = Range(0, 0.99, open="low")
GAMMA = Range(0, 2, open="low")


@dataclasses.dataclass(frozen=True)
class Hybrid(Scheduled):
    """The process; how its output is read is told above.

    Attributes:
      vocabulary: of the tokens.
      schedule: a_t; GIDD's is linear.
      uniform_share: p_u, the largest share of uniform noise.
      gamma: how it rises and falls; near 0 it is everywhere, at 2 as a_t m_t does.
    """

    needs_time: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    vocabulary: Vocabulary
    schedule: Schedule = Linear()
    uniform_share: float = 0.1
    gamma: float = 1.0

    def __post_init__(self):
        check_schedule(self)
        SHARE.check("uniform_share", self.uniform_share)
        GAMMA.check("gamma", self.gamma)
        check_two_tokens(self)

    def noise(self, key, x, t, free=None):
        """Every token replaced with its probability, independently; by chance a real one by itself."""
        when, what = jax.random.split(key)
        _, m, u, total = self._weights(t)
        drawn = uniform(when, x.shape) * total
        z = jnp.where(drawn < m + u, self.vocabulary.uniform(what, x.shape).astype(x.dtype), x)
        z = jnp.where(drawn < m, jnp.asarray(self.vocabulary.mask_id, x.dtype), z)
        return z if free is None else jnp.where(free, z, x)

    def nats(self, output, x, z, t):
        rate = self._rate(z, t)

        @jax.checkpoint  # or its backward pass would keep several arrays of the output's size
        def entropy(output, t):
            log_mu = jax.nn.log_softmax(self.vocabulary.without_mask(output), axis=-1)
            certain = jnp.where(self.vocabulary.one_hot(x, bool), 0.0, -jnp.inf)
            at_z = z[..., None]
            log_s, log_r = (
                law - jnp.take_along_axis(law, at_z, axis=-1) for law in (self._law(p, t) for p in (log_mu, certain))
            )
            difference = jnp.where(self.vocabulary.one_hot(z, bool), 0.0, log_s - log_r)
            return (jnp.exp(log_r) * (jnp.expm1(difference) - difference)).sum(axis=-1)

        return rate * entropy(output, t)

    def nats_before(self, x, t):
        """Of a decoder that knows no more than how likely the noise at t is: the token that shows, or any other."""
        a, m, u, total = self._weights(t)
        other = u / self.vocabulary.real
        same = (a + other) * jnp.log1p((u - other) / (a + other))
        changed = (u - other) * (jnp.log(a + u) - jnp.log(other))
        return jnp.full(x.shape, (same + changed + m * math.log(self.vocabulary.real)) / total)

    # --- sampling ---------------------------------------------------------------------------------

    def start(self, keys, canvas, blank):
        """Masks, but for what the schedule's end has of uniform noise."""
        _, m, u, _ = self._weights(jnp.float32(1))

        def draw(key):
            when, what = jax.random.split(key)
            masked = uniform(when) < m / (m + u)
            return jnp.where(masked, jnp.int32(self.vocabulary.mask_id), self.vocabulary.uniform(what, ()))

        return jnp.where(blank, jax.vmap(jax.vmap(draw))(start_keys(keys, canvas.shape[1])), canvas)

    def predict(self, output, z, t):
        log_mu = self.vocabulary.without_mask(output)
        return jax.nn.log_softmax(log_mu + self._log_seen(z, t), axis=-1)

    def forward_law(self, log_p, s):
        return self._law(log_p, s) - jnp.log(self._weights(s)[3])[..., None]

    def reverse_law(self, log_p, z, t, s):
        """Proportional to q(z_t | z_s) sum over x of q(z_s | x) p(x | z_t) / q(z_t | x)."""
        (a_t, m_t, u_t, _), (a_s, m_s, u_s, total_s) = self._weights(t), self._weights(s)
        log_mu = jax.nn.log_softmax(log_p - self._log_seen(z, t), axis=-1)
        # q(z_t | z_s), up to a factor: what of the noise at t is none from s, and where z_s = z_t, what stays.
        masked, drawn = m_t - m_s, (u_t * a_s - u_s * a_t) / self.vocabulary.real
        became = jnp.maximum(jnp.where(z == self.vocabulary.mask_id, masked, drawn), 0.0)[..., None]
        to_z = became + jnp.where(self.vocabulary.one_hot(z, bool), (a_t * total_s)[..., None], 0.0)
        return jax.nn.log_softmax(self._law(log_mu, s) + log(to_z), axis=-1)

    # --- parts ------------------------------------------------------------------------------------

    def _weights(self, t):
        """(a, m, U, 1 + U) at the times t."""
        a, m = self.schedule.alpha(t), self.schedule.mask_probability(t)
        most = 2**self.gamma * self.uniform_share / (1 - self.uniform_share)
        u = most * jnp.exp(self.gamma / 2 * (log(a) + log(m)))
        return a, m, u, 1 + u

    def _law(self, log_p, t):
        """log of q(z_t) of x ~ exp(log_p) times 1 + U_t, float32 [..., V]."""
        a, m, u, _ = (log(weight)[..., None] for weight in self._weights(t))
        shown = jnp.logaddexp(a + log_p, u - math.log(self.vocabulary.real))
        return jnp.where(self.vocabulary.is_mask(), m, shown)

    def _log_seen(self, z, t):
        """log q(z_t | x) of each x up to a factor, float32 [B, L, V]: more than 0 where a token that shows is x."""
        a, _, u, _ = self._weights(t)
        more = jax.nn.softplus(math.log(self.vocabulary.real) + log(a) - log(u))
        here = self.vocabulary.one_hot(z, bool) & ~self.vocabulary.is_mask()
        return jnp.where(here, more[..., None], 0.0)

    def _rate(self, z, t):
        """g(z), float32 [B, L]; large where it is infinite."""
        _, _, u, total = self._weights(t)
        half, gone = self.gamma / 2, finite_rate(self.schedule.dsigma(t))
        drawn = (half * finite_rate(self.schedule.weight(t)) + (1 - half) * gone) * u / self.vocabulary.real
        return jnp.where(z == self.vocabulary.mask_id, gone, drawn) / total
