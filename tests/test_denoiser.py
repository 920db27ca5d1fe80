"""The denoiser as a whole: shapes, both scan forms, remat, time, padding, states, parameter groups, cost."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.denoiser import (
    BLOCKS,
    Denoiser,
    cast_matrices,
    count_parameters,
    learning_rate_scale,
    matrix_mask,
    parse_pattern,
    weight_decay_mask,
)
from diffrwkv.mixers import MIXERS
from tests import tiny
from tests.eight_devices import on_eight_devices
from tests.golden_arrays import relative_error
from tests.random_parameters import random_parameters
from tests.thin import slow, thin

VOCABULARY = 19
SMALL = {"dim": 32, "num_layers": 2, "mixers": tiny.MIXERS}


def build(**fields):
    model = Denoiser(vocab_size=VOCABULARY, **(SMALL | fields))
    return model, random_parameters(model, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))


def initial(model):
    """Its initial parameters; as one compiled function, as op by op they take seconds."""
    return nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))["params"])


PASSES = {}  # by all fields of the model, of which some are dictionaries


def run(model, params, *args, **kwargs):
    """model.apply, compiled once for a model and shapes."""
    apply = PASSES.setdefault(repr(model), jax.jit(lambda p, a, k: model.apply({"params": p}, *a, **k)))
    return apply(params, args, kwargs)


def tokens(batch, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCABULARY)


@pytest.fixture(scope="module")
def small():
    model, params = build()
    return model, params, jax.jit(lambda z, valid=None: model.apply({"params": params}, z, valid=valid))


@pytest.mark.parametrize("blocks", thin([False, True]))
@pytest.mark.parametrize("name", thin(MIXERS))
def test_one_hot_rows_are_read_as_ids(name, blocks):
    """Logits, and the gradient of the embedding too; whole or in blocks, whose clean text is ids."""
    model, params = build(pattern=name, num_layers=1)
    z, options = tokens(2, 7), {"clean": tokens(2, 7, 1), "block": 3} if blocks else {}

    @jax.jit
    def logits_and_gradient(z):
        apply = lambda E: model.apply({"params": params | {"embedding": E}}, z, **options)
        logits, pullback = jax.vjp(apply, params["embedding"])
        return logits, pullback(jnp.cos(jnp.arange(logits.size)).reshape(logits.shape))[0]

    (hard, by_ids), (soft, by_rows) = logits_and_gradient(z), logits_and_gradient(jax.nn.one_hot(z, VOCABULARY))
    assert relative_error(soft, hard) < 2e-6 and relative_error(by_rows, by_ids) < 1e-5


def test_soft_tokens_are_sums_of_embeddings():
    """Any numbers, of any float type: two networks whose embeddings differ by a matrix read rows that differ by it."""
    model, params = build()
    rows = jax.random.normal(jax.random.key(0), (2, 5, VOCABULARY))
    mixed = params | {"embedding": jnp.einsum("blv,vd->bld", rows, params["embedding"]).reshape(10, -1)}
    expected = run(model.clone(vocab_size=10), mixed | {"head": params["head"][:, :10]}, jnp.arange(10).reshape(2, 5))
    np.testing.assert_allclose(run(model, params, rows)[..., :10], expected, atol=1e-5)
    half = run(model, params, rows.astype(jnp.bfloat16))
    np.testing.assert_allclose(half, run(model, params, rows.astype(jnp.bfloat16).astype(jnp.float32)), atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 63])
def test_logits_for_any_length(small, length):
    logits = small[2](tokens(2, length))
    assert logits.shape == (2, length, VOCABULARY) and logits.dtype == jnp.float32
    assert bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("name", thin(MIXERS))
def test_all_mask_is_finite_with_finite_gradients(name):
    model, params = build(pattern=name, num_layers=1)
    z = jnp.full((2, 63), VOCABULARY - 1)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, z)).mean()))(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_gradients_are_finite_at_initialisation():
    """Zero keys come from zero-initialised maps: the normalisation must not turn them into NaN."""
    model = Denoiser(vocab_size=VOCABULARY, **SMALL)
    params = jax.tree.map(jnp.zeros_like, build()[1])
    gradient = jax.jit(jax.grad(lambda p: model.apply({"params": p}, tokens(2, 9)).sum()))(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_every_logit_depends_on_every_position(small):
    model, params, _ = small

    def from_embeddings(embedding):  # each position its own row, so that gradients tell positions apart
        return model.apply({"params": params | {"embedding": embedding}}, jnp.arange(7)[None])[0].sum(-1)

    jacobian = jax.jit(jax.jacrev(from_embeddings))(params["embedding"])[:, :7]
    assert bool((jnp.abs(jacobian).max(-1) > 0).all())


def stacked(params, num_layers, period):
    """Plain parameters as those of scan_layers: whole periods after the first on a new first axis."""
    repeats = num_layers // period - 1
    params = dict(params)
    layers = [[params.pop(f"block_{period * (r + 1) + i}") for i in range(period)] for r in range(repeats)]
    blocks = {f"block_{i}": jax.tree.map(lambda *x: jnp.stack(x), *(row[i] for row in layers)) for i in range(period)}
    return params | {"blocks": blocks}


@pytest.mark.parametrize(
    "pattern,num_layers,period",
    thin([*((name, 3, 1) for name in MIXERS), ("attention,rwkv7*2", 7, 3), ("mamba2, rwkv7", 4, 2)]),
)
def test_scan_over_layers_is_the_same_network(pattern, num_layers, period):
    """Logits and states, for each mixer and for patterns, of which the first leaves a layer over."""
    fields = {"pattern": pattern, "num_layers": num_layers}
    plain, params = build(**fields)
    scanned = Denoiser(vocab_size=VOCABULARY, scan_layers=True, **(SMALL | fields))
    z = tokens(2, 11)
    restacked = stacked(params, num_layers, period)
    expected = run(plain, params, z)
    go_on = jax.jit(lambda p, z, state: scanned.apply({"params": p}, z, state=state, method="with_state"))
    logits, state = go_on(restacked, z, scanned.empty_state(2, 11))
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, scanned.empty_state(2, 11))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(random_parameters(scanned, z)) == shapes(restacked)


def test_scan_over_layers_initialises_each_layer_as_itself():
    deep = SMALL | {"num_layers": 3}
    names = ("x_r", "w0", "a0", "ln_x_scale")

    plain = Denoiser(vocab_size=VOCABULARY, **deep)

    def first(model, *layers):
        """Of these alone, so that no matrix's values are compiled."""
        z = jnp.zeros((1, 4), jnp.int32)

        def of(key):
            params = nn.unbox(model.init(key, z)["params"])
            params = params.get("blocks", params)
            return [{name: params[layer]["att"]["forward"][name] for name in names} for layer in layers]

        return jax.jit(of)(jax.random.key(0))

    [stacked] = first(plain.clone(scan_layers=True), "block_0")
    for i, expected in enumerate(first(plain, "block_1", "block_2")):
        for name in names:
            np.testing.assert_allclose(stacked[name][i], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", thin(MIXERS))
def test_remat_changes_no_gradient(name):
    fields = SMALL | {"pattern": name, "num_layers": 1}
    model, params = build(**fields)
    remat = Denoiser(vocab_size=VOCABULARY, remat=True, **fields)
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


CAUSAL = [name for name in MIXERS if MIXERS[name].causal]


@pytest.mark.parametrize("scan_layers", thin([False, True]))
@pytest.mark.parametrize("pattern", [*CAUSAL, ",".join(CAUSAL)])
def test_token_by_token_gives_the_logits_of_the_whole(pattern, scan_layers):
    """At every position, in one compiled loop, from a cache with room to spare."""
    layers = pattern.count(",") + 1
    model, params = build(
        pattern=pattern,
        num_layers=2 * layers,
        scan_layers=scan_layers,
        channel_mixers={"rwkv7": {"shift": "previous"}},
    )
    assert model.causal
    z = tokens(2, 17)

    @jax.jit
    def decode(z):
        def step(state, token):
            logits, state = model.apply({"params": params}, token[:, None], state=state, method="with_state")
            return state, logits[:, 0]

        return jax.lax.scan(step, model.empty_state(2, 20), z.T)[1].swapaxes(0, 1)

    np.testing.assert_allclose(decode(z), run(model, params, z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields,causal",
    [
        ({"pattern": "rwkv7"}, False),  # the channel mix looks ahead
        ({"pattern": "rwkv7", "channel_mixers": {"rwkv7": {"shift": "previous"}}}, True),
        ({"pattern": "rwkv7", "channel_mixer": "mlp"}, True),
        ({"pattern": "causal_attention,attention", "channel_mixer": "mlp"}, False),
    ],
)
def test_a_model_knows_whether_it_is_causal(fields, causal):
    model, params = build(**fields)
    assert model.causal == causal
    z, other = tokens(1, 9), tokens(1, 9).at[0, 5].set(VOCABULARY - 1)
    earlier = jnp.abs(run(model, params, z) - run(model, params, other))[:, :5].max()
    assert (float(earlier) == 0) == causal


@pytest.mark.parametrize(
    "pattern,num_layers,layers,period",
    [
        ("birwkv7", 3, "birwkv7 birwkv7 birwkv7", "birwkv7"),
        ("attention,birwkv7*2", 4, "attention birwkv7 birwkv7 attention", "attention birwkv7 birwkv7"),
        (" attention * 2 , rwkv7 ", 3, "attention attention rwkv7", "attention attention rwkv7"),
    ],
)
def test_patterns(pattern, num_layers, layers, period):
    assert parse_pattern(pattern, num_layers) == (tuple(layers.split()), tuple(period.split()))


@pytest.mark.parametrize(
    "pattern,message",
    [
        ("", "is none: write mixers"),
        ("attention,,rwkv7", "is none"),
        ("attention*0", "is none"),
        ("attention*-1", "is none"),
        ("attention x 2", "is none"),
        ("attention,lstm", "unknown mixer 'lstm'"),
        ("attention*3,rwkv7", "names rwkv7, but 3 layers end before it"),
    ],
)
def test_bad_patterns_are_named(pattern, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern, 3)


FIRST_STEPS = [
    (block, *mixers) for mixers in [("attention", "mlp"), ("birwkv7", "rwkv7"), ("bimamba2", "mlp")] for block in BLOCKS
]


# MDLM's block with each mixer, as its gates are zero at first; the other blocks with the one they were made for
@pytest.mark.parametrize(
    "block,pattern,channel_mixer",
    [
        case if case[:2] in [("transformer", "attention"), ("rwkv7", "birwkv7")] or case[0] == "dit" else slow(case)
        for case in FIRST_STEPS
    ],
)
def test_no_block_is_dead_at_initialisation(block, pattern, channel_mixer):
    """A zero gate in front of a zero output would never learn: after two steps every matrix has a gradient."""
    model = Denoiser(vocab_size=VOCABULARY, **(SMALL | {"block": block, "pattern": pattern, "num_layers": 1}))
    params = initial(model)
    z = tokens(2, 9)

    @jax.jit
    def gradient(params):
        def loss(p):
            return -jnp.take_along_axis(jax.nn.log_softmax(model.apply({"params": p}, z)), z[..., None], -1).mean()

        return jax.grad(loss)(params)

    for _ in range(3):
        grads = gradient(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g) * (g != 0), params, grads)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient(params)):
        if path[-1].key in ("kernel", "head", "embedding"):
            assert float(jnp.abs(g).max()) > 0, jax.tree_util.keystr(path)


def test_mdlms_transformer_begins_as_uniform():
    fields = SMALL | {"block": "dit", "pattern": "attention", "channel_mixer": "mlp"}
    model = Denoiser(vocab_size=VOCABULARY, **fields)
    params = initial(model)
    np.testing.assert_array_equal(run(model, params, tokens(2, 9)), 0.0)
    bound = float(jnp.abs(params["embedding"]).max()) * SMALL["dim"] ** 0.5
    assert 0.9 < bound <= 1
    assert set(params["block_0"]["ln1"]) == {"scale"}


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from diffrwkv import sharding
from diffrwkv.denoiser import Denoiser
from diffrwkv.mixers import MIXERS
from tests import tiny

mesh = sharding.make_mesh(data=4, fsdp=2)
z = jax.random.randint(jax.random.key(0), (8, 16), 0, 19)
for name in MIXERS:
    model = Denoiser(19, 32, 1, pattern=name, mixers={name: tiny.fast(name)}, channel_mixer="mlp")
    boxed = jax.eval_shape(model.init, jax.random.key(0), z)["params"]
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, nn.unbox(boxed))
    shardings = sharding.param_shardings(boxed, mesh)
    assert any("fsdp" in str(s.spec) for s in jax.tree.leaves(shardings)), name
    gradient = jax.value_and_grad(lambda p, z: jnp.square(model.apply({"params": p}, z)).mean())
    one = jax.jit(gradient)(params, z)
    rows = sharding.batch_sharding(mesh)
    many = jax.jit(gradient, in_shardings=(shardings, rows), out_shardings=(sharding.replicated(mesh), shardings))
    placed = jax.device_put(params, shardings), jax.device_put(z, rows)
    assert len(placed[1].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), one, many(*placed))
    print(name)
"""


@pytest.mark.slow
def test_every_mixer_is_the_same_on_eight_devices():
    """Loss and gradients, the batch over all devices and the matrices over the fsdp axis."""
    assert on_eight_devices(SHARDED).split() == list(MIXERS)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_handed_state_reaches_the_bidirectional_model(scan_layers):
    """The second stretch sees the first through the state alone, and exactly once: gradients flow through it."""
    model, params = build(scan_layers=scan_layers)
    apply = jax.jit(lambda z, state=None: model.apply({"params": params}, z, state=state, method="with_state"))
    _, state = apply(tokens(2, 11))
    alone, _ = apply(tokens(2, 11, 1))
    after, _ = apply(tokens(2, 11, 1), state)
    assert float(jnp.abs(after - alone).max()) > 1e-4
    zero = jax.tree.map(jnp.zeros_like, state)
    np.testing.assert_allclose(apply(tokens(2, 11, 1), zero)[0], alone, atol=1e-5)


@pytest.mark.parametrize("name", thin(MIXERS))
def test_bfloat16_stays_close_and_keeps_float32_parameters(name):
    fields = SMALL | {"pattern": name, "num_layers": 1}
    model, params = build(**fields)
    half = Denoiser(vocab_size=VOCABULARY, dtype="bfloat16", **fields)
    z = tokens(2, 33)
    exact, rough = run(model, params, z), run(half, params, z)
    assert rough.dtype == jnp.float32
    assert float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)) < 3e-2
    assert {x.dtype for x in jax.tree.leaves(random_parameters(half, z))} == {jnp.dtype("float32")}


def test_tied_embeddings_have_no_head():
    _, params = build(tie_embeddings=True)
    assert "head" not in params


@pytest.mark.parametrize("boxed", [False, True])
def test_parameter_groups(boxed):
    model = Denoiser(vocab_size=VOCABULARY, **SMALL)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = params if boxed else nn.unbox(params)
    decayed = nn.unbox(weight_decay_mask(params))
    assert decayed["head"] and decayed["block_0"]["att"]["receptance"]["kernel"]
    assert decayed["embedding"] and not decayed["block_1"]["att"]["forward"]["w1"]
    assert not decayed["block_1"]["att"]["forward"]["x_r"] and not decayed["ln_out"]["scale"]
    scale = nn.unbox(learning_rate_scale(params))
    assert scale["block_0"]["att"]["forward"]["w0"] == 2 and scale["block_0"]["att"]["forward"]["a0"] == 1


def test_matrices_are_not_stacks_of_vectors():
    fields = SMALL | {"num_layers": 3}
    plain = matrix_mask(build(**fields)[1])
    scanned = matrix_mask(build(scan_layers=True, **fields)[1])
    assert scanned["blocks"]["block_0"] == plain["block_2"]
    assert plain["embedding"] and not plain["ln_out"]["scale"]


def test_cost_grows_with_the_length_and_no_faster():
    """XLA's own count of a pass: 8 times the length moves 8 times the bytes, to 5 % (attention tends to 64 times)."""
    model, params = build(mixers={"birwkv7": tiny.fast("birwkv7")}, num_layers=1)
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
        ({}, jnp.zeros((1, 3)), r"must be integers \[B, L\], or floats \[B, L, 19\]"),
        ({}, jnp.zeros((1, 3, 18)), r"got float32 \(1, 3, 18\)"),
        ({}, jnp.zeros((1, 3, 19), jnp.int32), "must be integers"),
        ({}, jnp.zeros((1, 0, 19)), "L ≥ 1"),
        ({"num_layers": 0}, jnp.zeros((1, 3), jnp.int32), "at least 1"),
        ({"dropout": 1.0}, jnp.zeros((1, 3), jnp.int32), "dropout must be in"),
    ],
)
def test_bad_input_is_named(fields, z, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(vocab_size=VOCABULARY, **(SMALL | fields)).init(jax.random.key(0), z)


@pytest.mark.parametrize("name", MIXERS)
def test_matrices_cast_before_a_pass_give_the_same_pass(name):
    block, channel_mixer = ("dit", "mlp") if "attention" in name else ("rwkv7", "rwkv7")
    fields = {"pattern": name, "block": block, "channel_mixer": channel_mixer, "num_layers": 1}
    model, params = build(dtype="bfloat16", **fields)
    cast = cast_matrices(model, params)
    changed = {a.dtype for a, b in zip(*map(jax.tree.leaves, (cast, params)), strict=True) if a.dtype != b.dtype}
    assert changed == {jnp.dtype("bfloat16")}
    assert cast["head"].dtype == jnp.bfloat16 and cast["embedding"].dtype == jnp.float32
    z = tokens(2, 9)
    np.testing.assert_array_equal(run(model, cast, z), run(model, params, z))
