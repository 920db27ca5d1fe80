"""Mamba-2 against upstream's own numbers (tests/golden), its initial values, its state, and its two directions."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.mixers import Place
from diffrwkv.mixers.mamba2 import BiMamba2, Mamba2, depthwise_convolution, group_rms_norm
from tests.golden_arrays import golden, relative_error
from tests.pallas_kernels.operators import FORMS

VECTORS = {"dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "conv_bias": "conv1d.bias", "norm_scale": "norm.weight"}
MATRICES = ("in_proj", "out_proj")
DIM = 16
OPTIONS = {"state_size": 8, "head_dim": 8, "num_groups": 2}


def upstream_params(arrays):
    """Upstream's state dict as the parameters of Mamba2."""
    get = lambda name: jnp.asarray(arrays["param." + name])
    params = {name: get(theirs) for name, theirs in VECTORS.items()}
    params["conv_kernel"] = get("conv1d.weight")[:, 0].T
    return params | {name: {"kernel": get(name + ".weight").T} for name in MATRICES}


@pytest.mark.optimised
@pytest.mark.parametrize("implementation", FORMS)
def test_mamba2_is_upstreams(implementation):
    arrays = golden("mamba2_d64.npz")
    mixer = Mamba2(
        Place(64, 0, 1, True),
        state_size=int(arrays["d_state"]),
        head_dim=int(arrays["headdim"]),
        expand=int(arrays["expand"]),
        num_groups=int(arrays["ngroups"]),
        conv_width=int(arrays["d_conv"]),
        implementation=implementation,
    )

    def run(params, x):
        y, *_ = mixer.apply({"params": params}, x)
        return jnp.sum(y * arrays["do"]), y

    gradient = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (_, y), (grads, d_x) = gradient(upstream_params(arrays), jnp.asarray(arrays["u"]))
    errors = {"out": relative_error(y, arrays["out"]), "du": relative_error(d_x, arrays["du"])}
    for name, theirs in VECTORS.items():
        errors[name] = relative_error(grads[name], arrays["grad." + theirs])
    errors["conv"] = relative_error(grads["conv_kernel"].T, arrays["grad.conv1d.weight"][:, 0])
    for name in MATRICES:
        kernel = grads[name]["kernel"]
        errors[name + "_rows"] = relative_error(kernel.sum(0), arrays[f"grad_rowsum.{name}.weight"])
        errors[name + "_columns"] = relative_error(kernel.sum(1), arrays[f"grad_colsum.{name}.weight"])
    assert max(errors.values()) <= 1e-5, errors


@functools.cache
def initialised(mixer=Mamba2):
    """The module, its parameters with every constant moved, and an input [2, 11, D]."""
    module = mixer(Place(DIM, 0, 2, True), **OPTIONS)
    rng = np.random.default_rng(0)
    noise = lambda *shape: rng.standard_normal(shape, np.float32)
    x = noise(2, 11, DIM)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x))
    return module, jax.tree.map(lambda p: np.asarray(p) + np.float32(0.1) * noise(*p.shape), params), x


@functools.cache
def applied(mixer=Mamba2, reverse=False):
    """`(x, valid, state) -> (y, state)`, compiled once per shape."""
    module, params, _ = initialised(mixer)
    options = {"reverse": True} if reverse else {}

    @jax.jit
    def run(x, valid=None, state=None):
        y, shared, state = module.apply(params, x, "shared", valid=valid, state=state, **options)
        assert shared == "shared"
        return y, state

    return run


def assert_same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), actual, expected)


def test_initial_values():
    """torch's for the linear maps and the convolution, upstream's for the rest."""
    dim, inner, heads = 128, 4096, 512
    module = Mamba2(Place(dim, 0, 1, True), state_size=16, head_dim=8, expand=32)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, dim))))["params"]
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        "in_proj": {"kernel": (dim, 2 * inner + 32 + heads)},
        "conv_kernel": (4, inner + 32),
        "conv_bias": (inner + 32,),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "D": (heads,),
        "norm_scale": (inner,),
        "out_proj": {"kernel": (inner, dim)},
    }
    uniform = {"in_proj": dim**-0.5, "out_proj": inner**-0.5, "conv_kernel": 0.5, "conv_bias": 0.5}
    for name, bound in uniform.items():
        (values,) = jax.tree.leaves(params[name])
        assert 0.99 * bound < jnp.abs(values).max() <= bound, name
        assert abs(float(values.std()) / bound * 3**0.5 - 1) < 0.03, name
    rates = jnp.exp(params["A_log"])
    assert 1 <= rates.min() < 1.3 and 15.7 < rates.max() < 16.001
    assert abs(float(rates.mean()) - 8.5) < 0.6
    steps = jax.nn.softplus(params["dt_bias"])
    assert 0.99e-3 < steps.min() < 1.1e-3 and 0.09 < steps.max() < 0.1001
    assert abs(float(jnp.log(steps).mean()) - np.log(1e-2)) < 0.2
    for name in ("D", "norm_scale"):
        assert (params[name] == 1).all()


def test_convolution_is_numpys():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(s, np.float32) for s in ((2, 9, 3), (4, 3), (3,)))
    run = lambda reverse: jax.jit(functools.partial(depthwise_convolution, reverse=reverse))(x, kernel, bias)
    forward, backward = np.asarray(run(False)), np.asarray(run(True))
    for row in range(2):
        for channel in range(3):
            line, taps = x[row, :, channel], kernel[::-1, channel]
            causal = np.convolve(line, taps)[:9] + bias[channel]
            anti = np.convolve(line[::-1], taps)[:9][::-1] + bias[channel]
            np.testing.assert_allclose(forward[row, :, channel], causal, atol=2e-6)
            np.testing.assert_allclose(backward[row, :, channel], anti, atol=2e-6)


def test_norm_is_by_groups():
    x = np.random.default_rng(0).standard_normal((3, 8)) * np.repeat([1, 100], 4)
    y = np.asarray(group_rms_norm(jnp.asarray(x, "float32"), 2))
    np.testing.assert_allclose(np.mean(y.reshape(3, 2, 4) ** 2, -1), 1, atol=1e-3)


@pytest.mark.parametrize("stretches", [(1,) * 11, (1, 2, 5, 2, 1), (5, 5, 1), (2, 2, 2, 5)], ids=str)
def test_stretches_are_the_whole(stretches):
    """Also where shorter than what the convolution sees; from the empty state, which an unbound module gives."""
    *_, x = initialised()
    state = Mamba2(Place(DIM, 0, 2, True), **OPTIONS).empty_state(2, 11)
    assert jax.tree.map(jnp.shape, state) == {"conv": (2, 3, 64), "ssm": (2, 4, 8, 8)}
    ends = np.cumsum(stretches)
    outs = []
    for end, length in zip(ends, stretches, strict=True):
        y, state = applied()(x[:, end - length : end], None, state)
        outs.append(y)
    assert_same((np.concatenate(outs, 1), state), applied()(x))


@pytest.mark.parametrize("mixer, counts", [(Mamba2, (0, 1, 2, 5)), (BiMamba2, (0, 5))])
def test_padding_changes_nothing(mixer, counts):
    """With so many positions real, behind a stretch: the outputs there, and the state after them."""
    module, _, x = initialised(mixer)
    run = applied(mixer)
    _, before = run(x[:, :5], None, module.empty_state(2, 0))
    row = lambda tree: jax.tree.map(lambda z: np.asarray(z)[0], tree)
    for count in counts:
        valid = np.arange(11) < np.array([[count], [11]])
        y, state = run(np.where(valid[..., None], x, np.float32(np.nan)), valid, before)
        alone = run(x[:, :count], None, before) if count else (np.asarray(y)[:, :0], before)
        assert_same(row((np.asarray(y)[:, :count], state)), row(alone))


def test_reverse_is_flip_run_flip():
    *_, x = initialised()
    y, _ = applied(reverse=True)(x)
    flipped, _ = applied()(x[:, ::-1])
    assert_same(y, flipped[:, ::-1])


def test_the_directions_are_added():
    """BiMamba2 is a causal layer and a reversed one of other weights; its state is the causal one's."""
    _, params, x = initialised(BiMamba2)
    y, state = applied(BiMamba2)(x)
    layer = Mamba2(Place(DIM, 0, 2, True), **OPTIONS)

    @jax.jit
    def by_hand(params, x):
        forward, _, state = layer.apply({"params": params["forward"]}, x)
        backward, *_ = layer.apply({"params": params["backward"]}, x[:, ::-1])
        return forward + backward[:, ::-1], state

    assert_same((y, state), by_hand(params["params"], x))
    empty = BiMamba2(Place(DIM, 0, 2, True), **OPTIONS).empty_state(2, 0)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)


def test_bfloat16():
    """The parameters, the operator's state and the norm stay float32."""
    module, params, x = initialised()
    low = module.clone(place=dataclasses.replace(module.place, dtype=jnp.bfloat16))
    y, _, state = jax.jit(low.apply)(params, x)
    assert y.dtype == state["conv"].dtype == jnp.bfloat16 and state["ssm"].dtype == jnp.float32
    dtype = lambda z: z.dtype
    assert jax.tree.map(dtype, low.empty_state(2, 0)) == jax.tree.map(dtype, state)
    assert {p.dtype for p in jax.tree.leaves(jax.eval_shape(low.init, jax.random.key(0), x))} == {jnp.dtype("float32")}
    assert relative_error(y, applied()(x)[0]) < 2e-2


@pytest.mark.parametrize("mixer", [Mamba2, BiMamba2])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_dim": 24}, "no multiple of head_dim 24"),
        ({"num_groups": 3}, "num_groups 3 does not divide the 4 heads"),
        ({"state_size": 0}, "state_size must be at least 1"),
        ({"conv_width": 0}, "conv_width must be at least 1"),
        ({"expand": 0}, "expand must be at least 1"),
        ({"implementation": "triton"}, "no implementation 'triton'"),
    ],
)
def test_bad_options_are_named(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        module = mixer(Place(DIM, 0, 1, True), **(OPTIONS | options))
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3, DIM)))


def test_the_reverse_direction_takes_no_state():
    module, params, x = initialised()
    with pytest.raises(ValueError, match="takes no state"):
        module.apply(params, x, state=module.empty_state(2, 0), reverse=True)
