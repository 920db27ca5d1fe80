"""The folder of a run: found, made, held by one process at a time, and what it says of itself, read without JAX.

What does not belong is moved, never deleted.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffrwkv import config, files
from diffrwkv.config import UserError, at_home


def named(path: str | os.PathLike) -> Path:
    """The path that --workdir names, with ~ as the shell has it. Raises UserError for a user who is not there."""
    return at_home(path, "--workdir=")


def make(path: str | os.PathLike) -> Path:
    """`named`, and made with its parents if it is not there. Raises UserError when it cannot be."""
    path = named(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.listdir(path)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--workdir={path} is a file or a broken link, or lies in one: name a folder.") from None
    except (OSError, ValueError) as e:
        raise UserError(f"--workdir={path} cannot be used ({getattr(e, 'strerror', None) or e}).") from None
    return path


def check(path: str | os.PathLike) -> None:
    """Raises UserError where a file stands in the way of the folder that `make` would make."""
    path = named(path)
    standing = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if standing is not None and not standing.is_dir():
        raise UserError(f"--workdir={path} is a file or a broken link, or lies in one: name a folder.")


def check_run(path: str | os.PathLike) -> Any:
    """The config of the run in the folder. Raises UserError where there is none."""
    return config.load(named(path) / "config.json")


@contextlib.contextmanager
def making(path: str | os.PathLike) -> Iterator[Path]:
    """`make`, undone where the body raises before there is a config.json: a start that failed leaves no folder."""
    path = named(path)
    new = [place for place in (path, *path.parents) if not place.exists()]
    make(path)
    try:
        yield path
    except BaseException:
        if path in new and not (path / "config.json").exists():
            with contextlib.suppress(OSError):  # something else came to lie there: it stays
                (path / "lock").unlink(missing_ok=True)
                for folder in (path / "checkpoints", *new):
                    if folder.exists():
                        folder.rmdir()
        raise


def has_checkpoints(path: Path) -> bool:
    """Whether there is something to go on from."""
    folder = path / "checkpoints"
    return folder.is_dir() and any(p.name.isdecimal() for p in folder.iterdir())


def read_record(workdir: Path) -> dict[str, Any]:
    """`<workdir>/run.json`: versions, devices and the data's description. Raises UserError."""
    path = workdir / "run.json"
    try:
        record = config.read_sealed(path)
        if "tokenizer_fingerprint" not in record.get("data", {}):
            raise ValueError("it does not say which tokenizer the run has")
    except FileNotFoundError:
        raise UserError(
            f"No run.json in {workdir}, which says what data and tokenizer its checkpoints are of: put it back, or "
            "take another --workdir."
        ) from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}).") from None
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is not the record of a run ({e}).") from None
    return record


def metrics_line(line: bytes) -> dict[str, Any] | None:
    """What a line of a metrics.jsonl says; None if it is damaged, or no line of ours."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def metrics_lines(path: str | os.PathLike) -> list[bytes]:
    """The lines of a metrics.jsonl that are not empty, each with a newline at its end."""
    try:
        return [line + b"\n" for line in Path(path).read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] without the file. A line that was cut off by a kill, or damaged, is left out."""
    return [value for line in metrics_lines(path) if (value := metrics_line(line)) is not None]


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """`with held(path):` no other process writes to the folder meanwhile; a lock whose holder died is free.

    Raises UserError when another process holds it, which `<path>/lock` names, or when nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        try:
            locked = stack.enter_context(files.lock(path / "lock"))
        except files.Held as holder:
            raise UserError(
                f"{path} is in use by {holder}: wait for its end, stop it, or take another --workdir."
            ) from None
        except OSError as e:
            raise UserError(f"--workdir={path} cannot be written to ({e.strerror}).") from None
        if not locked:
            print(f"{path} cannot be locked: see that no second process writes to it.", flush=True)
        yield


def aside(path: Path, name: str) -> Path:
    """A new path `<path>/aside/<name>`, with a number behind the stem, for what does not belong."""
    folder = path / "aside"
    folder.mkdir(exist_ok=True)
    stem, dot, suffix = name.partition(".")
    number = 1
    while (target := folder / f"{stem}-{number}{dot}{suffix}").exists():
        number += 1
    return target
