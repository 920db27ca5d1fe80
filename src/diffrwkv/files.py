"""Values and files that tell when they were altered, and one writer at a time. Knows no other module."""

import contextlib
import datetime
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows has none


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, however it is laid out in a file."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes as they lie on disk. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Held(Exception):
    """Another process has the lock; its text is who: "process 7 on tpu-1 since 2026-11-26 15:04:05+00:00"."""


@contextlib.contextmanager
def lock(path: Path, wait: Callable[[str], None] | None = None) -> Iterator[bool]:
    """`with lock(path):` no other process is inside meanwhile. The system lets go of it when this one ends, however.

    Gives whether it could be locked: not every file system has locks.

    Args:
      path: the file of the lock, made if it is not there; it says who holds it.
      wait: called with the holder before it is waited for; None: that is an error.

    Raises:
      Held: another process has it.
      OSError: the file cannot be made.
    """
    with open(path, "a+b", 0) as file:
        locked = fcntl is not None
        if locked:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(300).decode(errors="replace").strip() or "another process"
                if wait is None:
                    raise Held(holder) from None
                wait(holder)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                locked = False
        with contextlib.suppress(OSError):  # who holds it is told only if there is room to write it
            file.truncate(0)
            since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield locked
