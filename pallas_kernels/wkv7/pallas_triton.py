"""WKV-7 for NVIDIA GPUs from Ampere on, forward and backward, in Pallas through Triton; the formulas are chunked.py's.

Its programs are those of walks.py, over chunks of 16 tokens: what a chunk costs beside its products with the [K, V]
state grows with the square of its tokens. What a part of the time axis does to the state is an affine map, M S + U.
Backward walks the same way first, to write the state before each chunk, and then the other way, with the cotangent of
the state; all else of a chunk it computes again. Hopper GPUs have a kernel of their own (pallas_gpu.py).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import walks
from pallas_kernels.walks import NN, NT, TN, Program, halves, product
from pallas_kernels.wkv7.strong import LIMIT

SIZE = 16  # tokens of a chunk
WARPS = 4
MOST = 64  # channels of a head
LEAST = 16  # chunks of a part


def unsupported(tokens):
    """Why wkv7_pallas_triton does not take the tokens of one direction, in a sentence; None if it does."""
    r, _, k, v, a, b = tokens
    sizes = r.shape[-1], v.shape[-1]
    if any(x.dtype != jnp.bfloat16 for x in (r, k, v, a, b)):
        found = ", ".join(sorted({str(x.dtype) for x in (r, k, v, a, b)}))
        return f"its tensor cores take r, k, v, a and b in bfloat16, not {found}"
    if any(size < 16 or size & (size - 1) or size > MOST for size in sizes):
        return f"it takes K and V that are powers of two from 16 to {MOST}, not {sizes[0]} and {sizes[1]}"
    return walks.unsupported(r.shape[0], r.shape[2])


def parts_of(shape):
    """Into how many parts the time axis of [B, T, H, K] is cut."""
    parts = walks.fitting_parts(shape, SIZE, LEAST)
    return parts if parts > 2 else 1  # finding the maps of two takes as long as the half that they save


# Under jit, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("reverse", "chunk_size", "parts", "interpret"))
def wkv7_pallas_triton(tokens, states, reverse, chunk_size=None, *, parts=None, interpret=False):
    """WKV-7 in one or both directions, one after another.

    Args:
      tokens: per direction (r, log_w, k, v, a, b), [B, T, H, K] and v [B, T, H, V]; all bfloat16 but log_w.
      states: per direction [B, H, K, V] float32, the state before its first token.
      reverse: per direction, whether it runs from the last token to the first.
      chunk_size: 16, the only one.
      parts: of the time axis, which run side by side; None is `parts_of`.
      interpret: run the kernels' programs on any platform, slowly, for tests.

    Returns:
      Per direction out [B, T, H, V] bfloat16 and final_state [B, H, K, V] float32. Differentiable in reverse mode.

    Raises:
      ValueError: another chunk_size, or parts that is no positive integer.
    """
    if chunk_size not in (None, SIZE):
        raise ValueError(f"The Triton kernel of wkv7 has chunks of {SIZE} tokens, not {chunk_size}.")
    shape = tokens[0][0].shape
    each = walks.chunks_of_a_part(parts_of(shape) if parts is None else parts, shape[1], SIZE)
    results = []
    for (r, log_w, *others), state, turned in zip(tokens, states, reverse, strict=True):
        results.append(_wkv7(r, log_w.astype(jnp.float32), *others, state, turned, each, interpret))
    return tuple(results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _wkv7(r, log_w, k, v, a, b, state, reverse, each, interpret):
    """One direction, in parts of `each` chunks."""
    tokens = r, log_w, k, v, a, b
    launch = functools.partial(_launch, reverse=reverse, each=each, interpret=interpret)
    out, ends = launch(_forward, tokens, (state, *walks.if_in_parts(launch, _maps, tokens, each, SIZE)))
    return out, ends[:, -1]


def _wkv7_forward(*arguments):
    return _wkv7(*arguments), arguments[:7]


def _wkv7_backward(reverse, each, interpret, kept, cotangents):
    *tokens, state = kept
    d_out, d_final = cotangents
    launch = functools.partial(_launch, reverse=reverse, each=each, interpret=interpret)
    maps = walks.if_in_parts(launch, _maps, tokens, each, SIZE)
    states, ends = launch(_states, tokens, (state, *maps))
    tokens = (*tokens, d_out)
    adds = walks.if_in_parts(launch, _backward_maps, tokens, each, SIZE)
    *gradients, starts = launch(_backward, tokens, (states, ends, d_final, *maps[:1], *adds))
    return *gradients, starts[:, 0]


_wkv7.defvjp(_wkv7_forward, _wkv7_backward)


def _launch(program, tokens, given, *, reverse, each, interpret):
    """What a program writes.

    Args:
      program: of those below, which say what they are given and write.
      tokens: r, log_w, k, v, a, b as in wkv7, and for some programs d_out as v.
      given: [B, H, K, V], [B, parts, H, K, V], [B, parts, H, K, K] or [B, chunks, H, K, V].
      each: chunks of a part.
    """
    letters = ["btgk", "btgk", "btgk", "btgv", "btgk", "btgk", "btgv"][: len(tokens)]
    letters += ["bgkv" if x.ndim == 4 else "b_gkv" for x in given]
    key, value = tokens[0].shape[-1], tokens[3].shape[-1]

    def results(batch, length, heads, chunks, parts):
        keys = "btgk", (batch, length, heads, key)
        found = {name: (*keys, tokens[i].dtype) for i, name in enumerate("rwkvab")}
        return found | {
            "v": ("btgv", (batch, length, heads, value), tokens[3].dtype),
            "move": ("b_gkv", (batch, parts, heads, key, key), jnp.float32),
            "state": ("b_gkv", (batch, parts, heads, key, value), jnp.float32),
            "states": ("b_gkv", (batch, chunks, heads, key, value), jnp.float32),
        }

    options = {"size": SIZE, "each": each, "reverse": reverse, "warps": WARPS, "interpret": interpret}
    return walks.launch(program, tokens, given, letters, results, **options)


# The programs. The names are those of chunked.py; what has C tokens and K or V channels is turned, [K, C] or [V, C], so
# that a product has no fewer rows than a GPU's four warps multiply.


class Solved:
    """What a chunk does without knowing its state; matrices of which products are made are halves.

    Attributes:
      r, k, a, b, upto, before, undo: [C, K].
      q_r, q_a, j_k, j_b: [K, C].
      v: [V, C].
      ak, inverse: [C, C].
      total: [K, 1].
    """

    def __init__(self, chunk):
        self.chunk = chunk
        self.r, log_w, self.k, v, self.a, self.b = map(chunk.read, range(6))
        self.v = halves(v.T)
        g, total = chunk.running_sum(log_w)
        g = jnp.where(jnp.abs(g) <= LIMIT, g, jnp.nan)  # what float32 cannot hold is not to look like a number
        self.upto, self.before, self.undo = jnp.exp(g), jnp.exp(g - log_w), jnp.exp(-g)
        self.total = jnp.exp(total)[:, None]
        self.q_r, self.q_a = halves((self.r * self.upto).T), halves((self.a * self.before).T)
        self.j_k, self.j_b = halves((self.k * self.undo).T), halves((self.b * self.undo).T)
        self.ak = halves(jnp.where(chunk.before, product(self.q_a, self.j_k, TN), 0))
        self.inverse = halves(_unit_inverse(chunk, jnp.where(chunk.before, product(self.q_a, self.j_b, TN), 0)))

    def reads(self, state, written=True):
        """Y, turned, from the halves of the state before the chunk; of a chunk that writes values, or does not."""
        seen = product(state, self.q_a, TN)
        return halves(product(seen + product(self.v, self.ak, NT) if written else seen, self.inverse, NT))

    def followed(self, state, reads, written=True):
        """The state after the chunk."""
        state = state + product(self.j_b, reads, NT)
        return self.total * (state + product(self.j_k, self.v, NT) if written else state)

    def direct(self):
        """Ark and Arb."""
        pairs = (product(self.q_r, keys, TN) for keys in (self.j_k, self.j_b))
        return tuple(halves(jnp.where(self.chunk.taken, x, 0)) for x in pairs)

    def d_reads(self, d_next, rb, d_out):
        """The cotangent X of what a token reads, turned, from diag(e^{g_C}) dS' and that of out."""
        return halves(product(product(d_next, self.j_b, TN) + product(d_out, rb, NN), self.inverse, NN))

    def d_state(self, d_next, d_out, d_reads):
        """The cotangent of the state before the chunk."""
        return d_next + product(self.q_r, d_out, NT) + product(self.q_a, d_reads, NT)


def _unit_inverse(chunk, strict):
    """(I - strict)^{-1} of a strictly triangular [C, C], by merging blocks of 1, 2, 4, ... rows."""
    inverse = jnp.where(chunk.row == chunk.column, 1.0, 0.0)
    for shift in range(SIZE.bit_length() - 1):
        across = (chunk.row >> shift) != (chunk.column >> shift)
        part = jnp.where(across & ((chunk.row >> shift + 1) == (chunk.column >> shift + 1)), strict, 0)
        if shift:
            known = halves(inverse)
            part = product(product(known, part, NN), known, NN)
        inverse += part
    return inverse


def _mapped(state, move, add, turned=NN):
    """The state after a part, or with TN the cotangent of that before it."""
    return product(move, state, turned) + add


def _zeros(walk):
    """A state."""
    return jnp.zeros((walk.refs[0].shape[-1], walk.refs[3].shape[-1]), jnp.float32)


def _run_maps(walk, given, written):
    """M and U of a part."""
    del given
    moves, adds = written
    at = walk.sequence, walk.part, walk.head

    def step(chunk, carry):
        move, add = carry
        solved = Solved(chunk)
        move = solved.followed(move, solved.reads(halves(move), written=False), written=False)
        return move, solved.followed(add, solved.reads(halves(add)))

    key = walk.refs[0].shape[-1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (key, key), i) for i in (0, 1))
    moves[at], adds[at] = walk.over_chunks(step, (jnp.where(row == column, 1.0, 0.0), _zeros(walk)))


def _run_states(walk, given, written):
    """The states before the chunks, and after the parts."""
    states, ends = written

    def step(chunk, state):
        states[walk.sequence, chunk.number, walk.head] = state
        solved = Solved(chunk)
        return solved.followed(state, solved.reads(halves(state)))

    ends[walk.sequence, walk.part, walk.head] = walk.over_chunks(step, walk.start(_mapped, *given))


def _run_forward(walk, given, written):
    """out, and the states after the parts."""
    out, ends = written

    def step(chunk, state):
        solved = Solved(chunk)
        known = halves(state)
        reads, (rk, rb) = solved.reads(known), solved.direct()
        seen = product(known, solved.q_r, TN)
        chunk.write(out, (seen + product(solved.v, rk, NT) + product(reads, rb, NT)).T)
        return solved.followed(state, reads)

    ends[walk.sequence, walk.part, walk.head] = walk.over_chunks(step, walk.start(_mapped, *given))


def _run_backward_maps(walk, given, written):
    """The cotangent of the state before a part, if that of the one after it is zero."""
    del given
    (adds,) = written

    def step(chunk, d_state):
        solved = Solved(chunk)
        d_next, d_out = solved.total * d_state, halves(chunk.read(6).T)
        return solved.d_state(d_next, d_out, solved.d_reads(d_next, solved.direct()[1], d_out))

    adds[walk.sequence, walk.part, walk.head] = walk.over_chunks(step, _zeros(walk))


def _run_backward(walk, given, written):
    """The cotangents of r, log_w, k, v, a and b, and of the states before the parts."""
    states, ends, *start = given
    d_r, d_log_w, d_k, d_v, d_a, d_b, starts = written
    at = walk.sequence, walk.part, walk.head

    def step(chunk, carry):
        d_state, beyond = carry
        solved = Solved(chunk)
        state, d_out = states[walk.sequence, chunk.number, walk.head], halves(chunk.read(6).T)
        known, (rk, rb) = halves(state), solved.direct()
        d_next = solved.total * d_state
        told = halves(d_next)
        reads, d_reads = solved.reads(known), solved.d_reads(told, rb, d_out)
        direct = product(d_out, rk, NN) + product(d_reads, solved.ak, NN)
        chunk.write(d_v, (product(told, solved.j_k, TN) + direct).T)

        def pairs(mask, d, x):
            return halves(jnp.where(mask, product(d, x, TN), 0))

        d_rk, d_rb = (pairs(chunk.taken, d_out, x) for x in (solved.v, reads))
        d_ak, d_ab = (pairs(chunk.before, d_reads, x) for x in (solved.v, reads))

        def queries(d, by_k, by_b):
            return (product(known, d, NN) + product(solved.j_k, by_k, NT) + product(solved.j_b, by_b, NT)).T

        def keys(x, by_r, by_a):
            return (product(told, x, NN) + product(solved.q_r, by_r, NN) + product(solved.q_a, by_a, NN)).T

        through = 0.0  # of g, which every token's own r, k, a and b are scaled by
        for ref, sign, x, gradient in (
            (d_r, 1, solved.r, queries(d_out, d_rk, d_rb) * solved.upto),
            (d_k, -1, solved.k, keys(solved.v, d_rk, d_ak) * solved.undo),
            (d_b, -1, solved.b, keys(reads, d_rb, d_ab) * solved.undo),
            (d_a, 1, solved.a, queries(d_reads, d_ak, d_ab) * solved.before),
        ):
            chunk.write(ref, gradient)
            last = x * gradient
            through += sign * last
        upto, total = chunk.running_sum(through)
        chunk.write(d_log_w, total + through - upto - last + beyond)  # the last is a's, by the decay before the token
        d_state = solved.d_state(d_next, d_out, d_reads)
        return d_state, jnp.sum(state * d_state, 1)

    d_state = walk.start(functools.partial(_mapped, turned=TN), *start)
    starts[at], _ = walk.over_chunks(step, (d_state, jnp.sum(ends[at] * d_state, 1)))


_maps = Program("wkv7_maps", _run_maps, ("move", "state"))
_backward_maps = Program("wkv7_backward_maps", _run_backward_maps, ("state",), onward=False)
_forward = Program("wkv7_forward", _run_forward, ("v", "state"))
_states = Program("wkv7_states", _run_states, ("states", "state"))
_backward = Program("wkv7_backward", _run_backward, ("r", "w", "k", "v", "a", "b", "state"), onward=False)
