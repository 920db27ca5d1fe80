"""Time and temporary memory of the WKV-7 operator's forms, against its definition.

    python -m benchmarks.wkv7                           # the named shapes, then lengths 1k to 16k, this machine
    taskset -c 0 python -m benchmarks.wkv7              # the same on one core
    python -m benchmarks.wkv7 --shapes issue --lengths  # one shape only

Before a time is reported, outputs, final state and (for the passes with gradients) every gradient are compared with the
definition's on the same inputs, in which nine tokens of ten are one mask token: any error above the tolerance ends the
program. On a CPU the figure is CPU time (the least of the repeats, summed over threads), which other work on the
machine disturbs least; elsewhere wall time. Forms take turns, so that what disturbs one disturbs the others. A pass of
"forward+backward" is the outputs and the gradients of all six inputs. The rows of the longest sequence carry the
exponents of a power law fitted over the lengths; memory there is arguments, outputs and temporaries together.
"""

import argparse
import functools
import pathlib

import jax
import numpy as np

from benchmarks.measure import RESULTS, origin, timed, write
from diffrwkv.config import use_huge_pages
from pallas_kernels.wkv7 import IMPLEMENTATIONS, wkv7
from pallas_kernels.wkv7.shapes import SHAPES, random_inputs

DIRECTIONS = ("forward", "forward+backward")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def build(direction, implementation, reverse, inputs, d_out, chunk_size=None):
    """A compiled pass: (inputs, d_out) -> arrays to compare."""
    op = functools.partial(wkv7, implementation=implementation, reverse=reverse, chunk_size=chunk_size)

    def both(inputs, d_out):
        (out, state), pull = jax.vjp(lambda x: op(**x), inputs)
        return out, state, pull((d_out, state * 0))

    run = both if direction == "forward+backward" else lambda inputs, d_out: op(**inputs)
    return jax.jit(run).lower(inputs, d_out).compile()


def error(actual, expected):
    """The greatest relative error of any array, Euclidean."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        worst = max(worst, float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)))
    return worst


def measure(shape, direction, implementations, args):
    """Rows of one shape and direction."""
    inputs = random_inputs(shape, "masked", dtype=args.dtype)
    del inputs["initial_state"]
    d_out = random_inputs(shape, dtype=args.dtype, seed=1)["v"]
    passes = {name: build(direction, name, args.reverse, inputs, d_out, size) for name, size in implementations.items()}
    reference = passes.get("reference") or build(direction, "reference", args.reverse, inputs, d_out)
    expected = reference(inputs, d_out)
    errors = {name: error(run(inputs, d_out), expected) for name, run in passes.items()}
    del expected
    for name, wrong in errors.items():
        if not wrong < TOLERANCE[args.dtype]:
            raise SystemExit(f"{name} is wrong by {wrong:.1e} at {shape}, {direction}: no time is reported")
    times = {name: [] for name in passes}
    for _ in range(args.rounds):
        for name, run in passes.items():
            times[name].append(timed(lambda run=run: run(inputs, d_out), args.repeats))
    rows = []
    for name, run in passes.items():
        memory = run.memory_analysis()
        time = {key: min(t[key] for t in times[name]) for key in times[name][0]}
        rows.append(
            {
                "implementation": name,
                "direction": direction,
                **dict(zip("BTHK", shape, strict=True)),
                "milliseconds": 1e3 * time["cpu_seconds" if args.on_cpu else "least_wall_seconds"],
                "clock": "CPU time" if args.on_cpu else "wall time",
                "wall_ms": 1e3 * time["least_wall_seconds"],
                "temporary_mb": memory.temp_size_in_bytes / 2**20,
                "whole_mb": (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)
                / 2**20,
                "chunk_size": implementations[name],
                "reverse": args.reverse,
                "dtype": args.dtype,
                "error": errors[name],
                **origin(),
            }
        )
        row = rows[-1]
        print(
            f"{'B {} T {:6} H {} K {}'.format(*shape)}  {direction:16}  {name:12}  {row['milliseconds']:9.1f} ms"
            f"  (wall {row['wall_ms']:9.1f})  {row['temporary_mb']:8.1f} MB  error {row['error']:.0e}",
            flush=True,
        )
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["issue", "peer", "peer_narrow"])
    p.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    p.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    p.add_argument("--chunk_size", type=int, help="of the chunked forms; their own choice if left out")
    p.add_argument("--reverse", action="store_true")
    p.add_argument("--dtype", choices=TOLERANCE, default="float32")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", type=pathlib.Path, help="benchmarks/results/wkv7_cpu.jsonl on a CPU")
    args = p.parse_args()
    args.on_cpu = jax.default_backend() == "cpu"
    out = args.out or RESULTS / f"wkv7_{jax.default_backend()}.jsonl"
    forms = {name: None if name == "reference" else args.chunk_size for name in args.implementations}

    rows = []
    for name in args.shapes:
        for direction in DIRECTIONS:
            rows += measure(SHAPES[name], direction, forms, args)
    forms.pop("reference", None)
    for direction in DIRECTIONS if forms else ():
        series = [measure((1, length, 2, 64), direction, forms, args) for length in args.lengths]
        rows += [row for at_length in series for row in at_length]
        for last in series[-1] if len(series) > 1 else ():
            same = [row for at in series for row in at if row["implementation"] == last["implementation"]]
            for key, values in (("time", "milliseconds"), ("memory", "whole_mb")):
                slope = np.polyfit(np.log(args.lengths), np.log([row[values] for row in same]), 1)[0]
                last[f"{key}_exponent"] = float(slope)
                print(f"{last['implementation']}, {direction}: {key} grows as T^{slope:.2f}")
    write(out, rows)


if __name__ == "__main__":
    use_huge_pages()
    main()
