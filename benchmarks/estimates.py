"""How long a GPU would take, where none was at hand: from what its compiler counts and from the few times of an H100.

The kernels of wkv7 are bound by the instructions that a multiprocessor issues, whose rate turns on how many blocks it
holds: the times, over the instructions of the kernel of then, are two rates (`rates`), which tell the other times of
the same run to a fifth (`others`) and so the time of the kernels of now. All else of a layer gets the ceilings that the
run measured: its matrices, and attention, that of products; what else XLA or Pallas launches, that of a copy. That is
kind to attention, which no kernel runs at the rate of a product.
"""

import math
from typing import Any, NamedTuple

Row = dict[str, Any]

CHUNK = 64
MULTIPROCESSORS = 132  # of an H100 and of an H200
RUNS = 3  # of the forward kernel that a split of the time axis took at the commit of the times: two for its maps


class Rates(NamedTuple):
    """What a card does things at.

    Attributes:
      alone, shared: ns for one instruction of a warp, where a multiprocessor holds one block, and for each where it
        holds two.
      tflops, gb_s: TFLOP/s of a product, and GB/s of a copy.
    """

    alone: float
    shared: float
    tflops: float
    gb_s: float


def rates(times: list[Row], counts: list[Row]) -> Rates:
    """From the rows of wkv7_gpu.jsonl and those of compile_gpu.py for the kernels that were timed there."""
    timed = _timed(times, counts)
    (whole,) = (row for row in timed if row["sides"] == 1)
    split = max((row for row in timed if row["sides"] == 2), key=lambda row: row["parts"])
    ceilings = {"tflops": whole["ceiling_tflops"], "gb_s": whole["ceiling_gb_s"]}
    one = Rates(alone=1.0, shared=1.0, **ceilings)
    alone, shared = (row["milliseconds"] / (row["runs"] * launch_ms(row, one)) for row in (whole, split))
    return Rates(alone=alone, shared=shared, **ceilings)


def others(times: list[Row], counts: list[Row]) -> list[tuple[float, float]]:
    """(ms by `rates`, ms measured) of the times that these are not made from."""
    by, timed = rates(times, counts), _timed(times, counts)
    most = max(row["parts"] for row in timed)
    left = [row for row in timed if row["sides"] == 2 and row["parts"] < most]
    return [(row["runs"] * launch_ms(row, by), row["milliseconds"]) for row in left]


def _timed(times: list[Row], counts: list[Row]) -> list[Row]:
    """The times of one call, with what `launch_ms` asks of a launch, and how many of them it took."""
    instructions = {row["directions"]: row["instructions"] for row in counts if row["program"] == "wkv7 forward"}
    rows = [row for row in times if row["implementation"] == "pallas_gpu" and row["direction"] == "forward"]
    return [
        row
        | {"blocks": row["sides"] * row["B"] * row["H"] * row["parts"], "blocks_a_multiprocessor": 2}
        | {"instructions": instructions[row["sides"]], "runs": RUNS if row["parts"] > 1 else 1}
        for row in rows
        if row["calls"] == 1
    ]


def _chunks(row: Row) -> int:
    """That one block of a launch walks through."""
    return math.ceil(row["T"] / CHUNK / row["parts"])


def _busiest(blocks: int) -> int:
    """Blocks that the busiest multiprocessor gets of a launch."""
    return math.ceil(blocks / MULTIPROCESSORS)


def launch_ms(row: Row, by: Rates) -> float:
    """Of a launch of a kernel of wkv7, from its row of compile_gpu.jsonl."""
    blocks = _busiest(row["blocks"])
    shared = min(blocks, row["blocks_a_multiprocessor"]) > 1
    return 1e-6 * row["instructions"] * _chunks(row) * blocks * (by.shared if shared else by.alone)


def layer_ms(row: Row, kernels: list[Row], by: Rates, longer: int = 1) -> float:
    """Of a layer of a pass, from its row of compile_gpu.jsonl, where the sequence is so many times as long.

    Args:
      kernels: the launches of wkv7 in it, over both directions; of another denoiser none. Its mixer then is attention.
    """
    flops, bytes_ = row["tflop_layer"], row["gb_layer"] - row["product_gb_layer"]
    if kernels:
        bytes_ -= row["places"]["wkv7"]["gb_layer"]
    else:
        flops, bytes_ = flops + longer * row["mixer_tflop_layer"], bytes_ - row["call_gb_layer"]
    operator = sum(launch_ms(kernel | {"T": longer * kernel["T"]}, by) for kernel in kernels)
    return operator + longer * (1e3 * flops / by.tflops + 1e3 * bytes_ / by.gb_s)
