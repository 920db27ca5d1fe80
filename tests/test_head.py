"""The head apart from the rest: a training step and a sample whose output is made in pieces are the same ones."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffrwkv import sharding
from diffrwkv.denoiser import Denoiser, read_head
from diffrwkv.diffusion import deferred, objectives, samplers
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.networks import face, network_fn
from diffrwkv.train_step import init_state, make_train_step
from tests.eight_devices import on_eight_devices
from tests.random_parameters import random_parameters

SIZE = 37
OPTIONS = {
    "dim": 8,
    "num_layers": 1,
    "pattern": "attention",
    "mixers": {"attention": {"head_dim": 8}},
    "channel_mixer": "mlp",
    "block": "dit",
    "condition_dim": 4,
}
MODELS = {
    "bias": OPTIONS,
    "tied": OPTIONS | {"tie_embeddings": True},
    "no_bias": OPTIONS | {"block": "rwkv7", "dropout": 0.2},
    "bfloat16": OPTIONS | {"dtype": "bfloat16"},
}


def objective_of(layout="whole"):
    sections = {"layouts": {"blocks": {"sizes": (4,)}}}
    return objectives.from_config(Vocabulary(SIZE, SIZE - 1), layout=layout, sections=sections)


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_what_the_head_reads(name):
    model = Denoiser(vocab_size=SIZE, **MODELS[name])
    z = jax.random.randint(jax.random.key(0), (2, 11), 0, SIZE)
    params = random_parameters(model, z)
    for options in ({}, {"clean": z, "block": 4}):  # the last block is shorter

        @jax.jit
        def three_ways(params, options=options):
            whole = model.apply({"params": params}, z, **options)
            features, head = model.apply({"params": params}, z, **options, method="before_head")
            return features, head, whole, read_head(head, features), network_fn(model, params)(z, **options)

        features, head, whole, read, networks = three_ways(params)
        assert features.shape == (2, 11, 8) and features.dtype == jnp.dtype(model.dtype)
        assert (head.bias is None) == (name == "no_bias") and head.kernel.shape == (8, SIZE)
        np.testing.assert_array_equal(read, whole)
        np.testing.assert_array_equal(networks, whole)


def after_a_step(model, objective, accumulate, padded, mesh=None):
    """(The parameters after a step of gradient descent, its loss)."""
    tx = optax.sgd(1.0)
    shapes = jax.eval_shape(lambda key: init_state(model, tx, 11, key), jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # descent remembers nothing
    state["params"] = random_parameters(model, jnp.zeros((1, 11), jnp.int32), jnp.zeros(1))
    step = make_train_step(
        model, objective, tx, jax.random.key(1), ema_decay=0.5, accumulate=accumulate, padded=padded, mesh=mesh
    )
    tokens = np.random.default_rng(0).integers(0, SIZE - 1, (8, 11)).astype(np.int32)
    valid = np.arange(11) < np.array([[11], [3], [7], [11], [1], [9], [11], [6]])
    batch = {"tokens": tokens, "valid": valid if padded else np.ones_like(valid)}
    if mesh is not None:
        batch = sharding.global_batch(batch, mesh)
    new, measured = jax.jit(step)(state, batch, jnp.int32(0))
    assert new["step"] == 1
    return new["params"], measured["train/loss"]


@pytest.mark.parametrize(
    "name, layout, accumulate, padded",
    [
        ("bias", "whole", 1, False),
        ("tied", "whole", 2, True),
        ("no_bias", "blocks", 1, True),
        ("bfloat16", "whole", 1, False),
    ],
)
def test_a_training_step_in_pieces_is_the_step(name, layout, accumulate, padded, monkeypatch):
    model, objective = Denoiser(vocab_size=SIZE, **MODELS[name]), objective_of(layout)
    whole, loss = after_a_step(model, objective, accumulate, padded)
    monkeypatch.setattr(deferred, "LEAST_BYTES", 0)
    monkeypatch.setattr(deferred, "LEAST_PIECE", 5)
    pieces, ours = after_a_step(model, objective, accumulate, padded)
    low = name == "bfloat16"
    np.testing.assert_allclose(ours, loss, rtol=1e-2 if low else 1e-5)
    for a, b in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=0.05 if low else 2e-5)


EIGHT = """
import jax, numpy as np
from diffrwkv import sharding
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion import deferred
from tests import test_head
for name, accumulate, (data, fsdp) in (("bias", 1, (4, 1)), ("tied", 2, (2, 2))):
    model = Denoiser(vocab_size=test_head.SIZE, **test_head.MODELS[name])
    deferred.LEAST_BYTES = 1e9
    whole, loss = test_head.after_a_step(model, test_head.objective_of(), accumulate, True)
    deferred.LEAST_BYTES, deferred.LEAST_PIECE = 0, 5
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[:data * fsdp])
    pieces, ours = test_head.after_a_step(model, test_head.objective_of(), accumulate, True, mesh)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), pieces, whole)
print("equal")
"""


@pytest.mark.slow
def test_a_training_step_in_pieces_on_several_devices():
    assert on_eight_devices(EIGHT) == "equal\n"


def test_a_sample_is_the_same_whether_its_output_is_deferred(monkeypatch):
    model, objective = Denoiser(vocab_size=SIZE, **MODELS["bias"]), objective_of()
    canvas = jnp.full((2, 11), SIZE - 1).at[:, 3].set(5)
    params, keys, sampler = random_parameters(model, canvas), samplers.sequence_keys(0, 2), samplers.Ancestral(8)

    def fill():
        sample = lambda params: sampler(objective.process, face(model, objective, params, sampler), keys, canvas).tokens
        return jax.jit(sample)(params)

    whole = fill()
    monkeypatch.setattr(deferred, "LEAST_BYTES", 0)
    np.testing.assert_array_equal(fill(), whole)


def test_a_sampler_casts_no_matrix_in_its_loop():
    options = MODELS["bfloat16"] | {"num_layers": 3, "scan_layers": True}
    model, objective = Denoiser(vocab_size=SIZE, **options), objective_of()
    params = random_parameters(model, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))
    sampler, canvas = samplers.Confidence(num_steps=4), jnp.full((2, 11), SIZE - 1)

    def generate(params):
        network = face(model, objective, params, sampler)
        return sampler(objective.process, network, samplers.sequence_keys(0, 2), canvas).tokens

    def casts(jaxpr, inside=False):
        """Whether it is in a loop, of each array of two or more dimensions that becomes bfloat16."""
        for e in jaxpr.eqns:
            loop = inside or e.primitive.name in ("while", "scan")
            if e.primitive.name == "convert_element_type" and e.params["new_dtype"] == jnp.bfloat16:
                yield inside, e.invars[0].aval.shape
            for inner in jax.extend.core.jaxprs_in_params(e.params):
                yield from casts(inner, loop)

    found = list(casts(jax.make_jaxpr(generate)(params).jaxpr))
    kernel = params["blocks"]["block_0"]["ffn"]["up"]["kernel"].shape
    assert (False, kernel) in found
    assert not [shape for inside, shape in found if inside and shape[-2:] == kernel[-2:]]
