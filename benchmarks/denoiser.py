"""Time and memory of one denoising pass over the length of the sequence.

    python -m benchmarks.denoiser                       # the bidirectional backbones at the peers' size, this machine
    python -m benchmarks.denoiser --names dit --size small --dtype bfloat16 --use attention=cudnn --lengths 1024 131072
    python -m benchmarks.denoiser --names birwkv --dim 768 --layers 12 --lengths 1024 65536

One sequence of random tokens, half of them masked, random weights. On a CPU the figure is CPU time (the least of the
repeats, summed over threads), which other work on the machine disturbs least. Elsewhere it is wall time per pass of a
burst of passes, the median over bursts. A shorter length is repeated more often, so that all are measured for about as
long. Before a time is reported, a pass is compared with one in which each operator runs in its plain form (PLAIN), at
the shortest length. A length that fails, for want of memory say, gives its reason instead of a time.

`peak_mb` is what a pass holds at most by XLA's account: arguments (the weights), outputs (the logits) and temporaries.
`device_peak_mb`, where the device keeps count, is the most that this process held so far, lengths ascending.

Without --use each operator takes the form that it takes in a model; --use attention=cudnn fails where that cannot run.
"""

import argparse
import concurrent.futures
import pathlib
import statistics
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accelerators
from benchmarks.measure import RESULTS, origin, read, timed, write
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
    p.add_argument("--scan_layers", action="store_true", help="compile one layer for all")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--use", nargs="*", default=[], metavar="MIXER=FORM", help="name the form of an operator")
    p.add_argument("--repeats", type=int, default=7, help="of the longest")
    p.add_argument("--out", type=pathlib.Path, help="benchmarks/results/denoiser_cpu.jsonl on a CPU")
    p.add_argument("--append", action="store_true", help="keep the rows that OUT has")
    args = p.parse_args()
    out = args.out or RESULTS / f"denoiser_{jax.default_backend()}.jsonl"
    args.lengths = sorted(args.lengths)
    args.use = dict(choice.split("=") for choice in args.use)
    before, rows = read(out) if args.append else [], []
    for name in args.names:
        for row in measure(name, args):
            rows.append(row)
            write(out, before + rows)
    without = {LABELS[name] for name in args.names} - {row["name"] for row in rows if row["milliseconds"]}
    return f"no time at any length: {', '.join(sorted(without))}" if without else None


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
    c.model.scan_layers = args.scan_layers
    c.model.dtype = args.dtype
    for mixer, implementation in (PLAIN if plain else args.use).items():
        c.model.mixers[mixer].implementation = implementation
    return Denoiser(args.vocab_size or size["vocab_size"], **c.model.to_dict())


def measure(name, args):
    """Yields a row for each length."""
    model = build(name, args)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    keys = iter(jax.random.split(jax.random.key(1), 999))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)

    def canvas(length):
        key_tokens, key_masks = jax.random.split(jax.random.key(length))
        z = jax.random.randint(key_tokens, (1, length), 0, model.vocab_size - 1)
        return jnp.where(jax.random.bernoulli(key_masks, 0.5, z.shape), model.vocab_size - 1, z)

    canvases = [canvas(length) for length in args.lengths]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # compilers work outside of Python's lock
        plain = pool.submit(compile_pass, build(name, args, plain=True), params, canvases[0])
        passes = [pool.submit(compile_pass, model, params, z) for z in canvases]
    z = canvases[0]
    fast, slow = (made.result()(params, z) for made in (passes[0], plain))
    error = float(jnp.linalg.norm(fast - slow) / jnp.linalg.norm(slow))
    if not error < (1e-4 if args.dtype == "float32" else 3e-2):
        raise SystemExit(f"{name}: the pass is wrong by {error:.1e}: no time is reported")

    rows = []
    for length, z, made in zip(args.lengths, canvases, passes, strict=True):
        row = {"name": LABELS[name], "length": length, "milliseconds": None}
        try:
            row |= one_length(made.result(), params, z, args.repeats * args.lengths[-1] // length)
            print(f"{name:15} L {length:7,}  {shown(row)}", flush=True)
        except RuntimeError as problem:  # of XLA: memory, or a kernel that cannot be built
            row["failed"] = str(problem)[:300]
            print(f"{name:15} L {length:7,}  NO TIME, {row['failed']}", flush=True)
        row |= {
            "parameters": count_parameters(params),
            "dim": model.dim,
            "layers": model.num_layers,
            "dtype": args.dtype,
            "use": args.use,
            "scan_layers": args.scan_layers,
            "error": error,
            **origin(),
        }
        rows.append(row)
        yield row
    for figure in ("milliseconds", "temporary_mb"):
        points = [(row["length"], row[figure]) for row in rows if not row.get("failed")]
        if len(points) > 1:
            exponent = np.polyfit(*np.log(np.array(points)).T, 1)[0]
            print(f"{name}: {figure} grows as L^{exponent:.2f}")


def compile_pass(model, params, z):
    return jax.jit(model.apply).lower(params, z).compile()


def one_length(compiled, params, z, repeats):
    """The row's fields on time and memory of a pass over z [1, L]."""

    def run():
        return compiled(params, z)

    if jax.default_backend() == "cpu":
        time = timed(run, repeats)
        fields = {"milliseconds": 1e3 * time["cpu_seconds"], "clock": "CPU time", "wall_ms": 1e3 * time["wall_seconds"]}
    else:
        calls = accelerators.calls_for(run, jax.block_until_ready)
        times = [1e3 * accelerators.burst(run, jax.block_until_ready, calls) for _ in range(max(5, repeats // calls))]
        fields = {
            "milliseconds": statistics.median(times),
            "clock": "wall time",
            "wall_ms": statistics.median(times),
            "least_ms": min(times),
            "most_ms": max(times),
        }
    memory = compiled.memory_analysis()
    whole = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    fields["tokens_per_second"] = z.size / (1e-3 * fields["wall_ms"])
    fields |= {"temporary_mb": memory.temp_size_in_bytes / 2**20, "peak_mb": whole / 2**20}
    seen = jax.devices()[0].memory_stats()  # None on a CPU
    return fields | ({"device_peak_mb": seen["peak_bytes_in_use"] / 2**20} if seen else {})


def shown(row):
    text = f"{row['milliseconds']:10.2f} ms  {row['tokens_per_second']:12,.0f} tokens/s"
    return f"{text}  {row['temporary_mb']:9.1f} MB, {row['peak_mb']:9.1f} with weights and logits"


if __name__ == "__main__":
    config.use_huge_pages()
    sys.exit(main())
