"""What the flags of suites have in common: --data with several names."""

from collections.abc import Sequence

from diffrwkv.config import UserError
from diffrwkv.data import evaluation as texts
from diffrwkv.data import sources


def with_names(arguments: Sequence[str]) -> list[str]:
    """The arguments for argparse: `--data=NAME` takes more names behind it, as `--data NAME` does."""
    given: list[str] = []
    for arg in arguments:
        name, _, value = arg.partition("=")
        given += [name, value] if name == "--data" and value[:1] not in ("", "-") else [arg]
    return given


def check_names(names: Sequence[str]) -> None:
    """Raises UserError where one of --data is empty, or stands there twice."""
    if "" in names:
        raise UserError("--data is empty: name a set or a path.")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--data names {sorted(repeated)[0]!r} more than once.")


def check_texts(names: Sequence[str], root: str | None) -> None:
    """Raises UserError for a name of texts that is none, and no path either."""
    for name in names:
        if name not in texts.SETS:
            try:
                sources.check_name(name, root)
            except ValueError as e:
                raise UserError(str(e)) from None
