"""Objectives compared: the same backbones, data and steps under each, by their bounds and by their samples.

    python -m benchmarks.objectives                  # on CPU; every run of the comparison, two at a time
    python -m benchmarks.objectives --jobs 12        # on a GPU: its tiny programs share the card

Each run is experiments/peer_shakespeare.py:BACKBONE~OBJECTIVE, trained, evaluated (the average of the weights, 8 draws
of the bound, where the objective has one) and sampled from blank canvases with the objective's sampler at several
numbers of steps. An autoregressive model of the same recipe, which is trained first, judges the samples, and as much
validation text. One line for each (backbone, objective, seed) in the output: "nelbo" and its standard errors, "curve",
and "samples": for each number of steps the passes and the statistics of `diffrwkv.diffusion.sample_quality`. A line
that is there is not measured again. A line of another card is another row.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
import types

import jax

from benchmarks.measure import RESULTS, ROOT, append, origin, read
from benchmarks.samplers import generate, judged_by, validation_text
from diffrwkv import cli, config, sharding, train
from diffrwkv.config import UserError
from diffrwkv.denoiser import count_parameters
from diffrwkv.evaluator import Evaluator
from diffrwkv.run import is_padded, load_data, load_run

BACKBONES = ("birwkv", "dit")
OBJECTIVES = ("mdlm", "sedd_absorb", "sedd_uniform", "udlm", "duo", "flm")
JUDGE = "ar_rwkv"
TEXT = "validation text"


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.one:
        name, seed = args.one
        append(args.output, one_run(name, int(seed), args))
        return
    done = finished(args)
    names = [f"{backbone}~{objective}" for objective in args.objectives for backbone in args.backbones]
    wanted = [(name, seed) for seed in args.seeds for name in names]
    failed = []
    for group in ([(JUDGE, 1)], wanted):  # the judge first: the others need it
        group = [(name, seed) for name, seed in group if (name, seed, args.steps) not in done]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            statuses = list(pool.map(lambda run: worker(*run, args), group))
        # Training that a signal stops ends with status 0: only its line says that a run is done.
        there = finished(args)
        for (name, seed), status in zip(group, statuses, strict=True):
            failed += [f"{name}-{seed}"] if status or (name, seed, args.steps) not in there else []
        if failed and group and group[0][0] == JUDGE:
            break
    if failed:
        raise UserError(f"These runs left no line, their logs are in {args.runs}: {', '.join(failed)}.")


def finished(args: argparse.Namespace) -> set[tuple[str, int, int]]:
    """(name, seed, steps) of the lines that the output has."""
    return {(row["name"], row["seed"], row["steps"]) for row in read(args.output)}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backbones", nargs="*", default=BACKBONES)
    p.add_argument("--objectives", nargs="*", default=OBJECTIVES)
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    p.add_argument("--steps", type=int, default=500, help="of training")
    p.add_argument("--sampling", nargs="+", type=int, default=[16, 64, 256], help="steps of sampling")
    p.add_argument("--num", type=int, default=128, help="samples, and chunks of text")
    p.add_argument("--batch_size", type=int, default=32, help="samples at a time")
    p.add_argument("--draws", type=int, default=8, help="of the bound")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    p.add_argument("--limit", type=float, default=None, help="seconds for one run")
    p.add_argument("--data_root", default=None)
    p.add_argument("--set", nargs="+", default=[], help="config keys of the runs, as --config.a.b=VALUE without --")
    p.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "objectives", help="folder of the workdirs")
    p.add_argument("--output", type=pathlib.Path, default=RESULTS / "objectives.jsonl")
    p.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="this run alone, in this process")
    return p.parse_args(arguments)


def worker(name, seed, args):
    """Runs one in a process of its own, its output in a log; the exit status."""
    args.runs.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with open(args.runs / f"{name}-{seed}.log", "a") as log:
        command = [sys.executable, "-m", "benchmarks.objectives", *sys.argv[1:], "--one", name, str(seed)]
        try:
            environment = os.environ | {"TQDM_DISABLE": "1"}
            status = subprocess.run(command, stdout=log, stderr=log, timeout=args.limit, env=environment).returncode
        except subprocess.TimeoutExpired:
            status = 124
    print(f"{name}-{seed}: status {status} after {time.monotonic() - begun:.0f} s", flush=True)
    return status


def one_run(name, seed, args):
    """The result line of one (name, seed)."""
    workdir = args.runs / f"{name}-{seed}"
    overrides = [
        f"--config.seed={seed}",
        f"--config.train.num_steps={args.steps}",
        "--config.train.cpu_devices=1",
        "--config.train.sample_every=0",
        "--config.train.eval_limit=100",
        "--config.train.tensorboard=False",
        *(["--config.data.root=" + args.data_root] if args.data_root else []),
        *(f"--{key}" for key in args.set),
    ]
    begun = time.monotonic()
    train.run(config.parse([f"--config={ROOT}/experiments/peer_shakespeare.py:{name}", *overrides]), workdir)
    lines = read(workdir / "metrics.jsonl")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run = load_run(workdir, mesh)
    dataset = load_data(run.config, args.data_root, tokenizer=run.tokenizer)
    row = {
        "name": name,
        "backbone": name.partition("~")[0],
        "objective": run.config.diffusion.name,
        "seed": seed,
        "steps": args.steps,
        "parameters": count_parameters(run.params),
        "train_seconds": time.monotonic() - begun,
        "tokens_per_second": [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][-1],
        "curve": [[line["step"], line["val/nelbo"]] for line in lines if "val/nelbo" in line],
        "loss": [[line["step"], round(line["train/loss"], 4)] for line in lines if "train/loss" in line],
    }
    if run.objective.process.bound:
        evaluator = Evaluator(
            run.model, run.objective, dataset, mesh, batch_size=32, draws=args.draws, padded=is_padded(run.config)
        )
        result = evaluator(run.params)
        row |= {key: result[key] for key in ("nelbo", "nelbo_se_draws", "nelbo_se_text", "bpc", "draws", "tokens")}
    judge = run if name == JUDGE else load_run(args.runs / f"{JUDGE}-1", mesh)

    quality = judged_by(judge, args.batch_size)
    if name == JUDGE:
        row["text"] = quality(validation_text(dataset, args.num))
    row["samples"] = []
    options = types.SimpleNamespace(batch_size=args.batch_size, num=args.num, seed=0)
    sampler = run.config.sampler.name
    for steps in [None] if name == JUDGE else args.sampling:
        tokens, cost = generate(run, sampler, {} if steps is None else {"num_steps": steps}, options)
        sample = run.tokenizer.decode(tokens[0])
        row["samples"].append({"sampler": sampler, "num_steps": steps} | cost | quality(tokens) | {"sample": sample})
    return row | {"sampling": list(args.sampling), "num": args.num, "judge": f"{JUDGE}-1"} | origin()


if __name__ == "__main__":
    cli.run_program(main)
