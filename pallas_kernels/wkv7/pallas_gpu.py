"""WKV-7 for NVIDIA Hopper, forward and backward, in Pallas Mosaic GPU; the formulas are chunked.py's.

One CTA, that is one warpgroup, walks the chunks of one (direction, batch, head) with the [K, V] state
in registers. All that a chunk needs stays on the chip: forward reads the six inputs once and writes out
once. Under differentiation it also writes the state before each chunk and the inverse of its triangular
system, which is a third of the instructions; from them backward recomputes the rest. A reverse direction
walks the chunks from the end with mirrored triangles; both directions of a bidirectional layer are one
launch, backward only where that fills the GPU better.

Tensor cores multiply bfloat16, which errs by per cents on masked sequences, and so does TF32. So a
float32 operand becomes a pair of bfloat16 tiles, in shared memory or, as a left factor, in registers: its
rounding and what the rounding left. A product of two pairs is three products of tiles, accumulated in
float32: relative error 2^-17 or so. What is bfloat16 to begin with (v and the cotangent of out) needs one
tile. The running sums of log_w, times tiles of ones and zeros, take three pieces, which are all of a
float32.
"""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.partition import devices_of, independent, multiprocessors
from pallas_kernels.wkv7.strong import LIMIT

SIZE = 64  # of a chunk, of K and of V: what one warpgroup multiplies at a time
LOG2_E = 1.4426950408889634
FORWARD_TILES, BACKWARD_TILES = 12, 26  # for operands; an exhausted list fails when it is traced


def unsupported(tokens):
    """Why wkv7_pallas_gpu does not take the tokens of one direction, in a sentence; None if it does."""
    r, log_w, k, v, a, b = tokens
    if r.shape[-1] != SIZE or v.shape[-1] != SIZE:
        return f"its tiles need K = V = {SIZE}, but K is {r.shape[-1]} and V is {v.shape[-1]}"
    if any(x.dtype != jnp.bfloat16 for x in (r, k, v, a, b)):
        found = ", ".join(sorted({str(x.dtype) for x in (r, k, v, a, b)}))
        return f"its tensor cores take r, k, v, a and b in bfloat16, not {found}"
    if log_w.dtype != jnp.float32:
        return f"it takes log_w in float32, not {log_w.dtype}"
    return None


# Under jit, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("reverse", "chunk_size", "parts", "interpret"))
def wkv7_pallas_gpu(tokens, states, reverse, chunk_size=SIZE, *, parts=1, interpret=False):
    """WKV-7 in one or both directions, forward in one launch; in two with the time axis in parts.

    Args:
      tokens: per direction (r, log_w, k, v, a, b), [B, T, H, 64]; log_w float32, the rest bfloat16.
      states: per direction [B, H, 64, 64] float32, the state before its first token.
      reverse: per direction, whether it runs from the last token to the first.
      chunk_size: 64, the only one.
      parts: segments of the time axis, side by side (split.py); as many as there are chunks, if these are fewer.
      interpret: run on the CPU, slowly; jax 0.11 or newer.

    Returns:
      Per direction out [B, T, H, 64] bfloat16 and final_state [B, H, 64, 64] float32. Differentiable
      in reverse mode.

    Raises:
      ValueError: tokens that `unsupported` names, another chunk_size, or parts that is no positive integer.
    """
    for direction in tokens:
        if reason := unsupported(direction):
            raise ValueError(f"The GPU kernel of wkv7 cannot run: {reason}.")
    if chunk_size != SIZE:
        raise ValueError(f"The GPU kernel of wkv7 has chunks of {SIZE} tokens, not {chunk_size}.")
    if not isinstance(parts, int) or parts < 1:
        raise ValueError(f"wkv7 can be split into 1 or more parts of the time axis, not {parts!r}.")
    length = tokens[0][0].shape[1]
    parts = min(parts, -(-length // SIZE))
    padding = (0, 0), (0, -length % SIZE), (0, 0), (0, 0)
    # Tokens of zeros change no state.
    tokens = tuple(tuple(jnp.pad(x, padding) for x in direction) for direction in tokens)
    results = _wkv7(tokens, tuple(states), tuple(reverse), parts, interpret)
    return tuple((out[:, :length], final) for out, final in results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _wkv7(tokens, states, reverse, parts, interpret):
    maps = _maps(tokens, reverse, parts, interpret)
    results = _run_forward(tokens, states, maps, reverse, parts, interpret, save=False)
    return tuple((out, final[:, :, -1]) for out, final in results)


def _wkv7_forward(tokens, states, reverse, parts, interpret):
    maps = _maps(tokens, reverse, parts, interpret)
    results = _run_forward(tokens, states, maps, reverse, parts, interpret, save=True)
    outputs = tuple((out, final[:, :, -1]) for out, final, *_ in results)
    moves = tuple(x[:1] for x in maps)
    return outputs, (tokens, moves, tuple(x[1:] for x in results))


def _wkv7_backward(reverse, parts, interpret, residuals, cotangents):
    tokens, moves, saved = residuals
    d_out, d_final = zip(*cotangents, strict=True)
    adds = [()] * len(reverse)
    if parts > 1:
        adds = _run_backward_maps(tokens, [x[-1] for x in saved], d_out, reverse, parts, interpret)
    maps = tuple((*x, *y) for x, y in zip(moves, adds, strict=True))
    grads = _run_backward(tokens, saved, d_out, d_final, maps, reverse, parts, interpret)
    return tuple(x[:-1] for x in grads), tuple(x[-1][:, :, 0] for x in grads)


_wkv7.defvjp(_wkv7_forward, _wkv7_backward)


def _store(ref, value):
    """ref[...] = value, which before jax 0.12 also reads what was there."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value)
    else:
        ref[...] = value


def _load(ref, layout):
    """ref[...], each number in the register that the layout says."""
    index = inspect.signature(plgpu.load).parameters.get("idx")  # which jax 0.10 wants and a later one may not have
    needed = index is not None and index.default is inspect.Parameter.empty
    return plgpu.load(ref, *([()] if needed else []), layout=layout, optimized=False)


# Launches. Arguments and results are flat, direction by direction; the letters of their axes are for `independent`.

TOKENS = ("btgk", "btgk", "btgk", "btgv", "btgk", "btgk")
STATE, STATES, SAVED = "bgkv", "bgskv", "bgnpkv"  # s: parts; n: chunks; p: the two halves of a float32


def _saved(tokens):
    """A float32 [64, 64] of each chunk and head, as its two halves."""
    batch, length, heads, _ = tokens.shape
    return jax.ShapeDtypeStruct((batch, heads, length // SIZE, 2, SIZE, SIZE), jnp.bfloat16)


def _launch(body, arguments, letters, results_of, scratch, reverse, interpret, name, parts):
    """Runs `body` for each direction, sequence, head and part of the time axis.

    Args:
      arguments: per direction.
      letters: of the arguments and of the results of a direction.
      results_of: a direction's arguments -> its results' shapes and dtypes.
    """
    if interpret and not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError("Interpreting the GPU kernel of wkv7 needs jax 0.11 or newer.")
    ways, (taken, given) = len(reverse), letters

    def launch(*flat):
        batch, length, heads, _ = flat[0].shape
        each = [flat[i : i + len(taken)] for i in range(0, len(flat), len(taken))]
        kernel = plgpu.kernel(
            functools.partial(body, reverse=reverse, count=length // SIZE, parts=parts, interpret=interpret),
            out_type=[x for direction in each for x in results_of(*direction)],
            scratch_types=scratch,
            grid=(ways, batch, heads, parts),
            grid_names=("direction", "batch", "head", "part"),
            # No sum here crosses warps, and backward has no 2 KB to spare for one.
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=256
            ),
            interpret=plgpu.InterpretGPUParams() if interpret else False,
            kernel_name=name,
        )
        with jax.named_scope(name):
            return tuple(kernel(*flat))

    flat = independent(launch, taken * ways, given * ways)(*(x for direction in arguments for x in direction))
    return [tuple(flat[i : i + len(given)]) for i in range(0, len(flat), len(given))]


def _maps(tokens, reverse, parts, interpret):
    """Per direction M and U of the parts, [B, H, P, K, K] and [B, H, P, K, V], and the chunks' inverses; () for one."""
    if parts == 1:
        return ((),) * len(reverse)

    def results_of(*arrays):
        k, v = arrays[1:3]
        shape = k.shape[0], k.shape[2], parts, SIZE
        return [*(jax.ShapeDtypeStruct((*shape, x.shape[3]), jnp.float32) for x in (k, v)), _saved(k)]

    scratch = _scratch(FORWARD_TILES, 5)
    arguments, letters = [x[1:] for x in tokens], (TOKENS[1:], (STATES, STATES, SAVED))
    return _launch(_maps_kernel, arguments, letters, results_of, scratch, reverse, interpret, "wkv7_maps", parts)


def _run_forward(tokens, states, maps, reverse, parts, interpret, save):
    """Per direction out, the states after the parts [B, H, P, K, V] and, to save, two of the chunks.

    Those are the states before them and their inverses, each [B, H, N, 2, 64, 64], the two halves of a float32. With
    the time axis in parts the inverses are those of `maps`.
    """

    def results_of(*arrays):
        v, state = arrays[3], arrays[6]
        batch, heads = state.shape[:2]
        results = [
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, parts, SIZE, SIZE), jnp.float32),
        ]
        return results + [_saved(v)] * len(kept)

    kept = ((SAVED,) if maps[0] else (SAVED, SAVED)) if save else ()
    arguments = [(*x, state, *more) for x, state, more in zip(tokens, states, maps, strict=True)]
    letters = (*TOKENS, STATE, *((STATES, STATES, SAVED) if maps[0] else ())), ("btgv", STATES, *kept)
    scratch = _scratch(FORWARD_TILES, 6)
    body = functools.partial(_forward_kernel, save=save)
    results = _launch(body, arguments, letters, results_of, scratch, reverse, interpret, "wkv7_forward", parts)
    return [(*x, *given[2:]) for x, given in zip(results, maps, strict=True)] if save else results


def _run_backward_maps(tokens, inverses, d_out, reverse, parts, interpret):
    """Per direction the cotangents of the states before the parts, if those after them have none: [B, H, P, K, V]."""

    def results_of(*arrays):
        d_out = arrays[4]
        shape = d_out.shape[0], d_out.shape[2], parts, SIZE, SIZE
        return [jax.ShapeDtypeStruct(shape, jnp.float32)]

    each = zip(tokens, d_out, inverses, strict=True)
    arguments = [(r, log_w, a, b, d, inverse) for (r, log_w, _, _, a, b), d, inverse in each]
    letters = ("btgk", "btgk", "btgk", "btgk", "btgv", SAVED), (STATES,)
    scratch = _scratch(FORWARD_TILES, 7)
    return _launch(
        _backward_maps_kernel, arguments, letters, results_of, scratch, reverse, interpret, "wkv7_backward_maps", parts
    )


def _run_backward(tokens, saved, d_out, d_final, maps, reverse, parts, interpret):
    """Per direction the cotangents of r, log_w, k, v, a, b and of the states before the parts [B, H, P, K, V].

    Its blocks need a multiprocessor each. Both directions are one launch where that saves a wave of blocks, and else
    one launch each: on an H100 that took 7.8 ms forward and backward where one launch took 9.1 (8 x 4096 x 12).
    """
    each = tokens, saved, d_out, d_final, maps
    batch, _, heads, _ = tokens[0][0].shape
    blocks = parts * batch * heads // devices_of("bg", (batch, heads))
    if len(reverse) > 1 and waves(len(reverse) * blocks) >= len(reverse) * waves(blocks):
        return [
            _run_backward(*((x,) for x in of_way), (way,), parts, interpret)[0]
            for way, *of_way in zip(reverse, *each, strict=True)
        ]

    def results_of(*arrays):
        return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays[:6], arrays[9])]

    arguments = [
        (*x, d, states, inverse, final, d_end, *both)
        for x, (final, states, inverse), d, d_end, both in zip(*each, strict=True)
    ]
    letters = (*TOKENS, "btgv", SAVED, SAVED, STATES, STATE, *(STATES for _ in maps[0])), (*TOKENS, STATES)
    scratch = [*_scratch(BACKWARD_TILES - 1, 11), plgpu.SMEM((SIZE,), jnp.float32)]
    return _launch(
        _backward_kernel, arguments, letters, results_of, scratch, reverse, interpret, "wkv7_backward", parts
    )


def waves(blocks):
    """How often all multiprocessors are given a block, until each of so many has run."""
    return -(-blocks // multiprocessors())


def _tiles(count):
    """[1, 64, 64] bfloat16 tiles as wgmma reads them, 8 KB each; for the first axis see _zero."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return [plgpu.SMEM((1, SIZE, SIZE), jnp.bfloat16, transforms=transforms)] * count


def _wide():
    """A [64, 64] float32 matrix on its way from or to global memory, 16 KB."""
    transforms = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((SIZE, SIZE), jnp.float32, transforms=transforms)


def _scratch(tiles, copies):
    """What `_Refs` takes as its shared memory, where a chunk of tokens takes so many copies."""
    return [_wide(), *_tiles(tiles), plgpu.Barrier(num_arrivals=copies), plgpu.Barrier(), plgpu.Barrier(num_arrivals=2)]


# Matrices in the kernels: values [64, 64] float32 in registers, operands in tiles of shared memory.


def _zero():
    """Zero, which the compiler does not know.

    Else it computes the addresses of all tiles before the loop over chunks, and they take the
    registers that the matrices need.
    """
    return lax.optimization_barrier(jnp.int32(0))


class _Tile(typing.NamedTuple):
    """A bfloat16 tile [1, 64, 64] in shared memory; an operand is a tuple of some, and means their sum."""

    ref: typing.Any
    transposed: bool = False

    def at(self, index=0):
        ref = self.ref.at[index]
        return ref.transpose((1, 0)) if self.transposed else ref

    def write(self, x):
        _store(self.at(_zero()), x.astype(jnp.bfloat16))


class _Held(typing.NamedTuple):
    """A bfloat16 tile [64, 64] in registers, which can only be a left factor, and not a transposed one."""

    value: typing.Any


def _t(operand):
    """The transposed operand; nothing moves."""
    return tuple(tile._replace(transposed=not tile.transposed) for tile in operand)


@plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,),
    return_type=plgpu.ShapeDtypeStruct((SIZE, SIZE), jnp.float32, layout=plgpu.Layout.WGMMA),
)
def _widen(_, x):
    """x.astype(float32) of a bfloat16 matrix [64, 64].

    A register has two numbers, which a shift and a mask part; the compiler's own conversion takes twice as many
    instructions, and was a tenth of the kernels.
    """
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    half, upper = (arith.constant(i32, ir.IntegerAttr.get(i32, n)) for n in (16, -(1 << 16)))
    registers = np.empty_like(x.registers)
    for index, register in np.ndenumerate(x.registers):
        pair = mgpu.utils.bitcast(register, i32)
        parts = [mgpu.utils.bitcast(y, f32) for y in (arith.shli(pair, half), arith.andi(pair, upper))]
        registers[index] = vector.from_elements(ir.VectorType.get((2,), f32), parts)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


class _Tiles:
    """The free tiles, dealt out while a kernel is traced.

    A freed tile may still be read by another warp, so it is dealt out again only after a later barrier of
    the warpgroup: `products` and `sync` pass one. At the top of the loop over chunks all tiles are free
    but those of constants, so that what is traced once holds for every chunk.
    """

    def __init__(self, refs, interpret):
        self.ready, self.freed, self.interpret = [_Tile(ref) for ref in refs], [], interpret

    def take(self):
        if not self.ready:
            self.sync()
        return self.ready.pop(0)

    def free(self, *operands):
        for operand in operands:
            self.freed.extend(operand)

    def sync(self):
        """Ends all reads and writes before this point, and shows the writes to the tensor cores."""
        plgpu.commit_smem()
        self.ready, self.freed = self.ready + self.freed, []

    def widen(self, x):
        """A bfloat16 matrix in float32."""
        return x.astype(jnp.float32) if self.interpret else _widen(x)

    def read(self, tile):
        return self.widen(tile.at(_zero())[...])

    def value(self, operand):
        """The value of an operand."""
        return sum((self.read(tile) for tile in operand[1:]), self.read(operand[0]))

    def hold(self, x, pieces=2):
        """x as a left factor in registers: bfloat16 matrices whose sum is x; two keep 16 bits of it, three all."""
        held = []
        for i in range(pieces):
            piece = x.astype(jnp.bfloat16)
            if i < pieces - 1:
                # The barrier keeps the two numbers of a register together: one instruction rounds both. Cutting bits
                # off instead of rounding would leave a remainder, and errors, of one sign.
                piece = lax.optimization_barrier(piece)
                x = x - self.widen(piece)
            held.append(_Held(piece))
        return tuple(held)

    def split(self, x, pieces=2):
        """x as an operand in tiles."""
        return self.put(self.hold(x, pieces))

    def put(self, held):
        """What registers hold, also in tiles."""
        operand = tuple(self.take() for _ in held)
        for tile, piece in zip(operand, held, strict=True):
            tile.write(piece.value)
        return operand

    def products(self, *sums):
        """The value of each sum of products.

        A sum is a list of pairs of operands; a value before them is added to: its registers are those of the sum.
        """
        self.sync()
        zero = _zero()
        starts = [None if isinstance(first, tuple) else first for first, *_ in sums]

        def multiply(*accumulators):
            for accumulator, start, pairs in zip(accumulators, starts, sums, strict=True):
                for left, right in pairs if start is None else pairs[1:]:
                    order = max(len(left), len(right))
                    for i, x in enumerate(left):
                        # low * low is below what two tiles hold.
                        for y in right[: order - i]:
                            self._multiply(accumulator, x, y.at(zero), zero)

        if all(start is None for start in starts) or self.interpret:  # which knows no run_state

            def from_zero(*accumulators):
                multiply(*accumulators)
                return tuple(accumulator[...] for accumulator in accumulators)

            values = pl.run_scoped(from_zero, *[plgpu.ACC((SIZE, SIZE), jnp.float32)] * len(sums))
            values = [x if start is None else start + x for start, x in zip(starts, values, strict=True)]
        else:
            nothing = plgpu.layout_cast(jnp.zeros((SIZE, SIZE), jnp.float32), plgpu.Layout.WGMMA)
            inits = tuple(plgpu.ACC.init(nothing if start is None else start) for start in starts)
            values = pl.run_state(lambda accumulators: multiply(*accumulators))(inits)
        return values if len(sums) > 1 else values[0]

    def _multiply(self, accumulator, x, y, zero):
        if isinstance(x, _Tile):
            plgpu.wgmma(accumulator, x.at(zero), y)
        elif not self.interpret:
            plgpu.wgmma(accumulator, x.value, y)
        else:  # which multiplies nothing but what is in shared memory

            def through(ref):
                _store(ref.at[0], x.value)
                plgpu.wgmma(accumulator, ref.at[0], y)

            pl.run_scoped(through, *_tiles(1))


class _Geometry:
    """Which token comes before which, in a direction known only to the running CTA, and which chunks are the CTA's."""

    def __init__(self, reverse, count, parts):
        self.count = count
        self.part = lax.axis_index("part")
        self.first, self.end = 0, count
        if parts > 1:  # of lengths that differ by a chunk at most
            self.first, self.end = (p * count // parts for p in (self.part, self.part + 1))
        self.reverse = reverse
        if len(reverse) == 1:
            self.direction = 0
            self.backwards = jnp.int32(reverse[0])
        else:
            self.direction = lax.axis_index("direction")
            first, second = (jnp.int32(x) for x in reverse)
            self.backwards = first + (second - first) * self.direction
        self.sign = 1 - 2 * self.backwards
        self.row, self.column = (
            plgpu.broadcasted_iota(jnp.int32, (SIZE,), 0, layout=plgpu.Layout.WGMMA.reduce(axis)) for axis in (1, 0)
        )

    def each(self, act):
        """act(direction) in the CTAs of that direction."""
        if len(self.reverse) == 1:
            act(0)
        else:
            for direction in range(len(self.reverse)):
                pl.when(self.direction == direction)(functools.partial(act, direction))

    def chunk(self, step):
        """The chunk at a step of this direction, of all its parts."""
        return step + self.backwards * (self.count - 1 - 2 * step)

    def _indices(self):
        # The barrier keeps the masks from being computed before the loop, where they would take the
        # registers that the matrices need.
        row, column = lax.optimization_barrier(self.row), self.column
        return (lax.broadcast_in_dim(x, (SIZE, SIZE), (axis,)) for axis, x in enumerate((row, column)))

    def _places(self):
        """Where the row's and the column's token stand in the order of the direction."""
        sign = lax.optimization_barrier(self.sign)  # as in _indices
        return (lax.broadcast_in_dim(x * sign, (SIZE, SIZE), (axis,)) for axis, x in enumerate((self.row, self.column)))

    def upto(self, x):
        """x where the column's token is the row's or one before."""
        row, column = self._places()
        return jnp.where(column <= row, x, 0.0)

    def before(self, x):
        """x where the column's token is before the row's."""
        row, column = self._places()
        return jnp.where(column < row, x, 0.0)

    def across(self, x, level):
        """x where row and column lie in the two halves of one block of 2^(level + 1) tokens."""
        row, column = self._indices()
        return jnp.where((row >> level) == (column >> level) ^ 1, x, 0.0)

    def triangle(self):
        """1 where the column's token is the row's or one before."""
        return self.upto(1.0).astype(jnp.bfloat16)

    def last_column(self, x):
        """The column of the last token."""
        _, column = self._indices()
        return jnp.sum(jnp.where(column == (SIZE - 1) * (1 - self.backwards), x, 0.0), 1)

    def add_eye(self, x):
        """I + x."""
        row, column = self._indices()
        return jnp.where(row == column, x + 1.0, x)


def _unit_inverse(strict, geometry, tiles):
    """(I - strict)^{-1}: merges blocks of 1, 2, 4, ... rows, as chunked.py does.

    The inverse of blocks has no entries between them, so what lies across two blocks may be chosen after
    the product with strict, which is stored once. The levels are a loop: unrolled they were a third of
    the code, and held more registers. (An H100 issued one instruction a cycle and multiprocessor, with one block
    as with two, and one in two cycles of the backward kernel when its loop was 157 KB: as if fetching the code were
    what takes the time.)
    """
    inverse = geometry.add_eye(geometry.across(strict, 0))
    strict = tiles.split(strict)

    def merge(level, inverse):
        held = tiles.hold(inverse)
        whole = tiles.put(held)
        left = tiles.hold(geometry.across(tiles.products([(held, strict)]), level))
        inverse = tiles.products([inverse, (left, whole)])
        tiles.free(whole)
        tiles.sync()  # before the next level is written there
        return inverse

    inverse = lax.fori_loop(1, SIZE.bit_length() - 1, merge, inverse)
    tiles.free(strict)
    return inverse


def _decays(refs):
    """g [C, K] and e^{g_C} [K], where log_w has landed."""
    tiles = refs.tiles
    pieces = tiles.split(refs.wide[...], 3)
    upto, columns = tiles.products([(refs.triangle, pieces)], [(_t(pieces), _t(refs.triangle))])
    tiles.free(pieces)
    upto = jnp.where(jnp.abs(upto) <= LIMIT, upto, jnp.nan)  # what float32 cannot hold is not to look like a number
    return upto, _exp(refs.geometry.last_column(columns))


def _exp(x):
    """e^x, by the instruction for powers of two, in interpretation too."""
    return jnp.exp2(x * LOG2_E)


def _now(x):
    """x, computed here: the compiler likes to delay a sum to its use, and so to hold all its terms."""
    return lax.optimization_barrier(x)


def _times_rows(vector, x):
    """diag(vector) x."""
    return lax.broadcast_in_dim(vector, x.shape, (0,)) * x


def _rows(ref, chunk):
    """The tokens of a chunk [C, K] of this CTA's head, in an array [B, T, H, K]."""
    return ref.at[lax.axis_index("batch"), pl.ds(chunk * SIZE, SIZE), lax.axis_index("head")]


def _matrix(ref, *index):
    """This CTA's head in an array [B, H, ..., K, V]."""
    return ref.at[(lax.axis_index("batch"), lax.axis_index("head"), *index)]


def _halves(ref, chunk):
    """The two halves of this CTA's matrix of a chunk, in an array [B, H, N, 2, 64, 64]."""
    return [_matrix(ref, chunk, half) for half in range(2)]


class _Refs:
    """The arrays of a kernel, direction by direction, its shared memory, and what its body needs of both."""

    def __init__(self, refs, arguments, results, reverse, count, parts, interpret):
        ways = len(reverse)
        split = (arguments * ways, (arguments + results) * ways)
        taken, given, scratch = refs[: split[0]], refs[split[0] : split[1]], refs[split[1] :]
        self.inputs = [taken[i * arguments : (i + 1) * arguments] for i in range(ways)]
        self.outputs = [given[i * results : (i + 1) * results] for i in range(ways)]
        self.wide, *tiles, self.arrived, self.matrix_arrived, self.pair_arrived = scratch
        self.geometry, self.tiles = _Geometry(reverse, count, parts), _Tiles(tiles, interpret)
        self.triangle = (self.tiles.take(),)
        self.triangle[0].write(self.geometry.triangle())

    def _start(self, sources, targets, barrier):
        """Begins to copy to shared memory.

        sources: the arguments of a direction -> parts of them, one for each target.
        """

        def act(direction):
            for source, target in zip(sources(*self.inputs[direction]), targets, strict=True):
                plgpu.copy_gmem_to_smem(source, target, barrier)

        self.geometry.each(act)

    def _fetch(self, sources, targets, barrier):
        """Copies to shared memory, and waits."""
        self._start(sources, targets, barrier)
        plgpu.barrier_wait(barrier)

    def begin_pair(self, position, chunk):
        """An operand of two tiles that is on its way, until `pair_arrived`: this CTA's of a chunk in an argument."""
        pair = self.tiles.take(), self.tiles.take()
        halves = [tile.at() for tile in pair]
        self._start(lambda *arrays: _halves(arrays[position], chunk), halves, self.pair_arrived)
        return pair

    def store_pair(self, position, pair, chunk):
        """Begins to copy an operand of two tiles to a result, where it is its chunk's."""

        def store(direction):
            for tile, target in zip(pair, _halves(self.outputs[direction][position], chunk), strict=True):
                plgpu.copy_smem_to_gmem(tile.at(), target)

        self.geometry.each(store)

    def land(self, count, sources):
        """Fetches what a chunk needs: `count` sources into tiles, which are returned, the last (log_w) into `wide`."""
        landing = [self.tiles.take() for _ in range(count)]
        self._fetch(sources, [*(tile.at() for tile in landing), self.wide], self.arrived)
        return landing

    def read_matrix(self, position, *index):
        """This CTA's [K, V] in an argument."""
        self._fetch(lambda *arrays: [_matrix(arrays[position], *index)], [self.wide], self.matrix_arrived)
        value = self.wide[...]
        plgpu.commit_smem()
        return value

    def write_matrix(self, position, value, *index):
        """This CTA's [K, V] of a result, which is there when the kernel ends."""
        _store(self.wide, value)
        plgpu.commit_smem()
        self.geometry.each(lambda i: plgpu.copy_smem_to_gmem(self.wide, _matrix(self.outputs[i][position], *index)))
        plgpu.wait_smem_to_gmem(0)

    def chain(self, value, position, count, part_of, transposed):
        """The state at this part's start: `count` affine maps of other parts, arguments `position` and the next."""

        def step(index, value):
            part, tiles = part_of(index), self.tiles
            move = tiles.split(self.read_matrix(position, part))
            held = tiles.split(value)
            add = self.read_matrix(position + 1, part)
            result = tiles.products([add, (_t(move) if transposed else move, held)])
            tiles.free(move, held)
            return result

        return lax.fori_loop(0, count, step, value)


def _forward_kernel(*refs, reverse, count, parts, interpret, save):
    made = parts > 1  # the inverses
    refs = _Refs(refs, 10 if made else 7, 2 + save + (save and not made), reverse, count, parts, interpret)
    wide, outputs, geometry, tiles = refs.wide, refs.outputs, refs.geometry, refs.tiles

    initial = refs.read_matrix(6)
    if parts > 1:
        initial = refs.chain(initial, 7, geometry.part, lambda index: index, transposed=False)

    def step(index, state):
        # The last step's results are still read from their tiles.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        chunk = geometry.chunk(index)
        r, k, v, a, b = refs.land(5, lambda r, log_w, k, v, a, b, *_: [_rows(x, chunk) for x in (r, k, v, a, b, log_w)])
        decay, total = _decays(refs)
        start = tiles.split(state)
        undo = _exp(-decay)
        keys_k = tiles.split(tiles.read(k) * undo)
        tiles.free((k,))
        keys_b = tiles.split(tiles.read(b) * undo)
        queries = tiles.read(a) * _exp(decay - wide[...])
        tiles.free((a, b))
        queries = tiles.split(queries)
        queries_r = tiles.read(r) * _exp(decay)
        tiles.free((r,))
        queries_r = tiles.split(queries_r)
        ak, reads, *ab = tiles.products(
            [(queries, _t(keys_k))], [(queries, start)], *([] if made else [[(queries, _t(keys_b))]])
        )
        tiles.free(queries)
        pairs = tiles.split(geometry.before(ak))
        reads, state = tiles.products([reads, (pairs, (v,))], [state, (_t(keys_k), (v,))])
        tiles.free(pairs)
        rb, rk = tiles.products([(queries_r, _t(keys_b))], [(queries_r, _t(keys_k))])
        if save:
            refs.store_pair(2, start, geometry.chunk(index))
        tiles.free(keys_k)
        pairs = tiles.split(geometry.upto(rk))
        if made:
            inverse = refs.begin_pair(9, geometry.chunk(index))
        out = tiles.products([(queries_r, start), (pairs, (v,))])
        tiles.free(queries_r, pairs, (v,))
        known, pairs = tiles.split(reads), tiles.split(geometry.upto(rb))
        if save:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tiles.free(start)
        if made:
            plgpu.barrier_wait(refs.pair_arrived)
        else:
            inverse = tiles.split(_unit_inverse(geometry.before(*ab), geometry, tiles))
        reads = tiles.split(tiles.products([(inverse, known)]))
        if save and not made:
            refs.store_pair(3, inverse, geometry.chunk(index))
        tiles.free(known)
        out, state = tiles.products([out, (pairs, reads)], [state, (_t(keys_b), reads)])
        tiles.free(reads, pairs, keys_b)
        (result,) = tiles.split(out, 1)
        plgpu.commit_smem()
        geometry.each(lambda i: plgpu.copy_smem_to_gmem(result.at(), _rows(outputs[i][0], geometry.chunk(index))))
        tiles.free(inverse, (result,))
        return _times_rows(total, state)

    refs.write_matrix(1, lax.fori_loop(geometry.first, geometry.end, step, initial), geometry.part)


def _maps_kernel(*refs, reverse, count, parts, interpret):
    """What a part does to the state before it: M and U of S' = M S + U; and the inverses of its chunks."""
    refs = _Refs(refs, 5, 3, reverse, count, parts, interpret)
    wide, geometry, tiles = refs.wide, refs.geometry, refs.tiles

    def step(index, maps):
        move, add = maps
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last inverse is still read from its tiles
        chunk = geometry.chunk(index)
        k, v, a, b = refs.land(4, lambda log_w, *others: [_rows(x, chunk) for x in (*others, log_w)])
        decay, total = _decays(refs)
        undo = _exp(-decay)
        keys_k = tiles.split(tiles.read(k) * undo)
        tiles.free((k,))
        keys_b = tiles.split(tiles.read(b) * undo)
        queries = tiles.read(a) * _exp(decay - wide[...])
        tiles.free((a, b))
        queries, start = tiles.split(queries), tiles.split(add)
        ab, ak, added = tiles.products([(queries, _t(keys_b))], [(queries, _t(keys_k))], [(queries, start)])
        tiles.free(start)
        pairs = tiles.split(geometry.before(ak))
        added, add = tiles.products([added, (pairs, (v,))], [add, (_t(keys_k), (v,))])
        tiles.free(pairs, keys_k, (v,))
        start = tiles.split(move)
        moved = tiles.products([(queries, start)])
        tiles.free(queries, start)
        added, moved = tiles.split(added), tiles.split(moved)
        inverse = tiles.split(_unit_inverse(geometry.before(ab), geometry, tiles))
        reads_added, reads_moved = tiles.products([(inverse, added)], [(inverse, moved)])
        refs.store_pair(2, inverse, geometry.chunk(index))
        tiles.free(added, moved)
        added, moved = tiles.split(reads_added), tiles.split(reads_moved)
        move, add = tiles.products([move, (_t(keys_b), moved)], [add, (_t(keys_b), added)])
        tiles.free(added, moved, keys_b, inverse)
        tiles.sync()  # before the next tokens land
        return _times_rows(total, move), _times_rows(total, add)

    zeros = plgpu.layout_cast(jnp.zeros((SIZE, SIZE), jnp.float32), plgpu.Layout.WGMMA)
    move, add = lax.fori_loop(geometry.first, geometry.end, step, (geometry.add_eye(zeros), zeros))
    refs.write_matrix(0, move, geometry.part)
    refs.write_matrix(1, add, geometry.part)


def _backward_maps_kernel(*refs, reverse, count, parts, interpret):
    """The cotangent of the state before a part, if that of the state after it is zero."""
    refs = _Refs(refs, 6, 1, reverse, count, parts, interpret)
    wide, geometry, tiles = refs.wide, refs.geometry, refs.tiles

    def step(index, d_next):
        chunk = geometry.chunk(geometry.first + geometry.end - 1 - index)

        def sources(r, log_w, a, b, d_out, inverses):
            return [*(_rows(x, chunk) for x in (r, a, b, d_out)), *_halves(inverses, chunk), _rows(log_w, chunk)]

        r, a, b, d_out, *inverse = refs.land(6, sources)
        inverse = tuple(inverse)
        decay, total = _decays(refs)
        d_next = _now(_times_rows(total, d_next))
        later = tiles.split(d_next)
        keys_b = tiles.split(tiles.read(b) * _exp(-decay))
        queries_a = tiles.read(a) * _exp(decay - wide[...])
        tiles.free((a, b))
        queries_a = tiles.split(queries_a)
        queries_r = tiles.read(r) * _exp(decay)
        tiles.free((r,))
        queries_r = tiles.split(queries_r)
        rb, d_next = tiles.products([(queries_r, _t(keys_b))], [d_next, (_t(queries_r), (d_out,))])
        tiles.free(queries_r)
        pairs = tiles.split(geometry.upto(rb))
        d_reads = tiles.products([(_t(pairs), (d_out,)), (keys_b, later)])
        tiles.free(pairs, (d_out,), keys_b, later)
        d_reads = tiles.split(d_reads)
        d_known = tiles.split(tiles.products([(_t(inverse), d_reads)]))
        tiles.free(inverse, d_reads)
        d_next = tiles.products([d_next, (_t(queries_a), d_known)])
        tiles.free(queries_a, d_known)
        tiles.sync()  # before the next tokens land
        return d_next

    zeros = plgpu.layout_cast(jnp.zeros((SIZE, SIZE), jnp.float32), plgpu.Layout.WGMMA)
    refs.write_matrix(0, lax.fori_loop(geometry.first, geometry.end, step, zeros), geometry.part)


def _backward_kernel(*refs, reverse, count, parts, interpret):
    *refs, turned = refs
    refs = _Refs(refs, 11 if parts == 1 else 13, 7, reverse, count, parts, interpret)
    wide, outputs, geometry, tiles = refs.wide, refs.outputs, refs.geometry, refs.tiles

    def result(x):
        (tile,) = tiles.split(x, 1)
        return tile

    def step(index, carry):
        d_next, beyond = carry
        chunk = geometry.chunk(geometry.first + geometry.end - 1 - index)

        def sources(r, log_w, k, v, a, b, d_out, states, inverses, *_):
            pairs = *_halves(states, chunk), *_halves(inverses, chunk)
            return [*(_rows(x, chunk) for x in (r, k, v, a, b, d_out)), *pairs, _rows(log_w, chunk)]

        # The last step's results are still read from their tiles.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r, k, v, a, b, d_out, *pairs = refs.land(10, sources)
        v, d_out, state, inverse = (v,), (d_out,), tuple(pairs[:2]), tuple(pairs[2:])

        # Forward again, up to the reads.
        decay, total = _decays(refs)
        d_next = _now(_times_rows(total, d_next))
        later = tiles.split(d_next)
        undo = _exp(-decay)
        keys_k, keys_b = tiles.split(tiles.read(k) * undo), tiles.split(tiles.read(b) * undo)
        queries_a = tiles.split(tiles.read(a) * _exp(decay - wide[...]))
        queries_r = tiles.split(tiles.read(r) * _exp(decay))
        tiles.free((r, k, a, b))
        pairs_ak = tiles.split(geometry.before(tiles.products([(queries_a, _t(keys_k))])))
        known = tiles.split(tiles.products([(queries_a, state), (pairs_ak, v)]))
        reads = tiles.split(tiles.products([(inverse, known)]))
        tiles.free(known)

        # Back through the triangular system.
        rb, rk = tiles.products([(queries_r, _t(keys_b))], [(queries_r, _t(keys_k))])
        pairs_rb, pairs_rk = tiles.split(geometry.upto(rb)), tiles.split(geometry.upto(rk))
        d_reads, d_v = tiles.products(
            [(_t(pairs_rb), d_out), (keys_b, later)], [(_t(pairs_rk), d_out), (keys_k, later)]
        )
        tiles.free(pairs_rb, pairs_rk)
        d_reads = tiles.split(d_reads)
        d_known = tiles.products([(_t(inverse), d_reads)])
        tiles.free(inverse, d_reads)
        d_known = tiles.split(d_known)
        d_v, d_rb, d_rk = tiles.products([d_v, (_t(pairs_ak), d_known)], [(d_out, _t(reads))], [(d_out, _t(v))])
        tiles.free(pairs_ak)
        d_v = result(d_v)

        # The queries and keys; log_w's gradient is what scales a token's rows of them.
        pairs_rb, pairs_rk = tiles.split(geometry.upto(d_rb)), tiles.split(geometry.upto(d_rk))
        d_queries, d_keys_k, d_keys_b, d_state = tiles.products(
            [(d_out, _t(state)), (pairs_rk, keys_k), (pairs_rb, keys_b)],
            [(_t(pairs_rk), queries_r)],
            [(_t(pairs_rb), queries_r)],
            [d_next, (_t(queries_r), d_out), (_t(queries_a), d_known)],
        )
        d_decay = _now(tiles.value(queries_r) * d_queries)
        tiles.free(pairs_rb, pairs_rk, queries_r)
        d_r = result(d_queries * _exp(decay))
        d_ab, d_ak = tiles.products([(d_known, _t(reads))], [(d_known, _t(v))])
        pairs_ab, pairs_ak = tiles.split(geometry.before(d_ab)), tiles.split(geometry.before(d_ak))
        d_queries = tiles.products([(d_known, _t(state)), (pairs_ak, keys_k), (pairs_ab, keys_b)])
        d_a = result(d_queries * _exp(decay - wide[...]))
        early = tiles.value(queries_a) * d_queries
        d_decay = _now(d_decay + early)
        # log_w has been read for the last time.
        _store(wide, early)
        undo = _exp(-decay)
        d_keys_k = tiles.products([d_keys_k, (_t(pairs_ak), queries_a), (v, _t(later))])
        d_decay = _now(d_decay - tiles.value(keys_k) * d_keys_k)
        tiles.free(pairs_ak, keys_k)
        d_k = result(d_keys_k * undo)
        d_keys_b = tiles.products([d_keys_b, (_t(pairs_ab), queries_a), (reads, _t(later))])
        d_decay = d_decay - tiles.value(keys_b) * d_keys_b
        d_b = result(d_keys_b * undo)
        tiles.free(d_known, pairs_ab, queries_a, keys_b, later, reads, v, d_out)

        # What reaches beyond the chunk adds to all tokens.
        d_decay = tiles.split(d_decay, 3)
        _store(turned, beyond)
        d_log_w = tiles.products([(_t(refs.triangle), d_decay)]) - wide[...]
        beyond = _load(turned, plgpu.Layout.WGMMA.reduce(0))
        d_log_w = d_log_w + lax.broadcast_in_dim(beyond, (SIZE, SIZE), (1,))
        tiles.free(d_decay)
        beyond = jnp.sum(tiles.value(state) * d_state, 1)
        _store(wide, d_log_w)
        plgpu.commit_smem()

        def store(direction):
            d_tokens = outputs[direction][:6]
            sources = d_r.at(), wide, *(x.at() for x in (d_k, d_v, d_a, d_b))
            for source, target in zip(sources, d_tokens, strict=True):
                plgpu.copy_smem_to_gmem(source, _rows(target, chunk))

        geometry.each(store)
        tiles.free(state, (d_r, d_k, d_v, d_a, d_b))
        return d_state, beyond

    d_final = refs.read_matrix(10)
    if parts > 1:
        later = parts - 1 - geometry.part
        d_final = refs.chain(d_final, 11, later, lambda index: parts - 1 - index, transposed=True)
    final = refs.read_matrix(9, geometry.part)
    carry = d_final, jnp.sum(final * d_final, 1)
    d_state, _ = lax.fori_loop(geometry.first, geometry.end, step, carry)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.write_matrix(6, d_state, geometry.part)
