"""Real shapes by name, and inputs with the statistics that the operator meets, for tests and benchmarks."""

import jax.numpy as jnp
import numpy as np

SHAPES = {  # name: (batch, length, heads, head size, groups, state size)
    "peer": (16, 256, 4, 64, 1, 128),  # one direction of one layer of width 128, as wide as wkv7's "peer"
    "issue": (4, 1024, 8, 64, 1, 128),  # the same for width 256, wkv7's "issue"
    "generate": (1, 4096, 8, 64, 1, 128),  # one long sequence
}

KINDS = ("random", "masked", "resets", "strong")


def random_inputs(shape, kind="random", *, dtype="float32", seed=0):
    """Arguments of ssd as Mamba-2 makes them: x times dt, log_a = -dt A with dt in [1e-3, .1] and A in [1, 16].

    Args:
      shape: (B, T, H, P, G, N).
      kind: "random"; "masked", nine tokens of ten the same, with slow decay, which is what a diffusion
        model eats; "resets", slow decay but for one token in eight, which forgets everything
        (log_a = -80); "strong", log_a = -1000 throughout.
      dtype: of all but log_a, which is float32.
      seed: of NumPy's generator.

    Returns:
      A dict: x, log_a, b, c, and initial_state [B, H, P, N].
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of inputs; choose one of {', '.join(KINDS)}.")
    batch, length, heads, size, groups, width = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, length, heads, size))
    b, c = rng.standard_normal((2, batch, length, groups, width))
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (batch, length, heads)))
    log_a = -dt * rng.uniform(1, 16, heads)
    if kind == "masked":
        same = rng.random((batch, length, 1, 1)) < 0.9
        x, b, c = (np.where(same, z[:1, :1], z) for z in (x, b, c))
        log_a = np.where(same[..., 0], -1e-3, log_a)
    if kind == "resets":
        log_a = np.where(rng.random(log_a.shape) < 0.125, -80.0, 0.1 * log_a)
    if kind == "strong":
        log_a = np.full(log_a.shape, -1000.0)
    inputs = {name: jnp.asarray(z, dtype) for name, z in {"x": x, "b": b, "c": c}.items()}
    state = 0.1 * rng.standard_normal((batch, heads, size, width))
    return inputs | {"log_a": jnp.asarray(log_a, "float32"), "initial_state": jnp.asarray(state, "float32")}
