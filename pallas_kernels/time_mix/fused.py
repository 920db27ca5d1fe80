"""Backward passes by hand of the pieces around WKV-7, from their inputs alone; pure jnp.

A backward pass recomputes what is elementwise. Written so, each is few passes over memory for XLA, on a CPU and on an
accelerator: JAX's own would keep some ten arrays more of the width, and add up a gradient of x for each mix. kernels.py
joins them to the forward passes; the channel mix's shift has no kernel and is whole here.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.time_mix.low_rank import values
from pallas_kernels.time_mix.reference import (
    DECAY_FLOOR,
    KEY_FLOOR,
    NORM_EPSILON,
    channel_shift_reference,
    following,
    previous,
)


def _total(x, dtype):
    """The sum over all axes but the last, in float32: of a vector's cotangents."""
    return jnp.sum(x.astype(jnp.float32), tuple(range(x.ndim - 1))).astype(dtype)


# Token shift.


def _preceding(x, block):
    """The transpose of `following`."""
    return previous(x if block is None else x.reshape(-1, block, x.shape[-1])).reshape(x.shape)


def token_mixes_backward(x, mu, carry, d, sides):
    """The cotangents of x, mu and carry."""
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    mus = f32(mu.astype(x.dtype))
    d_x, d_mu, d_carry = 0, [], 0
    for s, side in enumerate(sides):
        # Sums of terms, not over axes: XLA on a CPU reduces leading axes at a tenth of the speed of memory.
        d_near = sum(f32(d[i][s]) * mus[i, s] for i in range(len(mu)))
        d_x = d_x + sum(f32(d[i][s]) for i in range(len(mu))) - d_near
        if side == "previous":
            near, back = previous(x, carry), following(d_near)
            d_carry = d_carry + d_near[:, :1]
        else:
            near, back = following(x), previous(d_near)
        d_x = d_x + back
        d_mu.append(jnp.stack([_total(f32(d[i][s]) * f32(near - x), mu.dtype) for i in range(len(mu))]))
    return d_x.astype(x.dtype), jnp.stack(d_mu, 1), None if carry is None else d_carry[:, 0].astype(carry.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def channel_shift_fused(x, mu_previous, mu_next, carry, block):
    """As `channel_shift`."""
    return channel_shift_reference(x, mu_previous, mu_next, carry, block)


def _channel_shift_forward(*arguments):
    return channel_shift_reference(*arguments), arguments[:4]


def _channel_shift_backward(block, kept, d):
    x, mu_previous, mu_next, carry = kept
    one = mu_previous.astype(x.dtype)
    both = one if mu_next is None else one + mu_next.astype(x.dtype)
    d_x = d * (1 - both) + following(d * one)
    d_next = None
    if mu_next is not None:
        d_x = d_x + _preceding(d * mu_next.astype(x.dtype), block)
        d_next = _total(d * (following(x, block) - x), mu_next.dtype)
    d_previous = _total(d * (previous(x, carry) - x), mu_previous.dtype)
    d_carry = None if carry is None else (d[:, 0] * one).astype(carry.dtype)
    return d_x, d_previous, d_next, d_carry


channel_shift_fused.defvjp(_channel_shift_forward, _channel_shift_backward)


# The operator's inputs.


def operands_backward(k, v, raw, blend, vectors, valid, cotangents, head_dim, a_scale):
    """The cotangents of k, v, the values of raw, blend and vectors."""
    raws = values(raw)
    w, a, *gate = raws
    w0, a0, k_k, k_a = vectors
    if valid is not None:
        cotangents = [jnp.where(valid[:, :, None, None], x, 0) for x in cotangents]
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    heads = (*k.shape[:-1], -1, head_dim)
    d_log_w, d_key, d_value, d_minus_kappa, d_b = (f32(x).reshape(k.shape) for x in cotangents)
    k_ = f32(k)
    shrunk = jax.nn.sigmoid(w0 + f32(w))
    rate = jax.nn.sigmoid(a0 + f32(a))
    long = (k_ * k_k).reshape(heads)
    square = jnp.sum(long * long, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.maximum(square, KEY_FLOOR**2))
    kappa = (long * scale).reshape(k.shape)
    given = (d_b * (a_scale * rate) - d_minus_kappa).reshape(heads)
    along = jnp.sum(given * long, -1, keepdims=True) * jnp.where(square > KEY_FLOOR**2, scale * scale, 0)
    d_long = (scale * (given - long * along)).reshape(k.shape)
    moved = d_key * k_
    d_a = (d_b * kappa + moved * k_a) * (a_scale * rate * (1 - rate))
    d_w = d_log_w * (DECAY_FLOOR * shrunk * (1 - shrunk))
    d_k = d_long * k_k + d_key * (1 + (a_scale * rate - 1) * k_a)
    terms = d_w, d_a, d_long * k_, moved * (a_scale * rate - 1)
    d_vectors = tuple(_total(x, p.dtype) for x, p in zip(terms, vectors, strict=True))
    d_blend, d_raw = None, [d_w, d_a]
    if blend is not None:
        v_first, v0 = blend
        share = jax.nn.sigmoid(v0 + f32(gate[0]))
        d_gate = d_value * (f32(v_first) - f32(v)) * (share * (1 - share))
        d_blend = (d_value * share).astype(v_first.dtype), _total(d_gate, v0.dtype)
        d_raw.append(d_gate)
        d_value = d_value * (1 - share)
    d_raw = tuple(x.astype(old.dtype) for x, old in zip(d_raw, raws, strict=True))
    return d_k.astype(k.dtype), d_value.astype(v.dtype), d_raw, d_blend, d_vectors


# The finish.


def finish_backward(sides, vectors, merge, d):
    """The cotangents of sides and merge, of their gates those of the values, and of vectors."""
    d = d.astype(jnp.float32)
    d_merge, shares = None, (1.0,) * len(sides)
    if merge is not None:
        raw, m0 = merge
        (raw,) = values(raw)
        share = jax.nn.sigmoid(m0 + raw.astype(jnp.float32))
        shares = 2 * share, 2 * (1 - share)
        signed = 0
    d_sides, d_vectors = [], []
    for i, ((out, r, k, v, gate), (r_k, scale, bias)) in enumerate(zip(sides, vectors, strict=True)):
        (gate,) = values(gate)
        flat = gate.shape
        o, r_, k_, v_ = (x.astype(jnp.float32) for x in (out, r, k, v))
        gate_ = gate.astype(jnp.float32)
        o = o - jnp.mean(o, -1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(o * o, -1, keepdims=True) + NORM_EPSILON)
        o = o * inverse
        taste = r_k.reshape(r.shape[2:])
        bonus = jnp.sum(r_ * k_ * taste, -1, keepdims=True)
        y = o.reshape(flat) * scale + bias + (bonus * v_).reshape(flat)
        mine = d * shares[i]
        if merge is not None:
            signed = signed + (y * gate_ if i == 0 else -(y * gate_))
        d_y = mine * gate_
        d_heads = d_y.reshape(out.shape)
        d_bonus = jnp.sum(d_heads * v_, -1, keepdims=True)
        d_o = (d_y * scale).reshape(out.shape)
        d_out = d_o - jnp.mean(d_o, -1, keepdims=True) - o * jnp.mean(d_o * o, -1, keepdims=True)
        pulled = d_out * inverse, d_bonus * k_ * taste, d_bonus * r_ * taste, d_heads * bonus, mine * y
        like = out, r, k, v, gate
        d_sides.append(tuple(x.astype(old.dtype) for x, old in zip(pulled, like, strict=True)))
        d_vectors.append(
            (
                _total((d_bonus * r_ * k_).reshape(flat), r_k.dtype),
                _total(d_y * o.reshape(flat), scale.dtype),
                _total(d_y, bias.dtype),
            )
        )
    if merge is not None:
        d_raw = d * signed * (2 * share * (1 - share))
        d_merge = d_raw.astype(raw.dtype), _total(d_raw, m0.dtype)
    return tuple(d_sides), tuple(d_vectors), d_merge
