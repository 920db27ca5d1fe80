"""Are the fast forms of wkv7 right on this machine? Both directions, forward and every gradient, against the exact.

    python -m benchmarks.correct --shapes 2x200x3x64 8x4096x12x64 --out correct.jsonl      # B x T x H x K

Up to 512 tokens the judge is the token loop in float64 (tests/pallas_kernels/float64_wkv7.py), beyond it the
associative form in float32. Random inputs, and such in which nine tokens of ten are one mask token. A row a form, kind
and shape: the relative error of each output and gradient, the worse of the two sides. Exits 1 if one is too large.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np

from benchmarks import wkv7
from benchmarks.measure import append, origin
from tests.pallas_kernels.float64_wkv7 import NAMES, token_loop

EXACT_UNTIL = 512


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", type=wkv7.parse_shape, metavar="BxTxHxK", required=True)
    p.add_argument("--out", type=pathlib.Path, required=True)
    args = p.parse_args()
    forms = {"gpu": ["pallas_gpu", "associative"], "tpu": ["pallas_tpu", "associative"]}
    bad = []
    for shape in args.shapes:
        for kind in ("random", "masked"):
            given = wkv7.arguments(shape, 2, kind, "bfloat16")
            judge, expected = exact(*given)
            for form in forms.get(jax.default_backend(), ["chunked", "associative"]):
                op = wkv7.operator(form, 2, 1 if form.startswith("pallas") else 2)
                errors = worst(wkv7.by_name(wkv7.build(op, "forward+backward", *given).run()), expected)
                right = max(errors.values()) < wkv7.TOLERANCE["bfloat16"]
                row = {"implementation": form, **dict(zip("BTHK", shape, strict=True)), "kind": kind, "right": right}
                finite = {name: x if np.isfinite(x) else None for name, x in errors.items()}  # JSON has no NaN
                append(args.out, row | {"judged_by": judge, "errors": finite} | origin())
                shown = {name: f"{x:.0e}" for name, x in errors.items()}
                print(shape, kind, form, "right" if right else "WRONG", shown, flush=True)
                bad += [] if right else [form]
    return f"wrong: {', '.join(bad)}" if bad else None


def exact(inputs, cotangents):
    """(who judges, {"out", "state", "dr", ...} of each side)."""
    if inputs[0]["r"].shape[1] > EXACT_UNTIL:
        given = jax.tree.map(lambda x: x.astype("float32"), (inputs, cotangents))
        op = wkv7.operator("associative", 2, 2)
        return "associative", wkv7.by_name(wkv7.build(op, "forward+backward", *given).run())
    sides = []
    for x, (d_out, d_final), reverse in zip(inputs, cotangents, (False, True), strict=True):
        loop = token_loop(x, np.zeros(d_final.shape), d_out, d_final, reverse)
        sides.append({"out": loop["out"], "state": loop["final"]} | {f"d{name}": loop[f"d{name}"] for name in NAMES})
    return "float64", sides


def worst(sides, expected):
    """The relative error of each array, the greater over the sides; NaN stays NaN."""

    def error(x, y):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))

    errors = [{n: error(x[n], y[n]) for n in y} for x, y in zip(sides, expected, strict=True)]
    return {name: float(np.max([side[name] for side in errors])) for name in errors[0]}


if __name__ == "__main__":
    sys.exit(main())
