"""What stands around WKV-7 on a GPU: any plan of tiles.py as one Pallas kernel, through Triton.

A program takes one head (or some channels) of some rows of tokens, TILE at a time. Neighbours are read again at the
shifted row, from the cache. Sums over tokens stay in registers until the program's last tile; each program writes its
own, and XLA adds these up.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.time_mix.tiles import estimate, multiplied, unfolded

try:  # JAX says since 0.11 that it will be removed some day
    from jax.experimental.pallas import triton as plt
except ImportError:
    plt = None  # type: ignore[assignment]

TILE = 16  # tokens
TILES = 8  # of a program, one after another
LANES = 64  # channels of a tile, where heads do not matter; with more the shift's backward pass runs out of registers
MOST = 256  # channels of a head
GRID = 65535  # of an axis but the first


def lanes_of(width, head_dim):
    """Channels of a tile: a head, or a power of two that divides the width."""
    return head_dim or min(LANES, width & -width)


def unsupported(shape, head_dim=0, ranks=()):
    """Why arrays [B, T, D], with low-rank maps of these ranks, do not run here, or None."""
    batch, length, width = shape
    lanes = lanes_of(width, head_dim)
    if plt is None:
        return "this JAX has no Triton"
    if lanes < 16 or lanes > MOST or lanes & (lanes - 1):
        return f"it takes heads, or parts of {width} channels, of a power of two from 16 to {MOST}, not {lanes}"
    if any(rank % 16 for rank in ranks):
        return f"it takes low-rank maps whose ranks are multiples of 16, not {ranks}"
    if batch > GRID or -(-length // (TILE * TILES)) > GRID:
        return f"its grid has {GRID} rows, too few for B = {batch} and T = {length}"
    return None


def launch(plan, interpret, tokens, vectors):
    """A plan, as `run` in kernels.py has it.

    Args:
      tokens: arrays [B, T, D] and [B, T, 1], or LowRank.
      vectors: rows [V, D] float32.

    Returns:
      The results, and if there are terms their sums over parts of a sequence, [B, parts, terms, D] float32.
    """
    batch, length, width = tokens[0].shape
    lanes = lanes_of(width, plan.head_dim)
    programs = -(-length // (TILE * TILES))
    shape = jax.ShapeDtypeStruct
    outputs = [shape((batch, length, width), dtype) for dtype in plan.results]
    if plan.terms:
        outputs.append(shape((batch, programs, plan.terms, width), jnp.float32))

    arrays, hiddens, ups, readers = unfolded(tokens)
    inputs = *arrays, *hiddens, *ups

    def kernel(*refs):
        token_refs, refs = refs[: len(arrays)], refs[len(arrays) :]
        hidden_refs, refs = refs[: len(hiddens)], refs[len(hiddens) :]
        up_refs, refs = refs[: len(ups)], refs[len(ups) :]
        vector_refs, refs = refs[: len(vectors)], refs[len(vectors) :]
        result_refs = refs[: len(plan.results)]
        group, program, sequence = (pl.program_id(axis) for axis in range(3))
        channels = pl.ds(group * lanes, lanes)
        mus = [ref[jnp.int32(i), channels][None] for ref in vector_refs for i in range(ref.shape[0])]

        def low_rank(reader):
            """A map's parts of as many columns as are a power of two: (hidden, where of it, part of up)."""
            hidden, up, start, rank = reader
            parts, first = [], 0
            while first < rank:
                size = 1 << (rank - first).bit_length() - 1
                part = up_refs[up][pl.ds(first, size), channels].astype(hiddens[hidden].dtype)
                parts.append((hidden_refs[hidden], pl.ds(start + first, size), part))
                first += size
            return parts

        maps = {i: low_rank(reader) for i, reader in enumerate(readers) if not isinstance(reader, int)}

        def read(i, row):
            row = jnp.clip(row, 0, length - 1)
            if i in maps:
                return sum(multiplied(hidden[sequence, row, where], up) for hidden, where, up in maps[i])
            own = channels if arrays[readers[i]].shape[-1] == width else pl.ds(0, 1)
            return token_refs[readers[i]][sequence, row, own].astype(jnp.float32)

        def tile(i, sums):
            start = (program * TILES + i) * TILE
            row = start + jnp.arange(TILE, dtype=jnp.int32)
            inside = (row < length)[:, None]
            tiles = [read(i, row) for i in range(len(readers))]
            near = []
            for by, of, what in plan.near:
                there = ((row + by >= 0) & (row + by < length))[:, None]
                near.append(jnp.where(there, what([read(i, row + by) for i in of], mus), 0))
            results, terms = plan.body(tiles, near, mus, lambda x: jnp.sum(x, 1, keepdims=True) / lanes)
            keep = jnp.broadcast_to(inside, (TILE, lanes))
            for ref, x in zip(result_refs, results, strict=True):
                plt.store(ref.at[sequence, pl.ds(start, TILE), channels], x.astype(ref.dtype), mask=keep)
            return tuple(x + jnp.where(inside, y, 0) for x, y in zip(sums, terms, strict=True))

        sums = jax.lax.fori_loop(0, TILES, tile, (jnp.zeros((TILE, lanes)),) * plan.terms)
        for i, x in enumerate(sums):
            refs[-1][sequence, program, jnp.int32(i), channels] = jnp.sum(x, 0)

    return pl.pallas_call(
        kernel,
        name=plan.name,
        grid=(width // lanes, programs, batch),
        out_shape=outputs,
        cost_estimate=estimate((*inputs, *vectors), outputs),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(*inputs, *vectors)
