"""What stands around WKV-7 on a TPU: any plan of tiles.py as one Pallas kernel.

A step of the grid takes ROWS tokens of 128 channels, which are whole heads, STEP tokens at a time. A sum over a head is
a product with a block-diagonal matrix of ones. Neighbours are a rolled tile whose open row comes from the tile before
or behind, of which the 16 nearest rows are an argument of their own. Sums over tokens stay in VMEM while the tokens of
a sequence pass by.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.time_mix.tiles import estimate, multiplied, unfolded

LANES = 128
EDGE = 16  # rows of a bfloat16 tile
STEP = 64  # tokens that are in registers at a time
ROWS = 512  # tokens of a step of the grid
ROWS_NEAR = 128  # where neighbours are looked at, which is done at once


def unsupported(shape, head_dim=0, ranks=()):
    """Why arrays [B, T, D], with low-rank maps of these ranks, do not run here, or None."""
    del ranks
    if head_dim and LANES % head_dim:
        return f"it takes heads of a size that divides {LANES}, not {head_dim}"
    return None


def launch(plan, interpret, tokens, vectors):
    """A plan: arguments and results as in pallas_gpu.py, with one part."""
    batch, length, width = tokens[0].shape
    lanes = min(LANES, width)
    padded = -(-length // EDGE) * EDGE
    step = min(padded, ROWS_NEAR if plan.near else STEP)
    rows = step if plan.near else min(ROWS, -(-padded // step) * step)
    edges = sorted({(i, by) for by, of, _ in plan.near for i in of})
    parts, last = rows // EDGE, padded // EDGE - 1

    def at_edge(by):
        move = (lambda n: jnp.maximum(n * parts - 1, 0)) if by < 0 else lambda n: jnp.minimum((n + 1) * parts, last)
        return pl.BlockSpec((None, EDGE, lanes), lambda b, g, n: (b, move(n), g))

    whole = pl.BlockSpec((None, rows, lanes), lambda b, g, n: (b, n, g))
    column = pl.BlockSpec((None, rows, 1), lambda b, g, n: (b, n, 0))
    arrays, hiddens, ups, readers = unfolded(tokens)
    in_specs = [whole if x.shape[-1] == width else column for x in arrays]
    in_specs += [pl.BlockSpec((None, rows, x.shape[-1]), lambda b, g, n: (b, n, 0)) for x in hiddens]
    in_specs += [pl.BlockSpec((x.shape[0], lanes), lambda b, g, n: (0, g)) for x in ups]
    in_specs += [at_edge(by) for _, by in edges]
    in_specs += [pl.BlockSpec((x.shape[0], lanes), lambda b, g, n: (0, g)) for x in vectors]
    outputs = [jax.ShapeDtypeStruct((batch, length, width), dtype) for dtype in plan.results]
    out_specs = [whole] * len(outputs)
    if plan.terms:
        outputs.append(jax.ShapeDtypeStruct((batch, 1, plan.terms, width), jnp.float32))
        out_specs.append(pl.BlockSpec((None, None, plan.terms, lanes), lambda b, g, n: (b, 0, 0, g)))

    def kernel(*refs):
        token_refs, refs = refs[: len(arrays)], refs[len(arrays) :]
        hidden_refs, refs = refs[: len(hiddens)], refs[len(hiddens) :]
        up_refs, refs = refs[: len(ups)], refs[len(ups) :]
        edge_refs, refs = dict(zip(edges, refs, strict=False)), refs[len(edges) :]
        vector_refs, refs = refs[: len(vectors)], refs[len(vectors) :]
        result_refs, sum_refs = refs[: len(plan.results)], refs[len(plan.results) :]
        first = pl.program_id(2) * rows
        iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
        open_lanes = iota((1, lanes), 1) < width - pl.program_id(1) * lanes if width % lanes else None

        def read(ref, some):
            x = ref[some].astype(jnp.float32)
            if open_lanes is None or x.shape[-1] != lanes:
                return x
            return jnp.where(open_lanes, x, 0)  # beyond the width stands anything, and products spread it

        mus = [read(ref, pl.ds(i, 1)) for ref in vector_refs for i in range(ref.shape[0])]

        def tile(reader, place):
            if isinstance(reader, int):
                return read(token_refs[reader], place)
            hidden, up, start, rank = reader
            return multiplied(hidden_refs[hidden][place, start : start + rank], read(up_refs[up], ...))

        def head_mean(x):
            """Of float32, by three products of bfloat16, which are all of it."""
            shift = plan.head_dim.bit_length() - 1  # a divisor of 128 is a power of two
            ones = (iota((lanes, lanes), 0) >> shift == iota((lanes, lanes), 1) >> shift).astype(jnp.bfloat16)
            total = 0
            for _ in range(3):
                piece = x.astype(jnp.bfloat16)
                total = total + jnp.dot(piece, ones, preferred_element_type=jnp.float32)
                x = x - piece.astype(jnp.float32)
            return total / plan.head_dim

        def neighbour(by, of, what, tiles, row):
            here = what([tiles[i] for i in of], mus)
            edge = what([read(edge_refs[i, by], ...) for i in of], mus)
            edge = edge[EDGE - 1 :] if by < 0 else edge[:1]
            local = iota((step, 1), 0)
            rolled = pltpu.roll(here, 1 if by < 0 else step - 1, 0)
            rolled = jnp.where(local == (0 if by < 0 else step - 1), edge, rolled)
            return jnp.where((row + by >= 0) & (row + by < length), rolled, 0)

        def some(i, sums):
            place = pl.ds(i * step, step)
            row = first + i * step + iota((step, 1), 0)
            tiles = [tile(reader, place) for reader in readers]
            near = [neighbour(*spec, tiles, row) for spec in plan.near]
            results, terms = plan.body(tiles, near, mus, head_mean)
            for ref, x in zip(result_refs, results, strict=True):
                ref[place] = x.astype(ref.dtype)
            each = (jnp.sum(jnp.where(row < length, x, 0), 0, keepdims=True) for x in terms)
            return tuple(x + y for x, y in zip(sums, each, strict=True))

        zeros = (jnp.zeros((1, lanes)),) * plan.terms
        sums = some(0, zeros) if rows == step else jax.lax.fori_loop(0, rows // step, some, zeros)
        for ref in sum_refs:

            @pl.when(pl.program_id(2) == 0)
            def _(ref=ref):
                ref[...] = jnp.zeros(ref.shape)

            for i, x in enumerate(sums):
                ref[pl.ds(i, 1)] += x

    return pl.pallas_call(
        kernel,
        name=plan.name,
        grid=(batch, pl.cdiv(width, lanes), pl.cdiv(length, rows)),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=outputs,
        cost_estimate=estimate((*arrays, *hiddens, *ups, *vectors), outputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(*arrays, *hiddens, *ups, *(arrays[i] for i, _ in edges), *vectors)
