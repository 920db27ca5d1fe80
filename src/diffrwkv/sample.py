"""Generates text: `python -m diffrwkv.sample --workdir=DIR [--num=4] [--prompt=TEXT | --infill=TEMPLATE] ...`.

In a template each underscore is one blank token (for a char tokenizer one character), and everything else stays:
`--infill "To be ____ not"`. With --length beyond the template, the text goes on after it. --watch shows the denoising
in the terminal as it happens.
"""

import argparse
import ast
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffrwkv import config, evaluate, sharding
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer
from diffrwkv.diffusion import samplers


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    args = parse_arguments(arguments)
    workdir = Path(args.workdir)
    cfg = config.load(workdir / "config.json")
    tokenizer = evaluate.load_tokenizer(workdir)
    row = canvas_row(
        tokenizer,
        length=args.length,
        default_length=cfg.data.length,
        prompt=args.prompt,
        infill=args.infill,
        blank=args.blank,
        bos=cfg.data.wrap,
        eos=cfg.data.wrap and cfg.data.packing == "concat",
    )
    if args.watch and not sys.stdout.isatty():
        print("--watch needs a terminal: the samples are printed at the end instead.", file=sys.stderr)
        args.watch = False
    batch_size = min(args.num, args.batch_size)
    sharding.start_cpu_devices(1 if args.watch else cfg.train.cpu_devices, batch_size)
    mesh = sharding.make_mesh(devices=jax.devices()[:1] if args.watch else None)
    run = evaluate.load_run(workdir, mesh, step=args.step, raw=args.raw)
    if run.objective.causal and args.infill is not None:
        raise UserError("--infill needs a diffusion model: this one goes from left to right; use --prompt.")
    changes = {k: getattr(args, k) for k in ("num_steps", "temperature", "top_p", "top_k")}
    changes = {k: v for k, v in changes.items() if v is not None} | args.set
    sampler = build_sampler(cfg, run.objective, name=args.sampler, guidance=args.guidance, **changes)
    if note := block_note(sampler, row, tokenizer.mask_id):
        print(note, file=sys.stderr)
    watch = Screen(tokenizer) if args.watch else None
    generator = Generator(run.model, sampler, tokenizer, mesh, watch=watch)
    for start in range(0, args.num, batch_size):
        number = min(batch_size, args.num - start)
        tokens, passes = generator(run.params, np.tile(row, (number, 1)), seed=args.seed, start=start)
        for i in range(number):
            text = tokenizer.decode(tokens[i])
            if args.json:
                line = {"sample": start + i, "seed": args.seed, "step": run.step, "text": text}
                print(json.dumps(line | {"passes": int(passes[i]), "tokens": tokens[i].tolist()}))
            else:
                note = f"sample {start + i}, seed {args.seed}: {len(row)} tokens in {passes[i]} passes"
                print(f"--- {note} ---\n{text}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(prog="python -m diffrwkv.sample", description=" ".join(__doc__.split("\n\n")[1].split()))
    p.add_argument("--workdir", required=True, help="folder that train wrote")
    p.add_argument("--num", type=int, default=4, help="how many samples (4)")
    p.add_argument("--length", type=int, help="tokens in each (config.data.length; with --infill: the template's)")
    p.add_argument("--num_steps", type=int, help="steps of the time grid (config.sampler.num_steps)")
    p.add_argument("--sampler", metavar="NAME", help=f"{', '.join(samplers.SAMPLERS)} (config.sampler.name)")
    p.add_argument("--set", action="append", metavar="KEY=VALUE", default=[], help="a sampler's option; repeatable")
    p.add_argument("--guidance", type=float, default=0.0, metavar="W", help="towards what is given; doubles the passes")
    p.add_argument("--seed", type=int, default=0, help="sample i depends on (seed, i) alone (0)")
    p.add_argument("--temperature", type=float, help="of the tokens; 0 takes the most probable")
    p.add_argument("--top_p", type=float, help="keep the most probable tokens that reach this probability")
    p.add_argument("--top_k", type=int, help="keep the most probable tokens, so many of them; 0: all")
    p.add_argument("--prompt", help="text that the samples begin with")
    p.add_argument("--infill", help="template: each blank is one token to fill in")
    p.add_argument("--blank", default="_", help="the character that is a blank in --infill (_)")
    p.add_argument("--json", action="store_true", help="one JSON object a line, tokens included")
    p.add_argument("--watch", action="store_true", help="show the denoising live")
    p.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    p.add_argument("--step", help="checkpoint: a step or 'best' (the newest)")
    p.add_argument("--batch_size", type=int, default=16, help="samples at a time; changes no sample (16)")
    args = p.parse_args(arguments)
    for name in ("num", "length", "num_steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.temperature is not None and not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature must be at least 0, got {args.temperature}.")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p must be above 0 and at most 1, got {args.top_p}.")
    if args.top_k is not None and args.top_k < 0:
        raise UserError(f"--top_k must be at least 0, got {args.top_k}.")
    if not 0 <= args.guidance < float("inf"):
        raise UserError(f"--guidance must be at least 0, got {args.guidance}.")
    args.set = dict(map(parse_option, args.set))
    if args.prompt is not None and args.infill is not None:
        raise UserError("--prompt and --infill exclude each other: put the prompt into the template.")
    if len(args.blank) != 1:
        raise UserError(f"--blank must be one character, got {args.blank!r}.")
    return args


def parse_option(text: str) -> tuple[str, Any]:
    """("block", 32) of "block=32". A value that is no Python literal is a string. Raises UserError."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier() or key in ("name", "schedule"):
        raise UserError(f"--set wants an option of the sampler as KEY=VALUE, got {text!r}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def canvas_row(
    tokenizer: Tokenizer,
    *,
    length: int | None,
    default_length: int,
    prompt: str | None = None,
    infill: str | None = None,
    blank: str = "_",
    bos: bool = False,
    eos: bool = False,
) -> np.ndarray:
    """What is given and what is to be generated, int32 [length]: tokens, and the mask id at blanks.

    Args:
      length: tokens in the row, BOS and EOS counted; None: the template's length, or else `default_length`.
      prompt: text at the beginning.
      infill: template; each `blank` character is one blank token.
      bos, eos: the first token is BOS, the last EOS, as in training with wrapping.

    Raises UserError for an empty or too long prompt or template, one without blanks, characters that the tokenizer does
    not have, or no room to generate.
    """
    given, flag = (prompt, "--prompt") if infill is None else (infill, "--infill")
    body = np.zeros(0, np.int32)
    if given is not None:
        if not given:
            raise UserError(f"{flag} is empty: give some text, or leave the flag out.")
        if infill is not None and blank not in infill:
            raise UserError(f"--infill has no blanks: write {blank!r} for each token to fill in.")
        parts = [given] if infill is None else re.split(f"({re.escape(blank)}+)", infill)
        try:
            body = np.concatenate(
                [
                    np.full(len(part), tokenizer.mask_id, np.int32)
                    if infill is not None and part.startswith(blank)
                    else tokenizer.encode(part)
                    for part in parts
                    if part
                ]
            )
        except ValueError as e:
            raise UserError(f"{flag}: {e}.") from None
    extra = int(bos) + int(eos)
    if length is None:
        length = len(body) + extra if infill is not None else default_length
    room = length - extra - len(body)
    if room < 0 or (infill is None and room == 0):
        if given is None:
            raise UserError(f"--length = {length} leaves nothing to generate: it needs at least {extra + 1}.")
        raise UserError(
            f"{flag} has {len(body)} tokens, too many for --length = {length}"
            f"{f' with {extra} for begin and end' if extra else ''}: shorten it or raise --length."
        )
    begin = [np.int32(tokenizer.bos_id)] if bos else []
    end = [np.int32(tokenizer.eos_id)] if eos else []
    rest = np.full(room, tokenizer.mask_id, np.int32)
    return np.concatenate([begin, body, rest, end]).astype(np.int32)


def build_sampler(
    cfg: Any, objective: Any, *, name: str | None = None, guidance: float = 0.0, **changes: Any
) -> Callable[..., samplers.Samples]:
    """The sampler of `config.sampler`, or `name` with its defaults, with these keyword arguments changed.

    Raises UserError for what the sampler refuses, for one that does not fit the objective, and for guidance of a model
    that goes from left to right.
    """
    options = cfg.sampler.to_dict()
    if name not in (None, options["name"]):
        options = {"name": name}
    options |= changes
    fitting = sorted(name for name, s in samplers.SAMPLERS.items() if s.causal == objective.causal)
    if options["name"] in samplers.SAMPLERS and options["name"] not in fitting:
        raise UserError(
            f"The sampler {options['name']!r} (--sampler or config.sampler.name) does not sample from "
            f"config.diffusion.name = {cfg.diffusion.name!r}: choose {' or '.join(map(repr, fitting))}."
        )
    if guidance and objective.causal:
        raise UserError("--guidance needs a diffusion model: this one goes from left to right.")
    try:
        sampler = samplers.from_config(schedule=getattr(objective, "schedule", None), **options)
    except (ValueError, TypeError) as e:
        raise UserError(f"{'config.sampler' if name is None else '--sampler'}: {e}") from e
    return samplers.Guided(sampler, guidance) if guidance else sampler


def block_note(sampler: Any, row: np.ndarray, mask_id: int) -> str | None:
    """What to say when the sampler's blocks do not divide what is to be generated, int32 [L]."""
    sampler = sampler.sampler if isinstance(sampler, samplers.Guided) else sampler
    block, blanks = getattr(sampler, "block", None), np.flatnonzero(row == mask_id)
    if isinstance(sampler, samplers.ICE):
        blanks = blanks[: -sampler.answer_length]  # its blocks hold the thinking only
    if not block or not len(blanks):
        return None
    positions = int(blanks[-1] - blanks[0]) + 1
    if not (last := positions % block):
        return None
    return f"block = {block} does not divide the {positions} positions to fill: the last block is padded, from {last}."


@dataclasses.dataclass
class Generator:
    """(weights, canvas) -> tokens, one compiled loop, the batch split over the devices of the mesh.

    Attributes:
      watch: called with int32 [B, L] before each network pass, in order; for a mesh of one device.
    """

    model: Any
    sampler: Any
    tokenizer: Tokenizer
    mesh: Mesh
    watch: Callable[[np.ndarray], None] | None = None

    def __post_init__(self):
        mask_id = self.tokenizer.mask_id

        def show(z):
            if self.watch:
                jax.debug.callback(self.watch, z, ordered=True)

        def diffuse(params, keys, canvas):
            def denoise(z, t):
                show(jnp.where(canvas == mask_id, z, canvas))  # guidance hides what is given, but not from us
                return self.model.apply({"params": params}, z, t)

            return self.sampler(denoise, keys, canvas, mask_id=mask_id)

        def go_on(params, keys, canvas):
            def step(token, state):
                return self.model.apply({"params": params}, token, state=state, return_state=True)

            state = self.model.empty_state(*canvas.shape)
            return self.sampler(step, state, keys, canvas, mask_id=mask_id, on_step=show)

        def generate(params, keys, canvas):
            samples = (go_on if self.sampler.causal else diffuse)(params, keys, canvas)
            return samples.tokens, samples.passes

        self._generate = jax.jit(sharding.over(self.mesh, generate), out_shardings=sharding.replicated(self.mesh))

    def __call__(self, params: Any, canvas: np.ndarray, *, seed: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [B, L], network passes int32 [B]).

        Args:
          canvas: int32 [B, L], the mask id where to generate.
          seed, start: row i has the key of (seed, start + i), so it does not depend on the batch.
        """
        number = len(canvas)
        filled = -number % self.mesh.size  # rows without a mask cost no pass
        canvas = np.concatenate([canvas, np.full((filled, canvas.shape[1]), self.tokenizer.pad_id, np.int32)])
        keys = samplers.sequence_keys(seed, len(canvas), start)
        rows = sharding.batch_sharding(self.mesh)
        canvas = jax.make_array_from_callback(canvas.shape, rows, lambda index: canvas_at(canvas, index))
        tokens, passes = self._generate(params, keys, canvas)
        if self.watch:
            self.watch(np.asarray(tokens))
        return np.asarray(tokens)[:number], np.asarray(passes)[:number]


def canvas_at(canvas: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """The part of a canvas that one device holds."""
    return canvas[index]


class Screen:
    """Draws a batch of half-denoised sequences over the last drawing, blanks dimmed. ANSI terminals only."""

    def __init__(self, tokenizer: Tokenizer, stream: Any = None, seconds: float = 0.04):
        self._tokenizer, self._stream, self._seconds = tokenizer, stream or sys.stdout, seconds
        self._last = 0.0

    def __call__(self, tokens: Any) -> None:
        blank = "\x1b[2m·\x1b[0m"
        texts = [self._tokenizer.decode(row, mask="\0").replace("\0", blank) for row in np.asarray(tokens)]
        time.sleep(max(0.0, self._last + self._seconds - time.monotonic()))  # slow enough to see
        self._last = time.monotonic()
        self._stream.write("\x1b[H\x1b[2J" + "\n\n".join(texts) + "\n")
        self._stream.flush()


if __name__ == "__main__":
    config.run_program(main)
