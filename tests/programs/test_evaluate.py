"""Evaluation: a closed form, a slow definition, and the program."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import evaluate, sharding
from diffrwkv import run as runs
from diffrwkv.config import UserError
from diffrwkv.data import load
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.evaluator import Evaluator, count_scored


class Uniform:
    """Every real token alike, whatever it sees."""

    def __init__(self, vocab_size):
        self._vocab_size = vocab_size

    def apply(self, variables, z, t, *, valid=None):
        return jnp.zeros((*z.shape, self._vocab_size))


class Neighbour:
    """Thinks that the token before comes again, unless it is masked; the last id is the mask."""

    def apply(self, variables, z, t, *, valid=None, **blocks):
        return variables["params"] * jax.nn.one_hot(jnp.roll(z, 1, axis=1), 28)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = np.random.default_rng(0).integers(27, size=9000)
    path.write_text("".join("abcdefghijklmnopqrstuvwxyz "[i] for i in letters))
    return load(str(path), length=13)


def test_a_text_that_is_divided_in_another_way_is_refused(tmp_path, dataset):
    """As when a prepared folder is exchanged for one of the same text with more of it to train on."""
    runs.check_same_data("runs/x", dataset.info, dataset)
    (tmp_path / "text.txt").write_text("".join(dataset.tokenizer.decode(dataset.train[i]) for i in range(20)))
    for fractions in ((0.1, 0.2), (0.2, 0.1)):
        one, other = (load(str(tmp_path / "text.txt"), length=13, validation_fraction=f) for f in fractions)
        assert one.info["sha256"] == other.info["sha256"]
        with pytest.raises(UserError, match="divided in another way .* its train text is not the same"):
            runs.check_same_data("runs/x", one.info, other)


def evaluator(model, dataset, mesh=None, **options):
    objective = objectives.from_config(Vocabulary(dataset.tokenizer.vocab_size, dataset.tokenizer.mask_id))
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    return Evaluator(model, objective, dataset, mesh, **({"batch_size": 16} | options))


def test_uniform_denoiser_scores_log_v(dataset):
    vocab_size = dataset.tokenizer.vocab_size
    assert vocab_size == 28
    result = evaluator(Uniform(vocab_size), dataset, draws=64)({})
    assert result["nelbo_se_draws"] < 0.03
    assert abs(result["nelbo"] - math.log(27)) < 4 * result["nelbo_se_draws"] + 0.002 * math.log(27)
    np.testing.assert_allclose(result["bpc"], result["nelbo"] / math.log(2))
    np.testing.assert_allclose(result["ppl"], math.exp(result["nelbo"]))
    assert result["tokens"] == len(dataset.validation) * 13 and result["draws"] == 64


def test_result_is_the_plain_loop(dataset):
    """One sequence at a time would not share the batch's noise; one draw and one batch is the definition."""
    e = evaluator(Neighbour(), dataset, draws=1, limit=16)
    result = e(jnp.float32(2.0))
    key = jax.random.fold_in(jax.random.key(0), 0)
    times = e._times(jax.random.fold_in(key, 2**31))
    tokens = jnp.stack([dataset.validation[i] for i in range(16)])
    objective = objectives.from_config(Vocabulary(28, 27))
    denoise = lambda z, t: Neighbour().apply({"params": 2.0}, z, t)
    loss = objective.loss(denoise, jax.random.fold_in(key, 0), tokens, jnp.asarray(times[:16]))
    np.testing.assert_allclose(result["nelbo"], loss.nats.sum() / loss.tokens.sum(), rtol=1e-6)


def test_times_cover_the_interval_in_an_order_of_each_draw(dataset):
    e = evaluator(Neighbour(), dataset)
    n = e.num_sequences
    draws = [e._times(jax.random.key(i))[:n] for i in range(2)]
    for t in draws:
        np.testing.assert_array_equal(np.floor((np.sort(t) - 1e-3) / (1 - 1e-3) * n - 1e-3).clip(0), np.arange(n))
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.5


def test_same_noise_each_time_and_another_with_another_seed(dataset):
    a = evaluator(Neighbour(), dataset, limit=32)
    assert a(jnp.float32(2.0)) == a(jnp.float32(2.0)) != a(jnp.float32(1.0))
    assert evaluator(Neighbour(), dataset, limit=32, seed=1)(jnp.float32(2.0)) != a(jnp.float32(2.0))


@pytest.mark.optimised
@pytest.mark.parametrize(("draws", "layout"), [(4, "whole"), (4, "blocks")])
def test_the_error_over_draws_is_honest(dataset, draws, layout):
    """Intervals of 95 % hold the mean of 300 repeats, each under noise of its own, about as often as they say.

    The loss depends on the time: tokens whose neighbour is masked are told nothing.
    """
    sections = {"layouts": {"blocks": {"sizes": (4,)}}} if layout == "blocks" else {}
    objective = objectives.from_config(Vocabulary(28, 27), layout=layout, sections=sections)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    e = Evaluator(Neighbour(), objective, dataset, mesh, batch_size=72, draws=draws)
    found = []
    for seed in range(300):
        e._key = jax.random.key(seed)
        found.append(e(jnp.float32(4.0)))
    nelbo, error = (np.array([f[name] for f in found]) for name in ("nelbo", "nelbo_se_draws"))
    assert 0.9 <= np.mean(np.abs(nelbo - nelbo.mean()) < 1.96 * error) <= 0.99
    assert np.mean(error) == pytest.approx(nelbo.std(), rel=0.15)


def test_filling_rows_do_not_count(dataset):
    result = evaluator(Neighbour(), dataset, limit=17, padded=True)(jnp.float32(1.0))
    assert result["tokens"] == 17 * 13 and result["sequences"] == 17


class Everything:
    """Uniform over the bytes, BOS and EOS."""

    def apply(self, variables, z, t, **kwargs):
        return jnp.zeros((*z.shape, 259))


# Characters of one, two, three and four bytes: the parts of a text have very different characters per token.
ONE, TWO, THREE, FOUR = "plain ascii ", "äéøßçñ", "漢字かな", "😀🎈"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    (folder / "train.txt").write_text(75 * ONE + 50 * FOUR + 10 * TWO)
    (folder / "validation.txt").write_text(125 * THREE + 41 * ONE + "!")
    return folder


def byte_data(uneven, **options):
    paths = str(uneven / "train.txt"), str(uneven / "validation.txt")
    return load(paths[0], validation=paths[1], tokenizer="byte", **({"length": 13} | options))


def scored_slowly(dataset, split, number, skip=0):
    """Characters and tokens of the first chunks, by a look at each byte on its own."""
    source, characters, tokens = getattr(dataset, split), 0, 0
    for i in range(number):
        for at, (token, valid) in enumerate(zip(source[i].tolist(), source.valid(i).tolist(), strict=True)):
            tokens += valid and at >= skip
            characters += valid and at >= skip and (token < 0x80 or 0xC0 <= token < 0x100)
    return characters, tokens


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("packing", ["concat", "document"])
def test_characters_are_those_that_were_scored(uneven, wrap, packing):
    dataset = byte_data(uneven, wrap=wrap, packing=packing)
    shares = set()
    for split in ("train", "validation"):
        whole = len(getattr(dataset, split))
        for number in (1, 2, whole // 2, whole - 1):
            counted = count_scored(dataset, split, number)
            assert counted == scored_slowly(dataset, split, number)
            kept = count_scored(dataset, split, number, keep_first=True)
            assert kept == scored_slowly(dataset, split, number, skip=1) != counted
            shares.add(round(counted[0] / counted[1], 1))
        info = dataset.info[split]
        assert count_scored(dataset, split, whole) == (info["chunk_characters"], info["tokens"])
        assert abs(info["chunk_characters"] - scored_slowly(dataset, split, whole)[0]) <= 3
    assert len(shares) > 2  # the parts differ, so that one share for all would not do
    characters, tokens = count_scored(dataset, "validation", len(dataset.validation))
    assert dataset.characters_per_token == characters / tokens


def test_blank_lines_between_documents_are_characters(tmp_path):
    documents = ["abc", "de", "abcdeabcdeabcde", "c", "ababababab"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    dataset = load(str(tmp_path / "a.jsonl"), validation=str(tmp_path / "a.jsonl"), length=4)
    assert dataset.tokenizer.eos_id is None
    for number in (1, 3, len(dataset.validation)):
        assert count_scored(dataset, "train", number) == (4 * number, 4 * number)


@pytest.mark.parametrize(
    "options", [{"split": "train"}, {}, {"limit": 8}, {"limit": 30}, {"split": "train", "limit": 8}]
)
def test_bits_per_character_are_of_what_was_scored(uneven, options):
    """A model whose nats per token are known: log 258 for each, whatever the text."""
    dataset = byte_data(uneven)
    objective = objectives.from_config(Vocabulary(259, 258), name="autoregressive")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    result = Evaluator(Everything(), objective, dataset, mesh, batch_size=16, **options)({})
    split = options.get("split", "validation")
    number = options.get("limit") or len(getattr(dataset, split))
    characters, tokens = scored_slowly(dataset, split, number)
    assert result["tokens"] == tokens and abs(result["characters"] - characters) <= (0 if "limit" in options else 3)
    assert result["characters_per_token"] == result["characters"] / tokens
    np.testing.assert_allclose(result["nelbo"], math.log(258), rtol=1e-6)
    np.testing.assert_allclose(result["bpc"], math.log2(258) * tokens / result["characters"], rtol=1e-6)
    assert result["nelbo_se_draws"] is None and result["nelbo_se_text"] < 1e-6


def test_a_score_of_nothing_is_refused(uneven):
    objective = objectives.from_config(
        Vocabulary(259, 258), layout="blocks", sections={"layouts": {"blocks": {"sizes": (1,), "keep_first": True}}}
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="hold no character"):
        Evaluator(Everything(), objective, byte_data(uneven, length=1), mesh, batch_size=16, limit=3)


# --- The program ------------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_program(run, capsys):
    evaluate.main([f"--workdir={run}", "--draws=2", "--limit=20"])
    out, err = capsys.readouterr()
    printed = json.loads(out)
    number = f"validation: nelbo {printed['nelbo']:.4f} ± {printed['nelbo_se_draws']:.4f} of the draws, ± "
    assert number in err and err.endswith("over 20 sequences, 2 draws of each\n")
    told = [line for line in (run / "stdout.txt").read_text().splitlines() if line.startswith("step 12/12")]
    assert len(told) == 1 and told[0].endswith("over 20 sequences, 1 draw of each")
    assert printed == json.loads((run / "eval.json").read_text())
    assert {"nelbo", "nelbo_se_draws", "nelbo_se_text", "bpc", "ppl", "draws", "tokens", "step", "ema"} <= set(printed)
    assert (printed["draws"], printed["step"], printed["ema"], printed["tokens"]) == (2, 12, True, 20 * 16)
    evaluate.main([f"--workdir={run}", "--draws=1", "--limit=20", "--raw", "--step=10"])
    raw = json.loads(capsys.readouterr().out)
    assert (raw["step"], raw["ema"]) == (10, False) and raw["nelbo"] != printed["nelbo"]


def test_program_repeats_what_training_measured(run, capsys):
    """Up to another layout over devices: the same weights, text and noise."""
    evaluate.main([f"--workdir={run}", "--draws=1", "--limit=20"])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    np.testing.assert_allclose(
        json.loads(capsys.readouterr().out)["nelbo"], json.loads(lines[-1])["val/nelbo"], rtol=1e-5
    )


def test_wrong_input(run):
    for arguments, told in [
        ([], "--workdir"),
        (["--workdir=/no/such"], "No config.json"),
        ([f"--workdir={run}", "--draws=0"], "--draws"),
        ([f"--workdir={run}", "--limit=0"], "--limit"),
        ([f"--workdir={run}", "--draw=2"], "--draw=2"),
        ([f"--workdir={run}", "--step=3"], "there are"),
        ([f"--workdir={run}", "--step=last"], "--step"),
        ([f"--workdir={run}", "--split=test"], "test"),
        ([f"--workdir={run}", "--batch_size=-1"], "--batch_size"),
    ]:
        with pytest.raises(UserError, match=told):
            evaluate.main(arguments)


def test_wrong_tokenizer_for_a_checkpoint(run):
    path = run / "tokenizer.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"alphabet": value["alphabet"].replace("z", "{")}))
    with pytest.raises(UserError, match="not the tokenizer that this checkpoint was trained with"):
        evaluate.main([f"--workdir={run}"])
    (run / "run.json").unlink()  # without a record nothing would tell
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="No run.json"):
        evaluate.main([f"--workdir={run}"])
    path.write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        evaluate.main([f"--workdir={run}"])
    path.unlink()
    with pytest.raises(UserError, match="No tokenizer.json"):
        evaluate.main([f"--workdir={run}"])


def test_a_suite_that_is_none_is_refused_by_the_names_that_are(tmp_path):
    with pytest.raises(UserError, match="--suite=likelyhood is unknown: choose from .*likelihood"):
        evaluate.main([f"--workdir={tmp_path}", "--suite=likelyhood"])
