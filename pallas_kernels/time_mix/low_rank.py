"""Low-rank maps that are not multiplied yet, so that a kernel can do it where it reads the product."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden", "ups"], meta_fields=["starts"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The second halves of some low-rank maps, hidden[..., start : start + R] up each.

    Attributes:
      hidden: [B, T, N], what the first halves made, after their activations, beside what else stands there. A kernel
        reads it once for each head, so activations in the kernel would be computed as often.
      ups: [R, D] of each map.
      starts: of each map, the first of its columns of hidden.
    """

    hidden: Any
    ups: tuple[Any, ...]
    starts: tuple[int, ...]

    def values(self) -> tuple[Array, ...]:
        """[B, T, D] of each map, computed in hidden's dtype."""
        made = []
        for up, start in zip(self.ups, self.starts, strict=True):
            own = self.hidden[..., start : start + len(up)]
            flat = own.reshape(-1, len(up)) @ up.astype(own.dtype)  # one product: the gradient of up sums one axis
            made.append(flat.reshape(*own.shape[:-1], -1))
        return tuple(made)

    def specs(self) -> list[tuple[int, int]]:
        """(start, R) of each map."""
        return list(zip(self.starts, map(len, self.ups), strict=True))


def values(raw: Any) -> tuple[Array, ...]:
    """[B, T, D] each, of an array, of some arrays, or of a LowRank."""
    if isinstance(raw, LowRank):
        return raw.values()
    return tuple(raw) if isinstance(raw, tuple | list) else (raw,)


def pull(raw: Any, cotangents: tuple[Array, ...]) -> Any:
    """The cotangents of `raw` from those of its `values`."""
    if isinstance(raw, LowRank):
        return jax.vjp(LowRank.values, raw)[1](cotangents)[0]
    return cotangents if isinstance(raw, tuple | list) else cotangents[0]


def tokens(raw: Any) -> tuple[Any, ...]:
    """What a kernel reads of it: arrays, or the LowRank."""
    return (raw,) if isinstance(raw, LowRank) else values(raw)


def arrays(raw: Any) -> tuple[Array, ...]:
    """The arrays whose dtype is that of the values."""
    return (raw.hidden,) if isinstance(raw, LowRank) else values(raw)


def ranks(*raws: Any) -> tuple[int, ...]:
    """The ranks of all maps among these."""
    return tuple(len(up) for raw in raws if isinstance(raw, LowRank) for up in raw.ups)


def problem(raw: Any, shape: tuple[int, ...], count: int) -> str | None:
    """Why this is not `count` projections [B, T, D] = `shape`, or None."""
    if isinstance(raw, LowRank):
        hidden, ups = jnp.shape(raw.hidden), [jnp.shape(up) for up in raw.ups]
        if not len(ups) == len(raw.starts) == count:
            return f"it has {len(ups)} maps, {len(raw.starts)} starts of {count}"
        if len(hidden) != 3 or hidden[:2] != tuple(shape[:2]):
            return f"its hidden is {hidden}"
        for up, start in zip(ups, raw.starts, strict=True):
            if len(up) != 2 or up[1] != shape[2] or start < 0 or start + up[0] > hidden[2]:
                return f"a map of it is {up}, from column {start} of hidden {hidden}"
        return None
    shapes = [jnp.shape(x) for x in values(raw)]
    return None if shapes == [tuple(shape)] * count else f"it is {shapes}"
