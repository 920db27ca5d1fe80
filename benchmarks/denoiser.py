"""Time and memory of one denoising pass over the length of the sequence.

    python -m benchmarks.denoiser                       # the peers' size, lengths 256 to 4096, this machine
    python -m benchmarks.denoiser --lengths 1024 65536 --dim 768 --layers 12 --dtype bfloat16

One sequence of random tokens, half of them masked, random weights. On a CPU the figure is CPU time (the least of the
repeats, summed over threads), which other work on the machine disturbs least; elsewhere wall time. Before a time is
reported, a pass in the operator's chunked form is compared with one in its definition, at the shortest length.
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import RESULTS, origin, timed, write
from diffrwkv.config import use_huge_pages
from diffrwkv.denoiser import Denoiser, count_parameters


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--vocab_size", type=int, default=66)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--out", type=pathlib.Path, help="benchmarks/results/denoiser_cpu.jsonl on a CPU")
    args = p.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    out = args.out or RESULTS / f"denoiser_{jax.default_backend()}.jsonl"

    def build(**options):
        return Denoiser(args.vocab_size, args.dim, args.layers, dtype=args.dtype, mixers={"birwkv7": options})

    model = build()
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    keys = iter(jax.random.split(jax.random.key(1), 999))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)

    def canvas(length):
        key_tokens, key_masks = jax.random.split(jax.random.key(length))
        z = jax.random.randint(key_tokens, (1, length), 0, args.vocab_size - 1)
        return jnp.where(jax.random.bernoulli(key_masks, 0.5, z.shape), args.vocab_size - 1, z)

    z = canvas(min(args.lengths))
    fast, slow = (jax.jit(m.apply)(params, z) for m in (model, build(implementation="reference")))
    error = float(jnp.linalg.norm(fast - slow) / jnp.linalg.norm(slow))
    if not error < (1e-4 if args.dtype == "float32" else 3e-2):
        raise SystemExit(f"the pass is wrong by {error:.1e}: no time is reported")

    rows = []
    for length in args.lengths:
        z = canvas(length)
        compiled = jax.jit(model.apply).lower(params, z).compile()
        time = timed(lambda compiled=compiled, z=z: compiled(params, z), args.repeats)
        rows.append(
            {
                "name": "BiRWKV",
                "length": length,
                "milliseconds": 1e3 * time["cpu_seconds" if on_cpu else "wall_seconds"],
                "clock": "CPU time" if on_cpu else "wall time",
                "wall_ms": 1e3 * time["wall_seconds"],
                "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
                "parameters": count_parameters(params),
                "dim": args.dim,
                "layers": args.layers,
                "dtype": args.dtype,
                "error": error,
                **origin(),
            }
        )
        print(f"L {length:7,}  {rows[-1]['milliseconds']:10.1f} ms  {rows[-1]['temporary_mb']:8.1f} MB", flush=True)
    if len(rows) > 1:
        for name in ("milliseconds", "temporary_mb"):
            exponent = np.polyfit(np.log(args.lengths), np.log([row[name] for row in rows]), 1)[0]
            print(f"{name} grows as L^{exponent:.2f}")
    write(out, rows)


if __name__ == "__main__":
    use_huge_pages()
    main()
