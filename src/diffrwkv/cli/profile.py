"""Speed of the denoisers on whatever device this is.

Measures how long a pass takes over length and batch, and how many tokens a second each way of decoding gives: passes
over the whole text, blocks from an exact state, blocks with frozen keys and values, and left to right. Prints tables
with a fit of a L² + b L + c and the length from which a linear denoiser is faster than attention, beside analytic
operations, bytes and state and XLA's own counts. With --output it writes NAME.jsonl, a measurement a line, and NAME.md,
NAME.html and NAME.svg from it. The weights are random: no time depends on them.
"""

import argparse

from diffrwkv import charts, cli, config, presets
from diffrwkv.config import UserError

LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]
DTYPES = ["float32", "bfloat16"]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(prog=cli.called("profile"), description=" ".join(__doc__.split("\n\n")[1].split()))
    p.add_argument("--names", nargs="+", default=list(presets.BACKBONES), metavar="NAME", help="backbones (all)")
    p.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="L", help="tokens (256 ... 16384)")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="B", help="sequences at once (1 8 32)")
    p.add_argument("--size", default="peer", help=f"of the denoisers: {', '.join(presets.SIZES)} (peer)")
    p.add_argument("--dim", type=int, help="another width, with the options of no size")
    p.add_argument("--layers", type=int, help="instead of the size's")
    p.add_argument("--vocab_size", type=int, help="instead of the size's")
    p.add_argument("--scan_layers", action="store_true", help="compile one layer for all")
    p.add_argument("--dtype", default="float32", help="of activations: float32 or bfloat16")
    p.add_argument("--use", nargs="*", default=[], metavar="WHAT=FORM", help="name the form of an operator")
    p.add_argument("--what", nargs="+", default=["pass", "decode"], metavar="KIND", help="pass, decode (both)")
    p.add_argument("--tokens_per_pass", type=int, nargs="+", default=[8, 16], metavar="P", help="decoding's (8 16)")
    p.add_argument("--block_size", type=int, default=32, help="tokens in a block of decoding in blocks (32)")
    p.add_argument("--seconds", type=float, default=1.0, help="to repeat each measurement for, thrice at least (1)")
    p.add_argument("--most_seconds", type=float, default=120.0, help="leave out what takes longer at once (120)")
    p.add_argument("--output", metavar="NAME", help="write NAME.jsonl, NAME.md, NAME.html and NAME.svg")
    p.add_argument("--append", action="store_true", help="keep the rows that NAME.jsonl has")
    p.add_argument("--show", nargs="+", metavar="FILE", help="measure nothing: tables and plots of these .jsonl files")
    args = p.parse_args(arguments)
    _check(args)
    return args


def operators() -> list[str]:
    """What --use may name a form of: the operator of each mixer, and what stands around that of RWKV-7."""
    mixers = config.base().model.mixers
    return [*mixers, *(f"{name}.time_mix" for name, options in mixers.items() if "time_mix" in options)]


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot be measured."""
    for flag, values, known in (
        ("--names", args.names, list(presets.BACKBONES)),
        ("--size", [args.size], list(presets.SIZES)),
        ("--dtype", [args.dtype], DTYPES),
        ("--what", args.what, ["pass", "decode"]),
    ):
        if wrong := [value for value in values if value not in known]:
            raise UserError(f"{flag}: there is no {wrong[0]!r}: choose of {', '.join(known)}.")
    for flag in ("lengths", "batch", "tokens_per_pass", "block_size", "dim", "layers", "vocab_size"):
        value = getattr(args, flag)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise UserError(f"--{flag} must be at least 1, got {number}.")
    for flag in ("seconds", "most_seconds"):
        if not 0 <= getattr(args, flag) < float("inf"):
            raise UserError(f"--{flag} must be a number of seconds, got {getattr(args, flag)}.")
    forms = operators()
    for choice in args.use:
        what, equals, form = choice.partition("=")
        if what not in forms or not equals or not form:
            raise UserError(f"--use {choice}: write WHAT=FORM, where WHAT is one of {', '.join(forms)}.")
    if "decode" in args.what and not args.show:
        if wrong := [n for n in args.lengths if n % args.block_size]:
            raise UserError(
                f"--lengths: {wrong[0]} is no multiple of --block_size={args.block_size}, as decoding needs."
            )
        if wrong := [p for p in args.tokens_per_pass if args.block_size % p]:
            raise UserError(f"--tokens_per_pass: {wrong[0]} does not divide --block_size={args.block_size}.")
    if args.append and (args.show or args.output is None):
        raise UserError("--append does something where rows are measured and written: give --output, without --show.")


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    if args.output is not None:
        charts.output(args.output)
