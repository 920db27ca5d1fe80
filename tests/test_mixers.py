"""The RWKV-7 layers against upstream's own numbers (tests/golden), and what every mixer of the table must hold to."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.denoiser import Denoiser
from diffrwkv.mixers import CHANNEL_MIXERS, MIXERS, RWKV7, ChannelMix, Place, rwkv7
from diffrwkv.mixers.attention import attend
from diffrwkv.mixers.rwkv7 import channel_mix_initial, lora_rank, time_mix_initial
from tests import tiny
from tests.golden_arrays import golden, relative_error
from tests.random_parameters import random_parameters
from tests.thin import slow, thin

VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a")
LORAS = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
MATRICES = ("receptance", "key", "value", "output")


def time_mix_params(arrays, prefix, first):
    """Upstream's state dict as the parameters of RWKV7."""
    get = lambda name: jnp.asarray(arrays[prefix + name])
    direction = {name: get(name).reshape(-1) for name in (*VECTORS, "r_k") if not (first and name == "v0")}
    direction |= {name: get(name) for name in LORAS if not (first and name in ("v1", "v2"))}
    direction["ln_x_scale"] = get("ln_x.weight")
    direction["ln_x_bias"] = get("ln_x.bias")
    return {name: {"kernel": get(name + ".weight").T} for name in MATRICES} | {"forward": direction}


def channel_mix_params(arrays, prefix):
    get = lambda name: jnp.asarray(arrays[prefix + name])
    return {"x_k": get("x_k").reshape(-1)} | {name: {"kernel": get(name + ".weight").T} for name in ("key", "value")}


def check_gradients(gradients, arrays, first, tolerance=1e-5):
    """Against `grad.NAME`, and the row and column sums that stand for the matrices (torch layout for nn.Linear)."""
    direction = gradients["forward"]
    for name in (*VECTORS, "r_k"):
        if f"grad.{name}" in arrays and not (first and name == "v0"):
            assert relative_error(direction[name].reshape(-1), arrays[f"grad.{name}"].reshape(-1)) < tolerance, name
    for name in LORAS:
        if f"grad_rowsum.{name}" in arrays and name in direction:
            assert relative_error(direction[name].sum(1), arrays[f"grad_rowsum.{name}"]) < tolerance, name
            assert relative_error(direction[name].sum(0), arrays[f"grad_colsum.{name}"]) < tolerance, name
    for name in MATRICES:
        kernel = gradients[name]["kernel"]
        assert relative_error(kernel.sum(0), arrays[f"grad_rowsum.{name}.weight"]) < tolerance, name
        assert relative_error(kernel.sum(1), arrays[f"grad_colsum.{name}.weight"]) < tolerance, name


@pytest.mark.optimised
@pytest.mark.parametrize(
    "implementation, layer",
    [
        ("reference", 3),
        ("chunked", 0),
        ("chunked", 3),
        ("associative", 0),
        slow(("reference", 0)),
        slow(("associative", 3)),
    ],
)
def test_time_mix_is_upstreams(layer, implementation):
    arrays = golden(f"tmix_C128_T50_layer{layer}.npz")
    first = layer == 0
    params = time_mix_params(arrays, "param.", first)
    ranks = {"w": 32, "a": 32, "v": 32, "g": 64}
    mixer = RWKV7(Place(128, layer, 12, first), lora_ranks=ranks, implementation=implementation)
    x = jnp.asarray(arrays["x"])
    v_first = None if first else jnp.asarray(arrays["v_first_in"])

    def run(params, x, v_first):
        y, v_first, _ = mixer.apply({"params": params}, x, v_first)
        return jnp.sum(y * arrays["do"]), (y, v_first)

    argnums = (0, 1) if first else (0, 1, 2)
    (_, (y, v_out)), gradients = jax.jit(jax.value_and_grad(run, argnums, has_aux=True))(params, x, v_first)
    assert relative_error(y, arrays["o"]) < 1e-5
    assert relative_error(gradients[1], arrays["dx"]) < 1e-5
    if first:
        assert relative_error(v_out, arrays["v_first_out"]) < 1e-5
    else:
        assert relative_error(gradients[2], arrays["dv_first"]) < 1e-5
    check_gradients(gradients[0], arrays, first)


@pytest.mark.parametrize("name", ["rwkv7", "birwkv7"])
def test_a_form_that_is_named_reaches_each_piece_of_the_time_mix(name, monkeypatch):
    def module(time_mix):
        return MIXERS[name](Place(DIM, 0, 2, True), head_dim=16, implementation="reference", time_mix=time_mix)

    def watched(what):
        piece = getattr(rwkv7, what)

        def run(*arrays, implementation, **options):
            seen.append((what, implementation))
            return piece(*arrays, implementation=implementation, **options)

        return run

    seen = []
    for what in ("token_mixes", "operands", "finish"):
        monkeypatch.setattr(rwkv7, what, watched(what))
    key, x = jax.random.key(0), jnp.zeros((1, 5, DIM))
    jax.eval_shape(module("reference").init, key, x)
    assert set(seen) == {(what, "reference") for what in ("token_mixes", "operands", "finish")}
    with pytest.raises(ValueError, match="token_mixes has no implementation 'triton'"):
        jax.eval_shape(module("triton").init, key, x)


@pytest.mark.optimised
def test_channel_mix_is_upstreams():
    arrays = golden("cmix_C128_F512_T50.npz")
    mixer = ChannelMix(Place(128, 0, 12, True), shift="previous")

    def run(params, x):
        y, _ = mixer.apply({"params": params}, x)
        return jnp.sum(y * arrays["do"]), y

    (_, y), (params, dx) = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(
        channel_mix_params(arrays, "param."), jnp.asarray(arrays["x"])
    )
    assert relative_error(y, arrays["o"]) < 1e-5
    assert relative_error(dx, arrays["dx"]) < 1e-5
    assert relative_error(params["x_k"], arrays["grad.x_k"].reshape(-1)) < 1e-5
    for name in ("key", "value"):
        kernel = params[name]["kernel"]
        assert relative_error(kernel.sum(0), arrays[f"grad_rowsum.{name}.weight"]) < 1e-5
        assert relative_error(kernel.sum(1), arrays[f"grad_colsum.{name}.weight"]) < 1e-5


@pytest.mark.optimised
def test_the_causal_denoiser_is_upstreams_language_model():
    arrays = golden("rwkv7_lm_C64_L2_V19.npz")
    norm = lambda name: {"scale": jnp.asarray(arrays[name + ".weight"]), "bias": jnp.asarray(arrays[name + ".bias"])}
    params = {
        "embedding": jnp.asarray(arrays["param.emb.weight"]),
        "ln0": norm("param.blocks.0.ln0"),
        "ln_out": norm("param.ln_out"),
        "head": jnp.asarray(arrays["param.head.weight"]).T,
    }
    for layer in range(2):
        prefix = f"param.blocks.{layer}."
        params[f"block_{layer}"] = {
            "ln1": norm(prefix + "ln1"),
            "ln2": norm(prefix + "ln2"),
            "att": time_mix_params(arrays, prefix + "att.", layer == 0),
            "ffn": channel_mix_params(arrays, prefix + "ffn."),
        }
    model = Denoiser(
        vocab_size=19,
        dim=64,
        num_layers=2,
        pattern="rwkv7",
        mixers={"rwkv7": {"lora_ranks": {"w": 32, "a": 32, "v": 32, "g": 32}}},
        channel_mixers={"rwkv7": {"shift": "previous"}},
    )

    def loss(params):
        logits = model.apply({"params": params}, jnp.asarray(arrays["idx"]))
        log_probs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probs, jnp.asarray(arrays["target"])[..., None], -1)
        return -jnp.mean(picked), logits

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradients = gradient(params)
    assert relative_error(logits, arrays["logits"]) < 1e-5
    assert abs(float(value) - float(arrays["loss"])) < 1e-5

    # The group norm of layer 0 divides by almost nothing here: half a unit in the last place of the parameters moves
    # its gradients by up to 5e-4, so that no float32 program can be held to less; beside that, to 1e-5.
    keys = iter(jax.random.split(jax.random.key(0), 99))
    half_ulp = lambda x: x * (1 + 6e-8 * jax.random.rademacher(next(keys), x.shape, jnp.float32))
    _, moved = gradient(jax.tree.map(half_ulp, params))
    compared = 0
    for layer in range(2):
        ours, theirs = (g[f"block_{layer}"]["att"]["forward"] for g in (gradients, moved))
        for name in (*VECTORS, "r_k"):
            key = f"grad.blocks.{layer}.att.{name}"
            if key in arrays and name in ours:
                tolerance = 1e-5 + 2 * relative_error(theirs[name], ours[name])
                assert tolerance < 2e-3
                assert relative_error(ours[name], arrays[key].reshape(-1)) < tolerance, key
                compared += 1
    assert compared >= 20


@pytest.mark.parametrize("layer", [0, 3, 11])
def test_initial_values_are_upstreams(layer):
    arrays = golden("init_C128_L12.npz")
    if f"{layer}.att.x_r" not in arrays:
        pytest.skip(f"the golden file has no layer {layer}")
    initial = time_mix_initial(Place(128, layer, 12, False), 64)
    for name in (*VECTORS, "r_k"):
        np.testing.assert_allclose(initial[name], arrays[f"{layer}.att.{name}"], rtol=2e-7, atol=1.5e-6, err_msg=name)
    np.testing.assert_allclose(initial["ln_x"], arrays[f"{layer}.att.ln_x.weight_value"], rtol=1e-6)
    np.testing.assert_allclose(channel_mix_initial(Place(128, layer, 12, False)), arrays[f"{layer}.ffn.x_k"], atol=2e-7)
    model = RWKV7(Place(128, layer, 12, False))
    x = jnp.zeros((1, 3, 128))

    @jax.jit
    def drawn(key):  # of these alone, so that the other matrices are not compiled
        params = nn.unbox(model.init(key, x, x))["params"]
        return {"forward": {name: params["forward"][name] for name in LORAS}, "output": params["output"]}

    params = drawn(jax.random.key(layer))
    for name in LORAS:
        assert params["forward"][name].shape == tuple(arrays[f"{layer}.att.{name}.shape"])
        if name.endswith("1"):
            assert not params["forward"][name].any()
        else:
            singular = np.linalg.svd(np.asarray(params["forward"][name]), compute_uv=False)
            np.testing.assert_allclose(singular, arrays[f"{layer}.att.{name}.singular_values"], rtol=1e-5)
    assert not params["output"]["kernel"].any()


def test_lora_ranks_are_the_published_ones():
    assert [lora_rank(768, c) for c in (2.5, 2.5, 1.7, 5)] == [64, 64, 32, 128]


# --- every mixer of the table -------------------------------------------------------------------------------------

DIM, LENGTH = 32, 21
VARIANTS = [(name, tiny.fast(name)) for name in MIXERS] + [
    ("birwkv7", {"head_dim": 16, "merge": "add", "share": "all"}),
    ("birwkv7", {"head_dim": 8, "merge": "gate", "share": "none"}),
]


class Runner:
    """A mixer with random parameters, compiled."""

    def __init__(self, name, options):
        self.module = MIXERS[name](Place(DIM, 0, 2, True), **options)
        x = jnp.zeros((2, LENGTH, DIM))
        self.params = {"params": random_parameters(self.module, x)}
        self._run = jax.jit(lambda x, valid, state: self.module.apply(self.params, x, valid=valid, state=state))

    def __call__(self, x, valid=None, state=None):
        return self._run(x, valid, state)

    def gradient(self, x):
        """Of a sum of squares, by parameter."""
        return jax.jit(jax.grad(lambda p: jnp.square(self.module.apply(p, x)[0]).sum()))(self.params)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join(map(str, [v[0], *list(v[1].values())[1:]])))
def mixer(request):
    return prepared(*request.param)


def prepared(name, options):
    """What each of the CHECKS takes."""
    return name, Runner(name, options), jax.random.normal(jax.random.key(0), (2, LENGTH, DIM))


def test_a_mixer_keeps_shape_and_dtype(mixer):
    _, run, x = mixer
    y, _, _ = run(x)
    assert y.shape == x.shape and y.dtype == jnp.float32 and bool(jnp.isfinite(y).all())


def test_every_output_reaches_the_inputs_it_should(mixer):
    """Bidirectional: all of them. Causal: those up to it, and no later one."""
    name, run, x = mixer
    x = x[:1, :9]
    jacobian = jax.jit(jax.jacrev(lambda x: run(x)[0].sum(-1)[0]))(x)[:, 0]  # [out, in, D]
    reach = jnp.abs(jacobian).max(-1) > 0
    expected = jnp.tril(jnp.ones((9, 9), bool)) if MIXERS[name].causal else jnp.ones((9, 9), bool)
    assert bool((reach == expected).all())


def test_padding_changes_nothing(mixer):
    _, run, x = mixer
    real = 13
    valid = jnp.arange(LENGTH)[None] < jnp.array([real, LENGTH])[:, None]
    y, _, state = run(x, valid)
    alone, _, state_alone = run(x[:1, :real])
    np.testing.assert_allclose(y[0, :real], alone[0], atol=2e-6)
    for key, value in state_alone.items():
        padded = state[key][:1, :real] if key in ("key", "value") else state[key][:1]  # attention's cache has its room
        np.testing.assert_allclose(padded, value, atol=2e-6, err_msg=key)


def test_rows_of_a_batch_do_not_meet(mixer):
    _, run, x = mixer
    np.testing.assert_allclose(run(x)[0][1], run(x[1:])[0][0], atol=2e-6)


def test_gradients_are_finite_and_reach_every_parameter(mixer):
    name, run, x = mixer
    gradient = run.gradient(x)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0, (name, jax.tree_util.keystr(path))


def test_the_state_hands_over(mixer):
    """Stretches, each from the state of the one before and the first from an empty one, are the whole."""
    name, run, x = mixer
    if not MIXERS[name].causal:
        pytest.skip("what is behind a stretch is not seen by it; test_denoiser covers the handed state")
    y, _, state = run(x)
    carry, parts = run.module.empty_state(2, LENGTH), []
    for begin, end in ((0, 8), (8, 9), (9, 10), (10, LENGTH)):
        part, _, carry = run(x[:, begin:end], None, carry)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), y, atol=3e-6)
    for key, value in state.items():
        np.testing.assert_allclose(carry[key], value, atol=3e-6, err_msg=key)


def test_a_state_keeps_its_shapes(mixer):
    """What goes into a compiled loop must come out of it."""
    _, run, x = mixer
    empty = run.module.empty_state(2, LENGTH)
    _, _, state = run(x[:, :3], None, empty)
    shape = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shape(state) == shape(empty)


def test_a_state_before_a_padded_stretch(mixer):
    """Rows of different lengths go on from their own ends."""
    name, run, x = mixer
    if not MIXERS[name].causal:
        pytest.skip("as above")
    lengths = jnp.array([5, 9])
    _, _, carry = run(x[:, :9], jnp.arange(9)[None] < lengths[:, None], run.module.empty_state(2, LENGTH))
    rest = jnp.stack([x[i, n : n + 7] for i, n in enumerate((5, 9))])
    y, _, _ = run(rest, None, carry)
    whole, _, _ = run(x)
    for i, n in enumerate((5, 9)):
        np.testing.assert_allclose(y[i], whole[i, n : n + 7], atol=3e-6)


def test_flops_are_per_position(mixer):
    _, run, _ = mixer
    assert 0 < run.module.flops(128) <= run.module.flops(256)


CHECKS = (
    test_a_mixer_keeps_shape_and_dtype,
    test_every_output_reaches_the_inputs_it_should,
    test_padding_changes_nothing,
    test_rows_of_a_batch_do_not_meet,
    test_gradients_are_finite_and_reach_every_parameter,
    test_the_state_hands_over,
    test_a_state_keeps_its_shapes,
    test_a_state_before_a_padded_stretch,
    test_flops_are_per_position,
)


@pytest.mark.parametrize("cls", [*MIXERS.values(), *CHANNEL_MIXERS.values()])
def test_a_mixer_needs_its_width_alone(cls):
    y, *_ = jax.eval_shape(lambda x: cls(Place(64)).init_with_output(jax.random.key(0), x)[0], jnp.zeros((2, 9, 64)))
    assert y.shape == (2, 9, 64)


def test_no_place_is_without_width():
    for dim in (0, 1.5, "64", None):
        with pytest.raises(ValueError, match="dim must be"):
            Place(dim)


@pytest.mark.parametrize("name", ["rwkv7", "birwkv7"])
def test_the_values_of_the_first_layer_are_neither_missing_nor_left_out(name):
    x = jnp.zeros((2, 9, 64))
    first, later = (MIXERS[name](Place(64, layer, 2, layer == 0)) for layer in (0, 1))
    shared = jax.eval_shape(lambda: first.init_with_output(jax.random.key(0), x)[0][1])
    shared = jax.tree.map(lambda v: jnp.zeros(v.shape), shared)
    assert jax.eval_shape(lambda: later.init_with_output(jax.random.key(0), x, shared)[0][0]).shape == x.shape
    with pytest.raises(ValueError, match="The first layer makes v_first: build the later ones with Place"):
        first.init(jax.random.key(0), x, shared)
    with pytest.raises(ValueError, match="needs v_first: pass on what the first layer returned"):
        later.init(jax.random.key(0), x)


def test_attention_says_when_its_cache_is_full():
    module = MIXERS["attention"](Place(DIM, 0, 2, True), head_dim=16)
    x = jax.random.normal(jax.random.key(0), (2, 6, DIM))
    params = module.init(jax.random.key(1), x)
    run = jax.jit(lambda state: module.apply(params, x, state=state))
    y, _, state = run(module.empty_state(2, 10))
    assert bool(jnp.isfinite(y).all())
    assert bool(jnp.isnan(run(state)[0]).all())
    with pytest.raises(ValueError, match="room for 4"):
        run(module.empty_state(2, 4))


@pytest.mark.parametrize(
    "name,options,reach",
    [
        ("rwkv7", {"shift": "both"}, (3, 4, 5)),
        ("rwkv7", {"shift": "none"}, (4,)),
        ("rwkv7", {"shift": "previous"}, (3, 4)),
        *((name, {}, (4,)) for name in CHANNEL_MIXERS if name != "rwkv7"),
    ],
)
def test_channel_mix_sees_what_it_says(name, options, reach):
    module = CHANNEL_MIXERS[name](Place(DIM, 0, 2, True), **options)
    assert module.causal == (max(reach) == 4)
    x = jax.random.normal(jax.random.key(0), (1, 9, DIM))
    params = {"params": random_parameters(module, x)}
    gradient = jax.jit(jax.grad(lambda x: module.apply(params, x)[0][0, 4].sum()))(x)[0]
    assert tuple(np.flatnonzero(np.abs(gradient).max(-1))) == reach


@pytest.mark.optimised
@pytest.mark.parametrize(
    "length, padded, causal",
    [(n, padded, causal) for n in (1, 63, 300) for padded in (False, True) for causal in (False, True)]
    + thin([(128, True, True), (128, False, False), (128, True, False), (128, False, True)], 4),
)
def test_attention_in_blocks_is_attention(length, causal, padded):
    """Outputs and gradients, against the plain formula in float64 (outputs) and XLA's form."""
    q, k, v, w = (jax.random.normal(key, (2, length, 2, 8)) for key in jax.random.split(jax.random.key(length), 4))
    counts = jnp.array([length, max(1, length // 3)]) if padded else None

    def run(implementation):
        def loss(q, k, v):
            y = attend(q, k, v, sight=1 if causal else None, counts=counts, implementation=implementation)
            return jnp.sum(y * w), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return [y, *gradients]

    blocked = run("blocked")
    for actual, expected in zip(blocked, run("xla"), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    scores = np.einsum("bihk,bjhk->bhij", *(np.asarray(x, np.float64) for x in (q, k))) / 8**0.5
    seen = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    real = np.arange(length) < (np.asarray(counts)[:, None] if padded else length)
    scores = np.where(seen & np.broadcast_to(real, (2, length))[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(blocked[0], np.einsum("bhij,bjhk->bihk", weights, v), atol=3e-6)


@pytest.mark.optimised
def test_attention_in_blocks_needs_no_square_of_memory():
    temporary = []
    for length in (1024, 4096):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v: attend(q, k, v, sight=None, counts=None, implementation=None).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 5 * temporary[0] < 2 * 4 * 1024**2 * 5


@pytest.mark.parametrize("implementation", ["splash", "cudnn", "flash"])
def test_attention_names_what_cannot_run(implementation):
    x = jnp.zeros((1, 5, DIM))
    module = MIXERS["attention"](Place(DIM, 0, 2, True), head_dim=16, implementation=implementation)
    message = {"splash": "128 divides", "cudnn": "bfloat16 or float16", "flash": "no implementation 'flash'"}
    with pytest.raises(ValueError, match=message[implementation]):
        module.init(jax.random.key(0), x)


def test_attention_takes_the_flash_kernel_of_a_tpu():
    """Lowered for a TPU there is a Mosaic kernel and no product of L x L; elsewhere there is none."""
    module = MIXERS["attention"](Place(128, 0, 2, True))
    x = jnp.zeros((1, 256, 128))
    params = module.init(jax.random.key(0), x)
    run = jax.jit(lambda x: module.apply(params, x)[0])
    for platform, device in (("tpu", "TPU v5 lite"), ("cuda", "NVIDIA H200"), ("cpu", None)):
        with on_device(platform, device):
            text = run.trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == (platform == "tpu")
        assert ("256x256" in text) == (platform == "cuda"), platform  # float32 has no flash attention there


@contextlib.contextmanager
def on_device(platform, kind):
    """Lowers for a device that is not here."""
    if kind is None:
        yield
        return
    name = {"cuda": "gpu"}.get(platform, platform)
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=name)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.mark.parametrize(
    "options,message",
    [
        ({"merge": "product"}, "merge must be"),
        ({"share": "some"}, "share must be"),
        ({"head_dim": 24}, "no multiple of head_dim"),
        ({"lora_ranks": {"z": 4}}, "lora_ranks names"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mixer = MIXERS["birwkv7"](Place(DIM, 0, 2, True), **({"head_dim": 16} | options))
        mixer.init(jax.random.key(0), jnp.zeros((1, 3, DIM)))


def test_activations_of_the_low_rank_maps():
    """In bfloat16 a gate of 0.9975 is 0.9961 or 1, whose slopes are half as large again, or nothing."""

    def plain(x):
        return jnp.concatenate([jnp.tanh(x[..., :3]), x[..., 3:7], jax.nn.sigmoid(x[..., 7:])], -1)

    x, d = (jax.random.normal(key, (2, 5, 11)) for key in jax.random.split(jax.random.key(0)))
    y, pull = jax.vjp(lambda x: rwkv7._activated(x, 3, 4), x)
    expected, expected_pull = jax.vjp(plain, x)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(pull(d)[0], expected_pull(d)[0], atol=1e-6)
    high = jnp.array([[[3.0, 6.0]]], jnp.bfloat16)
    (slope,) = jax.vjp(lambda x: rwkv7._activated(x, 1, 1), high)[1](jnp.ones_like(high))
    np.testing.assert_allclose(slope[0, 0].astype(jnp.float32), [1 - np.tanh(3) ** 2, 0.0024665], rtol=1e-2)
