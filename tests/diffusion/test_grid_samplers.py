"""The samplers that move every position at every step: `Psi` against those it contains, the entropy bound by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion.noise import draw_law
from diffrwkv.diffusion.processes import Masked, Uniform
from diffrwkv.diffusion.samplers import Ancestral, EntropyBound, Psi, ReMDM, sequence_keys
from diffrwkv.diffusion.samplers.common import canvas_keys, entropies, fold_step
from diffrwkv.diffusion.samplers.entropy_bound import within_bound
from diffrwkv.diffusion.schedules import Cosine, Linear, LogLinear
from tests.diffusion.known_law import MASK, REAL, VOCABULARY, known_law

BATCH, LENGTH = 5, 7
UNIFORM = Uniform(VOCABULARY, Linear())
TABLE = np.random.default_rng(0).normal(size=(LENGTH, 4, 4, 4)).astype(np.float32) * 2


def network(z, t):
    """Of each position, its two neighbours and the time."""
    left, right = jnp.roll(z, 1, axis=1), jnp.roll(z, -1, axis=1)
    return jnp.asarray(TABLE)[jnp.arange(LENGTH)[None], left, right] * (1 + t)[:, None, None]


def canvases():
    """Nothing given, scattered givens, all given."""
    canvas = np.full((BATCH, LENGTH), MASK, np.int32)
    canvas[1, 1::3] = REAL[2]
    canvas[2] = REAL[0]
    return jnp.asarray(canvas)


def fill(sampler, process, **options):
    return jax.jit(lambda: sampler(process, network, sequence_keys(0, BATCH), canvases(), **options))()


def test_psi_without_a_corrector_is_ancestral_sampling():
    options = {"num_steps": 6, "temperature": 0.7, "top_k": 2}
    for strategy in ({"kappa": 1.0}, {"kappa": 0.3, "t_on": 1e-3, "t_off": 1e-4}):
        psi = fill(Psi(**options, **strategy, greedy_tail=True), UNIFORM, return_trace=True)
        ancestral = fill(Ancestral(**options), UNIFORM, return_trace=True)
        np.testing.assert_array_equal(psi.trace, ancestral.trace)
        np.testing.assert_array_equal(psi.tokens, ancestral.tokens)
        assert psi.passes.tolist() == [7, 7, 0, 7, 7] == ancestral.passes.tolist()
    assert (fill(Psi(**options, kappa=0.3), UNIFORM).tokens != psi.tokens).any()


@pytest.mark.parametrize("options", [{"strategy": "cap", "eta": 0.3}, {"strategy": "rescale", "eta": 0.4}], ids=str)
def test_psi_of_masks_is_remdm(options):
    """The law of one step, of a mask and of a token, by ReMDM's own formulas; where sigma <= 1 - alpha_s, as far as
    a mixture goes."""
    process, law = Masked(VOCABULARY, Cosine()), known_law(1)
    sampler = Psi(num_steps=5, **options)
    times, kappa = sampler.grid(process.schedule)
    _, alpha_t, m_t, m_s, sigma = ReMDM(num_steps=5, **options).grid(process.schedule)
    assert (sigma < m_s).any()
    sigma = jnp.minimum(sigma, m_s)
    z = jnp.asarray([[MASK], [REAL[1]]])
    output = jnp.broadcast_to(jnp.log(jnp.asarray([law.p[0], 1.0, *law.p[1:]], jnp.float32)), (2, 1, 4))
    for i in range(5):
        t, s = (jnp.full((2, 1), times[j]) for j in (i, i + 1))
        log_p = process.predict(output, z, t)
        step = kappa[i] * jnp.exp(process.reverse_law(log_p, z, t, s))
        step += (1 - kappa[i]) * jnp.exp(process.forward_law(log_p, s))
        reveal = (m_t[i] - m_s[i] + sigma[i] * alpha_t[i]) / m_t[i]
        np.testing.assert_allclose(step[0, 0, jnp.asarray(REAL)], reveal * law.p, atol=2e-6)
        np.testing.assert_allclose(step[1, 0, jnp.asarray([MASK, REAL[1]])], [sigma[i], 1 - sigma[i]], atol=2e-6)


def test_the_loop_of_psi_holds_its_time():
    schedule = LogLinear()
    times, kappa = Psi(num_steps=100, strategy="loop", eta=0.05).grid(schedule)
    assert len(times) == 101 and times[0] == 1 and times[-1] == pytest.approx(1e-5, rel=1e-3)
    assert (np.diff(times) <= 1e-7).all()
    held = np.abs(schedule.alpha(times[:-1]) - 0.9) < 1e-5
    assert 45 <= held.sum() <= 52
    np.testing.assert_allclose(np.asarray(kappa)[held][1:-2], 1 - 0.05 / 0.1, rtol=1e-4)
    assert (kappa[:44] == 1).all() and (kappa[-4:] == 1).all()


def test_what_psi_refuses():
    for options, told in (
        ({"eta": 0.1}, "eta does nothing with strategy = 'constant'"),
        ({"strategy": "cap", "kappa": 0.5}, "kappa does nothing with strategy = 'cap'"),
        ({"strategy": "cap", "alpha_on": 0.5}, "alpha_on does nothing"),
        ({"t_on": 0.1, "t_off": 0.2}, "t_off must be below t_on"),
        ({"strategy": "loop", "t_off": 1e-6}, "t_off must be above eps"),
        ({"strategy": "switch"}, "strategy must be one of constant, cap"),
        ({"greedy_tail": 1}, "greedy_tail must be True or False"),
    ):
        with pytest.raises(ValueError, match=told):
            Psi(**options)


# The entropy bound


def test_positions_within_a_bound():
    entropy = jnp.asarray([[0.3, 0.05, 9.0, 0.0, 0.04], [2.0, 1.0, 3.0, 0.5, 0.0]])
    among = jnp.asarray([[True, True, True, True, True], [True, True, True, False, False]])
    taken = within_bound(entropy, among, 0.1)
    # 0, then .04, .05 and .3 with 0, .04 and .09 before them; then 9 with .39 before it. The surest one always.
    assert taken.tolist() == [[True, True, False, True, True], [False, True, False, False, False]]
    assert within_bound(entropy, among, 100.0).tolist() == among.tolist()
    np.testing.assert_allclose(entropies(jnp.log(jnp.asarray([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))), [np.log(2), 0])


@pytest.mark.parametrize("process", [UNIFORM, Masked(VOCABULARY, Cosine())], ids=lambda p: type(p).__name__)
def test_the_entropy_bound_by_hand(process):
    """One sequence after another, step by step, with the same random numbers."""
    steps, bound, stop = 8, 0.9, 0.8
    sampler = EntropyBound(num_steps=steps, bound=bound, stop=stop)
    samples = fill(sampler, process, return_trace=True)
    keys, canvas = sequence_keys(0, BATCH), canvases()
    again_keys, token_keys = canvas_keys(keys, LENGTH)
    times = np.linspace(1, 1e-5, steps + 1).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=())
    def laws(z, i, keys_of_tokens, keys_again):
        t = jnp.full((1, 1), jnp.asarray(times)[i])
        s = jnp.full((1, 1), jnp.asarray(times)[jnp.minimum(i + 1, steps)])
        log_p = process.predict(network(z, t[:, 0]), z, t)
        drawn = draw_law(fold_step(keys_of_tokens, i[None]), log_p)
        again = draw_law(fold_step(keys_again, i[None]), process.forward_law(log_p, s))
        return log_p[0], drawn[0], again[0]

    early = []
    for b in range(BATCH):
        blank = np.flatnonzero(np.asarray(canvas[b]) == MASK)
        z = process.start(keys[b : b + 1], canvas[b : b + 1], canvas[b : b + 1] == MASK)
        states, before, passes = [canvas[b]], None, 0
        while len(blank) and passes <= steps:
            i = jnp.int32(passes)
            log_p, drawn, again = laws(z, i, token_keys[b : b + 1], again_keys[b : b + 1])
            p = np.exp(log_p, dtype=np.float64)
            entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
            best, now = p.argmax(axis=-1), np.array(z[0])
            passes += 1
            sure = entropy[blank].mean() <= stop and before is not None and (before == best)[blank].all()
            if sure or i == steps:
                noisy = [j for j in blank if sure or now[j] == MASK or isinstance(process, Uniform)]
                now[noisy] = best[noisy]
                if i == steps:  # the last step and the noise removal after it are one
                    states.pop()
                states.append(now)
                early.append(bool(sure and i < steps))
                break
            spent = 0.0
            for j in sorted(blank, key=lambda j: entropy[j]):
                now[j] = drawn[j] if spent <= bound else again[j]
                spent += entropy[j]
            z = jnp.asarray(now)[None]
            states.append(now)
            if isinstance(process, Masked) and (now != MASK).all():
                break
            before = best
        states += [states[-1]] * (steps + 1 - len(states))
        np.testing.assert_array_equal(samples.trace[:, b], np.stack(states), err_msg=f"sequence {b}")
        np.testing.assert_array_equal(samples.tokens[b], states[-1])
        assert samples.passes[b] == passes
    assert any(early) or isinstance(process, Masked)


def test_padding_is_left_alone():
    valid = jnp.arange(LENGTH)[None] < jnp.asarray([7, 5, 7, 3, 1])[:, None]
    for sampler in (EntropyBound(num_steps=4), Psi(num_steps=4)):
        tokens = fill(sampler, UNIFORM, valid=valid).tokens
        assert (tokens == canvases())[~valid].all() and (tokens != MASK)[valid].all()
