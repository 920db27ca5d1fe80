"""`evaluate --suite=samples`: samples and texts beside real text, kept and compared; and what is refused."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest

import diffrwkv
from diffrwkv import compare, config, evaluate, generation, judging, sharding
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers
from diffrwkv.run import load_data, load_run
from diffrwkv.suites import samples


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def suite(run, left_to_right, capsys):
    """Runs the suite on the tiny run: what it prints."""

    def call(*arguments, judge=left_to_right, workdir=run):
        own = [] if workdir is None else [f"--workdir={workdir}"]
        evaluate.main(["--suite=samples", f"--judge={judge}", *own, *arguments])
        told = capsys.readouterr()
        return json.loads(told.out), told.err

    return call


def statistics(found):
    """Those of `judge`, without what sampling costs."""
    return {key: value for key, value in found.items() if key not in ("mauve", *COST)}


COST = ("passes", "seconds", "cpu_seconds", "tokens_per_second")


def test_samples_are_judged_and_kept(suite, run, left_to_right, monkeypatch, tmp_path):
    arguments = ["--num=6", "--num_steps=4", "--batch_size=4"]
    found, _ = suite(*arguments)
    assert (found["num"], found["length"], found["window"], found["stride"], found["step"]) == (6, 16, 16, 8, 12)
    assert found["sampler"] == "ancestral(num_steps=4)" and found["judge"] == str(left_to_right)
    drawn = generation.generate(run, num=6, num_steps=4, batch_size=4)
    judge = diffrwkv.load(left_to_right)
    judged = diffrwkv.judge(drawn.texts, by=judge, batch_size=4)
    assert statistics(found["samples"]) == statistics(judged)
    assert found["samples"]["passes"] == drawn.passes.mean() and found["samples"]["tokens_per_second"] > 0
    loaded = load_run(run, sharding.make_mesh())
    rows = load_data(loaded.config).validation
    real = [loaded.tokenizer.decode(rows[int(i)]) for i in np.linspace(0, len(rows) - 1, 6).astype(int)]
    assert statistics(found["text"]) == statistics(diffrwkv.judge(real, by=judge, batch_size=4))

    [path] = (run / "evaluations").iterdir()
    assert config.read_sealed(path) == found and path.name.startswith("samples-ancestral-")
    file = tmp_path / "drawn.jsonl"
    file.write_text("".join(json.dumps({"text": text, "passes": 4}) + "\n" for text in drawn.texts))
    both, _ = suite(f"--texts={file}", "--batch_size=4")
    assert statistics(both["samples"]) == statistics(judged) and statistics(both["text"]) == statistics(found["text"])
    other, _ = suite(f"--texts={file}", f"--real={file}", "--batch_size=4", workdir=None)
    assert statistics(other["samples"]) == statistics(other["text"]) == statistics(judged) and other["num"] == 6

    [of_file] = (run / "evaluations").glob("samples-drawn*")
    of_file.unlink()
    another = found | {"sampler": "ancestral(num_steps=2)", "samples": found["samples"] | {"ppl": 7.25}}
    config.write_json(config.seal(another), run / "evaluations" / "another.json")
    names, cells = csv.reader(compare.compare([run]).csv().splitlines())
    row = dict(zip(names, cells, strict=True))
    for each in (found, another):
        for kind in ("samples", "text"):
            label = f"eval {kind} (text.txt), sampler {each['sampler']}"
            assert float(row[f"{label} ppl"]) == each[kind]["ppl"]
            assert float(row[f"{label} entropy se"]) == each[kind]["entropy_se"]
    told = {name.rpartition(" ")[2] for name in names if name.startswith("eval ") and not name.endswith(" se")}
    hidden = {"counted", "seconds", "cpu_seconds"} | {x for x in found["samples"] if x.endswith("_se")}
    if found["samples"]["mauve"] is None:  # it is not installed
        hidden.add("mauve")
    assert told == {*found["samples"]} - hidden

    monkeypatch.setattr(judging, "figures", lambda *a, **k: pytest.fail("judged"))
    monkeypatch.setattr(samples, "draw", lambda *a, **k: pytest.fail("sampled"))
    again, told = suite(*arguments)
    assert again == found and f"Kept in {path}" in told
    for changed in ("--seed=1", "--stride=4", "--no_stop_at_eos", "--top_p=0.5", "--length=17", "--raw"):
        with pytest.raises(pytest.fail.Exception, match="sampled"):
            suite(*arguments, changed)


def test_the_judge_reads_its_own_samples(suite, left_to_right, tmp_path):
    shutil.copytree(left_to_right, tmp_path / "ar")
    found, _ = suite("--num=2", "--length=9", workdir=tmp_path / "ar")
    assert found["sampler"] == "autoregressive()" and found["samples"]["passes"] == 9
    assert found["real_length"] == found["length"] == 9
    assert found["samples"]["counted"]["judge_tokens"] == found["text"]["counted"]["tokens"] == 18


def test_real_text_is_cut_as_samples_are(run):
    tokenizer = tokenizers.Byte()
    bos, eos, mask = 256, 257, 258
    row = np.array([bos, 97, 98, eos, 99, mask, eos])
    assert samples._text_tokens(row, tokenizer, stop_at_eos=True).tolist() == [97, 98]
    assert samples._text_tokens(row, tokenizer, stop_at_eos=False).tolist() == [97, 98, 99]
    real = samples.Texts(["abcd", "efg"], [np.array([97, 98, 99, 100]), np.array([101, 102, 103])])
    drawn = samples.Texts(["x", "y" * 9], [np.array([120]), np.full(9, 121)])
    cut = samples._cut(real, drawn, tokenizer)
    assert cut.texts == ["a", "efg"] and [len(x) for x in cut.tokens] == [1, 3]
    assert samples._cut(real, samples.Texts(["éé", "x"]), tokenizer).texts == ["ab", "e"]


def test_mauve_stands_beside_that_of_real_text(suite, monkeypatch):
    compared = []

    def mauve(judge, texts, real, *, window, batch_size):
        compared.append((texts, real))
        return len(compared) / 4

    monkeypatch.setattr(judging, "mauve", mauve)
    monkeypatch.setattr(judging, "mauve_version", lambda: "0.4.0")
    found, _ = suite("--num=2", "--num_steps=4")
    assert (found["samples"]["mauve"], found["text"]["mauve"]) == (0.25, 0.5) and found["mauve_package"] == "0.4.0"
    (drawn, one), (text, other) = compared
    assert one == other != text != drawn and len(one) == 2


def test_what_cannot_be_judged_is_refused_before_any_compute(suite, run, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judging, "figures", lambda *a, **k: pytest.fail("judged"))
    monkeypatch.setattr(samples, "draw", lambda *a, **k: pytest.fail("sampled"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("a text\nof two lines")
    (tmp_path / "short.jsonl").write_text('{"text": "abc"}\n{"text": "d"}\n')
    (tmp_path / "odd.jsonl").write_text('{"text": "abc"}\n{"text": "déjà vu"}\n')
    file = lambda name: f"--texts={tmp_path / name}"
    for arguments, options, told in [
        ([], {"judge": trained}, "is a diffusion model .*: a judge must be autoregressive"),
        ([], {"judge": tmp_path / "nowhere"}, "No config.json"),
        ([], {"judge": "hf:"}, "has a name"),
        (["--num=0"], {}, "--num must be at least 1"),
        (["--num=1"], {}, "--num must be at least 2"),
        (["--num=1000"], {}, "37 rows of 16 tokens validate .*: take fewer"),
        (["--length=3"], {}, "Samples of 3 tokens have no distinct-4: raise --length"),
        (["--sampler=autoregressive"], {}, "'autoregressive' .* does not sample from .*'mdlm'"),
        (["--sampler=nothing"], {}, "No sampler is called 'nothing'"),
        (["--set=num_steps=x"], {}, "num_steps"),
        (["--block_size=4"], {}, "block_size needs a model of block diffusion"),
        (["--window=1"], {}, "window = 1 leaves no room"),
        (["--window=8", "--stride=9"], {}, "stride = 9 is too large"),
        (["--each_line"], {}, "--each_line is of a file"),
        (["--text_key=x"], {}, "--text_key is of a file"),
        (["--texts="], {}, "--texts is empty"),
        ([], {"workdir": None}, "--workdir names the run to sample from, and --model a model: give one"),
        ([file("nowhere.txt")], {}, "nowhere.txt"),
        ([file("empty.txt")], {}, "empty.txt"),
        ([file("one.txt")], {}, "one.txt has one text, .*--each_line"),
        ([file("short.jsonl")], {}, "The texts have 3 tokens at most, and distinct-4"),
        ([file("odd.jsonl")], {}, "cannot read this text: character 'é'"),
        ([file("short.jsonl"), "--num=3"], {}, "has 2 texts, and --num = 3"),
        ([file("one.txt"), "--each_line", f"--real={tmp_path / 'short.jsonl'}", "--num=2"], {"workdir": None}, None),
        ([file("one.txt"), "--seed=1"], {}, "--seed is of samples, and --texts takes a file"),
        ([file("one.txt"), "--num_steps=4"], {}, "--num_steps is of samples"),
        ([file("one.txt"), "--set=a=1"], {}, "--set is of samples"),
        (
            [f"--real={tmp_path / 'one.txt'}"],
            {},
            "one.txt has 1 texts, and as many are wanted as there are samples, 64",
        ),
        (["--num=2", f"--real={tmp_path / 'odd.jsonl'}"], {}, "odd.jsonl, text 2: character 'é'"),
    ]:
        expected = UserError if told else pytest.fail.Exception
        with pytest.raises(expected, match=told or "judged"):
            suite(*arguments, **options)
    with pytest.raises(pytest.fail.Exception, match="judged"):
        suite(file("one.txt"), "--each_line", workdir=None)
    assert "There is no real text beside these: name some with --real" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"hf:gpt2 needs torch and transformers: pip install 'diffrwkv\[judge\]'"):
        suite(judge="hf:gpt2")
    with pytest.raises(UserError, match="--judge"):
        evaluate.main(["--suite=samples", f"--workdir={run}"])


def test_a_sampler_is_told_by_what_is_not_its_default():
    from diffrwkv.diffusion.samplers import Ancestral, BlockCached

    assert samples._told(Ancestral()) == "ancestral()"
    assert samples._told(BlockCached(Ancestral(num_steps=3, top_p=0.5), 16, 7)) == (
        "BlockCached(ancestral(num_steps=3, top_p=0.5), block=16, stop_id=7)"
    )
