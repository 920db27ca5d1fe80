"""The definition of SSD: one token after another.

Slow and obviously right. Every other form is held to this one, outputs and gradients.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Decays, Grouped, Inputs, InputState, InputStates
from pallas_kernels.choices import block_after_block


def ssd_reference(
    x: Inputs, log_a: Decays, b: Grouped, c: Grouped, initial_state: InputState, reverse: bool = False
) -> tuple[Inputs, InputState]:
    """Runs the recurrence of Mamba-2 (arXiv 2405.21060, section 2) token by token.

        h_t = exp(log_a_t) h_{t-1} + x_t b_t^T,    y_t = h_t c_t

    Args:
      x: [B, T, H, P].
      log_a: [B, T, H].
      b, c: [B, T, G, N]; head h takes those of group h // (H / G).
      initial_state: [B, H, P, N] float32.
      reverse: run from the last token to the first.

    Returns:
      y [B, T, H, P] in x's dtype, and the state after the last token taken, [B, H, P, N] float32.
    """
    dtype, heads, groups = x.dtype, x.shape[2], b.shape[2]

    def step(state, token):
        x, log_a, b, c = (z.astype(jnp.float32) for z in token)
        b, c = (jnp.repeat(z, heads // groups, axis=1) for z in (b, c))
        state = jnp.exp(log_a)[..., None, None] * state + x[..., None] * b[..., None, :]
        y = jnp.einsum("bhpn,bhn->bhp", state, c, precision="highest")
        return state, y.astype(dtype)

    tokens = tuple(jnp.moveaxis(z, 1, 0) for z in (x, log_a, b, c))
    state, y = jax.lax.scan(step, initial_state, tokens, reverse=reverse)
    return jnp.moveaxis(y, 0, 1), state


def ssd_blocks_reference(
    x: Inputs, log_a: Decays, b: Grouped, c: Grouped, initial_state: InputState, block: int
) -> tuple[Inputs, InputStates]:
    """`ssd_reference` block after block: as ssd_blocks."""
    return block_after_block(ssd_reference, (x, log_a, b, c), initial_state, block)
