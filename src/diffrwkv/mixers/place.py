"""Where a module stands in the denoiser: what every mixer and channel mixer is built with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffrwkv.array_types import DType
from diffrwkv.checks import WIDTH


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer's place in the denoiser, or in a network of one's own: `Place(dim)` is that of a single layer.

    Attributes:
      dim: D, the width of the residual stream.
      layer: the layer's number, from 0: an int, or a traced integer under nn.scan.
      num_layers: of the network; RWKV-7 begins otherwise at each depth.
      first: no layer before this one has its mixer: it gives what the others share.
      dtype: of activations.

    Raises ValueError for a width that is none.
    """

    dim: int
    layer: Any = 0
    num_layers: int = 1
    first: bool = True
    dtype: DType = jnp.float32

    def __post_init__(self):
        WIDTH.check("dim", self.dim)
