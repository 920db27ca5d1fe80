"""The Transformer's feed-forward block, as MDLM has it (`models/dit.py`, DDiTBlock.mlp)."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn

from diffrwkv.layers import Projection, hidden_width, torch_uniform
from diffrwkv.mixers.place import Place


class MLP(nn.Module):
    """W_down gelu(W_up x + b_up) + b_down with the tanh form of GELU; sees one position at a time.

    `(x [B, L, D], *, valid, state, context) -> (y [B, L, D], None)`.
    """

    causal: ClassVar[bool] = True
    zero_output: ClassVar[bool] = False

    place: Place
    expansion: float = 4.0

    def __post_init__(self):
        hidden_width(self.expansion, self.place.dim)
        super().__post_init__()

    @nn.compact
    def __call__(self, x, *, valid=None, state=None, context=None):
        del valid, state
        width = hidden_width(self.expansion, self.place.dim)
        up, down = torch_uniform(self.place.dim), torch_uniform(width)
        h = Projection(width, up, ("embed", "mlp"), self.place.dtype, bias_init=up, name="up")(x)
        h = nn.gelu(h, approximate=True)
        y = Projection(self.place.dim, down, ("mlp", "embed"), self.place.dtype, bias_init=down, name="down")(h)
        return y, None if context is None else (None, None)

    def empty_state(self, batch: int, room: int) -> None:
        """Nothing is carried."""
        return None
