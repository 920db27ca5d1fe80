"""Random numbers whose rare events are as likely as they should be.

`jax.random.uniform` gives multiples of 2^-23. That is too coarse in two places of a diffusion
model. A position is masked with probability 1 - alpha_t, which a polynomial schedule takes to 1e-9.
And Gumbel noise made from such numbers never exceeds 15.9, so tokens of probability below about
1e-7 are not drawn at all: sampling behaves as if the temperature were lower, and a generative
perplexity looks better than it is (arXiv 2409.02908).
"""

import math

import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array, Law, OneKey, TokenKeys, Tokens

# Drawn where the logits are no law. It is no token of any vocabulary, so that none is taken for one that was drawn.
NO_TOKEN = -1
_BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


def uniform_from_bits(bits: Array) -> Array:
    """The numbers in (0, 1) that 64 random bits stand for, rounded to float32.

    Args:
      bits: uint32 [2, ...]; the high and the low words.

    Returns:
      float32 [...], at least 2^-65 and at most 1 - 2^-24, with 24 significant bits at every
        magnitude.
    """
    high, low = bits.astype(jnp.float32)
    return jnp.minimum(high * 2.0**-32 + (low + 0.5) * 2.0**-64, _BELOW_ONE)


def uniform(key: OneKey, shape: tuple[int, ...] = ()) -> Array:
    """Uniform float32 in (0, 1), exact near 0: P(u < p) = p within a rounding of p, for any p above
    1e-18.

    Args:
      key: one key of `jax.random.key`.
      shape: the shape of the result.
    """
    # Flat, because XLA's time to compile threefry grows with the rank.
    bits = jax.random.bits(key, (2 * math.prod(shape),), jnp.uint32)
    return uniform_from_bits(bits.reshape(2, *shape))


def gumbel_from_uniform(u: Array) -> Array:
    """Standard Gumbel noise from uniforms that are fine near 0: the upper tail reaches 45, not
    15.9.

    The usual -log(-log(u)) takes its large values from u near 1, where float32 is coarse. 1 - u is
    as uniform as u.
    """
    return -jnp.log(-jnp.log1p(-u))


def categorical(key: OneKey, logits: Array) -> Array:
    """One draw per row with probabilities softmax(logits), exact down to probabilities of 1e-18.

    Args:
      key: one key of `jax.random.key`.
      logits: float32 [..., V]; -inf for a token that must never be drawn. Each row needs one finite
        entry.

    Returns:
      int32 [...]; NO_TOKEN for a row that is no law, see `likeliest`.
    """
    return likeliest(logits + gumbel_from_uniform(uniform(key, logits.shape)))


def likeliest(logits: Array) -> Array:
    """The token of the largest logit: int32 [...] from float32 [..., V].

    NO_TOKEN for a row whose largest is not finite, which is no law: a NaN is in it, or nothing in it can be drawn.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), best, NO_TOKEN)


def draw_law(keys: TokenKeys, law: Law) -> Tokens:
    """A token of each position's law: int32 [B, L] from key array [B, L] and logits float32 [B, L, V]."""
    flat = jax.vmap(categorical)(keys.reshape(-1), law.reshape(-1, law.shape[-1]))
    return flat.reshape(keys.shape)
