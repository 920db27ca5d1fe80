"""The public operator: its contract, the checks, and which form runs where."""

import jax
import jax.numpy as jnp

from pallas_kernels.choices import check_choices
from pallas_kernels.wkv7.chunked import wkv7_associative, wkv7_chunked
from pallas_kernels.wkv7.reference import wkv7_reference

IMPLEMENTATIONS = ("reference", "chunked", "associative")
CHUNK_SIZES = (2, 4, 8, 16, 32, 64)
DTYPES = (jnp.float32, jnp.bfloat16)


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

    The state, the sums and the products are float32 whatever the inputs are. Differentiable in
    reverse mode, also under jit, vmap, scan and remat; "reference" in forward mode too.

    Args:
      r, log_w, k, a, b: [B, T, H, K], float32 or bfloat16. log_w <= 0 is the log of the decay; the
        chunked forms need its sum over one chunk to stay above -80 (RWKV-7's is above -0.607 a
        token), so give faster decays a smaller chunk_size.
      v: [B, T, H, V], float32 or bfloat16.
      initial_state: [B, H, K, V], float32; None is zeros.
      reverse: run from the last token to the first; final_state is then the one after token 0.
      implementation: "reference", one token after another, the definition; "chunked", one chunk
        after another; "associative", all chunks at once and an associative scan over their states.
        None takes the measured best where the program is lowered: "chunked" on CPU, "associative"
        elsewhere.
      chunk_size: tokens per chunk, a power of two from 2 to 64; None is 16 for "chunked" and 64
        for "associative".

    Returns:
      out [B, T, H, V] in v's dtype and final_state [B, H, K, V] in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, T = 0, an implementation that does not exist or
        a chunk_size that it cannot take.
    """
    inputs = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
    _check(inputs, initial_state, reverse, implementation, chunk_size)
    batch, _, heads, key = inputs["r"].shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key, inputs["v"].shape[-1]))
    state = initial_state.astype(jnp.float32)
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


def _check(inputs, initial_state, reverse, implementation, chunk_size):
    for name, x in inputs.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"wkv7 takes float32 or bfloat16, but {name} is {x.dtype}; cast it first.")
        if x.ndim != 4:
            raise ValueError(f"wkv7 needs [B, T, H, K] inputs, but {name} has the shape {x.shape}; reshape it.")
    shape = inputs["r"].shape
    for name, x in inputs.items():
        if x.shape[:3] != shape[:3] or (name != "v" and x.shape != shape):
            raise ValueError(
                "wkv7 needs r, log_w, k, a, b of one shape [B, T, H, K] and v [B, T, H, V], but "
                f"r has {shape} and {name} has {x.shape}; make them agree."
            )
    if shape[1] == 0:
        raise ValueError("wkv7 needs at least one token, but T is 0; leave the call out instead.")
    if initial_state is not None:
        expected = (shape[0], shape[2], shape[3], inputs["v"].shape[3])
        if initial_state.shape != expected or initial_state.dtype not in DTYPES:
            raise ValueError(
                f"wkv7 needs an initial_state [B, H, K, V] = {expected} of float32, but it is "
                f"{initial_state.dtype} {initial_state.shape}; reshape or cast it."
            )
    check_choices("wkv7", reverse, implementation, chunk_size, IMPLEMENTATIONS, CHUNK_SIZES)
