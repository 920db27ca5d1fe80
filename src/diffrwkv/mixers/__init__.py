"""The mixers: what lets a position see others. To add one: one file, one line here.

A mixer is a Linen module built as `Mixer(dim, layer, num_layers, first, dtype, **options)` and called as
`(x [B, L, D], shared, *, valid, state) -> (y [B, L, D], shared, state)`: `shared` is what the first layer hands to the
later ones (None going into the first), `state` what the layer carries from one stretch of a sequence to the next (None:
from the start).
"""

from diffrwkv.mixers.rwkv7 import RWKV7, BiRWKV7, ChannelMix

MIXERS = {
    "birwkv7": BiRWKV7,
    "rwkv7": RWKV7,
}

CHANNEL_MIXERS = {
    "rwkv7": ChannelMix,
}

__all__ = ["CHANNEL_MIXERS", "MIXERS", "RWKV7", "BiRWKV7", "ChannelMix"]
