"""ssd as programs of its own, forward and backward, for compile_gpu.py."""

import jax
import jax.numpy as jnp

from benchmarks import time_mix
from pallas_kernels.ssd import ssd


def programs(shape, dtype, sharding, implementation=None):
    """{name: (function, its arguments' shapes and dtypes)} of one direction.

    Args:
      shape: (B, T, H, P, N), with one group of heads.
      sharding: of the arguments.
      implementation: of ssd.
    """
    *tokens, size, width = shape

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x, log_a = struct(*tokens, size), struct(*tokens, dtype=jnp.float32)
    b = struct(*tokens[:2], 1, width)

    def recurrence(x, log_a, b, c):
        return ssd(x, log_a, b, c, implementation=implementation)[0]

    def backward(x, log_a, b, c, d):
        return jax.vjp(recurrence, x, log_a, b, c)[1](d)

    return {"forward": (recurrence, (x, log_a, b, b)), "forward and backward": (backward, (x, log_a, b, b, x))}


def counted(shape, dtype, sharding):
    """Yields a row for each of `programs`, as `time_mix.counted` does; its plain form is "associative"."""
    plain = programs(shape, dtype, sharding, "associative")
    for name, (run, arguments) in programs(shape, dtype, sharding).items():
        row = {"program": f"ssd, {name}", "dtype": dtype, **dict(zip("BTHPN", shape, strict=True))}
        yield row | time_mix.beside_plain(run, plain[name][0], arguments)
