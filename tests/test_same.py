"""benchmarks.same: a difference of one bit is told, and what could not be compared is no agreement."""

import ast
import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import same
from benchmarks.same import Row
from diffrwkv.diffusion.samplers import SAMPLERS

LOSSES = {(1, "train/loss"): 4.0, (2, "train/loss"): 3.5, (2, "val/nelbo"): 3.75}
MADE = {"a: tokens": np.arange(6).reshape(2, 3), "a: passes": np.array([2, 4]), "b: tokens": np.zeros((1, 3))}


def test_losses_are_compared_to_the_last_bit():
    assert same.compared_losses("x", LOSSES, dict(LOSSES)) == Row("x", True, "3 numbers; train/loss 3.5 at step 2")
    row = same.compared_losses("x", LOSSES, LOSSES | {(2, "train/loss"): float(np.nextafter(3.5, 4))})
    assert (
        not row.same
        and "1 of 3 numbers differ, by 1.3e-16 at most; step 2 train/loss: 3.5, 3.5000000000000004" in row.note
    )
    shorter = {key: value for key, value in LOSSES.items() if key[0] == 1}
    for pair in ((LOSSES, shorter), (shorter, LOSSES), ({}, {})):
        assert not same.compared_losses("x", *pair).same


def test_tokens_are_compared_one_by_one():
    assert same.compared_tokens("a", MADE, dict(MADE)) == Row("a", True, "3 passes")
    for part, changed in (
        ("a: tokens", np.array([[0, 1, 2], [3, 4, 0]])),
        ("a: tokens", np.arange(6).reshape(1, 6)),
        ("a: passes", np.array([2, 5])),
        ("a: trace", np.zeros(3)),
    ):
        for pair in ((MADE, MADE | {part: changed}), (MADE | {part: changed}, MADE)):
            row = same.compared_tokens("a", *pair)
            assert not row.same and part[3:] in row.note
    failed = {"a: failed": np.array("ValueError: no")}
    assert same.compared_tokens("a", failed, failed) == Row("a", False, "ValueError: no")
    assert not same.compared_tokens("c", MADE, MADE).same


def answer(status=0, printed="", told=""):
    return subprocess.CompletedProcess([], status, printed, told)


def test_a_refusal_is_one_sentence():
    assert same.compared_answers("x", answer(printed="a"), answer(2, told="error: No.\n")) == Row(
        "x", True, "refused: No."
    )
    assert same.compared_answers("x", answer(printed="a"), answer(printed="a")).same
    assert same.sentence(answer(2, told="a warning\nerror: No.\n")) == "error: No."
    traceback = "Traceback (most recent call last):\nerror: No."
    for new in (answer(printed="b"), answer(1, told="error: No."), answer(2, told="usage"), answer(2, told=traceback)):
        assert not same.compared_answers("x", answer(printed="a"), new).same
    assert not same.compared_answers("x", answer(), answer()).same


def test_a_revision_becomes_a_folder(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    (repository / "src" / "diffrwkv").mkdir(parents=True)
    (repository / "src" / "diffrwkv" / "x.py").write_text("x = 1\n")
    author = ["-c", "user.name=n", "-c", "user.email=e@x.org"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    monkeypatch.setattr(same, "ROOT", repository)
    (repository / "src" / "diffrwkv" / "x.py").write_text("x = 2\n")
    assert (same.checkout("HEAD", tmp_path / "old") / "src/diffrwkv/x.py").read_text() == "x = 1\n"
    assert same.checkout(str(repository), tmp_path / "new") == repository.resolve()
    with pytest.raises(SystemExit, match="neither a checkout's folder nor a git revision"):
        same.checkout("no-such-thing", tmp_path / "none")


@dataclasses.dataclass(frozen=True)
class Told(same.Side):
    """A version that trains nothing: it writes and prints what it is told to."""

    def python(self, *arguments, may_refuse=False):
        if arguments[0] == "-c":
            calls, target = ast.literal_eval(arguments[3]), arguments[4]
            names = [f"{name}: {'text' if call.get('stream') else 'tokens'}" for name, call in calls.items()]
            np.savez(target, **{name: np.arange(3) for name in names})
        flags = dict(flag.split("=", 1) for flag in arguments if "=" in flag and flag.startswith("--"))
        workdir = Path(flags.get("--workdir", self.folder))
        if "diffrwkv.train" in arguments:
            workdir.mkdir(exist_ok=True)
            steps = range(1, int(flags["--config.train.num_steps"]) + 1)
            lines = [{"step": n, "train/loss": 4 - n / 8, "tokens_per_second": hash(self)} for n in steps]
            if self.name == "new" and "continued" in workdir.name:
                lines[-1]["train/loss"] += 1e-9
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return answer(printed="text")


def test_what_is_not_the_same_is_found_and_told(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    sides = [Told(name, tmp_path, tmp_path / name) for name in ("old", "new")]
    rows = list(same.compare(*sides, ["blocks", "left_to_right"], steps=4))
    assert [row.what for row in rows if not row.same] == [
        f"{run}: the old checkpoint, continued" for run in ("blocks", "left_to_right")
    ]
    assert "1 of 2 numbers differ, by 3.1e-10 at most; step 6 train/loss: 3.25, 3.250000001" in rows[-1].note
    assert len(rows) == len(same.CALLS["blocks"]) + len(same.CALLS["left_to_right"]) + 8


def test_every_sampler_of_masks_is_called():
    called = {call.get("sampler", "ancestral") for calls in same.CALLS.values() for call in calls.values()}
    assert called <= set(SAMPLERS)
    assert called >= {"ancestral", "confidence", "first_hitting", "ice", "pipelined", "prophet", "remdm"}
    assert set(same.RUNS) == set(same.CALLS) == set(same.PROGRAM)
