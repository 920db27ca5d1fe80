"""WKV-7 of few long sequences, with the time axis split: its segments run side by side.

A kernel that walks the chunks of one (direction, sequence, head) in one block leaves most of a GPU idle where those are
few: one sequence, 12 heads and two directions are 24 blocks on 132 multiprocessors. But a segment of tokens does an
affine thing to the state, S' = M S + U, whatever S is. So, with P segments,

    1. each segment's M and U, from the states I and 0;
    2. the P maps of K x K in turn give the state before each segment;
    3. the outputs from these states.

Backward is the same with the cotangents D of the states, which a segment maps by D = M^T D' + R: R from D' = 0, and
then all gradients from the right D'.

In the Hopper kernel (`parts` of `wkv7_pallas_gpu`) 1 is a launch of its own, which writes no outputs, and 2 is done by
each block of the launch of 3 for itself. `split` does it to any form of wkv7 with the form alone: segments are
sequences of a larger batch, and 1 takes two runs of the form, whose outputs nobody reads.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.partition import devices_of, multiprocessors
from pallas_kernels.wkv7.chunked import states_between
from pallas_kernels.wkv7.pallas_gpu import SIZE, wkv7_pallas_gpu

# A model of the launches, by which the number of segments is chosen. Instructions a chunk, by the compiler
# (docs/results.md): of forward alone, and of the two launches; of a warp they took so many ns on an H100, where a
# multiprocessor had one block and where it had more. With it 11 segments of 65,536 tokens, 12 heads and both directions
# took 4.9 ms where one took 13.7, and 22 no less than 11. The last two are guesses: of a step from one segment's state
# to the next one's, and of a launch.
WHOLE, SPLIT = 6500, 9500
ALONE_NS, SHARED_NS = 2.15, 1.95
HELD = 2  # blocks, by a multiprocessor
STEP_NS, LAUNCH_NS = 3000, 10000


# Under jit, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("reverse", "chunk_size", "parts", "interpret"))
def wkv7_pallas_gpu_split(tokens, states, reverse, chunk_size=SIZE, *, parts=None, interpret=False):
    """`wkv7_pallas_gpu`, with the time axis in parts where that fills the GPU: arguments, results and errors are its.

    Args:
      parts: segments of the time axis, 1 for one launch; None is `parts_of`.
    """
    if parts is None:
        parts = parts_of(len(reverse), tokens[0][0].shape)
    return wkv7_pallas_gpu(tokens, states, reverse, chunk_size, parts=parts, interpret=interpret)


def parts_of(directions, shape):
    """Into how many segments a launch of so many directions of [B, T, H, K] is split on this process's GPU."""
    batch, length, heads, _ = shape
    return choose_parts(-(-directions * batch * heads // devices_of("btgk", shape)), length, multiprocessors())


def choose_parts(blocks, length, multiprocessors):
    """Into how many segments to split `length` tokens where a launch has so many blocks, (direction, sequence, head).

    As many as make the launches the shortest, 1 for a single one. Under vmap the mapped axis is not seen: more segments
    than needed, not wrong ones.
    """
    chunks = -(-length // SIZE)

    def ns(parts):
        held = -(-parts * blocks // multiprocessors)
        instruction = ALONE_NS if held == 1 else held * SHARED_NS
        if parts == 1:
            return chunks * WHOLE * instruction
        return -(-chunks // parts) * SPLIT * instruction + (parts - 1) * STEP_NS + LAUNCH_NS

    return min(range(1, max(1, min(chunks, HELD * multiprocessors // blocks)) + 1), key=ns)


def split(run, ways, states, reverse, parts, chunk_size=SIZE):
    """`run`, with the time axis in `parts` segments that are sequences of their own.

    Args:
      run: (ways, states) -> (out [B, T, H, V], final state [B, H, K, V] float32) of each direction: a form of wkv7.
      ways: per direction r, log_w, k, v, a, b, [B, T, H, D] as in wkv7.
      states: per direction [B, H, K, V] float32, the state before its first token.
      reverse: per direction, whether `run` goes from the last token to the first.
      parts: number of segments, at least 1; T is padded with tokens that change no state.
      chunk_size: a segment has a multiple of so many tokens.

    Returns:
      What `run` returns, with the same differentiability in reverse mode.

    Raises:
      ValueError: parts that is no positive integer.
    """
    if not isinstance(parts, int) or parts < 1:
        raise ValueError(f"wkv7 can be split into 1 or more parts of the time axis, not {parts!r}.")
    ways, states, reverse = tuple(map(tuple, ways)), tuple(states), tuple(reverse)
    if parts == 1:
        return run(ways, states)
    batch, length = ways[0][0].shape[:2]
    span = -(-length // (parts * chunk_size)) * chunk_size

    def fold(x):
        x = jnp.pad(x, ((0, 0), (0, parts * span - length), (0, 0), (0, 0)))
        return x.reshape(batch * parts, span, *x.shape[2:])

    results = _split(run, reverse, parts, jax.tree.map(fold, ways), states)
    return tuple((out.reshape(batch, parts * span, *out.shape[2:])[:, :length], final) for out, final in results)


def _by_segment(x, parts):
    """[B P, ...] -> [P, B, ...]."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _folded(x):
    """[P, B, ...] -> [B P, ...]."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _split(run, reverse, parts, ways, states):
    """`split` of tokens [B P, T / P, H, D] that are folded already; so is out."""
    results = run(ways, _starts(run, reverse, parts, ways, states)[0])
    return _ends(results, reverse, parts)


def _split_forward(run, reverse, parts, ways, states):
    starts, moves = _starts(run, reverse, parts, ways, states)
    results, pull = jax.vjp(run, ways, starts)
    return _ends(results, reverse, parts), (pull, moves)


def _split_backward(run, reverse, parts, kept, cotangents):
    pull, moves = kept
    alone = tuple((d_out, jnp.zeros((x.shape[0] * parts, *x.shape[1:]))) for d_out, x in cotangents)
    _, adds = pull(alone)  # as if nothing followed a segment
    ends = []
    for way, move, add, (d_out, d_final) in zip(reverse, moves, adds, cotangents, strict=True):
        d_after, _ = states_between(move.mT, _by_segment(add, parts), d_final, not way)
        ends.append((d_out, _folded(d_after)))
    d_ways, d_starts = pull(tuple(ends))
    return d_ways, tuple(_by_segment(x, parts)[_first(way)] for x, way in zip(d_starts, reverse, strict=True))


_split.defvjp(_split_forward, _split_backward)


def _first(reverse):
    """The segment that a direction begins with."""
    return -1 if reverse else 0


def _ends(results, reverse, parts):
    """(out, final state of the last segment) of each direction."""
    return tuple(
        (out, _by_segment(final, parts)[_first(not way)]) for (out, final), way in zip(results, reverse, strict=True)
    )


def _starts(run, reverse, parts, ways, states):
    """Per direction the states before the segments [B P, H, K, V], and their M [P, B, H, K, K]."""
    rows, _, heads, key = ways[0][0].shape
    zeros = tuple(jnp.zeros((rows, heads, key, tokens[3].shape[-1])) for tokens in ways)
    eyes = (jnp.broadcast_to(jnp.eye(key), (rows, heads, key, key)),) * len(ways)
    unwritten = tuple((r, log_w, k, jnp.zeros(r.shape, v.dtype), a, b) for r, log_w, k, v, a, b in ways)
    adds, moves = ([_by_segment(final, parts) for _, final in run(*x)] for x in ((ways, zeros), (unwritten, eyes)))
    each = zip(moves, adds, states, reverse, strict=True)
    return tuple(_folded(states_between(*maps, way)[0]) for *maps, way in each), moves
