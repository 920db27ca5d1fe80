"""What an experiment needs, without running it: parameters, memory, floating-point operations, time.

Nothing is made but shapes. Operations are 6 N per token, N counting matrices (the embedding look-up and the recurrence
itself are left out). --compile also compiles the step on this machine, for 8 and 16 sequences, and reads off XLA's
count of temporary memory: what grows is what a sequence costs. For fewer of them the optimizer's arrays may be the most
that a step holds, and then nothing grows.
"""

import argparse
import sys

from diffrwkv import cli, config
from diffrwkv.cli.train import Parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags: `config`, a locked ConfigDict, and `compile`. Raises UserError."""
    given, own = config.split(sys.argv[1:] if arguments is None else arguments)
    prog = cli.called("plan")
    p = Parser(
        prog=prog,
        usage=f"{prog} --config=NAME|FILE.py[:ARGUMENT] [--config.KEY=VALUE ...] [--compile]",
        description=__doc__,
        epilog="train --help lists the keys.",
    )
    p.add_argument("--config", metavar="NAME|FILE.py[:ARGUMENT]", help="the experiment")
    p.add_argument("--compile", action="store_true", help="compile the step, for its temporary memory")
    args = p.parse_args(own)
    return argparse.Namespace(config=config.parse(given), compile=args.compile)


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    config.check_keys(args.config)
