"""Products of float32 matrices, at float32 grade on every device.

Tensor cores multiply bfloat16. One such pass is wrong by per cents where many tokens are the same, which is what a
masked sequence looks like; but a number is a sum of two bfloat16 to 2^-17 of itself, of three to float32's own 2^-24,
and a product of sums is three passes, or six. That is XLA's to do (`DotAlgorithmPreset`), where there are such cores;
elsewhere float32 is multiplied as it is. What a form of an operator takes is set around it by `precise`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Precision = jax.lax.Precision | jax.lax.DotAlgorithmPreset
HIGHEST = jax.lax.Precision.HIGHEST
THREE_PASSES = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
SIX_PASSES = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6

_precision: contextvars.ContextVar[Precision] = contextvars.ContextVar("precision", default=HIGHEST)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """jnp.matmul, with HIGHEST precision or what `precise` says."""
    return jnp.matmul(x, y, precision=_precision.get())


def einsum(equation: str, *operands: jax.Array) -> jax.Array:
    """jnp.einsum, with HIGHEST precision or what `precise` says."""
    return jnp.einsum(equation, *operands, precision=_precision.get())


@contextlib.contextmanager
def precise(precision: Precision) -> Iterator[None]:
    """The precision of all products that are traced inside; what jit has traced before keeps the one it had."""
    token = _precision.set(precision)
    try:
        yield
    finally:
        _precision.reset(token)


def by_passes(form: Callable[..., Any], factors: Sequence[jax.Array]) -> Callable[..., Any]:
    """`form`, whose products are passes over bfloat16 where the program is lowered for a GPU of this process's kind.

    Args:
      form: takes arrays, and `precision` by name.
      factors: what the products are made of. Three passes where all are bfloat16, whose own rounding hides them; six,
        which are as good as float32, where any is not.

    Returns:
      A function of the arrays; `form` with HIGHEST where this process has no GPU with such cores.
    """
    plain = functools.partial(form, precision=HIGHEST)
    if not has_tensor_cores():
        return plain
    passes = THREE_PASSES if all(x.dtype == jnp.bfloat16 for x in factors) else SIX_PASSES
    return lambda *arrays: jax.lax.platform_dependent(
        *arrays, cuda=functools.partial(form, precision=passes), default=plain
    )


@functools.cache
def has_tensor_cores() -> bool:
    """Whether this process's GPUs multiply bfloat16: NVIDIA's of compute capability 8 (Ampere) and later."""
    if jax.default_backend() != "gpu":
        return False
    major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    return major.isdecimal() and int(major) >= 8  # AMD's are names: gfx90a
