"""Block diffusion under the peers' recipe: blocks of 4, 16 and 64 characters, and one network for all sizes.

    python -m benchmarks.blocks                                # every name, two seeds
    python -m benchmarks.blocks --names birwkv@16 --seeds 1

Each run is one of experiments/peer_shakespeare.py (`NAME@BLOCKS`), trained and evaluated by the programs that a user
runs, as benchmarks/peer_shakespeare.py has it; then it is evaluated at every size of `--at` that it was trained with.
A line a run in benchmarks/results/blocks.jsonl, with "nelbo_at": {size: [NELBO, standard error]}. A finished run is not
run again; an interrupted one goes on. One core each: start it twice, on other seeds, for two cores.
"""

import argparse
import json
import pathlib

from benchmarks.measure import RESULTS, ROOT, read
from benchmarks.peer_shakespeare import one_run, program

LENGTH = 256
NAMES = ("birwkv@4", "birwkv@16", "birwkv@64", "birwkv@16,1,4,64,0")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--names", nargs="+", default=list(NAMES), help="NAME@BLOCKS; 0: the whole sequence")
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--draws", type=int, default=8, help="at the first size; half as many at the others")
    p.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "blocks", help="folder of the workdirs")
    p.add_argument("--output", type=pathlib.Path, default=RESULTS / "blocks.jsonl")
    args = p.parse_args()
    for seed in args.seeds:
        for name in args.names:
            done = {(row["name"], row["seed"], row["steps"]) for row in read(args.output)}
            if (name, seed, args.steps) in done:
                continue
            row = one_run(name, seed, args)
            row["command"] = f"python -m benchmarks.blocks --names {name} --seeds {seed}"
            row["nelbo_at"] = evaluations(row, args)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps({k: v for k, v in row.items() if k not in ("curve", "loss", "cpu_seconds")}), flush=True)


def evaluations(row, args):
    """{size: [NELBO, standard error]} at the sizes that the run was trained with, the first of them from `row`."""
    first, *others = (int(size) or LENGTH for size in row["name"].split("@")[1].split(","))
    found = {str(first): [row["nelbo"], row["nelbo_se"]]}
    workdir = args.runs / f"{row['name']}-{row['seed']}"
    for size in others:
        draws = max(args.draws // 2, 1)
        program(["diffrwkv.evaluate", f"--workdir={workdir}", f"--draws={draws}", f"--block_size={size}"])
        result = json.loads((workdir / "eval.json").read_text())
        found[str(size)] = [result["nelbo"], result["nelbo_se"]]
    return found


if __name__ == "__main__":
    main()
