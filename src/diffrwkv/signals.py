"""What SIGTERM and SIGINT do to a program, from its first line on: they end it with a word and status 128 + number.

While modules are imported they end the process at once. Later they raise KeyboardInterrupt, so that files are closed.
"""

import os
import signal
import threading
from typing import Any, NoReturn


def end_at_once() -> None:
    """From now on a signal ends the process; one that the caller had ignored (nohup) stays ignored."""
    _take(_end)


def interrupt() -> None:
    """From now on a signal raises KeyboardInterrupt(number), which `told` puts into words."""
    _take(_interrupt)


def told(error: KeyboardInterrupt) -> tuple[str, int]:
    """What to say of an interrupt, and the exit status."""
    number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
    return f"Stopped by {number.name}.", 128 + number


def _take(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(number)


def _end(number: int, frame: Any) -> NoReturn:
    text, status = told(KeyboardInterrupt(number))
    os.write(2, f"{text}\n".encode())
    os._exit(status)
