"""`evaluate --data`: what it prints and keeps of any text, and what it refuses before it computes."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrwkv
from diffrwkv import config, evaluate, sharding
from diffrwkv import run as runs
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.suites import likelihood


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "some text.txt"
    path.write_text("the cat sat on the mat.\n" * 20)
    return path


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_text_is_scored_and_kept(run, text, capsys, monkeypatch):
    arguments = [f"--workdir={run}", "--draws=2", "--batch_size=8", f"--data={text}"]
    evaluate.main(arguments)
    [found] = lines(capsys)
    assert found["data"] == str(text) and found["documents"] == 1 and found["detokenizer"] == "none"
    assert found["tokens"] == 480 and found["tokens_dropped"] == 0 and found["characters"] == 480
    assert found["words"] == 120 and (found["draws"], found["step"], found["length"]) == (2, 12, 16)
    nats = found["nelbo"] * found["tokens"]
    assert found["ppl"] == pytest.approx(math.exp(found["nelbo"]))
    assert found["bpc"] == pytest.approx(nats / math.log(2) / 480)
    assert found["word_ppl"] == pytest.approx(math.exp(nats / 120))
    [path] = (run / "evaluations").iterdir()
    assert config.read_sealed(path) == found and "some-text.txt-" in path.name

    other = text.with_name("other.txt")
    other.write_text("abc\n" * 30)
    evaluated = []
    real = likelihood.Evaluator
    monkeypatch.setattr(likelihood, "Evaluator", lambda *a, **k: evaluated.append(1) or real(*a, **k))
    evaluate.main([*arguments, str(other)])  # the first is there already
    kept, new = lines(capsys)
    assert kept == found and new["data"] == str(other) and evaluated == [1]
    evaluate.main([*arguments, "--seed=1"])
    [another] = lines(capsys)
    assert evaluated == [1, 1] and another["nelbo"] != found["nelbo"]
    path.write_text(path.read_text()[:-40])  # as a kill leaves it
    evaluate.main(arguments)
    assert lines(capsys) == [found] and len(evaluated) == 3
    text.write_text("the cat sat on the rug.\n" * 20)
    evaluate.main(arguments)
    [changed] = lines(capsys)
    assert len(evaluated) == 4 and changed["documents_sha256"] != found["documents_sha256"]


def test_rows_and_lines_as_they_are_asked_for(run, text, capsys):
    base = [f"--workdir={run}", f"--data={text}", "--draws=1", "--batch_size=8"]
    evaluate.main([*base, "--length=7", "--limit=5"])
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["tokens"], found["sequences"], found["tokens_dropped"]) == (35, 5, 480 - 35)
    assert found["words"] == len("the cat sat on the mat.\nthe cat sat".split()[: found["words"]]) == 9
    evaluate.main([*base, "--length=40", "--each_line"])
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "Rows of 40 tokens: the model was trained on 16." in told.err
    assert found["documents"] == 20  # a blank line stands between two
    assert found["tokens"] == (20 * 23 + 19 * 2) // 40 * 40 and found["tokens_dropped"] == (20 * 23 + 19 * 2) % 40
    assert "20 documents, detokenizer none, 18 tokens dropped" in told.err
    evaluate.main([*base, "--detokenizer=lm1b", "--group=1"])
    assert lines(capsys)[0]["detokenizer"] == "lm1b"


def test_from_left_to_right_nothing_is_drawn(left_to_right, text, capsys, tmp_path):
    run = tmp_path / "ar"
    shutil.copytree(left_to_right, run)
    found = []
    for seed in (0, 5):
        evaluate.main([f"--workdir={run}", "--data", str(text), f"--seed={seed}", "--batch_size=8", "--limit=8"])
        found += lines(capsys)
    assert found[0] == found[1] and found[0]["draws"] == 1 and found[0]["nelbo_se_draws"] is None
    scores = diffrwkv.score(run, [text.read_text()[16 * i : 16 * (i + 1)] for i in range(8)])
    np.testing.assert_allclose(sum(s.nats for s in scores) / 128, found[0]["nelbo"], rtol=1e-5)


class Everything:
    """Uniform over the 258 ids of bytes, BOS and EOS."""

    time_conditioning = False

    def apply(self, variables, z, t, **kwargs):
        return jnp.zeros((*z.shape, 259))


def stub(name="autoregressive", layout="whole"):
    cfg = config.base()
    cfg.data.length, cfg.diffusion.name, cfg.diffusion.layout, cfg.data.wrap = 16, name, layout, True
    objective = objectives.from_config(Vocabulary(259, 258), name=name, layout=layout)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return runs.Run(Everything(), objective, tokenizers.Byte(), {}, 3, cfg, mesh)


@pytest.mark.parametrize(("packing", "wrap"), [("concat", True), ("concat", False), ("document", True)])
def test_a_named_set_under_the_peers_protocol(run, capsys, monkeypatch, tmp_path, packing, wrap):
    """log 258 for each token that is counted, BOS and EOS among them, whatever the text."""
    monkeypatch.setattr(runs, "load_run", lambda *a, **k: stub())
    sentences = ["a company 's share is $ N .", "it does n't .", "no <unk> here"]
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text("".join(f" {s} \n" for s in sentences))
    told = ["a company's share is $1 .", "it doesn't .", "no ? here"]
    flags = ["--wrap" if wrap else "--no_wrap", f"--packing={packing}", "--split=test", f"--data_root={tmp_path}"]
    evaluate.main([f"--workdir={run}", "--data=ptb", "--batch_size=8", *flags])
    [found] = lines(capsys)
    total, body = sum(len(t) + 1 for t in told), 16 - 2 * wrap
    if packing == "document":
        rows = sum(-(-len(t) // body) for t in told)
        assert found["tokens"] == sum(map(len, told)) + 2 * rows and found["tokens_dropped"] == 0
        assert found["characters"] == sum(map(len, told)) and found["words"] == sum(len(t.split()) for t in told)
    else:
        rows = total // body
        assert found["tokens"] == rows * 16 and found["tokens_dropped"] == total % body
    assert (found["split"], found["detokenizer"], found["documents"], found["sequences"]) == ("test", "ptb", 3, rows)
    np.testing.assert_allclose(found["nelbo"], math.log(258), rtol=1e-6)
    np.testing.assert_allclose(found["bpc"], found["tokens"] * math.log2(258) / found["characters"], rtol=1e-6)
    assert found["word_ppl"] == pytest.approx(258 ** (found["tokens"] / found["words"]), rel=1e-4)


def test_masked_blocks_of_one_token_are_exact(run, capsys, monkeypatch, text):
    """Each token masked, once, with weight 1: nothing is drawn, and nothing of the bound's ends is left out."""
    monkeypatch.setattr(runs, "load_run", lambda *a, **k: stub("mdlm", "blocks"))
    arguments = [f"--workdir={run}", f"--data={text}", "--batch_size=8", "--draws=3"]
    evaluate.main([*arguments, "--block_size=1"])
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "masked blocks of one token have an exact likelihood" in told.err
    assert (found["draws"], found["block_size"], found["nelbo_se_draws"]) == (1, 1, None)
    np.testing.assert_allclose(found["nelbo"], math.log(258), rtol=1e-6)
    evaluate.main([*arguments, "--block_size=2"])
    [other] = lines(capsys)
    assert other["draws"] == 3 and 0 < abs(other["nelbo"] - math.log(258)) < 5 * other["nelbo_se_draws"]


def test_no_result_is_taken_for_that_of_unknown_weights(run, capsys, monkeypatch, text):
    """The checkpoint of step 3 is not there, as when training has removed it since."""
    evaluated = []
    real = likelihood.Evaluator
    monkeypatch.setattr(runs, "load_run", lambda *a, **k: stub())
    monkeypatch.setattr(likelihood, "Evaluator", lambda *a, **k: evaluated.append(1) or real(*a, **k))
    for times in (1, 2):
        evaluate.main([f"--workdir={run}", f"--data={text}", "--batch_size=8"])
        [found] = lines(capsys)
        assert found["weights"] is None and len(evaluated) == times


def test_a_perplexity_beyond_all_numbers_is_none(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "load_run", lambda *a, **k: stub())
    (tmp_path / "long.txt").write_text("x" * 2000)
    evaluate.main([f"--workdir={run}", f"--data={tmp_path / 'long.txt'}", "--no_wrap", "--batch_size=8"])
    assert lines(capsys)[0]["word_ppl"] is None


def test_wrong_input_is_refused_before_any_compute(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "Evaluator", lambda *a, **k: pytest.fail("computed"))
    (tmp_path / "é.txt").write_text("the café\n" * 20)
    (tmp_path / "short.txt").write_text("abc")
    good = f"--data={text}"
    for arguments, told in [
        (["--data=nothing"], "'nothing' is neither a known name"),
        ([good, "nothing"], "'nothing' is neither a known name"),
        ([good, str(text)], "more than once"),
        (["--data="], "--data is empty"),
        (["--data"], "expected at least one argument"),
        ([good, f"--data={tmp_path / 'é.txt'}"], "document 1: character 'é'"),
        ([f"--data={tmp_path / 'short.txt'}"], "short.txt has 3 tokens, in groups of 1 documents: none fills a row"),
        ([f"--data={tmp_path}", "--split=test"], "no 'test' split"),
        (["--data=ptb", f"--data_root={tmp_path}"], "data set 'ptb' is not in .*: put ptb.valid.txt"),
        (["--data=arxiv", f"--data_root={tmp_path}"], "put arxiv-dataset/val.txt of github.com/armancohan"),
        ([good, "--wrap"], "some text.txt: wrap needs a tokenizer with BOS and EOS"),
        ([good, "--packing=document"], "packing = 'document' needs a tokenizer with BOS and EOS"),
        ([good, "--wrap", "--no_wrap"], "not allowed with"),
        ([good, "--detokenizer=wiki"], "invalid choice: 'wiki'"),
        ([good, "--length=0"], "--length must be at least 1"),
        ([good, "--group=0"], "--group must be at least 1"),
        ([good, "--block_size=4"], "block_size needs blocks"),
        (["--detokenizer=ptb"], "--detokenizer is of a text that --data names"),
        (["--wrap"], "--wrap is of a text that --data names"),
        (["--no_wrap"], "--no_wrap is of a text that --data names"),
        (["--each_line"], "--each_line is of a text that --data names"),
        (["--length=3"], "--length is of a text that --data names"),
    ]:
        with pytest.raises(UserError, match=told):
            evaluate.main([f"--workdir={run}", *arguments])
    monkeypatch.setattr(runs, "load_run", lambda *a, **k: stub("flm"))
    with pytest.raises(UserError, match="'flm' bounds no likelihood"):
        evaluate.main([f"--workdir={run}", good])
