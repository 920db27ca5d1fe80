"""Runs tasks of EleutherAI's lm-evaluation-harness (the extra `lm-eval`) on a run.

Prints their table and keeps the numbers in <workdir>/evaluations/. Tasks are the harness's own, which it downloads, and
those of YAML files in --include_path, whose data can be files (dataset_path: json). docs/evaluation.md says which
numbers are bounds.
"""

import argparse
import functools
from pathlib import Path

from diffrwkv import cli, config
from diffrwkv.cli import runs
from diffrwkv.config import ANSWER_DRAWS as DRAWS
from diffrwkv.config import UserError, check_at_least_one

BATCH_SIZE = 64


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(prog=cli.called("lm_eval"), description=__doc__.split("\n\n")[1])
    runs.add(p)
    p.add_argument("--tasks", required=True, help="of the harness: names with commas between them")
    p.add_argument("--include_path", help="folder of more tasks, YAML")
    p.add_argument("--num_fewshot", type=int, help="examples before each question (as the task has it)")
    p.add_argument("--limit", type=int, help="only the first so many documents of each task")
    p.add_argument("--draws", type=int, default=DRAWS, help=f"passes for a text, at most ({DRAWS})")
    p.add_argument("--seed", type=functools.partial(config.seed, name="--seed"), default=0, help="of all noise (0)")
    p.add_argument("--batch_size", type=int, default=BATCH_SIZE, help=f"rows at a time ({BATCH_SIZE})")
    p.add_argument("--block_size", type=int, help="block diffusion: tokens in a block; 0: all")
    p.add_argument("--length", type=int, help="tokens in a row at most: contexts are cut (as many as it takes)")
    args = p.parse_args(arguments)
    counts = ("draws", "limit", "batch_size", "length")
    check_at_least_one(**{f"--{name}": getattr(args, name) for name in counts})
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num_fewshot must be at least 0, got {args.num_fewshot}.")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise UserError(f"--include_path={args.include_path} is no folder.")
    return args


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    runs.check(args)
