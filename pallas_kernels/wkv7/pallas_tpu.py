"""WKV-7 on a TPU: one Pallas kernel forward, one backward, one or both directions in a launch.

The mathematics and the names are those of chunked.py. What is the TPU's own:

- The grid is (batch, groups of heads, chunks). The chunks follow one another and hand their state on in VMEM.
- A group is as many heads as fill rows of 128 lanes (two of 64) and is computed as one: the rows of its heads are
  stacked, [G C, G K], each row with its own head's lanes and zeros elsewhere, so that every product of the group is one
  product of block-diagonal matrices as wide as the MXU.
- A direction is a row of a leading axis, not a flip: the reverse one reads block N-1-n and has mirrored triangles. Two
  directions are two independent chains of products in one kernel body.
- The state is kept transposed, [G V, G K], so that the decay is a row.
- Precision: with float32 inputs products are of HIGHEST precision (six bfloat16 passes), with bfloat16 inputs three
  passes over high and low halves, two where a factor is bfloat16 itself (v, the cotangent of out); never one, which is
  wrong by per cents on masked sequences.
- Forward saves the state before each chunk; backward computes everything else again.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.choices import fit_chunk
from pallas_kernels.partition import independent
from pallas_kernels.wkv7.strong import LIMIT

LANES = 128
SMALLEST_CHUNK = 16  # rows of a bfloat16 tile
MOST_ROWS = 256  # of a group: heads x tokens of a chunk
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # the contracted axes of x y, x y^T and x^T y


def _group(key, value):
    """The least number of heads that fills whole rows of 128 lanes, with keys and with values."""
    return math.lcm(LANES // math.gcd(LANES, key), LANES // math.gcd(LANES, value))


def unsupported(tokens):
    """Why tokens of these shapes do not run here, or None. tokens: one direction's six arrays."""
    key, value = tokens[0].shape[-1], tokens[3].shape[-1]
    if _group(key, value) * SMALLEST_CHUNK > MOST_ROWS or max(key, value) > LANES:
        return f"it takes head sizes that are multiples of 8 up to {LANES}, not K = {key} and V = {value}"
    return None


# Under jit, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("reverse", "chunk_size", "interpret"))
def wkv7_pallas_tpu(tokens, states, reverse, chunk_size=64, interpret=False):
    """WKV-7 in one or both directions, in one launch.

    Args:
      tokens: per direction (r, log_w, k, v, a, b), [B, T, H, K] and v [B, T, H, V].
      states: per direction [B, H, K, V] float32.
      reverse: per direction, whether it runs from the last token to the first.
      chunk_size: tokens per chunk, a power of two from 16 to 64.
      interpret: run the kernels' programs on any platform, slowly, for tests.

    Returns:
      Per direction (out [B, T, H, V] in v's dtype, final state [B, H, K, V] float32).
    """
    batch, length, heads, key = tokens[0][0].shape
    value = tokens[0][3].shape[-1]
    group = _group(key, value)
    size = max(SMALLEST_CHUNK, fit_chunk(min(chunk_size, MOST_ROWS // group), length))
    more_time, more_heads = -length % size, -heads % group
    groups = (heads + more_heads) // group

    def pack(x):  # [B, T, H, K] -> [B, T', g, G K]; zero tokens change no state, zero heads have none
        x = jnp.pad(x, ((0, 0), (0, more_time), (0, more_heads), (0, 0)))
        return x.reshape(batch, length + more_time, groups, -1)

    def pack_state(x):  # [B, H, K, V] -> [B, g, V, G K]
        x = jnp.pad(x, ((0, 0), (0, more_heads), (0, 0), (0, 0))).reshape(batch, groups, group, key, value)
        return x.transpose(0, 1, 4, 2, 3).reshape(batch, groups, value, group * key)

    def unpack_state(x):
        x = x.reshape(batch, groups, value, group, key).transpose(0, 1, 3, 4, 2)
        return x.reshape(batch, groups * group, key, value)[:, :heads]

    plan = _Plan(tuple(reverse), group, key, value, size, interpret)
    outs, finals = _wkv7(tuple(pack(x) for way in tokens for x in way), tuple(map(pack_state, states)), plan)
    outs = (x.reshape(batch, -1, groups * group, value)[:, :length, :heads] for x in outs)
    return tuple(zip(outs, map(unpack_state, finals), strict=True))


# What a chunk does, for all directions of a launch at once, so that a product stands beside its twin and the compiler
# can lay one chain of products into the gaps of the other. Arrays of this part are [W, G C, G K] and the like, W the
# directions, block-diagonal over heads.


class _Chunk:
    """Shapes, masks and products of one chunk of one group of heads. Made inside the kernel."""

    def __init__(self, plan, exact):
        self.plan, self.group, self.size = plan, plan.group, plan.size
        self.exact = exact  # float32 inputs: products with HIGHEST, else in passes over halves
        self.rows = self.group * self.size
        i, j = (_iota((self.rows, self.rows), axis) for axis in (0, 1))
        self.row, self.column = i, j
        same = self._head(i, self.size) == self._head(j, self.size)
        own, other = (_iota((self.size, self.size), axis) for axis in (0, 1))
        self.upto = self._ways([same & (j <= i), same & (j >= i)])
        self.before = self._ways([same & (j < i), same & (j > i)])
        self.triangle = self._ways([(other <= own).astype(jnp.bfloat16), (other >= own).astype(jnp.bfloat16)])

    def _ways(self, choices):
        return jnp.stack([choices[reverse] for reverse in self.plan.reverse])

    def _head(self, index, width):
        """index // width, for widths that need not be powers of two."""
        return sum([(index >= h * width).astype(jnp.int32) for h in range(1, self.group)], 0 * index)

    def expand(self, x):
        """Stacks a group's heads, each keeping its own lanes: [W, R, G K] -> [W, G R, G K]."""
        rows, lanes = x.shape[1:]
        shape = (1, self.group * rows, lanes)
        own = self._head(_iota(shape, 1), rows) == self._head(_iota(shape, 2), lanes // self.group)
        return jnp.where(own, jnp.concatenate([x] * self.group, 1), 0)

    def collapse(self, x):
        """Undoes expand: [W, G R, G K] -> [W, R, G K]."""
        rows = x.shape[1] // self.group
        return sum(x[:, h * rows : (h + 1) * rows] for h in range(self.group))

    def dot(self, x, y, axes=NN):
        """A product of float32 matrices at float32 grade; a bfloat16 one has no low half."""
        if self.exact:
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
            return _product(x, y, axes, precision=jax.lax.Precision.HIGHEST)
        (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
        out = _product(x_high, y_high, axes)
        if x_low is not None:
            out = _product(x_low, y_high, axes) + out
        if y_low is not None:
            out = _product(x_high, y_low, axes) + out
        return out

    def sum_upto(self, x, axes=NN):
        """The sum over the rows up to each, or with TN from each on: [W, C, D] -> [W, C, D], exact to float32."""
        high = x.astype(jnp.bfloat16)
        middle, low = _halves(x - high.astype(jnp.float32))
        return sum(_product(self.triangle, part, axes) for part in (low, middle, high))

    def inverse(self, strict):
        """(I - strict)^{-1} by merging blocks of 1, 2, 4, ... rows."""
        inverse = (self.row == self.column).astype(jnp.float32)[None]
        width = 1
        while width < self.size:
            shift = width.bit_length() - 1
            across = (self.row >> shift) != (self.column >> shift)
            pair = (self.row >> (shift + 1)) == (self.column >> (shift + 1))
            part = jnp.where((across & pair)[None], strict, 0)
            inverse = inverse + (part if width == 1 else self.dot(self.dot(inverse, part), inverse))
            width *= 2
        return inverse

    def factors(self, r, log_w, k, a, b):
        """Q and J [W, 2 G C, G K], the decays e^g, e^ge and e^-g [W, C, G K] and e^{g_C} [W, 1, G K]."""
        sums = self.sum_upto(log_w)
        sums = jnp.where(jnp.abs(sums) <= LIMIT, sums, jnp.nan)  # what float32 cannot hold is not to look like a number
        upto, before, undo = jnp.exp(sums), jnp.exp(sums - log_w), jnp.exp(-sums)
        total = jnp.exp(jnp.sum(log_w, 1, keepdims=True))
        queries = jnp.concatenate([self.expand(r * upto), self.expand(a * before)], 1)
        keys = jnp.concatenate([self.expand(k * undo), self.expand(b * undo)], 1)
        return queries, keys, upto, before, undo, total

    def solve(self, queries, keys):
        """The four masked parts of P = Q J^T, by row r or a and column k or b, and (I - P_ab)^{-1}."""
        pairs = self.dot(queries, keys, NT)
        rk, rb, ak, ab = self.masked(pairs)
        return rk, rb, ak, self.inverse(ab)

    def masked(self, pairs):
        n = self.rows
        upper = [jnp.where(self.upto, x, 0) for x in (pairs[:, :n, :n], pairs[:, :n, n:])]
        lower = [jnp.where(self.before, x, 0) for x in (pairs[:, n:, :n], pairs[:, n:, n:])]
        return *upper, *lower

    def forward(self, tokens, state):
        """out [W, C, G V] and the next state from the state [W, G V, G K]."""
        r, log_w, k, v, a, b = tokens
        queries, keys, *_, total = self.factors(r, log_w, k, a, b)
        rk, rb, ak, inverse = self.solve(queries, keys)
        v = self.expand(v)
        seen = self.dot(queries, state, NT)
        reads = self.dot(inverse, seen[:, self.rows :] + self.dot(ak, v))
        out = seen[:, : self.rows] + self.dot(rk, v) + self.dot(rb, reads)
        state = total * (state + self.dot(v, keys[:, : self.rows], TN) + self.dot(reads, keys[:, self.rows :], TN))
        return self.collapse(out), state

    def backward(self, tokens, state, d_out, d_next, beyond):
        """The cotangents of the six tokens' arrays and of the state, and the state's row for the chunk before.

        Args:
          state, d_next: the state before the chunk and the cotangent of the one after it, [W, G V, G K].
          beyond: sum_V of next_state * d_next, [W, 1, G K].
        """
        r, log_w, k, v, a, b = tokens
        n = self.rows
        queries, keys, upto, before, undo, total = self.factors(r, log_w, k, a, b)
        rk, rb, ak, inverse = self.solve(queries, keys)
        v, d_out = self.expand(v), self.expand(d_out)
        reads = self.dot(inverse, self.dot(queries[:, n:], state, NT) + self.dot(ak, v))

        d_next = total * d_next
        written = self.dot(keys, d_next, NT)
        d_reads = self.dot(inverse, written[:, n:] + self.dot(rb, d_out, TN), TN)
        d_v = written[:, :n] + self.dot(rk, d_out, TN) + self.dot(ak, d_reads, TN)
        d_rk, d_rb = (jnp.where(self.upto, self.dot(d_out, x, NT), 0) for x in (v, reads))
        d_ak, d_ab = (jnp.where(self.before, self.dot(d_reads, x, NT), 0) for x in (v, reads))
        q_r, q_a, j_k, j_b = queries[:, :n], queries[:, n:], keys[:, :n], keys[:, n:]
        d_r = self.dot(d_out, state) + self.dot(d_rk, j_k) + self.dot(d_rb, j_b)
        d_a = self.dot(d_reads, state) + self.dot(d_ak, j_k) + self.dot(d_ab, j_b)
        d_k = self.dot(v, d_next) + self.dot(d_rk, q_r, TN) + self.dot(d_ak, q_a, TN)
        d_b = self.dot(reads, d_next) + self.dot(d_rb, q_r, TN) + self.dot(d_ab, q_a, TN)
        d_state = d_next + self.dot(d_out, q_r, TN) + self.dot(d_reads, q_a, TN)

        d_r, d_a, d_k, d_b = (self.collapse(x) * y for x, y in ((d_r, upto), (d_a, before), (d_k, undo), (d_b, undo)))
        early = a * d_a
        d_log_w = self.sum_upto(r * d_r + early - k * d_k - b * d_b, TN) - early + beyond
        return (d_r, d_log_w, d_k, self.collapse(d_v), d_a, d_b), d_state, _row_sum(state, d_state)


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _row_sum(x, y):
    """sum_V x y of transposed states [W, G V, G K] -> [W, 1, G K]."""
    return jnp.sum(x * y, 1, keepdims=True)


def _halves(x):
    """x as a bfloat16 high part and the rest in bfloat16, which is None for bfloat16."""
    if x.dtype == jnp.bfloat16:
        return x, None
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _product(x, y, axes, precision=None):
    """Of [W, ...] and [W, ...]."""
    (left,), (right,) = axes
    dimensions = ((left + 1,), (right + 1,)), ((0,), (0,))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


# The launches. Their arrays are flat: all directions' tokens [B, T, g, G K], then the states [B, g, V, G K].


class _Plan(NamedTuple):
    """What selects a program."""

    reverse: tuple[bool, ...]
    group: int
    key: int
    value: int
    size: int
    interpret: bool

    @property
    def ways(self):
        return len(self.reverse)


TOKENS = ("btgk", "btgk", "btgk", "btgv", "btgk", "btgk")
STATE, SAVED = "bgsk", "bgnsk"  # s: the rows V of a transposed state; n: chunks


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wkv7(tokens, states, plan):
    results = _forward_launch(plan, save=False)(*tokens, *states)
    return results[: plan.ways], results[plan.ways :]


def _wkv7_forward(tokens, states, plan):
    results = _forward_launch(plan, save=True)(*tokens, *states)
    outs, finals, saved = (results[i * plan.ways : (i + 1) * plan.ways] for i in range(3))
    return (outs, finals), (tokens, saved, finals)


def _wkv7_backward(plan, residuals, cotangents):
    (tokens, saved, finals), (d_outs, d_finals) = residuals, cotangents
    results = _backward_launch(plan)(*tokens, *saved, *d_outs, *finals, *d_finals)
    return results[: 6 * plan.ways], results[6 * plan.ways :]


_wkv7.defvjp(_wkv7_forward, _wkv7_backward)


def _forward_launch(plan, save):
    ways = plan.ways
    results = ("btgv", STATE, SAVED) if save else ("btgv", STATE)
    launch = functools.partial(_launch_forward, plan, save)
    return independent(launch, (*TOKENS * ways, *(STATE,) * ways), [axes for axes in results for _ in range(ways)])


def _backward_launch(plan):
    ways = plan.ways
    arguments = (*TOKENS * ways, *(SAVED,) * ways, *("btgv",) * ways, *(STATE,) * 2 * ways)
    return independent(functools.partial(_launch_backward, plan), arguments, (*TOKENS * ways, *(STATE,) * ways))


def _specs(plan, chunks, backward=False):
    """Per direction, the block specifications of keys, values, states and saved states. Grid: batch, group, chunk."""
    specs = []
    for reverse in plan.reverse:

        def place(n, reverse=reverse):
            return chunks - 1 - n if reverse != backward else n

        width = plan.group * plan.key
        specs.append(
            {
                "k": pl.BlockSpec((None, plan.size, width), lambda b, g, n, at=place: (b, at(n), g)),
                "v": pl.BlockSpec((None, plan.size, plan.group * plan.value), lambda b, g, n, at=place: (b, at(n), g)),
                "state": pl.BlockSpec((None, None, plan.value, width), lambda b, g, n: (b, g, 0, 0)),
                "saved": pl.BlockSpec(
                    (None, None, None, plan.value, width), lambda b, g, n, at=place: (b, g, at(n), 0, 0)
                ),
            }
        )
    return specs


def _call(plan, name, kernel, grid, arrays, in_specs, outputs, out_specs, scratch_rows, products):
    """Runs `kernel` over the grid. products: of [G C, G K] in a chunk, besides those of the inverse."""
    rows, width = plan.group * plan.size, plan.group * plan.key
    products += 2 * (plan.size.bit_length() - 2)
    steps = plan.ways * math.prod(grid)
    cost = pl.CostEstimate(
        flops=2 * rows * rows * width * products * steps,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *outputs)),
        transcendentals=3 * plan.size * width * steps,
    )
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM((plan.ways, height, width), jnp.float32) for height in scratch_rows],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost,
        interpret=plan.interpret,
    )(*arrays)


def _merged(x):
    """[B, T, g, D] -> [B, T, g D], so that a block is whole tiles."""
    return x.reshape(*x.shape[:2], -1)


def _read(refs):
    """One array of each direction -> [W, ...]."""
    return jnp.stack([ref[...] for ref in refs])


def _read_tokens(refs):
    """r, log_w, k, v, a, b [W, C, G K]: float32 but v, which is a factor as it is."""
    r, log_w, k, v, a, b = (_read(refs[i::6]) for i in range(6))
    return *(x.astype(jnp.float32) for x in (r, log_w, k)), v, *(x.astype(jnp.float32) for x in (a, b))


def _write(refs, x):
    for i, ref in enumerate(refs):
        ref[...] = x[i].astype(ref.dtype)


def _exact(tokens):
    return any(tokens[i].dtype == jnp.float32 for i in (0, 2, 3, 4, 5))


def _launch_forward(plan, save, *arrays):
    ways = plan.ways
    tokens, states = arrays[: 6 * ways], arrays[6 * ways :]
    batch, length, groups, _ = tokens[0].shape
    chunks = length // plan.size
    exact = _exact(tokens)
    specs = _specs(plan, chunks)

    def kernel(*refs):
        token_refs, refs = refs[: 6 * ways], refs[6 * ways :]
        first, outs, finals, *saved = (refs[i * ways : (i + 1) * ways] for i in range(4 if save else 3))
        carried = refs[-1]
        chunk = _Chunk(plan, exact)
        n = pl.program_id(2)

        @pl.when(n == 0)
        def _():
            carried[...] = chunk.expand(_read(first))

        state = carried[...]
        if save:
            _write(saved[0], chunk.collapse(state))
        out, state = chunk.forward(_read_tokens(token_refs), state)
        _write(outs, out)
        carried[...] = state

        @pl.when(n == chunks - 1)
        def _():
            _write(finals, chunk.collapse(state))

    shape = jax.ShapeDtypeStruct
    outputs = [shape(_merged(tokens[6 * i + 3]).shape, tokens[6 * i + 3].dtype) for i in range(ways)]
    out_specs = [s["v"] for s in specs] + [s["state"] for s in specs]
    outputs += [shape(x.shape, x.dtype) for x in states]
    if save:
        outputs += [shape((*x.shape[:2], chunks, *x.shape[2:]), x.dtype) for x in states]
        out_specs += [s["saved"] for s in specs]
    in_specs = [s[axes[-1]] for s in specs for axes in TOKENS] + [s["state"] for s in specs]
    operands = [_merged(x) for x in tokens] + list(states)
    grid = (batch, groups, chunks)
    rows = (plan.group * plan.value,)
    results = _call(plan, "wkv7_forward", kernel, grid, operands, in_specs, outputs, out_specs, rows, products=12)
    return tuple(x.reshape(batch, length, groups, -1) for x in results[:ways]) + tuple(results[ways:])


def _launch_backward(plan, *arrays):
    ways = plan.ways
    tokens, rest = arrays[: 6 * ways], arrays[6 * ways :]
    saved, d_outs, finals, d_finals = (rest[i * ways : (i + 1) * ways] for i in range(4))
    batch, length, groups, _ = tokens[0].shape
    chunks = length // plan.size
    exact = _exact(tokens)
    specs = _specs(plan, chunks, backward=True)

    def kernel(*refs):
        token_refs, refs = refs[: 6 * ways], refs[6 * ways :]
        states, d_out, final, d_final = (refs[i * ways : (i + 1) * ways] for i in range(4))
        grads, d_first = refs[4 * ways : 10 * ways], refs[10 * ways : 11 * ways]
        carried, beyond = refs[11 * ways :]
        chunk = _Chunk(plan, exact)
        n = pl.program_id(2)

        @pl.when(n == 0)
        def _():
            carried[...] = chunk.expand(_read(d_final))
            beyond[...] = _row_sum(_read(final), _read(d_final))

        chunk_grads, d_state, row = chunk.backward(
            _read_tokens(token_refs), chunk.expand(_read(states)), _read(d_out), carried[...], beyond[...]
        )
        for i, x in enumerate(chunk_grads):
            _write(grads[i::6], x)
        carried[...] = d_state
        beyond[...] = row

        @pl.when(n == chunks - 1)
        def _():
            _write(d_first, chunk.collapse(d_state))

    shape = jax.ShapeDtypeStruct
    token_specs = [s[axes[-1]] for s in specs for axes in TOKENS]
    state_specs = [s["state"] for s in specs]
    in_specs = token_specs + [s["saved"] for s in specs] + [s["v"] for s in specs] + 2 * state_specs
    operands = [*map(_merged, tokens), *saved, *map(_merged, d_outs), *finals, *d_finals]
    outputs = [shape(_merged(x).shape, x.dtype) for x in tokens] + [shape(x.shape, x.dtype) for x in finals]
    grid = (batch, groups, chunks)
    rows = plan.group * plan.value, 1
    out_specs = token_specs + state_specs
    results = _call(plan, "wkv7_backward", kernel, grid, operands, in_specs, outputs, out_specs, rows, products=31)
    grads = tuple(x.reshape(batch, length, groups, -1) for x in results[: 6 * ways])
    return grads + tuple(results[6 * ways :])
