"""The autoregressive objective and sampler, on models whose law is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffrwkv.diffusion import objectives, samplers
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.diffusion.processes import NextToken, Vocabulary
from diffrwkv.diffusion.samplers import sequence_keys

VOCABULARY, MASK = 5, 4
OBJECTIVE = Objective(NextToken(Vocabulary(VOCABULARY, MASK)))
# A Markov chain: the logits of a token given the one before it (the mask begins a text).
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32))


def step(tokens, state):
    """The chain as a model with a state, which counts its steps."""
    return TABLE[tokens], state + 1


def whole(z, t):
    return TABLE[z]


def generate(sampler, keys, canvas, **options):
    network = samplers.StepFns(lambda batch, room: jnp.zeros((), jnp.int32), step)
    return jax.jit(lambda k, c: sampler(OBJECTIVE.process, network, k, c, **options))(keys, canvas)


def log_probs(before):
    return jax.nn.log_softmax(jnp.where(jnp.arange(VOCABULARY) == MASK, -jnp.inf, TABLE[before]))


# --- objective ----------------------------------------------------------------------------------------------------


def test_the_loss_is_minus_the_log_likelihood():
    x = jnp.asarray([[0, 1, 2, 3, 0], [3, 3, 1, 0, 2]])
    loss = OBJECTIVE.loss(whole, None, x, jnp.zeros(2))
    for row, nats in zip(np.asarray(x), loss.nats, strict=True):
        before = [MASK, *row[:-1]]
        expected = -sum(float(log_probs(b)[a]) for a, b in zip(row, before, strict=True))
        np.testing.assert_allclose(nats, expected, rtol=1e-6)
    assert loss.tokens.tolist() == [5, 5] and loss.noised.all()


def test_padding_does_not_count():
    x = jnp.asarray([[0, 1, 2, 3, 0]])
    valid = jnp.asarray([[True, True, True, False, False]])
    loss = OBJECTIVE.loss(whole, None, x, jnp.zeros(1), valid)
    short = OBJECTIVE.loss(whole, None, x[:, :3], jnp.zeros(1))
    np.testing.assert_allclose(loss.nats, short.nats)
    assert loss.tokens.tolist() == [3] and loss.token_nats[0, 3:].tolist() == [0, 0]


def test_the_probabilities_of_all_texts_sum_to_one():
    texts = jnp.asarray(np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3))
    loss = OBJECTIVE.loss(whole, None, texts, jnp.zeros(len(texts)))
    np.testing.assert_allclose(jnp.exp(-loss.nats).sum(), 1.0, rtol=1e-5)


def test_a_uniform_model_scores_log_v():
    objective = objectives.from_config(Vocabulary(VOCABULARY, MASK), name="autoregressive")
    x = jnp.asarray([[0, 1, 2]])
    loss = objective.loss(lambda z, t: jnp.zeros((1, 3, VOCABULARY)), None, x, objective.times(None, 1, 3))
    np.testing.assert_allclose(loss.nats.sum() / 3, np.log(4), rtol=1e-6)


def test_it_has_no_options():
    with pytest.raises(ValueError, match="has no option time_eps; it has none"):
        objectives.from_config(
            Vocabulary(2, 1), name="autoregressive", sections={"objectives": {"autoregressive": {"time_eps": 0.1}}}
        )


# --- sampler ------------------------------------------------------------------------------------------------------


def test_samples_have_the_models_law():
    """All 64 texts of three tokens, 20,000 draws, chi-square."""
    number = 20_000
    samples = generate(samplers.Autoregressive(), sequence_keys(0, number), jnp.full((number, 3), MASK))
    counts = np.bincount(np.asarray(samples.tokens) @ [16, 4, 1], minlength=64)
    texts = jnp.asarray(np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3))
    law = np.exp(-np.asarray(OBJECTIVE.loss(whole, None, texts, jnp.zeros(64)).nats, np.float64))
    assert scipy.stats.chisquare(counts, number * law / law.sum()).pvalue > 1e-3
    assert samples.passes.tolist() == [3] * number


def test_given_tokens_stay_and_steer_what_follows():
    canvas = jnp.asarray([[2, MASK, MASK, 1], [MASK, 0, MASK, MASK], [1, 2, 3, 0]])
    samples = generate(samplers.Autoregressive(temperature=0), sequence_keys(0, 3), canvas, return_trace=True)
    best = [int(jnp.argmax(log_probs(b))) for b in range(VOCABULARY)]
    expected = [[2, best[2], best[best[2]], 1], [best[MASK], 0, best[0], best[best[0]]], [1, 2, 3, 0]]
    assert samples.tokens.tolist() == expected
    assert samples.passes.tolist() == [3, 4, 0]
    np.testing.assert_array_equal(samples.trace[0], canvas)
    np.testing.assert_array_equal(samples.trace[-1], samples.tokens)
    assert samples.trace[2].tolist() == [[2, best[2], MASK, 1], [best[MASK], 0, MASK, MASK], [1, 2, 3, 0]]


def test_a_sample_does_not_change_with_its_batch():
    canvas = jnp.full((4, 9), MASK)
    together = generate(samplers.Autoregressive(), sequence_keys(3, 4), canvas)
    alone = generate(samplers.Autoregressive(), sequence_keys(3, 1, start=2), canvas[:1])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[2])
    assert len({tuple(row) for row in together.tokens.tolist()}) > 1


def test_a_canvas_without_blanks_never_runs_the_network():
    ran = []
    canvas = jnp.asarray([[1, 2, 3]])
    show = lambda tokens: jax.debug.callback(lambda t: ran.append(t.copy()), tokens, ordered=True)
    for blanks, runs in ((0, 0), (2, 2)):
        ran.clear()
        given = canvas.at[0, :blanks].set(MASK)
        samples = generate(samplers.Autoregressive(), sequence_keys(0, 1), given, on_step=show)
        jax.effects_barrier()
        assert len(ran) == runs and samples.passes.tolist() == [runs]


@pytest.mark.parametrize(
    "options,message",
    [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"num_steps": 4}, "no option num_steps; it")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        samplers.from_config("autoregressive", **options)


def test_logits_without_the_mask_are_refused():
    short = lambda tokens, state: (jnp.zeros((1, 1, VOCABULARY - 1)), state)
    canvas, keys = jnp.full((1, 2), MASK), sequence_keys(0, 1)
    network = samplers.StepFns(lambda batch, room: jnp.zeros(()), short)
    with pytest.raises(ValueError, match="one number for each id"):
        jax.eval_shape(lambda: samplers.Autoregressive()(OBJECTIVE.process, network, keys, canvas))
