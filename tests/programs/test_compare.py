"""Comparing runs: the table says what the workdirs say, and says when two numbers do not compare."""

import csv
import html.parser
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from diffrwkv import compare, config
from diffrwkv.config import UserError


def make_run(path, *, text="T", tokenizer="A", lines=(), evaluation=None, **changes):
    """A workdir as training leaves it, without weights."""
    path.mkdir(parents=True)
    cfg = config.base()
    cfg.update_from_flattened_dict(changes)
    config.save(cfg, path / "config.json")
    data = {"tokenizer_fingerprint": tokenizer, "tokenizer": "char", "vocab_size": 30, "validation": {"sha256": text}}
    config.write_json(config.seal({"data": data, "parameters": 12345, "devices": {"kind": "cpu"}}), path / "run.json")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation:
        config.write_json(evaluation, path / "eval.json")
    return path


def table(compared):
    """{run: {column: cell}} of the CSV."""
    rows = list(csv.DictReader(io.StringIO(compared.csv())))
    return {row.pop("run"): row for row in rows}


LINES = [
    {"step": 10, "train/loss": 4.0, "seconds": 5.0, "cpu_seconds": 9.0, "tokens_per_second": 100.0},
    {"step": 15, "val/nelbo": 2.25, "val/nelbo_se_draws": 0.03, "val/nelbo_se_text": 0.2, "val/bpc": 3.5},
    {"step": 20, "train/loss": 3.0, "seconds": 7.0, "cpu_seconds": 12.0, "tokens_per_second": 300.0},
    {"step": 25, "val/nelbo": 2.5, "val/nelbo_se_draws": 0.02, "val/bpc": 3.6, "seconds": 8.0, "train/loss": None},
]


def test_the_table_says_what_the_workdirs_say(tmp_path):
    evaluation = {"nelbo": 2.125, "nelbo_se_draws": 0.01, "nelbo_se_text": 0.1, "bpc": 3.0, "draws": 8, "tokens": 99}
    evaluation |= {"data": "tinyshakespeare", "split": "test", "ema": True, "step": 25, "observed": [[1.0]]}
    one = make_run(tmp_path / "runs" / "a", lines=LINES, evaluation=evaluation)
    two = make_run(tmp_path / "runs" / "b", lines=LINES[:1], **{"model.dim": 64, "data.root": "elsewhere", "seed": 3})
    rows = table(compare.compare([one, str(two)]))
    assert list(rows) == ["a", "b"]
    a, b = rows.values()
    assert (a["model.dim"], b["model.dim"], a["seed"], b["seed"]) == ("256", "64", "0", "3")
    assert {key for key in a if key in config.DEFAULTS} == {"model.dim", "seed"}
    length, batch = config.base().data.length, config.base().train.batch_size
    told = {
        **{"parameters": 12345, "step": 25, "tokens": 25 * length * batch, "seconds": 8.0, "cpu seconds": 12.0},
        **{"tokens/s": 200.0, "train/loss": 3.0, "val/nelbo": 2.5, "val/nelbo se": 0.02, "val/bpc": 3.6},
        **{"best val/nelbo": 2.25, "at step": 15},
        **{"eval (tinyshakespeare, test) nelbo": 2.125, "eval (tinyshakespeare, test) nelbo se": 0.01},
        "eval (tinyshakespeare, test) bpc": 3.0,
    }
    assert {key: float(a[key]) for key in told} == told
    assert set(a) == set(told) | {"model.dim", "seed"}
    assert b["val/nelbo"] == b["eval (tinyshakespeare, test) bpc"] == "" and b["train/loss"] == "4.0"
    text = compare.compare([one, two]).markdown()
    assert "| 2.500 ± 0.020 |" in text and "do not compare" not in text


def test_evaluations_under_two_protocols_stand_in_two_columns(tmp_path):
    def result(nelbo, **settings):
        told = {"data": "/some/where/ptb", "split": "test", "detokenizer": "ptb", "limit": None, "draws": 8, "step": 25}
        told |= {"nelbo": nelbo, "nelbo_se_draws": 0.5, "ema": True, "wrap": True, "tokens": 4, "characters": 1000}
        return told | {"word_ppl": None, "weights": "77"} | settings

    a, b = (make_run(tmp_path / name, lines=LINES) for name in "ab")
    for run, name, value in (
        (a, "1", result(1.0)),
        (a, "2", result(2.0, limit=32, characters=50)),
        (a, "3", result(3.0, draws=16)),  # the same thing, closer
        (a, "4", result(4.0, step=20, draws=99)),  # of older weights
        (b, "5", result(5.0, step=20, characters=1020)),
        (b, "6", {"data": "x", "samples": [{"sampler": "ice", "entropy": 6.0}], "judge": {"ppl": 7.0}}),
    ):
        (run / "evaluations").mkdir(exist_ok=True)
        config.write_json(value, run / "evaluations" / f"{name}.json")
    compared = compare.compare([a, b])
    rows = table(compared)
    whole, part = "eval (ptb, test), limit null nelbo", "eval (ptb, test), limit 32 nelbo"
    assert (rows["a"][whole], rows["b"][whole], rows["a"][part], rows["b"][part]) == ("3.0", "5.0", "2.0", "")
    assert rows["b"]["eval samples (x) entropy"] == "6.0" and rows["b"]["eval judge (x) ppl"] == "7.0"
    assert not [key for key in rows["a"] if "characters" in key or "word_ppl" in key]
    assert compared.notes == [
        "eval (ptb, test), limit null: other amounts of text were scored, 1,000 to 1,020 characters.",
        "eval (ptb, test), limit null: b was scored at step 20; it is at 25.",
    ]


def test_an_option_that_a_run_does_not_use_is_no_difference(tmp_path):
    unused = {"model.mixers.attention.head_dim": 32, "samplers.remdm.eta": 0.5, "layouts.blocks.keep_first": True}
    unused |= {"objectives.udlm.time_eps": 0.1, "schedules.cosine.eps": 0.1, "model.channel_mixers.mlp.expansion": 8.0}
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", **unused, **{"diffusion.schedule": "loglinear"})  # MDLM's own, by name
    c = make_run(tmp_path / "c", **unused, **{"model.pattern": "attention,birwkv7*4", "diffusion.schedule": "cosine"})
    assert not set(table(compare.compare([a, b]))["a"]) & set(config.DEFAULTS)
    rows = table(compare.compare([a, c]))
    assert {key: rows["c"][key] for key in rows["c"] if key in config.DEFAULTS} == {
        "model.pattern": "attention,birwkv7*4",
        "diffusion.schedule": "cosine",
    }
    d = make_run(tmp_path / "d", **{"model.pattern": "attention"})
    rows = table(compare.compare([c, d]))
    assert rows["c"]["model.mixers.attention.head_dim"] == "32"
    assert rows["d"]["model.mixers.attention.head_dim"] == str(config.DEFAULTS["model.mixers.attention.head_dim"])


def test_curves_over_steps_tokens_and_seconds(tmp_path):
    run = compare.read(make_run(tmp_path / "a", lines=LINES), "a")
    assert run.curve("val/nelbo", "step") == [(15, 2.25), (25, 2.5)]
    assert [x for x, _ in run.curve("val/nelbo", "tokens")] == [run.tokens(15), run.tokens(25)]
    assert run.curve("val/nelbo", "seconds") == [(6.0, 2.25), (8.0, 2.5)]  # between the lines that have a clock
    rng = np.random.default_rng(0)
    values = rng.normal(size=10 * compare.MOST_POINTS)
    many = [{"step": i + 1, "train/loss": float(x)} for i, x in enumerate(values)]
    points = np.array(compare.read(make_run(tmp_path / "b", lines=many), "b").curve("train/loss", "step"))
    np.testing.assert_allclose(points[:, 1], values.reshape(-1, 10).mean(1))
    np.testing.assert_allclose(points[:, 0], np.arange(1, len(values) + 1).reshape(-1, 10).mean(1))


class Page(html.parser.HTMLParser):
    """Cells, addresses and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "td":
            self.cells.append("")

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "td":
            self.cells[-1] += text


def test_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "<b>&"):
        make_run(tmp_path / "runs" / name, lines=LINES)
    (tmp_path / "runs" / "a.log").write_text("no run")
    compare.main(["runs/*", "--output=out"])
    told = capsys.readouterr()
    assert told.out.startswith("| run |") and "Left out, without a config.json: runs/a.log." in told.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.html", "out.md", "out.svg", "runs"]
    page = Page((tmp_path / "out.html").read_text())
    assert page.cells[:1] == ["<b>&"] and "a" in page.cells and "2.500 ± 0.020" in page.cells
    assert not page.addresses and page.tags.count("svg") == 1 and "b" not in page.tags
    assert (tmp_path / "out.md").read_text() == told.out + "\n![curves of the runs](out.svg)\n"
    svg = (tmp_path / "out.svg").read_text()
    assert all(f">{label}<" in svg for label in ("step", "tokens", "seconds", "a", "&lt;b&gt;&amp;"))
    compare.main(["runs/a", "runs/a.log", "runs/*", "runs/../runs/a", "--curve=train/loss"])  # each run once
    assert capsys.readouterr().out.count("\n| a |") == 1


def test_what_does_not_compare_is_told(tmp_path):
    a = make_run(tmp_path / "a", lines=LINES)
    same = compare.compare([a, make_run(tmp_path / "b", lines=LINES)])
    assert not same.notes and "nats per token" in same.chart
    other = compare.compare([a, make_run(tmp_path / "c", lines=LINES, tokenizer="B")])
    assert "nats per token" in other.notes[0] and "bits per character" in other.chart
    assert table(other)["a"]["tokenizer"] == "char, 30 ids"
    assert "different text" in compare.compare([a, make_run(tmp_path / "d", text="U")]).notes[0]
    assert "different text" in compare.compare([a, make_run(tmp_path / "e", **{"train.eval_limit": 7})]).notes[0]
    left_to_right = make_run(tmp_path / "f", lines=LINES, **{"diffusion.name": "autoregressive"})
    assert compare.compare([a, left_to_right]).notes == [
        "Exact negative log-likelihoods: f; the other NELBOs are upper bounds on theirs."
    ]
    nothing = compare.compare([make_run(tmp_path / "g")])
    assert nothing.chart is None and len(nothing.notes) == 2 and "metrics.jsonl" in nothing.notes[0]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nowhere"], "'nowhere' is not there, and finds nothing as a pattern"),
        (["runs/z*"], r"'runs/z\*' is not there, and finds nothing as a pattern"),
        (["runs"], "No workdir of a run, a folder with a config.json, among: runs"),
        (["runs/*", "--curve=val/nothing"], "--curve=val/nothing is in no .*; there are .*train/loss.*val/nelbo"),
        (["runs/*", "--output=there/x"], "--output=there/x: name files in a folder that is there"),
        (["runs/*", "--output=runs/"], "--output=runs/: name files in a folder that is there, without their ending"),
        ([], "the following arguments are required: RUN"),
        (["broken"], "broken/config.json is not a configuration .*it was altered"),
        (["unrecorded"], "No run.json in unrecorded"),
        (["misjudged"], "misjudged/eval.json is no evaluation .*: remove it, or evaluate again"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a", lines=LINES)
    (tmp_path / "runs" / "file").write_text("")
    broken = make_run(tmp_path / "broken") / "config.json"
    broken.write_text(broken.read_text().replace('"dim": 256', '"dim": 128'))
    (make_run(tmp_path / "unrecorded") / "run.json").unlink()
    (make_run(tmp_path / "misjudged") / "eval.json").write_text("[1")
    with pytest.raises(UserError, match=sentence) as raised:
        compare.main(arguments)
    assert "\n" not in str(raised.value)


def test_jax_is_not_loaded(tmp_path):
    paths = [str(make_run(tmp_path / name, lines=LINES, **{"seed": i})) for i, name in enumerate("ab")]
    code = f"import sys; from diffrwkv import compare; compare.main({paths!r}); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_of_ours(trained):
    row = table(compare.compare([trained]))["trained"]
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(row["val/nelbo"]) == last["val/nelbo"] and int(row["tokens"]) == last["tokens"] == 12 * 8 * 16
    assert row["parameters"] == str(json.loads((trained / "run.json").read_text())["parameters"])
