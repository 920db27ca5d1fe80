"""Where the time of a denoiser's pass goes, launch by launch, as the device tells it.

    python -m benchmarks.launches --name birwkv                     # the peers' size, this machine
    python -m benchmarks.launches --name dit --size small --scan_layers --dtype bfloat16 --lengths 4096 65536

One sequence of random tokens, half of them masked, random weights, under JAX's profiler. What the profiler says of an
instruction is joined with what XLA's text says of it (benchmarks/hlo.py): the part of the model that it comes from, and
the bytes that it reads and writes. A row has for each part its milliseconds in a pass, its launches and its GB, and the
launches that take longest. `milliseconds` is their sum: on a GPU the time that its streams are busy, on a CPU that of
all threads. A fusion counts where its last operation comes from.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile
import warnings

import jax

from benchmarks import hlo, turns
from benchmarks.measure import RESULTS, append, origin
from benchmarks.report import LABELS, table
from diffrwkv import cli, presets, profile

RUNS = 3
LONGEST = 12
# Parts of the model, by where an operation stands in it; the first that fits.
PARTS = (
    ("operator", r"/(wkv7|ssd|attention)/"),
    ("around the operator", r"/att(/|$)"),
    ("channel mix", r"/ffn(/|$)"),
    ("norms, and the residual stream", r"/ln\w*(/|$)|/add$"),
    ("head", r"/Denoiser/dot_general$"),
)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", default="birwkv", choices=presets.BACKBONES, metavar="NAME")
    p.add_argument("--lengths", type=int, nargs="+", default=[4096])
    p.add_argument("--size", default="peer", choices=presets.SIZES)
    p.add_argument("--scan_layers", action="store_true", help="compile one layer for all")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--use", nargs="*", default=[], metavar="WHAT=FORM", help="name the form of an operator")
    p.add_argument(
        "--out", type=pathlib.Path, help="rows are added to it; benchmarks/results/launches_cpu.jsonl on a CPU"
    )
    args = p.parse_args()
    out = args.out or RESULTS / f"launches_{jax.default_backend()}.jsonl"
    use = dict(choice.split("=") for choice in args.use)
    turns.compiling()
    model = profile.build(args.name, args.size, scan_layers=args.scan_layers, dtype=args.dtype, use=use)
    params = profile.random_weights(model)
    for length in args.lengths:
        z = profile.canvas(model, 1, length)
        compiled = profile.compile_pass(model, params, z)
        with turns.alone():
            times = traced(lambda compiled=compiled, z=z: compiled(params, z))
        row = {"name": LABELS[args.name], "size": args.size, "length": length, "dtype": args.dtype, "use": use}
        try:
            row |= joined(hlo.kernels(compiled.as_text()), times) | origin()
        except ValueError as e:
            return str(e)
        append(out, row)
        show(row)
    return None


def traced(run, runs=RUNS):
    """{instruction: milliseconds in one run, all its launches together} by JAX's profiler, after a warm-up."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(run())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        with warnings.catch_warnings():  # of the reader itself, on Python 3.13, which an error in its place would abort
            warnings.simplefilter("ignore", DeprecationWarning)
            return {name: ms / runs for name, ms in told(jax.profiler.ProfileData.from_file(str(file))).items()}


def told(data):
    """{instruction: milliseconds} of what the profiler wrote."""
    planes = list(data.planes)
    times = collections.Counter()
    for plane in [x for x in planes if x.name.startswith("/device:")] or planes:  # a CPU is its host
        for line in plane.lines:
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op")
                if instruction and not event.name.startswith("end: "):
                    times[str(instruction)] += 1e-6 * event.duration_ns
    return times


def part_of(kernel):
    """One of PARTS, with what kind of work it is."""
    where = next((name for name, pattern in PARTS if re.search(pattern, kernel.source)), "other")
    kind = {"product": ", products", "call": ", kernels"}.get(kernel.kind, "")
    return where if where == "operator" else where + kind


def joined(kernels, times):
    """The row's fields, of the launches that a program's text has and of the times that the profiler has.

    Raises:
      ValueError: the profiler tells of hardly any of them; their sum would be no pass.
    """
    known = [kernel for kernel in kernels if kernel.name in times]
    if 2 * len(known) < len(kernels):
        raise ValueError(
            f"Of {len(kernels)} launches the profiler tells of {len(known)}. On a GPU set "
            "XLA_FLAGS=--xla_gpu_enable_command_buffer= so that none hides in a graph."
        )
    parts = {}
    for kernel in known:
        part = parts.setdefault(part_of(kernel), {"milliseconds": 0.0, "launches": 0, "gb": 0.0})
        part["milliseconds"] += times[kernel.name]
        part["launches"] += kernel.times
        part["gb"] += 1e-9 * kernel.bytes * kernel.times
    longest = sorted(known, key=lambda kernel: times[kernel.name], reverse=True)[:LONGEST]
    return {
        "milliseconds": sum(part["milliseconds"] for part in parts.values()),
        "launches": sum(part["launches"] for part in parts.values()),
        "untold": len(kernels) - len(known),
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1]["milliseconds"])),
        "longest": [
            {
                "instruction": kernel.name,
                "kind": kernel.kind,
                "part": part_of(kernel),
                "milliseconds": times[kernel.name],
                "launches": kernel.times,
                "gb": 1e-9 * kernel.bytes * kernel.times,
                "source": kernel.source[-100:],
            }
            for kernel in longest
        ],
    }


def show(row):
    """Prints the parts, and the launches that take longest."""
    print(f"{row['name']}, {row['size']}, {row['length']:,} tokens: {row['milliseconds']:.2f} ms", end="")
    print(f", without {row['untold']} launches of which the profiler does not tell" if row["untold"] else "")

    def line(first, it):
        rate = f"{it['gb'] / (1e-3 * it['milliseconds']):,.0f}" if it["milliseconds"] else ""
        return [first, f"{it['milliseconds']:.2f}", f"{it['launches']:,}", f"{it['gb']:.3g}", rate]

    header = ["", "ms", "launches", "GB", "GB/s"]
    print(table(header, [line(name, part) for name, part in row["parts"].items()]))
    print(table(header, [line(f"{x['kind']} {x['instruction']} {x['source'][-60:]}", x) for x in row["longest"]]))


if __name__ == "__main__":
    cli.use_huge_pages()
    sys.exit(main())
