"""What the programs of this folder share: where a number was measured, and their result files."""

import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable

import jax

from diffrwkv import timing

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def origin() -> dict[str, str]:
    """Device, commit, versions and command, for every result line."""
    return {
        "device": timing.device_name(),
        "commit": commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def commit() -> str:
    """$DIFFRWKV_COMMIT, where a copy's git knows less; else HEAD, with + when more than results differ from it."""
    if named := os.environ.get("DIFFRWKV_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "pallas_kernels", "experiments")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: pathlib.Path, rows: list[dict]) -> None:
    """JSON lines, replacing the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


def append(path: pathlib.Path, row: dict) -> None:
    """Adds a JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def keeper(path: pathlib.Path, keep: bool) -> Callable[[list[dict]], None]:
    """What adds rows to the file of a run, each when it is measured; it begins anew unless `keep`."""
    begun = keep

    def add(rows: list[dict]) -> None:
        nonlocal begun
        if not begun:
            write(path, [])
            begun = True
        for row in rows:
            append(path, row)

    return add


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a file of JSON lines; [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
