"""The flow language model: its authors' numbers, what its time means, and where an exact network's flow ends."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion import objectives, samplers
from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.objectives import FLM
from diffrwkv.diffusion.processes import Flow, Masked, Vocabulary
from diffrwkv.diffusion.samplers import FlowEuler, sequence_keys
from diffrwkv.diffusion.samplers.flow_euler import euler
from tests import tiny
from tests.golden_arrays import golden
from tests.random_parameters import random_parameters

SMALL = Flow(Vocabulary(6, 2))  # the mask among the real tokens


@pytest.fixture(scope="module")
def theirs():
    """Their arrays in float32, the mask put behind their 13 tokens, and the process."""
    kinds = {np.dtype("int64"): jnp.int32, np.dtype("float64"): jnp.float32}
    arrays = {k: jnp.asarray(v, kinds[v.dtype]) for k, v in golden("flm_3x9x13.npz").items()}
    pad = {k: jnp.pad(v, ((0, 0), (0, 0), (0, 1))) for k, v in arrays.items() if v.ndim == 3}
    return arrays | pad, Flow(Vocabulary(14, 13))


def test_gamma_is_theirs(theirs):
    arrays, process = theirs
    for t, gamma in (("t", "gamma"), ("t_next", "gamma_next"), ("grid_t", "grid_gamma")):
        np.testing.assert_allclose(process.gamma(arrays[t]), arrays[gamma], atol=1e-5)
    alpha = arrays["grid_gamma_exact_alpha"]
    told = alpha < 1 - 1e-5  # float32 cannot tell the others apart
    np.testing.assert_allclose(process.gamma(alpha)[told], arrays["grid_t"][told], atol=1e-5)


def test_loss_and_step_are_theirs(theirs, monkeypatch):
    arrays, process = theirs
    x, t = arrays["x0"], arrays["t"][:, None]
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: arrays["noise"] + 100 * (jnp.arange(14) == 13))
    z = process.noise(jax.random.key(0), x, t)
    np.testing.assert_allclose(z, arrays["z"], atol=1e-5)

    loss, pullback = jax.vjp(lambda output: process.nats(output, x, z, t), arrays["raw_logits"])
    np.testing.assert_allclose(loss, arrays["loss"], atol=1e-5)
    np.testing.assert_allclose(pullback(jnp.ones_like(loss))[0], arrays["grad_raw_logits"], atol=1e-5)

    p = jax.nn.softmax(process.vocabulary.without_mask(arrays["raw_logits"]))
    gamma, after = (process.gamma(arrays[k])[:, None, None] for k in ("t", "t_next"))
    np.testing.assert_allclose(euler(z, p, gamma, after), arrays["z_next"], atol=1e-5)


@pytest.mark.parametrize("n", [2, 27, 50_257])
def test_gamma_inverts_the_integral(n):
    """Between the points of its table too, in float32: against the formula in float64."""
    gamma = np.append(0, (np.arange(0, 9_998, 101) + 0.5) / 9_999)
    xi, weights = np.polynomial.hermite_e.hermegauss(100)
    phi = np.vectorize(lambda y: math.erfc(-y * 0.5**0.5) / 2)(xi + (gamma / (1 - gamma))[:, None])
    right = phi ** (n - 1) @ (weights / weights.sum())
    np.testing.assert_allclose(right[0], 1 / n, atol=2e-7)
    t = (right - right[0]) / (1 - right[0])
    told = t < 1 - 1e-5  # float32 cannot tell the others apart
    assert told.sum() > 80
    ours = Flow(Vocabulary(n + 1, n)).gamma(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(ours[told], gamma[told], atol=2e-5)
    ends = Flow(Vocabulary(n + 1, n)).gamma(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(ends, [0, 1])


def test_time_is_how_often_the_largest_is_right():
    """Above chance, 1 / 5."""
    x = jax.random.randint(jax.random.key(0), (100, 500), 3, 6)
    t = jnp.linspace(0.1, 0.9, 5)
    z = jax.vmap(lambda t: SMALL.noise(jax.random.key(1), x, t.reshape(1, 1)))(t)
    right = (SMALL.vocabulary.without_mask(z).argmax(-1) == x).mean(axis=(1, 2))
    np.testing.assert_allclose((5 * right - 1) / 4, t, atol=4 * (0.25 / x.size) ** 0.5 * 5 / 4)


def test_what_must_stay_is_one_hot():
    x = jnp.array([[0, 1, 3, 4]])
    free = jnp.array([[True, False, True, False]])
    t = jnp.array([[0.3, 0.3, 0.9, 0.9]])
    z = SMALL.noise(jax.random.key(0), x, t, free)
    np.testing.assert_array_equal(z[0, [1, 3]], jnp.eye(6)[jnp.array([1, 4])])
    np.testing.assert_array_equal(z[..., 2], 0)
    assert bool((jnp.abs(z[0, [0, 2]]).sum(-1) > 1).all()) and bool(SMALL.noised(z).all())
    alone = SMALL.noise(jax.random.key(0), x, t)
    np.testing.assert_array_equal(z[0, 2], alone[0, 2])


# --- the objective ----------------------------------------------------------------------------------------------


def test_the_objective_from_its_name():
    objective = objectives.from_config(Vocabulary(6, 2), name="flm")
    assert objective == FLM(SMALL) and hash(objective) == hash(FLM(SMALL))
    assert objective.process.needs_time and not objective.process.bound
    t = objective.times(jax.random.key(0), 1000, 8)
    assert t.min() < 2e-3 and t.max() > 0.998
    with pytest.raises(ValueError, match="has no schedule"):
        objectives.from_config(Vocabulary(6, 2), name="flm", schedule="linear")
    with pytest.raises(TypeError, match="FLM needs the process Flow, not Masked"):
        FLM(Masked(Vocabulary(6, 2)))
    with pytest.raises(ValueError, match="2 tokens beside the mask"):
        Flow(Vocabulary(2, 0))


@pytest.mark.parametrize("blocks", [None, 3])
def test_a_denoiser_trains_on_it(blocks):
    """Whole texts, and blocks behind clean ones; padding is not counted."""
    layout = () if blocks is None else (Blocks((blocks,)),)
    objective = FLM(SMALL, *layout)
    model = Denoiser(6, 32, 1, mixers=tiny.MIXERS, time_conditioning=True)
    x = jnp.array([[0, 1, 3, 4, 5, 0, 1, 3], [5, 4, 3, 1, 0, 3, 3, 3]])
    valid = jnp.arange(8)[None] < jnp.array([8, 5])[:, None]
    params = random_parameters(model, x, jnp.zeros(1))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(params, key):
        denoise = lambda z, t, **told: model.apply({"params": params}, z, t, valid=valid, **told)
        loss = objective.loss(denoise, key, x, objective.times(key, *x.shape), valid)
        return loss.nats.sum() / loss.tokens.sum(), loss

    first = None
    for i in range(30):
        (mean, loss), gradient = step(params, jax.random.key(i % 3))
        first = mean if first is None else first
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
    assert loss.tokens.tolist() == [8, 5] and float(jnp.abs(loss.token_nats[1, 5:]).max()) == 0
    assert bool((loss.token_nats > 0)[valid].all()) and float(mean) < 0.7 * float(first)


# --- the sampler ------------------------------------------------------------------------------------------------


def bigram(z, t):
    """An output that depends on time, and on the neighbour to the left."""
    table = jax.random.normal(jax.random.key(3), (6, 6))
    return 3 * z + jnp.pad(z, ((0, 0), (1, 0), (0, 0)))[:, :-1] @ table + jnp.sin(t[:, None, None] + jnp.arange(6))


CANVAS = jnp.array([[2, 2, 4, 2, 2], [2, 1, 2, 2, 0], [3, 3, 4, 0, 1]], jnp.int32)


@functools.cache
def sampled(num_steps=7):
    seen = []

    def run(keys, canvas):
        show = lambda tokens: jax.debug.callback(lambda tokens: seen.append(np.asarray(tokens)), tokens, ordered=True)
        return FlowEuler(num_steps)(SMALL, bigram, keys, canvas, return_trace=True, on_step=show)

    samples = jax.block_until_ready(jax.jit(run)(sequence_keys(0, 3), CANVAS))
    jax.effects_barrier()
    return samples, seen


def test_the_loop_is_their_loop():
    """In Python, with the given tokens put back at each step."""
    samples, seen = sampled()
    z = SMALL.start(samplers.flow_euler.canvas_keys(sequence_keys(0, 3), 5)[1])
    given, times, entries = jax.nn.one_hot(CANVAS, 6), jnp.linspace(0, 1, 8), [CANVAS]
    assert float(jnp.abs(z[..., 2]).max()) == 0
    for t, s in itertools.pairwise(times):
        z = jnp.where((CANVAS == 2)[..., None], z, given)
        output = bigram(z, jnp.full(3, t)).at[..., 2].set(-jnp.inf)
        p, gamma = jax.nn.softmax(output), SMALL.gamma(t)
        z = p if s == 1 else z + (SMALL.gamma(s) - gamma) * (p - z) / (1 - gamma + 1e-5)
        best = jnp.where(jnp.arange(6) == 2, -jnp.inf, z).argmax(-1)
        entries.append(jnp.where(CANVAS == 2, best, CANVAS))
    np.testing.assert_array_equal(samples.trace, jnp.stack(entries))
    np.testing.assert_array_equal(samples.tokens, entries[-1])
    np.testing.assert_array_equal(np.stack(seen), samples.trace[:-1])
    assert samples.passes.tolist() == [7, 7, 0]


def test_given_tokens_stay_and_the_mask_is_never_generated():
    for num_steps in (1, 7):
        samples, _ = sampled(num_steps)
        kept = CANVAS != 2
        assert bool((samples.trace == CANVAS)[:, kept].all()) and bool((samples.trace[1:] != 2).all())


def test_a_sample_does_not_depend_on_its_batch_or_on_padding():
    run = jax.jit(lambda keys, canvas, valid: FlowEuler(7)(SMALL, bigram, keys, canvas, valid=valid))
    padded = jnp.pad(CANVAS[1:2], ((0, 0), (0, 3)), constant_values=2)
    alone = run(sequence_keys(0, 1, start=1), padded, jnp.arange(8)[None] < 5)
    np.testing.assert_array_equal(alone.tokens[0, :5], sampled()[0].tokens[1])
    np.testing.assert_array_equal(alone.tokens[0, 5:], 2)


def test_a_full_canvas_needs_no_pass():
    seen = []
    watch = lambda tokens: jax.debug.callback(lambda: seen.append(1))
    samples = jax.jit(lambda k, c: FlowEuler(3)(SMALL, bigram, k, c, on_step=watch))(sequence_keys(0, 1), CANVAS[2:])
    jax.effects_barrier()
    np.testing.assert_array_equal(samples.tokens, CANVAS[2:])
    assert samples.passes.tolist() == [0] and not seen


def test_the_exact_flow_ends_in_the_law_of_the_text():
    """Of one token, whose p(x | z) is known: softmax(log p(x) + gamma z_x / (1 - gamma)^2)."""
    law = jnp.array([0.1, 0.2, 0, 0.4, 0.25, 0.05])

    def posterior(z, t):
        gamma = SMALL.gamma(t)[:, None, None]
        return jnp.log(law) + gamma * z / (1 - gamma) ** 2

    n = 20_000
    run = jax.jit(lambda keys, canvas: FlowEuler(400)(SMALL, posterior, keys, canvas).tokens)
    tokens = run(sequence_keys(0, n), jnp.full((n, 1), 2, jnp.int32))
    share = np.bincount(tokens.ravel(), minlength=6) / n
    np.testing.assert_allclose(share, law, atol=4.5 * (0.25 / n) ** 0.5)


def test_processes_and_samplers_that_do_not_fit():
    call = lambda sampler, process: sampler(process, bigram, sequence_keys(0, 3), CANVAS)
    with pytest.raises(TypeError, match="FlowEuler samples from Flow processes, not Masked"):
        call(FlowEuler(), Masked(Vocabulary(6, 2)))
    with pytest.raises(TypeError, match="Ancestral samples from .* processes, not Flow"):
        call(samplers.Ancestral(), SMALL)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        samplers.from_config("flow_euler", num_steps=0)
    with pytest.raises(ValueError, match="one number for each id"):
        FlowEuler()(SMALL, lambda z, t: z[..., :-1], sequence_keys(0, 3), CANVAS)
