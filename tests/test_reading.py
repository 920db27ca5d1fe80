"""How a network from left to right sees both sides: it reads twice, or a layer starts where the one before ended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.denoiser import READINGS, Denoiser
from diffrwkv.mixers import MIXERS
from tests.random_parameters import random_parameters
from tests.test_block_diffusion import MASK, VOCABULARY, build, in_blocks, one_after_another, texts
from tests.thin import slow, thin

ABLE = [name for name in MIXERS if getattr(MIXERS[name], "memory", None)]
OTHER = [reading for reading in READINGS if reading != "once"]
CAUSAL = {"channel_mixers": {"rwkv7": {"shift": "previous"}}}


def run(model, params, method=None):
    return jax.jit(lambda z, **options: model.apply({"params": params}, z, method=method, **options))


def test_the_mixers_that_read_from_left_to_right_with_a_memory():
    assert ABLE == ["mamba2", "rwkv7"]


def test_twice_is_a_second_pass_from_the_state_of_the_first():
    model, params = build("rwkv7", 3, **CAUSAL)
    z, _ = texts()
    _, state = run(model, params, "with_state")(z)
    expected = run(model, params)(z, state=state)
    np.testing.assert_allclose(run(model.clone(reading="twice"), params)(z), expected, atol=1e-5)


def test_a_seed_is_the_memory_that_the_layer_before_ended_with():
    """Put into the second layer by hand; with its gate at zero nothing is."""
    model, params = build("rwkv7", 2, reading="future_seed", **CAUSAL)
    gate = params["block_1"]["seed_gate"]
    once = params | {"block_1": {name: x for name, x in params["block_1"].items() if name != "seed_gate"}}
    plain = model.clone(reading="once")
    z, _ = texts()
    _, state = run(plain, once, "with_state")(z)
    start = model.empty_state(2, 11)
    start["block_1"]["att"]["wkv"] = gate[:, None, None] * state["block_0"]["att"]["wkv"]
    expected = run(plain, once)(z, state=start)
    np.testing.assert_allclose(run(model, params)(z), expected, atol=1e-5)
    closed = params | {"block_1": params["block_1"] | {"seed_gate": jnp.zeros_like(gate)}}
    np.testing.assert_allclose(run(model, closed)(z), run(plain, once)(z), atol=1e-5)
    assert float(jnp.abs(expected - run(plain, once)(z)).max()) > 1e-3


@pytest.mark.parametrize("predict_next", thin([False, True]))
@pytest.mark.parametrize("reading", OTHER)
@pytest.mark.parametrize("pattern", ABLE)
def test_the_cache_is_exact(pattern, reading, predict_next):
    """All blocks at once are one after another, each from the state of the clean text before it."""
    layers = 3 if reading == "future_seed" else 2  # a layer that is handed a memory and hands one on
    model, params = build(pattern, layers, reading=reading, predict_next=predict_next, time_conditioning=True)
    x, z = texts()
    t = jax.random.uniform(jax.random.key(1), (2, 3))
    whole = in_blocks(model, params, block=4)(z, x, t)
    steps = one_after_another(model, params, z, x, t, 4, True)
    np.testing.assert_allclose(whole, steps, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("reading", [slow("once"), *OTHER])
def test_the_last_layer_sees_both_sides(reading):
    """What no mixer shows it: all of its block, and of the clean text what stands before that."""
    model, params = build("rwkv7", 2, reading=reading, **CAUSAL)
    rows, block, length = jax.random.normal(jax.random.key(0), (18, 32)), 3, 9

    def second_block(rows):  # each position its own row of the embedding
        z, x = jnp.arange(length)[None], jnp.arange(length, 2 * length)[None]
        own = {"embedding": jnp.concatenate([rows, jnp.zeros((1, 32))])}
        logits = model.apply({"params": params | own}, z, clean=x, block=block)
        return logits[0, block : 2 * block] @ jnp.cos(jnp.arange(VOCABULARY))

    reach = np.asarray(jnp.abs(jax.jit(jax.jacrev(second_block))(rows)).max(-1) > 0)
    noised, clean = reach[:, :length], reach[:, length:]
    assert not noised[:, :block].any() and not noised[:, 2 * block :].any()
    assert clean[:, :block].all() and not clean[:, block:].any()
    seen = np.tril(np.ones((3, 3), bool)) if reading == "once" else np.ones((3, 3), bool)
    assert (noised[:, block : 2 * block] == seen).all()


@pytest.mark.parametrize("reading", OTHER)
def test_padding_changes_nothing(reading):
    model, params = build("rwkv7", 2, reading=reading, **CAUSAL)
    z, _ = texts(length=11)
    valid = jnp.arange(11) < jnp.array([[7], [11]])
    padded = run(model, params)(z, valid=valid)
    np.testing.assert_allclose(padded[:1, :7], run(model, params)(z[:1, :7]), atol=1e-5)
    np.testing.assert_allclose(padded[1:], run(model, params)(z[1:]), atol=1e-5)


@pytest.mark.parametrize("length", thin([11, 1]))
@pytest.mark.parametrize("reading", OTHER)
def test_scanned_layers_are_the_layers(reading, length):
    """Gradients too, recomputed or kept."""
    model, params = build("rwkv7", 3, reading=reading, **CAUSAL)
    _, z = texts(length=length)
    scanned = model.clone(scan_layers=True, remat=True)
    stack = jax.tree.map(lambda *x: jnp.stack(x), *(params[f"block_{i}"] for i in (1, 2)))
    others = {name: x for name, x in params.items() if name not in ("block_1", "block_2")}
    stacked = others | {"blocks": {"block_0": stack}}

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.cos(model.apply({"params": p}, z)))))

    (value, gradient), (expected, by_layer) = loss(scanned)(stacked), loss(model)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for i in (1, 2):
        own = jax.tree.map(lambda x, i=i: x[i - 1], gradient["blocks"]["block_0"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), own, by_layer[f"block_{i}"])


def test_a_run_of_blocks_of_one_starts_as_the_causal_model():
    """The gates are zero at first, and have a gradient."""
    z = jnp.full((2, 9), MASK)
    x, _ = texts(length=9)
    model, _ = build("rwkv7", 2, reading="future_seed", predict_next=True, **CAUSAL)
    params = jax.jit(model.init)(jax.random.key(0), z)["params"]
    assert not np.any(params["block_1"]["seed_gate"].value)
    params = random_parameters(model, z)
    params["block_1"]["seed_gate"] *= 0
    once = {name: x for name, x in params["block_1"].items() if name != "seed_gate"}
    late = jnp.concatenate([jnp.full_like(x[:, :1], MASK), x[:, :-1]], axis=1)
    causal = run(model.clone(reading="once", predict_next=False), params | {"block_1": once})(late)
    np.testing.assert_allclose(in_blocks(model, params, block=1)(z, x), causal, atol=1e-5)
    loss = lambda p: jnp.square(model.apply({"params": p}, z, clean=x, block=3)).mean()
    assert float(jnp.abs(jax.jit(jax.grad(loss))(params)["block_1"]["seed_gate"]).max()) > 1e-6


@pytest.mark.parametrize("pattern", ["birwkv7", "attention", "causal_attention", "rwkv7,mamba2"])
def test_other_networks_are_refused(pattern):
    with pytest.raises(ValueError, match="one mixer that reads from left to right, mamba2, rwkv7"):
        Denoiser(VOCABULARY, pattern=pattern, reading="twice")


def test_what_it_is():
    with pytest.raises(ValueError, match="reading must be"):
        Denoiser(VOCABULARY, pattern="rwkv7", reading="thrice")
    causal = lambda reading: Denoiser(VOCABULARY, pattern="rwkv7", reading=reading, **CAUSAL).causal
    assert [causal(reading) for reading in READINGS] == [True, False, False]
