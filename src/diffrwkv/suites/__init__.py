"""What `python -m diffrwkv.evaluate --suite=NAME` does with a run, a file each; its flags are those of `cli.suites`."""

import argparse
from collections.abc import Callable

from diffrwkv.suites import choices, likelihood, samples

SUITES: dict[str, Callable[[argparse.Namespace], None]] = {
    "choices": choices.work,
    "likelihood": likelihood.work,
    "samples": samples.work,
}
