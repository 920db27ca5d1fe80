"""Softmax attention with rotary positions: MDLM's (DiT), and causal with a cache of keys and values.

Source: MDLM (arXiv 2406.07524), `models/dit.py`: one projection to q, k, v without bias, rotary positions (arXiv
2104.09864; base 10,000, the two halves of a head rotated against each other, the whole head), an output projection
without bias. What stands around it (adaLN-zero, norms without bias) is the denoiser's `block="dit"`.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array
from diffrwkv.checks import ROTARY_BASE, WIDTH
from diffrwkv.layers import Projection, torch_uniform
from diffrwkv.mixers.place import Place

IMPLEMENTATIONS = ("xla", "blocked", "cudnn", "splash")
QUERY_BLOCK = 128
SPLASH_BLOCK = 128  # TPU splash attention takes multiples of this length


def rotary(x: Array, positions: Array, base: float = 10_000.0) -> Array:
    """Rotary positions. x [B, L, H, K] with K even, positions [L] or [B, L] -> x's shape and dtype; angles float32."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [(B,) L, 1, K/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.named_scope("attention")  # for profilers
def attend(
    q: Array, k: Array, v: Array, *, sight: int | None, counts: Array | None, implementation: str | None
) -> Array:
    """softmax(q kᵀ / sqrt(K)) v, softmax in float32: [B, L, H, K] each -> [B, L, H, K].

    Args:
      sight: None: every position sees all. Otherwise positions are in blocks of so many, and see their own block and
        those before it (BD3-LM, arXiv 2503.09573); 1 is causal.
      counts: int32 [B], how many keys from the left are real; None: all.
      implementation: "xla", `jax.nn.dot_product_attention`; "blocked", block after block of queries, so that memory
        grows with L and not with its square; "cudnn", flash attention of an NVIDIA GPU, for 16-bit inputs; "splash",
        flash attention of a TPU, for lengths that are multiples of 128 without padding, and a sight of None or 1. None:
        "cudnn" or "splash" where it can run, "blocked" on a CPU, else "xla". Splash attention is chosen on a single
        chip only, as a Pallas call is not partitioned by itself.

    Raises ValueError for an implementation that does not exist or cannot take these inputs.
    """
    length = q.shape[1]
    half_precision = q.dtype in (jnp.bfloat16, jnp.float16)
    can_splash = length % SPLASH_BLOCK == 0 and counts is None and sight in (None, 1)
    if implementation is None:
        if jax.default_backend() == "gpu" and half_precision:
            return _fused(q, k, v, sight, counts, "cudnn")
        forms = {
            "cpu": functools.partial(_blocked, sight=sight, counts=counts),
            "default": functools.partial(_fused, sight=sight, counts=counts, implementation="xla"),
        }
        if can_splash and jax.device_count() == 1:
            forms["tpu"] = functools.partial(_splash, sight=sight)
        return jax.lax.platform_dependent(q, k, v, **forms)
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention has no implementation {implementation!r}; choose None or one of {names}.")
    if implementation == "splash":
        if not can_splash:
            raise ValueError(
                f"splash attention needs a length that {SPLASH_BLOCK} divides, no padding and no blocks, got L = "
                f"{length}{' with padding' if counts is not None else ''}: choose implementation 'xla'."
            )
        return _splash(q, k, v, sight)
    if implementation == "cudnn" and not half_precision:
        raise ValueError(f"cudnn attention takes bfloat16 or float16, got {q.dtype}: set config.model.dtype=bfloat16.")
    if implementation == "blocked":
        return _blocked(q, k, v, sight, counts)
    return _fused(q, k, v, sight, counts, implementation)


def _last_seen(positions: Array, sight: int) -> Array:
    """The last position that each of `positions` sees."""
    return positions // sight * sight + sight - 1


def _fused(q, k, v, sight, counts, implementation):
    mask = None
    if sight is not None and sight > 1:
        positions = jnp.arange(q.shape[1])
        mask = (positions <= _last_seen(positions, sight)[:, None])[None, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=sight == 1, key_value_seq_lengths=counts, implementation=implementation
    )


def _blocked(q, k, v, sight, counts):
    """Twice as fast as XLA's own on a CPU, and without an array of L x L, forward or backward."""
    B, L, H, K = q.shape
    size = min(QUERY_BLOCK, L)
    blocks = -(-L // size)
    q = jnp.pad(q * K**-0.5, ((0, 0), (0, blocks * size - L), (0, 0), (0, 0)))
    q = q.reshape(B, blocks, size, H, K).transpose(1, 0, 3, 2, 4)  # [blocks, B, H, size, K]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    keys = jnp.arange(L)
    real = None if counts is None else keys < counts[:, None, None, None]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(start_and_queries):
        start, queries = start_and_queries
        scores = jnp.einsum("bhik,bhjk->bhij", queries, k, preferred_element_type=jnp.float32)
        if sight is not None:
            scores = jnp.where(keys <= _last_seen(start + jnp.arange(size), sight)[:, None], scores, -jnp.inf)
        if real is not None:
            scores = jnp.where(real, scores, -jnp.inf)
        # A row without any key gives 0, as nothing may depend on it.
        top = jnp.maximum(jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)), jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - top)
        total = jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        out = jnp.einsum("bhij,bhjk->bhik", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / total).astype(v.dtype)

    out = jax.lax.map(block, (size * jnp.arange(blocks), q))
    return out.transpose(1, 0, 3, 2, 4).reshape(B, blocks * size, H, K)[:, :L]


def attend_behind(
    q: Array, k: Array, v: Array, cache: dict[str, Array], *, sight: int | None, counts: Array | None
) -> Array:
    """Stretches that stand behind a cache: each sees the first `length` positions of it, and itself.

    Several stretches may share a cache, as all noised blocks of block diffusion share that of the clean text. Memory
    grows with their length times that of the cache, in tiles of 128 queries.

    Args:
      q, k, v: [B N, L, H, K], N stretches for each row of the cache.
      cache: {"key", "value": [B, M, H, K], "length": int32 [B N]}.
      sight: inside a stretch, as in `attend`.
      counts: int32 [B N], how many positions of a stretch are real; None: all.

    Returns:
      [B N, L, H, K].
    """
    (rows, L, H, K), B = q.shape, cache["key"].shape[0]
    N = rows // B
    tile = min(N, max(1, QUERY_BLOCK // L))
    tiles = -(-N // tile)
    keys, values = (cache[name].swapaxes(1, 2)[:, :, None] for name in ("key", "value"))  # [B, H, 1, M, K]
    positions = jnp.arange(L)
    within = None if sight is None else positions <= _last_seen(positions, sight)[:, None]  # [L, L]

    def split(x):  # [B N, ...] -> [tiles, B, tile, ...]
        x = x.reshape(B, N, *x.shape[1:])
        x = jnp.pad(x, ((0, 0), (0, tiles * tile - N), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, tiles, tile, *x.shape[2:]).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_tile(part):
        queries, k, v, length, counts = part
        queries, k, v = (x.transpose(0, 3, 1, 2, 4) for x in (queries, k, v))  # [B, H, tile, L, K]
        # All queries of a tile in one product with the cache, which would be copied for each stretch otherwise.
        before = jnp.matmul(queries.reshape(B, H, 1, tile * L, K), keys.mT, preferred_element_type=jnp.float32)
        length = jnp.repeat(length, L, axis=1)[:, None, None, :, None]  # [B, 1, 1, tile L, 1]
        before = jnp.where(jnp.arange(keys.shape[3]) < length, before, -jnp.inf)
        own = jnp.matmul(queries, k.mT, preferred_element_type=jnp.float32)
        if within is not None:
            own = jnp.where(within, own, -jnp.inf)
        if counts is not None:
            own = jnp.where(positions < counts[:, None, :, None, None], own, -jnp.inf)
        rows = (*own.shape[:-1], 1)
        top = jnp.maximum(before.max(axis=-1, initial=-jnp.inf).reshape(rows), own.max(axis=-1, keepdims=True))
        top = jnp.maximum(jax.lax.stop_gradient(top), jnp.finfo(jnp.float32).min)

        def read(scores, values):
            weights = jnp.exp(scores - top.reshape(*scores.shape[:-1], 1))
            out = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            return out.reshape(*rows[:-1], K), weights.sum(axis=-1).reshape(rows)

        (out, total), (own_out, own_total) = read(before, values), read(own, v)
        out = (out + own_out) / jnp.maximum(total + own_total, jnp.finfo(jnp.float32).tiny)
        return out.astype(v.dtype).transpose(0, 2, 3, 1, 4)

    parts = (split(q * K**-0.5), split(k), split(v), split(cache["length"]), None if counts is None else split(counts))
    out = jax.lax.map(one_tile, parts) if tiles > 1 else one_tile(jax.tree.map(lambda x: x[0], parts))[None]
    return out.swapaxes(0, 1).reshape(B, tiles * tile, L, H, K)[:, :N].reshape(q.shape)


def _splash(q, k, v, sight):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads, width = q.shape[1:]
    mask = (splash_attention_mask.CausalMask if sight == 1 else splash_attention_mask.FullMask)((length, length))
    masks = splash_attention_mask.MultiHeadMask([mask] * heads)
    kernel = splash_attention_kernel.make_splash_mha(masks, head_shards=1, q_seq_shards=1)
    q, k, v = (x.swapaxes(1, 2) for x in (q * width**-0.5, k, v))  # [B, H, L, K]
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2).astype(v.dtype)


class Attention(nn.Module):
    """Attention of every position to every position: MDLM's mixer.

    `(x [B, L, D], shared, *, valid, state, context) -> (y [B, L, D], shared, state)`. `state` is a cache
    `{"key", "value": [B, M, H, K], "length": int32 [B]}`: a stretch with a state also sees the `length` positions
    before it, and is written behind them. The cache has a fixed size: `empty_state(batch, room)` makes one with room
    for M = room positions, a call without a state returns one that is full (M = L). A stretch for which there is no
    room gives NaN. Rotary positions go on over stretches. The states before the blocks of a context are one cache with
    a length for each block, [B N]; stretches [B N, L, D] behind those are not written, and return no state. Neither are
    those with a cache that says where they stand, `{..., "position": int32 [B]}`, as of all positions but theirs.

    Options: head_dim (even), rotary_base, implementation (of `attend`).
    """

    causal: ClassVar[bool] = False
    zero_output: ClassVar[bool] = False  # is its output zero at initialisation

    place: Place
    head_dim: int = 64
    rotary_base: float = 10_000.0
    implementation: str | None = None

    def __post_init__(self):
        WIDTH.check("head_dim", self.head_dim)
        dim = self.place.dim
        if self.head_dim % 2 or dim % self.head_dim:
            raise ValueError(f"attention needs an even head_dim that divides dim = {dim}, got {self.head_dim}.")
        ROTARY_BASE.check("rotary_base", self.rotary_base)
        super().__post_init__()

    @nn.compact
    def __call__(self, x, shared=None, *, valid=None, state=None, context=None, keep_state=True):
        B, L, D = x.shape
        heads = (B, L, D // self.head_dim, self.head_dim)
        qkv = Projection(3 * D, torch_uniform(D), ("embed", "heads"), self.place.dtype, name="qkv")(x)
        q, k, v = (y.reshape(heads) for y in jnp.split(qkv, 3, axis=-1))
        counts = None if valid is None else valid.sum(axis=1, dtype=jnp.int32)
        sight = 1 if self.causal else None if context is None else context.sight
        # Right padding is behind every real position already, so a causal mask hides it.
        seen = None if sight == 1 else counts
        start = jnp.zeros(B, jnp.int32) if state is None else state.get("position", state["length"])
        positions = jnp.arange(L) if state is None else start[:, None] + jnp.arange(L)  # one row of angles for all
        q, k = (rotary(y, positions, self.rotary_base) for y in (q, k))
        if state is None:
            y = attend(q, k, v, sight=sight, counts=seen, implementation=self.implementation)
            state = {"key": k, "value": v}
        else:
            y = attend_behind(q, k, v, state, sight=sight, counts=seen)
            y, state = self._write(y, k, v, state)
        if state is not None:
            after = state | {"length": start + (L if counts is None else counts)}
            if context is None:
                state = after
            else:
                blocks = start[:, None] + context.block * jnp.arange(context.blocks(L))
                state = (state | {"length": blocks.reshape(-1)}, after)
        y = Projection(D, torch_uniform(D), ("heads", "embed"), self.place.dtype, name="output")(y.reshape(B, L, D))
        return y, shared, state if keep_state else None

    def _write(self, y, k, v, cache):
        """(y, the cache's keys and values with the stretch behind them); y is NaN where there is no room."""
        L, (rows, room) = k.shape[1], cache["key"].shape[:2]
        if len(y) != rows or "position" in cache:
            return y, None
        if L > room:
            raise ValueError(f"the cache has room for {room} positions and gets {L}: ask empty_state for more room.")
        write = jax.vmap(lambda whole, part, at: jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0))
        key = write(cache["key"], k.astype(cache["key"].dtype), cache["length"])
        value = write(cache["value"], v.astype(cache["value"].dtype), cache["length"])
        overfull = (cache["length"] + L > room)[:, None, None, None]  # the write above was moved to fit
        return jnp.where(overfull, jnp.nan, y), {"key": key, "value": value}

    def empty_state(self, batch: int, room: int) -> dict[str, Array]:
        """A cache of nothing, with room for so many positions."""
        shape = (batch, room, self.place.dim // self.head_dim, self.head_dim)
        return {
            "key": jnp.zeros(shape, self.place.dtype),
            "value": jnp.zeros(shape, self.place.dtype),
            "length": jnp.zeros(batch, jnp.int32),
        }

    def flops(self, length: int) -> float:
        """Operations of the two products per position of a sequence, forward; projections left out."""
        return 4.0 * length * self.place.dim * (0.5 if self.causal else 1.0)


class CausalAttention(Attention):
    """Attention of every position to itself and those before it: the autoregressive Transformer's mixer."""

    causal: ClassVar[bool] = True
