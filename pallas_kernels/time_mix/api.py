"""The public functions: their contract, the checks, and which form runs."""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Flat, Keys, Mus, Values, Vector
from pallas_kernels.choices import check_block
from pallas_kernels.time_mix import low_rank, pallas_gpu, pallas_tpu
from pallas_kernels.time_mix.fused import channel_shift_fused
from pallas_kernels.time_mix.kernels import (
    finish_kernel,
    operands_kernel,
    token_mixes_kernel,
)
from pallas_kernels.time_mix.low_rank import LowRank
from pallas_kernels.time_mix.reference import (
    channel_shift_reference,
    finish_reference,
    operands_reference,
    token_mixes_reference,
)

IMPLEMENTATIONS = ("reference", "fused", "pallas_tpu", "pallas_gpu")
SIDES = ("previous", "next")

Side = Sequence[Any]  # out, r, k, v [B, T, H, K], gate [B, T, D] or a LowRank
Blend = tuple[Flat, Vector]  # v_first, v0
Merge = tuple[Flat | LowRank, Vector]  # raw gate, m0


def token_mixes(
    x: Flat,
    mu: Mus,
    *,
    sides: tuple[str, ...] = ("previous",),
    carry: Array | None = None,
    implementation: str | None = None,
) -> tuple[tuple[Flat, ...], ...]:
    """Token shift, and all mixes of it in one pass over x.

        mixes[i][s] = x + (near_s - x)·mu[i, s]        near_s: x_{t-1} for "previous", x_{t+1} for "next"

    Args:
      x: [B, T, D], of any floating dtype, in which all is computed.
      mu: [N, S, D], N mixes for each of the S sides; cast to x's dtype.
      sides: which neighbour each of the S looks at.
      carry: [B, D], what stands before the first token; None is zeros. Zeros stand behind the last one.
      implementation: "reference", the definition; "fused", with a backward pass by hand; "pallas_tpu" and "pallas_gpu",
        one kernel each way, for TPUs and for NVIDIA GPUs of compute capability 8 or more: float32 inside, and no carry.
        None takes, where the program is lowered, the platform's kernel where it takes these shapes and dtypes, and
        "fused" elsewhere.

    Returns:
      N tuples of S arrays [B, T, D], in x's dtype.

    Raises:
      ValueError: shapes that do not fit, and a side or an implementation that does not exist or run here.
    """
    x, mu = jnp.asarray(x), jnp.asarray(mu)
    sides = tuple(sides)
    if not sides or set(sides) - set(SIDES):
        raise ValueError(f"token_mixes needs sides out of {SIDES}, not {sides!r}.")
    if x.ndim != 3 or mu.ndim != 3 or mu.shape[1:] != (len(sides), x.shape[-1]):
        raise ValueError(
            f"token_mixes needs x [B, T, D] and mu [N, {len(sides)}, D], but they are {x.shape} and {mu.shape}."
        )
    if carry is not None and "previous" not in sides:
        raise ValueError("token_mixes was given a carry, which only the side 'previous' reads; leave it out.")
    _check_carry("token_mixes", x, carry)
    unfit = None if carry is None else "it takes no carry"
    form = _choice("token_mixes", implementation, (x,), unfit=unfit)
    if form == "reference":
        return token_mixes_reference(x, mu, carry, sides)
    return token_mixes_kernel(x, mu, sides, form, carry)


def channel_shift(
    x: Flat,
    mu_previous: Vector,
    mu_next: Vector | None = None,
    *,
    carry: Array | None = None,
    block: int | None = None,
    implementation: str | None = None,
) -> Flat:
    """The channel mix's shift, to one side or to both: x + (x_{t-1} - x)·mu_previous + (x_{t+1} - x)·mu_next.

    Args:
      x: [B, T, D], of any floating dtype, in which all is computed.
      mu_previous, mu_next: [D]; without mu_next, the side of x_{t-1} alone.
      carry: [B, D], what stands before the first token; None is zeros. Zeros stand behind the last one.
      block: zeros stand behind the last token of each block of so many as well; divides T.
      implementation: "reference" or "fused", as in token_mixes; None takes "fused": XLA makes one kernel of it.

    Returns:
      [B, T, D] in x's dtype.

    Raises:
      ValueError: shapes that do not fit, and an implementation that does not exist or run here.
    """
    x = jnp.asarray(x)
    given = {"mu_previous": mu_previous} | ({} if mu_next is None else {"mu_next": mu_next})
    for name, mu in given.items():
        if x.ndim != 3 or jnp.shape(mu) != x.shape[-1:]:
            raise ValueError(
                f"channel_shift needs x [B, T, D] and {name} [D], but they are {x.shape}, {jnp.shape(mu)}."
            )
    _check_carry("channel_shift", x, carry)
    if block is not None:
        check_block("channel_shift", block, x.shape[1])
    form = _choice("channel_shift", implementation, (x,), unfit="XLA writes as good a kernel of this")
    if form == "reference":
        return channel_shift_reference(x, mu_previous, mu_next, carry, block)
    return channel_shift_fused(x, mu_previous, mu_next, carry, block)


def operands(
    k: Flat,
    v: Flat,
    raw: Sequence[Flat] | LowRank,
    *,
    w0: Vector,
    a0: Vector,
    k_k: Vector,
    k_a: Vector,
    head_dim: int,
    blend: Blend | None = None,
    valid: Array | None = None,
    a_scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[Keys, Keys, Values, Keys, Keys]:
    """What `wkv7` takes beside r, from the raw projections of a direction (arXiv 2503.14456, section 4).

        log_w = -e^{-1/2} sigmoid(w0 + w)        rate = a_scale·sigmoid(a0 + a)
        kappa = k·k_k / |k·k_k| in each head     key = k·(1 + (rate - 1)·k_a)
        value = v, or v + (v_first - v)·sigmoid(v0 + gate) with `blend` = (v_first, v0)

    Args:
      k, v, and v_first of blend: [B, T, D], float32 or bfloat16.
      raw: w, a and, with blend, gate: arrays [B, T, D], or a LowRank of so many maps, which are multiplied here.
      w0, a0, k_k, k_a, and v0 of blend: [D], float32.
      head_dim: K, channels of a head; divides D.
      valid: bool [B, T], True at real tokens; elsewhere all results are 0, which for the operator is no token.
      a_scale: the largest rate.
      implementation: as in token_mixes.

    Returns:
      (log_w, key, value, -kappa, kappa·rate), each [B, T, H, K]; log_w float32, the others in v's dtype. All is
      computed in float32.

    Raises:
      ValueError: shapes that do not fit, and an implementation that does not exist or run here.
    """
    shape = jnp.shape(v)
    raw = raw if isinstance(raw, LowRank) else tuple(raw)
    flat = {"k": k, "v": v}
    vectors = {"w0": w0, "a0": a0, "k_k": k_k, "k_a": k_a}
    if blend is not None:
        flat["v_first"], vectors["v0"] = blend
    for name, x in flat.items():
        if len(shape) != 3 or jnp.shape(x) != shape:
            raise ValueError(f"operands needs arrays [B, T, D] of one shape, but v has {shape}, {name} {jnp.shape(x)}.")
    if wrong := low_rank.problem(raw, shape, 2 if blend is None else 3):
        names = "w and a" if blend is None else "w, a and gate"
        raise ValueError(f"operands needs a raw of {names}, [B, T, D] = {shape} each or a LowRank, but {wrong}.")
    for name, x in vectors.items():
        if jnp.shape(x) != shape[-1:]:
            raise ValueError(f"operands needs {name} [D] = {shape[-1:]}, but it is {jnp.shape(x)}.")
    if shape[-1] % head_dim:
        raise ValueError(f"operands needs a head_dim that divides D = {shape[-1]}, not {head_dim}.")
    if valid is not None and jnp.shape(valid) != shape[:2]:
        raise ValueError(f"operands needs valid [B, T] = {shape[:2]}, but it is {jnp.shape(valid)}.")
    arrays = v, k, *low_rank.arrays(raw), *(blend or ())[:1]
    form = _choice("operands", implementation, arrays, head_dim, low_rank.ranks(raw))
    constants = w0, a0, k_k, k_a
    if form == "reference":
        return operands_reference(k, v, raw, blend, constants, valid, head_dim, a_scale)
    return operands_kernel(k, v, raw, blend, constants, valid, head_dim, float(a_scale), form)


def finish(
    sides: Sequence[Side],
    vectors: Sequence[Sequence[Vector]],
    *,
    merge: Merge | None = None,
    implementation: str | None = None,
) -> Flat:
    """What becomes of the operator's output, in one direction or in two (arXiv 2503.14456, section 4).

        y_s = (group_norm(out)·scale + bias + (sum_head r·k·r_k) v)·gate
        y = y_1 + y_2, or with `merge` = (raw, m0)   2·(share·y_1 + (1 - share)·y_2),  share = sigmoid(m0 + raw)

    Args:
      sides: for each direction (out, r, k, v, gate): four arrays [B, T, H, K], and the gate [B, T, D] or a LowRank of
        one map; float32 or bfloat16. With one direction y_2 is 0.
      vectors: for each (r_k, scale, bias), [D] float32. The norm is over each head, without affine of its own.
      merge: raw [B, T, D] or a LowRank of one map, m0 [D]; None is the sum.
      implementation: as in token_mixes.

    Returns:
      [B, T, D] in the gate's dtype. All is computed in float32.

    Raises:
      ValueError: shapes that do not fit, and an implementation that does not exist or run here.
    """
    each, threes = tuple(tuple(x) for x in sides), tuple(tuple(x) for x in vectors)
    if len(each) not in (1, 2) or len(threes) != len(each):
        raise ValueError(f"finish needs one or two sides and the vectors of each, not {len(each)} and {len(threes)}.")
    heads = jnp.shape(each[0][0])
    flat = *heads[:2], math.prod(heads[2:])
    for side, three in zip(each, threes, strict=True):
        shapes = {jnp.shape(x) for x in side[:4]}
        if shapes != {heads} or len(heads) != 4:
            raise ValueError(
                "finish needs out, r, k and v [B, T, H, K], of one shape on both sides, but they are "
                f"{[jnp.shape(x) for x in side[:4]]}."
            )
        if wrong := low_rank.problem(side[4], flat, 1):
            raise ValueError(f"finish needs a gate [B, T, H·K] = {flat} or a LowRank of one map, but {wrong}.")
        if any(jnp.shape(x) != flat[-1:] for x in three):
            raise ValueError(
                f"finish needs r_k, scale and bias [D] = {flat[-1:]}, not {[jnp.shape(x) for x in three]}."
            )
    raws = [*(side[4] for side in each), *(merge or ())[:1]]
    if merge is not None:
        if wrong := low_rank.problem(merge[0], flat, 1):
            raise ValueError(f"finish needs a merge of raw {flat} or a LowRank of one map, but {wrong}.")
        if jnp.shape(merge[1]) != flat[-1:]:
            raise ValueError(f"finish needs a merge of m0 {flat[-1:]}, not {jnp.shape(merge[1])}.")
    arrays = [x for side in each for x in side[:4]] + [x for raw in raws for x in low_rank.arrays(raw)]
    form = _choice("finish", implementation, arrays, heads[-1], low_rank.ranks(*raws))
    if form == "reference":
        return finish_reference(each, threes, merge)
    return finish_kernel(each, threes, merge, form)


def _check_carry(name, x, carry):
    if carry is not None and jnp.shape(carry) != (x.shape[0], x.shape[2]):
        expected = (x.shape[0], x.shape[2])
        raise ValueError(f"{name} needs a carry [B, D] = {expected}, but it is {jnp.shape(carry)}.")


# Which form runs.

PLAIN = ("reference", "fused")
KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


@functools.cache
def _is_gpu():
    """Whether this process has NVIDIA GPUs that Triton compiles for; says once what was chosen."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    major = capability.partition(".")[0]
    # Of other names Pallas may not know the architecture.
    chosen = device.device_kind.startswith("NVIDIA") and major.isdigit() and int(major) >= 8
    form = "pallas_gpu" if chosen else "fused"
    logging.getLogger(__name__).info("time_mix on %s (capability %s): %s", device.device_kind, capability, form)
    return chosen


def _choice(name, implementation, arrays, head_dim=0, ranks=(), unfit=None):
    """One of PLAIN, or what kernels.py takes as `forms`.

    Args:
      arrays: what the function was given, the first of them [B, T, D] or [B, T, H, K].
      head_dim: channels of a head, where heads matter.
      ranks: of low-rank maps.
      unfit: why no kernel takes this, or None.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"{name} has no implementation {implementation!r}; choose None or one of {names}.")
    if implementation in PLAIN:
        return implementation
    if dtypes := sorted({str(x.dtype) for x in arrays} - {"float32", "bfloat16"}):
        unfit = unfit or f"it takes float32 and bfloat16, not {', '.join(dtypes)}"
    if not arrays[0].size:
        unfit = unfit or "there is nothing to do"
    batch, length, *rest = arrays[0].shape
    flat = batch, length, math.prod(rest)
    refusals = {form: unfit or kernel.unsupported(flat, head_dim, ranks) for form, kernel in KERNELS.items()}
    if implementation is None:
        here = [form for form, reason in refusals.items() if not reason and (form != "pallas_gpu" or _is_gpu())]
        return tuple(here) or "fused"
    backend = jax.default_backend()
    if implementation == "pallas_tpu" and backend != "tpu":
        reason = f"it runs on a TPU and this process has {backend}"
    elif implementation == "pallas_gpu" and not _is_gpu():
        reason = f"it runs on NVIDIA GPUs of compute capability 8 or more and this process has {backend}"
    else:
        reason = refusals[implementation]
    if reason:
        raise ValueError(f"{name} cannot run {implementation!r} here: {reason}; choose None or another implementation.")
    return f"named:{implementation}"
