"""Duo's curriculum (arXiv 2506.10892, section 4; s-sahoo/duo 7c9b498): uniform noise as the argmax of Gaussian noise.

Of a Gaussian latent w = a x + s epsilon, x one-hot, a^2 + s^2 = 1, the argmax z is x with a certain probability and any
other token with equal ones: a uniform-state process, with

    alpha = N / (N - 1) (E[Phi(xi + a / s)^(N - 1)] - 1 / N),    xi standard normal, Phi its distribution.

So a network can be shown softmax(w / tau) in place of z while the loss stays that of z. Early in training, where tau is
large, w tells more than z does, and the gradient varies less.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr

from diffrwkv.checks import COUNT, POSITIVE, Range
from diffrwkv.diffusion.deferred import at
from diffrwkv.diffusion.objectives.base import Diffusion, Loss
from diffrwkv.diffusion.processes import Uniform

GAMMA = Range(-30, 30)
# Of the quadrature: even points, which for a Gaussian weight are exact once they are as near as the step of Phi^(N - 1)
# is wide: alpha is right to 1e-6 at 50,257 tokens, where 100 Gauss-Hermite nodes err by 3e-4, and in the slope by 1 %.
XI = np.linspace(-9, 9, 401)
WEIGHTS = np.exp(-(XI**2) / 2) / np.exp(-(XI**2) / 2).sum()


def alpha_of_gamma(gamma, n):
    """(alpha, 1 - alpha, d alpha / d gamma) of the argmax of n Gaussians, float32 of gamma's shape.

    Args:
      gamma: -log of the signal's power over the noise's, -2 log(a / s) in the words above.
      n: how many tokens there are.
    """
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    ratio = jnp.exp(-gamma / 2)
    x = ratio[..., None] + jnp.asarray(XI, jnp.float32)
    log_phi = jnp.where(x > 0, jnp.log1p(-ndtr(-x)), log_ndtr(x))  # log_ndtr alone loses its digits where Phi is near 1
    scale = n / (n - 1)
    right = scale * (jnp.exp((n - 1) * log_phi) @ weights - 1 / n)
    wrong = scale * (-jnp.expm1((n - 1) * log_phi) @ weights)
    density = jnp.exp((n - 2) * log_phi - jnp.square(x) / 2) / np.sqrt(2 * np.pi)
    slope = scale * (n - 1) * (density @ weights)  # by the ratio
    return right, wrong, -slope * ratio / 2


@dataclasses.dataclass(frozen=True)
class Duo(Diffusion):
    """UDLM's bound; for the first steps of training with the curriculum that is told above.

    Attributes:
      curriculum_steps: how many; the authors take half of all.
      tau_start, tau_end: temperature of the soft input at the first and the last of them, log-linear between.
      gamma_min, gamma_max: gamma goes from the one at t = 0 to the other at t = 1.
    """

    process: Uniform
    curriculum_steps: int = 250
    tau_start: float = 0.1
    tau_end: float = 0.01
    gamma_min: float = -3.5
    gamma_max: float = -1.75

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.process, Uniform) or self.process.output != "leave_one_out":
            raise TypeError(f"Duo needs uniform noise and the leave-one-out law, not {self.process}.")
        COUNT.check("curriculum_steps", self.curriculum_steps)
        for name in ("tau_start", "tau_end"):
            POSITIVE.check(name, getattr(self, name))
        for name in ("gamma_min", "gamma_max"):
            GAMMA.check(name, getattr(self, name))
        if self.gamma_min >= self.gamma_max:
            raise ValueError(f"gamma_min must be below gamma_max, got {self.gamma_min} and {self.gamma_max}.")

    @property
    def validation(self):
        """UDLM's bound."""
        fields = (f.name for f in dataclasses.fields(Diffusion))
        return Diffusion(**{name: getattr(self, name) for name in fields}).validation

    def loss(self, denoise_fn, key, x, t, valid=None, *, state=None, step=None) -> Loss:
        """As of `Objective`, with soft tokens, float [B, L, V], for the network; without a step, UDLM's as it is."""
        if step is None:
            return super().loss(denoise_fn, key, x, t, valid, state=state)
        process, length = self.process, x.shape[1]
        k_plain, k_soft = jax.random.split(key)
        z, counted = self.noised(k_plain, x, t, valid)
        now = step < self.curriculum_steps
        alpha, drawn, rate = (self.layout.of_tokens(a, length) for a in self.curriculum(t))
        latent, soft = self.soft_noise(k_soft, x, self.layout.of_tokens(t, length), step)
        latent = jnp.where(counted, latent, x)
        z = jnp.where(now, latent, z)
        seen = jnp.where((now & counted)[..., None], soft, process.vocabulary.one_hot(z))

        output = self.output(denoise_fn, x, seen, process.condition(self.told(t, now)))
        process.vocabulary.check_output(output, x.shape)
        of_tokens, schedule = self.layout.of_tokens(t, length), process.schedule
        plain = schedule.alpha(of_tokens), schedule.mask_probability(of_tokens), schedule.dsigma(of_tokens)
        law = (jnp.where(now, a, b) for a, b in zip((alpha, drawn, rate), plain, strict=True))

        def nats(output, x, z, alpha, drawn, rate, _):
            return process.nats_at(output, x, z, alpha, drawn, rate)

        token_nats = at(output, counted, nats, x, z, *law)
        return Loss(token_nats.sum(axis=1), counted.sum(axis=1, dtype=jnp.int32), token_nats, counted)

    def gamma(self, t):
        """Linear in t."""
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t

    def curriculum(self, t):
        """(alpha_t, 1 - alpha_t, sigma'_t) of the curriculum, float32 of t's shape."""
        alpha, drawn, slope = alpha_of_gamma(self.gamma(t), self.process.vocabulary.real)
        return alpha, drawn, -slope * (self.gamma_max - self.gamma_min) / alpha

    def told(self, t, now):
        """What the network is told as the time: where the schedule keeps as many tokens as the curriculum, if `now`."""
        schedule = self.process.schedule
        return jnp.where(now, jnp.clip(schedule.time(self.curriculum(t)[1]), self.time_eps, 1), t)

    def soft_noise(self, key, x, t, step):
        """(argmax w int32 [B, L], softmax(w / tau) float32 [B, L, V]) of the latent w at the times t of tokens."""
        vocabulary, gamma = self.process.vocabulary, self.gamma(t)[..., None]
        signal, noise = (jnp.sqrt(jax.nn.sigmoid(sign * gamma)) for sign in (-1, 1))
        latent = signal * vocabulary.one_hot(x) + noise * jax.random.normal(key, (*x.shape, vocabulary.size))
        latent = vocabulary.without_mask(latent)
        done = jnp.clip(step / self.curriculum_steps, 0, 1)
        tau = jnp.exp((1 - done) * math.log(self.tau_start) + done * math.log(self.tau_end))
        return jnp.argmax(latent, axis=-1).astype(x.dtype), jax.nn.softmax(latent / tau, axis=-1)
