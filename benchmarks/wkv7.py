"""Time and temporary memory of the WKV-7 operator's forms, against its definition and against other people's kernels.

    python -m benchmarks.wkv7                           # the named shapes, then lengths 1k to 16k, this machine
    taskset -c 0 python -m benchmarks.wkv7              # the same on one core
    python -m benchmarks.wkv7 --shapes issue --lengths  # one shape only
    python -m benchmarks.wkv7 --shapes 8x4096x12x64 --lengths --dtype bfloat16      # B x T x H x K
    python -m benchmarks.wkv7 --shapes --lengths 32768 65536 131072 --heads 12 --dtype bfloat16

Correct first. All contenders get the same inputs, in which nine tokens of ten are one mask token (`--kind`), and random
cotangents of the outputs and of the final state. Before a time is taken, outputs, final state and (for the passes with
gradients) the gradients of all six inputs are compared with the definition's in float32. Past `--definition_until`
tokens the associative form in float32 stands in for it, after it was compared with the definition at that many. What
errs by more than the tolerance, or fails, says so and gets no time; the others go on, and the program exits 1 if it was
one of ours. What cannot run here is left out, with its reason.

A pass is "forward" or "forward+backward", over one side or two: `sides` 2 is a forward and a reverse scan of different
inputs, by two calls or, with `calls` 1, by one of `wkv7_bidirectional`, which the kernels answer with one launch. The
peers (benchmarks/peers.py, tried on a GPU or when named) are causal, so they run on one side. `parts` is the number of
segments in which a form takes the time axis (pallas_kernels/wkv7/split.py): `--parts 1 8` measures it in one piece and
in 8, besides what the kernels for GPUs choose for themselves, which their rows say.

Time. Contenders take turns, so that what disturbs one disturbs the others. On a CPU the figure is CPU time (the least
of the repeats, summed over threads), which other work on the machine disturbs least. Elsewhere it is wall time per call
of a burst of calls, the median over bursts, after a warm-up; `least_ms` and `most_ms` are the spread. Inputs that fit
into the cache are measured in the cache: shapes of 8x4096x12x64 and up do not fit.

Useful work, the same for every contender, from the shape alone: per token, head and side

    forward            18 C K + 8 K² operations with C = 16, the smallest chunk in use (recomputing is not counted)
    forward+backward   3 times as many: each product has two in the backward pass
    forward            each input read once and the output written once, log_w in float32
    forward+backward   and: inputs and cotangent read again, gradients written, one float32 state in 64 tokens written
                       and read

over the time gives `tflops` and `gb_s`; on an accelerator `floor_ms` is the larger of the two over the ceilings, which
are measured first. The rows of the longest sequence of `--lengths` carry the exponents of a power law fitted over the
lengths; memory there is arguments, outputs and temporaries together.
"""

import argparse
import concurrent.futures
import functools
import pathlib
import statistics
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accelerators, peers, turns
from benchmarks.measure import RESULTS, keeper, origin
from diffrwkv import timing
from pallas_kernels.wkv7 import IMPLEMENTATIONS, pallas_triton, wkv7, wkv7_bidirectional
from pallas_kernels.wkv7.pallas_gpu import wkv7_pallas_gpu
from pallas_kernels.wkv7.shapes import KINDS, SHAPES, drawn_inputs
from pallas_kernels.wkv7.split import parts_of, split

DIRECTIONS = ("forward", "forward+backward")
NAMES = ("r", "log_w", "k", "v", "a", "b")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
CHUNK = 16  # of the useful work
STATES_EVERY = 64
ONE_AT_A_TIME = threading.Lock()
EXACT = ("associative", "reference")  # what judges, and what judges that


def useful(shape, direction, sides, itemsize):
    """(operations, bytes) of a pass: the module's formula."""
    batch, length, heads, size = shape
    inputs = 5 * itemsize + 4
    operations, moved = 18 * CHUNK * size + 8 * size**2, (inputs + itemsize) * size
    if direction == "forward+backward":
        operations *= 3
        moved += (2 * inputs + itemsize) * size + 2 * 4 * size**2 // STATES_EVERY
    return operations * sides * batch * length * heads, moved * sides * batch * length * heads


def operator(name, sides=1, calls=1, reverse=False, chunk_size=None, parts=None):
    """An implementation of ours as a function of the inputs of each side, giving (out, state) of each.

    parts: segments of the time axis, in one call; None is the implementation's own choice.
    """
    options = {"implementation": name, "chunk_size": chunk_size, "mild": True}  # as the model calls it
    op = functools.partial(wkv7, **options)
    reverses = (reverse,) if sides == 1 else (False, True)

    def in_parts(inputs):
        ways = tuple(tuple(x[name] for name in NAMES) for x in inputs)
        states = tuple(jnp.zeros((r.shape[0], *r.shape[2:], v.shape[-1])) for r, _, _, v, _, _ in ways)
        if name == "pallas_gpu":  # which knows parts itself
            return wkv7_pallas_gpu(ways, states, reverses, parts=parts)
        return split(whole, ways, states, reverses, parts)

    def whole(ways, states):
        each = zip(ways, states, reverses, strict=True)
        return tuple(op(*tokens, initial_state=state, reverse=way) for tokens, state, way in each)

    if parts is not None:
        return in_parts

    def together(inputs):
        tokens = ([x[name] for name in NAMES] for x in inputs)
        return tuple(wkv7_bidirectional(*map(tuple, tokens), **options))

    def apart(inputs):
        return tuple(op(**x, reverse=way) for x, way in zip(inputs, reverses, strict=True))

    return together if calls < sides else apart


def compile_pass(op, direction, inputs, cotangents, tuned=True):
    """A compiled pass of a JAX operator: (inputs, cotangents) -> (results, gradients).

    On a GPU XLA tries many programs for each product of one that is `tuned`, which can take minutes.
    """

    def both(inputs, cotangents):
        results, pull = jax.vjp(op, inputs)
        return results, pull(cotangents)[0]

    run = both if direction == "forward+backward" else lambda inputs, cotangents: (op(inputs), ())
    options = {"xla_gpu_autotune_level": 0} if not tuned and jax.default_backend() == "gpu" else None
    return jax.jit(run).lower(inputs, cotangents).compile(options)


def build(op, direction, inputs, cotangents):
    """A pass of a JAX operator of these arguments."""
    compiled = compile_pass(op, direction, inputs, cotangents)
    return peers.Pass(
        lambda: compiled(inputs, cotangents), jax.block_until_ready, lambda result: result, compiled.memory_analysis()
    )


@functools.lru_cache(maxsize=2)
def one_side(shape, side, kind, dtype):
    """(inputs, cotangents of out and of the state)."""
    inputs = drawn_inputs(shape, kind, dtype=dtype, seed=side)
    state = inputs.pop("initial_state").shape
    key_out, key_state = jax.random.split(jax.random.key(side))
    return inputs, (jax.random.normal(key_out, shape, dtype), 0.3 * jax.random.normal(key_state, state))


def arguments(shape, sides, kind, dtype):
    """((inputs of each side), (cotangents of each side))."""
    return tuple(zip(*(one_side(shape, side, kind, dtype) for side in range(sides)), strict=True))


@jax.jit
def relative(x, y):
    """The relative error, Euclidean."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-30)


def by_name(results):
    """[{"out", "state", "dr", ...} of each side] of what a pass gives."""
    outputs, gradients = results
    return [
        {"out": out, "state": state} | {f"d{name}": x for name, x in of_side.items()}
        for (out, state), of_side in zip(outputs, gradients or ({},) * len(outputs), strict=True)
    ]


def compare(actual, expected):
    """{"out", "state", "dr", ...: the greatest relative error over the sides}; NaN stays NaN."""
    sides = zip(by_name(actual), by_name(expected), strict=True)
    errors = [{name: float(relative(x, wanted[name])) for name, x in found.items()} for found, wanted in sides]
    return {name: float(np.max([side[name] for side in errors])) for name in errors[0]}


def judge(shape, direction, inputs, cotangents, args):
    """(what judges the others, what it gives), in float32 throughout, two sequences at a time."""
    sides, name = len(inputs), "reference"
    if shape[1] > args.definition_until:
        check_associative(args.definition_until, *shape[2:])
        name = "associative"
    batch = shape[0]
    count = 2 if batch % 2 == 0 else batch

    def some(first):
        return jax.tree.map(lambda x: x[first : first + count].astype(jnp.float32), (inputs, cotangents))

    run = compile_pass(operator(name, sides, sides, args.reverse), direction, *some(0), tuned=False)
    results = [run(*some(first)) for first in range(0, batch, count)]
    return name, jax.tree.map(lambda *x: jnp.concatenate(x), *results)


@functools.cache
def check_associative(length, heads, size):
    """Ends the program if the associative form differs from the definition, on masked inputs in float32."""
    given = arguments((1, length, heads, size), 2, "masked", "float32")
    both = [compile_pass(operator(name, 2, 2), DIRECTIONS[-1], *given, tuned=False) for name in EXACT]
    wrong = max(compare(*(run(*given) for run in both)).values())
    print(f"the associative form, which judges longer sequences, errs by {wrong:.0e} at T {length:,}", flush=True)
    if not wrong < TOLERANCE["float32"]:
        raise SystemExit("that is too much, and the definition is too slow there: nothing is reported")


def contenders(shape, direction, sides, args):
    """(name, calls, parts, what makes its pass of inputs and cotangents) of each that is asked for.

    parts: None is the contender's own choice.
    """
    for name in args.implementations:
        definition = name == "reference"
        if definition and shape[1] > args.definition_until:
            continue
        for calls in range(sides, 0, -1) if name.startswith("pallas") else (sides,):  # others have no common launch
            op = operator(name, sides, calls, args.reverse, None if definition else args.chunk_size)
            yield name, calls, None, functools.partial(build, op, direction)
        for parts in () if definition else args.parts:
            op = operator(name, sides, 1, args.reverse, args.chunk_size, parts)
            yield name, 1, parts, functools.partial(build, op, direction)
    if sides == 1 and not args.reverse:
        if "jla" in args.peers:
            yield "jla", 1, None, functools.partial(build, lambda inputs: (peers.jla(**inputs[0]),), direction)
        for name, options in (("fla", peers.FLA_LAYER), ("fla_exact", {})):
            if name in args.peers:
                yield name, 1, None, functools.partial(fla, direction, options)


def fla(direction, options, inputs, cotangents):
    one = peers.fla_pass(direction, inputs[0], cotangents[0], options)
    with ONE_AT_A_TIME:  # two threads in one of Triton's tuners break it
        one.wait(one.run())  # Triton compiles here, and chooses among what it compiled
    return one


def checked(make, expected, tolerance):
    """(the pass that is made, or None; the row's fields on its errors). Raises ValueError where it cannot run."""
    try:
        one = make()
        errors = compare(one.arrays(one.run()), expected)
    except ValueError:
        raise
    except Exception as problem:  # of a compiler or a device: one contender's failure is not the others'
        return None, {"failed": f"{type(problem).__name__}: {str(problem)[:300]}", "error": None}
    wrong = {name: f"{x:.1e}" for name, x in errors.items() if not x < tolerance}
    found = {"error": float(np.max([*errors.values()])), "errors": errors}
    if wrong:  # JSON has no NaN
        found |= {
            "failed": f"wrong: {wrong}",
            "errors": {name: x if np.isfinite(x) else None for name, x in errors.items()},
        }
        found["error"] = found["error"] if np.isfinite(found["error"]) else None
    return None if wrong else one, found


def clock(passes, args):
    """The fields on time of each pass, all taken in turns."""
    if args.on_cpu:
        times = [[] for _ in passes]
        for _ in range(args.rounds):
            for one, own in zip(passes, times, strict=True):
                own.append(timing.latency(one.run, repeats=args.repeats))
        least = [{key: min(t[key] for t in own) for key in ("cpu_ms", "least_ms")} for own in times]
        return [{"milliseconds": t["cpu_ms"], "clock": "CPU time", "wall_ms": t["least_ms"]} for t in least]
    calls = [timing.calls_for(one.run, one.wait) for one in passes]
    times = [[] for _ in passes]
    for _ in range(args.rounds * args.repeats):
        for one, n, own in zip(passes, calls, times, strict=True):
            if len(own) >= 3 and n * sum(own) > 3000:  # three seconds say enough of a slow one
                continue
            own.append(1e3 * timing.burst(one.run, one.wait, n))
    return [
        {
            "milliseconds": statistics.median(own),
            "clock": "wall time",
            "wall_ms": statistics.median(own),
            "least_ms": min(own),
            "most_ms": max(own),
            "calls_per_burst": n,
        }
        for own, n in zip(times, calls, strict=True)
    ]


def achieved(row, shape, direction, sides, args):
    """The row's fields on useful work: what the wall time makes of it, and the floor under the ceilings."""
    operations, moved = useful(shape, direction, sides, jnp.dtype(args.dtype).itemsize)
    seconds = 1e-3 * row["wall_ms"]
    fields = {"tflops": 1e-12 * operations / seconds, "gb_s": 1e-9 * moved / seconds}
    if args.ceilings:
        ceilings = args.ceilings()
        fields["floor_ms"] = max(1e-9 * operations / ceilings["tflops"], 1e-6 * moved / ceilings["gb_s"])
        fields |= {f"ceiling_{name}": value for name, value in ceilings.items()}
    return fields


def measure(shape, direction, sides, args):
    """Rows of one shape, pass and number of sides."""
    inputs, cotangents = arguments(shape, sides, args.kind, args.dtype)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # compilers work outside of Python's lock
        tried = [
            (name, calls, parts, pool.submit(make, inputs, cotangents))
            for name, calls, parts, make in contenders(shape, direction, sides, args)
        ]
        judged = judge(shape, direction, inputs, cotangents, args)
    with turns.alone():
        rows = judge_and_time(tried, *judged, shape, direction, sides, args)
    for row in rows:
        show(row)
    return rows


def judge_and_time(tried, judged_by, expected, shape, direction, sides, args):
    """The rows of contenders that are compiled."""
    rows, passes = [], []
    for name, calls, forced, made in tried:
        try:
            one, found = checked(made.result, expected, args.tolerance)
        except ValueError as reason:
            print(f"{name}, {direction}, {sides} in {calls}, B T H K {shape}: left out, {reason}", flush=True)
            continue
        rows.append(
            {
                "implementation": name,
                "direction": direction,
                **dict(zip("BTHK", shape, strict=True)),
                "sides": sides,
                "calls": calls,
                "parts": segments(name, forced, sides // calls, shape),
                "parts_forced": forced is not None,
                "milliseconds": None,
                **memory_fields(one and one.memory),
                "chunk_size": args.chunk_size if name in IMPLEMENTATIONS and name != "reference" else None,
                "reverse": args.reverse,
                "kind": args.kind,
                "dtype": args.dtype,
                "judged_by": judged_by,
                **found,
                **({"version": args.peers[name]} if name in args.peers else {}),
                **origin(),
            }
        )
        passes.append(one)
    del expected
    good = [(row, one) for row, one in zip(rows, passes, strict=True) if one]
    for (row, _), time in zip(good, clock([one for _, one in good], args), strict=True):
        row |= time
        row |= achieved(row, shape, direction, sides, args)
    return rows


def segments(name, forced, directions, shape):
    """Into how many segments of the time axis a form goes, in one launch of so many directions."""
    if name == "pallas_triton":
        return forced or pallas_triton.parts_of(shape)
    return forced or (parts_of(directions, shape) if name == "pallas_gpu" else 1)


def memory_fields(memory):
    """Temporaries, and arguments, outputs and temporaries together, in MB; None where XLA does not run it."""
    if memory is None:
        return {"temporary_mb": None, "whole_mb": None}
    whole = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {"temporary_mb": memory.temp_size_in_bytes / 2**20, "whole_mb": whole / 2**20}


def show(row):
    name = row["implementation"] + (f", {row['sides']} in {row['calls']}" if row["sides"] > 1 else "")
    name += f", {row['parts']} parts" if row["parts"] > 1 else ""
    text = f"B {row['B']} T {row['T']:6} H {row['H']} K {row['K']}  {row['direction']:16}  {name:26}"
    if row.get("failed"):
        print(f"{text}  NO TIME, {row['failed']}", flush=True)
        return
    text += f"  {row['milliseconds']:10.3f} ms  error {row['error']:.0e}"
    text += f"  {row['tflops']:7.2f} TFLOP/s  {row['gb_s']:6.1f} GB/s"
    if "floor_ms" in row:
        text += f"  {row['milliseconds'] / row['floor_ms']:5.1f} x the floor"
    if row["temporary_mb"] is not None:
        text += f"  {row['temporary_mb']:8.1f} MB"
    print(text, flush=True)


def compared(rows):
    """Lines that set ours beside the peers, and one launch beside two, wherever one run has both."""
    lines = []
    groups = {}
    for row in rows:
        if row["milliseconds"]:
            groups.setdefault(tuple(row[key] for key in ("B", "T", "H", "K", "direction", "sides")), []).append(row)
    for key, group in groups.items():
        at = "B {} T {} H {} K {}, {}".format(*key)
        ours = {}
        for r in group:
            if r["implementation"] in IMPLEMENTATIONS:
                ours.setdefault((r["implementation"], r["calls"]), {})[r.get("parts", 1)] = r["milliseconds"]
        for (name, calls), times in ours.items():
            for parts in times.keys() - {1} if 1 in times else ():
                gain = times[1] / times[parts]
                lines.append(f"{at} in {calls}: {name}, {parts} parts of the time axis {gain:.2f} x as fast as one")
        ours = {key: min(times.values()) for key, times in ours.items()}
        others = {r["implementation"]: r["milliseconds"] for r in group if r["implementation"] not in IMPLEMENTATIONS}
        if ours and others:
            (name, _), peer = min(ours, key=ours.get), min(others, key=others.get)
            lines.append(
                f"{at}: {name} is {others[peer] / min(ours.values()):.2f} x as fast as {peer}, the faster peer"
            )
        for name, calls in ours:
            if calls == 1 and (name, 2) in ours:
                lines.append(f"{at}: {name}, both sides: one call {ours[name, 2] / ours[name, 1]:.2f} x as fast as two")
    return lines


def parse_shape(text):
    """A name of SHAPES, or BxTxHxK."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        batch, length, heads, size = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SHAPES)}, nor BxTxHxK") from None
    return batch, length, heads, size


def power_law(series, lengths):
    """Adds the exponents to the rows of the last length."""

    def contender(row):
        return row["implementation"], row["calls"], row["parts_forced"] and row["parts"]

    for last in series[-1]:
        same = [row for at in series for row in at if contender(row) == contender(last)]
        for key, values in (("time", "milliseconds"), ("memory", "whole_mb")):
            if len(same) == len(lengths) and all(row[values] for row in same):
                slope = np.polyfit(np.log(lengths), np.log([row[values] for row in same]), 1)[0]
                last[f"{key}_exponent"] = float(slope)
                print(f"{last['implementation']}, {last['direction']}: {key} grows as T^{slope:.2f}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(sorted(SHAPES))
    p.add_argument("--shapes", nargs="*", type=parse_shape, metavar="SHAPE", help=f"BxTxHxK, or one of {names}")
    p.add_argument("--implementations", nargs="*", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    p.add_argument("--peers", nargs="*", choices=peers.PEERS, help="all of them on a GPU, else none, if left out")
    p.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384], help="of one sequence")
    p.add_argument("--heads", type=int, default=2, help="of 64, at --lengths")
    p.add_argument("--sides", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    p.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    p.add_argument("--kind", choices=KINDS, default="masked", help="of inputs")
    p.add_argument("--chunk_size", type=int, help="of the chunked forms; their own choice if left out")
    p.add_argument("--parts", type=int, nargs="*", default=[], help="also in so many segments of the time axis")
    p.add_argument("--reverse", action="store_true", help="the one side is the reverse one")
    p.add_argument("--dtype", choices=TOLERANCE, default="float32")
    p.add_argument("--tolerance", type=float, help=f"relative error that is allowed; by dtype: {TOLERANCE}")
    p.add_argument("--definition_until", type=int, default=16384, help="tokens up to which the definition runs")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", type=pathlib.Path, help="benchmarks/results/wkv7_cpu.jsonl on a CPU")
    p.add_argument("--append", action="store_true", help="keep the rows that OUT has")
    args = p.parse_args()
    args.on_cpu = jax.default_backend() == "cpu"
    if args.shapes is None:
        args.shapes = [SHAPES[name] for name in ("issue", "peer", "peer_narrow")]
    if args.peers is None:
        args.peers = list(peers.PEERS) if jax.default_backend() == "gpu" else []
    args.peers = peers.available(args.peers)
    if not args.implementations and not args.peers:
        print("none of them is here: nothing is measured")
        return None
    args.tolerance = args.tolerance or TOLERANCE[args.dtype]
    args.ceilings = None if args.on_cpu else accelerators.ceilings  # measured when the first time is
    keep = keeper(args.out or RESULTS / f"wkv7_{jax.default_backend()}.jsonl", args.append)

    turns.compiling()
    rows = []
    for shape in args.shapes:
        for sides in args.sides:
            for direction in args.directions:
                rows += (new := measure(shape, direction, sides, args))
                keep(new)
    args.implementations = [name for name in args.implementations if name != "reference"]  # takes too long there
    for sides in args.sides:
        for direction in args.directions:
            series = []
            for length in args.lengths:
                series.append(measure((1, length, args.heads, 64), direction, sides, args))
                if len(series) == len(args.lengths) > 1:
                    power_law(series, args.lengths)
                rows += series[-1]
                keep(series[-1])
    if args.ceilings and rows:
        print(jax.devices()[0].device_kind, accelerators.describe(args.ceilings()))
    print("\n".join(compared(rows)))
    failed = sorted({row["implementation"] for row in rows if row.get("failed")} & set(IMPLEMENTATIONS))
    return f"no time for {', '.join(failed)}: wrong or broken" if failed else None


if __name__ == "__main__":
    from diffrwkv.cli import use_huge_pages

    use_huge_pages()
    sys.exit(main())
