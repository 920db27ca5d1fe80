"""What somebody at a terminal sees of work that takes its time: bars and words on stderr, and nothing elsewhere."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


def shown() -> bool:
    """Whether somebody watches: stderr is a terminal."""
    return sys.stderr.isatty()


def bar(total: int | None, what: str, *, show: bool, unit: str = "it", compiles: bool = False) -> Any:
    """A tqdm of work that is called `what`; it goes away at its end, for what comes of the work is printed.

    Args:
      show: else it draws nothing.
      compiles: it says "compiling" until the first `update`, for the first part takes longer than the others.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if not self.disable and self.desc != f"{what}: ":
                self.set_description(what, refresh=False)
            return super().update(n)

    return Bar(total=total, desc="compiling" if compiles else what, disable=not show, unit=unit, leave=False)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """`with waiting("compiling"):` a word for work whose length nobody knows, taken away at its end."""
    if not shown():
        yield
        return
    sys.stderr.write(f"{what} ...")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
