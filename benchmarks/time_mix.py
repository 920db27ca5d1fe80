"""The pieces around wkv7 as programs of their own, for those that compile them (compile_gpu.py, compile_tpu.py)."""

import itertools
import time

import jax
import jax.numpy as jnp

from benchmarks import hlo
from pallas_kernels.time_mix import LowRank, finish, operands, token_mixes

SIDES = ("previous", "next")
MIXES = 3  # receptance, key, value
RANKS = {"wav": (64, 64, 32), "g": (128,), "m": (32,)}  # of the 170 M model's low-rank maps


def programs(shape, dtype, sharding, implementation=None):
    """{name: (function, its arguments' shapes and dtypes)}: each piece forward and backward, in both directions of a
    layer above the first, but the operands, which are of one direction.

    Args:
      shape: (B, T, H, K).
      sharding: of the arguments.
      implementation: of the pieces.
    """
    batch, length, heads, key = shape
    width = heads * key

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    flat, vector = struct(batch, length, width), struct(width, dtype=jnp.float32)

    def by_head(side):
        return (*(x.reshape(shape) for x in side[:4]), side[4])

    def mixes(x, mu):
        return token_mixes(x, mu, sides=SIDES, implementation=implementation)

    def inputs(k, v, raw, v_first, w0, a0, k_k, k_a, v0):
        vectors = {"w0": w0, "a0": a0, "k_k": k_k, "k_a": k_a}
        options = {"head_dim": key, "blend": (v_first, v0), "implementation": implementation}
        made = operands(k, v, raw, **vectors, **options)
        return tuple(x.reshape(flat.shape) for x in made)  # as a program's own results heads would be padded to lanes

    def ending(sides, vectors, merge):
        return finish(tuple(map(by_head, sides)), vectors, merge=merge, implementation=implementation)

    def maps(ranks):
        starts = (0, *itertools.accumulate(ranks[:-1]))
        ups = tuple(struct(rank, width, dtype=jnp.float32) for rank in ranks)
        return LowRank(struct(batch, length, sum(ranks)), ups, starts)

    raw, gate, merge = (maps(RANKS[name]) for name in ("wav", "g", "m"))
    given = {
        "token_mixes": (mixes, (flat, struct(MIXES, len(SIDES), width, dtype=jnp.float32))),
        "operands": (inputs, (flat, flat, raw, flat) + (vector,) * 5),
        "finish": (ending, ((((flat,) * 4 + (gate,)),) * 2, ((vector,) * 3,) * 2, (merge, vector))),
    }
    found = {}
    for name, (run, arguments) in given.items():
        results = jax.tree.map(lambda x: struct(*x.shape, dtype=x.dtype), jax.eval_shape(run, *arguments))
        found[f"{name} forward"] = run, arguments
        found[f"{name} backward"] = _backward(run), (arguments, results)
    return found


def _backward(run):
    def backward(arguments, cotangents):
        return jax.vjp(run, *arguments)[1](cotangents)

    return backward


def counted(shape, dtype, sharding):
    """Yields a row for each of `programs`: what it moves and launches, as it is chosen and, "plain_…", by XLA alone."""
    plain = programs(shape, dtype, sharding, "fused")
    for name, (run, arguments) in programs(shape, dtype, sharding).items():
        row = {"program": f"time mix, {name}", "dtype": dtype, **dict(zip("BTHK", shape, strict=True))}
        yield row | beside_plain(run, plain[name][0], arguments)


def beside_plain(run, plain, arguments):
    """What a function moves and launches, and what its plain form does."""
    row = {}
    for label, what in (("plain_", plain), ("", run)):  # the last one is what a compiler tells of
        start = time.perf_counter()
        compiled = jax.jit(what).lower(*arguments).compile()
        launched = hlo.kernels(compiled.as_text())
        row |= {
            f"{label}gb_accessed": sum(x.bytes * x.times for x in launched) / 1e9,
            f"{label}kernels": sum(x.times for x in launched if x.bytes >= hlo.SMALL),
            f"{label}temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
            f"{label}compile_seconds": time.perf_counter() - start,
        }
    return row
