"""Where a module stands in the denoiser: what every mixer and channel mixer is built with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffrwkv.array_types import DType


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer's place in the denoiser.

    Attributes:
      dim: D, the width of the residual stream.
      layer: the layer's number, from 0: an int, or a traced integer under nn.scan.
      num_layers: of the denoiser.
      first: no layer before this one has its mixer.
      dtype: of activations.
    """

    dim: int
    layer: Any
    num_layers: int
    first: bool
    dtype: DType = jnp.float32
