"""Parameters for tests of what a module computes, without compiling how it is initialised."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def random_parameters(module, *inputs, seed=0):
    """Parameters of the module's shapes, filled from NumPy: nothing zero, so that nothing hides what is behind it.

    Matrices have columns of about unit length, norm scales are near 1, all else is of the order of 0.3.
    """
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]
    rng = np.random.default_rng(seed)

    def fill(path, x):
        noise = rng.normal(size=x.shape)
        if path[-1].key.endswith("scale"):
            noise = 1 + 0.3 * noise
        elif len(x.shape) >= 2:
            noise = noise / x.shape[-2] ** 0.5
        else:
            noise = 0.3 * noise
        return jnp.asarray(noise, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
