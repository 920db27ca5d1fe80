"""A training step at the peers' size and recipe: CPU and wall seconds, on one and on two virtual devices.

    taskset -c 0 python -m benchmarks.train_step --devices 1
    python -m benchmarks.train_step --devices 2

Real tiny Shakespeare through the library's own step (experiments/peer_shakespeare.py:birwkv); lines are added to
benchmarks/results/train_step_cpu.jsonl, one a setting. --small_pages leaves glibc's allocator as it is.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np
from flax import linen as nn

from benchmarks.measure import RESULTS, origin, read, timed, write
from diffrwkv import config, data, evaluate, sharding
from diffrwkv.train import init_state, make_optimizer, make_train_step


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default="experiments/peer_shakespeare.py:birwkv")
    p.add_argument("--name", default="BiRWKV")
    p.add_argument("--devices", type=int, default=1)
    p.add_argument("--repeats", type=int, default=12)
    p.add_argument("--small_pages", action="store_true")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS / "train_step_cpu.jsonl")
    args = p.parse_args()

    cfg = config.parse([f"--config={args.config}"])
    sharding.start_cpu_devices(args.devices, cfg.train.batch_size)
    mesh = sharding.make_mesh(**cfg.train.mesh)
    dataset = evaluate.load_data(cfg)
    model, objective = evaluate.build(cfg, dataset.tokenizer)
    boxed = evaluate.abstract_params(model, cfg.data.length)
    tx, _ = make_optimizer(cfg, nn.unbox(boxed))
    step = make_train_step(model, objective, tx, jax.random.key(0), ema_decay=cfg.train.ema_decay, mesh=mesh)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = jax.jit(lambda k: init_state(model, tx, cfg.data.length, k), out_shardings=whole)(jax.random.key(1))
    batches = data.train_iterator(dataset, batch_size=cfg.train.batch_size, seed=0)
    compiled = (
        jax.jit(step, donate_argnums=0, in_shardings=(whole, rows, whole), out_shardings=(whole, whole))
        .lower(state, sharding.global_batch(next(batches), mesh), np.int32(0))
        .compile()
    )
    number = 0

    def run():
        nonlocal state, number
        state, measured = compiled(state, sharding.global_batch(next(batches), mesh), np.int32(number))
        number += 1
        return measured

    time = timed(run, args.repeats)
    assert int(state["step"]) == number, "a step was refused: its loss was not finite"
    row = {
        "name": args.name + (" on 4 KiB pages" if args.small_pages else ""),
        "devices": args.devices,
        **time,
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        **origin(),
    }
    print(row)
    others = [r for r in read(args.out) if (r["name"], r["devices"]) != (row["name"], row["devices"])]
    write(args.out, [*others, row])


if __name__ == "__main__":
    if "--small_pages" not in sys.argv:
        config.use_huge_pages()
    main()
