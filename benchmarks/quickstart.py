"""The README's main job, timed: train, evaluate, sample, as a newcomer types them.

    python -m benchmarks.quickstart

Writes benchmarks/results/quickstart.json: seconds of each program from start to end and of compilation, the NELBO and
a sample.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks.measure import RESULTS, ROOT, commit, read
from diffrwkv.timing import cpu_name


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workdir", type=pathlib.Path, help="a new folder (a temporary one)")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS / "quickstart.json")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = args.workdir or pathlib.Path(folder) / "quickstart"
        train, _ = program("train", "--config=experiments/quickstart.py", f"--workdir={workdir}")
        evaluate, _ = program("evaluate", f"--workdir={workdir}")
        sample, printed = program("sample", f"--workdir={workdir}", "--num=2", "--json")
        lines = read(workdir / "metrics.jsonl")
        result = json.loads((workdir / "eval.json").read_text())
        run = json.loads((workdir / "run.json").read_text())
    row = {
        "train_seconds": train,
        "evaluate_seconds": evaluate,
        "sample_seconds": sample,
        "compile_seconds": next(line["compile_seconds"] for line in lines if "compile_seconds" in line),
        "nelbo_se": result["nelbo_se_draws"],
        **{key: result[key] for key in ("nelbo", "bpc", "draws", "tokens", "step")},
        "parameters": run["parameters"],
        "data": run["data"],
        "sample": json.loads(printed.splitlines()[0])["text"],
        "device": f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}",
        "commit": commit(),
        "command": "python -m benchmarks.quickstart",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps(row, indent=2))


def program(name, *arguments):
    """Runs python -m diffrwkv.NAME; its seconds, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"diffrwkv.{name}", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, flush=True)
    return round(time.perf_counter() - started, 1), done.stdout


if __name__ == "__main__":
    main()
