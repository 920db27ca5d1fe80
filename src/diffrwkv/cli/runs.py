"""The flags that name a trained model: a workdir's, or one that was released."""

import argparse
import os
from typing import Any

from diffrwkv import config, hub, shipped
from diffrwkv.config import UserError
from diffrwkv.workdir import check_run


def add(p: argparse.ArgumentParser, *, required: bool = True, what: str = "of a run") -> None:
    """--workdir or --model, and which of a workdir's weights."""
    named = p.add_mutually_exclusive_group(required=required)
    named.add_argument("--workdir", help=f"folder that train wrote: {what}")
    named.add_argument(
        "--model", metavar="NAME|FOLDER|hf:NAME", help=f"a model in place of a run: {', '.join(shipped.MODELS)}, ..."
    )
    p.add_argument("--raw", action="store_true", help="a workdir's weights themselves, not their moving average")
    p.add_argument("--step", help="a workdir's checkpoint: a step or 'best' (the newest)")


def check(args: argparse.Namespace) -> Any:
    """The config of the workdir; None for a model, or for neither. Raises UserError unless something is there."""
    if args.model is not None:
        check_model(args.model)
        if args.raw or args.step is not None:
            raise UserError("A released model has one set of weights: leave --raw and --step out with --model.")
        return None
    return None if args.workdir is None else check_run(args.workdir)


def check_model(name: str) -> None:
    """Raises UserError unless a model that was released may be there."""
    source = shipped.path_of(name)
    if hub.is_model(source):
        return
    path = config.at_home(source, "--model=")
    if not os.path.exists(path):
        raise UserError(
            f"--model={name}: no such file or folder, and no model that comes with diffrwkv: those are "
            f"{', '.join(shipped.MODELS)}."
        )
    if path.is_dir() and not config.of_others(path / "config.json"):
        raise UserError(
            f"--model={name} is no released model, for its config.json is none: a run's folder is --workdir's."
        )
