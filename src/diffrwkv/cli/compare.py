"""Compares trained runs.

Prints one table, a row for each run: the config keys that differ, parameters, tokens and seconds trained, the last and
the best validation and every evaluation in the workdirs. With --output it writes NAME.md, NAME.csv, NAME.html and
NAME.svg too, with the curves over steps, tokens and seconds; the page needs nothing from elsewhere. A RUN is a workdir,
or a pattern such as 'runs/*', which takes the workdirs that it finds.
"""

import argparse

from diffrwkv import charts, cli, config


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags. Raises UserError."""
    p = config.ArgumentParser(prog=cli.called("compare"), description=__doc__.split("\n\n")[1])
    p.add_argument("runs", nargs="+", metavar="RUN", help="workdirs, or patterns such as 'runs/*'")
    p.add_argument("--output", metavar="NAME", help="write NAME.md, NAME.csv, NAME.html and NAME.svg")
    p.add_argument("--curve", metavar="KEY", help="of metrics.jsonl, to be drawn (val/nelbo)")
    return p.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    if args.output is not None:
        charts.output(args.output)
