"""Multiple choice, and the last words of passages.

Scores the choices of each question of files of JSON lines, also compressed, and prints a line of JSON for each file:
how often the right choice is the likeliest, also per byte, with standard errors. With --last_word the lines are
passages, of which the last word is filled in and scored. Each result is kept in <workdir>/evaluations/, with a line for
each question beside it, and the same command again goes on behind those that are there. What the numbers mean is told
in docs/evaluation.md.
"""

import argparse
import functools
import os

from diffrwkv import cli, config
from diffrwkv.cli import runs
from diffrwkv.cli.suites.names import check_names, with_names
from diffrwkv.config import ANSWER_DRAWS as DRAWS
from diffrwkv.config import UserError, check_at_least_one

BATCH_SIZE = 64  # rows are short


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(prog=f"{cli.called('evaluate')} --suite=choices", description=__doc__.split("\n\n")[1])
    runs.add(p)
    p.add_argument("--data", nargs="+", action="extend", required=True, metavar="FILE", help="JSON lines of questions")
    p.add_argument("--last_word", action="store_true", help="fill in and score the last word of each line's 'text'")
    p.add_argument("--between", default=" ", help="what stands between a query and a choice (a space)")
    p.add_argument("--draws", type=int, default=DRAWS, help=f"passes for a choice, at most ({DRAWS})")
    p.add_argument("--seed", type=functools.partial(config.seed, name="--seed"), default=0, help="of the masks (0)")
    p.add_argument("--limit", type=int, help="only the first so many questions of each file")
    p.add_argument("--batch_size", type=int, default=BATCH_SIZE, help=f"rows at a time ({BATCH_SIZE})")
    p.add_argument("--block_size", type=int, help="block diffusion: tokens in a block; 0: all")
    p.add_argument("--length", type=int, help="tokens in a row at most: queries are cut (as many as it takes)")
    args = p.parse_args(with_names(arguments))
    counts = ("draws", "limit", "batch_size", "length")
    check_at_least_one(**{f"--{name}": getattr(args, name) for name in counts})
    if args.last_word and args.between != " ":
        raise UserError("--between is of choices: leave it out with --last_word.")
    check_names(args.data)
    return args


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    runs.check(args)
    for name in args.data:
        if not os.path.isfile(name):
            raise UserError(f"--data: there is no file {name!r}.")
