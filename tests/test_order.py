"""Products whose backward pass has an order on a CPU, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.layers import project
from pallas_kernels.order import after
from tests.golden_arrays import relative_error


@pytest.mark.parametrize("shape", [(2, 63, 8, 5), (2, 1, 5, 8)])  # more rows than columns of the kernel, and fewer
def test_gradients_of_a_product(shape):
    batch, length, here, there = shape
    rng = np.random.default_rng(sum(shape))
    x, kernel = rng.normal(size=(batch, length, here)), rng.normal(size=(here, there))
    d = rng.normal(size=(batch, length, there))
    y, pull = jax.vjp(project, jnp.asarray(x, "float32"), jnp.asarray(kernel, "float32"))
    d_x, d_kernel = pull(jnp.asarray(d, "float32"))
    assert relative_error(y, x @ kernel) < 1e-6
    assert relative_error(d_x, d @ kernel.T) < 1e-6
    assert relative_error(d_kernel, np.einsum("bli,blo->io", x, d)) < 1e-6


def test_a_gradient_has_the_precision_of_its_product():
    def total(x, kernel):
        with jax.default_matmul_precision("highest"):
            return project(x, kernel).sum()

    text = jax.jit(jax.grad(total, (0, 1))).lower(jnp.ones((3, 4)), jnp.ones((4, 2))).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_after_changes_nothing_but_the_order():
    x, first = jnp.asarray([[1.0, -2.0]], "bfloat16"), [jnp.asarray([-3.0, jnp.nan]), jnp.asarray(jnp.inf)]
    np.testing.assert_array_equal(jax.jit(after)(x, first), x)
    assert jnp.isnan(after(x, [jnp.asarray(jnp.nan)])).all()  # is told, not hidden
    traced = jax.jit(after).trace(x, first)
    waits = {name: "minimum" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda")}
    assert waits == {"cpu": True, "tpu": False, "cuda": False}
