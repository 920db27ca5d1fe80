"""The definition of WKV-7: one token after another.

Slow and obviously right. Every other form is held to this one, outputs and gradients.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Keys, KeyValueState, KeyValueStates, Values
from pallas_kernels.choices import block_after_block


def wkv7_reference(
    r: Keys, log_w: Keys, k: Keys, v: Values, a: Keys, b: Keys, initial_state: KeyValueState, reverse: bool = False
) -> tuple[Values, KeyValueState]:
    """Runs the recurrence of RWKV-7 (arXiv 2503.14456, section 3) token by token.

        S_t = diag(exp(log_w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    o_t = S_t^T r_t

    Args:
      r, log_w, k, a, b: [B, T, H, K].
      v: [B, T, H, V].
      initial_state: [B, H, K, V] float32.
      reverse: run from the last token to the first.

    Returns:
      out [B, T, H, V] in v's dtype, and the state after the last token taken, [B, H, K, V] float32.
    """
    dtype = v.dtype

    def step(state, token):
        r, log_w, k, v, a, b = (x.astype(jnp.float32) for x in token)
        read = jnp.einsum("bhk,bhkv->bhv", a, state, precision="highest")
        state = jnp.exp(log_w)[..., None] * state + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
        out = jnp.einsum("bhk,bhkv->bhv", r, state, precision="highest")
        return state, out.astype(dtype)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (r, log_w, k, v, a, b))
    state, out = jax.lax.scan(step, initial_state, tokens, reverse=reverse)
    return jnp.moveaxis(out, 0, 1), state


def wkv7_blocks_reference(
    r: Keys, log_w: Keys, k: Keys, v: Values, a: Keys, b: Keys, initial_state: KeyValueState, block: int
) -> tuple[Values, KeyValueStates]:
    """`wkv7_reference` block after block: as wkv7_blocks."""
    return block_after_block(wkv7_reference, (r, log_w, k, v, a, b), initial_state, block)
