"""Makes a kernel's launch a citizen of jit over several devices, and of vmap.

A Pallas call is opaque to XLA, which refuses to split it over devices ("Mosaic kernels cannot be automatically
partitioned"), and under vmap its grid would grow an axis. The operators here do the same to every sequence and to every
group of heads, so both have a simple answer: each device launches its own part, and a mapped axis is folded into the
batch.

The mesh is the one in context (`jax.set_mesh`): jax's custom_partitioning, which would need none, is not carried out by
the TPU's compiler (jax issue 38196, open in 2026).
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec

HEAD_AXES = ("model", "tensor", "heads")  # mesh axes of these names split heads, all others the batch
MULTIPROCESSORS = 132  # of an H100 or H200, where the device does not tell


def independent(launch: Callable, arguments: Sequence[str], results: Sequence[str]) -> Callable:
    """`launch` of arrays that may be split over devices by batch and by heads, and mapped by vmap.

    Args:
      launch: takes and returns a flat tuple of arrays, of any batch and any number of groups of heads.
      arguments, results: the axes of each array, one letter an axis: "b" the batch, which comes first; "g" groups of
        heads; any other letter is an axis that every device needs whole. An argument but the first may have no batch:
        where vmap maps it, the launches follow one another.
    """

    @custom_vmap
    def call(*arrays):
        axes = _split(arguments[0], arrays[0].shape)
        if not axes:
            return launch(*arrays)
        inward, outward = (tuple(PartitionSpec(*map(axes.get, x)) for x in side) for side in (arguments, results))
        # Along an axis that splits nothing here, each device does the whole.
        names = set(_automatic())
        return jax.shard_map(launch, in_specs=inward, out_specs=outward, axis_names=names, check_vma=False)(*arrays)

    @call.def_vmap
    def _(size, mapped, *arrays):
        if any(m and "b" not in letters for m, letters in zip(mapped, arguments, strict=True)):
            each = [x if m else None for x, m in zip(arrays, mapped, strict=True)]
            whole = [None if m else x for x, m in zip(arrays, mapped, strict=True)]
            outputs = jax.lax.map(
                lambda some: call(*(x if y is None else y for x, y in zip(some, whole, strict=True))), each
            )
            return outputs, (True,) * len(outputs)
        whole = [
            x.reshape(-1, *x.shape[2:]) if m else jnp.tile(x, (size, *(1,) * (x.ndim - 1))) if "b" in letters else x
            for x, m, letters in zip(arrays, mapped, arguments, strict=True)
        ]
        outputs = call(*whole)
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in outputs), (True,) * len(outputs)

    return call


def devices_of(axes: str, shape: Sequence[int]) -> int:
    """Over how many devices `independent` splits an array of these axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for names in _split(axes, shape).values() for name in names)


def multiprocessors() -> int:
    """Of this process's GPU, else of an H100 or H200."""
    here = jax.default_backend() == "gpu"  # else some GPU is lowered for
    return getattr(jax.devices()[0], "core_count", MULTIPROCESSORS) if here else MULTIPROCESSORS


def _automatic() -> list[str]:
    """The axes of the mesh in context that XLA splits by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]


def _split(letters: str, shape: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """The mesh axes that split each of "b" and "g"; an axis that does not divide what is left is taken out."""
    mesh = jax.sharding.get_abstract_mesh()
    names = _automatic()
    if math.prod(mesh.shape[name] for name in names) == 1:
        return {}
    axes: dict[str, tuple[str, ...]] = {"b": (), "g": ()}
    for name in names:
        letter = "g" if name in HEAD_AXES else "b"
        parts = math.prod(mesh.shape[other] for other in (*axes[letter], name))
        if shape[letters.index(letter)] % parts == 0:
            axes[letter] += (name,)
    return axes
