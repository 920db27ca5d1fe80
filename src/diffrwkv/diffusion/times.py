"""When to look at a sequence: the times of a training step, and numbers that are spread evenly over several looks."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.array_types import Array, OneKey
from diffrwkv.checks import BELOW_ONE


def sample_times(key: OneKey, n: int, *, low_discrepancy: bool = True, eps: float = 1e-3) -> Array:
    """Times in [eps, 1], one per sequence, or per block of one (MDLM, arXiv 2406.07524; its `_sample_t`).

    Low-discrepancy times are one uniform draw inside each of n equal strata: every single time is
    still uniform, and together they cover the interval evenly, which lowers the variance of the
    mean loss. This holds only over all n, so ask for the *global* batch at once and hand the parts
    to devices and microbatches. Times ascend with the index; sequences in a shuffled batch need no
    further shuffling.

    Args:
      key: one key of `jax.random.key`.
      n: how many: the sequences in the global batch, or their blocks.
      low_discrepancy: False gives independent times.
      eps: the earliest time. The loss's weight is about 1/t, so this bounds its variance.

    Returns:
      float32 [n].
    """
    if n < 1:
        raise ValueError(f"sample_times needs at least one sequence, got n = {n}.")
    return times_from_uniform(jax.random.uniform(key, (n,)), low_discrepancy=low_discrepancy, eps=eps)


def times_from_uniform(u: Array, *, low_discrepancy: bool = True, eps: float = 1e-3) -> Array:
    """`sample_times` for given uniform numbers `u`, float32 [n] in [0, 1)."""
    BELOW_ONE.check("eps", eps)
    if low_discrepancy:
        u = (u + jnp.arange(u.shape[0], dtype=u.dtype)) / u.shape[0]
    return (1 - eps) * u + eps


def early_times(u: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(times in [eps, 1], their weights), float32 of u's shape, from uniform numbers in [0, 1).

    The weighed mean is that over uniform times. The variance of a bound's integrand is about (1 - t) / t, so the mean
    varies least for a density that goes as its root; that of u^2, 1 / (2 root t), is near to it.
    """
    root = math.sqrt(eps) + (1 - math.sqrt(eps)) * u
    return np.square(root).astype(np.float32), (2 * root / (1 + math.sqrt(eps))).astype(np.float32)


def strata(rng: np.random.Generator, draws: int, parts: int) -> np.ndarray:
    """float64 [draws, parts] in [0, 1): each column has two numbers in each of draws / 2 equal parts of the interval.

    The rows 2 s and 2 s + 1 are drawn alike, from the same parts, which are in an order of its own in each column. Each
    number is uniform; that the two of a part differ tells how much the mean over all rows varies.
    """
    number = draws // 2
    order = rng.permuted(np.tile(np.arange(number), (parts, 1)), axis=1).T
    return (np.repeat(order, 2, axis=0) + rng.random((draws, parts))) / number
