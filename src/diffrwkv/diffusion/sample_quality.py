"""How good samples are: what an autoregressive judge makes of them, and how varied they are.

No one number tells. A sampler that repeats itself pleases the judge, so a perplexity is read beside the entropy and the
share of distinct n-grams, and all of them beside those of as much real text: closest to it is best, not lowest. Even
together they do not prove that a text makes sense (arXiv 2606.08417): look at the samples too.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from diffrwkv.array_types import Array, Logits, Times, Tokens
from diffrwkv.diffusion.likelihood import Likelihood
from diffrwkv.diffusion.objectives import Objective

NGRAMS = (1, 2, 3, 4)


def judge_nats(objective: Objective, predict_fn: Callable[[Tokens, Times], Logits], tokens: Tokens) -> Array:
    """-log p(x) of each sample under an autoregressive model, the judge. Put it inside `jax.jit`.

    Args:
      objective: the judge's, of the process `NextToken`.
      predict_fn: (tokens int32 [B, L], t float32 [B]) -> logits float [B, L, V], those at i from the tokens up to i.
      tokens: int32 [B, L], the samples, in the judge's own token ids.

    Returns:
      float32 [B], nats, summed over a sample's L tokens.

    Raises:
      ValueError: the objective is of another process, whose loss depends on noise.
    """
    if not objective.causal:
        process = type(objective.process).__name__
        raise ValueError(f"A judge must be autoregressive: {process} has a bound that depends on noise.")
    return objective.loss(predict_fn, jax.random.key(0), tokens, jnp.zeros(tokens.shape[0])).nats


def unigram_entropy(tokens: ArrayLike) -> np.ndarray:
    """Entropy of the histogram of each sample's own tokens (as in arXiv 2409.02908).

    Args:
      tokens: int [N, L].

    Returns:
      float64 [N], nats per token, between 0 (one token, repeated) and log L.
    """
    tokens = _check(tokens)
    shares = [np.unique(row, return_counts=True)[1] / row.size for row in tokens]
    return np.array([-(share * np.log(share)).sum() for share in shares])


def distinct(tokens: ArrayLike, n: int) -> float:
    """Distinct n-grams of a set of samples over all of its n-grams (Li et al., arXiv 1510.03055).

    It falls with the number of samples and their length, so compare sets of the same size. An n-gram lies within one
    sample.

    Args:
      tokens: int [N, L].
      n: tokens in an n-gram, 1 to L.

    Returns:
      a share in (0, 1].
    """
    tokens = _check(tokens)
    if not 1 <= n <= tokens.shape[1]:
        raise ValueError(f"n must be between 1 and the length of a sample, {tokens.shape[1]}, got {n}.")
    ngrams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
    return len(np.unique(ngrams, axis=0)) / len(ngrams)


def sample_quality(tokens: ArrayLike, nats: ArrayLike) -> dict[str, float]:
    """Every statistic of a set of samples.

    Args:
      tokens: int [N, L], N of at least 2 for the standard errors.
      nats: [N], from `judge_nats`.

    Returns:
      {"nll": nats per token under the judge, "nll_se": its standard error over samples, "ppl": exp(nll), "ppl_se":
      ppl * nll_se, "entropy": mean `unigram_entropy`, "entropy_se": its standard error, "distinct_1", ...,
      "distinct_4"}.
    """
    tokens = _check(tokens)
    if len(tokens) < 2:
        raise ValueError("One sample has no standard error: the statistics need at least 2.")
    likelihood = Likelihood()
    likelihood.add(nats, np.full(len(tokens), tokens.shape[1]))
    judged = likelihood.result()
    entropy = unigram_entropy(tokens)
    return {
        "nll": judged["nelbo"],
        "nll_se": judged["nelbo_se_text"],
        "ppl": judged["ppl"],
        "ppl_se": judged["ppl"] * judged["nelbo_se_text"],
        "entropy": float(entropy.mean()),
        "entropy_se": float(entropy.std(ddof=1)) / math.sqrt(len(entropy)),
        **{f"distinct_{n}": distinct(tokens, n) for n in NGRAMS},
    }


def _check(tokens: ArrayLike) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"Samples must be integers [N, L] with N, L >= 1, got {tokens.dtype} {tokens.shape}.")
    return tokens
