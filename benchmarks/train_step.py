"""A training step at the peers' size and recipe: CPU and wall seconds, on one and on two virtual devices.

    taskset -c 0 python -m benchmarks.train_step --devices 1
    python -m benchmarks.train_step --devices 2
    e=experiments/peer_shakespeare.py
    taskset -c 0 python -m benchmarks.train_step --devices 1 --config $e:birwkv $e:birwkv@4 $e:birwkv@16 $e:birwkv@64

Real tiny Shakespeare through the library's own step. Each experiment has a process of its own, as training has: in one
process a larger step finds the memory that a smaller one gave back, and fetches the rest anew from the system. The
processes take turns of STRETCH steps, so that what else the machine does, and its drifting speed, meet them alike.
Lines are added to benchmarks/results/train_step_cpu.jsonl, one a setting. --small_pages leaves glibc's allocator as it
is.
"""

import argparse
import multiprocessing
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from flax import linen as nn

from benchmarks.measure import RESULTS, origin, read, write
from diffrwkv import config, data, sharding
from diffrwkv.run import abstract_params, build, load_data, make_optimizer
from diffrwkv.train_step import init_state, make_train_step

STRETCH = 4  # timed steps of one experiment in a row, behind one that is not
LABELS = {"birwkv": "BiRWKV", "dit": "DiT", "bimamba": "BiMamba-2"}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", nargs="+", default=["experiments/peer_shakespeare.py:birwkv"], help="experiments")
    p.add_argument("--devices", type=int, default=1)
    p.add_argument("--repeats", type=int, default=24, help=f"timed steps of each, rounded up to multiples of {STRETCH}")
    p.add_argument("--small_pages", action="store_true")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS / "train_step_cpu.jsonl")
    args = p.parse_args()
    for experiment in args.config:  # a wrong one is told before any work
        config.parse([f"--config={experiment}"])
    context = multiprocessing.get_context("spawn")
    workers = []  # (connection, process, what it is, its timed steps)
    for experiment in args.config:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(experiment, args.devices, theirs), daemon=True)
        process.start()
        theirs.close()  # so that a worker's end is heard
        workers.append((ours, process, ours.recv(), []))  # compiled before the next one starts
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
        print(row)
        others = [r for r in read(args.out) if (r["name"], r["devices"]) != (row["name"], row["devices"])]
        write(args.out, [*others, row])


def work(experiment, devices, connection):
    """A process: compiles the step, says what it is, and runs as many as it is told to, until none."""
    sharding.start_cpu_devices(devices, config.parse([f"--config={experiment}"]).train.batch_size)
    step = Step(experiment)
    temporary = step.compiled.memory_analysis().temp_size_in_bytes / 2**20
    connection.send({"name": step.name, "temporary_mb": temporary, **origin()})
    while count := connection.recv():
        step.run()  # finds the caches as the others left them
        connection.send([step.run() for _ in range(count)])


class Step:
    """The training step of an experiment, compiled."""

    def __init__(self, experiment):
        name, at, blocks = experiment.rpartition(":")[2].partition("@")
        self.name = LABELS.get(name, name) + (f", blocks of {blocks}" if at else "")
        cfg = config.parse([f"--config={experiment}"])
        self.mesh = mesh = sharding.make_mesh(**cfg.train.mesh)
        dataset = load_data(cfg)
        model, objective = build(cfg, dataset.tokenizer)
        boxed = abstract_params(model, cfg.data.length)
        tx, _ = make_optimizer(cfg, nn.unbox(boxed))
        step = make_train_step(model, objective, tx, jax.random.key(0), ema_decay=cfg.train.ema_decay, mesh=mesh)
        whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        init = jax.jit(lambda key: init_state(model, tx, cfg.data.length, key), out_shardings=whole)
        self.state = init(jax.random.key(1))
        self.batches = data.train_iterator(dataset, batch_size=cfg.train.batch_size, seed=0)
        self.compiled = (
            jax.jit(step, donate_argnums=0, in_shardings=(whole, rows, whole), out_shardings=(whole, whole))
            .lower(self.state, sharding.global_batch(next(self.batches), mesh), np.int32(0))
            .compile()
        )
        self.number = 0

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
        config.use_huge_pages()
    main()
