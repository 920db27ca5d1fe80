"""Time and memory of one denoising pass over the length of the sequence.

    python -m benchmarks.denoiser                       # the bidirectional backbones at the peers' size, this machine
    python -m benchmarks.denoiser --names dit --size small --dtype bfloat16 --use attention=cudnn --lengths 1024 131072
    python -m benchmarks.denoiser --names birwkv --dim 768 --layers 12 --lengths 1024 65536

One sequence of random tokens, half of them masked, random weights. On a CPU the figure is CPU time (the least of the
repeats, summed over threads), which other work on the machine disturbs least. Elsewhere it is wall time per pass of a
burst of passes, the median over bursts. A shorter length is repeated more often, so that all are measured for about as
long. Before a time is reported, a pass is compared with one in which each operator runs in its plain form
(`profile.PLAIN`), at the shortest length or at --checked. A length that fails, for want of memory say, says why.

`peak_mb` is what a pass holds at most by XLA's account: arguments (the weights), outputs (the logits) and temporaries.
`device_peak_mb`, where the device keeps count, is the most that this process held so far, lengths ascending.

Without --use each operator takes the form that it takes in a model; --use attention=cudnn fails where that cannot run,
and --use birwkv7.time_mix=fused leaves what stands around wkv7 to XLA. --parts 1 leaves the time axis in one piece,
which wkv7's kernel for Hopper takes in as many as fill the GPU.
"""

import argparse
import concurrent.futures
import pathlib
import sys

import jax
import numpy as np

from benchmarks import turns
from benchmarks.measure import RESULTS, keeper, origin
from benchmarks.report import LABELS
from diffrwkv import cli, presets, profile, timing
from diffrwkv.denoiser import count_parameters
from pallas_kernels.wkv7 import split

NAMES = [name for name in presets.BACKBONES if name not in presets.AUTOREGRESSIVE]


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
    p.add_argument("--use", nargs="*", default=[], metavar="WHAT=FORM", help="name the form of an operator")
    p.add_argument("--parts", type=int, help="of the time axis in wkv7's kernel for Hopper")
    p.add_argument("--checked", type=int, help="length at which a pass is compared; the shortest if left out")
    p.add_argument("--repeats", type=int, default=7, help="of the longest")
    p.add_argument("--out", type=pathlib.Path, help="benchmarks/results/denoiser_cpu.jsonl on a CPU")
    p.add_argument("--append", action="store_true", help="keep the rows that OUT has")
    args = p.parse_args()
    out = args.out or RESULTS / f"denoiser_{jax.default_backend()}.jsonl"
    args.lengths = sorted(args.lengths)
    args.use = dict(choice.split("=") for choice in args.use)
    if args.parts:
        split.parts_of = lambda directions, shape: args.parts
    keep, rows = keeper(out, args.append), []
    turns.compiling()
    for name in args.names:
        for row in measure(name, args):
            rows.append(row)
            keep([row])
    without = {LABELS[name] for name in args.names} - {row["name"] for row in rows if row["milliseconds"]}
    return f"no time at any length: {', '.join(sorted(without))}" if without else None


def measure(name, args):
    """Yields a row for each length."""
    own = {key: getattr(args, key) for key in ("dim", "layers", "vocab_size", "scan_layers", "dtype", "use")}
    model = profile.build(name, args.size, **own)
    params = profile.random_weights(model)
    canvases = [profile.canvas(model, 1, length) for length in args.lengths]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # compilers work outside of Python's lock
        passes = [pool.submit(profile.compile_pass, model, params, z) for z in canvases]
        if args.checked in (None, args.lengths[0]):
            error = profile.check(name, model, params, args.lengths[0], passes[0].result())
        else:
            error = profile.check(name, model, params, args.checked)
    with turns.alone():
        yield from timed(name, model, params, canvases, passes, error, args)


def timed(name, model, params, canvases, passes, error, args):
    """Yields the rows of passes that are compiled."""
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
            "parts": args.parts,
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


def one_length(compiled, params, z, repeats):
    """The row's fields on time and memory of a pass over z [1, L]."""
    time = timing.latency(lambda: compiled(params, z), repeats=repeats)
    if "cpu_ms" in time:
        fields = {"milliseconds": time["cpu_ms"], "clock": "CPU time", "wall_ms": time["milliseconds"]}
    else:
        fields = {key: time[key] for key in ("milliseconds", "least_ms", "most_ms")}
        fields |= {"clock": "wall time", "wall_ms": time["milliseconds"]}
    fields["tokens_per_second"] = z.size / (1e-3 * fields["wall_ms"])
    fields |= {key: profile.xla_counts(compiled)[key] for key in ("temporary_mb", "peak_mb")}
    seen = jax.devices()[0].memory_stats()  # None on a CPU
    return fields | ({"device_peak_mb": seen["peak_bytes_in_use"] / 2**20} if seen else {})


def shown(row):
    text = f"{row['milliseconds']:10.2f} ms  {row['tokens_per_second']:12,.0f} tokens/s"
    return f"{text}  {row['temporary_mb']:9.1f} MB, {row['peak_mb']:9.1f} with weights and logits"


if __name__ == "__main__":
    cli.use_huge_pages()
    sys.exit(main())
