import math

import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion.objectives import Diffusion, Objective
from diffrwkv.diffusion.processes import Masked, NextToken, Vocabulary
from diffrwkv.diffusion.sample_quality import distinct, judge_nats, sample_quality, unigram_entropy

TOKENS = np.array([[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 2, 3]], np.int32)


def test_entropy_by_hand():
    np.testing.assert_allclose(unigram_entropy(TOKENS), [0, math.log(2), math.log(4)], atol=1e-12)
    np.testing.assert_allclose(unigram_entropy([[7, 7, 7, 9]]), [0.75 * math.log(4 / 3) + 0.25 * math.log(4)])


def test_distinct_by_hand():
    assert distinct(TOKENS, 1) == 4 / 12
    assert distinct(TOKENS, 2) == 5 / 9  # 00, 01, 10, 12, 23
    assert distinct(TOKENS, 4) == 1
    assert distinct(np.repeat(TOKENS[2:], 5, axis=0), 2) == 3 / 15, "samples that are one and the same"
    assert distinct([[0, 1], [2, 3]], 2) == 1, "no n-gram reaches from one sample into the next"


def test_the_judge_scores_each_token_from_those_before_it():
    """A judge for whom a token is the one before it, plus one, with probability 1/2; the mask 4 starts a text."""
    table = jnp.full((5, 5), jnp.log(0.5 / 3)).at[jnp.arange(5), (jnp.arange(5) + 1) % 5].set(jnp.log(0.5))
    seen = []

    def predict(tokens, t):
        seen.append(tokens)
        return table[tokens]

    nats = judge_nats(Objective(NextToken(Vocabulary(5, 4))), predict, jnp.array([[0, 1, 2], [0, 0, 0]]))
    assert seen[0].tolist() == [[4, 0, 1], [4, 0, 0]]
    np.testing.assert_allclose(nats, [3 * math.log(2), math.log(2) + 2 * math.log(6)], rtol=1e-6)
    with pytest.raises(ValueError, match="must be autoregressive"):
        judge_nats(Diffusion(Masked(Vocabulary(5, 4))), predict, jnp.zeros((1, 3), jnp.int32))


def test_all_statistics_of_a_set():
    result = sample_quality(TOKENS, np.array([4.0, 8.0, 12.0]))
    assert result["nll"] == pytest.approx(2)
    assert result["nll_se"] == pytest.approx(1 / math.sqrt(3))  # of 1, 2 and 3 nats per token
    assert result["ppl"] == pytest.approx(math.exp(2))
    assert result["ppl_se"] == pytest.approx(math.exp(2) / math.sqrt(3))
    entropies = [0, math.log(2), math.log(4)]
    assert result["entropy"] == pytest.approx(math.log(2))
    assert result["entropy_se"] == pytest.approx(np.std(entropies, ddof=1) / math.sqrt(3))
    assert [result[f"distinct_{n}"] for n in (1, 2, 3, 4)] == [4 / 12, 5 / 9, 5 / 6, 1]


def test_bad_input_is_refused():
    for tokens in ([0, 1], [[0.5, 1.5]], np.zeros((0, 3), np.int32), np.zeros((2, 0), np.int32)):
        with pytest.raises(ValueError, match="integers"):
            unigram_entropy(tokens)
    for n in (0, 5):
        with pytest.raises(ValueError, match="between 1 and the length of a sample, 4"):
            distinct(TOKENS, n)
    with pytest.raises(ValueError, match="at least 2"):
        sample_quality(TOKENS[:1], [1.0])
    with pytest.raises(ValueError, match="one shape"):
        sample_quality(TOKENS, [1.0, 2.0])
