"""SSD by chunks of C tokens, as matrix products; pure jnp.

With g the running sum of log_a inside a chunk (this token counted), L_ij = e^{g_i - g_j} for j <= i
and 0 elsewhere, a chunk that starts from the state S gives

    Y = ((C B^T) * L) X + e^g C S^T
    S' = e^{g_C} S + (e^{g_C - g} X)^T B

so its effect on the state is a scalar and a matrix, and (a, U) then (a', U') is (a' a, a' U + U').

Every exponent is a difference that is never positive, so no decay is too strong. But where a token
forgets everything (log_a = -80, say), g is large for the rest of the chunk and g_i - g_j would lose
the digits that the slow decays after it need. So log_a is split into a multiple of 1/16, whose sums
and differences are exact in float32, and a rest of at most 1/32, whose sums are small.

The reverse direction is the same with the sums run from the right and L upper triangular.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.array_types import Decays, Grouped, Inputs, InputState, InputStates
from pallas_kernels.choices import fit_chunk, join_time, pad_blocks, segments_of, split_time, unpad_blocks
from pallas_kernels.products import HIGHEST, Precision, einsum, precise

GRID = 16
# exp(-104) is 0 in float32: a clamp below it changes nothing, and its gradient, zero, is the true one.
FLOOR = -128.0


def _triangle(size, reverse):
    """Whether token j is taken no later than token i: bool [C, C]."""
    square = np.ones((size, size), bool)
    return np.triu(square) if reverse else np.tril(square)


def _running_sums(log_a, reverse):
    """Two parts of the sum of log_a [..., C] up to and with each token: multiples of 1/16, and the rest."""
    log_a = jnp.maximum(log_a, FLOOR)
    coarse = jax.lax.stop_gradient(jnp.round(log_a * GRID) / GRID)
    # A product with a triangle: XLA's own cumsum is quadratic on CPU. It is small, and not in passes over bfloat16 as
    # the others are: XLA makes no fusion of it for GPUs (jaxlib 0.11), and has nothing else that knows passes.
    triangle = _triangle(log_a.shape[-1], reverse).astype(np.float32)
    parts = coarse, log_a - coarse
    return tuple(jnp.einsum("...j,ij->...i", part, triangle, precision=HIGHEST) for part in parts)


def _decays(sums, reverse):
    """L [..., C, C], e^g [..., C] and e^{g_C - g} [..., C] from the two parts of g, [..., C] each."""
    coarse, fine = sums
    between = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    between = jnp.exp(jnp.where(_triangle(coarse.shape[-1], reverse), between, -jnp.inf))
    return between, jnp.exp(coarse + fine), between[..., 0 if reverse else -1, :]


def _written(x, b, rest):
    """What a chunk writes to the state: x [..., C, G, R, P], b [..., C, G, N] -> [..., G, R, P, N]."""
    rest = jnp.moveaxis(rest, -1, -3)[..., None]
    return einsum("...jgrp,...jgn->...grpn", rest * x, b)


def _read(x, b, c, between, upto, state):
    """A chunk's outputs from its tokens and the state before it [..., G, R, P, N]: [..., C, G, R, P]."""
    pairs = einsum("...ign,...jgn->...gij", c, b)[..., None, :, :] * between
    upto = jnp.moveaxis(upto, -1, -3)[..., None]
    within = einsum("...grij,...jgrp->...igrp", pairs, x)
    return within + upto * einsum("...ign,...grpn->...igrp", c, state)


def _apart(z, axis, groups):
    """Splits the heads at `axis` into G groups and the R heads of each."""
    return z.reshape(*z.shape[:axis], groups, z.shape[axis] // groups, *z.shape[axis + 1 :])


def _grouped(tokens, state, length):
    """The tokens with T padded by zeros, which leave the state alone, and the state; their heads by groups."""
    x, log_a, b, c = tokens
    tokens = (_apart(x, 2, b.shape[2]), _apart(log_a.astype(jnp.float32), 2, b.shape[2]), b, c)
    added = length - x.shape[1]
    padded = [jnp.pad(z, ((0, 0), (0, added), *((0, 0),) * (z.ndim - 2))) for z in tokens]
    return padded, _apart(state, 1, b.shape[2])


def ssd_chunked(
    x: Inputs,
    log_a: Decays,
    b: Grouped,
    c: Grouped,
    initial_state: InputState,
    reverse: bool = False,
    chunk_size: int = 32,
) -> tuple[Inputs, InputState]:
    """One chunk after another: what trains fastest on CPU. Shapes as in ssd.

    Backward keeps a state per chunk, P N / C floats per token and head, and computes the rest again.
    """
    length = x.shape[1]
    size = fit_chunk(chunk_size, length)
    tokens, state = _grouped((x, log_a, b, c), initial_state, -(-length // size) * size)
    y, state, _ = _scan(tokens, state, reverse, size, give=False)
    return y[:, :length].reshape(x.shape), state.reshape(initial_state.shape)


def ssd_blocks_chunked(
    x: Inputs, log_a: Decays, b: Grouped, c: Grouped, initial_state: InputState, block: int, chunk_size: int = 32
) -> tuple[Inputs, InputStates]:
    """`ssd_chunked` from left to right, with the states between blocks: as ssd_blocks."""
    tokens, size, span = pad_blocks((x, log_a, b, c), block, chunk_size)
    tokens, state = _grouped(tokens, initial_state, tokens[0].shape[1])
    y, state, before = _scan(tokens, state, False, size, give=True)
    return unpad_blocks(y, block, span).reshape(x.shape), _states_of_heads(before[:: span // size], state)


def _scan(tokens, state, reverse, size, give):
    """(y [B, T, G, R, P], the last state, if `give` those before the chunks [T / C, B, G, R, P, N])."""
    dtype = tokens[0].dtype

    # A loop cannot merge its backward pass with its forward one: no barrier against that is needed.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, chunk):
        x_, b_, c_ = (z.astype(jnp.float32) for z in chunk[:3])
        between, upto, rest = _decays(chunk[3:], reverse)
        y = _read(x_, b_, c_, between, upto, state)
        following = upto[..., 0 if reverse else -1, None, None] * state + _written(x_, b_, rest)
        return following, (y.astype(dtype), state if give else None)

    x_, log_a_, b_, c_ = (split_time(z, size) for z in tokens)
    sums = _running_sums(jnp.moveaxis(log_a_, 2, -1), reverse)
    state, (y, before) = jax.lax.scan(step, state, (x_, b_, c_, *sums), reverse=reverse)
    return join_time(y), state, before


def _states_of_heads(before, final):
    """The states before N blocks and the last one, [B, N + 1, H, P, N'], their heads by groups no more."""
    states = jnp.concatenate([before, final[None]]).swapaxes(0, 1)
    return states.reshape(*states.shape[:2], -1, *states.shape[4:])


def _states(decays, written, state, reverse):
    """The states before each of N steps S' = a S + U, and the one after the last.

    decays [N, ...], written [N, ..., P, N'], state [..., P, N'].
    """

    def then(first, second):
        (a1, u1), (a2, u2) = first, second
        return a2 * a1, a2 * u1 + u2

    decays, written = jax.lax.associative_scan(then, (decays[..., None, None], written), reverse=reverse)
    after = decays * state + written
    if reverse:
        return jnp.concatenate([after[1:], state[None]]), after[0]
    return jnp.concatenate([state[None], after[:-1]]), after[-1]


def ssd_associative(
    x: Inputs,
    log_a: Decays,
    b: Grouped,
    c: Grouped,
    initial_state: InputState,
    reverse: bool = False,
    chunk_size: int = 64,
    segment: int = 2048,
    precision: Precision = HIGHEST,
) -> tuple[Inputs, InputState]:
    """All chunks of a segment at once, their states by an associative scan; for accelerators.

    Shapes as in ssd. Segments of about `segment` tokens follow one another, so that the matrices of
    the chunks take memory for one segment only; backward keeps one state per segment and computes
    the rest again.
    """
    length = x.shape[1]
    size = fit_chunk(chunk_size, length)
    count, each = segments_of(-(-length // size), size, segment)
    span = each * size
    tokens, state = _grouped((x, log_a, b, c), initial_state, count * span)
    with precise(precision):
        y, state, _ = _segments(tokens, state, reverse, size, span, give=False)
    return y[:, :length].reshape(x.shape), state.reshape(initial_state.shape)


def ssd_blocks_associative(
    x: Inputs,
    log_a: Decays,
    b: Grouped,
    c: Grouped,
    initial_state: InputState,
    block: int,
    chunk_size: int = 64,
    segment: int = 2048,
    precision: Precision = HIGHEST,
) -> tuple[Inputs, InputStates]:
    """`ssd_associative` from left to right, with the states between blocks: as ssd_blocks."""
    tokens, size, span = pad_blocks((x, log_a, b, c), block, chunk_size)
    length = tokens[0].shape[1]
    blocks = length // span
    count, each = segments_of(blocks, span, segment)
    width = each * span
    tokens, state = _grouped(tokens, initial_state, count * width)
    with precise(precision):
        y, state, before = _segments(tokens, state, False, size, width, give=True)
    before = before.reshape(-1, *state.shape)[:: span // size][:blocks]
    return unpad_blocks(y[:, :length], block, span).reshape(x.shape), _states_of_heads(before, state)


def _segments(tokens, state, reverse, size, span, give):
    """(y [B, T, G, R, P], the last state, if `give` those before the chunks [T / span, span / C, B, G, R, P, N])."""
    dtype = tokens[0].dtype

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, tokens):
        x_, log_a_, b_, c_ = (split_time(z.astype(jnp.float32), size) for z in tokens)
        sums = _running_sums(jnp.moveaxis(log_a_, 2, -1), reverse)
        between, upto, rest = _decays(sums, reverse)
        total = upto[..., 0 if reverse else -1]
        before, state = _states(total, _written(x_, b_, rest), state, reverse)
        return state, (join_time(_read(x_, b_, c_, between, upto, before)).astype(dtype), before if give else None)

    state, (y, before) = jax.lax.scan(step, state, [split_time(z, span) for z in tokens], reverse=reverse)
    return join_time(y), state, before
