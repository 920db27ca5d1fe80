"""Time and memory of one denoising pass over the length of the sequence.

    python -m benchmarks.denoiser                       # the bidirectional backbones at the peers' size, this machine
    python -m benchmarks.denoiser --names birwkv dit --size small --lengths 1024 16384 --dtype bfloat16
    python -m benchmarks.denoiser --names birwkv --dim 768 --layers 12 --lengths 1024 65536

One sequence of random tokens, half of them masked, random weights. On a CPU the figure is CPU time (the least of the
repeats, summed over threads), which other work on the machine disturbs least; elsewhere wall time. A shorter length is
repeated more often, so that all are measured for about as long. Before a time is reported, a pass is compared with one
in which each operator runs in its plain form (PLAIN), at the shortest length.
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import RESULTS, origin, timed, write
from benchmarks.report import LABELS
from diffrwkv import config, presets
from diffrwkv.denoiser import Denoiser, count_parameters

NAMES = [name for name in presets.BACKBONES if name not in presets.AUTOREGRESSIVE]
# The definition of wkv7 and of ssd, and attention without a fused kernel (on a CPU that is what runs anyhow).
PLAIN = {
    "attention": "xla",
    "causal_attention": "xla",
    "bimamba2": "reference",
    "mamba2": "reference",
    "birwkv7": "reference",
    "rwkv7": "reference",
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--names", nargs="+", default=NAMES, choices=presets.BACKBONES, metavar="NAME")
    p.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    p.add_argument("--size", default="peer", choices=presets.SIZES)
    p.add_argument("--dim", type=int, help="instead of the size's width, depth and options")
    p.add_argument("--layers", type=int, help="instead of the size's depth")
    p.add_argument("--vocab_size", type=int, help="instead of the size's")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--repeats", type=int, default=7, help="of the longest")
    p.add_argument("--out", type=pathlib.Path, help="benchmarks/results/denoiser_cpu.jsonl on a CPU")
    args = p.parse_args()
    out = args.out or RESULTS / f"denoiser_{jax.default_backend()}.jsonl"
    rows = []
    for name in args.names:
        rows += measure(name, args)
        write(out, rows)


def build(name, args, plain=False):
    """The denoiser that the arguments describe; `plain`: with every operator in its plain form."""
    size = presets.SIZES[args.size]
    c = config.base()
    presets.configure(c, name, args.size)
    if args.dim:  # the size's options fit its own width
        c = config.base()
        c.model.update(presets.BACKBONES[name])
        c.model.dim, c.model.num_layers = args.dim, size[name]["num_layers"]
    if args.layers:
        c.model.num_layers = args.layers
    c.model.dtype = args.dtype
    if plain:
        for mixer, implementation in PLAIN.items():
            c.model.mixers[mixer].implementation = implementation
    return Denoiser(args.vocab_size or size["vocab_size"], **c.model.to_dict())


def measure(name, args):
    """A row for each length."""
    on_cpu = jax.default_backend() == "cpu"
    model = build(name, args)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    keys = iter(jax.random.split(jax.random.key(1), 999))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)

    def canvas(length):
        key_tokens, key_masks = jax.random.split(jax.random.key(length))
        z = jax.random.randint(key_tokens, (1, length), 0, model.vocab_size - 1)
        return jnp.where(jax.random.bernoulli(key_masks, 0.5, z.shape), model.vocab_size - 1, z)

    z = canvas(min(args.lengths))
    fast, slow = (jax.jit(m.apply)(params, z) for m in (model, build(name, args, plain=True)))
    error = float(jnp.linalg.norm(fast - slow) / jnp.linalg.norm(slow))
    if not error < (1e-4 if args.dtype == "float32" else 3e-2):
        raise SystemExit(f"{name}: the pass is wrong by {error:.1e}: no time is reported")

    rows = []
    for length in args.lengths:
        z = canvas(length)
        compiled = jax.jit(model.apply).lower(params, z).compile()
        repeats = args.repeats * max(args.lengths) // length
        time = timed(lambda compiled=compiled, z=z: compiled(params, z), repeats)
        rows.append(
            {
                "name": LABELS[name],
                "length": length,
                "milliseconds": 1e3 * time["cpu_seconds" if on_cpu else "wall_seconds"],
                "clock": "CPU time" if on_cpu else "wall time",
                "wall_ms": 1e3 * time["wall_seconds"],
                "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
                "parameters": count_parameters(params),
                "dim": model.dim,
                "layers": model.num_layers,
                "dtype": args.dtype,
                "error": error,
                **origin(),
            }
        )
        time, memory = rows[-1]["milliseconds"], rows[-1]["temporary_mb"]
        print(f"{name:15} L {length:7,}  {time:10.1f} ms  {memory:8.1f} MB", flush=True)
    if len(rows) > 1:
        for figure in ("milliseconds", "temporary_mb"):
            exponent = np.polyfit(np.log(args.lengths), np.log([row[figure] for row in rows]), 1)[0]
            print(f"{name}: {figure} grows as L^{exponent:.2f}")
    return rows


if __name__ == "__main__":
    config.use_huge_pages()
    main()
