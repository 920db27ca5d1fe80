"""The public operator: its contract, the checks, and which form runs where."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Decays, Grouped, Inputs, InputState, InputStates
from pallas_kernels.choices import check_block, check_choices, known_outside
from pallas_kernels.products import by_passes
from pallas_kernels.ssd.chunked import ssd_associative, ssd_blocks_associative, ssd_blocks_chunked, ssd_chunked
from pallas_kernels.ssd.reference import ssd_blocks_reference, ssd_reference

IMPLEMENTATIONS = ("reference", "chunked", "associative")
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
        after another; "associative", all chunks at once and an associative scan over their states.
        None takes "chunked" where the program is lowered for CPU, as measured there, and
        "associative" elsewhere.
      chunk_size: tokens per chunk, a power of two from 2 to 256; None is 32 for "chunked" and 64
        for "associative".

    Returns:
      y [B, T, H, P] in x's dtype and final_state [B, H, P, N] in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, T = 0, an implementation that does not exist or
        a chunk_size that it cannot take. Outside of a trace also log_a > 0 (under one, the state grows).
    """
    inputs = _inputs(x, log_a, b, c, initial_state, reverse, implementation, chunk_size)
    forms = {
        "reference": ssd_reference,
        "chunked": functools.partial(ssd_chunked, chunk_size=chunk_size or 32),
        "associative": functools.partial(_associative, ssd_associative, chunk_size=chunk_size or 64),
    }
    return _run(forms, implementation, inputs, reverse=reverse)


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
      x, log_a, b, c, initial_state, implementation, chunk_size: as in ssd. A block is made of whole chunks, padded
        where it must be.
      block: tokens in a block; divides T.

    Returns:
      y [B, T, H, P] in x's dtype; and in float32 the states before the blocks and after the last one,
      [B, T / block + 1, H, P, N]. All are differentiable.

    Raises:
      ValueError: as ssd, and for a block that does not divide T.
    """
    inputs = _inputs(x, log_a, b, c, initial_state, False, implementation, chunk_size)
    check_block("ssd_blocks", block, inputs[0].shape[1])
    forms = {
        "reference": ssd_blocks_reference,
        "chunked": functools.partial(ssd_blocks_chunked, chunk_size=chunk_size or 32),
        "associative": functools.partial(_associative, ssd_blocks_associative, chunk_size=chunk_size or 64),
    }
    return _run(forms, implementation, inputs, block=block)


@jax.named_scope("ssd")  # for profilers
def _run(forms, implementation, inputs, **options):
    forms = {name: functools.partial(form, **options) for name, form in forms.items()}
    if implementation is not None:
        return forms[implementation](*inputs)
    return jax.lax.platform_dependent(*inputs, cpu=forms["chunked"], default=forms["associative"])


def _associative(form, x, log_a, b, c, state, **options):
    """`form` with products as the device likes them."""
    return by_passes(functools.partial(form, **options), (x, b, c))(x, log_a, b, c, state)


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
