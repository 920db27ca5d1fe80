"""Are the fast forms of wkv7, ssd and time_mix right on this machine? Forward and every gradient, against the exact.

    python -m benchmarks.correct --shapes 2x200x3x64 8x4096x12x64 --out correct.jsonl      # B x T x H x K
    python -m benchmarks.correct --shapes 1x8192x2x64/4 --out correct.jsonl                # the time axis in 4 segments

Up to 2,048 tokens the judge is the token loop in float64 (tests/pallas_kernels/float64_wkv7.py), beyond it the
associative form in float32. Random inputs, and such in which nine tokens of ten are one mask token. A row a form, kind
and shape: the relative error of each output and gradient, the worse of the two sides. Of the first shape also, in the
form that is chosen here, a row a kind for ssd, with heads of K and states twice as wide, and for wkv7 as GPUs that are
not Hopper's have it, against their token loops in float64; and a row for each piece of time_mix, forward and backward,
against its definition in float32. Exits 1 if an error is too large.
"""

import argparse
import concurrent.futures
import functools
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import time_mix, wkv7
from benchmarks.measure import append, origin
from pallas_kernels.ssd import pallas_gpu as ssd_kernel
from pallas_kernels.ssd import shapes as ssd_shapes
from pallas_kernels.ssd import ssd
from pallas_kernels.wkv7 import pallas_triton
from pallas_kernels.wkv7 import shapes as wkv7_shapes
from pallas_kernels.wkv7 import wkv7 as operator
from tests.pallas_kernels import float64_ssd
from tests.pallas_kernels.float64_wkv7 import NAMES, token_loop

EXACT_UNTIL = 2048
KINDS = ("random", "masked")
OPERATORS = ("wkv7", "ssd", "triton", "time_mix")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", type=parse_shape, metavar="BxTxHxK[/P]", required=True)
    p.add_argument("--only", nargs="+", choices=OPERATORS, default=OPERATORS)
    p.add_argument("--out", type=pathlib.Path, required=True)
    args = p.parse_args()
    by_backend = {"gpu": ["pallas_gpu"], "tpu": ["pallas_tpu"]}
    forms = by_backend.get(jax.default_backend(), ["chunked", "associative"])
    bad = []
    with concurrent.futures.ThreadPoolExecutor() as pool:  # compilers work outside of Python's lock
        started = [
            (
                *case,
                None if case[0][1] <= EXACT_UNTIL else pool.submit(compiled, "associative", case[0], None, "float32"),
                # The associative form, which judges, has segments of its own.
                {form: pool.submit(compiled, form, *case) for form in (forms if case[1] is None else forms[:1])},
            )
            for case in (args.shapes if "wkv7" in args.only else ())
        ]
        for shape, parts, judge, passes in started:
            for kind in KINDS:
                given = wkv7.arguments(shape, 2, kind, "bfloat16")
                judged_by, expected = exact(judge and judge.result(), *given)
                for form, made in passes.items():
                    errors = worst(wkv7.by_name(made.result()(*given)), expected)
                    taken = wkv7.segments(form, parts, 2, shape)
                    row = verdict(form, shape, taken, kind, judged_by, errors)
                    append(args.out, row | origin())
                    shown = {name: f"{x:.0e}" for name, x in errors.items()}
                    in_parts = f"in {taken} parts" if taken > 1 else ""
                    print(shape, kind, form, in_parts, "right" if row["right"] else "WRONG", shown, flush=True)
                    bad += [] if row["right"] else [form]
    others = {"ssd": mamba, "triton": triton, "time_mix": around}
    for row in itertools.chain(*(others[name](args.shapes[0][0]) for name in args.only if name in others)):
        append(args.out, row | origin())
        print(row["implementation"], "right" if row["right"] else "WRONG", row["errors"], flush=True)
        bad += [] if row["right"] else [row["implementation"]]
    return f"wrong: {', '.join(bad)}" if bad else None


def verdict(name, shape, parts, kind, judged_by, errors):
    """A row: right is what has no error that is too large, or is no number."""
    right = all(error < wkv7.TOLERANCE["bfloat16"] for error in errors.values())
    finite = {name: x if np.isfinite(x) else None for name, x in errors.items()}  # JSON has no NaN
    row = {"implementation": name, **dict(zip("BTHK", shape, strict=True)), "parts": parts}
    return row | {"kind": kind, "right": right, "judged_by": judged_by, "errors": finite}


def mamba(shape):
    """`by_loop` of ssd, with one group and states twice as wide as a head."""
    *tokens, size = shape
    parts = ssd_kernel.parts_of(shape) if jax.default_backend() == "gpu" else 1
    draw = functools.partial(ssd_shapes.random_inputs, (*tokens, size, 1, 2 * size), dtype="bfloat16")
    return by_loop("ssd", shape, parts, draw, "x", ssd, float64_ssd.token_loop)


def triton(shape):
    """`by_loop` of wkv7 as GPUs that are not Hopper's have it; on a CPU, in the form that is chosen there."""
    form = "pallas_triton" if jax.default_backend() == "gpu" else None
    parts = pallas_triton.parts_of(shape) if form else 1
    draw = functools.partial(wkv7_shapes.random_inputs, shape, dtype="bfloat16")
    op = functools.partial(operator, mild=True, implementation=form)
    return by_loop(form or "wkv7", shape, parts, draw, "v", op, token_loop)


def by_loop(name, shape, parts, draw, like, op, loop):
    """Yields a row a kind for an operator, both ways; errors by name, the greater of the two ways.

    Args:
      draw: (kind, seed=) -> inputs and initial_state by name; the output is as that named `like`.
      loop: the definition in float64, as in the tests.
    """
    for kind in KINDS:
        worse = {}
        for reverse in (False, True):
            given, d_out = draw(kind), draw(KINDS[0], seed=1)[like]
            state = given.pop("initial_state")

            @jax.jit
            def everything(given, state, d_out, reverse=reverse):
                def run(given, state):
                    return op(**given, initial_state=state, reverse=reverse)

                (out, final), pull = jax.vjp(run, given, state)
                gradients, d_state = pull((d_out, state))
                return {"out": out, "y": out, "final": final, "state": d_state}, gradients

            arrays, gradients = everything(given, state, d_out)
            arrays |= {f"d{name}": x for name, x in gradients.items()}
            for array, x in loop(given, state, d_out, state, reverse).items():
                error = float(wkv7.relative(arrays[array], jnp.asarray(x, jnp.float32)))
                worse[array] = float(np.maximum(error, worse.get(array, 0)))  # NaN stays NaN
        yield verdict(name, shape, parts, kind, "float64", worse)


def around(shape):
    """Yields a row for each piece of time_mix, random inputs in bfloat16; errors by the places of the results."""
    exact = time_mix.programs(shape, "float32", None, "reference")
    for name, (run, arguments) in time_mix.programs(shape, "bfloat16", None).items():
        leaves, tree = jax.tree.flatten(arguments)
        keys = jax.random.split(jax.random.key(len(name)), len(leaves))
        given = [jax.random.normal(key, x.shape).astype(x.dtype) for key, x in zip(keys, leaves, strict=True)]
        found = jax.tree.leaves(jax.jit(run)(*tree.unflatten(given)))
        right = jax.tree.leaves(jax.jit(exact[name][0])(*tree.unflatten([x.astype("float32") for x in given])))
        errors = {str(i): float(wkv7.relative(x, y)) for i, (x, y) in enumerate(zip(found, right, strict=True))}
        yield verdict(f"time_mix {name}", shape, 1, "random", "reference", errors)


def parse_shape(text):
    """(the shape, the number of segments or None) of BxTxHxK or BxTxHxK/P."""
    shape, _, parts = text.partition("/")
    return wkv7.parse_shape(shape), int(parts) if parts else None


def compiled(form, shape, parts, dtype="bfloat16"):
    """(inputs, cotangents) of both sides -> (results, gradients), by a compiled program."""
    op = wkv7.operator(form, 2, 1 if form.startswith("pallas") else 2, parts=parts)
    inputs, cotangents = jax.eval_shape(lambda: wkv7.one_side.__wrapped__(shape, 0, KINDS[0], dtype))
    return wkv7.compile_pass(op, "forward+backward", (inputs,) * 2, (cotangents,) * 2)


def exact(judge, inputs, cotangents):
    """(who judges, {"out", "state", "dr", ...} of each side); judge: a compiled pass in float32, or None."""
    if judge:
        return "associative", wkv7.by_name(judge(*jax.tree.map(lambda x: x.astype("float32"), (inputs, cotangents))))
    sides = []
    for x, (d_out, d_final), reverse in zip(inputs, cotangents, (False, True), strict=True):
        loop = token_loop(x, np.zeros(d_final.shape), d_out, d_final, reverse)
        sides.append({"out": loop["out"], "state": loop["final"]} | {f"d{name}": loop[f"d{name}"] for name in NAMES})
    return "float64", sides


def worst(sides, expected):
    """The relative error of each array, the greater over the sides; NaN stays NaN."""

    def error(x, y):
        return float(wkv7.relative(x, jnp.asarray(y, jnp.float32)))

    errors = [{n: error(x[n], y[n]) for n in y} for x, y in zip(sides, expected, strict=True)]
    return {name: float(np.max([side[name] for side in errors])) for name in errors[0]}


if __name__ == "__main__":
    sys.exit(main())
