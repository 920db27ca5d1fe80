"""The mixers: what lets a position see others. To add one: one file, one line here.

A mixer is a Linen module built as `Mixer(place, **options)`, its place in the denoiser a `place.Place`, and called as
`(x [B, L, D], shared, *, valid, state, context, keep_state) -> (y [B, L, D], shared, state)`. `shared` is what the
first layer that has this mixer hands to the later ones (None going into it); `state` is what a layer carries from one
stretch of a sequence to the next (None: from the start; None comes back where `keep_state` is False). With a `context`
(blocks.Context) the stretch is read as what stands before others, block by block, and the state is a pair. Beside that
it has
  - `causal`, whether a position sees no later one, and `zero_output`, whether its output is zero at initialisation;
  - `empty_state(batch, room)`: the state before the first position, with room for so many positions;
  - `memory`, where a state has one that sums up all positions before: its key, else None or left out;
  - `flops(length)`: what its operator needs per position, beyond its matrices.
It multiplies a parameter named `kernel` in `place.dtype` and in no other: samplers cast it to that before
(`denoiser.cast_matrices`).
A channel mixer is built as `ChannelMixer(place, **options)`, called without `shared` and `keep_state`, and has the same
but `flops`.
"""

import flax.linen as nn

from diffrwkv.mixers.attention import Attention, CausalAttention
from diffrwkv.mixers.mamba2 import BiMamba2, Mamba2
from diffrwkv.mixers.mlp import MLP
from diffrwkv.mixers.place import Place
from diffrwkv.mixers.rwkv7 import RWKV7, BiRWKV7, ChannelMix

MIXERS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "bimamba2": BiMamba2,
    "birwkv7": BiRWKV7,
    "causal_attention": CausalAttention,
    "mamba2": Mamba2,
    "rwkv7": RWKV7,
}

CHANNEL_MIXERS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "rwkv7": ChannelMix,
}

__all__ = [
    "CHANNEL_MIXERS",
    "MIXERS",
    "MLP",
    "RWKV7",
    "Attention",
    "BiMamba2",
    "BiRWKV7",
    "CausalAttention",
    "ChannelMix",
    "Mamba2",
    "Place",
]
