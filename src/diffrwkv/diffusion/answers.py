"""How likely an answer is under masked diffusion, by masking an exact number of its tokens.

Of the n tokens of an answer l are masked, which l being uniform among all choices of l, and l itself among 1, ..., n:

    -log p(answer | query) <= E[n / l * sum over the masked i of -log p(x_i | what is not masked)]

This is the bound of masked diffusion over all times in (0, 1], without the noise of how many masks a time brings
(LLaDA, arXiv 2502.09992, appendix A; Ou et al., arXiv 2406.03736). It is the mean of the chain rule over all orders of
the tokens too (Hoogeboom et al., arXiv 2110.02037), and so a bound whatever a network is told of the time: here that of
the share l / n. Of block diffusion each block is masked so by itself, given the clean text before it.

LLaDA's code draws l for b rows as round(k + j * n / b), modulo n: its rounding makes some l up to three times as likely
as others. Here l is floor(n v) + 1 for a v that is uniform in [0, 1), and spread evenly over the draws of an answer.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffrwkv.array_types import Array, PartTimes, PerToken, Positions, Tokens
from diffrwkv.diffusion.cross_entropy import cross_entropy
from diffrwkv.diffusion.deferred import at, deferring
from diffrwkv.diffusion.layouts import Layout
from diffrwkv.diffusion.processes import Masked
from diffrwkv.diffusion.samplers.common import time_of
from diffrwkv.diffusion.times import strata


class Masks(NamedTuple):
    """What to mask of an answer of n tokens in each of D passes; the mean over passes of what they weigh is the bound.

    Attributes:
      masked: bool [D, n].
      weights: float32 [D, n], of a masked token's -log p; 0 where it is not masked.
      shares: float32 [D, P], how much of each part of the answer is masked.
      exact: the passes are all that there are: nothing is drawn.
    """

    masked: np.ndarray
    weights: np.ndarray
    shares: np.ndarray
    exact: bool


def most_exact(draws: int) -> int:
    """The largest part of an answer, in tokens, all of whose masks are no more than `draws`: 2^n - 1 of them."""
    return (draws + 1).bit_length() - 1


def how_many(n: int, v: np.ndarray) -> np.ndarray:
    """l, int64, for v in [0, 1): each of 1, ..., n as likely as another."""
    return np.floor(v * n).astype(np.int64) + 1


def masks(sizes: list[int], draws: int, rng: np.random.Generator) -> Masks:
    """Masks of an answer whose parts (blocks; one, if the text is not cut) have so many tokens each.

    All of them, if they are no more than `draws`, each with its probability: then the bound is without noise. Else
    `draws` of them, an even number: 2 s and 2 s + 1 are drawn alike, as `strata` has it.
    """
    largest, columns, parts = max(sizes), range(sum(sizes)), []
    exact = largest <= most_exact(draws)
    number = 2**largest - 1 if exact else draws
    masked, weights = np.zeros((number, len(columns)), bool), np.zeros((number, len(columns)), np.float32)
    v = None if exact else strata(rng, draws, len(sizes))
    for part, n in enumerate(sizes):
        here = slice(sum(sizes[:part]), sum(sizes[:part]) + n)
        if v is None:
            chosen = (np.arange(1, number + 1)[:, None] >> np.arange(n)) % 2 == 1
            chosen[2**n - 1 :] = False  # another part has more of them
            size = chosen.sum(axis=1)
            weight = number * np.array([0.0, *(1 / (k * math.comb(n, k)) for k in range(1, n + 1))])[size]
        else:
            size = how_many(n, v[:, part])
            rank = rng.random((draws, n)).argsort(axis=1).argsort(axis=1)
            chosen = rank < size[:, None]
            weight = n / size
        masked[:, here], weights[:, here] = chosen, np.where(chosen, weight[:, None], 0)
        parts.append(size / n)
    return Masks(masked, weights, np.stack(parts, axis=1).astype(np.float32), exact)


def answer_nats(
    process: Masked,
    layout: Layout,
    denoise_fn: Callable[..., Any],
    x: Tokens,
    masked: Positions,
    weights: PerToken,
    shares: PartTimes,
) -> Array:
    """The weighed nats of what is masked, float32 [B].

    Args:
      denoise_fn: as of `Objective.loss`.
      x: int32 [B, L], clean tokens.
      masked: bool [B, L].
      weights: float32 [B, L].
      shares: float32 in [0, 1], what is masked of each text, or of each of its parts, in the shape of `layout.times`.
    """
    schedule = process.schedule
    t = time_of(schedule, schedule.mask_probability(jnp.ones_like(shares)) * shares)
    z = jnp.where(masked, jnp.asarray(process.mask_id, x.dtype), x)
    output = deferring(denoise_fn)(z, process.condition(t), **layout.network(x))
    process.vocabulary.check_output(output, x.shape)
    nats = at(output, masked, lambda output, x, _: cross_entropy(output, x, process.mask_id), x)
    return (weights * nats).sum(axis=1)
