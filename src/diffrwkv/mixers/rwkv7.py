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

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.array_types import Array
from diffrwkv.blocks import Context, before_blocks, by_blocks
from diffrwkv.checks import A_SCALE, WIDTH
from diffrwkv.layers import (
    Kernel,
    Projection,
    constant_vector,
    hidden_width,
    last_valid,
    next_token,
    orthogonal,
    partitioned,
    previous_token,
    project,
)
from diffrwkv.mixers.place import Place
from pallas_kernels.time_mix import LowRank, channel_shift, finish, operands, token_mixes
from pallas_kernels.wkv7 import wkv7, wkv7_bidirectional, wkv7_blocks


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


def _projections(place: Place, prefix: str = "") -> tuple[Array, ...]:
    """Receptance, key and value: orthogonal with gain 1, 0.1, 1. To be called inside a compact method."""
    shape, axes = (place.dim, place.dim), ("embed", "heads")
    named = (("receptance", 1.0), ("key", 0.1), ("value", 1.0))
    return tuple(Kernel(shape, orthogonal(gain), axes, name=prefix + name)() for name, gain in named)


class TimeMixDirection(nn.Module):
    """The parameters of one direction of a time mix, but for the projections: `() -> {name: array}`."""

    place: Place  # the first layer gives v_first, the others take it
    head_dim: int
    ranks: dict[str, int]

    @nn.compact
    def __call__(self):
        D = self.place.dim
        initial = time_mix_initial(self.place, self.head_dim)

        def vector(name, init):
            return self.param(name, partitioned(init, "embed"), (D,))

        p = {
            name: vector(name, constant_vector(initial[name]))
            for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "r_k")
        }
        for z in ("w", "a", "g"):
            p |= self._low_rank(z)
        if not self.place.first:
            p["v0"] = vector("v0", constant_vector(initial["v0"]))
            p |= self._low_rank("v")
        p["ln_x_scale"] = vector("ln_x_scale", constant_vector(initial["ln_x"]))
        p["ln_x_bias"] = vector("ln_x_bias", nn.initializers.zeros_init())
        return p

    def _low_rank(self, z: str) -> dict[str, Array]:
        dim, rank = self.place.dim, self.ranks[z]
        gain = 0.1 * max(1.0, math.sqrt(rank / dim))
        down = self.param(z + "1", partitioned(nn.initializers.zeros_init(), "embed", None), (dim, rank))
        up = self.param(z + "2", partitioned(orthogonal(gain), None, "embed"), (rank, dim))
        return {z + "1": down, z + "2": up}


class Travel(NamedTuple):
    """A direction on its way through the operator.

    Attributes:
      r: [B, L, H, K].
      operands: log_w, k, v, a and b as `wkv7` takes them, [B, L, H, K] each.
      gate: sigmoid(x_g g1) g2, not multiplied yet.
      v_first: [B, L, D].
    """

    r: Array
    operands: tuple[Array, Array, Array, Array, Array]
    gate: LowRank
    v_first: Array

    @property
    def tokens(self) -> tuple[Array, Array, Array, Array, Array, Array]:
        """The six arrays of `wkv7`."""
        return self.r, *self.operands


def _travels(
    mixer: RWKV7 | BiRWKV7, ways, x, v_firsts, kernels, *, valid=None, carry=None, m1=None
) -> tuple[list[Travel], Array | None]:
    """What the operator takes for each way through x [B, L, D], and x m1 where that is wanted.

    Args:
      ways: {"previous" or "next", the neighbour that a direction looks at: its parameters}.
      v_firsts: of each way [B, L, D], or None in the first layer.
      kernels: receptance, key and value, for each way, or once for all of them.
      valid: bool [B, L] or None.
      carry: [B, D], what stands before the first position.
      m1: [D, rank], or None.
    """
    place, params = mixer.place, list(ways.values())
    mu = jnp.stack([jnp.stack([p["x_" + z] for p in params]) for z in "rkv"])
    mixes = token_mixes(x, mu, sides=tuple(ways), carry=carry, implementation=mixer.time_mix)

    def projected(i):
        # A product for each way, though one would do where they share the kernels: its halves go to Pallas kernels,
        # for which a GPU would copy them.
        own = kernels if len(kernels) > 1 else kernels * len(ways)
        each = zip(mixes[i], own, strict=True)
        return [project(y, three[i].astype(place.dtype)) for y, three in each]

    r, k, v = (projected(i) for i in range(3))
    hidden, merged = _low_rank_hidden(place, ways, x, carry, m1)
    travels = []
    for i, p in enumerate(params):
        names = "wa" if place.first else "wav"
        *ends, gate_start = np.cumsum([0, *(len(p[z + "2"]) for z in names)]).tolist()
        ups = tuple(p[z + "2"] for z in names)
        raw = LowRank(hidden[i], ups, tuple(ends))
        gate = LowRank(hidden[i], (p["g2"],), (gate_start,))
        blend = None if place.first else (v_firsts[i], p["v0"])
        vectors = {name: p[name] for name in ("w0", "a0", "k_k", "k_a")}
        options = {"head_dim": mixer.head_dim, "blend": blend, "valid": valid, "a_scale": mixer.a_scale}
        made = operands(k[i], v[i], raw, **vectors, **options, implementation=mixer.time_mix)
        heads = r[i].reshape(made[0].shape)
        travels.append(Travel(heads, made, gate, v[i] if place.first else v_firsts[i]))
    return travels, merged


def _conclude(mixer: RWKV7 | BiRWKV7, params, travels, outs, shape, merge=None) -> Array:
    """y [B, L, D] of the shape given, after the output projection.

    Args:
      params: of each direction.
      outs: what the operator gave for each.
      merge: (tanh(x m1), m0, m2), whose gate sigmoid(m0 + tanh(x m1) m2) is one half at first; None is the sum.
    """
    place = mixer.place
    kernel = Kernel((place.dim, place.dim), nn.initializers.zeros_init(), ("heads", "embed"), name="output")()

    def in_batch(x):
        return x.reshape(*shape[:2], *x.shape[2:])

    sides, vectors = [], []
    for p, way, out in zip(params, travels, outs, strict=True):
        gate = dataclasses.replace(way.gate, hidden=in_batch(way.gate.hidden))
        sides.append((*map(in_batch, (out, way.r, *way.operands[1:3])), gate))
        vectors.append((p["r_k"], p["ln_x_scale"], p["ln_x_bias"]))
    if merge is not None:
        hidden, m0, m2 = merge
        merge = LowRank(hidden, (m2,), (0,)), m0
    y = finish(sides, vectors, merge=merge, implementation=mixer.time_mix)
    return project(y, kernel.astype(place.dtype))


def _low_rank_hidden(place: Place, ways, x: Array, carry: Array | None, m1: Array | None):
    """tanh(x_w w1), x_a a1, x_v v1 (above the first layer) and sigmoid(x_g g1) side by side for each of the ways; and
    tanh(x m1).

    x_z z1 = x (1 - mu_z) z1 + near(x mu_z z1): one product with x for all, and no x_z. What is shifted is its few
    columns.
    """
    names = "wag" if place.first else "wavg"
    parts = []
    for p in ways.values():
        parts += [
            jnp.concatenate([(1 - p["x_" + z][:, None]) * p[z + "1"] for z in names], 1),
            jnp.concatenate([p["x_" + z][:, None] * p[z + "1"] for z in names], 1),
        ]
    parts = [part.astype(place.dtype) for part in (parts if m1 is None else [*parts, m1])]
    widths = np.cumsum([part.shape[1] for part in parts])[:-1]
    made = jnp.split(project(x, jnp.concatenate(parts, 1)), widths, -1)
    results = []
    for i, (side, p) in enumerate(ways.items()):
        here, near = made[2 * i : 2 * i + 2]
        first = None if carry is None else carry.astype(place.dtype) @ parts[2 * i + 1]
        both = here + (next_token(near) if side == "next" else previous_token(near, first))
        results.append(_activated(both, p["w1"].shape[1], p["g1"].shape[1]))
    return results, None if m1 is None else _activated(made[-1], m1.shape[1], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _activated(x: Array, w: int, g: int) -> Array:
    """tanh of the first w columns and sigmoid of the last g; computed in float32, as are the slopes.

    JAX would take the slopes from the rounded results, which says little where these are near one.
    """
    end = x.shape[-1] - g
    first, last = (part.astype(jnp.float32) for part in (x[..., :w], x[..., end:]))
    made = jnp.tanh(first), x[..., w:end], jax.nn.sigmoid(last)
    return jnp.concatenate([part.astype(x.dtype) for part in made], -1)


def _activated_forward(x, w, g):
    return _activated(x, w, g), x


def _activated_backward(w, g, x, d):
    end = x.shape[-1] - g
    first, last = jnp.tanh(x[..., :w].astype(jnp.float32)), jax.nn.sigmoid(x[..., end:].astype(jnp.float32))
    made = d[..., :w] * (1 - first * first), d[..., w:end], d[..., end:] * (last * (1 - last))
    return (jnp.concatenate([part.astype(x.dtype) for part in made], -1),)


_activated.defvjp(_activated_forward, _activated_backward)


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


def _check_first(place: Place, v_first: Any) -> None:
    """Raises ValueError unless the first layer, and it alone, is called without the values of the first layer."""
    if place.first and v_first is not None:
        raise ValueError("The first layer makes v_first: build the later ones with Place(..., first=False).")
    if not place.first and v_first is None:
        raise ValueError("A layer that is not the first needs v_first: pass on what the first layer returned.")


def _direction(mixer: RWKV7 | BiRWKV7, name: str) -> dict[str, Array]:
    """A direction's parameters. To be called inside the mixer's compact method."""
    ranks = _ranks(mixer.place.dim, mixer.lora_ranks)
    return TimeMixDirection(mixer.place, mixer.head_dim, ranks, name=name)()


class RWKV7(nn.Module):
    """Causal RWKV-7 time mix, exactly upstream's RWKV_Tmix_x070: the yardstick, and the autoregressive model's mixer.

    `(x [B, L, D], v_first or None, *, valid, state, context) -> (y [B, L, D], v_first, state)`.
    """

    causal: ClassVar[bool] = True
    zero_output: ClassVar[bool] = True
    memory: ClassVar[str | None] = "wkv"

    place: Place
    head_dim: int = 64
    lora_ranks: dict[str, int] | None = None
    a_scale: float = 1.0
    implementation: str | None = None
    time_mix: str | None = None

    def __post_init__(self):
        _check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x, v_first=None, *, valid=None, state=None, context=None, keep_state=True):
        _check_first(self.place, v_first)
        ways = {"previous": _direction(self, "forward")}
        x = _without_padding(x.astype(self.place.dtype), valid)
        carry = None if state is None else state["shift"]
        (way,), _ = _travels(self, ways, x, [v_first], [_projections(self.place)], valid=valid, carry=carry)
        out, states = _left_to_right(self, way.tokens, state, context, keep_state)
        y = _conclude(self, list(ways.values()), [way], [out], x.shape)
        return y, way.v_first, _state(x, states, valid, carry, context) if keep_state else None

    def empty_state(self, batch: int, room: int) -> dict[str, Array]:
        """The forward direction's state before the first position; any number of positions has room in it."""
        return _empty_state(self, batch)

    def flops(self, length: int) -> float:
        """Operations of the recurrence per position, forward, as its definition has them."""
        return 7.0 * self.place.dim * self.head_dim


def _without_padding(x: Array, valid: Array | None) -> Array:
    """Padding must look like the end of the sequence to its neighbour."""
    return x if valid is None else jnp.where(valid[..., None], x, 0)


def _left_to_right(mixer: RWKV7 | BiRWKV7, tokens, state, context: Context | None, keep_state: bool):
    """The output of the operator, and its state or, with a context, its states."""
    start = None if state is None else state["wkv"]
    options: dict[str, Any] = {"initial_state": start, "mild": True, "implementation": mixer.implementation}
    if context is None:
        return wkv7(*tokens, final_state=keep_state, **options)
    return wkv7_blocks(*tokens, block=context.block, **options)


def _state(x, states, valid, carry, context: Context | None):
    """The mixer's state after x; with a context the pair of those before the blocks and that after x."""
    shift = last_valid(x, valid)
    if context is None:
        return {"shift": shift, "wkv": states}
    before = states[:, : context.blocks(x.shape[1])].reshape(-1, *states.shape[2:])
    before = {"shift": before_blocks(x, carry, context), "wkv": before}
    return before, {"shift": shift, "wkv": states[:, -1]}


def _empty_state(mixer: RWKV7 | BiRWKV7, batch: int) -> dict[str, Array]:
    heads = mixer.place.dim // mixer.head_dim
    return {
        "shift": jnp.zeros((batch, mixer.place.dim), mixer.place.dtype),
        "wkv": jnp.zeros((batch, heads, mixer.head_dim, mixer.head_dim), jnp.float32),
    }


class BiRWKV7(nn.Module):
    """Bidirectional RWKV-7 time mix: two directions, merged before one output projection.

    Options (docs/results.md has what their comparison can and cannot decide):
      merge: "gate": 2·(s·y_forward + (1 - s)·y_backward) with s = sigmoid(m0 + tanh(x m1) m2), which starts as the
        sum; "add": the sum.
      share: what the directions have in common: "none"; "projections": W_r, W_k, W_v; "all": every weight ("tied").
      head_dim, lora_ranks (of w, a, v, g), implementation (of `wkv7`), time_mix (that of `token_mixes`, `operands` and
        `finish`).
      a_scale: 1; state tracking may need up to 2. As a has a value for each channel, a step diag(w) - κ (κ·a)' can
        lengthen a state, with 2 by 1.3 times, again and again: on texts longer than those of training it may pass
        float32, and the group norm hides it until then (docs/results.md, regular languages). Nothing is drawn from
        such a network: generation ends with an error.

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
    time_mix: str | None = None

    def __post_init__(self):
        _check_options(self)
        if self.merge not in ("gate", "add"):
            raise ValueError(f'merge must be "gate" or "add", got {self.merge!r}.')
        if self.share not in ("none", "projections", "all"):
            raise ValueError(f'share must be "none", "projections" or "all", got {self.share!r}.')
        super().__post_init__()

    @nn.compact
    def __call__(self, x, v_first=None, *, valid=None, state=None, context=None, keep_state=True):
        _check_first(self.place, v_first)
        forward = _direction(self, "forward")
        backward = forward if self.share == "all" else _direction(self, "backward")
        if self.share == "none":
            kernels = [_projections(self.place, d) for d in ("forward_", "backward_")]
        else:
            kernels = [_projections(self.place)]
        x = _without_padding(x.astype(self.place.dtype), valid)
        v_firsts = (None, None) if v_first is None else v_first
        carry = None if state is None else state["shift"]
        m0, m1, m2 = self._gate() if self.merge == "gate" else (None,) * 3

        if context is None:
            ways = {"previous": forward, "next": backward}
            travels, merged = _travels(self, ways, x, v_firsts, kernels, valid=valid, carry=carry, m1=m1)
            initial = None if state is None else state["wkv"]
            (out, states), (out_b, _) = wkv7_bidirectional(
                travels[0].tokens,
                travels[1].tokens,
                initial_states=(initial, None),
                final_states=(keep_state, False),
                mild=True,
                implementation=self.implementation,
            )
            outs = [out, out_b]
        else:
            ways = {"previous": forward}
            travels, merged = _travels(self, ways, x, v_firsts[:1], kernels[:1], valid=valid, carry=carry, m1=m1)
            out, states = _left_to_right(self, travels[0].tokens, state, context, keep_state)
            outs = [out]
            if not context.causal:
                x_b, valid_b = (None if z is None else by_blocks(z, context.block) for z in (x, valid))
                (way,), _ = _travels(self, {"next": backward}, x_b, v_firsts[1:], kernels[-1:], valid=valid_b)
                options: dict[str, Any] = {"final_state": False, "mild": True, "implementation": self.implementation}
                outs.append(wkv7(*way.tokens, reverse=True, **options)[0])
                travels.append(way)
        merge = (merged, m0, m2) if self.merge == "gate" else None
        y = _conclude(self, [forward, backward][: len(travels)], travels, outs, x.shape, merge)
        v_firsts = *(way.v_first for way in travels), *(None for _ in range(2 - len(travels)))
        state = _state(x, states, valid, carry, context) if keep_state else None
        return y, v_firsts, state

    def empty_state(self, batch: int, room: int) -> dict[str, Array]:
        """The forward direction's state before the first position; any number of positions has room in it."""
        return _empty_state(self, batch)

    def flops(self, length: int) -> float:
        """Operations of the recurrence per position, forward, as its definition has them."""
        return 2 * 7.0 * self.place.dim * self.head_dim

    def _gate(self) -> tuple[Array, Array, Array]:
        """m0, m1 and m2 of the merge's gate."""
        D, rank = self.place.dim, _ranks(self.place.dim, self.lora_ranks)["v"]
        m0 = self.param("m0", partitioned(nn.initializers.zeros_init(), "embed"), (D,))
        m1 = self.param("m1", partitioned(nn.initializers.zeros_init(), "embed", None), (D, rank))
        m2 = self.param("m2", partitioned(orthogonal(0.1), None, "embed"), (rank, D))
        return m0, m1, m2


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
        x = _without_padding(x.astype(self.place.dtype), valid)

        def mu(name, scale):
            return self.param(name, partitioned(constant_vector(scale * initial), "embed"), (D,))

        block = None if context is None else context.sight  # no position sees beyond it
        scales = {"none": {}, "previous": {"x_k": 1.0}, "both": {"x_k": 0.5, "x_k_next": 0.5}}[self.shift]
        mus = [mu(name, scale) for name, scale in scales.items()]
        mixed = channel_shift(x, *mus, carry=state, block=block) if mus else x
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
