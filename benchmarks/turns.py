"""Programs that compile side by side and are timed one at a time, on the one device that they share.

benchmarks/gpu.sh starts many at once: compiling takes most of their time and has a processor for each. The folder
$DIFFRWKV_TURNS holds what they lock; where there is none a program is alone anyhow, and nothing waits.
"""

import contextlib
import fcntl
import os
import pathlib
import time

PATIENCE = 45  # seconds that a program waits for others to compile, which might try their products on the device
_held: dict[str, int] = {}


def _file(name: str) -> int | None:
    """The descriptor of a file that is locked."""
    folder = os.environ.get("DIFFRWKV_TURNS")
    if folder is None:
        return None
    if name not in _held:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        _held[name] = os.open(pathlib.Path(folder) / name, os.O_RDWR | os.O_CREAT)
    return _held[name]


def compiling() -> None:
    """From here on this program compiles, until `alone`; the lock goes with the process."""
    if (file := _file("compiling")) is not None:
        fcntl.flock(file, fcntl.LOCK_SH)


@contextlib.contextmanager
def alone():
    """Within it no other program is timed, nor compiles, unless it did so for PATIENCE seconds.

    Gives whether there may be others.
    """
    if (others := _file("compiling")) is None or (turn := _file("turn")) is None:
        yield False
        return
    fcntl.flock(others, fcntl.LOCK_UN)
    late = time.monotonic() + PATIENCE
    fcntl.flock(turn, fcntl.LOCK_EX)
    while time.monotonic() < late:
        try:
            fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(0.1)
    fcntl.flock(others, fcntl.LOCK_UN)
    try:
        yield True
    finally:
        fcntl.flock(turn, fcntl.LOCK_UN)
        compiling()
