"""Scores a trained denoiser: `python -m diffrwkv.evaluate --workdir=DIR [--draws=8] [--limit=N] [--raw] ...`.

Prints the validation NELBO in nats per token, bits per character of what was scored and the bound on perplexity, with
what was counted and two standard errors, of the draws and of the text, and writes the same to `<workdir>/eval.json`.
"""

import argparse
import dataclasses
import functools
import json
import sys

import jax

from diffrwkv import config, sharding
from diffrwkv.config import UserError
from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.evaluator import Evaluator
from diffrwkv.run import MOST_LOGITS, check_same_data, is_padded, load_data, load_run
from diffrwkv.workdir import named


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    args = parse_arguments(arguments)
    workdir = named(args.workdir)
    cfg = config.load(workdir / "config.json")
    batch_size = args.batch_size or cfg.train.eval_batch_size
    sharding.start_cpu_devices(cfg.train.cpu_devices, batch_size)
    mesh = sharding.make_mesh()
    sharding.check_batch(batch_size, mesh, "--batch_size")
    run = load_run(workdir, mesh, step=args.step, raw=args.raw)
    if batch_size * cfg.data.length * run.tokenizer.vocab_size > MOST_LOGITS:
        raise UserError(
            f"--batch_size = {batch_size} is too large: sequences of {cfg.data.length} tokens, with "
            f"{run.tokenizer.vocab_size} logits for each, are more than {MOST_LOGITS:,} logits at a time."
        )
    objective = run.objective.validation
    if not objective.process.bound:
        raise UserError(
            f"config.diffusion.name = {cfg.diffusion.name!r} bounds no likelihood: judge its samples instead "
            "(python -m diffrwkv.sample)."
        )
    if args.block_size is not None:
        if not isinstance(objective.layout, Blocks):
            raise UserError(f"--block_size needs blocks, not config.diffusion.layout = {cfg.diffusion.layout!r}.")
        layout = dataclasses.replace(objective.layout, sizes=(args.block_size,))
        objective = dataclasses.replace(objective, layout=layout)
    if objective.causal and (args.draws is not None or args.seed is not None):
        print("--draws and --seed do nothing: a model from left to right has an exact likelihood.", file=sys.stderr)
    dataset = load_data(cfg, args.data_root, tokenizer=run.tokenizer)
    check_same_data(workdir, dataset)
    try:
        evaluator = Evaluator(
            run.model,
            objective,
            dataset,
            mesh,
            batch_size=batch_size,
            draws=args.draws or 8,
            limit=args.limit,
            split=args.split,
            seed=args.seed or 0,
            padded=is_padded(cfg),
        )
    except ValueError as e:  # a split that the data set lacks
        raise UserError(str(e)) from None
    result = evaluator(run.params, progress=sys.stderr.isatty())
    result |= {"step": run.step, "ema": not args.raw, "split": args.split, "seed": args.seed or 0}
    if isinstance(objective.layout, Blocks):
        result |= {"block_size": objective.layout.block(cfg.data.length)}
    result |= {"data": cfg.data.name}
    print(json.dumps(result, indent=2))
    if jax.process_index() == 0:
        config.write_json(result, workdir / "eval.json")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(prog="python -m diffrwkv.evaluate", description=__doc__.split("\n\n")[1])
    p.add_argument("--workdir", required=True, help="folder that train wrote")
    p.add_argument("--draws", type=int, help="draws of (t, mask) per sequence (8)")
    p.add_argument("--split", default="validation", choices=("validation", "test", "train"))
    p.add_argument("--limit", type=int, help="only the first so many sequences")
    p.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    p.add_argument("--step", help="checkpoint: a step or 'best' (the newest)")
    seed = functools.partial(config.seed, name="--seed")
    p.add_argument("--seed", type=seed, help="of the noise (0)")
    p.add_argument("--batch_size", type=int, help="sequences at a time (config.train.eval_batch_size)")
    p.add_argument("--block_size", type=int, help="block diffusion: tokens in a block; 0: all")
    p.add_argument("--data_root", help="folder of the data, if not the one of training")
    args = p.parse_args(arguments)
    for name in ("draws", "limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.block_size is not None and args.block_size < 0:
        raise UserError(f"--block_size must be at least 0, got {args.block_size}.")
    if args.draws is not None and args.draws >= 2**31:
        raise UserError(f"--draws must be below {2**31}, got {args.draws}.")
    return args


if __name__ == "__main__":
    config.run_program(main)
