"""Trains a denoiser of an experiment into a workdir. The same command again goes on where it stopped, to the last bit.

An experiment is named (--list tells which there are) or is a Python file with get_config in it; what follows a colon is
its argument. Every key of its config can be set on the command line.
"""

import argparse
import sys

from diffrwkv import cli, config, workdir
from diffrwkv.config import UserError
from diffrwkv.data.load import check_name

EXAMPLES = """
examples:

  {prog} --config=quickstart --workdir=runs/quickstart
  {prog} --config=peer_shakespeare:birwkv@16 --workdir=runs/blocks --config.seed=1
  {prog} --config=mine.py --workdir=runs/mine --config.data.name='~/books/*.txt' \\
      --config.optim.learning_rate=3e-4 --config.model.remat --config.layouts.blocks.sizes=16,64
"""


class Parser(config.ArgumentParser):
    """That of train, which knows the keys of a config: `--optim.lr` is meant to be `--config.optim.learning_rate`."""

    def near(self, flag: str) -> list[str]:
        near = config.near_keys(flag.lstrip("-").removeprefix("config."))
        keys = [f"--config.{key}" for key in near[:4]]
        return keys if "." in flag else [name for name in super().near(flag) if name != "--config.KEY"] or keys


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags: `config`, a locked ConfigDict, and `workdir`. Raises UserError; --help and --list exit."""
    given, own = config.split(sys.argv[1:] if arguments is None else arguments)
    helps = bool({"--help", "-h"} & set(own))
    prog = cli.called("train")
    p = Parser(
        prog=prog,
        usage=f"{prog} --config=NAME|FILE.py[:ARGUMENT] --workdir=DIR [--config.KEY=VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog=EXAMPLES.format(prog=prog) + keys(given) if helps else None,
    )
    p.add_argument("--config", metavar="NAME|FILE.py[:ARGUMENT]", help="the experiment")
    p.add_argument("--config.KEY", metavar="VALUE", help="another value than the experiment's; the keys stand below")
    p.add_argument("--workdir", help="folder of the run: made, or gone on with")
    p.add_argument("--list", action="store_true", help="say which experiments there are")
    args = p.parse_args(own)
    if args.list:
        width = max(map(len, config.experiments()))
        for name, path in config.experiments().items():
            print(f"{name:{width}}  {config.summary(path)}")
        sys.exit()
    if not args.workdir:
        raise UserError("Missing --workdir: name the folder that the run is to be written to, e.g. --workdir=runs/x")
    return argparse.Namespace(config=config.parse(given), workdir=args.workdir)


def keys(given: list[str]) -> str:
    """The table of keys for --help: the values of the experiment, where one is given, else those of `config.base`."""
    of, values = "config.base", config.base()
    if any(argument.startswith("--config=") for argument in given):
        of, values = "this command line", config.parse(given)
    return f"\nkeys, as {of} has them:\n" + "\n".join(config.told(values))


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    config.check_keys(args.config)
    workdir.check(args.workdir)
    own = args.config.data
    for name in filter(None, (own.name, own.validation)):
        try:
            check_name(name, own.root, own.tokenizer)
        except ValueError as e:
            raise UserError(str(e)) from None
