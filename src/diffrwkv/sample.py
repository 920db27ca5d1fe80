"""Generates text: `python -m diffrwkv.sample --workdir=DIR [--num=4] [--prompt=TEXT | --infill=TEMPLATE] ...`.

In a template each underscore is one blank token (for a char tokenizer one character), and everything else stays:
`--infill "To be ____ not"`. With --length beyond the template, the text goes on after it. --prompt and --infill may be
given several times; all are generated together. --watch shows the denoising in the terminal as it happens, --trace
keeps it in a file. From Python: `diffrwkv.generate`.
"""

import argparse
import codecs
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffrwkv import config, generation, sampler_flags, sharding, traces
from diffrwkv.canvas import BLANK, blank_note, canvases, check_at_least_one
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer
from diffrwkv.run import load_tokenizer
from diffrwkv.workdir import named


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    args = parse_arguments(arguments)
    workdir = named(args.workdir)
    cfg = config.load(workdir / "config.json")
    if args.stream:
        stream(args, sampler_flags.changes(args))
        return
    tokenizer = load_tokenizer(workdir)
    rows = canvases(
        cfg,
        tokenizer,
        args.prompt,
        infill=args.infill,
        num=args.num,
        length=args.length,
        max_new_tokens=args.max_new_tokens,
        blank=args.blank or BLANK,
    )
    if args.watch and not sys.stdout.isatty():
        print("--watch needs a terminal: the samples are printed at the end instead.", file=sys.stderr)
        args.watch = False
    sharding.start_cpu_devices(1 if args.watch else cfg.train.cpu_devices, min(len(rows), args.batch_size))
    mesh = sharding.make_mesh(devices=jax.devices()[:1] if args.watch else None)
    run = generation.load(workdir, step=args.step, raw=args.raw, mesh=mesh)
    sampler = sampler_flags.build(args, run, guidance=args.guidance)
    notes = {generation.block_note(sampler, row, tokenizer.mask_id) for row in rows}
    notes |= {generation.same_note(sampler, args.num)}
    notes |= {blank_note(args.infill) if args.blank is None else None}
    if not args.stop_at_eos and tokenizer.eos_id is None:
        notes.add(f"--no_stop_at_eos does nothing: the tokenizer {tokenizer.name!r} has no EOS.")
    for note in sorted(note for note in notes if note is not None):
        print(note, file=sys.stderr)
    done = []
    number = 0
    for batch in generation.batches(
        run,
        sampler,
        rows,
        seed=args.seed,
        batch_size=args.batch_size,
        stop_at_eos=args.stop_at_eos,
        return_trace=args.trace is not None,
        watch=Screen(tokenizer) if args.watch else None,
    ):
        for text, tokens, length, passes in zip(batch.texts, batch.tokens, batch.lengths, batch.passes, strict=True):
            if args.json:
                line = {"sample": number, "seed": args.seed, "step": run.step, "text": text}
                print(json.dumps(line | {"passes": int(passes), "tokens": tokens[:length].tolist()}))
            else:
                print(f"--- sample {number}, seed {args.seed}: {length} tokens in {passes} passes ---")
                print(generation.printable(text))
            number += 1
        done.append(batch)
    if args.trace:
        generation.join(done).save_trace(args.trace)


def stream(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Prints one text as it is generated."""
    sharding.start_cpu_devices(1, 1)
    run = generation.load(args.workdir, step=args.step, raw=args.raw)
    pieces = generation.stream(
        run,
        args.prompt[0] if args.prompt else None,
        length=args.length,
        sampler=args.sampler,
        block_size=args.block_size,
        seed=args.seed,
        stop_at_eos=args.stop_at_eos,
        **options,
    )
    for piece in pieces:
        print(generation.printable(piece), end="", flush=True)
    print()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(prog="python -m diffrwkv.sample", description=" ".join(__doc__.split("\n\n")[1].split()))
    p.add_argument("--workdir", required=True, help="folder that train wrote")
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
    p.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    p.add_argument("--step", help="checkpoint: a step or 'best' (the newest)")
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


class Screen:
    """Draws a batch of half-denoised sequences over the last drawing, blanks dimmed. ANSI terminals only."""

    def __init__(self, tokenizer: Tokenizer, stream: Any = None, seconds: float = 0.04):
        self._tokenizer, self._stream, self._seconds = tokenizer, stream or sys.stdout, seconds
        self._last = 0.0

    def __call__(self, rows: Sequence[np.ndarray]) -> None:
        texts = [self._show(np.asarray(row)) for row in rows]
        time.sleep(max(0.0, self._last + self._seconds - time.monotonic()))  # slow enough to see
        self._last = time.monotonic()
        self._stream.write("\x1b[H\x1b[2J" + "\n\n".join(texts) + "\n")
        self._stream.flush()

    def _show(self, row: np.ndarray) -> str:
        blank = row == self._tokenizer.mask_id
        parts = np.split(row, np.flatnonzero(blank[1:] != blank[:-1]) + 1)  # each nothing but blanks, or none of them
        return "".join(
            len(part) * "\x1b[2m·\x1b[0m"
            if part[0] == self._tokenizer.mask_id
            else generation.printable(self._tokenizer.decode(part))
            for part in parts
        )


if __name__ == "__main__":
    config.run_program(main)
