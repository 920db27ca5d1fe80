"""What the kernels compute of a tile: some tokens of some channels, float32, whole heads where heads matter.

A `Plan` is a program over arrays [B, T, D], some of which may be second halves of low-rank maps (low_rank.py) that the
kernel multiplies where it reads them: every token by itself or with its neighbours, every head by itself, and
sums over all tokens of a sequence. pallas_tpu.py and pallas_gpu.py both run any plan, each as its machine likes it:
every array is read once and written once. The formulas are those of reference.py and fused.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.time_mix.low_rank import LowRank
from pallas_kernels.time_mix.reference import DECAY_FLOOR, KEY_FLOOR, NORM_EPSILON


class Plan(NamedTuple):
    """What selects a program.

    Attributes:
      body: (tiles, near, vectors, head_mean) -> (results, terms): lists of tiles [R, N]. `vectors` are [1, N]; a call
        of head_mean gives the mean over each head, [R, N] or what spreads to it. `terms` are summed over tokens.
      near: (by, of, what): what(tiles of the arrays `of`, vectors) of the tokens `by` = ±1 further on, and zero where
        there are none.
      results: the dtypes of the arrays that are written.
      terms: how many sums.
      head_dim: channels of a head; 0 where heads do not matter.
      name: of the kernel.
    """

    body: Callable[..., tuple[Any, Any]]
    near: tuple[tuple[int, tuple[int, ...], Callable[..., Any]], ...]
    results: tuple[Any, ...]
    terms: int
    head_dim: int
    name: str


def unfolded(tokens):
    """Splits a program's tokens, arrays or LowRank, into what a launch takes.

    Returns:
      (the arrays [B, T, D] or [B, T, 1], the hidden [B, T, N], the ups [R, D], readers). A reader tells of a tile where
      it comes from: the number of an array, or (hidden's number, up's number, start, R).
    """
    arrays: list[Any] = []
    hiddens: list[Any] = []
    ups: list[Any] = []
    readers: list[Any] = []
    for x in tokens:
        if isinstance(x, LowRank):
            for up, spec in zip(x.ups, x.specs(), strict=True):
                readers.append((len(hiddens), len(ups), *spec))
                ups.append(up)
            hiddens.append(x.hidden)
        else:
            readers.append(len(arrays))
            arrays.append(x)
    return arrays, hiddens, ups, readers


def multiplied(hidden, up):
    """float32 hidden up of tiles [R, M], [M, N], in hidden's dtype."""
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    return jnp.dot(hidden, up.astype(hidden.dtype), preferred_element_type=jnp.float32, precision=precision)


def estimate(arrays, outputs):
    """What XLA is told of a launch: that each array is read or written once."""
    everything = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *outputs))
    operations = 8 * sum(math.prod(x.shape) for x in (*arrays, *outputs))
    return pl.CostEstimate(flops=operations, transcendentals=0, bytes_accessed=everything)


BY = {"previous": -1, "next": 1}


def _itself(tiles, vectors):
    del vectors
    return tiles[0]


def _token_mixes(tiles, near, vectors, head_mean):
    del head_mean
    (x,) = tiles
    ways = len(near)
    return [x + (near[i % ways] - x) * mu for i, mu in enumerate(vectors)], []


@functools.cache
def token_mixes_plan(sides, count, dtype):
    """tokens: x; vectors: mu [count·S] -> the mixes, count·S."""
    near = tuple((BY[side], (0,), _itself) for side in sides)
    return Plan(_token_mixes, near, (dtype,) * (count * len(sides)), 0, 0, "time_mix_token_mixes_forward")


def _given(tiles, vectors, *, side, ways):
    """What a token gives to its neighbour on a side."""
    return sum(d * mu for d, mu in zip(tiles, vectors[side::ways], strict=True))


def _token_mixes_backward(tiles, near, vectors, head_mean):
    del head_mean
    x, *d = tiles
    ways = len(near) // 2
    d_x = sum(y * (1 - mu) for y, mu in zip(d, vectors, strict=True)) + sum(near[ways:])
    return [d_x], [y * (near[i % ways] - x) for i, y in enumerate(d)]


@functools.cache
def token_mixes_backward_plan(sides, count, dtype):
    """tokens: x, and the cotangents of the mixes; vectors: mu -> d_x; terms: d_mu."""
    ways = len(sides)
    near = [(BY[side], (0,), _itself) for side in sides]
    for s, side in enumerate(sides):
        given = functools.partial(_given, side=s, ways=ways)
        near.append((-BY[side], tuple(range(1 + s, 1 + count * ways, ways)), given))
    return Plan(_token_mixes_backward, tuple(near), (dtype,), count * ways, 0, "time_mix_token_mixes_backward")


def _operands(tiles, near, vectors, head_mean, *, head_dim, a_scale, blended, masked):
    del near
    if masked:
        *tiles, keep = tiles
    k, v, w, a, *blend = tiles
    w0, a0, k_k, k_a, *v0 = vectors
    rate = a_scale * jax.nn.sigmoid(a0 + a)
    kappa = k * k_k
    kappa = kappa * jax.lax.rsqrt(jnp.maximum(head_dim * head_mean(kappa * kappa), KEY_FLOOR**2))
    if blended:
        gate, first = blend
        v = v + (first - v) * jax.nn.sigmoid(v0[0] + gate)
    results = [DECAY_FLOOR * jax.nn.sigmoid(w0 + w), k * (1 + (rate - 1) * k_a), v, -kappa, kappa * rate]
    return [jnp.where(keep != 0, x, 0) for x in results] if masked else results, []


@functools.cache
def operands_plan(dtype, head_dim, a_scale, blended, masked):
    """tokens: k, v, w, a (, gate, v_first); vectors: w0, a0, k_k, k_a (, v0) -> log_w, key, value, -kappa, b."""
    body = functools.partial(_operands, head_dim=head_dim, a_scale=a_scale, blended=blended, masked=masked)
    return Plan(body, (), (jnp.float32, *(dtype,) * 4), 0, head_dim, "time_mix_operands_forward")


def _operands_backward(tiles, near, vectors, head_mean, *, head_dim, a_scale, blended, masked):
    del near
    if masked:
        *tiles, keep = tiles
    cotangents = tiles[-5:]
    if masked:
        cotangents = [jnp.where(keep != 0, x, 0) for x in cotangents]
    d_log_w, d_key, d_value, d_minus_kappa, d_b = cotangents
    k, v, w, a, *blend = tiles[:-5]
    w0, a0, k_k, k_a, *v0 = vectors
    shrunk, rate = jax.nn.sigmoid(w0 + w), jax.nn.sigmoid(a0 + a)
    raw = k * k_k
    square = head_dim * head_mean(raw * raw)
    scale = jax.lax.rsqrt(jnp.maximum(square, KEY_FLOOR**2))
    given = d_b * (a_scale * rate) - d_minus_kappa
    along = head_dim * head_mean(given * raw) * jnp.where(square > KEY_FLOOR**2, scale * scale, 0)
    d_raw = scale * (given - raw * along)
    moved = d_key * k
    d_a = (d_b * (raw * scale) + moved * k_a) * (a_scale * rate * (1 - rate))
    d_w = d_log_w * (DECAY_FLOOR * shrunk * (1 - shrunk))
    d_k = d_raw * k_k + d_key * (1 + (a_scale * rate - 1) * k_a)
    terms = [d_w, d_a, d_raw * k, moved * (a_scale * rate - 1)]
    if not blended:
        return [d_k, d_value, d_w, d_a], terms
    gate, first = blend
    share = jax.nn.sigmoid(v0[0] + gate)
    d_gate = d_value * (first - v) * (share * (1 - share))
    return [d_k, d_value * (1 - share), d_w, d_a, d_gate, d_value * share], [*terms, d_gate]


@functools.cache
def operands_backward_plan(dtypes, head_dim, a_scale, blended, masked):
    """tokens: of operands_plan, then the cotangents of its results, then valid if masked -> cotangents of both."""
    body = functools.partial(_operands_backward, head_dim=head_dim, a_scale=a_scale, blended=blended, masked=masked)
    return Plan(body, (), tuple(dtypes), 5 if blended else 4, head_dim, "time_mix_operands_backward")


def _side(out, r, k, v, r_k, scale, bias, head_mean, head_dim):
    """What a side is before its gate; the normalised out, 1 / its deviation and the bonus that v gets."""
    out = out - head_mean(out)
    inverse = jax.lax.rsqrt(head_mean(out * out) + NORM_EPSILON)
    out = out * inverse
    bonus = head_dim * head_mean(r * k * r_k)
    return out * scale + bias + bonus * v, out, inverse, bonus


def _finish(tiles, near, vectors, head_mean, *, head_dim, ways, gated):
    del near
    done = []
    for i in range(ways):
        *given, gate = tiles[5 * i : 5 * i + 5]
        done.append(_side(*given, *vectors[3 * i : 3 * i + 3], head_mean, head_dim)[0] * gate)
    if not gated:
        return [sum(done)], []
    share = jax.nn.sigmoid(vectors[-1] + tiles[-1])
    return [2 * (share * done[0] + ((1 - share) * done[1] if ways > 1 else 0))], []


@functools.cache
def finish_plan(dtype, head_dim, ways, gated):
    """tokens: out, r, k, v, gate of each side (, raw); vectors: r_k, scale, bias of each (, m0) -> y."""
    body = functools.partial(_finish, head_dim=head_dim, ways=ways, gated=gated)
    return Plan(body, (), (dtype,), 0, head_dim, "time_mix_finish_forward")


def _finish_backward(tiles, near, vectors, head_mean, *, head_dim, ways, gated):
    del near
    *tiles, d = tiles
    shares = (1.0,) * ways
    if gated:
        share = jax.nn.sigmoid(vectors[-1] + tiles[-1])
        shares = 2 * share, 2 * (1 - share)
    results, terms, difference = [], [], 0
    for i in range(ways):
        out, r, k, v, gate = tiles[5 * i : 5 * i + 5]
        r_k, scale, bias = vectors[3 * i : 3 * i + 3]
        y, out, inverse, bonus = _side(out, r, k, v, r_k, scale, bias, head_mean, head_dim)
        difference = difference + (y * gate if i == 0 else -(y * gate))
        mine = d * shares[i]
        d_y = mine * gate
        d_bonus = head_dim * head_mean(d_y * v)
        d_out = d_y * scale
        d_out = (d_out - head_mean(d_out) - out * head_mean(d_out * out)) * inverse
        results += [d_out, d_bonus * k * r_k, d_bonus * r * r_k, d_y * bonus, mine * y]
        terms += [d_bonus * r * k, d_y * out, d_y]
    if gated:
        d_raw = d * difference * (2 * share * (1 - share))
        results, terms = [*results, d_raw], [*terms, d_raw]
    return results, terms


@functools.cache
def finish_backward_plan(dtypes, head_dim, ways, gated):
    """tokens: of finish_plan, then the cotangent of y -> the cotangents of those of finish_plan, and of the vectors."""
    body = functools.partial(_finish_backward, head_dim=head_dim, ways=ways, gated=gated)
    return Plan(body, (), tuple(dtypes), 3 * ways + gated, head_dim, "time_mix_finish_backward")
