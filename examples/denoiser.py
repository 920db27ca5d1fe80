"""A Denoiser, trained with optax in a loop of one's own."""

import jax
import jax.numpy as jnp
import optax

from diffrwkv import MDLM, Denoiser

x = (7 * jnp.arange(8)[:, None] + jnp.arange(64)) % 49  # int32 [8, 64], clean tokens; id 49 is the mask
model, objective, optimizer = Denoiser(vocab_size=50, dim=64, num_layers=2), MDLM(mask_id=49), optax.adam(3e-3)
params = model.init(jax.random.key(0), x)
state = optimizer.init(params)


def loss_fn(params, key):
    time_key, noise_key = jax.random.split(key)
    t = objective.times(time_key, *x.shape)  # float32 [8]
    loss = objective.loss(lambda z, t: model.apply(params, z, t), noise_key, x, t)
    return loss.nats.sum() / loss.tokens.sum()  # nats per token


@jax.jit
def step(params, state, key):
    loss, gradient = jax.value_and_grad(loss_fn)(params, key)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss


losses = []
for i in range(50):
    params, state, loss = step(params, state, jax.random.key(i))
    losses.append(float(loss))
logits = model.apply(params, x.at[:, 10].set(49))  # float32 [8, 64, 50]
print("the loss falls:", losses[-1] < losses[0] / 2)
print("logits:", logits.shape, logits.dtype)
