"""How good samples are: what a judge makes of them, how varied they are, and how often they repeat themselves.

No one number tells. A sampler that repeats itself pleases a judge, so a perplexity is read beside the entropy and the
repetition, and all of them beside those of as much real text: closest to it is best, not lowest. Even together they do
not prove that a text makes sense (arXiv 2606.08417): look at the samples too.

Samples are rows of integers of any lengths, an array [N, L] or a list of [L_i]. An n-gram lies within one sample.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from diffrwkv.diffusion.likelihood import Likelihood, metrics

NGRAMS = (1, 2, 3, 4)
Rows = ArrayLike | Sequence[ArrayLike]


def unigram_entropy(samples: Rows) -> np.ndarray:
    """Entropy of the histogram of each sample's own tokens (as in arXiv 2409.02908).

    Returns:
      float64 [N], nats per token, between 0 (one token, repeated) and log L.
    """
    shares = [np.unique(row, return_counts=True)[1] / row.size for row in _checked(samples)]
    return np.array([-(share * np.log(share)).sum() for share in shares])


def distinct(samples: Rows, n: int) -> float:
    """Distinct n-grams of a set of samples over all of its n-grams (Li et al., arXiv 1510.03055).

    It falls with the number of samples and their length, so compare sets of the same size.

    Args:
      n: tokens in an n-gram, at least 1; one sample at least has as many.

    Returns:
      a share in (0, 1].
    """
    rows = _checked(samples)
    _check_n(rows, n)
    ngrams = np.concatenate([_ngrams(row, n) for row in rows])
    return len(np.unique(ngrams, axis=0)) / len(ngrams)


def repetition(samples: Rows, n: int = 4) -> np.ndarray:
    """rep-n of each sample: the share of its n-grams that stood in it before (Welleck et al., arXiv 1908.04319).

    Returns:
      float64 [N] in [0, 1), 0 where no n-gram stands twice; NaN for a sample of fewer than n tokens.
    """
    rows = _checked(samples)
    _check_n(rows, n)
    out = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        if ngrams := len(row) - n + 1 if len(row) >= n else 0:
            out[i] = 1 - len(np.unique(_ngrams(row, n), axis=0)) / ngrams
    return out


def longest_repeat(samples: Rows) -> np.ndarray:
    """Tokens of the longest string that stands twice in a sample, where the two may overlap: int64 [N]."""
    return np.array([_longest_repeat(row) for row in _checked(samples)])


def _longest_repeat(row: np.ndarray) -> int:
    """By names of strings: two places have one name where the same string of the length begins at both."""
    names = [np.unique(row, return_inverse=True)[1]]  # of lengths 1, 2, 4, ..., as long as one repeats
    if len(np.unique(names[0])) == len(row):
        return 0
    while True:
        longer = _joined(names[-1], names[-1], 2 ** (len(names) - 1))
        if len(np.unique(longer)) == len(longer):
            break
        names.append(longer)
    longest, found = 2 ** (len(names) - 1), names[-1]
    for power in range(len(names) - 2, -1, -1):  # as many as still repeat are added, from the largest power down
        longer = _joined(found, names[power], longest)
        if len(np.unique(longer)) < len(longer):
            longest, found = longest + 2**power, longer
    return longest


def _joined(first: np.ndarray, second: np.ndarray, at: int) -> np.ndarray:
    """Names of the strings that are one of `first` and, `at` places on, one of `second`; none may begin anywhere."""
    number = min(len(first), len(second) - at)
    if number < 1:
        return np.zeros(0, np.int64)
    pairs = np.stack([first[:number], second[at : at + number]], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)


def self_bleu(samples: Rows, n: int = 4) -> np.ndarray:
    """BLEU of each sample with all others as its references (Zhu et al., Texygen, arXiv 1802.01886): int [N] -> [N].

    The geometric mean of the clipped precisions of 1- to n-grams, times the penalty of a sample that is shorter than
    the reference next to it in length. A precision whose n-grams match nowhere counts 0.1 of them, as Texygen has it
    (`method1` of NLTK's smoothing); a sample without a token of the others' has 0. High where samples are alike. It
    rises with the number of samples.

    Returns:
      float64 [N] in [0, 1]; NaN for a sample of fewer than n tokens, which is a reference still.
    """
    rows = _checked(samples)
    _check_n(rows, n)
    if len(rows) < 2:
        raise ValueError("One sample has no others to be compared with: self-BLEU needs at least 2.")
    lengths = np.array([len(row) for row in rows])
    long = lengths >= n
    logs = np.where(_matched(rows, 1) > 0, 0.0, -np.inf)
    for size in range(1, n + 1):
        matched = _matched(rows, size)[long]
        logs[long] += np.log(np.where(matched > 0, matched, 0.1) / (lengths[long] - size + 1)) / n
    penalty = np.zeros(len(rows))
    for i in np.flatnonzero(long):
        others = np.delete(lengths, i)
        nearest = others[np.lexsort((others, abs(others - lengths[i])))[0]]
        penalty[i] = min(0.0, 1 - nearest / lengths[i])
    return np.where(long, np.exp(logs + penalty), np.nan)


def _matched(rows: Sequence[np.ndarray], n: int) -> np.ndarray:
    """How many n-grams of each row are matched, each as often as in the other row that has it most: int64 [N]."""
    ngrams = [_ngrams(row, n) for row in rows]
    names = np.unique(np.concatenate(ngrams), axis=0, return_inverse=True)[1].reshape(-1)
    owner = np.repeat(np.arange(len(rows)), [len(x) for x in ngrams])
    pairs, counts = np.unique(np.stack([names, owner], axis=1), axis=0, return_counts=True)
    order = np.lexsort((-counts, pairs[:, 0]))  # of each n-gram the rows that have it, those that have it most first
    (name, row), counts = pairs[order].T, counts[order]
    first = np.searchsorted(name, name)  # where an n-gram's rows begin
    most, is_most = counts[first], np.arange(len(name)) == first
    second = np.minimum(first + 1, len(name) - 1)
    others = np.where(is_most, np.where(name[second] == name, counts[second], 0) * (second > first), most)
    return np.bincount(row, np.minimum(counts, others), minlength=len(rows)).astype(np.int64)


def sample_quality(samples: Rows, nats: ArrayLike, tokens: ArrayLike, characters: ArrayLike) -> dict[str, float | None]:
    """Every statistic of a set of samples.

    Args:
      samples: N rows, at least 2, none empty; one of `max(NGRAMS)` tokens at least.
      nats: [N], -log p of each under the judge.
      tokens: [N], the judge's tokens that these are the sum over; they need not be those of `samples`.
      characters: [N], of the same text.

    Returns:
      {"nll": nats per token of the judge, "nll_se": its standard error over samples, "ppl": exp(nll), "ppl_se": ppl *
      nll_se, "nats_per_character", "nats_per_character_se", "entropy": mean `unigram_entropy`, "entropy_se",
      "distinct_1", ..., "distinct_4", "repetition_4", "repetition_4_se", "longest_repeat", "longest_repeat_se",
      "self_bleu"}; means over the samples that have the statistic.
    """
    rows = _checked(samples)
    if len(rows) < 2:
        raise ValueError("One sample has no standard error: the statistics need at least 2.")
    if {np.shape(x) for x in (nats, tokens, characters)} != {(len(rows),)}:
        raise ValueError(f"nats, tokens and characters must be of one shape, [{len(rows)}], a number for each sample.")
    most = max(NGRAMS)
    judged, spelt = _ratio(nats, tokens), _ratio(nats, characters)
    ppl = metrics(judged[0])["ppl"]
    return {
        "nll": judged[0],
        "nll_se": judged[1],
        "ppl": ppl,
        "ppl_se": ppl * judged[1],
        "nats_per_character": spelt[0],
        "nats_per_character_se": spelt[1],
        **_mean("entropy", unigram_entropy(rows)),
        **{f"distinct_{n}": distinct(rows, n) for n in NGRAMS},
        **_mean(f"repetition_{most}", repetition(rows, most)),
        **_mean("longest_repeat", longest_repeat(rows)),
        "self_bleu": float(np.nanmean(self_bleu(rows, most))),
    }


def _ratio(nats: ArrayLike, units: ArrayLike) -> tuple[float, float]:
    """(All nats over all units, its standard error over samples)."""
    likelihood = Likelihood()
    likelihood.add(nats, units)
    result = likelihood.result()
    return result["nelbo"], result["nelbo_se_text"]


def _mean(name: str, values: np.ndarray) -> dict[str, float | None]:
    """The mean of those that are numbers, and its standard error; None for the error of one."""
    values = values[~np.isnan(values)]
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}_se": error}


def _ngrams(row: np.ndarray, n: int) -> np.ndarray:
    """int [L - n + 1, n], or [0, n] of a row that is shorter."""
    if len(row) < n:
        return np.zeros((0, n), row.dtype)
    return np.lib.stride_tricks.sliding_window_view(row, n)


def _check_n(rows: Sequence[np.ndarray], n: int) -> None:
    longest = max(map(len, rows))
    if not 1 <= n <= longest:
        raise ValueError(f"n must be between 1 and the length of a sample, {longest}, got {n}.")


def _checked(samples: Rows) -> list[np.ndarray]:
    rows = [np.asarray(row) for row in samples]  # type: ignore[union-attr]
    if not rows or any(row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer) for row in rows):
        told = ", ".join(sorted({f"{row.dtype} {list(row.shape)}" for row in itertools.islice(rows, 3)})) or "none"
        raise ValueError(f"Samples must be integers [N, L] or N rows of them, none empty, got {told}.")
    return rows
