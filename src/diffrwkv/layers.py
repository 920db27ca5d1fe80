"""Small pieces that every block is built from: norms, token shift, low-rank maps, adaLN, dropout, initialisers."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array, DType
from diffrwkv.checks import DROPOUT, EXPANSION


def partitioned(init, *names):
    """The initialiser `init`, its parameter's axes named for `sharding.LOGICAL_AXES`."""
    return nn.with_logical_partitioning(init, names)


# --- initialisers -----------------------------------------------------------------------------------------------


def constant_vector(values):
    """An initialiser that returns `values` (any [n] array or a scalar to fill with), whatever the key."""

    def init(key, shape, dtype=jnp.float32):
        del key
        return jnp.broadcast_to(jnp.asarray(values, dtype), shape)

    return init


def symmetric_uniform(bound: float):
    """Uniform on [-bound, bound]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def orthogonal(gain: float):
    """Rows or columns orthonormal, times `gain`: as RWKV-7 initialises its projections.

    The gain·max(1, sqrt(in / out)) of its low-rank maps [in, out] is the caller's to ask for.
    """
    return nn.initializers.orthogonal(scale=gain)


def torch_uniform(fan_in: int):
    """Uniform on ±1/sqrt(fan_in): what torch gives to nn.Linear, weight and bias, unless told otherwise."""
    return symmetric_uniform(fan_in**-0.5)


def hidden_width(expansion: float, dim: int) -> int:
    """round(expansion·dim), of a channel mixer. Raises ValueError for an expansion that leaves nothing of it."""
    EXPANSION.check("expansion", expansion)
    if not (width := round(expansion * dim)):
        raise ValueError(f"expansion {expansion} leaves no hidden width of dim {dim}: raise it.")
    return width


# --- projections ------------------------------------------------------------------------------------------------


def project(x: Array, kernel: Array) -> Array:
    """x W over the last axis, [..., in] @ [in, out] -> [..., out].

    The other axes are one in the product: the gradient of W then sums over one axis, and XLA on a CPU multiplies what
    is there. Over two it transposes a copy first, which costs a third of a product's forward and backward pass.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Kernel(nn.Module):
    """The weight of a `Projection` alone, float32 [in, out], for what multiplies by it in a function of its own."""

    shape: tuple[int, int]
    kernel_init: Any
    axes: tuple[str | None, str | None]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", partitioned(self.kernel_init, *self.axes), self.shape)


class Projection(nn.Module):
    """x W (+ b), [..., in] -> [..., out] in `dtype`; the weight float32 [in, out], its axes named."""

    features: int
    kernel_init: Any
    axes: tuple[str | None, str | None]
    dtype: DType = jnp.float32
    bias_init: Any = None  # None: no bias

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", partitioned(self.kernel_init, *self.axes), (x.shape[-1], self.features))
        y = project(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.bias_init is not None:
            y = y + self.param("bias", partitioned(self.bias_init, self.axes[1]), (self.features,)).astype(self.dtype)
        return y


# --- normalisation ----------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, statistics in float32. `use_bias=False` is MDLM's.

    [..., D] -> [..., D] in `dtype`.
    """

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones_init(), "norm"), (width,))
        y = standardise(x, self.epsilon) * scale
        if self.use_bias:
            y = y + self.param("bias", partitioned(nn.initializers.zeros_init(), "norm"), (width,))
        return y.astype(self.dtype)


def standardise(x: Array, epsilon: float) -> Array:
    """Zero mean and unit variance over the last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


# --- token shift ------------------------------------------------------------------------------------------------


def previous_token(x: Array, carry: Array | None = None) -> Array:
    """x_{t-1} at position t. [B, L, D] -> [B, L, D]; position 0 gets `carry` [B, D], or zero."""
    first = jnp.zeros_like(x[:, :1]) if carry is None else carry[:, None].astype(x.dtype)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def next_token(x: Array) -> Array:
    """x_{t+1} at position t. [B, L, D] -> [B, L, D]; the last position gets zero."""
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)


def last_valid(x: Array, valid: Array | None) -> Array:
    """The features of the last valid position. [B, L, D], bool [B, L] or None -> [B, D]."""
    if valid is None:
        return x[:, -1]
    last = jnp.maximum(jnp.sum(valid, axis=1) - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


# --- dropout ----------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Dropout from 16-bit random numbers: half the bits of the usual mask, which on a CPU is time.

    The kept fraction is `round((1 - rate)·2^16) / 2^16`, and the output is divided by exactly that. The "dropout" rng
    is needed when `deterministic` is False and rate > 0.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        DROPOUT.check("dropout", self.rate)
        if deterministic or self.rate == 0:
            return x
        kept = round((1 - self.rate) * 2**16)
        bits = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint16)
        return jnp.where(bits < kept, x * (2**16 / kept), 0).astype(x.dtype)


# --- time conditioning ------------------------------------------------------------------------------------------


def sinusoidal(t: Array, width: int, max_period: float = 10_000.0) -> Array:
    """Sinusoidal features of t: [B] -> float32 [B, width], cosines first (MDLM, models/dit.py TimestepEmbedder)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """c = SiLU(MLP(sinusoidal(t))): [B] -> [B, width] (MDLM, models/dit.py)."""

    width: int = 128
    frequencies: int = 256
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, t: Array) -> Array:
        def dense(x, name):
            init = torch_uniform(x.shape[-1])
            return nn.silu(Projection(self.width, init, (None, None), self.dtype, bias_init=init, name=name)(x))

        return dense(dense(sinusoidal(t, self.frequencies), "hidden"), "out")


class Modulation(nn.Module):
    """adaLN-zero: the condition c [B, width] -> `parts` arrays [B, 1, D], zero at initialisation (DiT, section 3.2)."""

    dim: int
    parts: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, c: Array) -> list[Array]:
        dense = nn.Dense(
            self.parts * self.dim,
            kernel_init=partitioned(nn.initializers.zeros_init(), None, "embed"),
            dtype=self.dtype,
            name="linear",
        )
        return jnp.split(dense(c)[:, None], self.parts, axis=-1)
