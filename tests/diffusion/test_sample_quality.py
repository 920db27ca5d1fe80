"""The statistics of samples against their definitions, word for word and in float64."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrwkv.diffusion.sample_quality import (
    distinct,
    longest_repeat,
    repetition,
    sample_quality,
    self_bleu,
    unigram_entropy,
)

TOKENS = np.array([[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 2, 3]], np.int32)


def grams(row, n):
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


def naive_entropy(row):
    return -sum(c / len(row) * math.log(c / len(row)) for c in Counter(row).values())


def naive_distinct(rows, n):
    every = [g for row in rows for g in grams(row, n)]
    return len(set(every)) / len(every)


def naive_repetition(row, n):
    return 1 - len(set(grams(row, n))) / len(grams(row, n)) if len(row) >= n else math.nan


def naive_longest_repeat(row):
    return next((n for n in range(len(row) - 1, 0, -1) if len(set(grams(row, n))) < len(grams(row, n))), 0)


def naive_bleu(row, references):
    """NLTK's `sentence_bleu` under its `method1`, for four orders of equal weight."""
    if len(row) < 4:
        return math.nan
    total = 0.0
    for n in (1, 2, 3, 4):
        counts = Counter(grams(row, n))
        clipped = sum(min(c, max(Counter(grams(r, n))[g] for r in references)) for g, c in counts.items())
        if n == 1 and clipped == 0:
            return 0.0
        total += math.log((clipped or 0.1) / sum(counts.values())) / 4
    nearest = min((abs(len(r) - len(row)), len(r)) for r in references)[1]
    return math.exp(total + min(0.0, 1 - nearest / len(row)))


few = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(st.lists(st.one_of(few, st.lists(st.integers(-9, 10**6), min_size=1, max_size=40)), min_size=2, max_size=7))
def test_every_statistic_is_its_definition(rows):
    samples = [np.array(row) for row in rows]
    np.testing.assert_allclose(unigram_entropy(samples), [naive_entropy(row) for row in rows], atol=1e-12)
    np.testing.assert_array_equal(longest_repeat(samples), [naive_longest_repeat(row) for row in rows])
    for n in range(1, min(6, max(map(len, rows)) + 1)):
        assert distinct(samples, n) == naive_distinct(rows, n)
        np.testing.assert_allclose(repetition(samples, n), [naive_repetition(row, n) for row in rows], atol=1e-12)
    if max(map(len, rows)) >= 4:
        expected = [naive_bleu(row, rows[:i] + rows[i + 1 :]) for i, row in enumerate(rows)]
        np.testing.assert_allclose(self_bleu(samples), expected, rtol=1e-10)


def test_statistics_of_many_tokens():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, size=n) for n in (1, 63, 100, 257)]
    rows.append(np.tile(rng.integers(0, 50, size=60), 3))
    rows.append(np.zeros(130, int))
    expected = [naive_longest_repeat(row.tolist()) for row in rows]
    assert longest_repeat(rows).tolist() == expected and expected[-2:] == [120, 129]
    told = [row.tolist() for row in rows]
    np.testing.assert_allclose(
        self_bleu(rows), [naive_bleu(row, told[:i] + told[i + 1 :]) for i, row in enumerate(told)], rtol=1e-10
    )


def test_self_bleu_is_that_of_nltk():
    """`sentence_bleu(others, sample, smoothing_function=SmoothingFunction().method1)` of NLTK 3.10.4."""
    texts = [
        "the cat sat on the mat and the cat slept",
        "a cat sat on a mat and a dog slept well",
        "the dog sat on the log",
        "colourless green ideas sleep",
    ]
    ids = {}
    rows = [[ids.setdefault(word, len(ids)) for word in text.split()] for text in texts]
    np.testing.assert_allclose(self_bleu(rows), [0.1708078834478534, 0.12760671487807074, 0.2295748846661433, 0])
    np.testing.assert_allclose(self_bleu([rows[0]] * 3), 1)


def test_entropy_by_hand():
    np.testing.assert_allclose(unigram_entropy(TOKENS), [0, math.log(2), math.log(4)], atol=1e-12)
    np.testing.assert_allclose(unigram_entropy([[7, 7, 7, 9]]), [0.75 * math.log(4 / 3) + 0.25 * math.log(4)])


def test_distinct_by_hand():
    assert distinct(TOKENS, 1) == 4 / 12
    assert distinct(TOKENS, 2) == 5 / 9  # 00, 01, 10, 12, 23
    assert distinct(TOKENS, 4) == 1
    assert distinct(np.repeat(TOKENS[2:], 5, axis=0), 2) == 3 / 15, "samples that are one and the same"
    assert distinct([[0, 1], [2, 3]], 2) == 1, "no n-gram reaches from one sample into the next"


def test_repetition_by_hand():
    np.testing.assert_allclose(repetition(TOKENS, 2), [2 / 3, 1 / 3, 0])
    assert longest_repeat(TOKENS).tolist() == [3, 2, 0]
    assert np.isnan(repetition([[1, 2], [1, 1, 1]], 3)).tolist() == [True, False]


def test_all_statistics_of_a_set():
    result = sample_quality(TOKENS, np.array([4.0, 8.0, 12.0]), [4, 4, 4], [8, 8, 8])
    assert result["nll"] == pytest.approx(2)
    assert result["nll_se"] == pytest.approx(1 / math.sqrt(3))  # of 1, 2 and 3 nats per token
    assert result["ppl"] == pytest.approx(math.exp(2))
    assert result["ppl_se"] == pytest.approx(math.exp(2) / math.sqrt(3))
    assert result["nats_per_character"] == pytest.approx(1)
    assert result["nats_per_character_se"] == pytest.approx(0.5 / math.sqrt(3))
    entropies = [0, math.log(2), math.log(4)]
    assert result["entropy"] == pytest.approx(math.log(2))
    assert result["entropy_se"] == pytest.approx(np.std(entropies, ddof=1) / math.sqrt(3))
    assert [result[f"distinct_{n}"] for n in (1, 2, 3, 4)] == [4 / 12, 5 / 9, 5 / 6, 1]
    assert result["longest_repeat"] == pytest.approx(5 / 3) and result["repetition_4"] == 0
    rows = TOKENS.tolist()
    bleu = [naive_bleu(row, rows[:i] + rows[i + 1 :]) for i, row in enumerate(rows)]
    assert result["self_bleu"] == pytest.approx(np.mean(bleu))
    uneven = sample_quality([[1, 2, 3, 4, 5], [1]], [6.0, 3.0], [2, 1], [5, 1])
    assert uneven["nll"] == pytest.approx(3) and uneven["nll_se"] == pytest.approx(0, abs=1e-9)
    assert uneven["repetition_4"] == 0 and uneven["repetition_4_se"] is None  # one sample alone has it


def test_bad_input_is_refused():
    for tokens in ([0, 1], [[0.5, 1.5]], np.zeros((0, 3), np.int32), np.zeros((2, 0), np.int32), [[1], []]):
        with pytest.raises(ValueError, match="integers"):
            unigram_entropy(tokens)
    for n in (0, 5):
        for statistic in (distinct, repetition):
            with pytest.raises(ValueError, match="between 1 and the length of a sample, 4"):
                statistic(TOKENS, n)
    with pytest.raises(ValueError, match="at least 2"):
        sample_quality(TOKENS[:1], [1.0], [4], [4])
    with pytest.raises(ValueError, match="at least 2"):
        self_bleu(TOKENS[:1])
    with pytest.raises(ValueError, match="one shape"):
        sample_quality(TOKENS, [1.0, 2.0], [4, 4], [4, 4])
