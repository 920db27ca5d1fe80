"""What a causal judge makes of texts: a known law, windows, the interface of Hugging Face, and what is refused."""

import contextlib
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrwkv
from diffrwkv import config, judging, run, sharding
from diffrwkv.causal_lm import CausalLM
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.diffusion.sample_quality import distinct, unigram_entropy

MASK = 3
P = np.array(
    [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3]]
)  # of the next, by the last; 3: none


class Markov:
    """A network that knows the token before, and whose features are one-hot of it."""

    time_conditioning = False

    def apply(self, variables, z, t, *, valid=None, method=None):
        hot = jax.nn.one_hot(z, 4)
        if method == "before_head":
            return hot, None
        logits = jnp.log(jnp.asarray(P, jnp.float32))[z]
        return jnp.concatenate([logits, jnp.zeros_like(logits[..., :1])], axis=-1)


def make(name="autoregressive", length=8):
    cfg = config.base()
    cfg.data.length, cfg.diffusion.name = length, name
    objective = objectives.from_config(Vocabulary(4, MASK), **cfg.diffusion.to_dict(), sections=cfg.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return run.Run(Markov(), objective, tokenizers.Char("abc"), {}, 0, cfg, mesh)


def nats(ids, begin=MASK):
    return -sum(math.log(P[a, b]) for a, b in zip([begin, *ids[:-1]], ids, strict=True))


def letters(rng, number, *sizes):
    return ["".join("abc"[i] for i in rng.integers(3, size=rng.choice(sizes))) for _ in range(number)]


def ids_of(text):
    return ["abc".index(c) for c in text]


TEXTS = letters(np.random.default_rng(0), 12, 1, 5, 8)


def test_the_perplexity_of_a_known_law():
    found = diffrwkv.judge([*TEXTS, ""], by=make(), batch_size=5)
    each = np.array([nats(ids_of(text)) for text in TEXTS])
    tokens = np.array([len(text) for text in TEXTS])
    mean = each.sum() / tokens.sum()
    error = math.sqrt(12 / 11 * np.square(each - mean * tokens).sum()) / tokens.sum()
    assert found["nll"] == pytest.approx(mean, rel=1e-5) and found["ppl"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["nll_se"] == pytest.approx(error, rel=1e-4)
    assert found["nats_per_character"] == pytest.approx(mean, rel=1e-5)
    rows = [np.array(ids_of(text)) for text in TEXTS]
    assert found["entropy"] == pytest.approx(unigram_entropy(rows).mean()) and found["mauve"] is None
    assert found["distinct_2"] == distinct(rows, 2)
    total = int(tokens.sum())
    counted = {"texts": 12, "empty": 1, "tokens": total, "judge_tokens": total, "characters": total}
    assert found["counted"] == counted


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (5, 1), (40, 7), (2, 2)])
def test_windows_count_each_token_once(window, stride):
    """Given the token before, which a window has unless it is all new: then it is as if it began a text."""
    texts = letters(np.random.default_rng(1), 4, 30, 33)
    found = diffrwkv.judge(texts, by=make(), window=window, stride=stride)
    expected = 0.0
    for text in texts:
        ids = ids_of(text)
        cuts = range(window, len(ids), stride) if stride == window else []
        parts = np.split(ids, list(cuts))
        expected += sum(nats(part.tolist()) for part in parts)
    assert found["counted"]["judge_tokens"] == sum(map(len, texts))
    assert found["nll"] * found["counted"]["judge_tokens"] == pytest.approx(expected, rel=1e-5)


def test_windows_of_one_pass_are_the_whole_text():
    texts = letters(np.random.default_rng(2), 5, 20, 21)
    whole, cut = (diffrwkv.judge(texts, by=make(), window=window) for window in (21, 64))
    assert whole == cut


def test_features_are_the_mean_of_what_the_head_reads():
    judge = judging.RunJudge(make(), "judge")
    found = judge.features(TEXTS[:5], window=6, batch_size=2)
    for row, text in zip(found, TEXTS, strict=False):
        read = [MASK, *ids_of(text)][:6]
        np.testing.assert_allclose(row, np.bincount(read, minlength=4) / len(read), rtol=1e-6)


def test_mauve_compares_features(monkeypatch):
    given = []

    def compute_mauve(p_features, q_features, verbose):
        given.extend([p_features, q_features])
        return types.SimpleNamespace(mauve=0.25)

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    monkeypatch.setattr(judging, "mauve_version", lambda: "0.4.0")
    assert diffrwkv.judge(TEXTS, by=make(), real=["ab", "", "cc"])["mauve"] == 0.25
    assert [x.shape for x in given] == [(12, 4), (2, 4)]


@pytest.mark.slow  # .ci/run installs it for those
def test_mauve_of_the_package():
    pytest.importorskip("mauve", reason="mauve-text is not installed")
    rng = np.random.default_rng(0)
    one, other = (["".join("abc"[i] for i in rng.choice(3, 8, p=p)) for _ in range(100)] for p in P[1:3])
    more = ["".join("abc"[i] for i in rng.choice(3, 8, p=P[1])) for _ in range(100)]
    judge = judging.RunJudge(make(), "judge")
    alike, unlike = (judging.mauve(judge, some, one, window=8, batch_size=16) for some in (more, other))
    assert 0 < unlike < alike <= 1


# --- A judge of Hugging Face ------------------------------------------------------------------------


class Tensor(np.ndarray):
    """As much of a torch tensor as the adapter asks for."""

    def to(self, device):
        return self

    def float(self):
        return self.astype(np.float32).view(Tensor)

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)

    def transpose(self, *axes):
        return np.swapaxes(self, *axes)


def tensor(x):
    return np.asarray(x).view(Tensor)


def cross_entropy(logits, targets, reduction):
    assert reduction == "none"
    logits = np.asarray(logits, np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return tensor(-np.take_along_axis(logits, np.asarray(targets)[:, None], axis=1)[:, 0])


class HubModel:
    """`Markov`; or a model that sees the next token too. 3 is BOS."""

    def __init__(self, sees_later=False):
        self.config = types.SimpleNamespace(vocab_size=4, max_position_embeddings=12, _commit_hash="77")
        self.sees_later, self.calls = sees_later, []

    def float(self):
        return self

    eval = float

    def to(self, device):
        return self

    def __call__(self, input_ids, attention_mask, output_hidden_states=False):
        self.calls.append(np.asarray(attention_mask))
        ids = np.asarray(input_ids)
        logits = np.log(np.concatenate([P, np.full((4, 1), 1e-30)], axis=1))[ids]
        if self.sees_later:
            logits[:, :-1] += ids[:, 1:, None] * [0.1, 0, 0, 0]
        return types.SimpleNamespace(logits=tensor(logits), hidden_states=[None, tensor(np.eye(4)[ids])])


class HubTokenizer:
    bos_token_id, eos_token_id, model_max_length = 3, 3, 10**30

    def encode(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return ids_of(text)

    def decode(self, ids):
        return "".join("abc"[i] for i in ids)


@pytest.fixture
def hub(monkeypatch):
    """Makes `import torch, transformers` give fakes: the model and the tokenizer that were loaded last."""
    loaded = types.SimpleNamespace(model=HubModel(), tokenizer=HubTokenizer())
    torch = types.SimpleNamespace(
        device=lambda name: name,
        cuda=types.SimpleNamespace(is_available=lambda: False),
        from_numpy=tensor,
        inference_mode=contextlib.nullcontext,
        nn=types.SimpleNamespace(functional=types.SimpleNamespace(cross_entropy=cross_entropy)),
    )

    def load(name, kind):
        if name == "nowhere":
            raise OSError("nowhere is not a local folder\nand is not a valid model identifier")
        return getattr(loaded, kind)

    transformers = types.SimpleNamespace(
        AutoTokenizer=types.SimpleNamespace(from_pretrained=lambda name: load(name, "tokenizer")),
        AutoModelForCausalLM=types.SimpleNamespace(from_pretrained=lambda name: load(name, "model")),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    return loaded


@pytest.mark.parametrize(("window", "stride"), [(12, None), (12, 11), (5, 2), (3, 1)])
def test_a_judge_of_the_hub(hub, window, stride):
    texts = letters(np.random.default_rng(3), 6, 1, 9, 30)
    found = diffrwkv.judge(texts, by="hf:some", window=window, stride=stride, batch_size=4)
    total = sum(map(len, texts))
    assert found["nll"] * total == pytest.approx(sum(nats(ids_of(text)) for text in texts), rel=1e-5)
    assert found["counted"]["judge_tokens"] == found["counted"]["characters"] == total
    step, read = stride or window // 2, []
    for text in texts:  # windows of the text and its BOS, moved on by the stride until the end is in one
        starts = range(0, max(1, len(text) + 1 - window + step), step)
        read += [min(window, len(text) + 1 - start) for start in starts]
    assert sorted(n for mask in hub.model.calls[1:] for n in mask.sum(axis=1)) == sorted(read)
    hub.tokenizer.bos_token_id = hub.tokenizer.eos_token_id = None  # then the first token is given
    found = diffrwkv.judge(texts, by="hf:some", window=window, stride=stride, batch_size=4)
    expected = sum(nats(ids_of(text)[1:], ids_of(text)[0]) for text in texts if len(text) > 1)
    assert found["counted"]["judge_tokens"] == found["counted"]["characters"] == total - 6
    assert found["nll"] * (total - 6) == pytest.approx(expected, rel=1e-5)


def test_features_of_the_hub_are_those_of_the_last_token(hub):
    judge = CausalLM("some")
    assert (judge.name, judge.length, judge.weights) == ("hf:some", 12, "77")
    np.testing.assert_array_equal(
        judge.features(["abc", "b", "ccbba"], window=4, batch_size=2).argmax(axis=1), [2, 1, 1]
    )


def test_judges_that_cannot_be_are_refused(hub, monkeypatch, tmp_path):
    hub.model.sees_later = True
    with pytest.raises(UserError, match="hf:some sees what comes later in a text: a judge must be a causal"):
        diffrwkv.judge(TEXTS, by="hf:some")
    with pytest.raises(UserError, match="hf:nowhere cannot be loaded .*local folder and is not a valid"):
        diffrwkv.judge(TEXTS, by="hf:nowhere")
    with pytest.raises(UserError, match="has a name"):
        diffrwkv.judge(TEXTS, by="hf:")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"hf:some needs torch and transformers: pip install 'diffrwkv\[judge\]'"):
        diffrwkv.judge(TEXTS, by="hf:some")
    with pytest.raises(UserError, match="No config.json"):
        diffrwkv.judge(TEXTS, by=tmp_path)
    with pytest.raises(UserError, match=r"the run is a diffusion model .*'mdlm'.*: a judge must be autoregressive"):
        diffrwkv.judge(TEXTS, by=make("mdlm"))


@pytest.mark.parametrize(
    ("texts", "options", "told"),
    [
        (["abc"], {}, "1 of 1 texts have any text: the statistics need at least 2"),
        (["abca", "", ""], {}, "1 of 3 texts have any text"),
        (["abc", "b"], {}, "The texts have 3 tokens at most, and distinct-4 is of runs of 4"),
        (["abca", 3], {}, "A text must be a string, got int"),
        (["abca", "abd"], {}, "cannot read this text: character 'd'"),
        (TEXTS, {"window": 1}, "window = 1 leaves no room"),
        (TEXTS, {"stride": 9}, "stride = 9 is too large: at most 8 tokens of a window of 8"),
        (TEXTS, {"stride": 0}, "stride must be at least 1"),
        (TEXTS, {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_any_compute(monkeypatch, texts, options, told):
    monkeypatch.setattr(judging.RunJudge, "judged", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(UserError, match=told):
        diffrwkv.judge(texts, by=make(), **options)


def test_a_window_beyond_the_positions_is_refused(hub):
    with pytest.raises(UserError, match="window = 13 is too large: hf:some reads 12 tokens at most"):
        diffrwkv.judge(TEXTS, by="hf:some", window=13)
