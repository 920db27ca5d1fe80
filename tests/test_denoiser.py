"""The denoiser as a whole: shapes, both scan forms, remat, time, padding, states, parameter groups, cost."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.denoiser import Denoiser, count_parameters, learning_rate_scale, weight_decay_mask
from diffrwkv.mixers import MIXERS
from tests.test_mixers import randomised

VOCABULARY = 19
SMALL = {"dim": 32, "num_layers": 2, "mixers": {name: {"head_dim": 16} for name in MIXERS}}


def build(**fields):
    model = Denoiser(vocab_size=VOCABULARY, **(SMALL | fields))
    return model, randomised(initial(model), jax.random.key(1))


def initial(model, boxed=False):
    """Its parameters; initialisers run as one compiled function, as op by op they take seconds."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))["params"]
    return params if boxed else nn.unbox(params)


def run(model, params, *args, **kwargs):
    """model.apply, compiled."""
    return jax.jit(lambda p, a, k: model.apply({"params": p}, *a, **k))(params, args, kwargs)


def tokens(batch, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCABULARY)


@pytest.fixture(scope="module")
def small():
    model, params = build()
    return model, params, jax.jit(lambda z, valid=None: model.apply({"params": params}, z, valid=valid))


@pytest.mark.parametrize("length", [1, 2, 63])
def test_logits_for_any_length(small, length):
    logits = small[2](tokens(2, length))
    assert logits.shape == (2, length, VOCABULARY) and logits.dtype == jnp.float32
    assert bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("name", MIXERS)
def test_all_mask_is_finite_with_finite_gradients(name):
    model, params = build(pattern=name)
    z = jnp.full((2, 63), VOCABULARY - 1)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, z)).mean()))(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_gradients_are_finite_at_initialisation():
    """Zero keys come from zero-initialised maps: the normalisation must not turn them into NaN."""
    model = Denoiser(vocab_size=VOCABULARY, **SMALL)
    params = jax.tree.map(jnp.zeros_like, initial(model))
    gradient = jax.jit(jax.grad(lambda p: model.apply({"params": p}, tokens(2, 9)).sum()))(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_every_logit_depends_on_every_position(small):
    model, params, _ = small

    def from_embeddings(embedding):  # each position its own row, so that gradients tell positions apart
        return model.apply({"params": params | {"embedding": embedding}}, jnp.arange(7)[None])[0].sum(-1)

    jacobian = jax.jit(jax.jacrev(from_embeddings))(params["embedding"])[:, :7]
    assert bool((jnp.abs(jacobian).max(-1) > 0).all())


def test_scan_over_layers_is_the_same_network():
    deep = SMALL | {"num_layers": 3}
    model, params = build(**deep)
    scanned = Denoiser(vocab_size=VOCABULARY, scan_layers=True, **deep)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(params[f"block_{i}"] for i in (1, 2)))
    rest = {k: v for k, v in params.items() if k not in ("block_1", "block_2")}
    z = tokens(2, 11)
    np.testing.assert_allclose(
        run(scanned, rest | {"blocks": {"block_0": stacked}}, z),
        run(model, params, z),
        atol=1e-5,
    )


def test_scan_over_layers_initialises_each_layer_as_itself():
    deep = SMALL | {"num_layers": 3}
    plain = initial(Denoiser(vocab_size=VOCABULARY, **deep))
    scanned = Denoiser(vocab_size=VOCABULARY, scan_layers=True, **deep)
    stacked = initial(scanned)["blocks"]["block_0"]
    for layer in (1, 2):
        expected = plain[f"block_{layer}"]["att"]["forward"]
        for name in ("x_r", "w0", "a0", "ln_x_scale"):
            np.testing.assert_allclose(stacked["att"]["forward"][name][layer - 1], expected[name], rtol=1e-5, atol=1e-5)


def test_remat_changes_no_gradient():
    model, params = build()
    remat = Denoiser(vocab_size=VOCABULARY, remat=True, **SMALL)
    z = tokens(2, 9)
    loss = lambda m: lambda p: jnp.square(m.apply({"params": p}, z)).sum()
    plain, again = jax.jit(jax.grad(loss(model)))(params), jax.jit(jax.grad(loss(remat)))(params)
    chex.assert_trees_all_close(plain, again, rtol=1e-4, atol=1e-4)


def test_dropout_needs_its_rng_and_changes_the_output():
    model, params = build(dropout=0.2)
    z = tokens(2, 9)
    apply = jax.jit(lambda key: model.apply({"params": params}, z, deterministic=False, rngs={"dropout": key}))
    a, b = apply(jax.random.key(0)), apply(jax.random.key(1))
    assert bool((a != b).any())
    np.testing.assert_array_equal(a, apply(jax.random.key(0)))


def test_time_conditioning_is_off_and_can_be_on():
    model, params = build()
    z = tokens(2, 9)
    np.testing.assert_array_equal(run(model, params, z), run(model, params, z, jnp.array([0.1, 0.9])))
    model, params = build(time_conditioning=True)
    early, late = (run(model, params, z, jnp.full(2, t)) for t in (0.1, 0.9))
    assert float(jnp.abs(early - late).max()) > 1e-4
    with pytest.raises(ValueError, match="pass t"):
        model.apply({"params": params}, z)


def test_padding_changes_nothing(small):
    z = tokens(2, 21)
    valid = jnp.arange(21)[None] < jnp.array([13, 21])[:, None]
    np.testing.assert_allclose(small[2](z, valid)[0, :13], small[2](z[:1, :13])[0], atol=1e-5)


def test_a_handed_state_is_the_earlier_stretch_in_the_causal_model():
    model, params = build(pattern="rwkv7", channel_mixers={"rwkv7": {"shift": "previous"}})
    z = tokens(2, 17)
    apply = jax.jit(lambda z, state=None: model.apply({"params": params}, z, state=state, return_state=True))
    whole, _ = apply(z)
    head, state = apply(z[:, :6])
    tail, _ = apply(z[:, 6:], state)
    np.testing.assert_allclose(jnp.concatenate([head, tail], 1), whole, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_handed_state_reaches_the_bidirectional_model(scan_layers):
    """The second stretch sees the first through the state alone, and exactly once: gradients flow through it."""
    model, params = build(scan_layers=scan_layers)
    apply = jax.jit(lambda z, state=None: model.apply({"params": params}, z, state=state, return_state=True))
    _, state = apply(tokens(2, 6))
    alone, _ = apply(tokens(2, 11, 1))
    after, _ = apply(tokens(2, 11, 1), state)
    assert float(jnp.abs(after - alone).max()) > 1e-4
    zero = jax.tree.map(jnp.zeros_like, state)
    np.testing.assert_allclose(apply(tokens(2, 11, 1), zero)[0], alone, atol=1e-6)


def test_bfloat16_stays_close_and_keeps_float32_parameters():
    model, params = build()
    half = Denoiser(vocab_size=VOCABULARY, dtype="bfloat16", **SMALL)
    z = tokens(2, 33)
    exact, rough = run(model, params, z), run(half, params, z)
    assert rough.dtype == jnp.float32
    assert float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)) < 3e-2
    assert {x.dtype for x in jax.tree.leaves(initial(half))} == {jnp.dtype("float32")}


def test_tied_embeddings_have_no_head():
    _, params = build(tie_embeddings=True)
    assert "head" not in params


@pytest.mark.parametrize("boxed", [False, True])
def test_parameter_groups(boxed):
    params = initial(Denoiser(vocab_size=VOCABULARY, **SMALL), boxed)
    decayed = nn.unbox(weight_decay_mask(params))
    assert decayed["head"] and decayed["block_0"]["att"]["receptance"]["kernel"]
    assert not decayed["embedding"] and not decayed["block_1"]["att"]["forward"]["w1"]
    assert not decayed["block_1"]["att"]["forward"]["x_r"] and not decayed["ln_out"]["scale"]
    scale = nn.unbox(learning_rate_scale(params))
    assert scale["block_0"]["att"]["forward"]["w0"] == 2 and scale["block_0"]["att"]["forward"]["a0"] == 1


def test_cost_grows_with_the_length_and_no_faster():
    """XLA's own count of a pass: 8 times the length moves 8 times the bytes, to 5 % (attention tends to 64 times)."""
    model, params = build()
    flops = []
    for length in (256, 2048):
        lowered = jax.jit(lambda z: model.apply({"params": params}, z)).lower(tokens(1, length))
        cost = lowered.compile().cost_analysis()
        flops.append(cost["bytes accessed"])
    assert flops[1] / flops[0] < 8 * 1.05


def test_count_parameters():
    assert count_parameters({"a": jnp.zeros((2, 3)), "b": [jnp.zeros(4)]}) == 10


@pytest.mark.parametrize(
    "fields,z,message",
    [
        ({"pattern": "lstm"}, jnp.zeros((1, 3), jnp.int32), "unknown mixer 'lstm' in pattern"),
        ({"channel_mixer": "mlpp"}, jnp.zeros((1, 3), jnp.int32), "unknown channel_mixer"),
        ({}, jnp.zeros((1, 0), jnp.int32), "L ≥ 1"),
        ({}, jnp.zeros((1, 3)), "must be integers"),
        ({"num_layers": 0}, jnp.zeros((1, 3), jnp.int32), "at least 1"),
        ({"dropout": 1.0}, jnp.zeros((1, 3), jnp.int32), "dropout must be in"),
    ],
)
def test_bad_input_is_named(fields, z, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(vocab_size=VOCABULARY, **(SMALL | fields)).init(jax.random.key(0), z)
