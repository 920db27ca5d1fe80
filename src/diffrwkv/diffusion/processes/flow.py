"""A flow from Gaussian noise to one-hot vectors, all of it continuous (FLM, arXiv 2602.16813).

The path is z = (1 - gamma) noise + gamma onehot(x). Drawn evenly, gamma would spend nearly all of its time where a
token is either lost or certain: at 50,000 tokens that changes between .65 and .87. So time is what changes evenly: t is
the probability that argmax z is the token, less what chance alone gives, which for N tokens is

    t = N / (N - 1) (E[Phi(xi + gamma / (1 - gamma))^(N - 1)] - 1 / N),    xi standard normal, Phi its distribution.

gamma(t) is the inverse of that, from a table. Our own code, by the formulas of david3684/flm d89a02f (utils.py).
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.array_types import Array
from diffrwkv.diffusion.cross_entropy import cross_entropy
from diffrwkv.diffusion.processes.base import Process, Vocabulary, check_two_tokens


@dataclasses.dataclass(frozen=True)
class Flow(Process):
    """The process. z is float32 [B, L, V], 0 at the mask; the output is logits of p(x_i | z).

    Time runs as in the paper and in no other process here: t = 0 is noise, t = 1 clean text.
    """

    needs_time: ClassVar[bool] = True
    bound: ClassVar[bool] = False

    vocabulary: Vocabulary

    def __post_init__(self):
        check_two_tokens(self)

    def gamma(self, t: Array) -> Array:
        """The share of the clean token in z at the time t, of t's shape, float32."""
        times, gammas = _gammas(self.vocabulary.real)
        return jnp.interp(t, times, gammas)

    def start(self, keys: Array) -> Array:
        """z at t = 0, float32 [..., V], from keys [...], one for each position."""
        flat = jax.vmap(lambda key: jax.random.normal(key, (self.vocabulary.size,)))(keys.reshape(-1))
        return self._without_mask(flat).reshape(*keys.shape, -1)

    def noise(self, key, x, t, free=None):
        """(1 - gamma) noise + gamma onehot(x): float32 [B, L, V]; onehot(x) where a token must stay."""
        clean, gamma = self.vocabulary.one_hot(x), self.gamma(t)[..., None]
        noise = self._without_mask(jax.random.normal(key, clean.shape))
        z = (1 - gamma) * noise + gamma * clean
        return z if free is None else jnp.where(free[..., None], z, clean)

    def nats(self, output, x, z, t):
        """-log p(x_i | z) of every token, whatever t: a loss, and no bound."""
        del z, t
        return cross_entropy(output, x, self.vocabulary.mask_id)

    def _without_mask(self, noise):
        return jnp.where(self.vocabulary.is_mask(), 0.0, noise)


@functools.cache
def _gammas(n, *, points=10_000, nodes=100):
    """(times, gammas), float32 of one length: the even steps of gamma from 0 to 1 that float32 times tell apart.

    Lines between them are right to 2e-5. The integral is right to 1e-7 at 256 tokens and to 1e-4 at 50,000, its
    Gauss-Hermite rule being as coarse as the authors': so a network of theirs is shown what it was trained on.
    """
    gammas = np.linspace(0, 1, points)
    xi, weights = np.polynomial.hermite_e.hermegauss(nodes)
    x = xi + (gammas[:-1] / (1 - gammas[:-1]))[:, None]
    tail = np.array([math.erfc(y) for y in (np.abs(x) * 0.5**0.5).ravel()]).reshape(x.shape) / 2
    log_phi = np.where(x < 0, np.log(np.maximum(tail, 1e-300)), np.log1p(-tail))
    right = np.exp((n - 1) * log_phi) @ (weights / weights.sum())
    by_chance = right[0]  # 1 / n, as the rule has it
    times = np.append((right - by_chance) / (1 - by_chance), 1.0).astype(np.float32)
    last = np.append(np.diff(times) > 0, True)  # of those that float32 takes for one
    return times[last], gammas[last].astype(np.float32)
