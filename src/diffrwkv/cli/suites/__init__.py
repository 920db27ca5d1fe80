"""The flags of `evaluate --suite=NAME`, a file each; `diffrwkv.suites` does what they say."""

import argparse
from collections.abc import Callable

from diffrwkv.cli.suites import choices, likelihood, samples

SUITES: dict[str, Callable[[list[str]], argparse.Namespace]] = {
    "choices": choices.parse_arguments,
    "likelihood": likelihood.parse_arguments,
    "samples": samples.parse_arguments,
}
