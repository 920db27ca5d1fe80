"""AdamW, its schedules and groups, and the moving average, each held to a slow definition."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import optim

GOLDEN = Path(__file__).parents[1] / "golden"


def test_moving_average_is_mdlms():
    path = GOLDEN / "mdlm_ema.npz"
    golden = np.load(path)
    ema = jnp.asarray(golden["init"])
    for n, (value, shadow) in enumerate(zip(golden["values"], golden["shadow"], strict=True), start=1):
        ema = optim.update_ema(ema, jnp.asarray(value), jnp.int32(n), float(golden["decay"]))
        np.testing.assert_allclose(ema, shadow, rtol=1e-5, atol=1e-6)
    assert ema.dtype == jnp.float32


def test_moving_average_of_bfloat16_is_float32():
    ema = optim.update_ema(jnp.zeros(3), jnp.ones(3, jnp.bfloat16), jnp.int32(1), 0.9)
    assert ema.dtype == jnp.float32


@pytest.mark.parametrize("decay", [float("nan"), 1.0, -0.1, 1 - 1e-12, "0.9"])
def test_a_decay_is_below_1(decay):
    with pytest.raises(ValueError, match="ema_decay must be"):
        optim.ema_decay(jnp.int32(3), decay)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_schedules(name):
    rate = optim.learning_rate_schedule(name, 2.0, 100, warmup_steps=10, decay_fraction=0.2, final_fraction=0.1)
    assert rate(0) == 0 and np.isclose(rate(5), 1.0) and np.isclose(rate(10), 2.0)
    end = {"constant": 2.0, "cosine": 0.2, "wsd": 0.2}[name]
    middle = {"constant": 2.0, "cosine": 1.1, "wsd": 2.0}[name]
    assert np.isclose(rate(100), end) and np.isclose(rate(1000), end) and np.isclose(rate(55), middle)
    assert np.isclose(rate(90), {"constant": 2.0, "cosine": rate(90), "wsd": 1.1}[name])
    assert jax.jit(rate)(jnp.int32(7)).dtype == jnp.float32


def test_no_warm_up():
    assert optim.learning_rate_schedule("constant", 3.0, 10)(0) == 3.0


def test_adamw_is_the_textbooks():
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) with a clip before it."""
    rng = np.random.default_rng(0)
    p = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=3)}
    grads = [{"w": rng.normal(size=(3, 2)), "b": rng.normal(size=3)} for _ in range(5)]
    lr, b1, b2, eps, wd, clip = 0.1, 0.8, 0.9, 1e-3, 0.2, 1.5
    params = jax.tree.map(jnp.float32, p)
    tx, _ = optim.make_optimizer(
        params,
        10,
        learning_rate=lr,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=wd,
        decay_group="matrices",
        clip_norm=clip,
    )
    state = tx.init(params)
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for n, g in enumerate(grads, start=1):
        updates, state = tx.update(jax.tree.map(jnp.float32, g), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for k in p:
            x = g[k] * min(1, clip / norm)
            m[k], v[k] = b1 * m[k] + (1 - b1) * x, b2 * v[k] + (1 - b2) * x**2
            step = m[k] / (1 - b1**n) / (np.sqrt(v[k] / (1 - b2**n)) + eps)
            p[k] = p[k] - lr * (step + (wd * p[k] if k == "w" else 0))
    for k in p:
        np.testing.assert_allclose(params[k], p[k], rtol=2e-5)


def test_groups_of_rwkv7():
    params = {"att": {"w0": jnp.ones(4), "w1": jnp.ones((4, 2)), "key": {"kernel": jnp.ones((4, 4))}}}
    zero = jax.tree.map(jnp.zeros_like, params)
    one = jax.tree.map(jnp.ones_like, params)

    def first_update(grads, **options):
        tx, _ = optim.make_optimizer(params, 10, learning_rate=1.0, clip_norm=0.0, **options)
        updates, _ = tx.update(grads, tx.init(params), params)
        return {k: float(np.ravel(x)[0]) for k, x in zip(("kernel", "w0", "w1"), jax.tree.leaves(updates), strict=True)}

    decayed = first_update(zero, weight_decay=0.5, decay_group="rwkv7")
    assert decayed["kernel"] < decayed["w0"] == decayed["w1"]
    everything = first_update(zero, weight_decay=0.5, decay_group="all")
    assert everything["kernel"] == everything["w0"] == everything["w1"]
    rates = first_update(one, rate_group="rwkv7")
    np.testing.assert_allclose([rates["w0"], rates["w1"], rates["kernel"]], [-2, -1, -1], rtol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "triangle"}, {"decay_group": "some"}, {"rate_group": "some"}, {"clip_norm": -1.0}, {"b1": 2.0}],
)
def test_wrong_settings(wrong):
    with pytest.raises(ValueError):
        optim.make_optimizer({"w": jnp.ones(2)}, 10, **({"learning_rate": 1.0} | wrong))
