"""The public operator: its contract, the checks, and which form runs where."""

import jax
import jax.numpy as jnp

from pallas_kernels.wkv7.chunked import wkv7_associative, wkv7_chunked
from pallas_kernels.wkv7.reference import wkv7_reference

IMPLEMENTATIONS = ("reference", "chunked", "associative")


def wkv7(
    r,
    log_w,
    k,
    v,
    a,
    b,
    *,
    initial_state=None,
    reverse=False,
    implementation=None,
    chunk_size=None,
):
    """The WKV-7 recurrence, with a matrix-valued state per head (arXiv 2503.14456, section 3).

        S_t = diag(exp(log_w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    o_t = S_t^T r_t

    RWKV-7 calls it with a = -kappa_hat and b = kappa_hat * iclr. A token with
    log_w = k = v = a = b = 0 leaves the state alone.

    Args:
      r, log_w, k, a, b: [B, T, H, K], float32 or bfloat16. log_w is the log of the decay, <= 0.
      v: [B, T, H, V], float32 or bfloat16.
      initial_state: [B, H, K, V]; None is zeros.
      reverse: run from the last token to the first; the final state is then the one after token 0.
      implementation: "reference", "chunked", or None: chosen for the platform at lowering.
      chunk_size: tokens per chunk, a power of two; None is the measured best.

    Returns:
      out [B, T, H, V] in v's dtype and final_state [B, H, K, V] in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, T = 0, an unknown implementation, a chunk_size
        that is no power of two.
    """
    inputs = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    _check(inputs, initial_state, implementation, chunk_size)
    batch, _, heads, key = inputs["r"].shape
    if initial_state is None:
        state = jnp.zeros((batch, heads, key, inputs["v"].shape[-1]), jnp.float32)
    else:
        state = jnp.asarray(initial_state).astype(jnp.float32)
    if implementation == "reference":
        return wkv7_reference(*inputs.values(), state, reverse)
    if implementation == "chunked":
        return wkv7_chunked(*inputs.values(), state, reverse, chunk_size or 16)
    if implementation == "associative":
        return wkv7_associative(*inputs.values(), state, reverse, chunk_size or 64)
    return jax.lax.platform_dependent(
        *inputs.values(),
        state,
        cpu=lambda *x: wkv7_chunked(*x, reverse, chunk_size or 16),
        default=lambda *x: wkv7_associative(*x, reverse, chunk_size or 64),
    )


def _check(inputs, initial_state, implementation, chunk_size):
    for name, x in inputs.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"wkv7 needs floating inputs, but {name} is {x.dtype}; cast it first.")
        if x.ndim != 4:
            raise ValueError(f"wkv7 needs [B, T, H, K] inputs, but {name} has shape {x.shape}.")
    shape = inputs["r"].shape
    for name, x in inputs.items():
        if (x.shape[:3] if name == "v" else x.shape) != (shape[:3] if name == "v" else shape):
            raise ValueError(
                f"wkv7 needs r, log_w, k, a, b of one shape [B, T, H, K] and v [B, T, H, V], but r "
                f"has {shape} and {name} has {x.shape}."
            )
    if shape[1] == 0:
        raise ValueError("wkv7 needs at least one token, but T is 0; skip the call instead.")
    if initial_state is not None:
        expected = (shape[0], shape[2], shape[3], inputs["v"].shape[3])
        if jnp.shape(initial_state) != expected:
            raise ValueError(
                f"wkv7 needs an initial_state of shape [B, H, K, V] = {expected}, but it has "
                f"{jnp.shape(initial_state)}."
            )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"wkv7 has no implementation {implementation!r}; choose None or one of {', '.join(IMPLEMENTATIONS)}."
        )
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"wkv7 needs a chunk_size that is a power of two, not {chunk_size}.")
