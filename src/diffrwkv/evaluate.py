"""Evaluates a trained denoiser: `python -m diffrwkv.evaluate [--suite=likelihood] --workdir=DIR ...`.

Each suite has flags of its own: `python -m diffrwkv.evaluate --suite=NAME --help` lists them.
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("evaluate")

import argparse

from diffrwkv.cli import evaluate as flags
from diffrwkv.suites import SUITES


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError for bad input, before any compute."""
    SUITES[args.suite](args)
