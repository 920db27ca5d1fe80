"""The flags that choose a sampler and its options, for every program that generates."""

import argparse
import ast
import functools
from typing import Any

from diffrwkv import config
from diffrwkv.config import UserError, check_at_least_one

CACHES = ("prefix", "dual")  # of `diffusion.samplers.FrozenCache`

OPTIONS = ("num_steps", "temperature", "top_p", "top_k")  # of samplers, that have a flag of their own


def add(p: config.ArgumentParser) -> None:
    """Adds the flags to a program's."""
    p.add_argument("--sampler", metavar="NAME", help=f"{', '.join(config.base().samplers)} (config.sampler.name)")
    p.add_argument("--num_steps", type=int, help="steps of the time grid (config.samplers.NAME.num_steps)")
    p.add_argument("--temperature", type=float, help="of the tokens; 0 takes the most probable")
    p.add_argument("--top_p", type=float, help="keep the most probable tokens that reach this probability")
    p.add_argument("--top_k", type=int, help="keep the most probable tokens, so many of them; 0: all")
    p.add_argument("--set", action="append", metavar="KEY=VALUE", default=[], help="a sampler's option; repeatable")
    p.add_argument("--block_size", type=int, metavar="N", help="block diffusion: tokens at a time; 0: all")
    p.add_argument("--frozen_cache", choices=CACHES, help="attention alone: Fast-dLLM's caches, approximate")
    seed = functools.partial(config.seed, name="--seed")
    p.add_argument("--seed", type=seed, default=0, help="sample i depends on (seed, i) alone (0)")
    p.add_argument(
        "--no_stop_at_eos", dest="stop_at_eos", action="store_false", help="keep what follows the first EOS generated"
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for values that no sampler takes, and makes a dict of --set."""
    check_at_least_one(**{"--num_steps": args.num_steps})
    if args.temperature is not None and not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature must be at least 0, got {args.temperature}.")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p must be above 0 and at most 1, got {args.top_p}.")
    if args.top_k is not None and args.top_k < 0:
        raise UserError(f"--top_k must be at least 0, got {args.top_k}.")
    args.set = parse_options(args)


def parse_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of --set. Raises UserError, also for one that is given twice or that has a flag which is given."""
    options: dict[str, Any] = {}
    for key, value in map(parse_option, args.set):
        flag = getattr(args, key, None) if key in OPTIONS else None
        given = options.get(key, flag)
        if given is not None and given != value:
            raise UserError(f"{key} is given twice, {given!r} and {value!r}: give it once.")
        options[key] = value
    return options


def parse_option(text: str) -> tuple[str, Any]:
    """("block", 32) of "block=32". A value that is no Python literal is a string. Raises UserError."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier() or key in ("name", "stop_id", "guidance"):
        raise UserError(f"--set wants an option of the sampler as KEY=VALUE, got {text!r}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return key, value
