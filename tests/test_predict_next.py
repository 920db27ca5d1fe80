"""Logits at the token before: a block reads it first, and blocks of one token are what a causal model says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.test_block_diffusion import MASK, VOCABULARY, build, in_blocks, one_after_another, texts

START = MASK  # what stands before a text


def late(x):
    """The text one token late."""
    return jnp.concatenate([jnp.full_like(x[:, :1], START), x[:, :-1]], axis=1)


@pytest.mark.parametrize(
    "pattern, length",
    [("rwkv7", 63), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("rwkv7", 1), ("causal_attention", 9)))],
)
def test_blocks_of_one_token_are_the_causal_model(pattern, length):
    """Whatever stands in the blanks."""
    fields = {"channel_mixers": {"rwkv7": {"shift": "previous"}}}
    model, params = build(pattern, **fields)
    x, z = texts(length=length)
    behind = model.clone(predict_next=True)
    causal = jax.jit(lambda x: model.apply({"params": params}, x))(late(x))
    for shown in (z, jnp.full_like(z, MASK)):
        np.testing.assert_allclose(in_blocks(behind, params, block=1)(shown, x), causal, atol=1e-5)
    whole = jax.jit(lambda x: behind.apply({"params": params}, x))(x)
    np.testing.assert_allclose(whole, causal, atol=1e-5)  # a causal mixer sees no later position


@pytest.mark.parametrize(
    "pattern, causal_context", [("birwkv7", False), pytest.param("attention,birwkv7", True, marks=pytest.mark.slow)]
)
def test_the_cache_is_exact(pattern, causal_context):
    """The state knows the token before: all blocks at once are one after another, the last a shorter one."""
    model, params = build(pattern, predict_next=True, time_conditioning=True)
    x, z = texts()
    t = jax.random.uniform(jax.random.key(1), (2, 3))
    whole = in_blocks(model, params, block=4, causal_context=causal_context)(z, x, t)
    assert whole.shape == (2, 11, VOCABULARY)
    steps = one_after_another(model, params, z, x, t, 4, causal_context)
    np.testing.assert_allclose(whole, steps, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_block_sees_what_it_should():
    """All of itself, and of the clean text what stands before it; each position both."""
    model, params = build("birwkv7", 1, predict_next=True)
    rows, block, length = jax.random.normal(jax.random.key(0), (18, 32)), 3, 9

    def second_block(rows):  # each position its own row of the embedding
        z, x = jnp.arange(length)[None], jnp.arange(length, 2 * length)[None]
        own = {"embedding": jnp.concatenate([rows, jnp.zeros((1, 32))]), "head": jnp.ones((32, VOCABULARY))}
        own["head"] = jax.random.normal(jax.random.key(2), (32, VOCABULARY))
        logits = model.apply({"params": params | own}, z, clean=x, block=block)
        return logits[0, block : 2 * block] @ jnp.cos(jnp.arange(VOCABULARY))

    reach = np.asarray(jnp.abs(jax.jit(jax.jacrev(second_block))(rows)).max(axis=-1) > 0)
    noised, clean = reach[:, :length], reach[:, length:]
    assert noised[:, block : 2 * block].all() and not noised[:, :block].any() and not noised[:, 2 * block :].any()
    assert clean[:, :block].all() and not clean[:, block:].any()


@pytest.mark.slow
def test_padding_changes_nothing():
    model, params = build("attention,birwkv7", predict_next=True)
    x, z = texts(length=14)
    valid = jnp.arange(14)[None] < jnp.array([7, 14])[:, None]
    run = in_blocks(model, params, block=4)
    alone = run(z[:1, :7], x[:1, :7])
    np.testing.assert_allclose(run(z, x, valid=valid)[0, :7], alone[0], atol=1e-5)
    whole = jax.jit(lambda z, valid: model.apply({"params": params}, z, valid=valid))
    np.testing.assert_allclose(whole(z, valid)[0, :7], whole(z[:1, :7], valid[:1, :7])[0], atol=1e-5)


@pytest.mark.slow
def test_the_state_after_a_padded_stretch():
    """Is that of the stretch without its padding, the token before the next one with it."""
    model, params = build("birwkv7", predict_next=True)
    x, _ = texts(length=8)
    valid = jnp.arange(8)[None] < jnp.array([0, 5])[:, None]
    advance = jax.jit(lambda x, **options: model.apply({"params": params}, x, block=8, method="with_state", **options))
    state = advance(x, valid=valid)[1]
    np.testing.assert_array_equal(state["token"], [START, x[1, 4]])
    _, alone = model.apply({"params": params}, x[1:, :5], block=5, method="with_state")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:], b, atol=1e-5), state, alone)


@pytest.mark.slow
def test_soft_tokens_are_read_as_the_ids_are():
    model, params = build("birwkv7", 1, predict_next=True)
    x, z = texts(length=7)
    soft = jax.nn.one_hot(z, VOCABULARY)
    run = in_blocks(model, params, block=3)
    np.testing.assert_allclose(run(soft, x), run(z, x), atol=1e-5)


def test_a_state_of_noised_text_is_refused():
    model, params = build("attention", 1, predict_next=True, mixers=tiny.MIXERS)
    with pytest.raises(ValueError, match="in blocks"):
        model.apply({"params": params}, jnp.zeros((1, 4), jnp.int32), method="with_state")
