"""SSD for NVIDIA GPUs from Ampere on, forward and backward, in Pallas through Triton; the formulas are chunked.py's.

Its programs are those of walks.py: nothing of a chunk but its outputs is written. What a part of the time axis does to
the [P, N] state is what it adds, and a decay. Backward walks the same way first, to write the state before each chunk,
and then the other way, with the cotangent of the state. A token's gradients of b and c are written for each head, and
XLA adds these up.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import walks
from pallas_kernels.ssd.chunked import FLOOR, GRID
from pallas_kernels.walks import NN, NT, TN, Program, product

SIZE = 64  # tokens of a chunk
WARPS = 4  # with more, fewer programs fit on a multiprocessor, and all issue more instructions together
MOST = 64 * 128  # entries of a state
LEAST = 4  # chunks of a part


def unsupported(x, b, c):
    """Why ssd_pallas_gpu does not take these inputs, in a sentence; None if it does."""
    sizes = x.shape[-1], b.shape[-1]
    if any(z.dtype != jnp.bfloat16 for z in (x, b, c)):
        found = ", ".join(sorted({str(z.dtype) for z in (x, b, c)}))
        return f"its tensor cores take x, b and c in bfloat16, not {found}"
    if any(size < 16 or size & (size - 1) for size in sizes) or sizes[0] * sizes[1] > MOST:
        return f"it takes P and N that are powers of two from 16 on, P N at most {MOST}, not {sizes[0]} and {sizes[1]}"
    return walks.unsupported(x.shape[0], x.shape[2])


def parts_of(shape):
    """Into how many parts the time axis of x [B, T, H, P] is cut."""
    return walks.fitting_parts(shape, SIZE, LEAST)


# Under jit, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("reverse", "parts", "interpret"))
def ssd_pallas_gpu(x, log_a, b, c, state, reverse=False, *, parts=None, interpret=False):
    """SSD as in ssd, of x, b and c in bfloat16.

    Args:
      parts: of the time axis, which run side by side; None is `parts_of`.
      interpret: run the kernels' programs on any platform, slowly, for tests.

    Raises:
      ValueError: parts that is no positive integer.
    """
    heads, groups = x.shape[2], b.shape[2]
    if 1 < groups < heads:
        b, c = (jnp.repeat(z, heads // groups, 2) for z in (b, c))
    each = walks.chunks_of_a_part(parts_of(x.shape) if parts is None else parts, x.shape[1], SIZE)
    return _ssd(x, log_a.astype(jnp.float32), b, c, state, reverse, each, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _ssd(x, log_a, b, c, state, reverse, each, interpret):
    """As ssd_pallas_gpu, in parts of `each` chunks, of one group of heads or as many as heads."""
    tokens = x, log_a, b, c
    launch = functools.partial(_launch, reverse=reverse, each=each, interpret=interpret)
    y, ends = launch(_forward, tokens, (state, *walks.if_in_parts(launch, _writing, tokens, each, SIZE)))
    return y, ends[:, -1]


def _ssd_forward(*arguments):
    return _ssd(*arguments), arguments[:5]


def _ssd_backward(reverse, each, interpret, kept, cotangents):
    *tokens, state = kept
    d_y, d_final = cotangents
    launch = functools.partial(_launch, reverse=reverse, each=each, interpret=interpret)
    maps = walks.if_in_parts(launch, _writing, tokens, each, SIZE)
    (states,) = launch(_states, tokens, (state, *maps))
    tokens = (*tokens, d_y)
    d_maps = walks.if_in_parts(launch, _reading, tokens, each, SIZE)
    d_x, d_log_a, d_b, d_c, d_starts = launch(_backward, tokens, (d_final, *d_maps, states))
    d_log_a = jnp.where(tokens[1] > FLOOR, d_log_a, 0)
    groups = tokens[2].shape[2]
    d_b, d_c = (z.reshape(*z.shape[:2], groups, -1, z.shape[-1]).sum(3).astype(jnp.bfloat16) for z in (d_b, d_c))
    return d_x, d_log_a, d_b, d_c, d_starts[:, 0]


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _launch(program, tokens, given, *, reverse, each, interpret):
    """What a program writes.

    Args:
      program: of those below, which say what they are given and write.
      tokens: x [B, T, H, P], log_a [B, T, H], b, c [B, T, G, N] with G = 1 or H, and for some programs d_y as x.
      given: [B, H, P, N], [B, parts, H, P, N], [B, parts, H] or [B, chunks, H, P, N].
      each: chunks of a part.
    """
    x, b = tokens[0], tokens[2]
    grouped = "bt_n" if b.shape[2] == 1 else "btgn"
    letters = ["btgp", "btg", grouped, grouped, "btgp"][: len(tokens)]
    letters += [{3: "b_g", 4: "bgpn", 5: "b_gpn"}[z.ndim] for z in given]
    pairs = x.shape[-1], b.shape[-1]

    def results(batch, length, heads, chunks, parts):
        return {
            "x": ("btgp", (batch, length, heads, pairs[0]), x.dtype),
            "log_a": ("btg", (batch, length, heads), jnp.float32),
            "b": ("btgn", (batch, length, heads, pairs[1]), jnp.float32),
            "map": ("b_gpn", (batch, parts, heads, *pairs), jnp.float32),
            "decay": ("b_g", (batch, parts, heads), jnp.float32),
            "state": ("b_gpn", (batch, chunks, heads, *pairs), jnp.float32),
        }

    options = {"size": SIZE, "each": each, "reverse": reverse, "warps": WARPS, "interpret": interpret}
    return walks.launch(program, tokens, given, letters, results, **options)


# The programs.


def _mapped(state, add, decay):
    """The state on the other side of a part."""
    return decay * state + add


def _decays(chunk):
    """L [C, C] as in chunked.py; e^g and e^{g_C - g}, [C, 1] each; and e^{g_C}."""
    log_a = chunk.read(1)
    log_a = jnp.where(log_a < FLOOR, FLOOR, log_a)  # Triton's maximum of a number and NaN is the number
    coarse = jnp.floor(log_a * GRID + 0.5) / GRID
    between, upto, rest, whole = (jnp.zeros(()),) * 4
    for part in (coarse, log_a - coarse):  # of the first all sums and differences are exact
        g, total = chunk.running_sum(part)
        between += g[:, None] - g[None, :]
        upto, rest, whole = upto + g, rest + (total - g), whole + total
    between = jnp.exp(jnp.where(chunk.taken, between, -jnp.inf))
    return between, jnp.exp(upto)[:, None], jnp.exp(rest)[:, None], jnp.exp(whole)


def _followed(walk, chunk, state, *, reads):
    """The state, or its cotangent where the walk goes against the recurrence, on the other side of a chunk; its decay.

    reads: the numbers of the two arrays whose outer products are added.
    """
    _, upto, rest, whole = _decays(chunk)
    x, b = map(chunk.read, reads)
    return whole * state + product((rest if walk.onward else upto) * x, b, TN), whole


def _run_maps(walk, given, written, reads):
    """What a part adds to the state, and its decay."""
    del given
    adds, decays = written

    def step(chunk, carry):
        state, decay = carry
        state, whole = _followed(walk, chunk, state, reads=reads)
        return state, decay * whole

    zeros = jnp.zeros((walk.refs[0].shape[-1], walk.refs[2].shape[-1]), jnp.float32)
    at = walk.sequence, walk.part, walk.head
    adds[at], decays[at] = walk.over_chunks(step, (zeros, jnp.float32(1)))


def _run_states(walk, given, written):
    (states,) = written

    def step(chunk, state):
        states[walk.sequence, chunk.number, walk.head] = state
        return _followed(walk, chunk, state, reads=(0, 2))[0]

    walk.over_chunks(step, walk.start(_mapped, *given))


def _run_forward(walk, given, written):
    y, ends = written

    def step(chunk, state):
        between, upto, rest, whole = _decays(chunk)
        x, b, c = map(chunk.read, (0, 2, 3))
        within = product(product(c, b, NT) * between, x, NN)
        chunk.write(y, within + upto * product(c, state, NT))
        return whole * state + product(rest * x, b, TN)

    ends[walk.sequence, walk.part, walk.head] = walk.over_chunks(step, walk.start(_mapped, *given))


def _run_backward(walk, given, written):
    *start, states = given
    d_x, d_log_a, d_b, d_c, starts = written

    def step(chunk, d_state):
        between, upto, rest, whole = _decays(chunk)
        x, b, c, d_y = map(chunk.read, (0, 2, 3, 4))
        state = states[walk.sequence, chunk.number, walk.head]
        d_end = whole * jnp.sum(d_state * state)  # of the sum over the chunk, g_C
        d_read = upto * product(d_y, state, NN)  # of c, by the state
        d_g = jnp.sum(d_read * c, 1)
        d_pairs = product(d_y, x, NT) * between
        chunk.write(d_c, product(d_pairs, b, NN) + d_read)
        d_kept = rest * product(b, d_state, NT)  # of x, by what is written
        kept = jnp.sum(d_kept * x, 1)
        d_end += jnp.sum(kept)
        chunk.write(d_b, product(d_pairs, c, TN) + rest * product(x, d_state, NN))
        pairs = product(c, b, NT)
        chunk.write(d_x, product(pairs * between, d_y, TN) + d_kept)
        apart = jnp.where(chunk.before, d_pairs * pairs, 0)
        d_g += jnp.sum(apart, 1) - jnp.sum(apart, 0) - kept
        chunk.write(d_log_a, jnp.sum(jnp.where(chunk.taken, d_g[:, None], 0), 0) + d_end)
        return whole * d_state + product(upto * d_y, c, TN)

    starts[walk.sequence, walk.part, walk.head] = walk.over_chunks(step, walk.start(_mapped, *start))


_writing = Program("ssd_maps", functools.partial(_run_maps, reads=(0, 2)), ("map", "decay"))
_reading = Program("ssd_backward_maps", functools.partial(_run_maps, reads=(4, 3)), ("map", "decay"), onward=False)
_forward = Program("ssd_forward", _run_forward, ("x", "map"))
_states = Program("ssd_states", _run_states, ("state",))
_backward = Program("ssd_backward", _run_backward, ("x", "log_a", "b", "b", "map"), onward=False)
