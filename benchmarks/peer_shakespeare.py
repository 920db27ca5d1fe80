"""Trains and evaluates experiments/peer_shakespeare.py under several names and seeds: the comparison of the backbones.

    python -m benchmarks.peer_shakespeare                               # every backbone of presets, three seeds each
    python -m benchmarks.peer_shakespeare --names dit birwkv_add --seeds 1 2

Each run goes through the programs that a user runs (train, then evaluate: the average with 8 draws, the raw weights
with 2; an autoregressive model has no noise, and its one value is exact) and becomes one line of
benchmarks/results/peer_shakespeare.jsonl, where "curve" is the validation NELBO and "cpu_seconds" the CPU time of the
steps alone, both over steps. A finished run is not run again; an interrupted one goes on. One core each: start it
twice, on other seeds, for two cores.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks.measure import RESULTS, ROOT, commit, read
from diffrwkv.presets import BACKBONES
from diffrwkv.timing import cpu_name


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p, names=BACKBONES, seeds=[1, 2, 3], runs="peer", output="peer_shakespeare.jsonl")
    every_run(one_run, p.parse_args())


def add_arguments(p, *, names, seeds, runs, output):
    """The flags of a comparison by this recipe."""
    p.add_argument("--names", nargs="+", default=list(names), help="NAME of experiments/peer_shakespeare.py:NAME")
    p.add_argument("--seeds", nargs="+", type=int, default=seeds)
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--draws", type=int, default=8)
    p.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / runs, help="folder of the workdirs")
    p.add_argument("--output", type=pathlib.Path, default=RESULTS / output)


def every_run(one, args):
    """Appends `one(name, seed, args)` for each name and seed that the output lacks."""
    for seed in args.seeds:
        for name in args.names:
            done = {(row["name"], row["seed"], row["steps"]) for row in read(args.output)}
            if (name, seed, args.steps) not in done:
                row = one(name, seed, args)
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with open(args.output, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps({k: v for k, v in row.items() if k != "curve"}), flush=True)


def one_run(name, seed, args, *, experiment=None, steps=None, overrides=()):
    """The result line of one (name, seed), from the files that the programs wrote.

    Args:
      experiment: NAME of experiments/peer_shakespeare.py:NAME (`name`).
      steps: of training (`args.steps`).
      overrides: more flags of training.
    """
    workdir = args.runs / f"{name}-{seed}"
    steps = args.steps if steps is None else steps
    train = [
        "diffrwkv.train",
        f"--config=experiments/peer_shakespeare.py:{experiment or name}",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.train.num_steps={steps}",
        "--config.train.cpu_devices=1",
        "--config.train.sample_every=0",
        *overrides,
    ]
    program(train)
    lines = read(workdir / "metrics.jsonl")
    evaluate = ["diffrwkv.evaluate", f"--workdir={workdir}", f"--draws={args.draws}"]
    program([*evaluate[:2], "--draws=2", "--raw"])
    raw = json.loads((workdir / "eval.json").read_text())
    program(evaluate)
    ema = json.loads((workdir / "eval.json").read_text())
    cfg = json.loads((workdir / "config.json").read_text())
    run = json.loads((workdir / "run.json").read_text())
    speed = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    return {
        "name": name,
        "model": {k: cfg["model"][k] for k in ("dim", "num_layers", "pattern", "channel_mixer", "block")},
        "seed": seed,
        "steps": steps,
        "nelbo": ema["nelbo"],
        "nelbo_se": ema["nelbo_se_draws"],
        "raw_nelbo": raw["nelbo"],
        "raw_nelbo_se": raw["nelbo_se_draws"],
        "draws": ema["draws"],
        "tokens": ema["tokens"],
        "parameters": run["parameters"],
        "tokens_per_second": speed[len(speed) // 2],
        "curve": [[line["step"], line["val/nelbo"]] for line in lines if "val/nelbo" in line],
        "cpu_seconds": [[line["step"], line["step_cpu_seconds"]] for line in lines if "val/nelbo" in line],
        "loss": [[line["step"], round(line["train/loss"], 4)] for line in lines if "train/loss" in line],
        "grad_norm_max": max(line["train/grad_norm"] for line in lines if "train/grad_norm" in line),
        "device": f"1 core of {cpu_name()}",
        "commit": commit(),
        "command": f"python -m benchmarks.peer_shakespeare --names {name} --seeds {seed}",
    }


def program(arguments):
    print("python -m", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
