"""Generates text: `python -m diffrwkv.sample --workdir=DIR [--num=4] [--prompt=TEXT | --infill=TEMPLATE] ...`.

In a template each underscore is one blank token (for a char tokenizer one character), and everything else stays:
`--infill "To be ____ not"`. With --length beyond the template, the text goes on after it. --prompt and --infill may be
given several times; all are generated together. --watch shows the denoising in the terminal as it happens, --trace
keeps it in a file. From Python: `diffrwkv.generate`.
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("sample")

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffrwkv import bars, generation, sampler_flags, sharding
from diffrwkv.canvas import BLANK, blank_note, canvases
from diffrwkv.cli import sample as flags
from diffrwkv.data import Tokenizer
from diffrwkv.run import Opened, opened


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError for bad input, before any compute."""
    model = opened(args.workdir, args.model)
    cfg, tokenizer = model.config, model.tokenizer
    if args.stream:
        stream(args, model, sampler_flags.changes(args))
        return
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
    run = model.load(mesh, step=args.step, raw=args.raw)
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
    bar = bars.bar(len(rows), "sample", show=bars.shown() and not args.watch, compiles=True)
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
        bar.clear()  # the samples take its place
        for text, tokens, length, passes in zip(batch.texts, batch.tokens, batch.lengths, batch.passes, strict=True):
            if args.json:
                line = {"sample": number, "seed": args.seed, "step": run.step, "text": text}
                print(json.dumps(line | {"passes": int(passes), "tokens": tokens[:length].tolist()}))
            else:
                print(f"--- sample {number}, seed {args.seed}: {length} tokens in {passes} passes ---")
                print(generation.printable(text))
            number += 1
        done.append(batch)
        bar.update(len(batch.texts))
    bar.close()
    if args.trace:
        generation.join(done).save_trace(args.trace)


def stream(args: argparse.Namespace, model: Opened, options: dict[str, Any]) -> None:
    """Prints one text as it is generated."""
    sharding.start_cpu_devices(1, 1)
    run = model.load(sharding.make_mesh(), step=args.step, raw=args.raw)
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
    with bars.waiting("compiling"):
        first = next(pieces, "")
    for piece in itertools.chain([first], pieces):
        print(generation.printable(piece), end="", flush=True)
    print()


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
