"""The WKV-7 recurrence alone: no network, no parameters."""

import jax
import jax.numpy as jnp

from diffrwkv import wkv7

B, T, H, K = 2, 100, 3, 64
keys = jax.random.split(jax.random.key(0), 6)
r, k, v = (jax.random.normal(key, (B, T, H, K)) for key in keys[:3])
kappa = jax.random.normal(keys[3], (B, T, H, K))
kappa /= jnp.linalg.norm(kappa, axis=-1, keepdims=True)
rate = jax.nn.sigmoid(jax.random.normal(keys[4], (B, T, H, K)))
log_w = -0.6 * jax.nn.sigmoid(jax.random.normal(keys[5], (B, T, H, K)))  # the log of the decay, at most 0
inputs = (r, log_w, k, v, -kappa, kappa * rate)

out, state = wkv7(*inputs)
print("out:", out.shape, "state:", state.shape)

# The state goes from one stretch of a sequence to the next.
_, half = wkv7(*(x[:, :37] for x in inputs))
rest, _ = wkv7(*(x[:, 37:] for x in inputs), initial_state=half)
print("in two stretches the same:", bool(jnp.allclose(rest, out[:, 37:], atol=1e-4)))

backwards, _ = wkv7(*inputs, reverse=True)  # from the last token to the first
gradient = jax.grad(lambda v: wkv7(r, log_w, k, v, -kappa, kappa * rate)[0].sum())(v)
print("backwards:", backwards.shape, "gradient:", gradient.shape)
