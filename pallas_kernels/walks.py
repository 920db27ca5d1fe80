"""Recurrences over tokens in Pallas through Triton: what the kernels of ssd and of wkv7 have in common.

A program walks the chunks of a part of the time axis, for one sequence and one head, with the state in registers.
Where sequences and heads are too few to fill a GPU, a launch before that finds what each part does to the state, and
each program composes the parts before its own. Against the recurrence, with the state's cotangent, it is the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.partition import devices_of, independent, multiprocessors

try:  # JAX says since 0.11 that it will be removed some day
    from jax.experimental.pallas import triton as plt
except ImportError:
    plt = None  # type: ignore[assignment]

ROWS = 65535  # of a grid's axis but the first
HELD = 2  # programs, by a multiprocessor


class Program(NamedTuple):
    """What a launch runs.

    Attributes:
      name: of the kernel.
      run: (walk, refs of what is given, refs of what is written) -> None.
      writes: the names of that, as in `launch`.
      onward: whether it goes as the recurrence does, or against it.
    """

    name: str
    run: Callable[..., None]
    writes: tuple[str, ...]
    onward: bool = True


def unsupported(batch, heads):
    """Why no walk runs, whatever the operator, in a sentence; or None."""
    if plt is None:
        return "this JAX has no Triton"
    if not batch * heads:
        return "there is nothing to do"
    if max(batch, heads) > ROWS:
        return f"its grid has {ROWS} rows, too few for B = {batch} and H = {heads}"
    return None


def fitting_parts(shape, size, least):
    """Into how many parts to cut the time axis of [B, T, H, D]: as many as fill a GPU, of `least` chunks at least."""
    batch, length, heads, _ = shape
    programs = max(1, batch * heads // devices_of("btgk", shape))
    return max(1, min(HELD * multiprocessors() // programs, -(-length // size) // least))


def chunks_of_a_part(parts, length, size):
    """How many chunks each of `parts` has, of which there are then no more than chunks.

    Raises ValueError for parts that is no positive integer.
    """
    if not isinstance(parts, int) or parts < 1:
        raise ValueError(f"The time axis can be cut into 1 or more parts, not {parts!r}.")
    chunks = -(-length // size)
    return -(-chunks // min(parts, chunks))


def if_in_parts(launch, program, tokens, each, size):
    """What a program that finds the maps of parts writes; nothing where there is one part."""
    return launch(program, tokens, ()) if tokens[0].shape[1] > each * size else ()


def launch(program, tokens, given, letters, results, *, size, each, reverse, warps, interpret):
    """Runs a program for each part, head and sequence.

    Args:
      tokens: arrays [B, T, H, ...], or with 1 in the place of H where all heads have the same.
      given: arrays of any shape.
      letters: of the axes of both, for `independent`.
      results: (batch, length, heads, chunks, parts) -> {name: (letters, shape, dtype)} of all that programs write.
      size: tokens of a chunk.
      each: chunks of a part.
      reverse: whether the recurrence runs from the last token to the first.

    Returns:
      What the program writes, in its order.
    """

    def described(arrays):
        batch, length, heads = arrays[0].shape[:3]
        chunks = -(-length // size)
        found = results(batch, length, heads, chunks, -(-chunks // each))
        return [found[name] for name in program.writes]

    def run(*arrays):
        batch, length, heads = arrays[0].shape[:3]

        def kernel(*refs):
            walk = Walk(refs[: len(tokens)], reverse, size, each, program.onward)
            program.run(walk, refs[len(tokens) : len(arrays)], refs[len(arrays) :])

        return pl.pallas_call(
            kernel,
            name=program.name,
            grid=(-(-length // (size * each)), heads, batch),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in described(arrays)],
            compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
            interpret=interpret,
        )(*arrays)

    return independent(run, letters, [axes for axes, *_ in described(tokens)])(*tokens, *given)


class Walk:
    """A program's way through the chunks of its part.

    Attributes:
      refs: of the tokens.
      reverse: whether the recurrence runs from the last token to the first.
      onward: whether this program goes as the recurrence does, or against it.
      part, head, sequence: its own.
    """

    def __init__(self, refs, reverse, size, each, onward):
        self.refs, self.reverse, self.size, self.each, self.onward = refs, reverse, size, each, onward
        self.part, self.head, self.sequence = (pl.program_id(axis) for axis in range(3))
        self.length, self.heads = refs[0].shape[1:3]
        self.chunks = -(-self.length // size)
        self.parts = -(-self.chunks // each)

    def start(self, mapped, states, *maps):
        """The state before this part, as this program goes.

        Args:
          mapped: (the state before a part, what there is of it in each of maps) -> the state after it.
          states: [B, H, ...], before all parts.
          maps: arrays [B, parts, H, ...]; none where there is one part.
        """

        def step(i, state):
            part = i if self.onward else self.parts - 1 - i
            return mapped(state, *(ref[self.sequence, part, self.head] for ref in maps))

        before = self.part if self.onward else self.parts - 1 - self.part
        state = states[self.sequence, self.head]
        return jax.lax.fori_loop(0, before, step, state) if maps else state

    def over_chunks(self, step, carry):
        """step(chunk, carry) -> carry, over the chunks of this part."""
        count = jnp.minimum(self.each, self.chunks - self.part * self.each)

        def at(i, carry):
            return step(Chunk(self, self.part * self.each + (i if self.onward else count - 1 - i)), carry)

        return jax.lax.fori_loop(0, count, at, carry)


class Chunk:
    """The C tokens of a chunk. What is read of those behind the end of the sequence is zero.

    Attributes:
      number: in the order of the recurrence.
      before, taken: whether token j is taken before token i, or no later than it: bool [C, C], at [i, j].
    """

    def __init__(self, walk, number):
        self.walk, self.number = walk, number
        place = walk.chunks - 1 - number if walk.reverse else number
        self.first = place * walk.size
        self.token = self.first + jnp.arange(walk.size, dtype=jnp.int32)
        self.inside = self.token < walk.length
        self.row, self.column = (jax.lax.broadcasted_iota(jnp.int32, (walk.size, walk.size), i) for i in (0, 1))
        self.before = self.row < self.column if walk.reverse else self.row > self.column
        self.taken = self.before | (self.row == self.column)

    def read(self, i):
        """Of the tokens' array i, [C, ...] as they are."""
        ref = self.walk.refs[i]
        head = self.walk.head if ref.shape[2] == self.walk.heads else 0
        value = ref[self.walk.sequence, jnp.minimum(self.token, self.walk.length - 1), head]
        return jnp.where(self.inside[:, None] if value.ndim > 1 else self.inside, value, jnp.zeros((), value.dtype))

    def write(self, ref, value):
        """To an array [B, T, H, ...]."""
        where = (self.walk.sequence, pl.ds(self.first, self.walk.size), self.walk.head)
        mask = jnp.broadcast_to(self.inside[:, None] if value.ndim > 1 else self.inside, value.shape)
        plt.store(ref.at[(*where, *(slice(None),) * (value.ndim - 1))], value.astype(ref.dtype), mask=mask)

    def running_sum(self, x):
        """The sum over x [C, ...] up to and with each token, as the recurrence goes [C, ...]; and of all [...]."""
        total, upto = jnp.sum(x, 0), jax.lax.cumsum(x)
        return (total - upto + x if self.walk.reverse else upto), total


# Tensor cores multiply bfloat16. A float32 matrix becomes two of these, what it is rounded to and what that leaves out;
# products are accumulated in float32, with a relative error of 2^-17 or so.

NN, NT, TN = (1, 0), (1, 1), (0, 0)  # the axes that are summed over in x y, x y^T and x^T y


def halves(x):
    """x as bfloat16 matrices that add up to it: one for bfloat16, two for float32."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)  # rounded by its bits: a cast there and back may be left out
    high = jax.lax.bitcast_convert_type((bits + 0x8000) & ~0xFFFF, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def product(x, y, over):
    """float32 x y of matrices, or of what `halves` made of them, summed over the axes `over` of the two."""
    x, y = (z if isinstance(z, tuple) else halves(z) for z in (x, y))
    pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if i + j < 2]  # the product of two rests is nothing

    def once(i, j):
        contracted = (over[:1], over[1:]), ((), ())
        return jax.lax.dot_general(x[i], y[j], contracted, preferred_element_type=jnp.float32)

    return sum(once(i, j) for i, j in reversed(pairs))
