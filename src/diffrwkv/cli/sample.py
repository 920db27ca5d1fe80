"""Generates text from a run.

In a template each underscore is one blank token (for a char tokenizer one character), and everything else stays:
--infill "To be ____ not". With --length beyond the template, the text goes on after it. --prompt and --infill may be
given several times; all are generated together. --watch shows the denoising in the terminal as it happens, --trace
keeps it in a file.
"""

import argparse
import codecs
from pathlib import Path

from diffrwkv import cli, config, traces
from diffrwkv.cli import runs, sampler_flags
from diffrwkv.config import UserError, check_at_least_one


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(prog=cli.called("sample"), description=" ".join(__doc__.split()))
    runs.add(p)
    p.add_argument("--num", type=int, help="how many samples, of each prompt or template (4)")
    p.add_argument("--length", type=int, help="tokens in each (config.data.length; with --infill: the template's)")
    p.add_argument("--max_new_tokens", type=int, metavar="N", help="tokens behind each prompt, in place of --length")
    sampler_flags.add(p)
    p.add_argument("--guidance", type=float, default=0.0, metavar="W", help="towards what is given; doubles the passes")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="text that the samples begin with; repeatable")
    p.add_argument("--prompts", metavar="FILE", help="such texts, one a line")
    p.add_argument("--infill", action="append", metavar="TEMPLATE", help="each blank is one token; repeatable")
    p.add_argument("--blank", help="the character that is a blank in --infill (_)")
    p.add_argument("--json", action="store_true", help="one JSON object a line, tokens included")
    p.add_argument("--watch", action="store_true", help="show the denoising live")
    p.add_argument(
        "--stream", action="store_true", help="block diffusion: print one text as it comes; endless without --length"
    )
    p.add_argument("--trace", metavar="FILE", help="write the denoising to FILE.html or FILE.gif")
    p.add_argument("--batch_size", type=int, help="samples at a time; changes no sample (16)")
    args = p.parse_args(arguments)
    counts = ("num", "length", "max_new_tokens", "batch_size")
    check_at_least_one(**{f"--{name}": getattr(args, name) for name in counts})
    sampler_flags.check(args)
    if not 0 <= args.guidance < float("inf"):
        raise UserError(f"--guidance must be at least 0, got {args.guidance}.")
    if sum(given is not None for given in (args.prompt, args.prompts, args.infill)) > 1:
        raise UserError("--prompt, --prompts and --infill exclude each other: put the prompt into the template.")
    if args.prompts is not None:
        args.prompt = read_prompts(args.prompts)
    if args.blank is not None and (len(args.blank) != 1 or not args.infill):
        raise UserError(f"--blank is the one character that is a blank in --infill, got {args.blank!r}.")
    if args.trace is not None:
        traces.check(args.trace)
    alone = ("infill", "max_new_tokens", "guidance", "json", "watch", "trace", "num", "batch_size", "frozen_cache")
    if args.stream and (wrong := [f"--{name}" for name in alone if getattr(args, name)]):
        raise UserError(
            f"--stream takes a prompt, a length and a sampler; leave the other flags out: {', '.join(wrong)}."
        )
    if args.stream and len(args.prompt or [""]) != 1:
        raise UserError("--stream continues one prompt.")
    args.num, args.batch_size = args.num or 4, args.batch_size or 16
    return args


def read_prompts(path: str) -> list[str]:
    """The lines of a UTF-8 file, without their ends (LF or CRLF) and without a byte order mark.

    Raises UserError for a file that cannot be read and for an empty line.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as e:  # a NUL in the name; a home that is not known
        raise UserError(f"--prompts: {path} cannot be read ({getattr(e, 'strerror', None) or e}).") from None
    lines = content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n")
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as e:
            raise UserError(f"--prompts: line {number} of {path} is not UTF-8 ({e.reason}, byte {e.start}).") from None
        if not prompts[-1]:
            raise UserError(f"--prompts: line {number} of {path} is empty: give some text, or take the line out.")
    return prompts


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    runs.check(args)
