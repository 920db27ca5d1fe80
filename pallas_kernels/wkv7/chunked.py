"""WKV-7 by chunks of C tokens, as matrix products; pure jnp.

Inside a chunk that starts from the state S0, with g the running sum of log_w (this token counted)
and ge the one before this token, the reads y_i = a_i^T S_{i-1} solve a triangular system:

    P = [r e^{g-m}; a e^{ge-m}] [k e^{m-g}; b e^{m-g}]^T,  m = gC / 2 keeps both factors in range
    Ark, Arb = tril(P[:C]),  Aak, Aab = strict tril(P[C:])
    (I - Aab) Y = (a e^{ge}) S0 + Aak v
    O = (r e^g) S0 + Ark v + Arb Y
    S' = diag(e^{gC}) S0 + (k e^{gC-g})^T v + (b e^{gC-g})^T Y

The reverse direction is the same with the sums run from the right and upper triangles.
(I - Aab)^{-1} comes from merging blocks, never from the Neumann product, whose powers overflow when
many keys of a chunk are the same, which is what a masked sequence looks like.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

matmul = functools.partial(jnp.matmul, precision="highest")


def _triangles(size, reverse):
    """The masks j <= i and j < i (j >= i and j > i in reverse), bool [C, C]."""
    ones = np.ones((size, size), bool)
    if reverse:
        return np.triu(ones), np.triu(ones, 1)
    return np.tril(ones), np.tril(ones, -1)


def _unit_inverse(strict):
    """(I - strict)^{-1} of strictly triangular [..., C, C] by merging blocks of 1, 2, 4, ... rows."""
    size = strict.shape[-1]
    index = np.arange(size)
    inverse = jnp.eye(size, dtype=strict.dtype)
    width = 1
    while width < size:
        block = index // width
        pair = index // (2 * width)
        across = (block[:, None] != block[None]) & (pair[:, None] == pair[None])
        part = jnp.where(across, strict, 0)
        inverse = inverse + matmul(matmul(inverse, part), inverse) if width > 1 else inverse + part
        width *= 2
    return inverse


def _to_chunks(x, size):
    """[B, T, H, D] -> float32 [N, B, H, C, D]; T is padded with zeros, which change no state."""
    batch, length, heads, depth = x.shape
    count = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    return x.reshape(batch, count, size, heads, depth).transpose(1, 0, 3, 2, 4)


def _from_chunks(x, length):
    """[N, B, H, C, D] -> [B, T, H, D]."""
    count, batch, heads, size, depth = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, depth)[:, :length]


def _chunk(state, r, log_w, k, v, a, b, reverse):
    """One chunk from the state [..., K, V]; returns the next state and the outputs [..., C, V]."""
    size = r.shape[-2]
    upto, before = _triangles(size, reverse)
    g = jax.lax.cumsum(log_w, axis=log_w.ndim - 2, reverse=reverse)
    total = jnp.sum(log_w, axis=-2, keepdims=True)
    middle = jax.lax.stop_gradient(0.5 * total)
    queries = jnp.concatenate([r * jnp.exp(g - middle), a * jnp.exp(g - log_w - middle)], -2)
    undo = jnp.exp(middle - g)
    keys = jnp.concatenate([k * undo, b * undo], -2)
    pairs = matmul(queries, jnp.swapaxes(keys, -1, -2))
    pairs = jnp.where(np.block([[upto, upto], [before, before]]), pairs, 0)
    from_state = matmul(queries * jnp.exp(middle), state)
    from_value = matmul(pairs[..., :size], v)
    rhs = from_state[..., size:, :] + from_value[..., size:, :]
    read = matmul(_unit_inverse(pairs[..., size:, size:]), rhs)
    out = (
        from_state[..., :size, :]
        + from_value[..., :size, :]
        + matmul(pairs[..., :size, size:], read)
    )
    written = jnp.swapaxes(keys * jnp.exp(total - middle), -1, -2)
    state = jnp.exp(jnp.swapaxes(total, -1, -2)) * state
    state = state + matmul(written, jnp.concatenate([v, read], -2))
    return state, out


def wkv7_chunked(r, log_w, k, v, a, b, initial_state, reverse=False, chunk_size=16):
    """A checkpointed scan over chunks: what trains fastest on CPU. Shapes as in wkv7."""
    length, dtype = r.shape[1], v.dtype
    size = min(chunk_size, 1 << (length - 1).bit_length())

    @jax.checkpoint
    def step(state, chunk):
        state, out = _chunk(state, *(x.astype(jnp.float32) for x in chunk), reverse)
        return state, out.astype(dtype)

    chunks = tuple(_to_chunks(x, size) for x in (r, log_w, k, v, a, b))
    state, out = jax.lax.scan(step, initial_state, chunks, reverse=reverse)
    return _from_chunks(out, length), state
