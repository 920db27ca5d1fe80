"""Programs on one device: they compile side by side, and one is timed at a time, when none compiles."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks import turns

PROGRAM = """
import sys, time
from benchmarks import turns

name, seconds = sys.argv[1], float(sys.argv[2])
turns.compiling()
print(f"{time.monotonic()} {name} compiles", flush=True)
time.sleep(seconds)
print(f"{time.monotonic()} {name} has compiled", flush=True)
with turns.alone() as waited:
    print(f"{time.monotonic()} {name} begins {waited}", flush=True)
    time.sleep(0.3)
    print(f"{time.monotonic()} {name} ends", flush=True)
"""


def test_programs_take_turns(tmp_path):
    env = os.environ | {"DIFFRWKV_TURNS": str(tmp_path / "turns")}
    programs = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, name, seconds], env=env, stdout=subprocess.PIPE, text=True)
        for name, seconds in (("a", "1"), ("b", "0"), ("c", "2"))
    ]
    lines = [line.split(maxsplit=1) for program in programs for line in program.communicate()[0].splitlines()]
    told = [text for _, text in sorted(lines, key=lambda line: float(line[0]))]
    assert len(told) == 12
    turns_taken = [text for text in told if "begins" in text or "ends" in text]  # a late start may stand between them
    names = [text[0] for text in turns_taken[::2]]
    assert sorted(names) == ["a", "b", "c"]
    assert turns_taken == [text for name in names for text in (f"{name} begins True", f"{name} ends")]
    if told.index("b has compiled") > told.index("c compiles"):  # else c was late, and b rightly did not wait
        assert told.index("c has compiled") < told.index(turns_taken[0])


def test_a_late_compilation_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFRWKV_TURNS", str(tmp_path))
    monkeypatch.setattr(turns, "_held", {})
    monkeypatch.setattr(turns, "PATIENCE", 0.2)
    hold = "import sys; from benchmarks import turns; turns.compiling(); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        start = time.monotonic()
        with turns.alone():
            assert 0.2 <= time.monotonic() - start < 5
    finally:
        other.communicate("")
        for file in turns._held.values():
            os.close(file)


@pytest.mark.parametrize("again", (False, True))
def test_without_others_nothing_waits(monkeypatch, again):
    monkeypatch.delenv("DIFFRWKV_TURNS", raising=False)
    turns.compiling()
    for _ in range(1 + again):
        with turns.alone() as waited:
            assert not waited
