"""No noise at all: the network reads a text from left to right and predicts each next token."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffrwkv.diffusion.cross_entropy import cross_entropy
from diffrwkv.diffusion.processes.base import Process, Vocabulary


@dataclasses.dataclass(frozen=True)
class NextToken(Process):
    """The text is shifted right by one, the mask id before its first token, so that every token is scored.

    An autoregressive model has no other use for the mask id. It scores the same tokens as a diffusion objective does,
    and the numbers per token compare.
    """

    causal: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    vocabulary: Vocabulary

    def noise(self, key, x, t, free=None):
        """The tokens before each of x."""
        del key, t, free
        return jnp.concatenate([jnp.full_like(x[:, :1], self.vocabulary.mask_id), x[:, :-1]], axis=1)

    def nats(self, output, x, z, t):
        """-log p(x_i | x before i): exact, so a bound on itself."""
        del z, t
        return cross_entropy(output, x, self.vocabulary.mask_id)
