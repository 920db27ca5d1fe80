"""How a text is cut into blocks of positions, and what stands before each of them: block diffusion's helpers."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffrwkv.array_types import Array
from diffrwkv.layers import previous_token


@dataclasses.dataclass(frozen=True)
class Context:
    """How a stretch is read as what stands *before* others, so that none of its states knows what follows.

    A mixer that is called with one returns, as its state, the pair (before, after): the states before each of the N
    blocks, their batch and N as one axis [B N, ...], and the one after the last position [B, ...].

    Attributes:
      block: positions in a block; divides the stretch.
      causal: a position sees itself and those before it; else it sees the rest of its block too, as in BD3-LM.
      beyond: one more block stands behind the last position, and `before` holds the state before that one too.
    """

    block: int
    causal: bool = True
    beyond: bool = False

    @property
    def sight(self) -> int:
        """Positions are in blocks of so many, whose members see each other."""
        return 1 if self.causal else self.block

    def blocks(self, length: int) -> int:
        """N, how many blocks have a state before them, of a stretch of `length` positions."""
        return length // self.block + self.beyond


def pad(x: Array | None, length: int) -> Array | None:
    """[B, L, ...] with zeros (False) on the right up to `length`; None stays."""
    return None if x is None else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def by_blocks(x: Array, block: int) -> Array:
    """[B, L, ...] -> [B L / block, block, ...]."""
    return x.reshape(-1, block, *x.shape[2:])


def before_blocks(x: Array, carry: Array | None, context: Context) -> Array:
    """The features right before each of N blocks. [B, L, D], `carry` [B, D] or None (zeros) -> [B N, D]."""
    ends = jnp.pad(x[:, context.block - 1 :: context.block], ((0, 0), (0, 1), (0, 0)))
    return previous_token(ends, carry)[:, : context.blocks(x.shape[1])].reshape(-1, x.shape[-1])
