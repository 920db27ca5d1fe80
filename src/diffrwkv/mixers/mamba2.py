"""Mamba-2, causal as upstream and made bidirectional as DiffuMamba does it.

Source: "Transformers are SSMs" (arXiv 2405.21060), and its code, state-spaces/mamba `mamba_ssm/modules/mamba2.py`,
whose parameter names are kept. Linear maps are [in, out] here (upstream's torch weights transposed), and the
convolution's weight is [width, channels].

    z, xBC, dt = split(u W_in)
    x, b, c = split(silu(conv(xBC) + bias))             depthwise, over this position and those before it
    dt = softplus(dt + dt_bias)     A = -exp(A_log)     one of each per head
    y = ssd(x·dt, dt·A, b, c) + D·x
    out = (group_rms_norm(y·silu(z))·norm_scale) W_out

BiMamba2 is two layers of their own weights, one of which runs, and convolves, from right to left; their outputs are
added.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array
from diffrwkv.blocks import by_blocks
from diffrwkv.checks import CONV_WIDTH, WIDTH
from diffrwkv.layers import Projection, partitioned, torch_uniform
from diffrwkv.mixers.place import Place
from pallas_kernels.ssd import ssd, ssd_blocks

NORM_EPSILON = 1e-5
DT_RANGE = (1e-3, 0.1)  # of the initial time steps, log-uniform
DT_FLOOR = 1e-4
A_RANGE = (1.0, 16.0)  # of the initial decay rates, uniform


def _initial_a_log(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, *A_RANGE))


def _initial_dt_bias(key, shape, dtype=jnp.float32):
    """What softplus turns into the initial time steps."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, *map(math.log, DT_RANGE)))
    dt = jnp.maximum(dt, DT_FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))


def depthwise_convolution(x: Array, kernel: Array, bias: Array, carry: Array | None = None, *, reverse: bool = False):
    """sum_k kernel[k]·x_{t - (W - 1) + k} + bias: each position and the W - 1 before it, or after it in reverse.

    Args:
      x: [B, L, C], any float dtype.
      kernel: [W, C] float32; its last row meets the position itself, in both directions.
      bias: [C] float32.
      carry: [B, W - 1, C], the positions that x goes on from in the direction of travel; None: zeros.

    Returns float32 [B, L, C].
    """
    width, length = kernel.shape[0], x.shape[1]
    if carry is None:
        carry = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    whole = jnp.concatenate([x, carry] if reverse else [carry, x], axis=1)
    # Shifted products fuse into one loop; a grouped convolution is slow on a CPU.
    taps = reversed(range(width)) if reverse else range(width)
    return bias + sum(whole[:, i : i + length].astype(jnp.float32) * kernel[k] for i, k in enumerate(taps))


def group_rms_norm(x: Array, groups: int, epsilon: float = NORM_EPSILON) -> Array:
    """x / rms(x) over each of `groups` equal parts of the last axis, in float32."""
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    parts = parts * jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + epsilon)
    return parts.reshape(x.shape)


class Mamba2(nn.Module):
    """Causal Mamba-2 block, exactly upstream's Mamba2 (without its fused kernels).

    `(x [B, L, D], shared, *, valid, state, context) -> (y [B, L, D], shared, state)`; `shared` passes through. `state`
    is `{"conv": [B, conv_width - 1, channels], "ssm": float32 [B, H, P, N]}`: the last inputs of the convolution and
    the operator's state after the last valid position. `reverse=True` runs from the end of the canvas and takes no
    state.

    Options:
      state_size: N.
      head_dim: P; expand·dim must be a multiple of it.
      expand: the inner width is expand·dim.
      num_groups: groups of heads that share b and c, and parts of the norm; must divide the number of heads.
      conv_width: positions that the convolution sees.
      implementation: of `ssd`.

    Raises ValueError for options that do not fit.
    """

    causal: ClassVar[bool] = True
    zero_output: ClassVar[bool] = False
    memory: ClassVar[str | None] = "ssm"

    place: Place
    state_size: int = 128
    head_dim: int = 64
    expand: int = 2
    num_groups: int = 1
    conv_width: int = 4
    implementation: str | None = None

    def __post_init__(self):
        _sizes(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x, shared=None, *, valid=None, state=None, context=None, keep_state=True, reverse=False):
        inner, heads, channels = _sizes(self)
        if reverse and state is not None:
            raise ValueError("the reverse direction starts from the end of the canvas: it takes no state.")
        B, L, _ = x.shape
        H, P, G, N, W = heads, self.head_dim, self.num_groups, self.state_size, self.conv_width

        def param(name, init, *shape):
            return self.param(name, partitioned(init, *(None,) * len(shape)), shape)

        if valid is not None:  # padding must look like the end of the sequence to the convolution
            x = jnp.where(valid[..., None], x, 0)
        features = inner + channels + H
        dim, dtype = self.place.dim, self.place.dtype
        projected = Projection(features, torch_uniform(dim), ("embed", "heads"), dtype, name="in_proj")(x)
        z, xbc, dt = jnp.split(projected, (inner, inner + channels), axis=-1)

        carry = None if state is None else state["conv"].astype(self.place.dtype)
        kernel = param("conv_kernel", torch_uniform(W), W, channels)
        bias = param("conv_bias", torch_uniform(W), channels)
        convolved = nn.silu(depthwise_convolution(xbc, kernel, bias, carry, reverse=reverse)).astype(self.place.dtype)
        x, b, c = jnp.split(convolved, (inner, inner + G * N), axis=-1)
        x, b, c = x.reshape(B, L, H, P), b.reshape(B, L, G, N), c.reshape(B, L, G, N)

        dt = jax.nn.softplus(dt.astype(jnp.float32) + param("dt_bias", _initial_dt_bias, H))
        if valid is not None:  # an exact no-op of the operator at padding
            dt = jnp.where(valid[..., None], dt, 0)
        rate = -jnp.exp(param("A_log", _initial_a_log, H))
        run = functools.partial(ssd, reverse=reverse)
        if context is not None:
            run = functools.partial(ssd_blocks, block=context.block)
        y, ssm = run(
            (x * dt[..., None]).astype(self.place.dtype),
            dt * rate,
            b,
            c,
            initial_state=None if state is None else state["ssm"],
            implementation=self.implementation,
        )
        y = y.astype(jnp.float32) + param("D", nn.initializers.ones_init(), H)[:, None] * x
        y = y.reshape(B, L, inner) * nn.silu(z.astype(jnp.float32))
        y = group_rms_norm(y, G) * param("norm_scale", nn.initializers.ones_init(), inner)
        y = Projection(self.place.dim, torch_uniform(inner), ("heads", "embed"), self.place.dtype, name="out_proj")(y)
        if carry is None:
            carry = jnp.zeros((B, W - 1, channels), xbc.dtype)
        inputs = jnp.concatenate([carry, xbc], axis=1)  # those of earlier stretches among them
        last = jnp.full(B, L) if valid is None else jnp.sum(valid, axis=1, dtype=jnp.int32)
        last = jnp.take_along_axis(inputs, (last[:, None] + jnp.arange(W - 1))[..., None], axis=1)
        if not keep_state:
            return y, shared, None
        if context is None:
            return y, shared, {"conv": last, "ssm": ssm}
        count = context.blocks(L)
        conv = inputs[:, context.block * jnp.arange(count)[:, None] + jnp.arange(W - 1)]
        before = {name: z[:, :count].reshape(-1, *z.shape[2:]) for name, z in (("conv", conv), ("ssm", ssm))}
        return y, shared, (before, {"conv": last, "ssm": ssm[:, -1]})

    @nn.nowrap
    def empty_state(self, batch: int, room: int) -> dict[str, Array]:
        """The (forward direction's) state before the first position; any number of positions has room in it."""
        _, heads, channels = _sizes(self)
        return {
            "conv": jnp.zeros((batch, self.conv_width - 1, channels), self.place.dtype),
            "ssm": jnp.zeros((batch, heads, self.head_dim, self.state_size), jnp.float32),
        }

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the recurrence per position, forward, as its definition has them."""
        return 5.0 * self.expand * self.place.dim * self.state_size


class BiMamba2(Mamba2):
    """Bidirectional Mamba-2: two independent layers, left to right and right to left, added (DiffuMamba).

    Options as Mamba2's, for both directions. `(x [B, L, D], shared, *, valid, state, context) -> (y [B, L, D], shared,
    state)`; `state` is the forward direction's: the reverse direction always starts at the end of the canvas. In a
    context it starts at the end of each block, or is left out where the context is causal.
    """

    causal: ClassVar[bool] = False
    memory: ClassVar[str | None] = None

    @nn.compact
    def __call__(  # type: ignore[override]  # it has both directions: there is none to name
        self, x, shared=None, *, valid=None, state=None, context=None, keep_state=True
    ):
        given = {"valid": valid, "state": state, "context": context, "keep_state": keep_state}
        y, shared, state = self._direction("forward")(x, shared, **given)
        if context is None or not context.causal:
            alone = x.shape[1] if context is None else context.block
            x, valid = (None if z is None else by_blocks(z, alone) for z in (x, valid))
            y_b, shared, _ = self._direction("backward")(x, shared, valid=valid, reverse=True)
            y = y + y_b.reshape(y.shape)
        return y, shared, state

    def _direction(self, name: str) -> Mamba2:
        own = [f.name for f in dataclasses.fields(Mamba2) if f.name not in ("parent", "name")]
        return Mamba2(**{field: getattr(self, field) for field in own}, name=name)

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of both recurrences per position, forward, as their definition has them."""
        return 2 * super().flops(length)


def _sizes(mixer: Mamba2) -> tuple[int, int, int]:
    """The inner width, the number of heads and the convolution's channels; raises where the options do not fit."""
    for name in ("state_size", "head_dim", "expand", "num_groups"):
        WIDTH.check(name, getattr(mixer, name))
    CONV_WIDTH.check("conv_width", mixer.conv_width)
    inner = mixer.expand * mixer.place.dim
    if inner % mixer.head_dim:
        raise ValueError(
            f"expand·dim = {inner} is no multiple of head_dim {mixer.head_dim}: choose a head_dim that divides it."
        )
    heads = inner // mixer.head_dim
    if heads % mixer.num_groups:
        raise ValueError(f"num_groups {mixer.num_groups} does not divide the {heads} heads: choose one that does.")
    return inner, heads, inner + 2 * mixer.num_groups * mixer.state_size
