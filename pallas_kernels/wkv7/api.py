"""The public operators: their contract, the checks, and which form runs where."""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import products
from pallas_kernels.array_types import Keys, KeyValueState, KeyValueStates, Values
from pallas_kernels.choices import check_block, check_choices, known_outside
from pallas_kernels.wkv7 import pallas_gpu, pallas_tpu, pallas_triton
from pallas_kernels.wkv7.chunked import (
    CHUNK,
    segment_of,
    wkv7_associative,
    wkv7_blocks_associative,
    wkv7_blocks_chunked,
    wkv7_chunked,
)
from pallas_kernels.wkv7.pallas_tpu import wkv7_pallas_tpu
from pallas_kernels.wkv7.reference import wkv7_blocks_reference, wkv7_reference
from pallas_kernels.wkv7.split import wkv7_pallas_gpu_split
from pallas_kernels.wkv7.strong import kernel_unless_strong

IMPLEMENTATIONS = ("reference", "chunked", "associative", "pallas_tpu", "pallas_gpu", "pallas_triton")
CHUNK_SIZES = (2, 4, 8, 16, 32, 64)
DTYPES = (jnp.float32, jnp.bfloat16)
NAMES = ("r", "log_w", "k", "v", "a", "b")

Tokens = tuple[Keys, Keys, Keys, Values, Keys, Keys]  # in the order of NAMES
Result = tuple[Values, KeyValueState | None]


def wkv7(
    r: Keys,
    log_w: Keys,
    k: Keys,
    v: Values,
    a: Keys,
    b: Keys,
    *,
    initial_state: KeyValueState | None = None,
    final_state: bool = True,
    reverse: bool = False,
    mild: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Result:
    """The WKV-7 recurrence, with a matrix-valued state per head (arXiv 2503.14456, section 3).

        S_t = diag(exp(log_w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    o_t = S_t^T r_t

    RWKV-7 calls it with a = -kappa_hat and b = kappa_hat * iclr. A token with
    log_w = k = v = a = b = 0 leaves the state alone.

    The state, the sums and the products are float32 whatever the inputs are. Differentiable in
    reverse mode, also under jit, vmap, scan and remat; "reference" in forward mode too.

    Args:
      r, log_w, k, a, b: [B, T, H, K], float32 or bfloat16. log_w <= 0 is the log of the decay, as strong as one likes:
        a call with one below -64 / chunk_size, or below -4 in chunks of 16 and fewer, is computed by the definition,
        in its time. One that is positive, which a trace cannot refuse, is what the recurrence makes of it: the state
        grows.
      v: [B, T, H, V], float32 or bfloat16.
      initial_state: [B, H, K, V], float32; None is zeros.
      final_state: False where it is not wanted, which may spare its cost: None is returned in its place.
      reverse: run from the last token to the first; final_state is then the one after token 0.
      mild: a promise that -1 <= log_w <= 0 (RWKV-7's is above -0.607), which spares a look at log_w and the second
        program for what is stronger. Under a trace, where log_w is not known, a broken promise gives NaN (the kernels
        see to it) or wrong values.
      implementation: "reference", one token after another, the definition; "chunked", one chunk
        after another; "associative", all chunks at once and an associative scan over their states;
        "pallas_tpu" and "pallas_gpu", one fused kernel each way, for TPUs and for Hopper GPUs;
        "pallas_triton", one forward and two backward, for NVIDIA GPUs of compute capability 8 or more. On GPUs long
        sequences that are too few are split along the time axis (split.py).
        None takes, where the program is lowered, "chunked" on CPU, the platform's kernel where there is one that takes
        these shapes and dtypes, and "associative" elsewhere.
      chunk_size: tokens per chunk, a power of two from 2 to 64; None is 16 for "chunked", which takes all of a short
        sequence at once where it may, and 64 for the others. "pallas_tpu" takes at least 16, "pallas_gpu" 64 only,
        "pallas_triton" 16 only.

    Returns:
      out [B, T, H, V] in v's dtype and final_state [B, H, K, V] in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit, T = 0, an implementation that does not exist or
        a chunk_size that it cannot take. Outside of a trace also log_w > 0, and log_w < -1 with `mild`.
    """
    tokens = (r, log_w, k, v, a, b)
    (result,) = _run((tokens,), (initial_state,), (final_state,), (reverse,), mild, implementation, chunk_size)
    return result


def wkv7_bidirectional(
    forward: Tokens,
    backward: Tokens,
    *,
    initial_states: tuple[KeyValueState | None, KeyValueState | None] = (None, None),
    final_states: tuple[bool, bool] = (True, True),
    mild: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Result, Result]:
    """Both directions of a bidirectional layer: one launch forward where there is a kernel, else one after the other.

    Args:
      forward, backward: (r, log_w, k, v, a, b) of the direction from the first token to the last and of the other, as
        in wkv7, of one shape.
      initial_states: of the two, each [B, H, K, V] float32 or None; the second stands behind the last token.
      final_states: whether that of each is wanted, as in wkv7.
      mild, implementation, chunk_size: as in wkv7.

    Returns:
      ((out, final_state), (out, final_state)).

    Raises:
      ValueError: as wkv7, and where the directions have different shapes.
    """
    if [jnp.shape(x) for x in forward] != [jnp.shape(x) for x in backward]:
        raise ValueError("wkv7_bidirectional needs both directions of one shape; call wkv7 twice instead.")
    ways, reverse = (tuple(forward), tuple(backward)), (False, True)
    return _run(ways, tuple(initial_states), tuple(final_states), reverse, mild, implementation, chunk_size)


def wkv7_blocks(
    r: Keys,
    log_w: Keys,
    k: Keys,
    v: Values,
    a: Keys,
    b: Keys,
    *,
    block: int,
    initial_state: KeyValueState | None = None,
    mild: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Values, KeyValueStates]:
    """`wkv7` from left to right, with the state at every boundary between blocks of tokens.

    Args:
      r, log_w, k, v, a, b, initial_state, mild: as in wkv7.
      block: tokens in a block; divides T.
      implementation: "reference", "chunked" or "associative", as in wkv7; the kernels do not give these states. None
        takes "chunked" where the program is lowered for CPU, and "associative" elsewhere.
      chunk_size: as in wkv7. A block is made of whole chunks, padded where it must be.

    Returns:
      out [B, T, H, V] in v's dtype; and in float32 the states before the blocks and after the last one,
      [B, T / block + 1, H, K, V]. All are differentiable.

    Raises:
      ValueError: as wkv7, for a block that does not divide T, and for a kernel.
    """
    tokens = tuple(jnp.asarray(x) for x in (r, log_w, k, v, a, b))
    state = None if initial_state is None else jnp.asarray(initial_state)
    _check(dict(zip(NAMES, tokens, strict=True)), state, False, mild, implementation, chunk_size)
    batch, length, heads, key = tokens[0].shape
    check_block("wkv7_blocks", block, length)
    if implementation in KERNELS:
        raise ValueError(f"wkv7_blocks has no form {implementation!r}: choose None, 'chunked' or 'associative'.")
    zeros = jnp.zeros((batch, heads, key, tokens[3].shape[-1]))
    state = zeros if state is None else state.astype(jnp.float32)
    accelerator = _on_accelerator(implementation)
    forms: dict[str, Callable[..., Any]] = {
        "reference": wkv7_blocks_reference,
        "chunked": functools.partial(wkv7_blocks_chunked, chunk_size=chunk_size or CHUNK, mild=mild),
        "associative": functools.partial(_associative, accelerator=accelerator, chunk_size=chunk_size, mild=mild),
    }
    forms = {name: functools.partial(form, block=block) for name, form in forms.items()}
    with jax.named_scope("wkv7"):
        if implementation is not None:
            return forms[implementation](*tokens, state)
        return jax.lax.platform_dependent(*tokens, state, cpu=forms["chunked"], default=forms["associative"])


@jax.named_scope("wkv7")  # for profilers
def _run(ways, states, wanted, reverse, mild, implementation, chunk_size):
    """wkv7 of one or two directions; ways: the six inputs of each."""
    ways = tuple(tuple(jnp.asarray(x) for x in tokens) for tokens in ways)
    states = tuple(state if state is None else jnp.asarray(state) for state in states)
    for tokens, state, way in zip(ways, states, reverse, strict=True):
        _check(dict(zip(NAMES, tokens, strict=True)), state, way, mild, implementation, chunk_size)
    states = tuple(state if state is None else state.astype(jnp.float32) for state in states)

    def form(name):
        accelerator = _on_accelerator(implementation)
        return _form(name, reverse=reverse, wanted=wanted, mild=mild, chunk_size=chunk_size, accelerator=accelerator)

    if implementation is not None:
        if implementation in KERNELS:
            _check_kernel(implementation, ways, chunk_size)
        return form(implementation)(ways, states)

    forms = {"cpu": "chunked", "default": "associative"}
    for name, kernel in KERNELS.items():  # for a TPU a process without one lowers too; which GPU it is decides
        runs = kernel.platform not in forms and (kernel.platform == "tpu" or kernel.runs())
        if runs and not _refusal(name, ways, chunk_size):
            forms[kernel.platform] = name
    return jax.lax.platform_dependent(ways, states, **{platform: form(name) for platform, name in forms.items()})


def _on_accelerator(implementation):
    """Whether "associative" will run on one. Unasked it never runs on a CPU; named it runs on this process's device."""
    return implementation is None or jax.default_backend() != "cpu"


def _form(name, *, reverse, wanted, mild, chunk_size, accelerator):
    """(tokens of each direction, their states or None) -> (out, final state if wanted, else None) of each."""

    def chunked(ways, states):
        each = zip(ways, states, reverse, wanted, strict=True)
        return tuple(wkv7_chunked(*tokens, s, way, chunk_size, final, mild) for tokens, s, way, final in each)

    def kernel(ways, states):
        size = chunk_size or KERNELS[name].sizes[1]
        launch = functools.partial(KERNELS[name].launch, reverse=reverse, chunk_size=size)
        return launch(ways, states) if mild else kernel_unless_strong(launch, reverse, size, ways, states)

    def one_by_one(ways, states):
        each = zip(ways, states, reverse, strict=True)
        options = {"mild": mild, "chunk_size": chunk_size, "accelerator": accelerator}
        one = wkv7_reference if name == "reference" else functools.partial(_associative, **options)
        return tuple(one(*tokens, state, way) for tokens, state, way in each)

    def from_states(run):
        """`run`, which needs a state and gives one, where None stands for zeros and what is not wanted is left out."""

        def whole(ways, states):
            zeros = jnp.zeros((*(ways[0][0].shape[i] for i in (0, 2, 3)), ways[0][3].shape[3]))
            results = run(ways, tuple(zeros if state is None else state for state in states))
            return tuple((out, state if want else None) for (out, state), want in zip(results, wanted, strict=True))

        return whole

    if name == "chunked":
        return chunked
    return from_states(kernel if name in KERNELS else one_by_one)


def _associative(r, log_w, k, v, a, b, state, reverse=False, *, block=None, accelerator, mild, chunk_size):
    """wkv7_associative or, of blocks, wkv7_blocks_associative: segments and products as the device likes them."""
    segment = segment_of(r.shape, v.shape[-1], on_cpu=not accelerator)
    options = {"chunk_size": chunk_size or 64, "segment": segment, "mild": mild}
    whole = functools.partial(wkv7_associative, reverse=reverse, **options)
    form = whole if block is None else functools.partial(wkv7_blocks_associative, block=block, **options)
    return products.by_passes(form, (r, k, v, a, b))(r, log_w, k, v, a, b, state)


# The kernels: where they run, and what they do not take.


@functools.cache
def _is_hopper():
    """Whether this process has Hopper GPUs, which alone run the GPU kernel; says once what was chosen."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    chosen = capability.startswith("9.")
    form = "pallas_gpu" if chosen else "pallas_triton" if products.has_tensor_cores() else "associative"
    logging.getLogger(__name__).info("wkv7 on %s (capability %s): %s", device.device_kind, capability, form)
    return chosen


class Kernel(NamedTuple):
    """A form that runs on one platform.

    Attributes:
      launch: (tokens of each direction, their states, reverse=, chunk_size=) -> (out, final state) of each.
      unsupported: (tokens of a direction) -> why it does not take them, or None.
      sizes: of chunks, the least and the most, which is the default.
      platform: what it is lowered for.
      where: the same in words.
      runs: whether this process has such devices.
    """

    launch: Callable[..., Any]
    unsupported: Callable[..., str | None]
    sizes: tuple[int, int]
    platform: str
    where: str
    runs: Callable[[], bool]


KERNELS = {  # of one platform the first is the best
    "pallas_tpu": Kernel(
        wkv7_pallas_tpu, pallas_tpu.unsupported, (16, 64), "tpu", "a TPU", lambda: jax.default_backend() == "tpu"
    ),
    "pallas_gpu": Kernel(
        wkv7_pallas_gpu_split,
        pallas_gpu.unsupported,
        (64, 64),
        "cuda",
        "Hopper GPUs (compute capability 9)",
        lambda: _is_hopper(),
    ),
    "pallas_triton": Kernel(
        pallas_triton.wkv7_pallas_triton,
        pallas_triton.unsupported,
        (pallas_triton.SIZE,) * 2,
        "cuda",
        "NVIDIA GPUs of compute capability 8 or more",
        lambda: products.has_tensor_cores(),
    ),
}


def _refusal(name, ways, chunk_size):
    """Why a kernel does not take these inputs, whatever the machine; or None."""
    least, most = KERNELS[name].sizes
    if chunk_size is not None and not least <= chunk_size <= most:
        return f"it takes chunks of {' to '.join(map(str, sorted({least, most})))} tokens, not {chunk_size}"
    return KERNELS[name].unsupported(ways[0])


def _check_kernel(name, ways, chunk_size):
    """Raises ValueError when a kernel that was named cannot run here."""
    reason = _refusal(name, ways, chunk_size)
    if not KERNELS[name].runs():
        here = f"{jax.default_backend()} ({jax.devices()[0].device_kind})"
        reason = f"it runs on {KERNELS[name].where} and this process has {here}"
    if reason:
        raise ValueError(f"wkv7 cannot run {name!r} here: {reason}; choose None or another implementation.")


def _check(inputs, initial_state, reverse, mild, implementation, chunk_size):
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
    if known_outside(inputs["log_w"], -jnp.inf, 0):
        raise ValueError("wkv7 needs log_w <= 0, the log of the decay, but some is above 0; pass the logarithm.")
    if mild and known_outside(inputs["log_w"], -1, 0):
        raise ValueError("wkv7 was promised, by mild=True, a log_w of at least -1, but some is below; leave mild out.")
    if initial_state is not None:
        expected = (shape[0], shape[2], shape[3], inputs["v"].shape[3])
        if initial_state.shape != expected or initial_state.dtype not in DTYPES:
            raise ValueError(
                f"wkv7 needs an initial_state [B, H, K, V] = {expected} of float32, but it is "
                f"{initial_state.dtype} {initial_state.shape}; reshape or cast it."
            )
    check_choices("wkv7", reverse, implementation, chunk_size, IMPLEMENTATIONS, CHUNK_SIZES)
