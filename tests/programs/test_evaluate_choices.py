"""`evaluate --suite=choices`: what it prints and keeps of questions and passages, and what it refuses."""

import json
import lzma
import shutil

import numpy as np
import pytest

import diffrwkv
from diffrwkv import choosing, compare, config, evaluate
from diffrwkv import run as runs
from diffrwkv.config import UserError
from tests.known_run import make


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


QUESTIONS = [
    {"query": "the cat", "choices": ["sat", "ran off", "is"], "gold": 0},
    {"query": "a dog", "choices": ["barks", "me"], "gold": 1},
    {"context_options": ["ann hit bo and bo", "ann hit bo and ann"], "continuation": "wept", "gold": 0},
    {"sentence": "the mat is under _ and flat", "option1": "cat", "option2": "dog", "answer": "1"},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "some questions.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps(q) + "\n\n" for q in QUESTIONS).encode()))
    return path


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_questions_are_answered_and_kept(run, questions, capsys, monkeypatch):
    arguments = ["--suite=choices", f"--workdir={run}", "--draws=8", "--batch_size=8", f"--data={questions}"]
    evaluate.main(arguments)
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "4 questions" in told.err and "the model was trained on 16" in told.err
    loaded = diffrwkv.load(run)
    own = diffrwkv.choose(loaded, QUESTIONS, draws=8, batch_size=8)
    assert {k: found[k] for k in choosing.accuracy(own)} == pytest.approx(choosing.accuracy(own))
    assert (found["questions"], found["draws"], found["exact"], found["step"]) == (4, 8, False, 12)
    [path] = (run / "evaluations").glob("*.json")
    assert config.read_sealed(path) == found and "some-questions.jsonl.xz-" in path.name
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["gold"] for row in rows] == [0, 1, 0, 0] and rows[0]["sizes"] == [3, 7, 2]
    np.testing.assert_allclose(rows[3]["nats"], own[3].nats, rtol=1e-5)
    assert rows[0]["errors"][2] == 0 and rows[0]["errors"][1] > 0  # " is" has three tokens: 7 masks

    computed = []
    real = choosing.in_batches
    monkeypatch.setattr(choosing, "in_batches", lambda *a, **k: computed.append(1) or real(*a, **k))
    other = questions.with_name("other.jsonl")
    other.write_text(json.dumps(QUESTIONS[1]) + "\n")
    evaluate.main([*arguments, str(other)])  # the first is there already
    kept, new = lines(capsys)
    assert kept == found and new["questions"] == 1 and new["acc_se"] is None and computed == [1]
    numbers = compare.read(run, "run").evaluations[-1].numbers
    assert numbers.keys() - {"acc_se", "acc_norm_se"} == {"acc", "acc_norm", "chance"}


@pytest.mark.slow
def test_last_words_are_filled_in(run, left_to_right, tmp_path, capsys):
    passages = ["the cat is on the mat", "a dog sat on\nit", "one two"]
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    copy = tmp_path / "ar"
    shutil.copytree(left_to_right, copy)
    for workdir, exact in ((run, False), (copy, True)):
        evaluate.main(["--suite=choices", f"--workdir={workdir}", "--last_word", "--batch_size=8", "--data", str(path)])
        [found] = lines(capsys)
        assert (found["questions"], found["exact"], found["tokens"]) == (3, exact, 4 + 3 + 4)
        [kept] = (workdir / "evaluations").glob("*.jsonl")
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
        assert [row["word"] for row in rows] == ["mat", "it", "two"]
        nats = [row["nats"] for row in rows]
        assert found["nats"] == pytest.approx(np.mean(nats)) and found["ppl"] == pytest.approx(np.exp(np.mean(nats)))
        assert found["acc"] == pytest.approx(np.mean([row["greedy"] for row in rows]))
    texts = [" mat", "\nit", " two"]
    given = [p[: -len(t)] for p, t in zip(passages, texts, strict=True)]
    scores = diffrwkv.score(copy, texts, prompts=given, length=32)
    assert nats == pytest.approx([s.nats for s in scores], rel=1e-5)


def test_bad_input_is_refused_before_any_compute(run, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "in_batches", lambda *a, **k: pytest.fail("computed"))

    def file(name, *records):
        path = tmp_path / name
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
        return f"--data={path}"

    good = {"query": "a", "choices": ["b", "c"], "gold": 0}
    ok = file("ok.jsonl", good)
    for arguments, told in [
        ([], "required: --data"),
        (["--data=nowhere.jsonl"], "nowhere.jsonl"),
        ([file("empty.jsonl", "\n")], "empty.jsonl has no question in it"),
        ([file("text.txt", "plain words\n")], "text.txt is text: JSON lines are wanted"),
        ([file("list.jsonl", good, "[1]\n")], "line 2 of .*list.jsonl is no JSON object but list"),
        ([file("broken.jsonl", good, '{"query": \n')], "line 2 of .*broken.jsonl is not JSON"),
        (
            [ok, file("gold.jsonl", good | {"gold": 2}).partition("=")[2]],
            "line 1 of .*gold.jsonl: 'gold' must be from 0",
        ),
        ([file("one.jsonl", good | {"choices": ["a"]})], "'choices' must be a list of at least 2 texts"),
        ([file("void.jsonl", good | {"choices": ["a", ""]})], "'choices' has an empty text"),
        ([file("é.jsonl", good | {"query": "é"})], "line 1 of .*, query of choice 1: character 'é'"),
        ([file("passage.jsonl", {"text": "a b"})], "is no question: .* With --last_word the last word"),
        ([ok, "--last_word"], "has no passage under 'text'; it has: query, choices, gold"),
        ([file("word.jsonl", {"text": "word"}), "--last_word"], "must have two words"),
        ([ok, "--last_word", "--between=x"], "--between is of choices"),
        ([ok, ok.partition("=")[2]], "more than once"),
        ([ok, "--draws=3"], "draws must be even"),
        ([ok, "--limit=0"], "--limit must be at least 1"),
        ([ok, "--block_size=2"], "block_size needs blocks"),
        ([ok, "--batch_size=999999999998"], "--batch_size = .* is too large"),
    ]:
        with pytest.raises(UserError, match=told):
            evaluate.main(["--suite=choices", f"--workdir={run}", *arguments])
    for name, told in (("flm", "'flm' bounds no likelihood"), ("udlm", "--last_word fills in masks")):
        monkeypatch.setattr(runs, "load_run", lambda *a, name=name, **k: make(name))
        with pytest.raises(UserError, match=told):
            evaluate.main(["--suite=choices", f"--workdir={run}", file("ab.jsonl", {"text": "a b"}), "--last_word"])
