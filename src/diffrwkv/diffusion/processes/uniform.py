"""Uniform-state diffusion: a token is replaced by any other (UDLM, arXiv 2412.10193; SEDD, arXiv 2310.16834).

    q(z_t | x) = alpha_t [z_t = x] + (1 - alpha_t) / N              N real tokens, x itself among them

There is no mask: what is noise cannot be seen, and every token may change at every step, so that a sample can correct
itself. With mu(y) = p(x_i = y | z_t without its token i), the leave-one-out law, and k = N alpha_t / (1 - alpha_t),

    p(x_i = y | z_t) ~ mu(y) (1 + k [y = z_i])                       the posterior
    p_t(z_i -> y) / p_t(z) = (1 + k mu(y)) / (1 + k mu(z_i))         the score, s(y)

The network's output is either of

    "leave_one_out"  logits of mu, as UDLM and Duo (arXiv 2506.10892) train it: what they call the denoised token
                     enters their bound and their sampler as mu does. It is not p(x_i | z_t), which is far more certain
                     of the token that shows.
    "score"          log s(y), whose value at y = z_i is not looked at (SEDD).

The bound of both is the score entropy (SEDD, section 3.2), which for the score of mu is UDLM's NELBO:

    sigma'_t / N sum over y != z_i of r(y) phi(s(y) / r(y)),   phi(u) = u - 1 - log u,   r the score if mu were [y = x]

phi is computed from log s - log r. So it loses no digits where r is 1e9 or 1e-9, as it is at N = 50,257 and sigma 1e-4.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffrwkv.diffusion.noise import uniform
from diffrwkv.diffusion.processes.base import (
    LogLinear,
    Schedule,
    Scored,
    Vocabulary,
    check_outputs,
    check_schedule,
    check_two_tokens,
    finite_rate,
    log,
    start_keys,
)

OUTPUTS = ("leave_one_out", "score")


@dataclasses.dataclass(frozen=True)
class Uniform(Scored):
    """The process; how its output is read is told above.

    Attributes:
      vocabulary: of the tokens; noise is uniform over all but the mask.
      schedule: 1 - alpha_t is the probability that a token is drawn anew at t.
      output: "leave_one_out" or "score".
      clock: as of `Scored`.
    """

    needs_time: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    vocabulary: Vocabulary
    schedule: Schedule = LogLinear()
    output: str = "leave_one_out"
    clock: str = "t"

    def __post_init__(self):
        check_schedule(self)
        check_outputs(self, OUTPUTS)
        check_two_tokens(self)

    def noise(self, key, x, t, free=None):
        """Every token drawn anew with probability 1 - alpha_t, independently, by chance the same one."""
        when, what = jax.random.split(key)
        drawn = uniform(when, x.shape) < self.schedule.mask_probability(t)
        if free is not None:
            drawn &= free
        return jnp.where(drawn, self.vocabulary.uniform(what, x.shape).astype(x.dtype), x)

    def nats(self, output, x, z, t):
        schedule = self.schedule
        return self.nats_at(output, x, z, schedule.alpha(t), schedule.mask_probability(t), schedule.dsigma(t))

    def nats_at(self, output, x, z, alpha, drawn, rate):
        """`nats` under any schedule: of alpha_t, 1 - alpha_t and sigma'_t, of the shapes that times may have."""
        log_k = self._log_k(alpha, drawn)

        @jax.checkpoint  # or its backward pass would keep several arrays of the output's size
        def entropy(output, log_k):
            log_s = self._log_score(output, z, log_k)
            of_truth, known = jax.nn.softplus(log_k), z == x
            log_r = jnp.where(self._at(x), of_truth[..., None], 0.0) - jnp.where(known, of_truth, 0.0)[..., None]
            difference = jnp.where(self._at(z) | self._is_mask, 0.0, log_s - log_r)
            return (jnp.exp(log_r) * (jnp.expm1(difference) - difference)).sum(axis=-1)

        return finite_rate(rate) / self.vocabulary.real * entropy(output, log_k)

    # --- sampling ---------------------------------------------------------------------------------

    def start(self, keys, canvas, blank):
        draw = jax.vmap(jax.vmap(lambda key: self.vocabulary.uniform(key, ())))
        return jnp.where(blank, draw(start_keys(keys, canvas.shape[1])), canvas)

    def predict(self, output, z, t):
        log_k = self._log_k_at(t)
        if self.output == "leave_one_out":
            log_mu = self.vocabulary.without_mask(output)
        else:
            log_s = self._log_score(output, z, log_k)
            log_mu = jnp.log(self._before(log_s, self.schedule.alpha(t), self.schedule.mask_probability(t)))
        return jax.nn.log_softmax(log_mu + jnp.where(self._at(z), jax.nn.softplus(log_k)[..., None], 0.0), axis=-1)

    def forward_law(self, log_p, s):
        kept, drawn = (log(f(s))[..., None] for f in (self.schedule.alpha, self.schedule.mask_probability))
        law = jnp.logaddexp(kept + log_p, drawn - math.log(self.vocabulary.real))
        return self.vocabulary.without_mask(law)

    def reverse_law(self, log_p, z, t, s):
        """Proportional to q(z_t | z_s) sum over x of q(z_s | x) p(x | z_t) / q(z_t | x)."""
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        m_t, m_s = self.schedule.mask_probability(t), self.schedule.mask_probability(s)
        log_n, here = math.log(self.vocabulary.real), self._at(z)
        log_mu = log_p - jnp.where(here, jax.nn.softplus(self._log_k(alpha_t, m_t))[..., None], 0.0)
        from_x = log(alpha_s)[..., None] + log_mu
        from_noise = (log(m_s) - log_n)[..., None] + jax.nn.logsumexp(log_mu, axis=-1, keepdims=True)
        drawn = log(m_t - m_s)[..., None] - log_n
        to_z = jnp.where(here, jnp.logaddexp(log(alpha_t)[..., None], drawn), drawn)
        return jax.nn.log_softmax(self.vocabulary.without_mask(jnp.logaddexp(from_x, from_noise) + to_z), axis=-1)

    def score(self, output, z, t):
        return self._log_score(output, z, self._log_k_at(t))

    def euler_law(self, output, z, t, s):
        share = ((t - s) * finite_rate(self.schedule.dsigma(t)))[..., None] / self.vocabulary.real
        away = jnp.where(self._at(z), 0.0, share * jnp.exp(self.score(output, z, t)))
        stay = jnp.maximum(1 - away.sum(axis=-1, keepdims=True), 0.0)
        law = jnp.where(self._at(z), stay, away)
        return law / law.sum(axis=-1, keepdims=True)

    def analytic_law(self, output, z, t, s):
        if self.output == "leave_one_out":  # the same; a score says little where little is left of the text
            return jnp.exp(self.reverse_law(self.predict(output, z, t), z, t, s))
        kept = jnp.exp(self.schedule.sigma(s) - self.schedule.sigma(t))
        drawn = -jnp.expm1(self.schedule.sigma(s) - self.schedule.sigma(t))
        law = self._before(self.score(output, z, t), kept, drawn)
        law *= jnp.where(self._at(z), kept[..., None], 0.0) + drawn[..., None] / self.vocabulary.real
        return law / law.sum(axis=-1, keepdims=True)

    # --- parts ------------------------------------------------------------------------------------

    @property
    def _is_mask(self):
        return self.vocabulary.is_mask()

    def _at(self, x):
        """bool [B, L, V]: which token x is."""
        return self.vocabulary.one_hot(x, bool)

    def _log_k(self, alpha, drawn):
        """log N alpha_t / (1 - alpha_t), finite."""
        return math.log(self.vocabulary.real) + log(alpha) - log(drawn)

    def _log_k_at(self, t):
        return self._log_k(self.schedule.alpha(t), self.schedule.mask_probability(t))

    def _log_score(self, output, z, log_k):
        """log s(y), float32 [B, L, V], 0 at z, -inf at the mask."""
        if self.output == "score":
            return jnp.where(self._at(z), 0.0, self.vocabulary.without_mask(output))
        log_mu = jax.nn.log_softmax(self.vocabulary.without_mask(output), axis=-1)
        likelihood = jax.nn.softplus(log_k[..., None] + log_mu)
        return self.vocabulary.without_mask(likelihood - jnp.take_along_axis(likelihood, z[..., None], axis=-1))

    def _before(self, log_s, kept, drawn):
        """The ratios p_s(y) / p_t(z_i), up to a factor, s being that before a part 1 - kept = `drawn` of the noise.

        Undoing that part gives (s(y) - drawn mean(s)) / kept. At s = 0 the ratios are those of mu. A learned score may
        ask for negative ones, which are cut off. The differences are taken from s - 1, which may be small.
        """
        kept, drawn = kept[..., None], drawn[..., None]
        top = jnp.maximum(log_s.max(axis=-1, keepdims=True), 0.0)
        scale = jnp.exp(jnp.maximum(log_s, 0.0) - top)
        excess = jnp.where(self._is_mask, 0.0, jnp.sign(log_s) * -jnp.expm1(-jnp.abs(log_s)) * scale)  # s - 1, scaled
        mean = excess.sum(axis=-1, keepdims=True) / self.vocabulary.real
        ratios = jnp.maximum(kept * jnp.exp(log_s - top) + drawn * (excess - mean), 0.0)
        ratios = jnp.where(self._is_mask, 0.0, ratios)
        nothing = ratios.max(axis=-1, keepdims=True) == 0  # all of the noise, and a flat score
        return jnp.where(nothing & ~self._is_mask, 1.0, ratios)
