"""Masked blocks of one token, each given all before it: the likelihood itself, by the chain rule."""

import dataclasses

import jax.numpy as jnp

from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.objectives.base import Objective
from diffrwkv.diffusion.processes import Masked
from diffrwkv.diffusion.schedules import Linear


@dataclasses.dataclass(frozen=True)
class ChainRule(Objective):
    """To evaluate with, not to train: at t = 1 every token is masked and weighs 1, and nothing is left to chance.

    For a network that is not told the time; then the bound of blocks of one token is -log p (BD3-LM, arXiv 2503.09573,
    section 3, and its code's `eval_nll`).
    """

    process: Masked
    layout: Blocks = Blocks((1,))

    def __post_init__(self):
        if type(self.process) is not Masked or self.process.output != "mean":
            raise TypeError("ChainRule needs masks, and a network that predicts the clean token.")
        if self.layout.sizes != (1,):
            raise ValueError(f"ChainRule needs blocks of 1 token, not {self.layout}.")
        object.__setattr__(self, "process", dataclasses.replace(self.process, schedule=Linear()))

    def times(self, key, n, length, state=None):
        """float32 [n, length]: 1."""
        del key, state
        return jnp.ones((n, length))
