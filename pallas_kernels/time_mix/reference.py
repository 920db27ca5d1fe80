"""The definitions of what stands around WKV-7 in RWKV-7's time mix; JAX differentiates them.

Every fast form is held to these, outputs and gradients.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.time_mix.low_rank import values

DECAY_FLOOR = -math.exp(-0.5)  # the least log decay of a step: w > 0.545, so products over a chunk stay in range
KEY_FLOOR = 1e-12  # the least length that a key is divided by
NORM_EPSILON = 64e-5


def previous(x, carry=None):
    """x_{t-1} at position t. [B, T, D] -> [B, T, D]; position 0 gets `carry` [B, D], or zero."""
    first = jnp.zeros_like(x[:, :1]) if carry is None else carry[:, None].astype(x.dtype)
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def following(x, block=None):
    """x_{t+1} at position t. [B, T, D] -> [B, T, D]; the last position, or the last of each block, gets zero."""
    y = x if block is None else x.reshape(-1, block, x.shape[-1])
    return jnp.concatenate([y[:, 1:], jnp.zeros_like(y[:, :1])], axis=1).reshape(x.shape)


def token_mixes_reference(x, mu, carry, sides):
    """As `token_mixes`."""
    near = {"previous": lambda: previous(x, carry), "next": lambda: following(x)}
    mu = mu.astype(x.dtype)
    return tuple(tuple(x + (near[side]() - x) * m[s] for s, side in enumerate(sides)) for m in mu)


def channel_shift_reference(x, mu_previous, mu_next, carry, block):
    """As `channel_shift`."""
    y = x + (previous(x, carry) - x) * mu_previous.astype(x.dtype)
    return y if mu_next is None else y + (following(x, block) - x) * mu_next.astype(x.dtype)


def operands_reference(k, v, raw, blend, vectors, valid, head_dim, a_scale):
    """As `operands`; blend: (v_first, v0) or None."""
    w, a, *gate = values(raw)
    w0, a0, k_k, k_a = vectors
    dtype = v.dtype
    heads = (*k.shape[:2], -1, head_dim)
    w, k, a = (x.astype(jnp.float32) for x in (w, k, a))
    log_w = DECAY_FLOOR * jax.nn.sigmoid(w0 + w)
    rate = a_scale * jax.nn.sigmoid(a0 + a)
    kappa = (k * k_k).reshape(heads)
    # Dividing by `jnp.linalg.norm` has a NaN gradient at a zero key, which a masked sequence can produce.
    kappa = kappa * jax.lax.rsqrt(jnp.maximum(jnp.sum(kappa * kappa, -1, keepdims=True), KEY_FLOOR**2))
    k = k * (1 + (rate - 1) * k_a)
    if blend is not None:
        v_first, v0 = blend
        v = v.astype(jnp.float32)
        v = v + (v_first.astype(jnp.float32) - v) * jax.nn.sigmoid(v0 + gate[0].astype(jnp.float32))
    results = log_w, k.astype(dtype), v.astype(dtype), (-kappa).astype(dtype), kappa * rate.reshape(heads)
    results = [x.reshape(heads) for x in results]
    results[-1] = results[-1].astype(dtype)
    if valid is not None:
        results = [jnp.where(valid[:, :, None, None], x, 0) for x in results]
    return tuple(results)


def finish_reference(sides, vectors, merge):
    """As `finish`; merge: (raw gate, m0) or None."""
    done = []
    for (out, r, k, v, gate), (r_k, scale, bias) in zip(sides, vectors, strict=True):
        (gate,) = values(gate)
        o, r, k, v = (x.astype(jnp.float32) for x in (out, r, k, v))
        o = o - jnp.mean(o, -1, keepdims=True)
        o = o * jax.lax.rsqrt(jnp.mean(o * o, -1, keepdims=True) + NORM_EPSILON)
        bonus = jnp.sum(r * k * r_k.reshape(r.shape[2:]), -1, keepdims=True) * v
        y = o.reshape(gate.shape) * scale + bias + bonus.reshape(gate.shape)
        done.append(y * gate.astype(jnp.float32))
    dtype = gate.dtype
    if merge is None:
        return sum(done).astype(dtype)
    raw, m0 = merge
    (raw,) = values(raw)
    share = jax.nn.sigmoid(m0 + raw.astype(jnp.float32))
    y = share * done[0] + ((1 - share) * done[1] if len(done) > 1 else 0)
    return (2 * y).astype(dtype)
