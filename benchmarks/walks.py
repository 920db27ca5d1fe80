"""The operators with kernels of pallas_kernels/walks.py as programs of their own, for compile_gpu.py."""

import jax
import jax.numpy as jnp

from benchmarks import time_mix
from pallas_kernels.ssd import ssd
from pallas_kernels.wkv7 import wkv7

STATE = 128  # N of ssd


def programs(shape, sharding, plain=False):
    """{name: (shape, function, its arguments' shapes and dtypes)} of one direction, in bfloat16, or in the plain form.

    Args:
      shape: (B, T, H, K) of wkv7. ssd has twice the heads, as models of one width have it.
      sharding: of the arguments.
    """
    batch, length, heads, size = shape

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    wide, group = (batch, length, 2 * heads, size), struct(batch, length, 1, STATE)
    key = struct(*shape)

    def mamba(x, log_a, b, c):
        return ssd(x, log_a, b, c, implementation="associative" if plain else "pallas_gpu")[0]

    def rwkv(*tokens):
        return wkv7(*tokens, mild=True, implementation="associative" if plain else "pallas_triton")[0]

    given = {
        "ssd": (wide, mamba, (struct(*wide), struct(*wide[:3], dtype=jnp.float32), group, group)),
        "wkv7, Triton": (shape, rwkv, (key, struct(*shape, dtype=jnp.float32), key, key, key, key)),
    }
    found = {}
    for name, (own, op, arguments) in given.items():

        def recurrence(*arguments, op=op):
            return op(*arguments)

        def backward(d, *arguments, op=op):
            return jax.vjp(op, *arguments)[1](d)

        out = struct(*own)
        found[f"{name} forward"] = own, recurrence, arguments
        found[f"{name} backward"] = own, backward, (out, *arguments)
    return found


def counted(shape, sharding):
    """Yields a row for each of `programs`, as `time_mix.counted` does; its plain form is "associative"."""
    plain = programs(shape, sharding, plain=True)
    for name, (own, run, arguments) in programs(shape, sharding).items():
        row = {"program": name, "dtype": "bfloat16", **dict(zip("BTHK", own, strict=True))}
        yield row | time_mix.beside_plain(run, plain[name][1], arguments)
