"""The public operator: its contract, the checks, and which form runs where."""

import functools
import logging

import jax
import jax.numpy as jnp

from pallas_kernels import products
from pallas_kernels.array_types import Decays, Grouped, Inputs, InputState, InputStates
from pallas_kernels.choices import check_block, check_choices, known_outside
from pallas_kernels.ssd import pallas_gpu
from pallas_kernels.ssd.chunked import ssd_associative, ssd_blocks_associative, ssd_blocks_chunked, ssd_chunked
from pallas_kernels.ssd.reference import ssd_blocks_reference, ssd_reference

IMPLEMENTATIONS = ("reference", "chunked", "associative", "pallas_gpu")
CHUNK_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
DTYPES = (jnp.float32, jnp.bfloat16)


def ssd(
    x: Inputs,
    log_a: Decays,
    b: Grouped,
    c: Grouped,
    *,
    initial_state: InputState | None = None,
    reverse: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Inputs, InputState]:
    """The recurrence of Mamba-2, "state space duality", with a matrix-valued state per head.

        h_t = exp(log_a_t) h_{t-1} + x_t b_t^T,    y_t = h_t c_t

    Source: arXiv 2405.21060. Mamba-2 calls it with its x times dt and log_a = dt A, and adds D x to
    y itself. A token with x = log_a = 0 leaves the state alone.

    The state, the sums and the products are float32 whatever the inputs are. Differentiable in
    reverse mode, also under jit, vmap, scan and remat.

    Args:
      x: [B, T, H, P], float32 or bfloat16.
      log_a: [B, T, H], float32 or bfloat16; the log of the decay, <= 0, as strong as one likes.
      b, c: [B, T, G, N], float32 or bfloat16. G groups divide the H heads, and head h takes b and c
        of group h // (H / G).
      initial_state: [B, H, P, N], float32; None is zeros.
      reverse: run from the last token to the first; final_state is then the one after token 0.
      implementation: "reference", one token after another, the definition; "chunked", one chunk
        after another; "associative", all chunks at once and an associative scan over their states;
        "pallas_gpu", one kernel forward and two backward, or twice as many where the time axis is
        in parts, for NVIDIA GPUs of compute capability 8 or more. None takes, where the program is
        lowered, "chunked" on CPU, the kernels on such a GPU where they take these shapes and
        dtypes, and "associative" elsewhere.
      chunk_size: tokens per chunk, a power of two from 2 to 256; None is 32 for "chunked" and 64
        for the others. "pallas_gpu" takes 64 only.

    Returns:
      y [B, T, H, P] in x's dtype and final_state [B, H, P, N] in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, T = 0, an implementation that does not exist or run
        here, or a chunk_size that it cannot take. Outside of a trace also log_a > 0 (under one, the state grows).
    """
    inputs = _inputs(x, log_a, b, c, initial_state, reverse, implementation, chunk_size)
    forms = {
        "reference": ssd_reference,
        "chunked": functools.partial(ssd_chunked, chunk_size=chunk_size or 32),
        "associative": functools.partial(_associative, ssd_associative, chunk_size=chunk_size or 64),
        "pallas_gpu": pallas_gpu.ssd_pallas_gpu,
    }
    refusal = _refusal(inputs, chunk_size)
    if implementation == "pallas_gpu" and refusal:
        raise ValueError(f"ssd cannot run 'pallas_gpu' here: {refusal}; choose None or another implementation.")
    return _run(forms, implementation, inputs, kernel=not refusal, reverse=reverse)


def ssd_blocks(
    x: Inputs,
    log_a: Decays,
    b: Grouped,
    c: Grouped,
    *,
    block: int,
    initial_state: InputState | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Inputs, InputStates]:
    """`ssd` from left to right, with the state at every boundary between blocks of tokens.

    Args:
      x, log_a, b, c, initial_state, chunk_size: as in ssd. A block is made of whole chunks, padded where it must be.
      block: tokens in a block; divides T.
      implementation: "reference", "chunked" or "associative", as in ssd; the kernels do not give these states.

    Returns:
      y [B, T, H, P] in x's dtype; and in float32 the states before the blocks and after the last one,
      [B, T / block + 1, H, P, N]. All are differentiable.

    Raises:
      ValueError: as ssd, for a block that does not divide T, and for a kernel.
    """
    inputs = _inputs(x, log_a, b, c, initial_state, False, implementation, chunk_size)
    check_block("ssd_blocks", block, inputs[0].shape[1])
    if implementation == "pallas_gpu":
        raise ValueError("ssd_blocks has no form 'pallas_gpu': choose None, 'chunked' or 'associative'.")
    forms = {
        "reference": ssd_blocks_reference,
        "chunked": functools.partial(ssd_blocks_chunked, chunk_size=chunk_size or 32),
        "associative": functools.partial(_associative, ssd_blocks_associative, chunk_size=chunk_size or 64),
    }
    return _run(forms, implementation, inputs, kernel=False, block=block)


@jax.named_scope("ssd")  # for profilers
def _run(forms, implementation, inputs, *, kernel, **options):
    forms = {name: functools.partial(form, **options) for name, form in forms.items()}
    if implementation is not None:
        return forms[implementation](*inputs)
    on = {"cuda": forms["pallas_gpu"]} if kernel else {}
    return jax.lax.platform_dependent(*inputs, cpu=forms["chunked"], default=forms["associative"], **on)


def _refusal(inputs, chunk_size):
    """Why the kernels do not run in this process, or do not take these inputs; or None."""
    if not products.has_tensor_cores():
        return f"it runs on NVIDIA GPUs of compute capability 8 or more and this process has {jax.default_backend()}"
    if chunk_size not in (None, pallas_gpu.SIZE):
        return f"it takes chunks of {pallas_gpu.SIZE} tokens, not {chunk_size}"
    x, _, b, c, _ = inputs
    reason = pallas_gpu.unsupported(x, b, c)
    _say(reason)
    return reason


@functools.cache
def _say(reason):
    """Once for each reason."""
    chosen = f"associative ({reason})" if reason else "pallas_gpu"
    logging.getLogger(__name__).info("ssd on this process's GPU: %s", chosen)


def _associative(form, x, log_a, b, c, state, **options):
    """`form` with products as the device likes them."""
    return products.by_passes(functools.partial(form, **options), (x, b, c))(x, log_a, b, c, state)


def _inputs(x, log_a, b, c, initial_state, reverse, implementation, chunk_size):
    """The checked arguments as arrays: x, log_a, b, c and the state, zeros for None."""
    inputs = {name: jnp.asarray(z) for name, z in {"x": x, "log_a": log_a, "b": b, "c": c}.items()}
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
    _check(inputs, initial_state, reverse, implementation, chunk_size)
    x, log_a, b, c = inputs.values()
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[-1]))
    return x, log_a, b, c, initial_state.astype(jnp.float32)


def _check(inputs, initial_state, reverse, implementation, chunk_size):
    layouts = {"x": "[B, T, H, P]", "log_a": "[B, T, H]", "b": "[B, T, G, N]", "c": "[B, T, G, N]"}
    for name, z in inputs.items():
        if z.dtype not in DTYPES:
            raise ValueError(f"ssd takes float32 or bfloat16, but {name} is {z.dtype}; cast it first.")
        if z.ndim != layouts[name].count(",") + 1:
            raise ValueError(f"ssd needs {name} of {layouts[name]}, but it has the shape {z.shape}; reshape it.")
    shape, groups = inputs["x"].shape, inputs["b"].shape
    fits = {"log_a": shape[:3], "b": (*shape[:2], *groups[2:]), "c": (*shape[:2], *groups[2:])}
    for name, expected in fits.items():
        if inputs[name].shape != expected:
            raise ValueError(
                "ssd needs x [B, T, H, P], log_a [B, T, H] and b, c of one shape [B, T, G, N], but x has "
                f"{shape}, b has {groups} and {name} has {inputs[name].shape}; make them agree."
            )
    if groups[2] == 0 or shape[2] % groups[2]:
        raise ValueError(f"ssd needs groups that divide the heads, but there are {groups[2]} for {shape[2]} heads.")
    if shape[1] == 0:
        raise ValueError("ssd needs at least one token, but T is 0; leave the call out instead.")
    if known_outside(inputs["log_a"], -jnp.inf, 0):
        raise ValueError("ssd needs log_a <= 0, the log of the decay, but some is above 0; pass the logarithm.")
    if initial_state is not None:
        expected = (shape[0], *shape[2:], groups[3])
        if initial_state.shape != expected or initial_state.dtype not in DTYPES:
            raise ValueError(
                f"ssd needs an initial_state [B, H, P, N] = {expected} of float32, but it is "
                f"{initial_state.dtype} {initial_state.shape}; reshape or cast it."
            )
    check_choices("ssd", reverse, implementation, chunk_size, IMPLEMENTATIONS, CHUNK_SIZES)
