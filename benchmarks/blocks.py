"""Block diffusion under the peers' recipe: blocks of 4, 16 and 64 characters, and one network for all sizes.

    python -m benchmarks.blocks                                # every name, two seeds
    python -m benchmarks.blocks --names birwkv@16 --seeds 1

Each run is one of experiments/peer_shakespeare.py (`NAME@BLOCKS`), trained and evaluated by the programs that a user
runs, as benchmarks/peer_shakespeare.py has it; then it is evaluated at every size that it was trained with, with half
as many draws at all but the first.
A line a run in benchmarks/results/blocks.jsonl, with "nelbo_at": {size: [NELBO, standard error]}. A finished run is not
run again; an interrupted one goes on. One core each: start it twice, on other seeds, for two cores.
"""

import argparse
import json

from benchmarks.peer_shakespeare import add_arguments, every_run, one_run, program

LENGTH = 256
NAMES = ("birwkv@4", "birwkv@16", "birwkv@64", "birwkv@16,1,4,64,0")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p, names=NAMES, seeds=[1, 2], runs="blocks", output="blocks.jsonl")
    every_run(one_run_at_all_sizes, p.parse_args())


def one_run_at_all_sizes(name, seed, args):
    """The result line of one (name, seed)."""
    row = one_run(name, seed, args)
    row["command"] = f"python -m benchmarks.blocks --names {name} --seeds {seed}"
    return row | {"nelbo_at": evaluations(row, args)}


def evaluations(row, args):
    """{size: [NELBO, standard error]} at the sizes that the run was trained with, the first of them from `row`."""
    first, *others = (int(size) or LENGTH for size in row["name"].split("@")[1].split(","))
    found = {str(first): [row["nelbo"], row["nelbo_se"]]}
    workdir = args.runs / f"{row['name']}-{row['seed']}"
    for size in others:
        draws = max(args.draws // 2, 1)
        program(["diffrwkv.evaluate", f"--workdir={workdir}", f"--draws={draws}", f"--block_size={size}"])
        result = json.loads((workdir / "eval.json").read_text())
        found[str(size)] = [result["nelbo"], result["nelbo_se_draws"]]
    return found


if __name__ == "__main__":
    main()
