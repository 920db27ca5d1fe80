"""Real shapes by name, and inputs with the statistics that the operator meets, for tests and benchmarks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {  # name: (batch, length, heads, head size)
    "peer": (16, 256, 2, 64),  # experiments/peer_shakespeare.py, one direction of one layer
    "peer_narrow": (16, 256, 4, 32),  # the same width with smaller heads
    "half": (8, 256, 2, 64),  # what each of two virtual devices sees of the peer's batch
    "half_narrow": (8, 256, 4, 32),
    "issue": (4, 1024, 4, 64),  # where speed and memory against the definition are stated
    "generate": (1, 4096, 4, 64),  # one long sequence
}

KINDS = ("random", "masked", "allmask", "strong")


def random_inputs(shape, kind="random", *, value_size=None, dtype="float32", seed=0):
    """Arguments of wkv7 as RWKV-7 makes them: a = -kappa, b = kappa * iclr, |kappa| = 1.

    Args:
      shape: (B, T, H, K).
      kind: "random"; "masked", nine tokens of ten the same, with slow decay and iclr .996, which is
        what a diffusion model eats; "allmask", every token the same; "strong", the fastest decay.
      value_size: V; None is K.
      dtype: of all but log_w, which is float32.
      seed: of NumPy's generator.

    Returns:
      A dict: r, log_w, k, v, a, b, and initial_state [B, H, K, V].
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of inputs; choose one of {', '.join(KINDS)}.")
    batch, length, heads, key = shape
    value = value_size or key
    rng = np.random.default_rng(seed)
    r, k, kappa, decay, iclr = rng.standard_normal((5, *shape))
    v = rng.standard_normal((*shape[:3], value))
    masks = kind in ("masked", "allmask")
    chance = rng.random((batch, length, 1, 1)) if masks else None
    state = 0.1 * rng.standard_normal((batch, heads, key, value))
    return _as_rwkv7_makes_them(np, kind, dtype, r, k, v, kappa, decay, iclr, chance, state)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="dtype")
def drawn_inputs(shape, kind="random", *, dtype="float32", seed=0):
    """`random_inputs` with V = K, other draws and float32 sums: a program, for sizes that NumPy takes long for."""
    batch, length, heads, key = shape
    keys = jax.random.split(jax.random.key(seed), 8)
    tokens = [jax.random.normal(x, shape) for x in keys[:6]]
    chance = jax.random.uniform(keys[6], (batch, length, 1, 1))
    state = 0.1 * jax.random.normal(keys[7], (batch, heads, key, key))
    return _as_rwkv7_makes_them(jnp, kind, dtype, *tokens, chance, state)


def _as_rwkv7_makes_them(xp, kind, dtype, r, k, v, kappa, decay, iclr, chance, state):
    """The inputs from normal draws, with NumPy or jax.numpy; `chance` is uniform, for a token to be a mask."""
    rate = 1 / (1 + xp.exp(-iclr))
    if kind in ("masked", "allmask"):
        same = chance < (0.9 if kind == "masked" else 2)
        r, k, kappa, v = (xp.where(same, x[:1, :1], x) for x in (r, k, kappa, v))
        rate = xp.where(same, 0.996, rate)
        decay = xp.where(same, -7.0, decay)
    if kind == "strong":
        decay = xp.full(decay.shape, 20.0)
    kappa = kappa / xp.linalg.norm(kappa, axis=-1, keepdims=True)
    inputs = {"r": r, "k": 0.5 * k, "v": v, "a": -kappa, "b": kappa * rate}
    inputs = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
    log_w = -np.exp(-0.5) / (1 + xp.exp(-decay))
    return inputs | {"log_w": jnp.asarray(log_w, "float32"), "initial_state": jnp.asarray(state, "float32")}
