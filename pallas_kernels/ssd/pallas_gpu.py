"""SSD for NVIDIA GPUs from Ampere on, forward and backward, in Pallas through Triton; the formulas are chunked.py's.

A program walks the chunks of a part of the time axis, for one sequence and one head, with the [P, N] state in
registers: nothing of a chunk but its outputs is written. Where sequences and heads are too few to fill a GPU, a launch
before that finds what each part adds to the state and by how much it decays, and each program composes the parts before
its own.

Backward walks the same way first, to write the state before each chunk, and then the other way, with the cotangent of
the state in registers. A token's gradients of b and c are written for each head, and XLA adds these up.

Tensor cores multiply bfloat16. A float32 factor becomes two of these, what it is rounded to and what that leaves out,
and its product with a bfloat16 one two products, accumulated in float32: relative error 2^-17 or so.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.partition import devices_of, independent
from pallas_kernels.ssd.chunked import FLOOR, GRID

try:  # JAX says since 0.11 that it will be removed some day
    from jax.experimental.pallas import triton as plt
except ImportError:
    plt = None  # type: ignore[assignment]

SIZE = 64  # tokens of a chunk
WARPS = 4  # with more, fewer programs fit on a multiprocessor, and all issue more instructions together
MOST = 64 * 128  # entries of a state
ROWS = 65535  # of a grid's axis but the first
BLOCKS = 264  # two on each multiprocessor of an H100, for which every GPU is taken
LEAST = 4  # chunks of a part


def unsupported(x, b, c):
    """Why ssd_pallas_gpu does not take these inputs, in a sentence; None if it does."""
    sizes = x.shape[-1], b.shape[-1]
    if plt is None:
        return "this JAX has no Triton"
    if any(z.dtype != jnp.bfloat16 for z in (x, b, c)):
        found = ", ".join(sorted({str(z.dtype) for z in (x, b, c)}))
        return f"its tensor cores take x, b and c in bfloat16, not {found}"
    if any(size < 16 or size & (size - 1) for size in sizes) or sizes[0] * sizes[1] > MOST:
        return f"it takes P and N that are powers of two from 16 on, P N at most {MOST}, not {sizes[0]} and {sizes[1]}"
    if max(x.shape[0], x.shape[2]) > ROWS:
        return f"its grid has {ROWS} rows, too few for B = {x.shape[0]} and H = {x.shape[2]}"
    return None


def parts_of(shape):
    """Into how many parts the time axis of x [B, T, H, P] is cut: programs that a GPU runs at once, none short."""
    batch, length, heads, _ = shape
    blocks = max(1, batch * heads // devices_of("btgp", shape))
    return max(1, min(BLOCKS // blocks, -(-length // SIZE) // LEAST))


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
    if parts is not None and (not isinstance(parts, int) or parts < 1):
        raise ValueError(f"ssd can be cut into 1 or more parts of the time axis, not {parts!r}.")
    heads, groups = x.shape[2], b.shape[2]
    if 1 < groups < heads:
        b, c = (jnp.repeat(z, heads // groups, 2) for z in (b, c))
    chunks = -(-x.shape[1] // SIZE)
    each = -(-chunks // (parts_of(x.shape) if parts is None else min(parts, chunks)))
    return _ssd(x, log_a.astype(jnp.float32), b, c, state, reverse, each, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _ssd(x, log_a, b, c, state, reverse, each, interpret):
    """As ssd_pallas_gpu, in parts of `each` chunks, of one group of heads or as many as heads."""
    tokens = x, log_a, b, c
    launch = functools.partial(_launch, reverse=reverse, each=each, interpret=interpret)
    y, ends = launch(_forward, tokens, (state, *_maps(launch, _writing, tokens, each)))
    return y, ends[:, -1]


def _maps(launch, program, tokens, each):
    """What each part adds to the state [B, parts, H, P, N], and its decay [B, parts, H]; nothing of a single part."""
    return launch(program, tokens, ()) if tokens[0].shape[1] > each * SIZE else ()


def _ssd_forward(*arguments):
    return _ssd(*arguments), arguments[:5]


def _ssd_backward(reverse, each, interpret, kept, cotangents):
    *tokens, state = kept
    d_y, d_final = cotangents
    launch = functools.partial(_launch, reverse=reverse, each=each, interpret=interpret)
    maps = _maps(launch, _writing, tokens, each)
    (states,) = launch(_states, tokens, (state, *maps))
    tokens = (*tokens, d_y)
    d_maps = _maps(launch, _reading, tokens, each)
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
    grouped = "bt_n" if tokens[2].shape[2] == 1 else "btgn"
    letters = ["btgp", "btg", grouped, grouped, "btgp"][: len(tokens)]
    letters += [{3: "b_g", 4: "bgpn", 5: "b_gpn"}[x.ndim] for x in given]
    written = {"x": "btgp", "log_a": "btg", "b": "btgn", "map": "b_gpn", "decay": "b_g", "state": "b_gpn"}

    def launch(*arrays):
        x, b = arrays[0], arrays[2]
        batch, length, heads, width = x.shape
        chunks = -(-length // SIZE)
        parts = -(-chunks // each)
        pairs = width, b.shape[-1]
        shapes = {
            "x": (x.shape, x.dtype),
            "log_a": (x.shape[:3], jnp.float32),
            "b": ((*x.shape[:3], b.shape[-1]), jnp.float32),
            "map": ((batch, parts, heads, *pairs), jnp.float32),
            "decay": ((batch, parts, heads), jnp.float32),
            "state": ((batch, chunks, heads, *pairs), jnp.float32),
        }
        outputs = [jax.ShapeDtypeStruct(*shapes[name]) for name in program.writes]

        def kernel(*refs):
            walk = Walk(refs[: len(tokens)], reverse, each, program.onward)
            program.run(walk, refs[len(tokens) : len(arrays)], refs[len(arrays) :])

        return pl.pallas_call(
            kernel,
            name=f"ssd_{program.name}",
            grid=(parts, heads, batch),
            out_shape=outputs,
            compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
            interpret=interpret,
        )(*arrays)

    return independent(launch, letters, [written[name] for name in program.writes])(*tokens, *given)


class Walk:
    """A program's way through the chunks of its part, for one sequence and one head.

    Attributes:
      reverse: whether the recurrence runs from the last token to the first.
      onward: whether this program goes as the recurrence does, or against it.
      refs: of the tokens.
    """

    def __init__(self, refs, reverse, each, onward):
        self.refs, self.reverse, self.each, self.onward = refs, reverse, each, onward
        self.part, self.head, self.sequence = (pl.program_id(axis) for axis in range(3))
        _, self.length, _, self.width = refs[0].shape
        self.breadth = refs[2].shape[-1]
        self.group = self.head if refs[2].shape[2] > 1 else 0
        self.chunks = -(-self.length // SIZE)
        self.parts = -(-self.chunks // each)

    def zeros(self):
        """A state."""
        return jnp.zeros((self.width, self.breadth), jnp.float32)

    def start(self, ref, *maps):
        """The state before this part: from that before all parts, [B, H, P, N], and the maps of those between."""
        state = ref[self.sequence, self.head]
        if not maps:
            return state
        adds, decays = maps

        def step(i, state):
            part = i if self.onward else self.parts - 1 - i
            return decays[self.sequence, part, self.head] * state + adds[self.sequence, part, self.head]

        return jax.lax.fori_loop(0, self.part if self.onward else self.parts - 1 - self.part, step, state)

    def over_chunks(self, step, carry):
        """step(chunk, carry) -> carry, over the chunks of this part."""
        count = jnp.minimum(self.each, self.chunks - self.part * self.each)

        def at(i, carry):
            number = self.part * self.each + (i if self.onward else count - 1 - i)
            return step(Chunk(self, number), carry)

        return jax.lax.fori_loop(0, count, at, carry)


class Chunk:
    """The tokens of a chunk. What stands behind the end of the sequence decays nothing and writes nothing.

    Attributes:
      number: in the order of the recurrence.
    """

    def __init__(self, walk, number):
        self.walk, self.number = walk, number
        place = walk.chunks - 1 - number if walk.reverse else number
        self.first = place * SIZE
        self.token = self.first + jnp.arange(SIZE, dtype=jnp.int32)
        self.inside = self.token < walk.length
        row = jax.lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (SIZE, SIZE), 1)
        self.before = row < column if walk.reverse else row > column  # whether token j is taken before token i: [i, j]
        self.taken = self.before | (row == column)

    def read(self, i):
        """Of the tokens' array i, [C, ...] as they are."""
        ref, place = self.walk.refs[i], self.walk.group if i in (2, 3) else self.walk.head
        value = ref[self.walk.sequence, jnp.minimum(self.token, self.walk.length - 1), place]
        return jnp.where(self.inside[:, None] if value.ndim > 1 else self.inside, value, jnp.zeros((), value.dtype))

    def write(self, ref, value):
        """To an array [B, T, H, ...]."""
        where = (self.walk.sequence, pl.ds(self.first, SIZE), self.walk.head, *(slice(None),) * (value.ndim - 1))
        mask = jnp.broadcast_to(self.inside[:, None] if value.ndim > 1 else self.inside, value.shape)
        plt.store(ref.at[where], value.astype(ref.dtype), mask=mask)

    def decays(self):
        """L [C, C] as in chunked.py; e^g and e^{g_C - g}, [C, 1] each; and e^{g_C}."""
        log_a = jnp.maximum(self.read(1), FLOOR)
        coarse = jnp.floor(log_a * GRID + 0.5) / GRID
        between, upto, rest, whole = (jnp.zeros(()),) * 4
        for part in (coarse, log_a - coarse):  # of the first all sums and differences are exact
            total, g = jnp.sum(part), jax.lax.cumsum(part)
            g = total - g + part if self.walk.reverse else g
            between += g[:, None] - g[None, :]
            upto, rest, whole = upto + g, rest + (total - g), whole + total
        between = jnp.exp(jnp.where(self.taken, between, -jnp.inf))
        return between, jnp.exp(upto)[:, None], jnp.exp(rest)[:, None], jnp.exp(whole)


def _rounded(x):
    """float32 x to the nearest float32 that is a bfloat16. By its bits: a cast there and back may be left out."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x8000) & ~0xFFFF, jnp.float32)


def _multiplied(x, y, over):
    """float32 x y of matrices, summed over the axes `over` of the two; one of them bfloat16, both perhaps."""

    def once(x, y):
        contracted = (over[:1], over[1:]), ((), ())
        return jax.lax.dot_general(x, y, contracted, preferred_element_type=jnp.float32)

    if x.dtype == y.dtype:
        return once(x, y)
    if y.dtype == jnp.float32:
        high = _rounded(y)
        return once(x, high.astype(x.dtype)) + once(x, (y - high).astype(x.dtype))
    high = _rounded(x)
    return once(high.astype(y.dtype), y) + once((x - high).astype(y.dtype), y)


# The programs.


class Program(NamedTuple):
    """Attributes:
    name: of its kernel.
    run: (walk, refs of what is given, refs of what is written) -> None.
    writes: the names of that, as in `_launch`.
    onward: whether it goes as the recurrence does.
    """

    name: str
    run: Callable[..., None]
    writes: tuple[str, ...]
    onward: bool = True


def _followed(walk, chunk, state, *, reads):
    """The state, or its cotangent where the walk goes against the recurrence, on the other side of a chunk; its decay.

    reads: the numbers of the two arrays whose outer products are added.
    """
    _, upto, rest, whole = chunk.decays()
    x, b = map(chunk.read, reads)
    return whole * state + _multiplied((rest if walk.onward else upto) * x, b, (0, 0)), whole


def _run_maps(walk, given, written, reads):
    del given
    adds, decays = written

    def step(chunk, carry):
        state, decay = carry
        state, whole = _followed(walk, chunk, state, reads=reads)
        return state, decay * whole

    at = walk.sequence, walk.part, walk.head
    adds[at], decays[at] = walk.over_chunks(step, (walk.zeros(), jnp.float32(1)))


def _run_states(walk, given, written):
    (states,) = written

    def step(chunk, state):
        states[walk.sequence, chunk.number, walk.head] = state
        return _followed(walk, chunk, state, reads=(0, 2))[0]

    walk.over_chunks(step, walk.start(*given))


def _run_forward(walk, given, written):
    y, ends = written

    def step(chunk, state):
        between, upto, rest, whole = chunk.decays()
        x, b, c = map(chunk.read, (0, 2, 3))
        within = _multiplied(_multiplied(c, b, (1, 1)) * between, x, (1, 0))
        chunk.write(y, within + upto * _multiplied(c, state, (1, 1)))
        return whole * state + _multiplied(rest * x, b, (0, 0))

    ends[walk.sequence, walk.part, walk.head] = walk.over_chunks(step, walk.start(*given))


def _run_backward(walk, given, written):
    *start, states = given
    d_x, d_log_a, d_b, d_c, starts = written

    def step(chunk, d_state):
        between, upto, rest, whole = chunk.decays()
        x, b, c, d_y = map(chunk.read, (0, 2, 3, 4))
        state = states[walk.sequence, chunk.number, walk.head]
        d_end = whole * jnp.sum(d_state * state)  # of the sum over the chunk, g_C
        d_read = upto * _multiplied(d_y, state, (1, 0))  # of c, by the state
        d_g = jnp.sum(d_read * c, 1)
        d_pairs = _multiplied(d_y, x, (1, 1)) * between
        chunk.write(d_c, _multiplied(d_pairs, b, (1, 0)) + d_read)
        d_kept = rest * _multiplied(b, d_state, (1, 1))  # of x, by what is written
        kept = jnp.sum(d_kept * x, 1)
        d_end += jnp.sum(kept)
        chunk.write(d_b, _multiplied(d_pairs, c, (0, 0)) + rest * _multiplied(x, d_state, (1, 0)))
        pairs = _multiplied(c, b, (1, 1))
        chunk.write(d_x, _multiplied(pairs * between, d_y, (0, 0)) + d_kept)
        apart = jnp.where(chunk.before, d_pairs * pairs, 0)
        d_g += jnp.sum(apart, 1) - jnp.sum(apart, 0) - kept
        chunk.write(d_log_a, jnp.sum(jnp.where(chunk.taken, d_g[:, None], 0), 0) + d_end)
        return whole * d_state + _multiplied(upto * d_y, c, (0, 0))

    starts[walk.sequence, walk.part, walk.head] = walk.over_chunks(step, walk.start(*start))


_writing = Program("maps", functools.partial(_run_maps, reads=(0, 2)), ("map", "decay"))
_reading = Program("backward_maps", functools.partial(_run_maps, reads=(4, 3)), ("map", "decay"), onward=False)
_forward = Program("forward", _run_forward, ("x", "map"))
_states = Program("states", _run_states, ("state",))
_backward = Program("backward", _run_backward, ("x", "log_a", "b", "b", "map"), onward=False)
