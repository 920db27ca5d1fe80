"""A text of 100,000 tokens, generated block by block: what a block costs, and what memory there is, along the way.

    taskset -c 0 python -m benchmarks.stream                             # BiRWKV, BiMamba-2
    taskset -c 0 python -m benchmarks.stream --names dit --tokens 8192   # a cache that grows with the text

The weights are random: what a block costs does not depend on them, as each takes the same four passes and one more for
the state. Small models (--dim, --layers), one sequence, on one core. The state at each position is kept, and when the
whole text is there, blocks behind these positions are timed in turns, so that what else the machine does meets them
alike: CPU time, the median of `--repeats`. Lines are added to benchmarks/results/stream_cpu.jsonl, one a model.
"""

import argparse
import pathlib
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import RESULTS, origin, read, write
from diffrwkv import profile
from diffrwkv.diffusion import samplers

VOCABULARY, BLOCK, PASSES = 66, 16, 4


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--names", nargs="+", default=["birwkv", "bimamba"], help="backbones of presets.py")
    p.add_argument("--tokens", type=int, default=100_000 + 1024, help="length of the text")
    p.add_argument("--at", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="positions to report")
    p.add_argument("--repeats", type=int, default=200, help="blocks in a median")
    p.add_argument("--dim", type=int, default=64)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--output", type=pathlib.Path, default=RESULTS / "stream_cpu.jsonl")
    args = p.parse_args()
    for name in args.names:
        row = measure(name, args) | origin()
        print(row)
        write(args.output, [*(r for r in read(args.output) if r["name"] != name), row])


def measure(name, args):
    """A text of args.tokens tokens by the backbone `name`."""
    model = profile.build(name, dim=args.dim, layers=args.layers, vocab_size=VOCABULARY)
    params = profile.random_weights(model)
    step, _ = profile.block_step(model, BLOCK, PASSES, temperature=1.0)

    def next_block(state, number):
        samples, state = step(params, state, keys, np.int32(number))
        return samples.tokens, samples.passes, state

    blocks = -(-args.tokens // BLOCK)
    state, keys = model.empty_state(1, blocks * BLOCK), samplers.sequence_keys(0, 1)
    found, kept = np.zeros(VOCABULARY), {}
    for number in range(blocks):
        if number in [position // BLOCK for position in args.at]:
            kept[number] = state, peak_mb()
        tokens, passes, state = next_block(state, number)
        found[np.asarray(tokens)[0]] += 1
        assert int(passes[0]) == PASSES
    assert (found > 0).sum() > 10, "a text of a few tokens is no text"
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))
    seconds = {number: [] for number in kept}
    for _ in range(args.repeats):
        for number, (before, _) in kept.items():
            begun = time.process_time()
            jax.block_until_ready(next_block(before, number))
            seconds[number].append(time.process_time() - begun)
    points = [
        {
            "position": number * BLOCK,
            "milliseconds": 1e3 * statistics.median(seconds[number]),
            "peak_mb": peak,
        }
        for number, (_, peak) in kept.items()
    ]
    return {
        "name": name,
        "dim": args.dim,
        "num_layers": args.layers,
        "block": BLOCK,
        "passes": PASSES + 1,
        "tokens": blocks * BLOCK,
        "state_kb": sum(x.nbytes for x in jax.tree.leaves(state)) / 1024,
        "points": points,
    }


def peak_mb():
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
