"""A network's output that is made where somebody reads it: of a few positions at a time, and of no others.

At GPT-2's vocabulary the output [B, L, V] is the largest array of a training step by far, and the product that makes it
the largest product; a loss of masks reads half of it, and a step of a sampler may read a few positions. So `Deferred`
holds what the output is made of. `at` makes and reads it in pieces: the positions that count, put together; for each
piece the output, what is asked of it, and the gradient of that, one after the other, whatever their number. Nothing of
a piece outlives it, and no product is done twice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

LEAST_PIECE = 256  # positions; and at least 2 D, so that adding to the weights' gradient costs little beside the rest
LEAST_BYTES = 2**26  # of a device's whole output, below which it is made at once
LEAST_RATIO = 4  # of V to D, likewise: below it the output is no larger than what else a step holds of a position


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("features", "weights"), meta_fields=("read", "vocabulary_size")
)
@dataclasses.dataclass(frozen=True)
class Deferred:
    """An output, float32 [B, L, V], before it is made.

    Attributes:
      features: float [B, L, D], what the network knows of each position.
      weights: a pytree of arrays, the same for all positions.
      read: (weights, features [..., D]) -> float32 [..., V]; of each position apart.
      vocabulary_size: V.
    """

    features: jax.Array
    weights: Any
    read: Callable[[Any, jax.Array], jax.Array]
    vocabulary_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, V)."""
        batch, length, _ = self.features.shape
        return batch, length, self.vocabulary_size

    def __getitem__(self, positions: Any) -> jax.Array:
        """That of some positions, (rows, columns) as of an array: float32 [..., V]."""
        return self.read(self.weights, self.features[positions])

    def made(self) -> jax.Array:
        """All of it, float32 [B, L, V]."""
        return self.read(self.weights, self.features)

    @property
    def large(self) -> bool:
        """Whether it is worth not making all of it at once."""
        batch, length, size = self.shape
        mine = batch * length // _devices(_batch_axes(batch))
        return 4 * mine * size >= LEAST_BYTES and size >= LEAST_RATIO * self.features.shape[-1]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that need not make all of its output: (z, t, ...) -> float32 [B, L, V].

    Attributes:
      deferred: (z, t, ...) -> `Deferred`.
    """

    deferred: Callable[..., Deferred]

    def __call__(self, *args: Any, **options: Any) -> jax.Array:
        return self.deferred(*args, **options).made()


def deferring(network: Callable[..., Any]) -> Callable[..., Any]:
    """`network`, for who asks `at` some positions of its output, or by [rows, columns]: a large one is deferred."""
    if not isinstance(network, Network):
        return network

    def output(*args, **options):
        deferred = network.deferred(*args, **options)
        return deferred if deferred.large else deferred.made()

    return output


def at(
    output: jax.Array | Deferred, where: jax.Array, fun: Callable[..., jax.Array], *args: jax.Array, common: Any = None
) -> jax.Array:
    """fun(output, *args, common) at the positions that count, 0 elsewhere: float32 [B, L].

    Of a deferred output it has reverse mode only, and makes the gradient together with the value, for a result that is
    summed or averaged. Where the derivatives by its entries turn out to be different, the gradient is made once more,
    from those.

    Args:
      output: float [B, L, V], or deferred.
      where: bool [B, L], the positions that count.
      fun: (float [b, l, V], *args [b, l, ...], common) -> float32 [b, l], of any positions: the value of one is of its
        own output and arguments alone. All else that it has a gradient by is in `common`.
      args: arrays that broadcast to [B, L] in their first two axes.
      common: a pytree of float arrays, the same for all positions.
    """
    if not isinstance(output, Deferred):
        return jnp.where(where, fun(output, *args, common), 0.0)
    batch, length, _ = output.shape
    devices = _devices(_batch_axes(batch))
    piece = min(batch * length // devices, max(LEAST_PIECE, 2 * output.features.shape[-1]))
    own = tuple(jnp.broadcast_to(a, (batch, length, *a.shape[2:])) for a in (output.features, *args))
    real = tuple(jnp.issubdtype(a.dtype, jnp.inexact) for a in own)
    known, learned = ([a for a, r in zip(own, real, strict=True) if r == wanted] for wanted in (False, True))
    common = jax.tree.map(jnp.asarray, (output.weights, common))  # a number may be one of Python's
    return _Pieces(output.read, fun, piece, real)(where, known, learned, common)


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """`at` of what is deferred: (where, known, learned, common) -> float32 [B, L].

    `known` and `learned` are the features and arguments [B, L, ...] without and with a gradient, `common` the weights
    and what is common to the arguments.

    Attributes:
      read, fun: as above.
      piece: positions of one.
      real: which of features and arguments are among the learned.
    """

    read: Callable[[Any, jax.Array], jax.Array]
    fun: Callable[..., jax.Array]
    piece: int
    real: tuple[bool, ...]

    def __call__(self, where, known, learned, common):
        guess = 1 / where.size  # of the derivative by a value, so that float16 holds what it holds else

        @jax.custom_vjp
        def values(where, known, learned, common):
            return self._on_devices(where, known, learned, common, None)[0]

        def forward(where, known, learned, common):
            cotangent = jnp.full(where.shape, guess, jnp.float32)
            made, *gradients = self._on_devices(where, known, learned, common, cotangent)
            return made, (where, known, learned, common, gradients)

        def backward(kept, cotangent):
            where, known, learned, common, (by_learned, by_common) = kept
            cotangent = jnp.where(where, cotangent, 0.0)
            one = cotangent.reshape(-1)[jnp.argmax(where)]

            def scaled():
                rows = [(_beside(cotangent / guess, g) * g).astype(g.dtype) for g in by_learned]
                return rows, jax.tree.map(lambda g: one / guess * g, by_common)

            def anew():
                return self._on_devices(where, known, learned, common, cotangent)[1:]

            equal = jnp.all(jnp.where(where, cotangent == one, True))
            by_learned, by_common = jax.lax.cond(equal, scaled, anew)
            return None, None, by_learned, jax.tree.map(lambda x, g: g.astype(x.dtype), common, by_common)

        values.defvjp(forward, backward)
        return values(where, known, learned, common)

    def _on_devices(self, where, known, learned, common, cotangent):
        """`_run`, on each device for its own rows."""
        axes = _batch_axes(len(where))
        if not axes:
            return self._run(where, known, learned, common, cotangent)

        def run(*own_and_common):
            values, by_learned, by_common = self._run(*own_and_common)
            return values, by_learned, jax.lax.psum(by_common, axes)

        rows, whole = PartitionSpec(axes), PartitionSpec()
        mapped = jax.shard_map(
            run,
            in_specs=(rows, rows, rows, whole, rows),
            out_specs=(rows, rows, whole),
            axis_names=set(_automatic()),
            check_vma=False,
        )
        return mapped(where, known, learned, common, cotangent)

    def _run(self, where, known, learned, common, cotangent):
        """(The values, their gradients by `learned`, those by `common` in float32), one piece after another.

        Args:
          cotangent: float32 [B, L], by what the gradients are multiplied; None: none are wanted.
        """
        shape, number = where.shape, where.size
        where, known, learned, cotangent = jax.tree.map(
            lambda x: x.reshape(number, *x.shape[2:]), (where, known, learned, cotangent)
        )
        room = -(-number // self.piece) * self.piece
        count = where.sum(dtype=jnp.int32)
        order = jnp.argsort(~where, stable=True).astype(jnp.int32)  # those that count come first
        order = jnp.pad(order, (0, room - number))

        def put(whole, start, part):
            return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)

        def next_piece(i, carry):
            values, by_learned, by_common = carry
            start = i * self.piece
            counts = start + jnp.arange(self.piece) < count
            # what fills the last piece is a copy of what counts: of other positions nobody knows that all is finite
            positions = jnp.where(counts, jax.lax.dynamic_slice_in_dim(order, start, self.piece), order[0])
            known_here, learned_here = jax.tree.map(lambda x: x[positions], (known, learned))

            def of_piece(learned_here, common):
                (weights, others), rest, ours = common, iter(known_here), iter(learned_here)
                features, *args = (next(ours) if r else next(rest) for r in self.real)
                output = self.read(weights, features)[None]
                return jnp.where(counts, self.fun(output, *(a[None] for a in args), others)[0], 0.0)

            if cotangent is None:
                return put(values, start, of_piece(learned_here, common)), None, None
            made, pullback = jax.vjp(of_piece, learned_here, common)
            rows, sums = pullback(cotangent[positions])
            return (
                put(values, start, made),
                [put(whole, start, part) for whole, part in zip(by_learned, rows, strict=True)],
                jax.tree.map(lambda total, part: total + part.astype(jnp.float32), by_common, sums),
            )

        by_learned, by_common = None, None
        if cotangent is not None:
            by_learned = [jnp.zeros((room, *x.shape[1:]), x.dtype) for x in learned]
            by_common = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), common)
        empty = jnp.zeros(room, jnp.float32), by_learned, by_common
        values, by_learned, by_common = jax.lax.fori_loop(0, -(-count // self.piece), next_piece, empty)
        rank = jnp.cumsum(where, dtype=jnp.int32) - 1

        def in_place(x):
            x = x[jnp.maximum(rank, 0)]
            return jnp.where(_beside(where, x), x, 0).reshape(*shape, *x.shape[1:])

        return in_place(values), jax.tree.map(in_place, by_learned), by_common


def _beside(x, y):
    """x with as many axes as y, behind its own."""
    return x.reshape(*x.shape, *(1,) * (y.ndim - x.ndim))


def _automatic():
    """The axes of the mesh in context that XLA splits by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]


def _batch_axes(batch: int) -> tuple[str, ...]:
    """The axes of the mesh in context that split a batch of so many rows; () for one device."""
    axes: tuple[str, ...] = ()
    for name in _automatic():
        axes += (name,) if batch % _devices((*axes, name)) == 0 else ()
    return axes if _devices(axes) > 1 else ()


def _devices(axes: tuple[str, ...]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in axes)


__all__ = ["Deferred", "Network", "at", "deferring"]
