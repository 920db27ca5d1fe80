"""What `python -m diffrwkv.evaluate --suite=NAME` does with a run: a file each, a program with flags of its own."""

from collections.abc import Callable

from diffrwkv.suites import choices, likelihood, samples

SUITES: dict[str, Callable[[list[str]], None]] = {
    "choices": choices.main,
    "likelihood": likelihood.main,
    "samples": samples.main,
}
