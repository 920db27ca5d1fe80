"""RWKV-7 time mix and channel mix, causal as upstream and made bidirectional.

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (arXiv 2503.14456), and its training code,
BlinkDL/RWKV-LM `RWKV-v7/train_temp/src/model.py`, whose parameter names are kept (`x_r … r_k`, `w0 w1 w2 …`,
`v_first`). Linear maps are [in, out] here (upstream's torch weights transposed).

A direction turns x [B, L, D] into the operator's inputs, runs `wkv7`, normalises per head, adds the bonus, gates:

    x_z = x + (x_prev - x)·mu_z                         z in r, w, k, v, a, g;  x_prev is x_next in reverse
    r = x_r W_r   k = x_k W_k   v = x_v W_v
    log_w = -e^{-1/2} sigmoid(w0 + tanh(x_w w1) w2)     in (-0.607, 0)
    a = a_scale·sigmoid(a0 + x_a a1 a2)                 in-context learning rate
    g = sigmoid(x_g g1) g2
    v = v + (v_first - v)·sigmoid(v0 + x_v v1 v2)       above layer 0, whose own v is v_first
    kappa = k·k_k / |k·k_k|   per head                  k = k·(1 + (a - 1)·k_a)
    y = (group_norm(wkv7(r, log_w, k, v, -kappa, kappa·a)) + (sum_head r·k·r_k) v)·g

BiRWKV7 runs two directions with their own mixes, low-rank maps, bonus and norm, merges them, and projects once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array
from diffrwkv.blocks import Context, before_blocks, by_blocks
from diffrwkv.checks import A_SCALE, WIDTH
from diffrwkv.layers import (
    Projection,
    constant_vector,
    hidden_width,
    l2_normalise,
    last_valid,
    next_token,
    orthogonal,
    partitioned,
    previous_token,
    project,
    standardise,
)
from diffrwkv.mixers.place import Place
from pallas_kernels.wkv7 import wkv7, wkv7_bidirectional, wkv7_blocks

DECAY_FLOOR = -math.exp(-0.5)  # the least log decay of a step: w > 0.545, so products over a chunk stay in range
GROUP_NORM_EPSILON = 64e-5


def lora_rank(dim: int, factor: float) -> int:
    """RWKV-7's rule for the rank of a low-rank map: max(32, 32·round(factor·sqrt(dim) / 32))."""
    return max(32, 32 * round(factor * math.sqrt(dim) / 32))


def _depth(place: Place):
    """r01 = l/(L-1) and r10 = 1 - l/L."""
    return place.layer / max(place.num_layers - 1, 1), 1 - place.layer / place.num_layers


def _position(dim: int) -> tuple[Array, Array]:
    """i/D and i/(D-1) for the D channels, float32."""
    i = jnp.arange(dim, dtype=jnp.float32)
    return i / dim, i / max(dim - 1, 1)


def _zigzag(dim: int, head_dim: int) -> Array:
    """z·|z| of the channel's place z in [-1, 1] in its head, float32 [D]."""
    half = (head_dim - 1) / 2
    z = (jnp.arange(dim, dtype=jnp.float32) % head_dim - half) / half
    return z * jnp.abs(z)


def time_mix_initial(place: Place, head_dim: int) -> dict[str, Array]:
    """Deterministic initial values of a direction's vectors, float32 [D] each (upstream's RWKV_Tmix_x070.__init__)."""
    r01, r10 = _depth(place)
    q, n = _position(place.dim)
    zigzag = _zigzag(place.dim, head_dim)
    linear = n - 0.5
    return {
        "x_r": 1 - q ** (0.2 * r10),
        "x_w": 1 - q ** (0.9 * r10),
        "x_k": 1 - q ** (0.7 * r10),
        "x_v": 1 - q ** (0.7 * r10),
        "x_a": 1 - q ** (0.9 * r10),
        "x_g": 1 - q ** (0.2 * r10),
        "w0": -5.5 + 6 * n ** (1 + r01**0.3) + 2.5 * zigzag,
        "a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "v0": 0.73 - 0.4 * linear,
        "k_k": 0.71 - 0.1 * linear,
        "k_a": jnp.full_like(q, 1.02),
        "r_k": jnp.full_like(q, -0.04),
        "ln_x": jnp.full_like(q, 1.0) * ((1 + place.layer) / place.num_layers) ** 0.7,
    }


def channel_mix_initial(place: Place) -> Array:
    """Initial mu_k of the channel mix, float32 [D] (upstream's RWKV_CMix_x070.__init__)."""
    q, _ = _position(place.dim)
    _, r10 = _depth(place)
    return 1 - q ** (r10**4)


def _projections(place: Place, prefix: str = "") -> dict[str, Projection]:
    """Receptance, key and value: orthogonal with gain 1, 0.1, 1. To be called inside a compact method."""
    axes = ("embed", "heads")
    return {
        name: Projection(place.dim, orthogonal(gain), axes, place.dtype, name=prefix + name)
        for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0))
    }


class TimeMixDirection(nn.Module):
    """One direction of a time mix, before and after the recurrence, without the output projection.

    `(x [B, L, D], v_first [B, L, D] or None, projections, valid, state) -> (tokens, v_first, finish)`: `tokens` are the
    six arrays of `wkv7`, which the caller runs, for both directions at once where there are two, and
    `finish(out, ...) -> (y [B, L, D], state)` takes what it returns, or with a context what `wkv7_blocks` does.
    `projections` holds "receptance", "key" and "value" and belongs to the caller, which may share it between
    directions. `state` is `{"shift": [B, D], "wkv": float32 [B, H, K, V]}`, taken and given in the direction of travel.
    """

    place: Place  # the first layer gives v_first, the others take it
    head_dim: int
    ranks: dict[str, int]
    a_scale: float = 1.0

    @nn.compact
    def __call__(self, x, v_first, projections, *, reverse=False, valid=None, state=None, context=None):
        B, L, D = x.shape
        K = self.head_dim
        H = D // K
        initial = time_mix_initial(self.place, K)
        p = {
            name: self.param(name, partitioned(constant_vector(initial[name]), "embed"), (D,))
            for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "r_k")
        }
        lora = {z: self._lora(z, D) for z in ("w", "a", "g")}

        x = x.astype(self.place.dtype)
        if valid is not None:  # padding must look like the end of the sequence to its neighbour
            x = jnp.where(valid[..., None], x, 0)
        carry = None if state is None else state["shift"]
        if reverse:
            if carry is not None:
                raise ValueError("the reverse direction starts from the end of the canvas: it takes no state.")
            neighbour = next_token(x)
        else:
            neighbour = previous_token(x, carry)
        delta = neighbour - x

        def mixed(z):
            return x + delta * p["x_" + z].astype(self.place.dtype)

        x_v = mixed("v")
        r = projections["receptance"](mixed("r"))
        k = projections["key"](mixed("k"))
        v = projections["value"](x_v)
        log_w = DECAY_FLOOR * jax.nn.sigmoid(p["w0"] + lora["w"](mixed("w"), jnp.tanh).astype(jnp.float32))
        a = self.a_scale * jax.nn.sigmoid(p["a0"] + lora["a"](mixed("a")).astype(jnp.float32))
        g = lora["g"](mixed("g"), jax.nn.sigmoid)
        if self.place.first:
            v_first = v
        else:
            v0 = self.param("v0", partitioned(constant_vector(initial["v0"]), "embed"), (D,))
            mix = jax.nn.sigmoid(v0 + self._lora("v", D)(x_v).astype(jnp.float32)).astype(self.place.dtype)
            v = v + (v_first - v) * mix

        heads = (B, L, H, K)
        kappa = l2_normalise((k.astype(jnp.float32) * p["k_k"]).reshape(heads))
        a_heads = a.reshape(heads)
        k = (k.astype(jnp.float32) * (1 + (a - 1) * p["k_a"])).astype(self.place.dtype).reshape(heads)
        r, v_heads, log_w = r.reshape(heads), v.reshape(heads), log_w.reshape(heads)
        a_op, b_op, k_op, v_op = -kappa, kappa * a_heads, k, v_heads
        if valid is not None:  # an exact no-op of the operator at padding
            keep = valid[:, :, None, None]
            log_w, k_op, v_op, a_op, b_op = (jnp.where(keep, y, 0) for y in (log_w, k, v_heads, a_op, b_op))
        tokens = r, log_w, k_op, v_op, a_op.astype(self.place.dtype), b_op.astype(self.place.dtype)
        scale = self.param("ln_x_scale", partitioned(constant_vector(initial["ln_x"]), "embed"), (D,))
        bias = self.param("ln_x_bias", partitioned(nn.initializers.zeros_init(), "embed"), (D,))
        shift = last_valid(x, valid) if not reverse else x[:, 0]

        def finish(out, states):
            y = standardise(out, GROUP_NORM_EPSILON).reshape(B, L, D)
            y = y * scale + bias
            rk = r.astype(jnp.float32) * k.astype(jnp.float32) * p["r_k"].reshape(H, K)
            bonus = jnp.sum(rk, axis=-1, keepdims=True) * v_heads.astype(jnp.float32)
            y = (y + bonus.reshape(y.shape)) * g.astype(jnp.float32)
            y = y.astype(self.place.dtype)
            if context is None:
                return y, {"shift": shift, "wkv": states}
            before = states[:, : context.blocks(L)]
            before = {"shift": before_blocks(x, carry, context), "wkv": before.reshape(-1, *states.shape[2:])}
            return y, (before, {"shift": shift, "wkv": states[:, -1]})

        return tokens, v_first, finish

    def _lora(self, z: str, dim: int):
        rank = self.ranks[z]
        gain = 0.1 * max(1.0, math.sqrt(rank / dim))
        down = self.param(z + "1", partitioned(nn.initializers.zeros_init(), "embed", None), (dim, rank))
        up = self.param(z + "2", partitioned(orthogonal(gain), None, "embed"), (rank, dim))

        def apply(x, activation=lambda h: h):
            return project(activation(project(x, down.astype(self.place.dtype))), up.astype(self.place.dtype))

        return apply


def _ranks(dim: int, given: dict[str, int] | None) -> dict[str, int]:
    ranks = {z: lora_rank(dim, factor) for z, factor in (("w", 2.5), ("a", 2.5), ("v", 1.7), ("g", 5.0))}
    if not isinstance(given, Mapping | None):
        raise ValueError(f'lora_ranks must be ranks by name, such as {{"w": 32}}, got {given!r}.')
    given = dict(given or {})
    if unknown := sorted(set(given) - set(ranks), key=str):
        raise ValueError(f"lora_ranks names {unknown}; the low-rank maps are w, a, v and g.")
    for z, rank in given.items():
        WIDTH.check(f"lora_ranks.{z}", rank)
    return ranks | given


def _check_options(mixer: RWKV7 | BiRWKV7) -> None:
    dim, head_dim = mixer.place.dim, mixer.head_dim
    WIDTH.check("head_dim", head_dim)
    if head_dim < 2 or dim % head_dim:
        raise ValueError(f"dim {dim} is no multiple of head_dim {head_dim}: choose a head_dim (≥ 2) that divides it.")
    A_SCALE.check("a_scale", mixer.a_scale)
    _ranks(dim, mixer.lora_ranks)


def _direction(mixer: RWKV7 | BiRWKV7, name: str) -> TimeMixDirection:
    """A direction with the mixer's own settings. To be called inside its compact method."""
    return TimeMixDirection(
        mixer.place,
        mixer.head_dim,
        _ranks(mixer.place.dim, mixer.lora_ranks),
        a_scale=mixer.a_scale,
        name=name,
    )


class RWKV7(nn.Module):
    """Causal RWKV-7 time mix, exactly upstream's RWKV_Tmix_x070: the yardstick, and the autoregressive model's mixer.

    `(x [B, L, D], v_first or None, *, valid, state, context) -> (y [B, L, D], v_first, state)`.
    """

    causal: ClassVar[bool] = True
    zero_output: ClassVar[bool] = True

    place: Place
    head_dim: int = 64
    lora_ranks: dict[str, int] | None = None
    a_scale: float = 1.0
    implementation: str | None = None

    def __post_init__(self):
        _check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x, v_first=None, *, valid=None, state=None, context=None, keep_state=True):
        maps = _projections(self.place)
        given = {"valid": valid, "state": state, "context": context}
        tokens, v_first, finish = _direction(self, "forward")(x, v_first, maps, **given)
        y, state = finish(*_left_to_right(self, tokens, state, context, keep_state))
        return _output(self.place)(y), v_first, state if keep_state else None

    def empty_state(self, batch: int, room: int) -> dict[str, Array]:
        """The forward direction's state before the first position; any number of positions has room in it."""
        return _empty_state(self, batch)

    def flops(self, length: int) -> float:
        """Operations of the recurrence per position, forward, as its definition has them."""
        return 7.0 * self.place.dim * self.head_dim


def _left_to_right(mixer: RWKV7 | BiRWKV7, tokens, state, context: Context | None, keep_state: bool):
    """What `finish` of the forward direction takes."""
    start = None if state is None else state["wkv"]
    options: dict[str, Any] = {"initial_state": start, "mild": True, "implementation": mixer.implementation}
    if context is None:
        return wkv7(*tokens, final_state=keep_state, **options)
    return wkv7_blocks(*tokens, block=context.block, **options)


def _empty_state(mixer: RWKV7 | BiRWKV7, batch: int) -> dict[str, Array]:
    heads = mixer.place.dim // mixer.head_dim
    return {
        "shift": jnp.zeros((batch, mixer.place.dim), mixer.place.dtype),
        "wkv": jnp.zeros((batch, heads, mixer.head_dim, mixer.head_dim), jnp.float32),
    }


def _output(place: Place) -> Projection:
    return Projection(place.dim, nn.initializers.zeros_init(), ("heads", "embed"), place.dtype, name="output")


class BiRWKV7(nn.Module):
    """Bidirectional RWKV-7 time mix: two directions, merged before one output projection.

    Options (docs/results.md has what their comparison can and cannot decide):
      merge: "gate": 2·(s·y_forward + (1 - s)·y_backward) with s = sigmoid(m0 + tanh(x m1) m2), which starts as the
        sum; "add": the sum.
      share: what the directions have in common: "none"; "projections": W_r, W_k, W_v; "all": every weight ("tied").
      head_dim, lora_ranks (of w, a, v, g), a_scale (1; state tracking may need up to 2), implementation (of `wkv7`).

    `(x [B, L, D], v_first, *, valid, state, context) -> (y [B, L, D], v_first, state)`; `v_first` is a pair of arrays,
    `state` the forward direction's: the reverse direction always starts at the end of the canvas. In a context it
    starts at the end of each block, or is left out (y_backward = 0) where the context is causal.
    """

    causal: ClassVar[bool] = False
    zero_output: ClassVar[bool] = True

    place: Place
    head_dim: int = 64
    merge: str = "gate"
    share: str = "projections"
    lora_ranks: dict[str, int] | None = None
    a_scale: float = 1.0
    implementation: str | None = None

    def __post_init__(self):
        _check_options(self)
        if self.merge not in ("gate", "add"):
            raise ValueError(f'merge must be "gate" or "add", got {self.merge!r}.')
        if self.share not in ("none", "projections", "all"):
            raise ValueError(f'share must be "none", "projections" or "all", got {self.share!r}.')
        super().__post_init__()

    @nn.compact
    def __call__(self, x, v_first=None, *, valid=None, state=None, context=None, keep_state=True):
        forward = _direction(self, "forward")
        backward = forward if self.share == "all" else _direction(self, "backward")
        if self.share == "none":
            maps_f, maps_b = (_projections(self.place, d) for d in ("forward_", "backward_"))
        else:
            maps_f = maps_b = _projections(self.place)

        first_f, first_b = (None, None) if v_first is None else v_first
        tokens_f, first_f, finish_f = forward(x, first_f, maps_f, valid=valid, state=state, context=context)
        if context is None:
            tokens_b, first_b, finish_b = backward(x, first_b, maps_b, reverse=True, valid=valid)
            initial = None if state is None else state["wkv"]
            result_f, result_b = wkv7_bidirectional(
                tokens_f,
                tokens_b,
                initial_states=(initial, None),
                final_states=(keep_state, False),
                mild=True,
                implementation=self.implementation,
            )
            (y_f, state), (y_b, _) = finish_f(*result_f), finish_b(*result_b)
        else:
            y_f, state = finish_f(*_left_to_right(self, tokens_f, state, context, keep_state))
            y_b = jnp.zeros_like(y_f)
            if not context.causal:
                x_b, valid_b = (None if z is None else by_blocks(z, context.block) for z in (x, valid))
                tokens_b, first_b, finish_b = backward(x_b, first_b, maps_b, reverse=True, valid=valid_b)
                options: dict[str, Any] = {"final_state": False, "mild": True, "implementation": self.implementation}
                y_b, _ = finish_b(*wkv7(*tokens_b, reverse=True, **options))
                y_b = y_b.reshape(x.shape)
        if self.merge == "add":
            y = y_f + y_b
        else:
            y = y_b + (y_f - y_b) * self._gate(x, _ranks(self.place.dim, self.lora_ranks)["v"])
            y = 2 * y
        return _output(self.place)(y), (first_f, first_b), state if keep_state else None

    def empty_state(self, batch: int, room: int) -> dict[str, Array]:
        """The forward direction's state before the first position; any number of positions has room in it."""
        return _empty_state(self, batch)

    def flops(self, length: int) -> float:
        """Operations of the recurrence per position, forward, as its definition has them."""
        return 2 * 7.0 * self.place.dim * self.head_dim

    def _gate(self, x: Array, rank: int) -> Array:
        """sigmoid(m0 + tanh(x m1) m2): [B, L, D] -> [B, L, D], one half at initialisation."""
        D = self.place.dim
        m0 = self.param("m0", partitioned(nn.initializers.zeros_init(), "embed"), (D,))
        m1 = self.param("m1", partitioned(nn.initializers.zeros_init(), "embed", None), (D, rank))
        m2 = self.param("m2", partitioned(orthogonal(0.1), None, "embed"), (rank, D))
        hidden = jnp.tanh(project(x.astype(self.place.dtype), m1.astype(self.place.dtype)))
        hidden = project(hidden, m2.astype(self.place.dtype))
        return jax.nn.sigmoid(m0 + hidden.astype(jnp.float32)).astype(self.place.dtype)


class ChannelMix(nn.Module):
    """RWKV-7 channel mix, W_v relu(W_k x_k)^2: `(x [B, L, D], *, valid, state, context) -> (y, state [B, D])`.

    `shift`: what x_k sees beside x: "previous" (upstream; for causal models), "both":
    x + (x_{t-1} - x)·mu + (x_{t+1} - x)·mu' with both mu at half of upstream's initial value, so that no direction is
    preferred, or "none". `state` is the previous token's features. At the end of what a position sees x_{t+1} is 0.
    """

    zero_output: ClassVar[bool] = True

    place: Place
    expansion: float = 4.0
    shift: str = "both"

    def __post_init__(self):
        if self.shift not in ("previous", "both", "none"):
            raise ValueError(f'channel mix shift must be "previous", "both" or "none", got {self.shift!r}.')
        hidden_width(self.expansion, self.place.dim)
        super().__post_init__()

    @nn.compact
    def __call__(self, x, *, valid=None, state=None, context=None):
        D = self.place.dim
        hidden = hidden_width(self.expansion, D)
        initial = channel_mix_initial(self.place)
        x = x.astype(self.place.dtype)
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)

        def mu(name, scale):
            p = self.param(name, partitioned(constant_vector(scale * initial), "embed"), (D,))
            return p.astype(self.place.dtype)

        mixed = x
        if self.shift == "previous":
            mixed = x + (previous_token(x, state) - x) * mu("x_k", 1.0)
        elif self.shift == "both":
            following = next_token(x if context is None else by_blocks(x, context.sight)).reshape(x.shape)
            mixed = x + (previous_token(x, state) - x) * mu("x_k", 0.5) + (following - x) * mu("x_k_next", 0.5)
        h = Projection(hidden, orthogonal(1.0), ("embed", "mlp"), self.place.dtype, name="key")(mixed)
        h = jnp.square(nn.relu(h))
        y = Projection(D, nn.initializers.zeros_init(), ("mlp", "embed"), self.place.dtype, name="value")(h)
        last = last_valid(x, valid)
        return y, last if context is None else (before_blocks(x, state, context), last)

    @property
    def causal(self) -> bool:
        """Whether a position sees no later one."""
        return self.shift != "both"

    def empty_state(self, batch: int, room: int) -> Array:
        """The features of the position before the first: zeros [B, D]."""
        return jnp.zeros((batch, self.place.dim), self.place.dtype)
