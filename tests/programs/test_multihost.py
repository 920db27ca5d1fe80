"""Two processes, two virtual devices each, over gloo: what several hosts do."""

import subprocess
import sys

import pytest

from diffrwkv import config, sharding, train
from diffrwkv.config import UserError
from diffrwkv.workdir import read_metrics

HOSTS = "--config.train.hosts."


@pytest.mark.slow
def test_two_processes_train_save_and_go_on(programs, free_port):
    workdir = programs.folder / "two"

    def both(*arguments):
        command = [f"--config={programs.config}", f"--workdir={workdir}", "--config.train.multihost", *arguments]
        command += [f"{HOSTS}coordinator=localhost:{free_port()}", f"{HOSTS}num_processes=2"]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "diffrwkv.train", *command, f"{HOSTS}process_id={i}"],
                env=programs.environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for i in range(2)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], outputs
        return outputs

    first, second = both("--config.train.num_steps=6")
    assert "on 4 x cpu" in first and "step 6/6" in first and "step 6/6" not in second
    whole = programs.folder / "two-whole"
    first, _ = both()
    assert "Going on from step 6" in first
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    workdir = whole
    both()
    for a, b in zip(lines, read_metrics(workdir / "metrics.jsonl"), strict=True):
        assert a["train/loss"] == b["train/loss"]


def test_several_hosts_without_a_coordinator_are_refused(programs):
    done = programs.train(programs.folder / "alone", "--config.train.multihost")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert "config.train.multihost cannot reach other processes" in line and "coordinator=HOST:PORT" in line


@pytest.mark.parametrize(
    "given, told",
    [
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 0}, "does nothing without --config.train.multihost"),
        ({"coordinator": "a:1", "process_id": 0}, "num_processes is missing: give each process --config.train.hosts"),
        ({"num_processes": 2, "process_id": 0}, "coordinator is missing"),
        ({"coordinator": "a:1", "num_processes": 2}, "process_id is missing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "must be HOST:PORT of process 0"),
        ({"coordinator": "http://a:1", "num_processes": 2, "process_id": 0}, "must be HOST:PORT of process 0"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id = 2 is none of 2 processes"),
    ],
)
def test_hosts_that_are_half_named_are_refused(given, told):
    cfg = config.base()
    cfg.train.multihost = "does nothing" not in told
    cfg.train.hosts.update(given)
    with pytest.raises(UserError, match=told):
        train.check(cfg)


def test_hosts_are_named_in_full():
    cfg = config.base()
    cfg.train.multihost = True
    for coordinator in ("10.0.0.1:12345", "node-3.cluster:1", "[fe80::1]:80"):
        cfg.train.hosts.update({"coordinator": coordinator, "num_processes": 2, "process_id": 1})
        train.check(cfg)


@pytest.mark.parametrize(
    "host, told",
    [("localhost", "Nothing answers at .*: start process 0 there"), ("no.such.invalid", "no host is called")],
)
def test_a_coordinator_that_is_not_there_is_told(host, told, free_port, monkeypatch):
    monkeypatch.setattr(sharding, "PATIENCE", 0)
    with pytest.raises(UserError, match=told):
        sharding.join_processes(f"{host}:{free_port()}", 2, 1)


def test_a_config_from_before_there_were_hosts_is_read():
    stored = config.base().to_dict()
    del stored["train"]["hosts"]
    assert config.translate(stored) == config.base().to_dict()


@pytest.fixture
def free_port():
    import socket

    def find():
        with socket.socket() as s:
            s.bind(("localhost", 0))
            return s.getsockname()[1]

    return find
