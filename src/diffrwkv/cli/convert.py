"""Weights of the original authors' PyTorch models, into a workdir and back.

    diffrwkv convert --from=mdlm --input=model.safetensors --config=FILE.py --workdir=DIR
    diffrwkv convert --to=mdlm --workdir=DIR --output=model.safetensors

The first makes a workdir of the config that `evaluate` and `sample` take like one that `train` wrote, with the given
weights as the weights and as their average (no optimiser's state, so `train` does not go on from it). The second writes
a workdir's average (--raw: the weights themselves) under the original's names. Inputs: .safetensors, .npz, and torch's
.pt, .pth, .ckpt, .bin. Formats: "mdlm", the Transformer of kuleshov-group/mdlm (models/dit.py); "rwkv7", the language
model of BlinkDL/RWKV-LM (RWKV-v7/train_temp).
"""

import argparse
import os
import re
import sys

from diffrwkv import cli, config
from diffrwkv.config import UserError
from diffrwkv.workdir import check_run

FORMATS = ("mdlm", "rwkv7")  # of `convert.FORMATS`


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked, and `overrides` of the config. Raises UserError."""
    given, own = config.split(sys.argv[1:] if arguments is None else arguments)
    overrides = [argument for argument in given if not re.match("--?config(=|$)", argument)]
    p = config.ArgumentParser(
        prog=cli.called("convert"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    p.add_argument("--from", dest="source", choices=FORMATS, help="format of --input, to be made a workdir")
    p.add_argument("--to", dest="target", choices=FORMATS, help="format of --output, to be made from a workdir")
    p.add_argument("--workdir", required=True, help="folder of the run: a new one for --from")
    p.add_argument("--input", help="--from: file of weights")
    p.add_argument("--config", metavar="NAME|FILE.py[:ARGUMENT]", help="--from: an experiment, as for train")
    p.add_argument("--ema", action="store_true", help="--from: the moving average in MDLM's Lightning checkpoint")
    p.add_argument("--output", help="--to: file to write, .safetensors or .npz")
    p.add_argument("--raw", action="store_true", help="--to: the weights themselves, not their moving average")
    p.add_argument("--step", help="--to: checkpoint: a step or 'best' (the newest)")
    args = p.parse_args([*own, *(argument for argument in given if argument not in overrides)])
    args.overrides = overrides
    if bool(args.source) == bool(args.target):
        raise UserError("Say either --from=FORMAT, to make a workdir of weights, or --to=FORMAT, to write a workdir's.")
    flags = {"--from": ("input", "config", "ema"), "--to": ("output", "raw", "step")}
    mine, others = (flags["--from"], flags["--to"]) if args.source else (flags["--to"], flags["--from"])
    way = "--from" if args.source else "--to"
    if alien := [f"--{name}" for name in others if getattr(args, name)]:
        raise UserError(f"{', '.join(alien)} does not go with {way}.")
    for name in mine:
        if getattr(args, name) is None and name != "step":
            raise UserError(f"{way} needs --{name} (--help says what it is).")
    if args.target and overrides:
        raise UserError(f"{overrides[0]} does not go with --to.")
    return args


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    if args.target:
        check_run(args.workdir)
        return
    config.check_keys(config.parse([f"--config={args.config}", *args.overrides]))
    local = args.input.startswith((".", "/", "~")) or "/" not in args.input
    if local and not os.path.isfile(config.at_home(args.input, "--input=")):
        raise UserError(f"--input={args.input}: no such file.")
