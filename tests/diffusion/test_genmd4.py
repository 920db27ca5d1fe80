"""A schedule for each token: the bound and its gradient against enumeration, and the samples of an exact network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.objectives import Diffusion, GenMD4
from diffrwkv.diffusion.processes import Masked, TokenMasked, Vocabulary
from diffrwkv.diffusion.samplers import Ancestral, FirstHitting, sequence_keys
from diffrwkv.diffusion.schedules import Polynomial

VOCABULARY = Vocabulary(4, 1)  # the mask among the real tokens
REAL = (0, 2, 3)
POWERS = (0.6, 9.0, 1.0, 2.5)  # the mask's means nothing
PROCESS = TokenMasked(VOCABULARY, POWERS, eps=1e-6)

TEXTS = np.array(list(itertools.product(REAL, repeat=2)))
LAW = np.random.default_rng(0).dirichlet(np.full(9, 0.7))  # of texts of two tokens
ENTROPY = -(LAW * np.log(LAW)).sum()


def exact(z, t):
    """log p(x_i | z_t) under LAW, by enumeration: the output of a network that has learned all there is."""
    t = t.reshape(-1, 1, 1)
    w = jnp.array(POWERS)[TEXTS]  # [9, 2]
    masked = jnp.log1p(-1e-6) + w * jnp.log(t)  # [B, 9, 2]
    shown = jnp.where(z[:, None] == TEXTS, jnp.log(-jnp.expm1(masked)), -jnp.inf)
    log_q = jnp.where((z == 1)[:, None], masked, shown).sum(axis=-1) + jnp.log(LAW)
    posterior = jax.nn.softmax(log_q, axis=-1)
    return jnp.log(jnp.einsum("bn,niv->biv", posterior, jax.nn.one_hot(TEXTS, 4)) + 1e-30)


def expected_nats(process, x, t, denoise):
    """The mean over z of the integrand of every text [n, 2] at every time [T], summed over tokens: [T, n]."""

    def at(t):
        total = 0
        for hidden in itertools.product((False, True), repeat=2):
            z = jnp.where(jnp.array(hidden), 1, x)
            t_x = jnp.full((len(x), 1), t)
            q = jnp.exp(process.log_noise(x, z, t_x).sum(axis=1))
            total += q * process.nats(denoise(z, t_x[:, 0]), x, z, t_x).sum(axis=1)
        return total

    return jax.lax.map(at, t)


@pytest.mark.parametrize("time_eps", [1e-4, 0.2])
def test_the_bound_is_the_entropy_for_an_exact_network(time_eps):
    """And not below it where much is shown before the earliest time: what is left out there is counted too."""
    edges = jnp.geomspace(time_eps, 1, 2001)
    middle = jnp.sqrt(edges[1:] * edges[:-1])
    nats = jax.jit(lambda t: expected_nats(PROCESS, jnp.asarray(TEXTS), t, exact))(middle)
    integral = float((nats @ LAW) @ jnp.diff(edges))
    before = float(PROCESS.nats_before(TEXTS, time_eps).sum(axis=1) @ LAW)
    assert before > 0
    if time_eps < 0.1:
        assert ENTROPY - 1e-3 < integral + before < ENTROPY + 0.01 + before
    else:
        assert integral < ENTROPY - 0.1 and integral + before > ENTROPY


def test_the_probabilities_of_noise():
    x = jnp.tile(jnp.array([[0, 2, 3]]), (40_000, 1))
    t = jnp.array([[0.3, 0.5, 0.7]])
    z = PROCESS.noise(jax.random.key(0), x, t)
    expected = np.array([0.3, 0.5, 0.7]) ** np.array(POWERS)[[0, 2, 3]]
    np.testing.assert_allclose(PROCESS.noised(z).mean(axis=0), expected, atol=4 * (0.25 / 40_000) ** 0.5)
    q = jnp.exp(PROCESS.log_noise(x[:1], jnp.array([[1, 2, 1]]), t))[0]
    np.testing.assert_allclose(q, [expected[0], 1 - expected[1], expected[2]], rtol=1e-5)
    free = jnp.array([[True, False, True]])
    assert not bool(PROCESS.noised(PROCESS.noise(jax.random.key(0), x, t, free))[:, 1].any())


def test_equal_powers_are_masked_diffusion():
    """A polynomial schedule's: the loss, and the step."""
    process, masked = TokenMasked(VOCABULARY, (2.0,) * 4, eps=1e-6), Masked(VOCABULARY, Polynomial(2.0))
    x, z = jnp.array([[0, 2, 3]]), jnp.array([[1, 2, 1]])
    output, t = jax.random.normal(jax.random.key(0), (1, 3, 4)), jnp.array([[0.4]])
    np.testing.assert_allclose(process.nats(output, x, z, t), masked.nats(output, x, z, t), rtol=1e-4)
    log_p = process.predict(output, z, t)
    np.testing.assert_array_equal(log_p, masked.predict(output, z, t))
    laws = (p.reverse_law(log_p, z, t, t / 2) for p in (process, masked))
    np.testing.assert_allclose(*map(jnp.exp, laws), atol=1e-4)
    laws = (p.forward_law(log_p, t / 2) for p in (process, masked))
    np.testing.assert_allclose(*map(jnp.exp, laws), atol=1e-4)


def test_the_reverse_law_is_bayes():
    """Of one token: forward to s, then to t, against the law of z_s given that z_t is the mask."""
    prior = jnp.log(jnp.array([0.5, 1e-30, 0.2, 0.3]))
    s, t = jnp.array([[0.3]]), jnp.array([[0.8]])
    m_s, m_t = (jnp.exp(PROCESS.log_masked(u))[0, 0] for u in (s, t))
    p = jnp.exp(prior) * m_t
    law = PROCESS.reverse_law(jnp.log(p / p.sum())[None, None], jnp.array([[1]]), t, s)[0, 0]
    both = jnp.exp(prior) * (m_t - m_s)  # shown at s, masked at t
    expected = both.at[1].set((jnp.exp(prior) * m_s).sum()) / p.sum()
    np.testing.assert_allclose(jnp.exp(law), expected, atol=1e-6)
    np.testing.assert_allclose(jnp.exp(law).sum(), 1, rtol=1e-5)
    shown = PROCESS.reverse_law(prior[None, None], jnp.array([[2]]), t, s)[0, 0]
    np.testing.assert_array_equal(jnp.exp(shown), [0, 0, 1, 0])
    at_0 = jnp.exp(PROCESS.reverse_law(jnp.log(p / p.sum())[None, None], jnp.array([[1]]), t, jnp.zeros((1, 1))))
    np.testing.assert_allclose(at_0[0, 0], (p / p.sum()).at[1].set(0), atol=1e-6)


# --- learning -------------------------------------------------------------------------------------------------


OBJECTIVE = GenMD4(TokenMasked(VOCABULARY, eps=1e-6))
W = {"w": jnp.log(jnp.expm1(jnp.array(POWERS)))}


def rough(z, t, clean=None, **how):
    """Logits of a network that is far from exact: of a token, and of the one before it, the clean one if it is told."""
    before = jnp.pad(z if clean is None else clean, ((0, 0), (1, 0)))[:, :-1]
    return jnp.sin(1.0 + 2 * z[..., None] + 3 * before[..., None] + jnp.arange(4))


@pytest.mark.parametrize("layout", [(), (Blocks((1,)),)])
def test_the_gradient_is_that_of_the_expected_loss(layout):
    """Of the powers, REINFORCE's part included, in the mean over draws; and the loss itself is what it was."""
    objective, copies = GenMD4(TokenMasked(VOCABULARY, eps=1e-6), *layout), 60_000
    x = jnp.tile(jnp.array([[0, 3]]), (copies, 1))
    t = jnp.full((copies, 2) if layout else copies, 0.6)

    def drawn(learned, row):
        row = jax.tree.map(lambda a: a[None], row)
        loss = objective.loss(rough, row[2][0], row[0], row[1], state=learned, step=0)
        return loss.nats[0]

    rows = (x, t, jax.random.split(jax.random.key(0), copies))
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(drawn), (None, 0)))(W, rows)

    def expected(learned):
        process = TokenMasked(VOCABULARY, jax.nn.softplus(learned["w"]), eps=1e-6)
        denoise = functools.partial(rough, **objective.layout.network(x[:1]))
        nats = expected_nats(process, x[:1], jnp.array([0.6]), denoise)[0, 0]
        return nats + process.nats_before(x[:1], objective.time_eps).sum()

    value, gradient = jax.jit(jax.value_and_grad(expected))(W)
    error = lambda draws: 4.5 * np.std(draws, axis=0) / copies**0.5 + 1e-5
    assert abs(values.mean() - value) < error(values)
    assert (np.abs(gradients["w"].mean(axis=0) - gradient["w"]) < error(gradients["w"])).all()
    # with teeth: without that part it would be another
    alone = jax.jit(jax.grad(lambda w: objective.loss(rough, rows[2][0], x, t, state=w).nats.mean()))(W)["w"]
    assert float(jnp.abs(alone - gradient["w"]).max()) > 0.05


def test_evaluation_is_one_pass_and_training_two():
    passes = []

    def counted(z, t):
        passes.append(z.shape)
        return rough(z, t)

    x, t = jnp.array([[0, 2, 3, 0]]), jnp.array([0.5])
    valid = jnp.array([[True, True, True, False]])
    for step, n in ((None, 1), (3, 2)):
        loss = OBJECTIVE.loss(counted, jax.random.key(0), x, t, valid, state=W, step=step)
        assert len(passes) == n and loss.tokens.tolist() == [3] and float(loss.token_nats[0, 3]) == 0
        np.testing.assert_allclose(loss.nats, loss.token_nats.sum(axis=1), rtol=1e-5)
        passes.clear()


def test_schedules_are_learned():
    """With the exact answer wherever token 0 stands, and none elsewhere, the bound falls and the powers part."""
    objective = GenMD4(TokenMasked(VOCABULARY), power_rate=0.02)
    state = objective.init_state()
    np.testing.assert_allclose(jax.nn.softplus(state["w"]), 1, rtol=1e-6)
    x = jnp.tile(jnp.array([[0, 2, 3, 0]]), (64, 1))
    sure = lambda z, t: jnp.where((x == 0)[..., None], 8.0 * (jnp.arange(4) == 0), 0.0)

    @jax.jit
    def step(state, number):
        key = jax.random.fold_in(jax.random.key(0), number)
        t = objective.times(key, *x.shape, state=state)

        def mean(learned):
            return objective.loss(sure, key, x, t, state=state | learned, step=number).nats.sum() / x.size

        value, gradient = jax.value_and_grad(mean)(objective.learned(state))
        return objective.update(state, gradient, number + 1), value

    values = []
    for number in range(120):
        state, value = step(state, number)
        values.append(float(value))
    assert np.mean(values[-20:]) < np.mean(values[:20])
    powers = np.asarray(jax.nn.softplus(state["w"]))
    assert powers[1] == 1 and abs(powers[0] - powers[2]) > 0.2

    settled = objective.settled(state)
    np.testing.assert_allclose(settled.process.powers, powers, rtol=1e-6)
    assert hash(settled) == hash(objective.settled(state))
    given = (sure, jax.random.key(1), x, jnp.full(64, 0.5))
    np.testing.assert_allclose(settled.loss(*given).nats, objective.loss(*given, state=state).nats, rtol=1e-5)


# --- samples --------------------------------------------------------------------------------------------------


def assert_law(tokens, texts, law, bias=0.0):
    """The share of each text among the tokens [n, L] is its probability, within 4.5 standard errors and the bias."""
    shares = (np.asarray(tokens)[:, None] == texts).all(axis=-1).mean(axis=0)
    np.testing.assert_array_less(np.abs(shares - law), 4.5 * np.sqrt(law * (1 - law) / len(tokens)) + bias)


def sampled(num_steps, denoise, n, length):
    run = jax.jit(lambda keys, canvas: Ancestral(num_steps)(PROCESS, denoise, keys, canvas).tokens)
    return run(sequence_keys(0, n), jnp.full((n, length), 1, jnp.int32))


def test_one_token_is_exact_in_any_number_of_steps():
    """And with a network that does not look at the time it is not."""
    texts, law = np.array(REAL)[:, None], np.array([0.5, 0.2, 0.3])

    def posterior(z, t):
        prior = jnp.log(jnp.full(4, 1e-30).at[jnp.array(REAL)].set(law))
        return prior + PROCESS.log_masked(t[:, None])  # [B, 1, V]

    assert_law(sampled(3, posterior, 30_000, 1), texts, law)
    with pytest.raises(AssertionError):
        assert_law(sampled(3, lambda z, t: posterior(z, jnp.ones_like(t)), 30_000, 1), texts, law)


def test_samples_of_an_exact_network_have_the_law_of_the_text():
    """With so many steps that two tokens are seldom shown in one."""
    assert_law(sampled(64, exact, 8_000, 2), TEXTS, LAW, bias=6e-3)


def test_what_is_refused():
    with pytest.raises(ValueError, match="take that of `Objective.settled"):
        OBJECTIVE.loss(rough, jax.random.key(0), jnp.array([[0, 2]]), jnp.array([0.5]))
    with pytest.raises(TypeError, match="GenMD4 needs the process TokenMasked, not Masked"):
        GenMD4(Masked(VOCABULARY))
    with pytest.raises(ValueError, match="power must be"):
        GenMD4(TokenMasked(VOCABULARY), power=0)
    with pytest.raises(ValueError, match="eps must be"):
        TokenMasked(VOCABULARY, eps=1.0)
    with pytest.raises(TypeError, match="FirstHitting samples from Masked processes, not TokenMasked"):
        FirstHitting()(PROCESS, exact, sequence_keys(0, 1), jnp.ones((1, 2), jnp.int32))
    assert Diffusion(Masked(VOCABULARY)).settled(None) == Diffusion(Masked(VOCABULARY))
