"""Trains experiments/zero_shot.py under several backbones, and scores them on texts and choices that they never saw.

    python -m benchmarks.zero_shot --train 'train/*_cpu.jsonl.xz' --texts ptb wikitext2 lm1b_10_11 lambada ...
        --choices eval/mc_piqa.jsonl.xz ... --last_words eval/lambada_test.jsonl.xz

Names and paths are those of `diffrwkv.train` and `diffrwkv.evaluate`; paths are looked for in the data folder
($DIFFRWKV_DATA). Each run becomes a line of benchmarks/results/zero_shot.jsonl: "texts" and "choices" have what
`evaluate` says of each. What is there is not done again; an interrupted run goes on. One core each.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks.measure import RESULTS, ROOT, commit, read
from benchmarks.peer_shakespeare import every_run, program
from diffrwkv.data.download import data_root
from diffrwkv.timing import cpu_name

TEXT_FIGURES = ("nelbo", "nelbo_se_draws", "nelbo_se_text", "bpc", "word_ppl", "tokens", "draws", "detokenizer")
CHOICE_FIGURES = ("questions", "acc", "acc_se", "acc_norm", "acc_norm_se", "chance", "ppl", "draws")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--names", nargs="+", default=["birwkv", "dit", "bimamba", "ar_rwkv"])
    p.add_argument("--seeds", nargs="+", type=int, default=[1])
    p.add_argument("--train", default="wikitext2", help="config.data.name")
    p.add_argument("--steps", type=int, default=1500, help="of training")
    p.add_argument("--texts", nargs="*", default=[], metavar="NAME|PATH")
    p.add_argument("--limit", type=int, default=512, help="rows of a text")
    p.add_argument("--draws", type=int, default=8)
    p.add_argument("--choices", nargs="*", default=[], metavar="FILE", help="of multiple choice")
    p.add_argument("--last_words", nargs="*", default=[], metavar="FILE", help="passages, whose last word is wanted")
    p.add_argument("--questions", type=int, default=300, help="of each file")
    p.add_argument("--choice_draws", type=int, default=32)
    p.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "zero_shot", help="folder of the workdirs")
    p.add_argument("--output", type=pathlib.Path, default=RESULTS / "zero_shot.jsonl")
    every_run(one_run, p.parse_args())


def one_run(name, seed, args):
    """The result line of one (name, seed), from the files that the programs wrote."""
    workdir = args.runs / f"{name}-{seed}"
    program(
        [
            "diffrwkv.train",
            f"--config=experiments/zero_shot.py:{name}",
            f"--workdir={workdir}",
            f"--config.seed={seed}",
            f"--config.data.name={args.train}",
            f"--config.train.num_steps={args.steps}",
            "--config.train.cpu_devices=1",
        ]
    )
    score = ["diffrwkv.evaluate", f"--workdir={workdir}", f"--draws={args.draws}", f"--limit={args.limit}"]
    program(score)
    own = json.loads((workdir / "eval.json").read_text())
    scored = printed([*score, "--data", *args.texts]) if args.texts else []
    choose = [*score[:2], "--suite=choices", f"--draws={args.choice_draws}", f"--limit={args.questions}"]
    texts = {name: figures(row, TEXT_FIGURES) for name, row in zip(args.texts, scored, strict=True)}
    choices = {}
    for names, flags in ((args.choices, []), (args.last_words, ["--last_word"])):
        paths = [str(data_root() / name) for name in names]
        found = printed([*choose, *flags, "--data", *paths]) if names else []
        choices |= {name: figures(row, CHOICE_FIGURES) for name, row in zip(names, found, strict=True)}
    lines = read(workdir / "metrics.jsonl")
    run = json.loads((workdir / "run.json").read_text())
    return {
        "name": name,
        "seed": seed,
        "steps": args.steps,
        "trained_on": args.train,
        "parameters": run["parameters"],
        "tokens_trained": [line["tokens"] for line in lines if "tokens" in line][-1],
        "nelbo": own["nelbo"],
        "nelbo_se_draws": own["nelbo_se_draws"],
        "bpc": own["bpc"],
        "texts": texts,
        "choices": choices,
        "device": f"1 core of {cpu_name()}",
        "commit": commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def figures(row, names):
    """Those of a result that a row keeps."""
    return {name: row[name] for name in names if name in row}


def printed(arguments):
    """The lines of JSON that a program prints: what it found now, and what it had kept under the same settings."""
    print("python -m", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main()
