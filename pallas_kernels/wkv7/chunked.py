"""WKV-7 by chunks of C tokens, as matrix products; pure jnp, with a backward pass written by hand.

Inside a chunk that starts from the state S, with g the running sum of log_w (this token counted)
and ge the one before this token, the reads y_i = a_i^T S_{i-1} solve a triangular system. Stack
the queries Q = [r e^g; a e^ge] and the keys J = [k e^-g; b e^-g], both [2C, K]. Then

    P = Q J^T, of which Ark, Arb = tril(P[:C]) and Aak, Aab = strict tril(P[C:])
    (I - Aab) Y = Q_a S + Aak v
    O = Q_r S + Ark v + Arb Y
    S' = diag(e^{g_C}) (S + J^T [v; Y])

With T = (I - Aab)^{-1} and L = [Arb T; T] the first two lines are one product,

    [O; Y] = [Q_r S; 0] + F [Q_a S; v],    F = [L | L Aak + [Ark; 0]],

so F^T alone carries the cotangents back: with G = diag(e^{g_C}) dS',

    [X; dv'] = F^T [dO; J_b G],  D = [dO; X],  dP = mask(D [v; Y]^T),  dv = dv' + J_k G,
    dQ = D S^T + dP J,  dJ = [v; Y] G^T + dP^T Q,  dS = G + Q^T D.

The gradient of log_w needs no product of its own: scaling row i of Q against row i of J moves g_i
alone, so dg = (Q dQ) - (J dJ) summed over a token's rows, and what reaches beyond the chunk is the
row sum of S' dS'.

The reverse direction is the same with the sums run from the right and upper triangles.
T comes from merging blocks, never from the Neumann product, whose powers overflow when many keys of
a chunk are the same, which is what a masked sequence looks like; and the products keep float32
precision, because TF32 or bfloat16 is wrong by per cents exactly there.

The exponents need float32 range, and dg is a difference, whose digits go where a decay lets little
through. So this is for chunks in which no |log_w| is above 64 / C, or above 4; RWKV-7 has log_w >
-0.607. A call with a stronger decay anywhere is computed by the definition, token by token, and
differentiated through it (strong.py), if the caller has not promised that there is none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.choices import fit_chunk, join_time, pad_blocks, segments_of, split_time, unpad_blocks
from pallas_kernels.partition import devices_of
from pallas_kernels.products import HIGHEST, matmul, precise
from pallas_kernels.wkv7.reference import wkv7_reference
from pallas_kernels.wkv7.strong import by_tokens, unless_strong


def _masks(size, reverse):
    """The masks of P: j <= i for the rows of r, j < i for the rows of a; bool [2C, 2C]."""
    square = np.ones((size, size), bool)
    upto, before = (np.triu(square), np.triu(square, 1)) if reverse else (np.tril(square), np.tril(square, -1))
    return np.block([[upto, upto], [before, before]])


def _running_sum(x, reverse):
    """The sum over [..., C, K] up to and with each row; XLA's own cumsum is quadratic on CPU."""
    size = x.shape[-2]
    ones = np.ones((size, size), np.float32)
    triangle = np.triu(ones) if reverse else np.tril(ones)
    return matmul(jnp.broadcast_to(triangle, (*x.shape[:-1], size)), x)


def _square_product(x, y):
    """x y of [..., C, C]; of tiny ones by elements, because XLA on CPU calls a product for each of thousands."""
    size = x.shape[-1]
    return matmul(x, y) if size > 4 else sum(x[..., :, i, None] * y[..., i, None, :] for i in range(size))


def _unit_inverse(strict):
    """(I - strict)^{-1} of strictly triangular [..., C, C]: merges blocks of 1, 2, 4, ... rows."""
    size = strict.shape[-1]
    index = np.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=strict.dtype), strict.shape)
    width = 1
    while width < size:
        block = index // width
        pair = index // (2 * width)
        across = (block[:, None] != block[None]) & (pair[:, None] == pair[None])
        part = jnp.where(across, strict, 0)
        inverse = inverse + (part if width == 1 else _square_product(_square_product(inverse, part), inverse))
        width *= 2
    return inverse


def _factors(r, log_w, k, a, b, reverse):
    """Q and J [..., 2C, K] and the decays e^g, e^ge [..., C, K] and e^{g_C} [..., K, 1]."""
    # The barrier keeps XLA from computing the exponentials once per use.
    upto = jax.lax.optimization_barrier(jnp.exp(_running_sum(log_w, reverse)))
    one = jnp.ones_like(upto[..., :1, :])
    if reverse:
        before, total = jnp.concatenate([upto[..., 1:, :], one], -2), upto[..., :1, :]
    else:
        before, total = jnp.concatenate([one, upto[..., :-1, :]], -2), upto[..., -1:, :]
    undo = 1 / upto
    queries = jnp.concatenate([r * upto, a * before], -2)
    keys = jnp.concatenate([k * undo, b * undo], -2)
    return queries, keys, upto, before, undo, jnp.swapaxes(total, -1, -2)


def _solve(queries, keys_t, reverse):
    """F [..., 2C, 2C] from Q [..., 2C, K] and J^T [..., K, 2C]."""
    size = queries.shape[-2] // 2
    pairs = jnp.where(_masks(size, reverse), matmul(queries, keys_t), 0)
    inverse = _unit_inverse(pairs[..., size:, size:])
    left = jnp.concatenate([_square_product(pairs[..., :size, size:], inverse), inverse], -2)
    right = matmul(left, pairs[..., size:, :size])
    direct = right[..., :size, :] + pairs[..., :size, :size]
    right = jnp.concatenate([direct, right[..., size:, :]], -2)
    return jnp.concatenate([left, right], -1)


def _forward(state, queries, keys_t, solved, total, v):
    """One chunk from its state [..., K, V]: out and reads [..., C, V], and the next state."""
    size = v.shape[-2]
    seen = matmul(queries, state)
    both = matmul(solved, jnp.concatenate([seen[..., size:, :], v], -2))
    out, reads = seen[..., :size, :] + both[..., :size, :], both[..., size:, :]
    state = total * (state + matmul(keys_t, jnp.concatenate([v, reads], -2)))
    return out, reads, state


def _backward(tokens, state, reads, solved_t, d_out, d_next, reverse):
    """The cotangents of one chunk; a state is None where it is zero, d_next where nothing follows.

    Returns those of r, log_w, k, v, a, b and of the state. That of log_w lacks the row sum of
    next_state * d_next [..., K], which the caller adds to every token of the chunk.
    """
    r, log_w, k, v, a, b = tokens
    size = v.shape[-2]
    queries, keys, upto, before, undo, total = _factors(r, log_w, k, a, b, reverse)
    values = jnp.concatenate([v, reads], -2)
    if d_next is None:
        both = matmul(solved_t[..., :size], d_out)
        d_v = both[..., size:, :]
    else:
        d_next = total * d_next
        written = matmul(keys, d_next)
        both = matmul(solved_t, jnp.concatenate([d_out, written[..., size:, :]], -2))
        d_v = written[..., :size, :] + both[..., size:, :]
    d_seen = jnp.concatenate([d_out, both[..., :size, :]], -2)
    d_pairs = jnp.where(_masks(size, reverse), matmul(d_seen, values.mT), 0)
    d_queries, d_keys = matmul(d_pairs, keys), matmul(_turned(d_pairs), queries)
    d_state = None if state is None else matmul(_turned(queries), d_seen)
    if state is not None:
        d_queries = _right_turned(d_seen, state) + d_queries
    if d_next is not None:
        d_keys = _right_turned(values, d_next) + d_keys
        d_state = d_next + d_state
    return _through_decays(tokens, (upto, before, undo), d_queries, d_keys, d_v, reverse), d_state


def _through_decays(tokens, decays, d_queries, d_keys, d_v, reverse):
    """The cotangents of r, log_w, k, v, a, b from those of Q and J."""
    r, _, k, v, a, b = tokens
    upto, before, undo = decays
    size = v.shape[-2]
    d_r, d_a = d_queries[..., :size, :] * upto, d_queries[..., size:, :] * before
    d_k, d_b = d_keys[..., :size, :] * undo, d_keys[..., size:, :] * undo
    early = a * d_a
    d_log_w = _running_sum(r * d_r + early - k * d_k - b * d_b, not reverse) - early
    return d_r, d_log_w, d_k, d_v, d_a, d_b


def _turned(x):
    """x^T, held in memory: XLA on CPU has a slow product for a left factor that it has to read by columns."""
    return jax.lax.optimization_barrier(x.mT)


def _right_turned(x, y):
    """x y^T as (y x^T)^T, for few rows of x: XLA on CPU would turn all of y, in memory that it fetches anew."""
    return jax.lax.optimization_barrier(matmul(y, x.mT)).mT


def _row_sum(x, y):
    """sum_V x y of [..., K, V], as a product: XLA reduces a last axis by scalar loops on CPU."""
    return matmul(x * y, jnp.ones((x.shape[-1], 1), x.dtype))[..., 0]


def _pad(x, length):
    """Pads T with zeros, which change no state."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


# One chunk after another.


def _get(x, index, size):
    """Chunk `index` of [B, T, H, D] as float32 [B, H, C, D]."""
    x = jax.lax.dynamic_slice_in_dim(x, index * size, size, 1)
    return x.astype(jnp.float32).swapaxes(1, 2)


def _put(whole, x, index, size):
    x = x.astype(whole.dtype).swapaxes(1, 2)
    return jax.lax.dynamic_update_slice_in_dim(whole, x, index * size, 1)


def _scan_forward(r, log_w, k, v, a, b, state, size, reverse, give, save):
    count = r.shape[1] // size

    def step(carry, index):
        state, out, given = carry
        r_, log_w_, k_, v_, a_, b_ = (_get(x, index, size) for x in (r, log_w, k, v, a, b))
        queries, keys, *_, total = _factors(r_, log_w_, k_, a_, b_, reverse)
        keys_t = _turned(keys)
        solved = _solve(queries, keys_t, reverse)
        o, reads, following = _forward(state, queries, keys_t, solved, total, v_)
        if give:  # written where it is wanted: stacked by the scan it would be transposed afterwards
            given = jax.lax.dynamic_update_slice_in_dim(given, following[:, None], index + 1, 1)
        saved = (None if give else state, reads, solved.mT) if save else None
        return (following, _put(out, o, index, size), given), saved

    given = None
    if give:  # any number will do behind the first; with a constant XLA fills one array, and copies it for each layer
        anything = r[0, 0, 0, 0].astype(state.dtype)
        given = jax.lax.pad(state[:, None], anything, [(0, count if axis == 1 else 0, 0) for axis in range(5)])
    carry = state, jnp.zeros(v.shape, v.dtype), given
    (final, out, given), saved = jax.lax.scan(step, carry, jnp.arange(count), reverse=reverse)
    return (out, given if give else final), (given, saved, final)


def _scan_backward(size, reverse, give, arrays, kept, cotangents):
    *tokens, _ = arrays
    given, saved, final = kept
    d_out, d_states = cotangents
    count = d_out.shape[1] // size
    d_final = d_states[:, count] if give else d_states

    def step(carry, chunk):
        d_next, beyond, grads = carry
        index, (state, reads, solved_t) = chunk
        state = jax.lax.dynamic_index_in_dim(given, index, 1, keepdims=False) if give else state
        chunk = [_get(x, index, size) for x in tokens]
        chunk_grads, d_state = _backward(chunk, state, reads, solved_t, _get(d_out, index, size), d_next, reverse)
        if give:
            d_state = d_state + jax.lax.dynamic_index_in_dim(d_states, index, 1, keepdims=False)
        chunk_grads = list(chunk_grads)
        chunk_grads[1] = chunk_grads[1] + beyond[..., None, :]
        grads = [_put(whole, x, index, size) for whole, x in zip(grads, chunk_grads, strict=True)]
        return (d_state, _row_sum(state, d_state), grads), None

    grads = [jnp.zeros(x.shape, x.dtype) for x in tokens]
    carry = d_final, _row_sum(final, d_final), grads
    chunks = jnp.arange(count), saved
    (d_state, _, grads), _ = jax.lax.scan(step, carry, chunks, reverse=not reverse)
    return *grads, d_state


def _scan_definition(r, log_w, k, v, a, b, state, size, reverse, give):
    out, final, before = by_tokens(r, log_w, k, v, a, b, state, size, reverse)
    return out, jnp.concatenate([before, final[None]]).swapaxes(0, 1) if give else final


# (out, the final state), or to give (out, the states before N chunks and the final one [B, N + 1, H, K, V]).
_scan = unless_strong(_scan_forward, _scan_backward, _scan_definition)


CHUNK = 16  # tokens, one chunk after another
LONGEST_ALONE = 48  # tokens of a single chunk that costs less than several: on a CPU a third at 32, as much at 64


def wkv7_chunked(r, log_w, k, v, a, b, initial_state, reverse=False, chunk_size=None, final_state=True, mild=False):
    """One chunk after another: what trains fastest on CPU. Shapes as in wkv7; initial_state may be None.

    Backward keeps a state, the reads and F per chunk: K V / C + V + 4 C floats per token and head. A single chunk whose
    final state is not wanted, which a block of block diffusion often is, computes nothing of states: so a short
    sequence of mild decays is one chunk, unless chunk_size is given.
    """
    length = r.shape[1]
    size = fit_chunk(CHUNK if chunk_size is None else chunk_size, length)
    if chunk_size is None and mild and not final_state and CHUNK < length <= LONGEST_ALONE:
        size = length
    padded = -(-length // size) * size
    tokens = [_pad(x, padded) for x in (r, log_w, k, v, a, b)]
    if padded == size and not final_state:
        rows = _rows(tokens[0])
        joined = [x.reshape(rows, -1, *x.shape[2:]) for x in tokens]
        state = None if initial_state is None else initial_state.reshape(rows, -1, *initial_state.shape[1:])
        return _alone(*joined, state, mild, size, reverse).reshape(tokens[3].shape)[:, :length], None
    if initial_state is None:
        initial_state = jnp.zeros((r.shape[0], r.shape[2], r.shape[3], v.shape[3]))
    out, state = _scan(*tokens, initial_state, mild, size, reverse, False)
    return out[:, :length], state if final_state else None


def wkv7_blocks_chunked(r, log_w, k, v, a, b, initial_state, block, chunk_size=CHUNK, mild=False):
    """`wkv7_chunked` from left to right, with the states between blocks: as wkv7_blocks."""
    tokens, size, span = pad_blocks((r, log_w, k, v, a, b), block, chunk_size)
    out, states = _scan(*tokens, initial_state, mild, size, False, True)
    return unpad_blocks(out, block, span), states[:, :: span // size]


# Chunks that know nothing of each other.

STRETCH = 2**15  # floats of an input that are worked on at once, so that what comes of them stays in a core's cache


def _rows(x):
    """How many of the sequences [B, C, H, D] to take at once; all of them where no such number divides them."""
    fitting = max(1, STRETCH // (x.size // x.shape[0]))
    return next((n for n in range(fitting, fitting // 4, -1) if x.shape[0] % n == 0), x.shape[0])


def _alone_forward(r, log_w, k, v, a, b, state, size, reverse, save):
    tokens = r, log_w, k, v, a, b

    def step(out, index):
        r_, log_w_, k_, v_, a_, b_ = (_get(x, index, size) for x in tokens)
        queries, keys, *_, total = _factors(r_, log_w_, k_, a_, b_, reverse)
        solved = _solve(queries, keys.mT, reverse)
        if state is None:
            both = matmul(solved[..., size:], v_)
            o, reads = both[..., :size, :], both[..., size:, :]
        else:  # the state that follows is not read, so XLA leaves it out
            before = jax.lax.dynamic_index_in_dim(state, index, 1, keepdims=False)
            o, reads, _ = _forward(before, queries, keys.mT, solved, total, v_)
        return _put(out, o, index, size), (reads, solved.mT) if save else None

    out, saved = jax.lax.scan(step, jnp.zeros(v.shape, v.dtype), jnp.arange(r.shape[1] // size))
    return out, saved


def _alone_backward(size, reverse, arrays, saved, d_out):
    *tokens, states = arrays

    def step(carry, chunk):
        grads, d_states = carry
        index, (reads, solved_t) = chunk
        chunk = [_get(x, index, size) for x in tokens]
        state = None if states is None else jax.lax.dynamic_index_in_dim(states, index, 1, keepdims=False)
        chunk_grads, d_state = _backward(chunk, state, reads, solved_t, _get(d_out, index, size), None, reverse)
        if states is not None:
            d_states = jax.lax.dynamic_update_slice_in_dim(d_states, d_state[:, None], index, 1)
        grads = [_put(whole, x, index, size) for whole, x in zip(grads, chunk_grads, strict=True)]
        return (grads, d_states), None

    zeros = [jnp.zeros(x.shape, x.dtype) for x in tokens], None if states is None else jnp.zeros(states.shape)
    (grads, d_states), _ = jax.lax.scan(step, zeros, (jnp.arange(d_out.shape[1] // size), saved))
    return *grads, d_states


def _alone_definition(r, log_w, k, v, a, b, state, size, reverse):
    if state is None:
        state = jnp.zeros((r.shape[0], r.shape[1] // size, *r.shape[2:], v.shape[3]))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(_, chunk):
        *tokens, state = chunk
        return None, wkv7_reference(*tokens, state, reverse)[0]

    chunks = *(split_time(x, size) for x in (r, log_w, k, v, a, b)), state.swapaxes(0, 1)
    return join_time(jax.lax.scan(step, None, chunks)[1])


# out [B, N C, H, V] of N chunks a row, [B, N C, H, D] each, from their own states [B, N, H, K, V] or None. The chunks
# of a row are taken one after another, so that a batch that is split over devices stays so.
_alone = unless_strong(_alone_forward, _alone_backward, _alone_definition)


# All chunks of a segment at once, and their states by an associative scan.


def _split(x, size):
    """[B, T, H, D] -> float32 [N, B, H, C, D]."""
    batch, length, heads, depth = x.shape
    x = x.astype(jnp.float32).reshape(batch, length // size, size, heads, depth)
    return x.transpose(1, 0, 3, 2, 4)


def _join(x, dtype):
    """[N, B, H, C, D] -> [B, T, H, D]."""
    count, batch, heads, size, depth = x.shape
    x = x.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, depth)
    return x.astype(dtype)


def states_between(transitions, inputs, state, reverse):
    """The states before and after each of N affine maps S' = M S + U taken in order.

    transitions [N, ..., K, K], inputs [N, ..., K, V], state [..., K, V].
    """

    def then(first, second):
        (m1, u1), (m2, u2) = first, second
        return matmul(m2, m1), matmul(m2, u1) + u2

    moves, adds = jax.lax.associative_scan(then, (transitions, inputs), reverse=reverse)
    after = matmul(moves, state[None]) + adds
    if reverse:
        return jnp.concatenate([after[1:], state[None]]), after
    return jnp.concatenate([state[None], after[:-1]]), after


def _segment_parts(r, log_w, k, v, a, b, reverse):
    """What each chunk does without knowing its state: Q, J^T, F, e^{g_C}, E and M.

    [O; Y] = E S + F [0; v], with E = [Q_r; 0] + L Q_a, and S' = M S + what the chunk writes itself.
    """
    size = v.shape[-2]
    queries, keys, *_, total = _factors(r, log_w, k, a, b, reverse)
    solved = _solve(queries, keys.mT, reverse)
    effect = matmul(solved[..., :size], queries[..., size:, :])
    upper = effect[..., :size, :] + queries[..., :size, :]
    reads = effect[..., size:, :]
    eye = jnp.eye(queries.shape[-1], dtype=jnp.float32)
    transition = matmul(keys[..., size:, :].mT, reads)
    transition = total * (transition + jnp.broadcast_to(eye, transition.shape))
    return queries, keys, solved, total, upper, transition


def _segments_forward(r, log_w, k, v, a, b, state, size, reverse, count, give, precision, save):
    tokens = r, log_w, k, v, a, b
    span = r.shape[1] // count

    def step(state, segment):
        chunks = [_split(x, size) for x in segment]
        v_ = chunks[3]
        queries, keys, solved, total, _, transition = _segment_parts(*chunks, reverse)
        alone = matmul(solved[..., size:, size:], v_)
        write = total * matmul(keys.mT, jnp.concatenate([v_, alone], -2))
        before, after = states_between(transition, write, state, reverse)
        out, _, _ = _forward(before, queries, keys.mT, solved, total, v_)
        return after[0 if reverse else -1], (_join(out, v.dtype), before)

    with precise(precision):
        state, (out, before) = jax.lax.scan(step, state, [split_time(x, span) for x in tokens], reverse=reverse)
    return (join_time(out), state, before if give else None), (before, state) if save else None


def _segments_backward(size, reverse, count, give, precision, arrays, kept, cotangents):
    *tokens, _ = arrays
    saved, final = kept
    d_out, d_final, d_given = cotangents
    span = d_out.shape[1] // count

    def step(carry, segment):
        d_final, final = carry
        before, d_given, d_out, *segment = segment
        chunks = [_split(x, size) for x in segment]
        v_ = chunks[3]
        d_out = _split(d_out, size)
        queries, _, solved, _, upper, transition = _segment_parts(*chunks, reverse)
        reads = matmul(
            solved[..., size:, :],
            jnp.concatenate([matmul(queries[..., size:, :], before), v_], -2),
        )
        arriving = matmul(upper.mT, d_out)
        arriving = arriving + d_given if give else arriving
        d_after, d_before = states_between(transition.mT, arriving, d_final, not reverse)
        grads, _ = _backward(chunks, before, reads, solved.mT, d_out, d_after, reverse)
        if reverse:
            after = jnp.concatenate([final[None], before[:-1]])
            first = -1
        else:
            after = jnp.concatenate([before[1:], final[None]])
            first = 0
        grads = list(grads)
        grads[1] = grads[1] + _row_sum(after, d_after)[..., None, :]
        grads = [_join(x, y.dtype) for x, y in zip(grads, segment, strict=True)]
        return (d_before[first], before[first]), grads

    segments = saved, d_given, split_time(d_out, span), *(split_time(x, span) for x in tokens)
    with precise(precision):
        (d_state, _), grads = jax.lax.scan(step, (d_final, final), segments, reverse=not reverse)
    return *(join_time(x) for x in grads), d_state


def _segments_definition(r, log_w, k, v, a, b, state, size, reverse, count, give, precision):
    out, final, before = by_tokens(r, log_w, k, v, a, b, state, size, reverse)
    return out, final, before.reshape(count, -1, *final.shape) if give else None


# (out, final state, the states before the chunks [segments, N, B, H, K, V] to give, else None).
_segments = unless_strong(_segments_forward, _segments_backward, _segments_definition)


def segment_of(shape, value, on_cpu=False):
    """How many tokens of each [B, T, H, K] to take at once, for values of width `value`.

    An accelerator has to be filled, and pays for every launch; a CPU core has a cache to stay in. Under vmap the mapped
    axis is not seen.
    """
    batch, _, heads, key = shape
    numbers = 2**18 if on_cpu else 2**23  # of an input; about 0.6 GB forward, 0.9 GB backward
    return numbers * devices_of("btgk", shape) // (batch * heads * max(key, value))


def wkv7_associative(
    r, log_w, k, v, a, b, initial_state, reverse=False, chunk_size=64, segment=None, mild=False, precision=HIGHEST
):
    """All chunks of a segment at once, their states by an associative scan; for accelerators.

    Shapes as in wkv7. Segments of about `segment` tokens (None: `segment_of`) follow one another, so that the matrices
    of the scan take memory for one segment only; backward keeps one state per chunk. All chunks of a segment being
    parallel, nothing is gained by splitting the time axis further, as split.py does for a kernel.
    """
    length = r.shape[1]
    size = fit_chunk(chunk_size, length)
    count, each = segments_of(-(-length // size), size, segment or segment_of(r.shape, v.shape[-1]))
    tokens = [_pad(x, count * each * size) for x in (r, log_w, k, v, a, b)]
    out, state, _ = _segments(*tokens, initial_state, mild, size, reverse, count, False, precision)
    return out[:, :length], state


def wkv7_blocks_associative(
    r, log_w, k, v, a, b, initial_state, block, chunk_size=64, segment=None, mild=False, precision=HIGHEST
):
    """`wkv7_associative` from left to right, with the states between blocks: as wkv7_blocks."""
    tokens, size, span = pad_blocks((r, log_w, k, v, a, b), block, chunk_size)
    length = tokens[0].shape[1]
    blocks = length // span
    count, each = segments_of(blocks, span, segment or segment_of(r.shape, v.shape[-1]))
    tokens = [_pad(x, count * each * span) for x in tokens]
    out, state, before = _segments(*tokens, initial_state, mild, size, False, count, True, precision)
    before = before.reshape(-1, *state.shape)[:: span // size][:blocks]
    states = jnp.concatenate([before, state[None]]).swapaxes(0, 1)
    return unpad_blocks(out[:, :length], block, span), states
