"""benchmarks/adaptation.py on tiny models: a line for each start, none measured twice, and a table of them."""

import json
import sys

import pytest

from benchmarks import adaptation, report

pytestmark = pytest.mark.slow

TINY = [
    "config.model.dim=32",
    "config.model.num_layers=2",
    "config.model.mixers.birwkv7.head_dim=16",
    "config.model.mixers.rwkv7.head_dim=16",
    "config.data.length=24",
    "config.optim.warmup_steps=2",
    "config.train.batch_size=4",
    "config.train.eval_batch_size=4",
    "config.train.eval_limit=8",
    "config.train.checkpoint_every=4",
    "config.train.log_every=2",
    "config.train.tensorboard=False",
]


def test_a_line_for_each_start_and_a_table(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 60)
    out = tmp_path / "adaptation.jsonl"
    flags = ["--seeds", "1", "--steps", "4", "--source_steps", "2", "--every", "2", "--draws", "1"]
    flags += [f"--runs={tmp_path / 'runs'}", f"--output={out}", "--set", *TINY]
    flags += [f"config.data.name={tmp_path / 'text.txt'}"]
    names = ["longer", "adapted", "forward"]
    monkeypatch.setattr(sys, "argv", ["adaptation"])
    adaptation.main(["--names", *names, *flags])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == names and [row["steps"] for row in rows] == [6, 4, 4]
    assert all(len(row["curve"]) == row["steps"] // 2 == len(row["cpu_seconds"]) for row in rows)
    assert rows[1]["model"]["pattern"] == "birwkv7" and rows[2]["model"]["pattern"] == "rwkv7"
    record = json.loads((tmp_path / "runs" / "adapted-1" / "run.json").read_text())
    assert record["initial"]["step"] == 2
    stored = json.loads((tmp_path / "runs" / "adapted-1" / "config.json").read_text())
    assert stored["layouts"]["blocks"]["sizes"] == [16, 4, 1] and stored["layouts"]["blocks"]["begins"] == [2, 1, 0]

    monkeypatch.setattr(adaptation, "one_start", lambda *_: pytest.fail("measured twice"))
    adaptation.main(["--names", *names, *flags])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.adaptation()
    assert table.count("\n| ") == 4 and "| adapted, blocks of 1, 4, 16 | 1 |" in table
