"""The folder of a run: who may write to it, what is refused, what is moved aside, and what damage does to its files."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffrwkv import config, metrics, train, workdir
from diffrwkv.config import UserError
from diffrwkv.run import load_tokenizer
from diffrwkv.workdir import read_metrics, read_record


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


# --- The folder itself --------------------------------------------------------------------------------


def test_a_workdir_that_cannot_be_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, told in [
        (tmp_path / "file", "a file or a broken link"),
        (tmp_path / "file" / "in", "a file or a broken link"),
        (tmp_path / "link", "a file or a broken link"),
        (tmp_path / ("x" * 300), "too long"),
        (f"{tmp_path}/a\0b", "null"),
        ("~nobody-of-this-name/x", "home"),
    ]:
        with pytest.raises(UserError, match=told) as e:
            workdir.make(name)
        assert "\n" not in str(e.value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workdir.make("~/runs/x") == tmp_path / "runs" / "x" and (tmp_path / "runs" / "x").is_dir()


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"), workdir.held(tmp_path):
        pass


def test_one_process_holds_a_workdir(tmp_path):
    with workdir.held(tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .* since 2"), workdir.held(tmp_path):
            pass
        assert str(os.getpid()) in (tmp_path / "lock").read_text()  # who was refused has left it as it was
    with workdir.held(tmp_path):
        pass


def test_a_dead_holder_holds_nothing(tmp_path):
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "; time.sleep(60)", tmp_path / "lock"], stdout=subprocess.PIPE
    )
    with holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="in use by another process"), workdir.held(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with workdir.held(tmp_path):
        pass


def test_training_refuses_a_held_workdir(programs, run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with workdir.held(run), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        train.main([f"--config={programs.config}", f"--workdir={run}", "--config.train.num_steps=20"])
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"} == {
        p: contents for p, contents in before.items() if p.name != "lock"
    }


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_checkpoints_without_their_record_are_refused(programs, run, name):
    (run / name).unlink()
    with pytest.raises(UserError, match=f"has checkpoints but no {name}"):
        train.main([f"--config={programs.config}", f"--workdir={run}", "--config.seed=5"])


# --- Its JSON files -----------------------------------------------------------------------------------

OTHERS = [b"", b"[]", b"3", b'"x"', b"null", b"{}", b"{", b"[" * 10**6, b"\xff\xfe{}", b'{"type": []}', b"\0"]
READERS = {
    "config.json": lambda folder: config.load(folder / "config.json").to_dict(),
    "run.json": read_record,
    "tokenizer.json": lambda folder: load_tokenizer(folder).to_json(),
}


@pytest.mark.parametrize("name", READERS)
def test_other_json_is_one_sentence(run, name):
    for contents in OTHERS:
        (run / name).write_bytes(contents)
        with pytest.raises(UserError, match=name) as e:
            READERS[name](run)
        assert "\n" not in str(e.value), contents


def test_a_config_of_other_keys_is_refused(tmp_path):
    for change, told in [
        (lambda c: c.pop("model"), "'model'"),
        (lambda c: c.update(extra={}), "'extra'"),
        (lambda c: c.update(model=3), "'model'"),
        (lambda c: c.update(seed={}), "'seed'"),
        (lambda c: c["train"].pop("keep"), "config.train.keep"),
        (lambda c: c["data"].update(lenght=3), "config.data.lenght"),
        (lambda c: c["diffusion"].pop("name"), "config.diffusion.name"),
    ]:
        value = config.base().to_dict()
        change(value)
        config.write_json(config.seal(value), tmp_path / "config.json")
        with pytest.raises(UserError, match=f"not a configuration.*{told}"):
            config.load(tmp_path / "config.json")


@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_or_changes_no_value(run, name):
    """Cut, altered, emptied, removed: 100 draws a file."""
    rng = np.random.default_rng(0)
    path, read = run / name, READERS[name]
    original, value = path.read_bytes(), read(run)
    refused = 0
    for draw in range(100):
        contents = bytearray(original)
        if draw % 2:
            contents[rng.integers(len(original))] ^= 1 << rng.integers(8)
        else:
            del contents[rng.integers(len(original)) :]
        path.write_bytes(contents)
        try:
            assert read(run) == value, (draw, bytes(contents))
        except UserError as e:
            assert "\n" not in str(e)
            refused += 1
    assert refused > 60
    path.unlink()
    with pytest.raises(UserError, match=name):
        read(run)


# --- metrics.jsonl ------------------------------------------------------------------------------------


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_metrics(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def test_what_does_not_belong_is_moved_aside(tmp_path, capsys):
    good = [json.dumps({"step": step, "loss": step / 7}) for step in range(1, 6)]
    odd = ['{"step": 2, "lo', "[]", "3", '{"step": "x"}', '{"loss": 1}', "[" * 100_000, good[0]]
    write_metrics(tmp_path, good[0], odd[0], good[1], *odd[1:], good[2], good[3], good[4])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff{"step": 6')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 1, 3, 4, 5]
    writer = metrics.Writer(tmp_path, 4)
    assert writer.last == {"step": 4, "loss": 4 / 7}
    writer.write(5, {"loss": 0.5})
    writer.close()
    losses = [(line["step"], line["loss"]) for line in lines_of(tmp_path)]
    assert losses == [(1, 1 / 7), (2, 2 / 7), (3, 3 / 7), (4, 4 / 7), (5, 0.5)]
    moved = (tmp_path / "aside" / "metrics-1.jsonl").read_bytes()
    assert moved == "".join(line + "\n" for line in [*odd, good[4]]).encode() + b'\xff{"step": 6\n'
    assert "Moved 9 lines of metrics.jsonl" in capsys.readouterr().out


def test_a_run_without_its_checkpoints_keeps_its_metrics_aside(tmp_path, capsys):
    write_metrics(tmp_path, '{"step": 1}', '{"step": 2}')
    for number in (1, 2):
        metrics.Writer(tmp_path, 0).close()
        assert lines_of(tmp_path) == []
        assert (tmp_path / "aside" / f"metrics-{number}.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
        assert "Moved 2 lines" in capsys.readouterr().out
        write_metrics(tmp_path, '{"step": 1}', '{"step": 2}')


def test_a_kill_before_the_newline(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    writer = metrics.Writer(tmp_path, 2)
    writer.write(3, {})
    writer.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3] and capsys.readouterr().out == ""


def test_values_of_the_last_step_are_added(tmp_path):
    write_metrics(tmp_path, '{"step": 1, "a": 1}', '{"step":2,"a": 2}')
    for value in (3, 4):
        writer = metrics.Writer(tmp_path, 2)
        writer.write(2, {"b": value})
        writer.close()
        assert lines_of(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2, "b": value}]


def test_altered_lines_are_told(tmp_path, capsys):
    writer = metrics.Writer(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"a": step / 3, "b": None})
    writer.write(3, {"c": 1})
    writer.close()
    state, text = json.loads(json.dumps(writer.state())), (tmp_path / "metrics.jsonl").read_text()

    def told(text):
        (tmp_path / "metrics.jsonl").write_text(text)
        writer = metrics.Writer(tmp_path, 3, state=state)
        writer.close()
        return "is not what it was when the checkpoint of step 3" in capsys.readouterr().out

    assert not told(text) and not told(text + '{"step": 4}\n') and not told(text.replace('"c"', '"d": 1, "c"'))
    lines = text.splitlines(keepends=True)
    assert told(text.replace("0.333", "0.332")) and told(text.replace('"c": 1', '"c": 2'))
    assert told("") and told("".join(lines[:2])) and told("".join(lines[1:]))


def test_no_room_for_a_line_stops(tmp_path):
    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, text):
            return self.file.write(text[: self.room])

        def close(self):
            self.file.close()

    writer = metrics.Writer(tmp_path, 0)
    writer.write(1, {"a": 1})
    writer._file = Full(writer._file, 5)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No space left on device\): training"):
        writer.write(2, {"a": 2})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1}]


# --- Whole runs ---------------------------------------------------------------------------------------

HOLD = """
import time
write = metrics.Writer.write
def and_wait(self, step, values):
    write(self, step, values)
    if step == 3:
        (open(sys.argv[2].split("=")[1] + "/waits", "w")).close()
        time.sleep(30)
metrics.Writer.write = and_wait
"""


@pytest.mark.slow
def test_of_two_processes_one_refuses_and_the_other_is_whole(programs, trained, tmp_path):
    folder = tmp_path / "run"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(programs.train, folder, patch=HOLD)
        while not (folder / "waits").exists():
            assert not first.done(), first.result().stderr
            time.sleep(0.1)
        second = programs.train(folder)
        first = first.result()
    assert second.returncode == 2 and "in use by process" in second.stderr and second.stderr.count("\n") == 1
    assert first.returncode == 0, first.stderr
    assert (folder / "config.json").read_bytes() == (trained / "config.json").read_bytes()
    assert [x["train/loss"] for x in lines_of(folder)] == [x["train/loss"] for x in lines_of(trained)]


SMALL_FILES = """
import resource
save = checkpoint.Checkpoints.save
def and_limit(self, step, *rest):
    if step == 4:
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, resource.RLIM_INFINITY))
    save(self, step, *rest)
checkpoint.Checkpoints.save = and_limit
"""


@pytest.mark.slow
def test_no_room_for_a_checkpoint_stops_and_keeps_the_last(programs, trained, tmp_path):
    folder = tmp_path / "run"
    stopped = programs.train(folder, "--config.train.compilation_cache=", patch=SMALL_FILES)
    assert stopped.returncode == 2, stopped.stderr
    told = stopped.stderr.splitlines()
    assert len(told) == 1 and "step 4 could not be written" in told[0] and "that of step 2 is kept" in told[0]
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] < 12
    done = programs.train(folder)
    assert done.returncode == 0 and "Going on from step 2" in done.stdout
    assert [x["train/loss"] for x in lines_of(folder)] == [x["train/loss"] for x in lines_of(trained)]
