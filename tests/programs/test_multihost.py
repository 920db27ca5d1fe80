"""Two processes, two virtual devices each, over gloo: what several hosts do."""

import subprocess
import sys

import pytest

from diffrwkv.workdir import read_metrics

TRAIN = """
import functools, sys, jax
from diffrwkv import cli, train
port, process = int(sys.argv.pop(1)), int(sys.argv.pop(1))
jax.distributed.initialize = functools.partial(jax.distributed.initialize, f"localhost:{port}", 2, process)
cli.run_program(lambda _: train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_train_save_and_go_on(programs, free_port):
    workdir = programs.folder / "two"

    def both(*arguments):
        command = [f"--config={programs.config}", f"--workdir={workdir}", "--config.train.multihost", *arguments]
        port = free_port()
        running = [
            subprocess.Popen(
                [sys.executable, "-c", TRAIN, str(port), str(i), *command],
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
    assert "config.train.multihost cannot reach other processes" in line and "coordinator" in line


@pytest.fixture
def free_port():
    import socket

    def find():
        with socket.socket() as s:
            s.bind(("localhost", 0))
            return s.getsockname()[1]

    return find
