"""How good samples are.

Samples of the run by any sampler, or the texts of a file (--texts), as a judge that reads from left to right finds
them, and how varied they are; beside the same of as much real text, the run's validation text or --real. Prints JSON
and keeps it in <workdir>/evaluations/; the same command again prints what is kept. docs/evaluation.md says which number
means what.
"""

import argparse

from diffrwkv import cli, config, shipped
from diffrwkv.cli import runs, sampler_flags
from diffrwkv.cli.suites.names import check_texts
from diffrwkv.config import UserError, check_at_least_one
from diffrwkv.workdir import check_run

NUMBER = 64  # of samples, unless another is asked for


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(
        prog=f"{cli.called('evaluate')} --suite=samples", description=" ".join(__doc__.split("\n\n")[1].split())
    )
    p.add_argument("--judge", required=True, metavar="WORKDIR|NAME|hf:NAME", help="a causal model that judges")
    runs.add(p, required=False, what="of the model to sample from, or of the real text")
    p.add_argument("--num", type=int, help=f"how many samples ({NUMBER}), or texts (all)")
    p.add_argument("--texts", metavar="FILE", help="texts in place of samples: jsonl or txt, or what --data takes")
    p.add_argument("--real", metavar="FILE", help="real text to stand beside (the run's validation text)")
    p.add_argument("--window", type=int, help="tokens that the judge reads at a time (as it was trained)")
    p.add_argument("--stride", type=int, help="new tokens of each window that is not the first (half a window)")
    p.add_argument("--features", metavar="WORKDIR|NAME|hf:NAME", help="model whose features MAUVE compares (the judge)")
    p.add_argument("--length", type=int, help="tokens in a sample, or a row of validation text (config.data.length)")
    sampler_flags.add(p)
    p.add_argument("--batch_size", type=int, default=16, help="samples and windows at a time; changes no sample (16)")
    p.add_argument("--each_line", action="store_true", help="each line of a text file is a text")
    p.add_argument("--text_key", help="key of the text in JSON, csv and parquet (config.data.text_key)")
    p.add_argument("--data_root", help="folder of the data, if not the one of training")
    args = p.parse_args(arguments)
    counts = ("num", "length", "window", "stride", "batch_size")
    check_at_least_one(**{f"--{name}": getattr(args, name) for name in counts})
    sampler_flags.check(args)
    if args.num == 1:
        raise UserError("--num must be at least 2: one sample has no standard error.")
    for name in ("texts", "real"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} is empty: name a file.")
    if args.texts is None:
        if args.workdir is None and args.model is None:
            raise UserError("--workdir names the run to sample from, and --model a model: give one, or --texts.")
        if args.real is None and (args.each_line or args.text_key):
            raise UserError(f"--{'each_line' if args.each_line else 'text_key'} is of a file: name one, with --texts.")
    else:
        defaults = {"seed": 0, "stop_at_eos": True, "set": {}}
        flags = (*sampler_flags.OPTIONS, "sampler", "set", "block_size", "frozen_cache", "seed", "step", "raw")
        if wrong := [f for f in flags if getattr(args, f) not in (None, False) and getattr(args, f) != defaults.get(f)]:
            raise UserError(f"--{wrong[0]} is of samples, and --texts takes a file in place of them: leave one out.")
    return args


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    runs.check(args)
    for judge in (args.judge, args.features):
        if judge in shipped.MODELS:
            shipped.path_of(judge)  # refuses a name that is a folder's too
        elif judge is not None and not judge.startswith("hf:"):
            check_run(judge)
    check_texts([name for name in (args.texts, args.real) if name is not None], args.data_root)
