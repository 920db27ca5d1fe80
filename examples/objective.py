"""An objective alone, of a network that is any function (z, t) -> logits."""

import jax
import jax.numpy as jnp

from diffrwkv import MDLM, OBJECTIVES, Blocks

x = jax.random.randint(jax.random.key(0), (256, 500), 0, 49)  # int32 [B, L], clean tokens; id 49 is the mask


def knows_nothing(z, t, **cut):
    """z int32 [B, L], t float32 -> float32 [B, L, 50]: any token is as likely as another."""
    return jnp.zeros((*z.shape, 50))


def nats_per_token(objective):
    time_key, noise_key = jax.random.split(jax.random.key(1))
    t = objective.times(time_key, *x.shape)  # [B], or [B, N] where a text has N parts
    loss = objective.loss(knows_nothing, noise_key, x, t)
    return float(loss.nats.sum() / loss.tokens.sum())


print(f"log 49 = {jnp.log(49.0):.1f}")
print(f"masks: {nats_per_token(MDLM(mask_id=49)):.1f}")
print(f"masks in blocks of 16: {nats_per_token(MDLM(mask_id=49, layout=Blocks((16,)))):.1f}")
print(f"uniform noise: {nats_per_token(OBJECTIVES['udlm'](mask_id=49)):.1f}")
