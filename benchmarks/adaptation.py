"""From a model that writes left to right to one that fills in: what its weights are worth, at equal compute.

    python -m benchmarks.adaptation                      # every start, three seeds
    python -m benchmarks.adaptation --names adapted --seeds 1

The source is the autoregressive RWKV-7 of experiments/peer_shakespeare.py, trained first (seed by seed). From it block
diffusion in blocks of 16 is trained by the same recipe, and beside it from random weights; all networks have its width
and depth. STARTS says what each does. Each run goes through the programs that a user runs. A line of the output has
"curve", the validation NELBO in blocks of 16 over steps (one draw), "cpu_seconds" over steps, and "nelbo" of the
average at the end with more draws; "budget" is the steps of all runs but "longer", which has as many more as the source
had, so that the source is paid for. A finished run is not run again; an interrupted one goes on. One core each: start
it twice, on other seeds, for two cores.
"""

import argparse

from benchmarks.measure import append, read
from benchmarks.peer_shakespeare import add_arguments, one_run, program

SOURCE, BLOCK = "ar_rwkv", 16
NEXT = "--config.model.predict_next=True"
FORWARD = ("--config.model.pattern=rwkv7", "--config.model.channel_mixers.rwkv7.shift=previous")
# What each start is: whether from the source; its sizes of blocks, the first of them evaluated, each with the share of
# all steps after which it begins; what it changes in the config.
STARTS = {
    "scratch": (False, {BLOCK: 0}, ()),
    "scratch_next": (False, {BLOCK: 0}, (NEXT,)),  # logits at the token before, as adapted networks have them
    "longer": (False, {BLOCK: 0}, ()),
    "adapted": (True, {BLOCK: 0.4, 4: 0.2, 1: 0}, (NEXT,)),
    "adapted_at_once": (True, {BLOCK: 0}, (NEXT,)),
    "adapted_own": (True, {BLOCK: 0}, ()),  # logits at the token itself: what they are about moves by one
    "forward": (True, {BLOCK: 0}, (NEXT, *FORWARD)),
    "twice": (True, {BLOCK: 0}, (NEXT, *FORWARD, "--config.model.reading=twice")),
    "twice_own": (True, {BLOCK: 0}, (*FORWARD, "--config.model.reading=twice")),  # B3D-RWKV's: no logits are moved
    "future_seed": (True, {BLOCK: 0}, (NEXT, *FORWARD, "--config.model.reading=future_seed")),
}


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p, names=STARTS, seeds=[1, 2, 3], runs="adaptation", output="adaptation.jsonl")
    p.set_defaults(steps=200)
    p.add_argument("--source_steps", type=int, default=500, help="of the source")
    p.add_argument("--every", type=int, default=50, help="steps between evaluations")
    p.add_argument("--set", nargs="+", default=[], help="config keys of all runs, as --config.a.b=VALUE without --")
    args = p.parse_args(arguments)
    if unknown := sorted(set(args.names) - set(STARTS)):
        p.error(f"no start is called {', '.join(unknown)}: there are {', '.join(STARTS)}")
    for seed in args.seeds:
        for name in args.names:
            if (name, seed, args.steps) not in {(row["name"], row["seed"], row["budget"]) for row in read(args.output)}:
                append(args.output, one_start(name, seed, args))


def one_start(name, seed, args):
    """The result line of one (name, seed)."""
    of_source, sizes, changes = STARTS[name]
    common = [f"--{key}" for key in args.set]
    steps = args.steps + (args.source_steps if name == "longer" else 0)
    overrides = [f"--config.train.eval_every={args.every}", *changes]
    if not any(key.startswith("config.model.num_layers=") for key in args.set):
        overrides += ["--config.model.num_layers=5"]
    overrides += ["--config.diffusion.layout=blocks", f"--config.layouts.blocks.sizes=({','.join(map(str, sizes))},)"]
    if len(sizes) > 1:
        begins = ",".join(str(round(share * steps)) for share in sizes.values())
        overrides += [f"--config.layouts.blocks.begins=({begins})"]
    if of_source:
        overrides += [f"--config.train.init_from={source(seed, args, common)}"]
    row = one_run(name, seed, args, experiment="birwkv", steps=steps, overrides=[*overrides, *common])
    command = f"python -m benchmarks.adaptation --names {name} --seeds {seed} --steps {args.steps}"
    return row | {"budget": args.steps, "source_steps": args.source_steps, "command": command}


def source(seed, args, common):
    """The workdir of the autoregressive model with this seed, trained if it is not there."""
    workdir = args.runs / f"{SOURCE}-{seed}"
    train = [f"--config=experiments/peer_shakespeare.py:{SOURCE}", f"--workdir={workdir}", f"--config.seed={seed}"]
    train += [f"--config.train.num_steps={args.source_steps}", "--config.train.cpu_devices=1"]
    program(["diffrwkv.train", *train, "--config.train.sample_every=0", *common])
    return workdir


if __name__ == "__main__":
    main()
