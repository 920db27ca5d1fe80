"""A text of few tokens whose law is known, and what a perfect network says of it under each process, by enumeration."""

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np

from diffrwkv.diffusion.processes import Hybrid, Masked, Process, TokenMasked, Uniform, Vocabulary
from diffrwkv.diffusion.processes.masked import Absorbing
from diffrwkv.diffusion.schedules import Linear, LogLinear, Schedule

SYMBOLS, MASK = 3, 1  # the mask is neither the first nor the last token
REAL = [0, 2, 3]
VOCABULARY = Vocabulary(SYMBOLS + 1, MASK)
LEAST = 1e-30  # instead of 0, where a log is taken


# What noise does to each token, by the kind of process; written here anew, not taken from the process. At a time t:
# (how likely a token of each id is left as it was [..., V], the law of what is put in its place times how likely that
# is [..., V, V], or [..., 1, V] where it does not depend on the token).


def alpha_of(process, t, xp):
    alpha = process.schedule.alpha(jnp.asarray(t, jnp.float32))
    return alpha if xp is jnp else np.asarray(alpha, np.float64)


def noise_towards(law):
    """Of a process that draws a token anew from one law, [V], with probability 1 - alpha_t."""

    def noise(process, t, xp):
        alpha = alpha_of(process, t, xp)[..., None]
        return alpha * np.ones(SYMBOLS + 1), ((1 - alpha) * law)[..., None, :]

    return noise


def noise_of_each_token(process, t, xp):
    masked = (1 - process.eps) * xp.asarray(t)[..., None] ** np.asarray(process.powers)
    return 1 - masked, masked[..., None] * ALL_MASKS


def mixed_noise(process, t, xp):
    a = alpha_of(process, t, xp)[..., None]
    anew = process.uniform_share / (1 - process.uniform_share) * (4 * a * (1 - a)) ** (process.gamma / 2)
    return a / (1 + anew) * np.ones(SYMBOLS + 1), (((1 - a) * ALL_MASKS + anew * EVEN) / (1 + anew))[..., None, :]


ALL_MASKS = np.eye(SYMBOLS + 1)[MASK]
EVEN = np.where(np.arange(SYMBOLS + 1) == MASK, 0.0, 1 / SYMBOLS)
NOISE = {
    Masked: noise_towards(ALL_MASKS),
    Uniform: noise_towards(EVEN),
    TokenMasked: noise_of_each_token,
    Hybrid: mixed_noise,
}


def noise_of(process: Process):
    """The law of a token that is pure noise, [V]."""
    law = NOISE[type(process)](process, np.float64(1), np)[1][0]
    return law / law.sum()


def forward(process, t, xp=np):
    """q(z_t | x) of one token, [..., SYMBOLS, V]: x are the real tokens."""
    kept, noise = NOISE[type(process)](process, t, xp)
    return (kept[..., None] * np.eye(SYMBOLS + 1) + noise)[..., np.asarray(REAL), :]


def reverse(process, p, z, t, s):
    """q(z_s | z_t) by Bayes' rule, where each clean token has the law p [..., V]: float64 [..., V]."""
    q_t, q_s = forward(process, t), forward(process, s)
    (kept_t, noise_t), (kept_s, noise_s) = (NOISE[type(process)](process, time, np) for time in (t, s))
    share = (kept_t / kept_s)[:, None]
    q_ts = share * np.eye(SYMBOLS + 1) + noise_t - share * noise_s  # then q_t = q_s q_ts
    weights = p[..., REAL] / np.maximum(q_t.T[z], LEAST)
    return (weights @ q_s) * q_ts.T[z]


class KnownLaw:
    """A joint law of `length` tokens, and its perfect network.

    Attributes:
      p: float64 [X], of the texts.
      texts: int [X, L], real tokens.
      states: int [Z, L], everything that a noised text may be.
    """

    def __init__(self, length, seed=0):
        rng = np.random.default_rng(seed)
        self.length = length
        self.texts = np.asarray(list(itertools.product(REAL, repeat=length)))
        self.states = np.asarray(list(itertools.product(range(SYMBOLS + 1), repeat=length)))
        p = rng.gamma(0.7, size=len(self.texts)) + 0.05
        self.p = p / p.sum()

    @property
    def entropy(self):
        return -(self.p * np.log(self.p)).sum()

    def index(self, z):
        """The number of the state z [..., L], on NumPy or JAX."""
        return z @ (SYMBOLS + 1) ** np.arange(self.length - 1, -1, -1)

    def likelihoods(self, process, t, xp=np):
        """q(z | x) of each position apart, [X, Z, L]."""
        q = forward(process, t, xp)
        column = {token: i for i, token in enumerate(REAL)}
        rows = np.vectorize(column.get)(self.texts)
        return q[rows[:, None, :], self.states[None]]

    def leave_one_out(self, process, t, xp=np):
        """p(x_i = y | z without its token i), [Z, L, V], 0 at the mask; all 0 for a z that cannot be."""
        q = self.likelihoods(process, t, xp)
        laws = []
        for i in range(self.length):
            others = math.prod(q[:, :, j] for j in range(self.length) if j != i) * xp.ones_like(q[:, :, 0])
            weights = self.p[:, None] * others
            law = xp.stack([weights[self.texts[:, i] == y].sum(axis=0) for y in range(SYMBOLS + 1)], axis=-1)
            laws.append(law / xp.maximum(law.sum(axis=-1, keepdims=True), LEAST))
        return xp.stack(laws, axis=1)

    def output(self, process, t, xp=np):
        """What the perfect network says at each state, [Z, L, V]; at the mask something that must not matter."""
        mu = xp.maximum(self.leave_one_out(process, t, xp), LEAST)
        score = getattr(process, "output", None) == "score"
        if isinstance(process, Masked) and score:
            output = xp.log(mu) + math.log(SYMBOLS)
        elif isinstance(process, Absorbing):  # a mask is more likely over some tokens than over others
            masked = NOISE[type(process)](process, t, xp)[1][..., MASK]
            output = xp.log(mu) + xp.log(masked)
        elif score:
            alpha = alpha_of(process, t, xp)
            here = alpha * mu + (1 - alpha) / SYMBOLS
            output = xp.log(here) - xp.log(xp.take_along_axis(here, self.states[..., None], axis=-1))
        else:
            output = xp.log(mu) + 0.25
        return xp.where(np.arange(SYMBOLS + 1) == MASK, 3.0, output)

    def posterior(self, process, t):
        """p(x_i = y | z), [Z, L, V], NaN for a z that cannot be."""
        joint = self.p[:, None] * self.likelihoods(process, t).prod(axis=-1)
        with np.errstate(invalid="ignore"):
            joint /= joint.sum(axis=0)
        shown = self.texts[:, None, :, None] == np.arange(SYMBOLS + 1)
        return (joint[..., None, None] * shown).sum(axis=0)

    def sampled(self, process, times, kappa=None, most_probable=False):
        """The law of what steps with the perfect network make of noise, [Z]: all positions drawn apart in each.

        Args:
          times: of the steps, beginning with 1. The last pass draws from p(x | z), or takes the most probable token.
          kappa: of each step, as `Psi` has it; None is 1.
        """
        times = np.asarray(times, np.float64)
        kappa = np.ones(len(times) - 1) if kappa is None else np.asarray(kappa, np.float64)
        w = noise_of(process)[self.states].prod(axis=1)
        for t, s, k in zip(times[:-1], times[1:], kappa, strict=True):
            p = np.nan_to_num(self.posterior(process, t))
            back = reverse(process, p, self.states, t, s)
            w = w @ self._of_states(k * back + (1 - k) * (p[..., REAL] @ forward(process, s)))
        p = np.nan_to_num(self.posterior(process, times[-1]))
        if most_probable:
            p = np.eye(SYMBOLS + 1)[p.argmax(axis=-1)]
        return w @ self._of_states(p)

    def _of_states(self, laws):
        """The law of the state [Z, Z] from that of each position [Z, L, V]."""
        return math.prod(laws[:, i, self.states[:, i]] for i in range(self.length))

    def information(self, process, t):
        """How many nats z_t tells of x, I(x; z_t)."""
        q = self.likelihoods(process, t).prod(axis=-1)
        joint = self.p[:, None] * q
        ratio = np.where(joint > 0, q / np.maximum(self.p @ q, 1e-300), 1.0)
        return (joint * np.log(ratio)).sum()

    def denoise(self, process):
        """The perfect network, (z, t [B]) -> float32 [B, L, V], for a batch at one time."""

        def network(z, t):
            return self.output(process, t[0], jnp)[self.index(z)]

        return network


@functools.cache
def known_law(length, seed=0):
    return KnownLaw(length, seed)


def processes(schedule: Schedule | None = None) -> dict[str, Process]:
    """Every process whose reverse is known, under each meaning of its output.

    A score needs something to be left of the text at t = 1.
    """
    some, none = schedule or LogLinear(1e-4), schedule or Linear()
    return {
        "masked, mean": Masked(VOCABULARY, none, "mean"),
        "masked, score": Masked(VOCABULARY, none, "score"),
        "uniform, leave one out": Uniform(VOCABULARY, none, "leave_one_out"),
        "uniform, score": Uniform(VOCABULARY, some, "score"),
        "token masked": TokenMasked(VOCABULARY, (0.7, 5.0, 1.0, 1.6), eps=1e-6),
        "hybrid": Hybrid(VOCABULARY, none, uniform_share=0.3),
    }
