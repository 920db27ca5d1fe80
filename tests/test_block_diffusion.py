"""The denoiser in blocks: all at once is one after another from a state, exactly; and it is BD3-LM's Transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.denoiser import Denoiser
from diffrwkv.mixers import MIXERS
from diffrwkv.mixers.attention import attend, attend_behind
from diffrwkv.weights import FORMATS
from tests import tiny
from tests.eight_devices import on_eight_devices
from tests.golden_arrays import golden, relative_error
from tests.random_parameters import random_parameters
from tests.thin import thin

VOCABULARY, MASK = 19, 18
PATTERNS = [*MIXERS, "attention,birwkv7*2", "attention,bimamba2"]
# Each with both kinds of context, but for mixers that are causal whatever the context.
CAUSAL = [name for name in MIXERS if MIXERS[name].causal]
CONTEXTS = [(p, causal) for p in PATTERNS for causal in (True, False) if causal or p not in CAUSAL]


def build(pattern="birwkv7", num_layers=2, **fields):
    fields = {"dim": 32, "mixers": tiny.MIXERS, "pattern": pattern, "num_layers": num_layers} | fields
    model = Denoiser(vocab_size=VOCABULARY, **fields)
    return model, random_parameters(model, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))


def texts(batch=2, length=11):
    """(clean, noised)."""
    k_x, k_z = jax.random.split(jax.random.key(length))
    x = jax.random.randint(k_x, (batch, length), 0, MASK)
    return x, jnp.where(jax.random.uniform(k_z, x.shape) < 0.5, MASK, x)


def in_blocks(model, params, **fixed):
    return jax.jit(lambda z, x, *t, **options: model.apply({"params": params}, z, *t, clean=x, **fixed, **options))


def one_after_another(model, params, z, x, t, block, causal_context):
    """Each block of z from the state of the clean text before it, in calls of their own."""

    @jax.jit
    def denoise(z, t, state):
        return model.apply({"params": params}, z, t, state=state)

    @jax.jit
    def advance(x, state):
        options = {"block": block, "causal_context": causal_context, "state": state, "method": "with_state"}
        return model.apply({"params": params}, x, **options)[1]

    state, logits = model.empty_state(len(x), x.shape[1] + block), []
    for n, start in enumerate(range(0, x.shape[1], block)):
        if n:
            state = advance(x[:, start - block : start], state)
        logits.append(denoise(z[:, start : start + block], t[:, n], state))
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("pattern, causal_context", thin(CONTEXTS, 3))
def test_the_cache_is_exact(pattern, causal_context):
    """For every mixer, with time conditioning, the last block a shorter one."""
    layers = len(pattern.split(",")) + 1
    model, params = build(pattern, layers, time_conditioning=True)
    x, z = texts()
    t = jax.random.uniform(jax.random.key(1), (2, 3))
    whole = in_blocks(model, params, block=4, causal_context=causal_context)(z, x, t)
    assert whole.shape == (2, 11, VOCABULARY)
    np.testing.assert_allclose(
        whole, one_after_another(model, params, z, x, t, 4, causal_context), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("pattern, causal_context", thin(CONTEXTS, 3))
def test_a_block_sees_what_it_should(pattern, causal_context):
    """Itself and the clean blocks before it, all of them; neither its own clean tokens nor anything later."""
    model, params = build(pattern, len(pattern.split(",")), channel_mixers={"rwkv7": {"shift": "both"}})
    block, length = 3, 9
    rows = jax.random.normal(jax.random.key(0), (2 * length, 32))

    def second_block(rows):  # each position its own row of the embedding
        embedding = jnp.concatenate([rows, jnp.zeros((1, 32))])
        z, x = jnp.arange(length)[None], jnp.arange(length, 2 * length)[None]
        model_ = model.clone(vocab_size=2 * length + 1)
        others = {"head": jnp.ones((32, 2 * length + 1))} if "head" in params else {}
        options = {"clean": x, "block": block, "causal_context": causal_context}
        logits = model_.apply({"params": params | {"embedding": embedding} | others}, z, **options)
        weights = jnp.cos(jnp.arange(logits.shape[-1]))
        return logits[0, block : 2 * block] @ weights

    head = jax.random.normal(jax.random.key(2), (32, 2 * length + 1))
    params = params | {"head": head}
    reach = jnp.abs(jax.jit(jax.jacrev(second_block))(rows)).max(axis=-1) > 0  # [block, 2 length]
    noised, clean = np.asarray(reach[:, :length]), np.asarray(reach[:, length:])
    assert not noised[:, :block].any() and not noised[:, 2 * block :].any()
    assert clean[:, :block].all() and not clean[:, block:].any()
    if not MIXERS[pattern.split(",")[0]].causal:
        assert noised[:, block : 2 * block].all()


def test_a_causal_context_does_not_know_where_blocks_begin():
    """So that one state serves blocks of any size."""
    model, params = build("attention,birwkv7", 2)
    x, _ = texts(length=12)
    options = {"method": "with_state", "state": model.empty_state(2, 12)}
    after = {
        block: jax.jit(lambda x, block=block: model.apply({"params": params}, x, block=block, **options)[1])(x)
        for block in (3, 12)
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after[3], after[12])


def operations(pattern, num_layers, **options):
    """Of a pass over 64 positions; over blocks, if `options` say so."""
    model = Denoiser(VOCABULARY, dim=128, num_layers=num_layers, pattern=pattern, mixers=tiny.MIXERS)
    z = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), z)
    run = jax.jit(lambda params, z, x: model.apply(params, z, **({"clean": x} | options if options else {})))
    return run.lower(params, z, z).cost_analysis()["flops"]


@pytest.mark.parametrize("pattern", ["birwkv7", "bimamba2", "attention"])
def test_the_last_clean_block_costs_nothing(pattern):
    """Unless the state behind it is asked for: no block stands behind it."""
    alone, half, all_of_it = (
        operations(pattern, 2, **options) for options in ({}, {"block": 32}, {"block": 32, "method": "with_state"})
    )
    assert half - alone < 0.52 * (all_of_it - alone)


def test_one_block_is_the_whole_sequence():
    model, params = build()
    x, z = texts()
    plain = jax.jit(lambda z: model.apply({"params": params}, z))(z)
    np.testing.assert_allclose(in_blocks(model, params, block=16)(z, x), plain, atol=1e-6)


@pytest.mark.parametrize("pattern", ["birwkv7", "bimamba2", "attention"])
def test_padding_changes_nothing(pattern):
    model, params = build(pattern)
    x, z = texts(length=14)
    valid = jnp.arange(14)[None] < jnp.array([7, 14])[:, None]
    run = in_blocks(model, params, block=4)
    alone = run(z[:1, :7], x[:1, :7])
    np.testing.assert_allclose(run(z, x, valid=valid)[0, :7], alone[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"remat": True}, {"scan_layers": True}])
def test_remat_and_scan_change_nothing(fields):
    pattern, layers = "attention,birwkv7", 4  # the second BiRWKV takes from the first
    model, params = build(pattern, layers)
    other, _ = build(pattern, layers, **fields)
    x, z = texts()
    stacked = dict(params)
    if "scan_layers" in fields:
        second = {f"block_{i}": stacked.pop(f"block_{2 + i}") for i in (0, 1)}
        stacked["blocks"] = jax.tree.map(lambda x: x[None], second)

    def run(model):
        loss = lambda params: jnp.square(model.apply({"params": params}, z, clean=x, block=4)).mean()
        return jax.jit(jax.value_and_grad(loss))

    (loss, grads), (again, others) = run(model)(params), run(other)(stacked)
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    assert relative_error(grads["embedding"], others["embedding"]) < 1e-5


def test_dropout_reaches_both_streams():
    model, params = build(dropout=0.5)
    x, z = texts()
    run = jax.jit(
        lambda key: model.apply({"params": params}, z, clean=x, block=4, deterministic=False, rngs={"dropout": key})
    )
    a, b = run(jax.random.key(0)), run(jax.random.key(1))
    assert bool((a != b).any()) and bool(jnp.isfinite(a).all())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clean": "x"}, "say how long"),
        ({"clean": "x", "block": 0}, "at least 1"),
        ({"clean": "short", "block": 4}, "of z_t's shape"),
        ({"clean": "x", "block": 4, "t": jnp.zeros((2, 2))}, "for each sequence"),
    ],
)
def test_bad_input_is_named(options, message):
    model, params = build()
    x, z = texts()
    options = options | {"clean": {"x": x, "short": x[:, :5]}[options["clean"]]}
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, z, **options)


# --- attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask_n8_b4", "mask_n8_b1", "mask_n8_b8", "mask_n12_b3"])
def test_attention_sees_what_bd3_lets_it(name):
    """Which keys have a gradient, against their mask of [x_t; x_0] to [x_t; x_0]."""
    theirs = golden("bd3_mask.npz")[name]
    length, block = len(theirs) // 2, int(name.split("_b")[1])
    q, k, v = (jax.random.normal(key, (1, 2 * length, 1, 4)) for key in jax.random.split(jax.random.key(0), 3))

    @jax.jit
    def run(v):
        noised, clean = jnp.split(v, 2, axis=1)
        split = lambda x: x.reshape(-1, block, *x.shape[2:])
        cache = {"key": k[:, length:], "value": clean, "length": block * jnp.arange(length // block)}
        stretches = (split(x) for x in (q[:, :length], k[:, :length], noised))
        behind = attend_behind(*stretches, cache, sight=None, counts=None)
        before = attend(q[:, length:], k[:, length:], clean, sight=block, counts=None, implementation="blocked")
        return jnp.concatenate([behind.reshape(before.shape), before], axis=1).sum(axis=(0, 2, 3))

    reach = np.abs(jax.jacrev(run)(v)).sum(axis=(1, 3, 4)) > 0
    np.testing.assert_array_equal(reach, theirs)


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
@pytest.mark.parametrize("length, sight", [(10, 4), (300, 64), (256, 256)])
def test_attention_in_blocks_of_positions(length, sight, implementation):
    q, k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in jax.random.split(jax.random.key(1), 3))
    y = attend(q, k, v, sight=sight, counts=None, implementation=implementation)
    scores = np.einsum("bihk,bjhk->bhij", *(np.asarray(x, np.float64) for x in (q, k))) / 8**0.5
    of = np.arange(length) // sight
    scores = np.where(of[None] <= of[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(y, np.einsum("bhij,bjhk->bihk", weights, v), atol=3e-6)


def test_attention_behind_a_cache_takes_memory_in_tiles():
    """Four times the text in blocks of 16 takes four times the memory, not sixteen."""
    temporary = []
    for length in (1024, 4096):
        stretch = jax.ShapeDtypeStruct((length // 16, 16, 2, 16), jnp.float32)
        text = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

        def loss(q, k, v, key, value, length=length):
            cache = {"key": key, "value": value, "length": 16 * jnp.arange(length // 16)}
            return attend_behind(q, k, v, cache, sight=None, counts=None).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).lower(stretch, stretch, stretch, text, text).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 6 * temporary[0]


def test_logits_are_bd3s():
    """The Transformer with their weights; with their time conditioning off, as theirs sees the mean over all blocks."""
    arrays = golden("bd3_loss.npz")
    state = {name[2:]: value for name, value in arrays.items() if name.startswith("w/")}
    fields, params = FORMATS["mdlm"].model(state), FORMATS["mdlm"].to_params(state)
    model = Denoiser(**fields | {"time_conditioning": False})
    run = in_blocks(model, params, block=int(arrays["block_size"]), causal_context=False)
    x, z = (jnp.asarray(arrays[name], jnp.int32) for name in ("x0", "xt"))
    np.testing.assert_allclose(run(z, x), arrays["logits_nobos"], atol=1e-5)
    np.testing.assert_allclose(run(z.at[:, 0].set(x[:, 0]), x), arrays["logits_default"], atol=1e-5)
    sample = jnp.asarray(arrays["sample_x"], jnp.int32)
    np.testing.assert_allclose(run(sample, sample), arrays["sample_logits"], atol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from diffrwkv import sharding
from diffrwkv.denoiser import Denoiser
from tests import tiny

mesh = sharding.make_mesh(data=4, fsdp=2)
x = jax.random.randint(jax.random.key(0), (8, 16), 0, 18)
z = jnp.where(jax.random.uniform(jax.random.key(1), x.shape) < 0.5, 18, x)
for pattern in ("attention,birwkv7", "bimamba2"):
    mixers = {name: tiny.fast(name) for name in ("attention", "birwkv7", "bimamba2")}
    model = Denoiser(19, 32, 2, pattern=pattern, mixers=mixers)
    boxed = jax.eval_shape(model.init, jax.random.key(0), z)["params"]
    params = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape) * 0.1, nn.unbox(boxed))
    shardings = sharding.param_shardings(boxed, mesh)
    gradient = jax.value_and_grad(lambda p, z, x: jnp.square(model.apply({"params": p}, z, clean=x, block=4)).mean())
    one = jax.jit(gradient)(params, z, x)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    given = {"in_shardings": (shardings, rows, rows), "out_shardings": (whole, shardings)}
    many = jax.jit(sharding.over(mesh, gradient), **given)
    placed = jax.device_put(params, shardings), jax.device_put(z, rows), jax.device_put(x, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), one, many(*placed))
"""


@pytest.mark.slow
def test_blocks_are_the_same_on_eight_devices():
    on_eight_devices(SHARDED)
