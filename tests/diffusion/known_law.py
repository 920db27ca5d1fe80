"""A text of few tokens whose law is known, and what a perfect network says of it under each process, by enumeration."""

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np

from diffrwkv.diffusion.processes import Masked, Process, Uniform, Vocabulary
from diffrwkv.diffusion.schedules import Linear, LogLinear, Schedule

SYMBOLS, MASK = 3, 1  # the mask is neither the first nor the last token
REAL = [0, 2, 3]
VOCABULARY = Vocabulary(SYMBOLS + 1, MASK)
LEAST = 1e-30  # instead of 0, where a log is taken


# The law of a token that is pure noise, [V], by the kind of process; written here anew, not taken from the process.
NOISE = {
    Masked: np.eye(SYMBOLS + 1)[MASK],
    Uniform: np.where(np.arange(SYMBOLS + 1) == MASK, 0.0, 1 / SYMBOLS),
}


def noise_of(process: Process):
    return NOISE[type(process)]


def forward(process, alpha, xp=np):
    """q(z_t | x) of one token at alpha_t, [..., SYMBOLS, V]: x are the real tokens."""
    shown = np.eye(SYMBOLS + 1)[REAL]
    alpha = xp.asarray(alpha)[..., None, None]
    return alpha * shown + (1 - alpha) * noise_of(process)


def reverse(process, p, z, alpha_t, alpha_s):
    """q(z_s | z_t) by Bayes' rule, where each clean token has the law p [..., V]: float64 [..., V]."""
    q_t, q_s = forward(process, alpha_t), forward(process, alpha_s)
    share = alpha_t / alpha_s
    q_ts = share * np.eye(SYMBOLS + 1) + (1 - share) * noise_of(process)  # on real tokens q_t = q_s q_ts
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

    def likelihoods(self, process, alpha, xp=np):
        """q(z | x) of each position apart, [X, Z, L]."""
        q = forward(process, alpha, xp)
        column = {token: i for i, token in enumerate(REAL)}
        rows = np.vectorize(column.get)(self.texts)
        return q[rows[:, None, :], self.states[None]]

    def leave_one_out(self, process, alpha, xp=np):
        """p(x_i = y | z without its token i), [Z, L, V], 0 at the mask; all 0 for a z that cannot be."""
        q = self.likelihoods(process, alpha, xp)
        laws = []
        for i in range(self.length):
            others = math.prod(q[:, :, j] for j in range(self.length) if j != i) * xp.ones_like(q[:, :, 0])
            weights = self.p[:, None] * others
            law = xp.stack([weights[self.texts[:, i] == y].sum(axis=0) for y in range(SYMBOLS + 1)], axis=-1)
            laws.append(law / xp.maximum(law.sum(axis=-1, keepdims=True), LEAST))
        return xp.stack(laws, axis=1)

    def output(self, process, alpha, xp=np):
        """What the perfect network says at each state, [Z, L, V]; at the mask something that must not matter."""
        mu = xp.maximum(self.leave_one_out(process, alpha, xp), LEAST)
        if isinstance(process, Masked):
            output = xp.log(mu) + (math.log(SYMBOLS) if process.output == "score" else 0.25)
        elif process.output == "score":
            here = alpha * mu + (1 - alpha) / SYMBOLS
            output = xp.log(here) - xp.log(xp.take_along_axis(here, self.states[..., None], axis=-1))
        else:
            output = xp.log(mu) + 0.25
        return xp.where(np.arange(SYMBOLS + 1) == MASK, 3.0, output)

    def posterior(self, process, alpha):
        """p(x_i = y | z), [Z, L, V], NaN for a z that cannot be."""
        joint = self.p[:, None] * self.likelihoods(process, alpha).prod(axis=-1)
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
        alpha = np.asarray(process.schedule.alpha(jnp.asarray(times, jnp.float32)), np.float64)
        kappa = np.ones(len(times) - 1) if kappa is None else np.asarray(kappa, np.float64)
        w = noise_of(process)[self.states].prod(axis=1)
        for alpha_t, alpha_s, k in zip(alpha[:-1], alpha[1:], kappa, strict=True):
            p = np.nan_to_num(self.posterior(process, alpha_t))
            back = reverse(process, p, self.states, alpha_t, alpha_s)
            w = w @ self._of_states(k * back + (1 - k) * (p[..., REAL] @ forward(process, alpha_s)))
        p = np.nan_to_num(self.posterior(process, alpha[-1]))
        if most_probable:
            p = np.eye(SYMBOLS + 1)[p.argmax(axis=-1)]
        return w @ self._of_states(p)

    def _of_states(self, laws):
        """The law of the state [Z, Z] from that of each position [Z, L, V]."""
        return math.prod(laws[:, i, self.states[:, i]] for i in range(self.length))

    def information(self, process, alpha):
        """How many nats z_t tells of x, I(x; z_t)."""
        q = self.likelihoods(process, alpha).prod(axis=-1)
        joint = self.p[:, None] * q
        ratio = np.where(joint > 0, q / np.maximum(self.p @ q, 1e-300), 1.0)
        return (joint * np.log(ratio)).sum()

    def denoise(self, process):
        """The perfect network, (z, t [B]) -> float32 [B, L, V], for a batch at one time."""

        def network(z, t):
            return self.output(process, process.schedule.alpha(t[0]), jnp)[self.index(z)]

        return network


@functools.cache
def known_law(length, seed=0):
    return KnownLaw(length, seed)


def processes(schedule: Schedule | None = None) -> dict[str, Process]:
    """Every process with a schedule, under each meaning of its output.

    A score needs something to be left of the text at t = 1.
    """
    some, none = schedule or LogLinear(1e-4), schedule or Linear()
    return {
        "masked, mean": Masked(VOCABULARY, none, "mean"),
        "masked, score": Masked(VOCABULARY, none, "score"),
        "uniform, leave one out": Uniform(VOCABULARY, none, "leave_one_out"),
        "uniform, score": Uniform(VOCABULARY, some, "score"),
    }
