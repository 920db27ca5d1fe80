"""Weights of others into a workdir, and a workdir's weights out.

    diffrwkv convert --input=FILE|FOLDER|hf:OWNER/NAME --workdir=DIR
    diffrwkv convert --to=hf --workdir=DIR --output=FOLDER [--push=OWNER/NAME]
    diffrwkv convert --to=mdlm|rwkv7|fla --workdir=DIR --output=model.safetensors

The first makes a workdir that `evaluate` and `sample` take like one that `train` wrote, with the given weights as the
weights and as their average (no optimiser's state, so `train` does not go on from it). It reads what is published of
MDLM, BD3-LM, SEDD, Duo, and RWKV-7 (BlinkDL's .pth, and flash-linear-attention's), and what --to=hf wrote: files
.safetensors, .npz, and torch's .pt, .pth, .ckpt, .bin; folders with a config.json; models of the hub (the extra `hub`).
Whose they are is told from config.json and from the names; where neither says it, --from does. Keys are changed by
--config.KEY=VALUE; with --config=FILE that experiment's config is taken, if the weights are of its model.

The second writes a workdir's average (--raw: the weights themselves) as a folder that `diffrwkv.load` takes, with a
card; names are those of MDLM's, BD3-LM's or flash-linear-attention's class where that computes the same. --push uploads
it. The third writes them alone, under another project's names: "mdlm", the Transformer of kuleshov-group/mdlm
(models/dit.py); "rwkv7", the language model of BlinkDL/RWKV-LM (RWKV-v7/train_temp); "fla", flash-linear-attention's.
"""

import argparse
import os
import re
import sys

from diffrwkv import cli, config, hub, shipped
from diffrwkv.config import UserError
from diffrwkv.workdir import check_run

FORMATS = ("mdlm", "rwkv7", "fla")  # of `weights.FORMATS`
KINDS = ("mdlm", "bd3lm", "sedd", "duo", "rwkv7", "fla")  # of `published.KINDS`


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked, and `overrides` of the config. Raises UserError."""
    given, own = config.split(sys.argv[1:] if arguments is None else arguments)
    overrides = [argument for argument in given if not re.match("--?config(=|$)", argument)]
    p = config.ArgumentParser(
        prog=cli.called("convert"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    p.add_argument("--input", help="weights to make a workdir of: a file, a folder, or hf:OWNER/NAME[/FILE]")
    p.add_argument("--from", dest="source", choices=KINDS, help="--input: whose they are, if nothing says it")
    p.add_argument("--config", metavar="NAME|FILE.py[:ARGUMENT]", help="--input: an experiment, as for train")
    p.add_argument("--ema", action="store_true", help="--input: the moving average in MDLM's Lightning checkpoint")
    p.add_argument("--workdir", required=True, help="folder of the run: a new one for --input")
    p.add_argument("--to", dest="target", choices=["hf", *FORMATS], help="what to make of the workdir")
    p.add_argument("--output", help="--to: folder (hf), or file, .safetensors or .npz")
    p.add_argument("--raw", action="store_true", help="--to: the weights themselves, not their moving average")
    p.add_argument("--step", help="--to: checkpoint: a step or 'best' (the newest)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="--to=hf: of the weights (float32)")
    p.add_argument("--push", metavar="OWNER/NAME", help="--to=hf: upload the folder as this model of the hub")
    args = p.parse_args([*own, *(argument for argument in given if argument not in overrides)])
    args.overrides = overrides
    if bool(args.input) == bool(args.target):
        raise UserError("Say either --input=WEIGHTS, to make a workdir of them, or --to=FORMAT, to write a workdir's.")
    of = {"input": ("source", "config", "ema"), "to": ("output", "raw", "step", "push", "dtype")}
    mine, others = ("input", of["to"]) if args.input else ("to", of["input"])
    if alien := [f"--{'from' if name == 'source' else name}" for name in others if getattr(args, name)]:
        raise UserError(f"{', '.join(alien)} does not go with --{mine}.")
    if args.target and not args.output:
        raise UserError("--to needs --output (--help says what it is).")
    if args.target != "hf" and (wrong := [name for name in ("push", "dtype") if getattr(args, name) is not None]):
        raise UserError(f"--{wrong[0]} goes with --to=hf.")
    args.dtype = args.dtype or "float32"
    if args.target and overrides:
        raise UserError(f"{overrides[0]} does not go with --to.")
    return args


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    if args.target:
        check_run(args.workdir)
        return
    if args.config:
        config.check_keys(config.parse([f"--config={args.config}", *args.overrides]))
    source = shipped.path_of(args.input)
    if not hub.is_model(source) and not os.path.exists(config.at_home(source, "--input=")):
        raise UserError(f"--input={args.input}: no such file or folder.")
