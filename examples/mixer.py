"""The bidirectional RWKV-7 mixer in a Flax module of one's own."""

import flax.linen as nn
import jax

from diffrwkv import BiRWKV7, Place


class Layer(nn.Module):
    """One layer: the place of a mixer needs its width alone. Where texts are padded on the right, `valid` says so."""

    @nn.compact
    def __call__(self, x, valid=None):  # [B, L, D], bool [B, L] or None
        y, _, _ = BiRWKV7(Place(x.shape[-1]))(nn.LayerNorm()(x), valid=valid, keep_state=False)
        return x + y


class Layers(nn.Module):
    """Several: RWKV-7 begins otherwise at each depth, and the first layer's values go to all later ones."""

    num_layers: int = 2

    @nn.compact
    def __call__(self, x):
        v_first = None
        for i in range(self.num_layers):
            mixer = BiRWKV7(Place(x.shape[-1], layer=i, num_layers=self.num_layers, first=i == 0), head_dim=32)
            y, v_first, _ = mixer(nn.LayerNorm()(x), v_first, keep_state=False)
            x = x + y
        return x


x = jax.random.normal(jax.random.key(0), (2, 100, 64))  # [B, L, D]
for model in (Layer(), Layers()):
    y, params = jax.jit(model.init_with_output)(jax.random.key(1), x)
    print(type(model).__name__ + ":", y.shape, y.dtype)
