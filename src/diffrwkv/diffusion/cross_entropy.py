"""-log softmax(logits)[x], the mask left out: the one loss that most objectives are made of."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits, x, mask_id):
    """-log softmax(logits)[x] with the mask left out of the softmax.

    Keeps only the logits for the backward pass and writes one [..., V] array there, the gradient
    itself: at GPT-2's vocabulary the softmax that autodiff would keep is the largest array of a
    training step. Reverse mode only.

    Args:
      logits: float [..., V]; computed in float32 whatever the dtype.
      x: int32 [...], tokens. At x = mask_id the result is finite and means nothing.
      mask_id: the mask's token, a Python int.

    Returns:
      float32 [...], nats.
    """
    return _forward(logits, x, mask_id)[0]


def _tokens(logits):
    """The token that each of the logits [..., V] is for, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _without_mask(logits, mask_id):
    return jnp.where(_tokens(logits) == mask_id, -jnp.inf, logits.astype(jnp.float32))


def _forward(logits, x, mask_id):
    log_normaliser = jax.nn.logsumexp(_without_mask(logits, mask_id), axis=-1)
    chosen = jnp.take_along_axis(logits, x[..., None], axis=-1)[..., 0].astype(jnp.float32)
    return log_normaliser - chosen, (logits, x, log_normaliser)


def _backward(mask_id, kept, cotangent):
    logits, x, log_normaliser = kept
    probabilities = jnp.exp(_without_mask(logits, mask_id) - log_normaliser[..., None])
    target = _tokens(logits) == x[..., None]
    gradient = cotangent[..., None] * (probabilities - target.astype(jnp.float32))
    return gradient.astype(logits.dtype), None


cross_entropy.defvjp(_forward, _backward)
