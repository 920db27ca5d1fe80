"""Evaluates a trained denoiser: `python -m diffrwkv.evaluate [--suite=likelihood] --workdir=DIR ...`.

Each suite has flags of its own: `python -m diffrwkv.evaluate --suite=NAME --help` lists them.
"""

import sys

from diffrwkv import config
from diffrwkv.config import UserError
from diffrwkv.suites import SUITES


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    p = config.ArgumentParser(add_help=False)
    p.add_argument("--suite", default="likelihood")
    args, others = p.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if args.suite not in SUITES:
        raise UserError(f"--suite={args.suite} is unknown: choose from {', '.join(SUITES)}.")
    SUITES[args.suite](others)


if __name__ == "__main__":
    config.run_program(main)
