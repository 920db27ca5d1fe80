"""One random key per sequence: a sample depends on its seed and its number, and no other."""

import jax
import jax.numpy as jnp

from diffrwkv.array_types import Keys
from diffrwkv.checks import Range, check_seed


def sequence_keys(seed: int, n: int, start: int = 0) -> Keys:
    """Keys of the sequences start, start + 1, ..., start + n - 1 of a seed.

    Sequence i has the same key whatever batch it is generated in.

    Args:
      seed: a Python int from 0 to 2**32 - 1; another one raises ValueError.
      n: how many keys.
      start: the number of the first sequence.

    Returns:
      key array [n] (threefry, whose numbers do not change under vmap).
    """
    check_seed(seed)
    Range(0, 2**32 - 1 - max(n, 1), integer=True).check("start", start)
    if n < 1:
        raise ValueError(f"sequence_keys needs n >= 1, got {n}.")
    return jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed, impl="threefry2x32"), jnp.arange(start, start + n, dtype=jnp.uint32)
    )


def check_keys(keys: Keys, batch: int) -> None:
    """Raises a clear error unless `keys` is a key array [batch] that is safe under vmap."""
    if not (hasattr(keys, "dtype") and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)):
        raise TypeError("Sampling needs typed keys, one per sequence: make them with sequence_keys(seed, n).")
    if keys.shape != (batch,):
        raise ValueError(f"Sampling needs one key per sequence: {batch} sequences, keys of shape {keys.shape}.")
    if "rbg" in str(jax.random.key_impl(keys)):
        raise ValueError(
            "Sampling needs threefry keys: under vmap an rbg key's numbers depend on the other "
            "keys of the batch. Make them with sequence_keys(seed, n)."
        )
