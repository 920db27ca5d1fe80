"""An output that is made piece by piece gives what the whole one gives: values and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion import deferred, samplers
from diffrwkv.diffusion.cross_entropy import cross_entropy
from diffrwkv.diffusion.deferred import Deferred, Network, at
from diffrwkv.diffusion.objectives import OBJECTIVES, Blocks, Whole
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.schedules import LogLinear
from tests.eight_devices import on_eight_devices
from tests.golden_arrays import relative_error
from tests.thin import slow


def read(weights, features):
    kernel, bias = weights
    return (features @ kernel.astype(features.dtype)).astype(jnp.float32) + bias


def case(batch, length, size, dim=6, dtype="float32", seed=0, share=0.5):
    """(features, weights, x, weight of each sequence, where), and the mask is the token before the last."""
    random = np.random.default_rng(seed)
    features = jnp.asarray(random.normal(size=(batch, length, dim)), dtype)
    weights = tuple(jnp.asarray(2 * random.normal(size=s), jnp.float32) for s in ((dim, size), size))
    x = random.integers(0, size - 1, (batch, length))
    x = jnp.asarray(x + (x >= size - 2), jnp.int32)
    return (
        features,
        weights,
        x,
        jnp.asarray(random.uniform(0.5, 3, (batch, 1)), jnp.float32),
        jnp.asarray(random.random((batch, length)) < share),
    )


def values(features, weights, x, weight, where, size, plain=False):
    output = Deferred(features, weights, read, size)
    fun = lambda output, x, w, _: w * cross_entropy(output, x, size - 2)
    return at(output.made() if plain else output, where, fun, x, weight)


def in_float64(features, weights, x, weight, where, size, cotangent):
    """(values, gradients by features, kernel, bias and weight) of NumPy."""
    f, (w, b), scale = np.float64(features), map(np.float64, weights), np.float64(weight)
    logits = f @ w + b
    logits[..., size - 2] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nats = -np.take_along_axis(log_p, np.asarray(x)[..., None], axis=-1)[..., 0]
    c = np.where(where, np.float64(cotangent), 0)
    g = (c * scale)[..., None] * (np.exp(log_p) - (np.arange(size) == np.asarray(x)[..., None]))
    by_weight = (c * nats).sum(axis=1, keepdims=True)
    return np.where(where, scale * nats, 0), (
        g @ w.T,
        np.einsum("bld,blv->dv", f, g),
        g.sum(axis=(0, 1)),
        by_weight,
    )


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(
    "batch, length, size, piece, share",
    [
        (2, 63, 101, 16, 0.5),
        (1, 1, 5, 16, 1.0),  # one token
        (3, 100, 17, 300, 0.5),  # all in one piece
        (3, 100, 17, 299, 1.0),  # one position more than a piece
        (1, 100, 33, 7, 1.0),  # everything is masked, and pieces do not divide it
        (2, 9, 33, 4, 0.0),  # nothing is
        (4, 63, 300, 64, 0.02),
    ],
)
def test_values_and_gradients_are_those_of_float64(batch, length, size, piece, share, even, monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_PIECE", piece)
    given = case(batch, length, size, dim=2, share=share, seed=length + piece)
    cotangent = np.full((batch, length), 0.3) if even else np.random.default_rng(1).normal(size=(batch, length))

    @jax.jit
    def both(features, weights, x, weight, where, cotangent):
        found, pull = jax.vjp(lambda f, w, s: values(f, w, x, s, where, size), features, weights, weight)
        return found, pull(cotangent)

    found, (by_features, (by_kernel, by_bias), by_weight) = both(*given, jnp.asarray(cotangent, jnp.float32))
    right, gradients = in_float64(*given, size, cotangent)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    for a, b in zip((by_features, by_kernel, by_bias, by_weight), gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1))
    assert (np.asarray(found)[~np.asarray(given[4])] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_near_to_float32_as_the_whole_output_is(dtype, monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_PIECE", 16)
    given = case(3, 63, 501, dtype=dtype)

    def loss(features, weights, plain):
        return values(features, weights, *given[2:], 501, plain).sum() / 1000

    def of(plain, features):
        return jax.jit(jax.value_and_grad(functools.partial(loss, plain=plain), (0, 1)))(features, given[1])

    exact, whole, ours = of(True, given[0].astype(jnp.float32)), of(True, given[0]), of(False, given[0])
    assert ours[1][0].dtype == jnp.dtype(dtype) and ours[1][1][0].dtype == jnp.float32
    for right, a, b in zip(*map(jax.tree.leaves, (exact, whole, ours)), strict=True):
        assert relative_error(b, right) < max(1.2 * relative_error(a, right), 1e-4)


def test_what_does_not_count_may_be_anything(monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_PIECE", 4)
    features, weights, x, weight, where = case(2, 9, 11)
    where = where.at[0, 0].set(False).at[1, 8].set(False)
    spoilt = jnp.where(where[..., None], features, jnp.nan)

    def loss(features, weights):
        return values(features, weights, x, weight, where, 11).sum()

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for a, b in zip(*(jax.tree.leaves(gradient(f, weights)) for f in (spoilt, features)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_under_vmap_and_scan_each_has_its_own_count(monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_PIECE", 4)
    features, weights, x, weight, where = case(4, 9, 11)
    where = where.at[1].set(False).at[2].set(True)

    @jax.jit
    def gradient(features, x, weight, where):
        return jax.grad(lambda f: values(f[None], weights, x[None], weight[None], where[None], 11).sum())(features)

    rows = (features, x, weight, where)
    alone = jnp.stack([gradient(*(r[i] for r in rows)) for i in range(4)])
    np.testing.assert_allclose(jax.vmap(gradient)(*rows), alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.lax.map(lambda r: gradient(*r), rows), alone, rtol=1e-5, atol=1e-6)


# --- objectives -----------------------------------------------------------------------------------------


def objective_named(name, layout, size):
    entry = OBJECTIVES[name]
    process = {"vocabulary": Vocabulary(size, size - 2), **entry.fixed}
    if entry.schedule is not None:
        process["schedule"] = LogLinear()
    return entry.objective(entry.process(**process), layout)


APART = sorted(name for name, entry in OBJECTIVES.items() if entry.process.apart)
CUTS = [(name, layout) for name in APART for layout in (Whole(), Blocks((4,), keep_first=True))]
CUTS = [(name, layout) for name, layout in CUTS if name != "autoregressive" or layout == Whole()]
QUICK = ("mdlm", "udlm", "duo")  # masks, uniform noise, and what an objective knows beside its output


def test_some_objectives_defer_and_some_do_not():
    assert {"mdlm", "sedd_absorb", "genmd4", "gidd", "udlm", "autoregressive"} <= set(APART)
    assert not OBJECTIVES["flm"].process.apart


@pytest.mark.parametrize(
    "name, layout",
    [cut if cut[0] in QUICK else slow(cut) for cut in CUTS],
)
def test_the_loss_of_every_objective_is_that_of_the_whole_output(name, layout, monkeypatch):
    """With padding, in training and in evaluation; by the weights, by features and by what the objective learns."""
    monkeypatch.setattr(deferred, "LEAST_PIECE", 5)
    monkeypatch.setattr(deferred, "LEAST_BYTES", 0)
    size, seen = 29, []
    objective = objective_named(name, layout, size)
    features, weights, x, _, _ = case(3, 11, size)
    valid = jnp.arange(11) < jnp.asarray([[11], [4], [9]])
    own = objective.init_state()
    t = objective.times(jax.random.key(1), 3, 11, state=own)

    def loss(features, weights, learned, step, plain):
        def output(z, t, **_):
            tokens = z if z.ndim == 2 else z.argmax(axis=-1)
            return Deferred(features + 0.01 * tokens[..., None], weights, read, size)

        def part(*args, **how):
            seen.append(plain)
            return output(*args, **how)

        denoise = Network(part)
        denoise = denoise.__call__ if plain else denoise
        done = objective.loss(denoise, jax.random.key(0), x, t, valid, state=own | learned, step=step)
        return done.nats.sum() / done.tokens.sum(), done

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=4)
    for step in (None, jnp.int32(3)):
        learned = objective.learned(own)
        (whole, a), wholes = gradient(features, weights, learned, step, True)
        (pieces, b), ours = gradient(features, weights, learned, step, False)
        for x_, y in zip(jax.tree.leaves((a, whole, wholes)), jax.tree.leaves((b, pieces, ours)), strict=True):
            np.testing.assert_allclose(y, x_, rtol=2e-4, atol=2e-5 * max(1.0, np.abs(x_).max()))
        assert jnp.abs(ours[1][0]).max() > 0
    assert set(seen) == {True, False}


def test_a_process_that_says_nothing_is_given_the_whole_output(monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_BYTES", 0)
    made = []

    class Silent(Masked):
        apart = False

        def nats(self, output, x, z, t):
            made.append(output.shape)
            return super().nats(output, x, z, t)

    objective = dataclasses.replace(objective_named("mdlm", Whole(), 11), process=Silent(Vocabulary(11, 9)))
    features, weights, x, _, _ = case(2, 9, 11)
    network = Network(lambda z, t: Deferred(features, weights, read, 11))
    objective.loss(network, jax.random.key(0), x, jnp.full(2, 0.5))
    assert made == [(2, 9, 11)]


class Everywhere(Masked):
    """Asks something of every position, of those that show a token too, and of its neighbour."""

    def nats(self, output, x, z, t):
        return cross_entropy((output + jnp.roll(output, 1, axis=1)) / 2, x, self.mask_id)


class Said(Everywhere):
    apart = True


class FromElsewhere:
    def noised(self, z):
        return z != self.mask_id


class Mixed(FromElsewhere, Masked):
    pass


class Renamed(Masked):
    pass


def test_who_has_another_loss_has_to_say_anew_that_its_positions_are_apart(monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_BYTES", 0)
    monkeypatch.setattr(deferred, "LEAST_PIECE", 4)
    classes = (Masked, Renamed, Everywhere, Said, Mixed)
    assert [cls.apart for cls in classes] == [True, True, False, True, False]
    process = Everywhere(Vocabulary(11, 9))
    features, weights, x, _, _ = case(2, 9, 11)
    network = Network(lambda z, t: Deferred(features, weights, read, 11))
    objective = dataclasses.replace(objective_named("mdlm", Whole(), 11), process=process)
    loss = objective.loss(network, jax.random.key(0), x, jnp.full(2, 0.5))
    assert not loss.noised.all()
    right = process.nats(network(x, None), x, x, None)
    np.testing.assert_allclose(loss.token_nats, right, rtol=1e-6)


def test_a_small_output_is_made_at_once(monkeypatch):
    small = Deferred(jnp.zeros((2, 8, 4)), (jnp.zeros((4, 16)), jnp.zeros(16)), read, 16)
    assert not small.large
    monkeypatch.setattr(deferred, "LEAST_BYTES", 4 * 2 * 8 * 16)
    assert small.large
    monkeypatch.setattr(deferred, "LEAST_RATIO", 5)
    assert not small.large


# --- samplers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, width",
    [
        (samplers.Ancestral(num_steps=16), 6),
        (samplers.FirstHitting(top_k=5), 1),
        (samplers.ReMDM(num_steps=16), 6),
        (samplers.Confidence(block=4, temperature=1.0), 4),
        (samplers.Confidence(temperature=1.0), None),  # looks at all positions
    ],
)
def test_samplers_read_the_positions_that_they_draw_and_draw_the_same(sampler, width, monkeypatch):
    monkeypatch.setattr(deferred, "LEAST_BYTES", 0)
    size, shapes = 29, set()
    features, weights, canvas, _, where = case(3, 11, size)
    canvas, process = jnp.where(where, size - 2, canvas), Masked(Vocabulary(size, size - 2))

    def spied(weights, features):
        shapes.add(features.shape[:-1])
        return read(weights, features)

    def part(z, t):
        return Deferred(features + 0.1 * z[..., None] + t[:, None, None], weights, spied, size)

    network, watched = Network(part), []
    keys = samplers.sequence_keys(0, 3)
    whole = jax.jit(lambda: sampler(process, lambda z, t: network(z, t), keys, canvas))()
    assert shapes == {(3, 11)}
    shapes.clear()
    fill = functools.partial(sampler, process, network, keys, canvas)
    for ours in (jax.jit(fill)(), jax.jit(lambda: fill(on_step=watched.append))()):
        np.testing.assert_array_equal(ours.tokens, whole.tokens)
        np.testing.assert_array_equal(ours.passes, whole.passes)
    assert {s[-1] for s in shapes} == {11 if width is None else width} or shapes == {(3,)}
    assert len(watched) == 1  # as the loop was traced


# --- memory and devices -----------------------------------------------------------------------------------


def test_no_array_of_the_outputs_size_is_kept():
    shape, size, dim = (4, 512), 4096, 32

    def loss(features, kernel, x, where, plain):
        output = Deferred(features, (kernel, 0.0), read, size)
        return at(output.made() if plain else output, where, lambda o, x, _: cross_entropy(o, x, size - 1), x).sum()

    given = [
        jax.ShapeDtypeStruct((*shape, dim), jnp.float32),
        jax.ShapeDtypeStruct((dim, size), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.bool_),
    ]
    whole, pieces = (
        jax.jit(jax.grad(functools.partial(loss, plain=plain), (0, 1))).lower(*given).compile().memory_analysis()
        for plain in (True, False)
    )
    one = 4 * shape[0] * shape[1] * size
    assert whole.temp_size_in_bytes > one > 2 * pieces.temp_size_in_bytes


EIGHT = """
import functools, jax, jax.numpy as jnp, numpy as np
from diffrwkv import sharding
from diffrwkv.diffusion import deferred, samplers
from tests.diffusion.test_deferred import case, values
deferred.LEAST_PIECE = 5
given = case(8, 9, 31, dim=2)
where = given[4].at[:2].set(False).at[6:].set(True)
cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(8, 9)), jnp.float32)


def both(features, weights, x, weight, where):
    of = lambda f, w, s: values(f, w, x, s, where, 31)
    found, pull = jax.vjp(of, features, weights, weight)
    return of(features, weights, weight), found, pull(jnp.full((8, 9), 0.25)), pull(cotangent)


right = both(*given[:4], where)
for data, fsdp in ((8, 1), (2, 4), (1, 2)):
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    rows = sharding.batch_sharding(mesh)
    kernel = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None if 2 % fsdp else "fsdp"))
    place = (rows, (kernel, sharding.replicated(mesh)), rows, rows, rows)
    arrays = jax.device_put((*given[:4], where), place)
    ours = jax.jit(sharding.over(mesh, both))(*arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, right)
    text = jax.jit(sharding.over(mesh, both)).lower(*arrays).compile().as_text()
    assert not [shape for shape in ("[72,31]", "[8,9,31]", "[72,2]", "[8,9,2]") if shape in text]
print("equal")
"""


def test_devices_make_the_positions_of_their_own_rows():
    assert on_eight_devices(EIGHT) == "equal\n"
