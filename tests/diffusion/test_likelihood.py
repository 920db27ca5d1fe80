import json
import math

import numpy as np
import pytest

from diffrwkv.diffusion.likelihood import Likelihood, metrics


def test_one_converter():
    numbers = metrics(2 * math.log(2), characters_per_token=4.0)
    assert numbers == pytest.approx({"nelbo": 2 * math.log(2), "bpc": 0.5, "ppl": 4.0})
    assert metrics(1e4)["ppl"] == math.inf
    with pytest.raises(ValueError, match="positive"):
        metrics(1.0, 0.0)


def test_batches_and_padding_do_not_matter():
    random = np.random.default_rng(0)
    nats, tokens = random.gamma(2.0, size=(3, 10)) * 50, np.asarray([20] * 9 + [7])
    whole, parts = Likelihood(), Likelihood()
    for draw in range(3):
        whole.add(nats[draw], tokens, draw=draw)
        parts.add(nats[draw, :6], tokens[:6], draw=draw)
        parts.add(np.append(nats[draw, 6:], [123.0, 5.0]), np.append(tokens[6:], [0, 0]), draw=draw)
    result = whole.result(2.0)
    assert result == parts.result(2.0)
    assert result["nelbo"] == pytest.approx(nats.sum() / 3 / tokens.sum(), rel=1e-12)
    assert result["ppl"] == pytest.approx(math.exp(result["nelbo"])) and result["tokens"] == 187
    assert (result["draws"], result["sequences"]) == (3, 10)
    assert json.loads(json.dumps(result)) == result
    assert {"nelbo", "nelbo_se_draws", "nelbo_se_text", "bpc", "ppl", "draws", "tokens"} <= set(result)


def test_accumulates_in_float64():
    likelihood = Likelihood()
    likelihood.add(np.asarray([1e8], np.float32), [1])
    likelihood.add(np.ones(1000, np.float32), np.ones(1000, np.int32))
    assert likelihood.result()["nelbo"] * 1001 == pytest.approx(1e8 + 1000, abs=1e-3)


def test_the_two_errors_are_what_they_say():
    # Sequences differ by 3 nats per token, draws of one sequence by 1; 16 sequences of 10 tokens, 4
    # draws.
    random = np.random.default_rng(1)
    means, noise_error, text_error = [], [], []
    texts = random.normal(size=16) * 3
    for _ in range(400):
        likelihood = Likelihood()
        for draw in range(4):
            likelihood.add(10 * (5 + texts + random.normal(size=16)), np.full(16, 10), draw=draw)
        result = likelihood.result()
        means.append(result["nelbo"])
        noise_error.append(result["nelbo_se_draws"])
        text_error.append(result["nelbo_se_text"])
    assert np.std(means) == pytest.approx(1 / math.sqrt(64), rel=0.15)
    assert np.mean(noise_error) == pytest.approx(np.std(means), rel=0.15)
    assert np.mean(text_error) == pytest.approx(texts.std(ddof=1) / 4, rel=0.1)


@pytest.mark.parametrize(("sequences", "draws"), [(3, 2), (20, 2), (200, 4)])
def test_what_even_times_explain_is_no_error(sequences, draws):
    """Sequences of their own level and length, a large part of the time, and a rest whose size depends on the time."""
    random = np.random.default_rng(sequences)
    level, tokens = random.normal(size=sequences) * 40, random.integers(5, 15, size=sequences)
    means, errors, independent = [], [], []
    for _ in range(400):
        likelihood, other = Likelihood(), Likelihood()
        for draw in range(draws):
            t = (random.permutation(sequences) + random.random(sequences)) / sequences
            nats = level + 100 * np.sqrt(t) + 6 * (0.2 + t) * random.normal(size=sequences)
            likelihood.add(nats, tokens, draw=draw, times=t)
            other.add(nats, tokens, draw=draw)
        means.append(likelihood.result()["nelbo"])
        errors.append(likelihood.result()["nelbo_se_draws"])
        independent.append(other.result()["nelbo_se_draws"])
    root = np.sqrt(np.mean(np.square(errors)))
    # three sequences are too few to fit a time's part: then the error may only be too large
    assert root > 0.9 * np.std(means) and (sequences == 3 or root < 1.1 * np.std(means))
    assert sequences == 3 or np.mean(independent) > 2 * np.std(means)


def test_one_draw_has_no_error_over_draws_and_one_sequence_none_over_texts():
    likelihood = Likelihood()
    likelihood.add([1.0, 2.0, 4.0], [1, 1, 1])
    result = likelihood.result()
    assert result["nelbo_se_draws"] is None
    assert result["nelbo_se_text"] == pytest.approx(np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    likelihood = Likelihood()
    for draw in range(2):
        likelihood.add([1.0 + draw], [1], draw=draw)
    result = likelihood.result()
    assert result["nelbo_se_text"] is None and result["nelbo_se_draws"] == pytest.approx(0.5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no draw"):
        Likelihood().result()
    likelihood = Likelihood()
    with pytest.raises(ValueError, match="one shape"):
        likelihood.add([1.0], [1, 2])
    with pytest.raises(ValueError, match="one shape"):
        likelihood.add([1.0], [1], times=[0.1, 0.2])
    likelihood.add([1.0], [1], draw=0)
    likelihood.add([1.0], [2], draw=1)
    with pytest.raises(ValueError, match="same sequences"):
        likelihood.result()
    empty = Likelihood()
    empty.add([0.0], [0])
    with pytest.raises(ValueError, match="empty"):
        empty.result()
