"""Layouts: how a text is cut into parts that are noised, each at a time of its own."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array, OneKey, PartTimes, PerToken, Tokens, TokenTimes
from diffrwkv.checks import BLOCK_OR_ALL, COUNT_OR_NONE, as_tuple, check_flag


class Layout(abc.ABC):
    """What an objective asks of a layout. Subclasses are frozen dataclasses of options."""

    keep_first: bool = False  # the first token of a text is given: never noised, and not counted

    @property
    def forms(self) -> tuple["Layout", ...]:
        """Layouts of one shape each, of which a training step takes one; the first is that of validation."""
        return (self,)

    def form(self, key: OneKey, step: Array) -> Array:
        """Which of `forms` the training step with this number takes, int32; all equally often, unless told otherwise.

        Args:
          key: of the step.
          step: how many steps were taken before it, int32.
        """
        del step
        return jax.random.randint(key, (), 0, len(self.forms))

    @abc.abstractmethod
    def parts(self, length: int) -> int:
        """N, how many parts a text of `length` tokens has."""

    @abc.abstractmethod
    def times(self, t: Array, n: int, length: int) -> PartTimes:
        """The times of n texts, from those of all their parts, float32 [n N]: as `Objective.times` returns them."""

    @abc.abstractmethod
    def of_tokens(self, t: PartTimes, length: int) -> TokenTimes:
        """The times of a text's tokens, [B, L] or [B, 1], from those of `times`."""

    def network(self, x: Tokens) -> dict[str, Any]:
        """What a network is told beside z and t: keyword arguments of the `denoise` of `Objective.loss`."""
        del x
        return {}

    @abc.abstractmethod
    def sums(self, token_nats: PerToken) -> Array:
        """The nats of each part [B, N], from those of tokens [B, L]."""


@dataclasses.dataclass(frozen=True)
class Whole(Layout):
    """The whole text is one part: one time for all of its tokens."""

    def parts(self, length):
        return 1

    def times(self, t, n, length):
        """float32 [n]."""
        return t

    def of_tokens(self, t, length):
        return t[:, None]

    def sums(self, token_nats):
        return token_nats.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Blocks(Layout):
    """Block diffusion (BD3-LM, arXiv 2503.09573, section 3): each block is noised given the clean ones before it.

    With blocks as long as the text it is `Whole`, with masked blocks of one token it is autoregressive. The network is
    told the clean text too, and must show a block nothing of what follows it.

    Attributes:
      sizes: tokens in a block; 0 for the whole text. Several: each training step takes one of them, so that one network
        can be used with each; the first is what validation and sampling take unless told otherwise.
      begins: for each of the sizes how many steps are taken before training goes over to it: sizes (32, 4, 1) that
        begin at (400, 200, 0) make blocks of 1 for 200 steps, of 4 for 200 more, and of 32 from then on. Empty: a step
        draws its size.
      causal_context: whether a clean token sees those before it alone (then the state after a text does not depend on
        how it was cut), or the rest of its block as well, as in BD3-LM.
      keep_first: the first token (BOS) is given: never noised, and not counted.
    """

    sizes: tuple[int, ...] = (16,)
    causal_context: bool = True
    keep_first: bool = False
    begins: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("causal_context", "keep_first"):
            check_flag(name, getattr(self, name))
        object.__setattr__(self, "sizes", as_tuple("sizes", self.sizes))
        if not self.sizes:
            raise ValueError("sizes must be the lengths of blocks, 0 for the whole text, got none.")
        for size in self.sizes:
            BLOCK_OR_ALL.check("sizes must be the lengths of blocks, 0 for the whole text: each", size)
        object.__setattr__(self, "begins", as_tuple("begins", self.begins))
        for step in self.begins:
            COUNT_OR_NONE.check("begins must be numbers of steps: each", step)
        if self.begins and (
            len(self.begins) != len(self.sizes) or len(set(self.begins)) < len(self.begins) or min(self.begins)
        ):
            raise ValueError(
                f"begins must say for each of the sizes {self.sizes} after how many steps it is taken, one of them "
                f"after 0 and no two after as many, got {self.begins}."
            )

    @property
    def forms(self):
        return tuple(dataclasses.replace(self, sizes=(size,), begins=()) for size in self.sizes)

    def form(self, key, step):
        if not self.begins:
            return super().form(key, step)
        return jnp.argmax(jnp.where(jnp.array(self.begins) <= step, jnp.array(self.begins), -1))

    def block(self, length):
        """Tokens in a block of a text of this length, an int: of the first of `sizes`."""
        return min(self.sizes[0] or length, length)

    def parts(self, length):
        return -(-length // self.block(length))

    def times(self, t, n, length):
        """float32 [n, ceil(length / block)]."""
        return t.reshape(n, -1)

    def of_tokens(self, t, length):
        return jnp.repeat(t, self.block(length), axis=1)[:, :length]

    def network(self, x):
        """{"clean": x, "block": int, "causal_context": bool}: a block is predicted from z there and x before it."""
        return {"clean": x, "block": self.block(x.shape[1]), "causal_context": self.causal_context}

    def sums(self, token_nats):
        batch, length = token_nats.shape
        block = self.block(length)
        padded = jnp.pad(token_nats, ((0, 0), (0, -length % block)))
        return padded.reshape(batch, -1, block).sum(axis=-1)


LAYOUTS = {"blocks": Blocks, "whole": Whole}
