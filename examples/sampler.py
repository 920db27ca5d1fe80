"""Samplers with a denoise_fn of one's own: any function (z, t) -> logits."""

import jax
import jax.numpy as jnp

from diffrwkv import MDLM, Ancestral, Confidence, sequence_keys

process = MDLM(mask_id=26).process  # the letters and a mask


def denoise(z, t):
    """z int32 [B, L], t float32 [B] -> float32 [B, L, 27]: the letter after the one on the left, if that is known."""
    left = jnp.pad(z, ((0, 0), (1, 0)), constant_values=26)[:, :-1]
    return jnp.where((left < 26)[..., None], 20 * jax.nn.one_hot((left + 1) % 26, 27), 0)


def text(tokens):
    return "".join(chr(97 + i) for i in tokens.tolist())


canvas = jnp.full((2, 10), 26).at[:, 0].set(jnp.array([0, 7]))  # the mask where a token is wanted; a and h are given
for sampler in (Ancestral(num_steps=16), Confidence(num_steps=9, block=10)):

    @jax.jit
    def generate(keys, canvas, sampler=sampler):
        return sampler(process, denoise, keys, canvas)

    done = generate(sequence_keys(0, 2), canvas)
    print(type(sampler).__name__, done.tokens.shape, done.passes.shape, text(done.tokens[0]), text(done.tokens[1]))
