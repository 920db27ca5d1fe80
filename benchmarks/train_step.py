"""A training step at the peers' size and recipe: CPU and wall seconds, on one and on two virtual devices.

    taskset -c 0 python -m benchmarks.train_step --devices 1
    python -m benchmarks.train_step --devices 2
    e=experiments/peer_shakespeare.py
    taskset -c 0 python -m benchmarks.train_step --devices 1 --config $e:birwkv $e:birwkv@4 $e:birwkv@16 $e:birwkv@64

    python -m benchmarks.train_step --devices 1 --vocabulary 50258 [--whole]
    python -m benchmarks.train_step --compile --vocabulary 50258 --sequences 8 --config experiments/owt_small.py:birwkv

Real tiny Shakespeare through the library's own step. Each experiment has a process of its own, as training has: in one
process a larger step finds the memory that a smaller one gave back, and fetches the rest anew from the system. The
processes take turns of STRETCH steps, so that what else the machine does, and its drifting speed, meet them alike.
Lines are added to benchmarks/results/train_step_cpu.jsonl, one a setting. --small_pages leaves glibc's allocator as it
is.

With --vocabulary the tokens are random, of so many ids, and lines are added to benchmarks/results/head.jsonl; there
--whole makes the network's whole output, and else it is made where the loss reads it. --use is that of
benchmarks.denoiser. --compile runs nothing: it tells the temporary memory of the step compiled for this machine, from
shapes.
"""

import argparse
import functools
import math
import multiprocessing
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from flax import linen as nn

from benchmarks import turns
from benchmarks.measure import RESULTS, origin, read, write
from diffrwkv import cli, config, data, profile, sharding
from diffrwkv.data.tokenizers import Byte
from diffrwkv.diffusion import deferred
from diffrwkv.run import abstract_params, build, load_data, make_optimizer
from diffrwkv.train_step import abstract_state, init_state, make_train_step

STRETCH = 4  # timed steps of one experiment in a row, behind one that is not
LABELS = {"birwkv": "BiRWKV", "dit": "DiT", "bimamba": "BiMamba-2"}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", nargs="+", default=["experiments/peer_shakespeare.py:birwkv"], help="experiments")
    p.add_argument("--devices", type=int, default=1)
    p.add_argument("--repeats", type=int, default=24, help=f"timed steps of each, rounded up to multiples of {STRETCH}")
    p.add_argument("--small_pages", action="store_true")
    p.add_argument("--vocabulary", type=int, help="random tokens, of so many ids")
    p.add_argument("--compile", action="store_true", help="only tell what the compiled step takes")
    p.add_argument("--sequences", type=int, help="in a batch; the experiment's own unless given")
    p.add_argument("--whole", action="store_true", help="make the whole output, however large")
    p.add_argument("--use", nargs="*", default=[], metavar="WHAT=FORM", help="name the form of an operator")
    p.add_argument("--out", type=pathlib.Path)
    args = p.parse_args()
    if args.vocabulary is None and (args.whole or args.compile or args.sequences):
        p.error("--whole, --compile and --sequences are of random tokens: give --vocabulary")
    out = args.out or RESULTS / ("train_step_cpu.jsonl" if args.vocabulary is None else "head.jsonl")
    use = dict(choice.split("=") for choice in args.use)
    choices = {"vocabulary": args.vocabulary, "sequences": args.sequences, "whole": args.whole, "use": use}
    for experiment in args.config:  # a wrong one is told before any work
        config.parse([f"--config={experiment}"])
    if args.compile:
        sharding.start_cpu_devices(args.devices, args.devices)
        for experiment in args.config:
            tell(out, {**Step(experiment, **choices).about(), "devices": args.devices, **origin()})
        return
    turns.compiling()
    context = multiprocessing.get_context("spawn")
    workers = []  # (connection, process, what it is, its timed steps)
    for experiment in args.config:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(experiment, args.devices, choices, theirs), daemon=True)
        process.start()
        theirs.close()  # so that a worker's end is heard
        workers.append((ours, process, ours.recv(), []))  # compiled before the next one starts
    with turns.alone():
        take_turns(workers, args, out)


def take_turns(workers, args, out):
    """Times the steps of all that are compiled, and adds their rows."""
    for _ in range(-(-args.repeats // STRETCH)):
        for connection, _, _, steps in workers:
            connection.send(STRETCH)
            steps += connection.recv()
    for connection, process, row, steps in workers:
        connection.send(0)
        process.join()
        wall, cpu = zip(*steps, strict=True)
        row |= {
            "name": row["name"] + (" on 4 KiB pages" if args.small_pages else ""),
            "devices": args.devices,
            "steps": len(steps),
            "wall_seconds": statistics.median(wall),
            "least_wall_seconds": min(wall),
            "cpu_seconds": min(cpu),
            "median_cpu_seconds": statistics.median(cpu),
            "command": " ".join(["python", *sys.orig_argv[1:]]),
        }
        tell(out, row)


def tell(out, row):
    """Prints a row and adds it to the file, in place of one of the same setting."""

    def setting(r):
        return [r.get(key) or None for key in ("name", "devices", "vocabulary", "sequences", "whole", "use")]

    print(row)
    write(out, [*(r for r in read(out) if setting(r) != setting(row)), row])


def work(experiment, devices, choices, connection):
    """A process: compiles the step, says what it is, and runs as many as it is told to, until none."""
    sharding.start_cpu_devices(devices, config.parse([f"--config={experiment}"]).train.batch_size)
    step = Step(experiment, **choices)
    about = step.about()
    step.start()
    connection.send({**about, **origin()})
    while count := connection.recv():
        step.run()  # finds the caches as the others left them
        connection.send([step.run() for _ in range(count)])


class Step:
    """The training step of an experiment, compiled.

    Args:
      vocabulary: how many ids random tokens are of; None: the experiment's data.
      sequences: in a batch; None: as many as the experiment's.
      whole: the network's whole output is made, however large.
      use: as of `profile.build`.
    """

    def __init__(self, experiment, *, vocabulary=None, sequences=None, whole=False, use=None):
        if whole:
            deferred.LEAST_BYTES = math.inf
        name, at, blocks = experiment.rpartition(":")[2].partition("@")
        self.name = LABELS.get(name, name) + (f", blocks of {blocks}" if at else "")
        self.cfg = cfg = config.parse([f"--config={experiment}"])
        self.use = use or {}
        profile.name_forms(cfg.model, self.use)
        self.shape = sequences or cfg.train.batch_size, cfg.data.length
        self.vocabulary, self.whole = vocabulary, whole
        self.mesh = mesh = sharding.make_mesh(**cfg.train.mesh)
        if vocabulary is None:
            self.dataset = load_data(cfg)
            tokenizer = self.dataset.tokenizer
        else:
            tokenizer = Byte()
            tokenizer.vocab_size, tokenizer.mask_id = vocabulary, vocabulary - 1
        self.model, objective = build(cfg, tokenizer)
        boxed = abstract_params(self.model, cfg.data.length)
        self.tx, _ = make_optimizer(cfg, nn.unbox(boxed))
        step = make_train_step(
            self.model, objective, self.tx, jax.random.key(0), ema_decay=cfg.train.ema_decay, mesh=mesh
        )
        self.replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        given, made = (self.replicated, rows, self.replicated), (self.replicated, self.replicated)
        batch = {"tokens": np.int32, "valid": np.bool_}
        self.compiled = (
            jax.jit(step, donate_argnums=0, in_shardings=given, out_shardings=made)
            .lower(
                abstract_state(nn.unbox(boxed), self.tx, objective=objective),
                {name: jax.ShapeDtypeStruct(self.shape, dtype) for name, dtype in batch.items()},
                jax.ShapeDtypeStruct((), np.int32),
            )
            .compile()
        )
        self.number = 0

    def about(self):
        """What the row says of the program."""
        row = {"name": self.name, "temporary_mb": self.compiled.memory_analysis().temp_size_in_bytes / 2**20}
        row |= {"use": self.use} if self.use else {}
        if self.vocabulary is None:
            return row
        shape = {"sequences": self.shape[0], "length": self.shape[1]}
        return row | {"vocabulary": self.vocabulary, **shape, "whole": self.whole}

    def start(self):
        """The first state, and batches."""
        init = functools.partial(init_state, self.model, self.tx, self.cfg.data.length)
        self.state = jax.jit(init, out_shardings=self.replicated)(jax.random.key(1))
        if self.vocabulary is None:
            self.batches = data.train_iterator(self.dataset, batch_size=self.shape[0], seed=0)
        else:
            self.batches = self.random_batches(np.random.default_rng(0))

    def random_batches(self, random):
        while True:
            tokens = random.integers(0, self.vocabulary - 1, self.shape, np.int32)  # the mask is the last
            yield {"tokens": tokens, "valid": np.ones(self.shape, bool)}

    def run(self):
        """A step; its wall and CPU seconds."""
        batch = sharding.global_batch(next(self.batches), self.mesh)
        wall, cpu = time.perf_counter(), time.process_time()
        self.state, measured = jax.block_until_ready(self.compiled(self.state, batch, np.int32(self.number)))
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        self.number += 1
        assert int(self.state["step"]) == self.number, f"a step was refused: its loss was {measured['train/loss']}"
        return seconds


if __name__ == "__main__":
    if "--small_pages" not in sys.argv:
        cli.use_huge_pages()
    main()
