"""Noise schedules: the probability alpha_t that a token still shows at time t in [0, 1].

t = 0 is clean text, t = 1 all masks.

Each schedule is a frozen dataclass of closed forms that lose no digits near t = 0 or t = 1 in
float32. `t` is a float array of any shape, and every method returns that shape and dtype.
"""

import abc
import dataclasses
import math

import jax.numpy as jnp

from diffrwkv.array_types import Array
from diffrwkv.checks import BELOW_ONE, Range

_HALF_PI = math.pi / 2
POWER = Range(1e-2, 1e2)
SIGMA = Range(1e-9, 1e4)


class Schedule(abc.ABC):
    """What the forward process, the objective and the samplers need to know of a schedule."""

    @abc.abstractmethod
    def alpha(self, t: Array) -> Array:
        """Probability that a token still shows at time t."""

    @abc.abstractmethod
    def mask_probability(self, t: Array) -> Array:
        """1 - alpha_t, accurate where it is small."""

    @abc.abstractmethod
    def dalpha(self, t: Array) -> Array:
        """d alpha_t / dt, at most 0."""

    @abc.abstractmethod
    def weight(self, t: Array) -> Array:
        """-alpha'_t / (1 - alpha_t): how much a masked token's -log p counts in the NELBO.

        MDLM, arXiv 2406.07524, its continuous-time bound.
        """

    @abc.abstractmethod
    def time(self, mask_probability: Array) -> Array:
        """The t at which tokens are masked with this probability: `mask_probability`'s inverse."""

    def sigma(self, t: Array) -> Array:
        """Total noise, -log alpha_t, which MDLM gives its network. Infinite where alpha_t = 0."""
        masked, alpha = self.mask_probability(t), self.alpha(t)
        return jnp.where(masked < 0.5, -jnp.log1p(-masked), -jnp.log(alpha))

    def dsigma(self, t: Array) -> Array:
        """Noise rate, d sigma_t / dt."""
        return -self.dalpha(t) / self.alpha(t)


@dataclasses.dataclass(frozen=True)
class LogLinear(Schedule):
    """alpha_t = 1 - (1 - eps) t: MDLM's default, from SEDD (arXiv 2310.16834)."""

    eps: float = 1e-3

    def __post_init__(self):
        BELOW_ONE.check("a schedule's eps", self.eps)

    def alpha(self, t):
        return (1 - t) + self.eps * t

    def mask_probability(self, t):
        return (1 - self.eps) * t

    def dalpha(self, t):
        return jnp.full_like(t, -(1 - self.eps))

    def weight(self, t):
        return jnp.reciprocal(t)

    def time(self, mask_probability):
        return mask_probability / (1 - self.eps)


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """alpha_t = 1 - t: `LogLinear` with eps = 0 (MD4, arXiv 2406.04329)."""

    def alpha(self, t):
        return 1 - t

    def mask_probability(self, t):
        return jnp.asarray(t)

    def dalpha(self, t):
        return jnp.full_like(t, -1)

    def weight(self, t):
        return jnp.reciprocal(t)

    def time(self, mask_probability):
        return jnp.asarray(mask_probability)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """alpha_t = eps + (1 - eps) cos(pi t / 2): `cosine` of MDLM's code (noise_schedule.py)."""

    eps: float = 1e-3

    def __post_init__(self):
        BELOW_ONE.check("a schedule's eps", self.eps)

    def alpha(self, t):
        return self.eps + (1 - self.eps) * jnp.sin(_HALF_PI * (1 - t))

    def mask_probability(self, t):
        return (1 - self.eps) * 2 * jnp.square(jnp.sin(_HALF_PI / 2 * t))

    def dalpha(self, t):
        return -(1 - self.eps) * _HALF_PI * jnp.sin(_HALF_PI * t)

    def weight(self, t):
        return _HALF_PI / jnp.tan(_HALF_PI / 2 * t)

    def time(self, mask_probability):
        return 2 / _HALF_PI * jnp.arcsin(jnp.sqrt(mask_probability / (2 * (1 - self.eps))))


@dataclasses.dataclass(frozen=True)
class CosineSquared(Schedule):
    """alpha_t = eps + (1 - eps) cos^2(pi t / 2): `cosinesqr` of MDLM's code (noise_schedule.py)."""

    eps: float = 1e-3

    def __post_init__(self):
        BELOW_ONE.check("a schedule's eps", self.eps)

    def alpha(self, t):
        return self.eps + (1 - self.eps) * jnp.square(jnp.sin(_HALF_PI * (1 - t)))

    def mask_probability(self, t):
        return (1 - self.eps) * jnp.square(jnp.sin(_HALF_PI * t))

    def dalpha(self, t):
        return -(1 - self.eps) * math.pi * jnp.sin(_HALF_PI * t) * jnp.sin(_HALF_PI * (1 - t))

    def weight(self, t):
        return math.pi * jnp.sin(_HALF_PI * (1 - t)) / jnp.sin(_HALF_PI * t)

    def time(self, mask_probability):
        return jnp.arcsin(jnp.sqrt(mask_probability / (1 - self.eps))) / _HALF_PI


@dataclasses.dataclass(frozen=True)
class MaskGIT(Schedule):
    """alpha_t = 1 - cos(pi/2 (1 - t)): MaskGIT's, MD4's `cosine` (arXiv 2406.04329)."""

    def alpha(self, t):
        return 2 * jnp.square(jnp.sin(_HALF_PI / 2 * (1 - t)))

    def mask_probability(self, t):
        return jnp.sin(_HALF_PI * t)

    def dalpha(self, t):
        return -_HALF_PI * jnp.sin(_HALF_PI * (1 - t))

    def weight(self, t):
        return _HALF_PI * jnp.sin(_HALF_PI * (1 - t)) / jnp.sin(_HALF_PI * t)

    def time(self, mask_probability):
        return jnp.arcsin(mask_probability) / _HALF_PI


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha_t = 1 - t^power (MD4, arXiv 2406.04329)."""

    power: float = 2.0

    def __post_init__(self):
        POWER.check("the polynomial schedule's power", self.power)

    def alpha(self, t):
        return -jnp.expm1(self.power * jnp.log(t))

    def mask_probability(self, t):
        return jnp.power(t, self.power)

    def dalpha(self, t):
        return -self.power * jnp.power(t, self.power - 1)

    def weight(self, t):
        return self.power * jnp.reciprocal(t)

    def time(self, mask_probability):
        return jnp.power(mask_probability, 1 / self.power)


@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
    """sigma_t = sigma_min^(1-t) sigma_max^t (SEDD, arXiv 2310.16834, section 5; MDLM's
    noise_schedule.py).

    At t = 0 a token is already masked with probability about sigma_min, and the NELBO leaves that
    part out.
    """

    sigma_min: float = 1e-3
    sigma_max: float = 20.0

    def __post_init__(self):
        SIGMA.check("the geometric schedule's sigma_min", self.sigma_min)
        SIGMA.check("the geometric schedule's sigma_max", self.sigma_max)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"Geometric needs sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}.")

    @property
    def _log_ratio(self):
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t):
        return self.sigma_min * jnp.exp(self._log_ratio * t)

    def dsigma(self, t):
        return self._log_ratio * self.sigma(t)

    def alpha(self, t):
        return jnp.exp(-self.sigma(t))

    def mask_probability(self, t):
        return -jnp.expm1(-self.sigma(t))

    def dalpha(self, t):
        return -self.dsigma(t) * self.alpha(t)

    def weight(self, t):
        return self.dsigma(t) / jnp.expm1(self.sigma(t))

    def time(self, mask_probability):
        return jnp.log(-jnp.log1p(-mask_probability) / self.sigma_min) / self._log_ratio


SCHEDULES = {
    "loglinear": LogLinear,
    "linear": Linear,
    "cosine": Cosine,
    "cosine_squared": CosineSquared,
    "maskgit": MaskGIT,
    "polynomial": Polynomial,
    "geometric": Geometric,
}
