"""Evaluates a run by one of the suites, each of which has flags of its own."""

import argparse
import sys

from diffrwkv import config
from diffrwkv.cli.suites import SUITES
from diffrwkv.config import UserError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags of the suite, and its name as `suite`. Raises UserError."""
    p = config.ArgumentParser(add_help=False)
    p.add_argument("--suite", default="likelihood")
    own, others = p.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if own.suite not in SUITES:
        raise UserError(f"--suite={own.suite} is unknown: choose from {', '.join(SUITES)}.")
    return argparse.Namespace(suite=own.suite, **vars(SUITES[own.suite].parse_arguments(others)))


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    SUITES[args.suite].check(args)
