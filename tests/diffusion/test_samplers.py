"""What every sampler must keep, ancestral sampling against its definition, and what each refuses."""

import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffrwkv.diffusion import samplers
from diffrwkv.diffusion.noise import NO_TOKEN, categorical, uniform
from diffrwkv.diffusion.processes import PROCESSES, Masked, NextToken, Scheduled, Vocabulary
from diffrwkv.diffusion.samplers import SAMPLERS, Ancestral, BlockCached, FrozenCache, Guided, StepFns, sequence_keys
from diffrwkv.diffusion.samplers.common import time_of_share, truncate, truncated_law
from diffrwkv.diffusion.schedules import SCHEDULES, Linear, LogLinear
from tests.diffusion.unknown_process import Unknown
from tests.thin import slow

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
STEP, LOGITS = np.load(FOLDER / "mdlm_sampler_step.npz"), np.load(FOLDER / "mdlm_logits.npz")
VOCABULARY, MASK = 7, 5  # the mask need not be the last token
PROCESS = Masked(Vocabulary(VOCABULARY, MASK))
NAMES = sorted(name for name, cls in SAMPLERS.items() if cls.face == "denoise" and issubclass(Masked, cls.needs))
# What the tests of all samplers walk: each with its defaults, and the options that change its loop.
CASES = {name: {} for name in NAMES} | {
    "confidence, blocks": {"block": 4, "score": "random"},
    "confidence, threshold": {"block": 5, "rule": "threshold", "threshold": 0.3, "score": "entropy"},
    "ice, short": {"answer_length": 3},
    "remdm, conf": {"strategy": "conf"},
    "remdm, loop": {"strategy": "loop"},
    "psi, loop": {"strategy": "loop"},
}
ONCE = ("ancestral", "confidence", "first_hitting", "ice", "prophet")  # these never take a token back
STEPS = 9  # most tests share this number and one shape, so that few programs are compiled


def denoise(z_t, t):
    """A network that looks at its neighbours and the time, and that would love to predict the mask.

    A row's logits are sums of integers, so they are the same bits in every batch.
    """
    left = jnp.pad(z_t, ((0, 0), (1, 0)))[:, :-1]
    right = jnp.pad(z_t, ((0, 0), (0, 1)))[:, 1:]
    mixed = (3 * left + 5 * z_t + 7 * right)[..., None] * jnp.arange(1, VOCABULARY + 1)
    logits = (mixed % 4).astype(jnp.float32) * (1 + jnp.round(4 * t))[:, None, None] / 4
    return logits.at[..., MASK].set(30.0)


def name_of(case):
    return case.split(",")[0]


def fields(name):
    return [field.name for field in dataclasses.fields(SAMPLERS[name])]


def build(case, **options):
    """The sampler of a case, with those of the options that it has and that count."""
    name = name_of(case)
    if CASES[case].get("rule", "steps") != "steps":
        options.pop("num_steps", None)
    return SAMPLERS[name](**CASES[case] | {k: v for k, v in options.items() if k in fields(name)})


@functools.partial(jax.jit, static_argnames=("sampler", "process", "return_trace"))
def compiled(sampler, keys, canvas, valid, broken, process, return_trace):
    def network(z_t, t):
        return jnp.where(broken[:, None, None], jnp.nan, denoise(z_t, t))

    return sampler(process, network, keys, canvas, valid=valid, return_trace=return_trace)


def generate(sampler, keys, canvas, valid=None, process=PROCESS, broken=(), return_trace=True):
    """Samples, where the network gives NaN for the rows `broken`: an input, so that one program does for both."""
    broken = np.isin(np.arange(len(canvas)), broken)
    return compiled(sampler, keys, canvas, valid, broken, process, return_trace)


def canvases(batch=4, length=13):
    """A prompt, scattered givens, nothing given, everything given."""
    canvas = np.full((batch, length), MASK, np.int32)
    canvas[0, :5] = 2
    canvas[1, 1::3] = 4
    canvas[3] = np.arange(length) % 5
    return jnp.asarray(canvas)


# Against the original


@pytest.mark.parametrize("name", ["default", "timecond"])
def test_one_step_matches_mdlm(name):
    mask_id, x = int(STEP["mask_index"]), jnp.asarray(STEP["xt"], jnp.int32)
    t, s = jnp.asarray(STEP["t"])[:, None], jnp.asarray(STEP["t"] - STEP["dt"])[:, None]
    p_x0, masked = STEP[f"cache_p_x0_{name}"], STEP["xt"] == mask_id
    for kind, schedule in (("cache", Linear()), ("ddpm", LogLinear())):
        process = Masked(Vocabulary(p_x0.shape[-1], mask_id), schedule)
        ours = np.exp(process.reverse_law(jnp.log(p_x0), x, t, s))
        theirs = STEP[f"{kind}_q_xs_{name}"]
        theirs = theirs / theirs.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(ours[masked], theirs[masked], rtol=1e-5, atol=1e-6)
        drawn = np.argmax(ours / (1e-10 - np.log(STEP["u"] + 1e-10)), axis=-1)
        np.testing.assert_array_equal(drawn, STEP[f"{kind}_x_next_{name}"])


def test_p_x0_matches_mdlm():
    logits, mask_id = jnp.asarray(LOGITS["logits_raw_sigma0"]), int(LOGITS["mask_index"])
    process = Masked(Vocabulary(logits.shape[-1], mask_id))
    ours = jnp.exp(process.predict(logits, jnp.asarray(LOGITS["xt"], jnp.int32), None))
    np.testing.assert_allclose(ours, STEP["cache_p_x0_default"], atol=1e-5)


# Against the definition


def exact_law(sampler, process, denoise_fn, length):
    """The law of the final sequence, by summing `reverse_law` over all paths along the grid."""
    size = process.vocabulary.size
    states = list(itertools.product(range(size), repeat=length))
    z = jnp.asarray(states, jnp.int32)

    def of_states(p):
        """[n, size^length] from the laws of each position, [n, length, size]."""
        return np.stack([p[:, range(length), state].prod(axis=1) for state in states], axis=1)

    @jax.jit
    def predict(t):
        return process.predict(denoise_fn(z, t), z, t[:, None])

    @jax.jit
    def step(t, s):
        return jnp.exp(process.reverse_law(predict(t), z, t[:, None], s[:, None]))

    # Linear's alpha is 0 at 1: there all is noise.
    clean = process.vocabulary.without_mask(jnp.zeros((1, length, size)))
    noise = dataclasses.replace(process, schedule=Linear()).forward_law(clean, jnp.ones((1, 1)))
    law = of_states(np.asarray(jax.nn.softmax(noise, axis=-1), np.float64))[0]
    times = np.linspace(1, sampler.eps, sampler.num_steps + 1, dtype=np.float32)
    times = np.repeat(times[:, None], len(states), axis=1)
    for t, s in itertools.pairwise(times):
        possible = law > 0
        law = law[possible] @ of_states(np.asarray(step(t, s), np.float64)[possible])
    best = np.where(process.noised(z), np.asarray(predict(times[-1])).argmax(axis=-1), z)
    final = np.zeros_like(law)
    for p, state in zip(law, best, strict=True):
        final[states.index(tuple(state))] += p
    return {state: p for state, p in zip(states, final, strict=True) if p > 0}


def fits(tokens, law):
    """P-value of the samples [N, L] under the law."""
    found, counts = np.unique(tokens, axis=0, return_counts=True)
    counts = dict(zip(map(tuple, found.tolist()), counts, strict=True))
    assert set(counts) <= set(law)
    observed = np.asarray([counts.get(state, 0) for state in law])
    expected = np.asarray(list(law.values())) * len(tokens)
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.parametrize(
    "name, cache, schedule",
    [("masked", True, "cosine"), ("masked", False, "loglinear"), ("unknown", True, "cosine")]
    + [(name, True, "loglinear") for name, cls in PROCESSES.items() if issubclass(cls, Scheduled) and cls != Masked],
)
def test_the_loop_has_the_law_of_the_definition(name, cache, schedule):
    # A denoiser that is no posterior of anything and looks at t, so that the law depends on every
    # step of the chain.
    table = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 2, 4)), jnp.float32)

    def denoise_fn(z, t):
        return 2 * table[z[:, 0], z[:, 1]] * jnp.cos(3 * t)[:, None, None]

    sampler, masks = Ancestral(num_steps=3, cache=cache, eps=0.1), name in ("masked", "unknown")
    process = PROCESSES["masked" if masks else name](Vocabulary(4, 1), SCHEDULES[schedule]())
    law = exact_law(sampler, process, denoise_fn, length=2)
    assert sum(law.values()) == pytest.approx(1, abs=1e-5) and (len(law) == 9 or not masks)
    canvas, seen_as = jnp.full((30_000, 2), 1, jnp.int32), Unknown(process) if name == "unknown" else process
    samples = jax.jit(lambda keys: sampler(seen_as, denoise_fn, keys, canvas))(sequence_keys(1, 30_000))
    assert fits(np.asarray(samples.tokens), law) > 1e-3
    skewed = {state: p * (1.05 if i % 2 else 0.95) for i, (state, p) in enumerate(law.items())}
    assert fits(np.asarray(samples.tokens), skewed) < 1e-3  # the test sees a difference of 5 %
    if name != "masked":
        assert (samples.passes == 4).all()


def test_an_exact_denoiser_and_many_steps_give_the_data_law():
    states = np.asarray(list(itertools.product(range(3), repeat=3)))
    joint = np.random.default_rng(1).gamma(0.5, size=27) + 0.01
    joint /= joint.sum()

    def denoise_fn(z, t):
        agrees = ((z[:, None] == states[None]) | (z[:, None] == 3)).all(axis=-1)
        one_hot = jax.nn.one_hot(states, 4)
        return jnp.log(jnp.einsum("bs,slv->blv", agrees * jnp.asarray(joint, jnp.float32)[None], one_hot))

    sampler, process = Ancestral(num_steps=1000), Masked(Vocabulary(4, 3), Linear())
    canvas = jnp.full((10_000, 3), 3, jnp.int32)
    sample = jax.jit(lambda keys, canvas: sampler(process, denoise_fn, keys, canvas))
    samples = sample(sequence_keys(0, 10_000), canvas)
    assert fits(np.asarray(samples.tokens), dict(zip(map(tuple, states.tolist()), joint, strict=True))) > 1e-3
    assert int(samples.passes.max()) == 3  # and not 1000

    # Infilling has the conditional law.
    given = canvas.at[:, 1].set(2)
    tokens = sample(sequence_keys(1, 10_000), given).tokens
    law = {tuple(state): p for state, p in zip(states.tolist(), joint, strict=True) if state[1] == 2}
    assert fits(np.asarray(tokens), {state: p / sum(law.values()) for state, p in law.items()}) > 1e-3


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_the_compiled_loop_equals_a_plain_python_loop(options):
    sampler = Ancestral(num_steps=STEPS, **options)
    keys, canvas = sequence_keys(5, 4), canvases()
    samples = generate(sampler, keys, canvas)
    times = np.linspace(1, sampler.eps, sampler.num_steps + 1).astype(np.float32)
    masked = LogLinear().mask_probability(times)
    position_keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(26)))(keys)
    u = jax.vmap(jax.vmap(uniform))(position_keys[:, ::2])

    @jax.jit
    def draw(logits):
        logits = truncate(logits.at[..., MASK].set(-jnp.inf), sampler.temperature, sampler.top_p)
        return jax.vmap(jax.vmap(categorical))(position_keys[:, 1::2], logits)

    z, trace = np.asarray(canvas), [np.asarray(canvas)]
    for step in range(sampler.num_steps):
        reveal = (z == MASK) & (u >= masked[step + 1] / masked[0])
        z = np.where(reveal, draw(denoise(jnp.asarray(z), jnp.full(4, times[step]))), z)
        trace.append(z)
    logits = denoise(jnp.asarray(z), jnp.full(4, times[-1])).at[..., MASK].set(-jnp.inf)
    trace[-1] = np.where(z == MASK, logits.argmax(axis=-1), z)
    np.testing.assert_array_equal(samples.tokens, trace[-1])
    np.testing.assert_array_equal(samples.trace, np.stack(trace))


# Properties of every sampler


each_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("case, num_steps", [*((case, STEPS) for case in CASES), *((name, 1) for name in NAMES)])
def test_given_tokens_never_change_and_everything_else_is_filled(case, num_steps):
    canvas, sampler = canvases(), build(case, num_steps=num_steps, temperature=1.0)
    samples = generate(sampler, sequence_keys(0, 4), canvas)
    assert samples.tokens.dtype == samples.passes.dtype == jnp.int32
    assert samples.trace.shape[0] in (num_steps + 1, canvas.shape[1] + 1) and samples.trace.shape[1:] == canvas.shape
    np.testing.assert_array_equal(samples.trace[0], canvas)
    np.testing.assert_array_equal(samples.trace[-1], samples.tokens)
    assert (samples.tokens != MASK).all() and (samples.tokens >= 0).all() and (samples.tokens < VOCABULARY).all()
    assert ((canvas == MASK) | (samples.trace == canvas)).all()
    before, after = samples.trace[:-1], samples.trace[1:]
    blanks = (canvas == MASK).sum(axis=1)
    assert samples.passes[3] == 0 and (samples.passes[:3] > 0).all()
    if name_of(case) in ONCE:
        assert ((before == MASK) | (before == after)).all()
        assert (samples.passes <= blanks).all()
    if case in ("ancestral", "remdm"):
        assert (samples.passes <= num_steps + 1).all()
    again = generate(sampler, sequence_keys(0, 4), canvas)
    np.testing.assert_array_equal(again.tokens, samples.tokens)


@each_case
def test_a_sample_does_not_change_with_its_batch(case):
    sampler, canvas, keys = build(case, num_steps=STEPS, temperature=1.0), canvases(), sequence_keys(3, 4)
    whole = generate(sampler, keys, canvas)
    order = jnp.asarray([2, 0, 3, 2])
    shuffled = generate(sampler, keys[order], canvas[order])
    np.testing.assert_array_equal(shuffled.tokens, whole.tokens[order])
    np.testing.assert_array_equal(shuffled.passes, whole.passes[order])
    for i in range(3):
        alone = generate(sampler, sequence_keys(3, 1, start=i), canvas[i : i + 1], return_trace=False)
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[i])
        assert alone.passes[0] == whole.passes[i]
    other = generate(sampler, sequence_keys(4, 4), canvas)
    assert (other.tokens[2] != whole.tokens[2]).any() or case in ("prophet", "ice")  # which leave by the most probable


@pytest.mark.parametrize(
    "case, temperature",
    [(c, t) for c in NAMES for t in (1.0, 0.0)]
    + [(c, 1.0) for c in CASES if c not in NAMES]
    + [slow((c, 0.0)) for c in CASES if c not in NAMES],
)
def test_what_is_not_finite_is_no_token(case, temperature):
    """In the sequence that it is about, of which each blank is such; and it comes to an end."""
    sampler, keys, canvas = build(case, num_steps=STEPS, temperature=temperature), sequence_keys(3, 4), canvases()
    tokens = generate(sampler, keys, canvas, broken=1).tokens
    expected = generate(sampler, keys, canvas).tokens
    expected = expected.at[1].set(jnp.where(canvas[1] == MASK, NO_TOKEN, canvas[1]))
    np.testing.assert_array_equal(tokens, expected)


@each_case
def test_padding_is_left_alone_and_changes_nothing(case):
    sampler, keys, short = build(case, num_steps=STEPS, temperature=1.0), sequence_keys(0, 4), canvases()
    # The pad stands for the 0 that this denoiser sees beyond the end; the last column tries a mask
    # as padding.
    long = jnp.concatenate([short, jnp.zeros((4, 2), jnp.int32), jnp.full((4, 1), MASK)], axis=1)
    valid = jnp.broadcast_to(jnp.arange(16)[None] < 13, long.shape)
    samples, expected = generate(sampler, keys, long, valid), generate(sampler, keys, short)
    np.testing.assert_array_equal(samples.tokens[:, :13], expected.tokens)
    np.testing.assert_array_equal(samples.tokens[:, 13:], long[:, 13:])
    np.testing.assert_array_equal(samples.passes, expected.passes)


class Watched:
    """A sampler whose passes are counted, as they run and as they are traced, and whose steps are shown."""

    def __init__(self, sampler, process=PROCESS, network=None):
        self.ran, self.traced, self.seen = [], [], []

        def counted(z_t, t):
            self.traced.append(1)
            jax.debug.callback(lambda: self.ran.append(1))
            return denoise(z_t, t)

        def show(z):
            jax.debug.callback(lambda z: self.seen.append(np.array(z)), z, ordered=True)

        @jax.jit
        def run(keys, canvas):
            return sampler(process, network or counted, keys, canvas, return_trace=True, on_step=show)

        self.run = run

    def __call__(self, keys, canvas):
        """(samples, how often the network ran, how often it was traced, what on_step saw [N, B, L]), of this call."""
        for told in (self.ran, self.traced, self.seen):
            told.clear()
        samples = self.run(keys, canvas)
        jax.effects_barrier()
        return samples, len(self.ran), len(self.traced), np.reshape(self.seen, (-1, *canvas.shape))


@functools.cache
def watched(case):
    """One for the tests of a case, which then compile one program."""
    watched = Watched(build(case, num_steps=STEPS, temperature=1.0))
    first = watched(sequence_keys(0, 4), canvases())
    return watched, first


@each_case
def test_a_batch_runs_as_many_passes_as_its_busiest_sequence_and_compiles_once(case):
    run, (samples, ran, traced, _) = watched(case)
    assert ran == samples.passes.max() and traced > 0
    given = jnp.broadcast_to(canvases()[3], (4, 13))
    samples, ran, traced, _ = run(sequence_keys(7, 4), given)  # nothing to generate: the network does not run
    np.testing.assert_array_equal(samples.tokens, given)
    assert samples.passes.tolist() == [0] * 4 and (ran, traced) == (0, 0)  # and nothing is traced


@pytest.mark.parametrize("name", NAMES)
def test_samplers_are_values_that_config_can_build(name):
    options = {"num_steps": 3} if "num_steps" in fields(name) else {"temperature": 0.5}
    sampler = samplers.from_config(name, **options)
    again = SAMPLERS[name](**options)
    assert sampler == again and hash(sampler) == hash(again)
    one = generate(sampler, sequence_keys(0, 1), jnp.full((1, 1), MASK)).tokens
    assert one.shape == (1, 1) and one[0, 0] != MASK


@each_case
def test_dtypes_and_ranks_are_never_promoted(case):
    sampler = build(case, num_steps=2, temperature=0.5, top_p=0.5, top_k=3)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        flat = jnp.zeros((2, 3, VOCABULARY), jnp.bfloat16)
        process, canvas = Masked(Vocabulary(VOCABULARY, 0)), jnp.zeros((2, 3), jnp.int32)
        jax.eval_shape(
            lambda keys: sampler(process, lambda z, t: flat, keys, canvas, return_trace=True), sequence_keys(0, 2)
        )


def one_after_another(states):
    """The states [N, ...] without those that repeat the one before."""
    return [z for i, z in enumerate(states) if i == 0 or (z != states[i - 1]).any()]


@each_case
def test_on_step_sees_what_the_trace_has(case):
    samples, *_, seen = watched(case)[1]
    assert len(seen) == samples.passes.max()
    for row in range(4):
        trace, told = (one_after_another(states[:, row]) for states in (np.asarray(samples.trace), seen))
        if name_of(case) in ONCE:
            np.testing.assert_array_equal(one_after_another([*told, samples.tokens[row]]), trace)
        rest = iter(trace)
        assert all(any((z == entry).all() for entry in rest) for z in told)  # in this order


def test_on_step_of_guidance_sees_what_is_given():
    samples, *_, seen = Watched(Guided(Ancestral(num_steps=STEPS), 1.0))(sequence_keys(0, 4), canvases())
    assert (seen[:, 0, :5] == 2).all() and len(seen) == samples.passes.max() // 2


def test_on_step_of_one_token_after_another_sees_what_the_trace_has():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)
    network = StepFns(lambda batch, room: (), lambda tokens, state: (table[tokens], state))
    run = Watched(samplers.Autoregressive(), NextToken(PROCESS.vocabulary), network)
    samples, *_, seen = run(sequence_keys(0, 4), canvases())
    np.testing.assert_array_equal(seen, samples.trace[:-1])


# Ancestral sampling


def test_every_step_is_taken_where_noise_is_no_mask():
    """What is given stays, and the options act on what is predicted and not on the pace."""
    process, keys = Unknown(PROCESS), sequence_keys(0, 4)
    canvas = jnp.concatenate([canvases(), jnp.full((4, 1), MASK)], axis=1)
    valid = jnp.broadcast_to(jnp.arange(14)[None] < 13, canvas.shape)
    samples = generate(Ancestral(num_steps=STEPS), keys, canvas, valid, process)
    trace = np.asarray(samples.trace)
    assert samples.passes.tolist() == [STEPS + 1] * 3 + [0] and trace.shape == (STEPS + 1, *canvas.shape)
    assert (((canvas == MASK) & valid) | (trace == canvas)).all() and (trace[-1, :, :13] != MASK).all()
    np.testing.assert_array_equal(trace[0], canvas)
    np.testing.assert_array_equal(trace[-1], samples.tokens)
    assert ((trace[:-1] == MASK) | (trace[:-1] == trace[1:])).all()
    alone = generate(Ancestral(num_steps=STEPS), keys[1:2], canvas[1:2, :13], None, process)
    np.testing.assert_array_equal(alone.tokens[0], samples.tokens[1, :13])
    given = generate(Ancestral(num_steps=STEPS), keys[3:], canvas[3:], valid[3:], process)
    np.testing.assert_array_equal(given.tokens, canvas[3:])
    greedy = generate(Ancestral(num_steps=STEPS, temperature=0.0), keys, canvas, valid, process)
    assert (greedy.tokens != samples.tokens).any()


def test_a_truncated_law_is_a_law():
    log_p = jnp.log(jnp.asarray([[0.1, 0.0, 0.5, 0.15, 0.25]]))
    np.testing.assert_allclose(jnp.exp(truncated_law(log_p, 1.0, 0.7, 0)), [[0, 0, 2 / 3, 0, 1 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(jnp.exp(truncated_law(log_p, 0.0, 1.0, 0)), [[0, 0, 1, 0, 0]])


def test_cached_and_uncached_samples_are_the_same():
    options = {"temperature": 0.7, "top_p": 0.8}
    keys, canvas = sequence_keys(0, 4), canvases()
    cached = generate(Ancestral(num_steps=STEPS, **options), keys, canvas)
    plain = generate(Ancestral(num_steps=STEPS, cache=False, **options), keys, canvas)
    np.testing.assert_array_equal(cached.trace, plain.trace)
    # A pass for each step that shows something new, against one for each step up to the last such.
    changes = np.asarray((cached.trace[1:] != cached.trace[:-1]).any(axis=-1))
    last = [np.flatnonzero(column)[-1] + 1 if column.any() else 0 for column in changes.T]
    # Noise removal shares the trace's last entry with the last step, and may cost a pass of its
    # own.
    assert ((cached.passes - changes.sum(axis=0)) >= 0).all() and ((cached.passes - changes.sum(axis=0)) <= 1).all()
    assert ((plain.passes - np.asarray(last)) >= 0).all() and ((plain.passes - np.asarray(last)) <= 1).all()
    assert (cached.passes <= plain.passes).all()


def test_many_steps_cost_no_more_passes_than_there_are_blanks():
    calls = []

    def counted(z_t, t):
        jax.debug.callback(lambda: calls.append(1))
        return denoise(z_t, t)

    sampler = Ancestral(num_steps=500)
    samples = jax.jit(lambda keys: sampler(PROCESS, counted, keys, jnp.full((16, 8), MASK)))(sequence_keys(0, 16))
    jax.effects_barrier()
    assert len(calls) == samples.passes.max() <= 8


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_each_step_reveals_its_share(name):
    sampler, schedule = Ancestral(num_steps=4), SCHEDULES[name]()
    steps = np.asarray(sampler._reveal_steps(schedule, sequence_keys(0, 10_000)[None]))
    masked = np.asarray(schedule.mask_probability(sampler.times()), np.float64)
    p = -np.diff(np.append(masked, 0)) / masked[0]
    counts = np.bincount(steps[0], minlength=6)[1:]
    assert steps.min() >= 1 and steps.max() <= 5 and counts[-1] <= 30  # Geometric leaves 10 to noise removal
    assert scipy.stats.chisquare(counts[:-1], p[:-1] / p[:-1].sum() * counts[:-1].sum()).pvalue > 1e-3


def test_zero_temperature_and_a_tiny_nucleus_take_the_most_probable_token():
    keys, canvas = sequence_keys(0, 4), canvases()

    def untied(z_t, t):
        return denoise(z_t, t) + 1e-3 * jnp.arange(VOCABULARY)[None, None]

    def run(**options):
        sampler = Ancestral(num_steps=STEPS, **options)
        return jax.jit(lambda: sampler(PROCESS, untied, keys, canvas).tokens)()

    greedy = run(temperature=0.0)
    np.testing.assert_array_equal(greedy, run(top_p=1e-6))
    assert (greedy != MASK).all()


def test_temperature_and_top_p_act_on_the_tokens_and_not_on_the_pace():
    keys, canvas = sequence_keys(0, 4), canvases()
    plain = generate(Ancestral(num_steps=STEPS), keys, canvas)
    sharp = generate(Ancestral(num_steps=STEPS, temperature=0.7, top_p=0.8), keys, canvas)
    np.testing.assert_array_equal(plain.trace[:-1] == MASK, sharp.trace[:-1] == MASK)
    assert (plain.tokens != sharp.tokens).any()


def test_truncate():
    p = jnp.asarray([[0.1, 0.0, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25, 0.0]])

    def kept(top_p, temperature=1.0):
        return np.flatnonzero(np.isfinite(truncate(jnp.log(p), temperature, top_p)[0])).tolist()

    assert kept(1.0) == [0, 2, 3, 4] and kept(0.95) == [0, 2, 3, 4]
    assert kept(0.85) == [2, 3, 4] and kept(0.7) == [2, 4] and kept(0.45) == [2] and kept(1e-9) == [2]
    assert kept(0.76, temperature=0.1) == [2]  # temperature first
    assert np.isfinite(truncate(jnp.log(p), 1.0, 0.3))[1].sum() == 4  # ties stay together
    np.testing.assert_allclose(
        jax.nn.softmax(truncate(jnp.log(p), 0.5, 1.0)),
        p**2 / (p**2).sum(-1, keepdims=True),
        rtol=1e-5,
    )
    huge = truncate(jnp.asarray([3e38, 1e38, -jnp.inf]), 1e-3, 1.0)
    assert huge[0] == 0 and not np.isnan(huge).any()


def test_truncate_to_the_most_probable_k():
    p = jnp.asarray([[0.1, 0.0, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25, 0.0]])

    def kept(top_k, top_p=1.0, row=0):
        return np.flatnonzero(np.isfinite(truncate(jnp.log(p), 1.0, top_p, top_k)[row])).tolist()

    assert kept(1) == [2] and kept(2) == [2, 4] and kept(3) == [2, 3, 4] and kept(4) == kept(5) == kept(0) == kept(9)
    assert kept(2, row=1) == [0, 1, 2, 3]  # ties stay together
    assert kept(2, top_p=0.6) == [2]  # of the two that are left 0.5 is two thirds
    assert kept(3, top_p=0.6) == [2, 4]


def test_sequence_keys_number_the_sequences_of_a_seed():
    keys = jax.random.key_data(sequence_keys(7, 5))
    np.testing.assert_array_equal(jax.random.key_data(sequence_keys(7, 3, start=2)), keys[2:])
    assert len(np.unique(keys, axis=0)) == 5
    assert (jax.random.key_data(sequence_keys(8, 5)) != keys).any(axis=1).all()
    with pytest.raises(ValueError, match="n >= 1"):
        sequence_keys(0, 0)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_time_of_a_share_of_masks(name):
    blank, schedule = jnp.arange(4)[None] < jnp.asarray([[0], [4], [4], [4]]), SCHEDULES[name]()
    t = time_of_share(schedule, blank & (jnp.arange(4)[None] < jnp.asarray([[0], [0], [2], [4]])), blank)
    assert ((t >= 0) & (t <= 1)).all() and t[1] < t[2] < t[3]
    np.testing.assert_allclose(t[3], 1.0, atol=1e-3)
    expected = schedule.mask_probability(jnp.ones(())) / 2
    np.testing.assert_allclose(schedule.mask_probability(t[2]), expected, rtol=1e-5)


# Errors come before any compute


BAD = [
    {"num_steps": 0},
    {"num_steps": 2.5},
    {"num_steps": True},
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"top_k": 1.5},
    {"eps": 0.0},
    {"block": 0},
    {"block": 1.5},
    {"score": "certainty"},
    {"rule": "all"},
    {"rule": "threshold", "score": "random"},
    {"threshold": 0.0},
    {"threshold": 1.01},
    {"factor": 0.0},
    {"answer_length": 0},
    {"gaps": (1.0, 2.0)},
    {"gaps": (1.0, 2.0, -3.0)},
    {"strategy": "switch"},
    {"eta": 0.0},
    {"eta": 1.5},
    {"t_on": 1.0},
    {"t_off": 0.0},
    {"alpha_on": 1.0},
]


@pytest.mark.parametrize(
    "name, options", [(n, o) for n in NAMES for o in BAD if set(o) <= set(fields(n))], ids=lambda v: str(v)
)
def test_bad_options_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SAMPLERS[name](**options)


def test_choices_are_listed():
    with pytest.raises(ValueError, match="probability, margin, entropy, random"):
        SAMPLERS["confidence"](score="certainty")
    with pytest.raises(ValueError, match="has no option remask; it has num_steps"):
        samplers.from_config("confidence", remask=1)
    for name in ("unheard_of", None):
        with pytest.raises(ValueError, match=f"called {name!r}; choose one of {', '.join(sorted(SAMPLERS))}"):
            samplers.from_config(name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_process_that_does_not_fit_is_refused(name):
    sampler, cls = SAMPLERS[name](), SAMPLERS[name]
    for process in (PROCESS, Unknown(PROCESS), NextToken(PROCESS.vocabulary)):
        assert sampler.fits(process) == isinstance(process, cls.needs)
        if not sampler.fits(process):
            told = f"{cls.__name__} samples from {cls.needs.__name__} processes, not {type(process).__name__}"
            with pytest.raises(TypeError, match=told):
                sampler(process, None, sequence_keys(0, 4), canvases())


@pytest.mark.parametrize(
    "sampler, process, told",
    [
        (Guided(Ancestral(), 1.0), Unknown(PROCESS), "Guided samples from Masked processes, not Unknown"),
        (FrozenCache(Ancestral()), Unknown(PROCESS), "FrozenCache samples from Masked processes, not Unknown"),
        (BlockCached(samplers.Confidence(), 4), Unknown(PROCESS), "Confidence samples from Masked processes, not Un"),
        (BlockCached(Ancestral(), 4), NextToken(PROCESS.vocabulary), "Ancestral samples from Reversible processes"),
    ],
    ids=["guided", "frozen", "blocks", "blocks, ancestral"],
)
def test_wrappers_ask_the_sampler_that_they_wrap(sampler, process, told):
    assert sampler.fits(PROCESS) and not sampler.fits(process)
    with pytest.raises(TypeError, match=told):
        sampler(process, None, sequence_keys(0, 4), canvases())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"canvas": jnp.zeros((2, 0), jnp.int32)}, ValueError, "nothing to generate"),
        ({"canvas": jnp.zeros((0, 3), jnp.int32)}, ValueError, "B, L >= 1"),
        ({"canvas": jnp.zeros(3, jnp.int32)}, ValueError, r"shape \[B, L\]"),
        ({"canvas": jnp.zeros((2, 3))}, TypeError, "int32"),
        ({"keys": sequence_keys(0, 3)}, ValueError, "one key per sequence"),
        ({"keys": jax.random.key(0)}, ValueError, "one key per sequence"),
        ({"keys": np.zeros((2, 2), np.uint32)}, TypeError, "sequence_keys"),
        ({"keys": None}, TypeError, "sequence_keys"),
        ({"keys": jax.random.split(jax.random.key(0, impl="rbg"), 2)}, ValueError, "threefry"),
        ({"valid": jnp.ones((2, 3))}, ValueError, "bool"),
        ({"valid": jnp.ones((2, 4), bool)}, ValueError, "bool"),
        ({"process": Masked(Vocabulary(VOCABULARY + 1, MASK))}, ValueError, "one number for each id"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_calls_are_refused(name, change, error, message):
    given = {"process": PROCESS, "keys": sequence_keys(0, 2), "canvas": jnp.full((2, 3), MASK)} | change
    sampler, logits = build(name, num_steps=2), jnp.zeros((2, 3, VOCABULARY))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: sampler(network=lambda z, t: logits, **given))


# Guidance


def test_guidance_of_nothing_is_the_sampler_itself():
    canvas, keys = canvases(), sequence_keys(0, 4)
    plain = generate(Ancestral(num_steps=STEPS), keys, canvas)
    none = generate(Guided(Ancestral(num_steps=STEPS), 0.0), keys, canvas)
    np.testing.assert_array_equal(none.tokens, plain.tokens)
    np.testing.assert_array_equal(none.passes, plain.passes)
    guided = generate(Guided(Ancestral(num_steps=STEPS), 2.0), keys, canvas)
    np.testing.assert_array_equal(guided.passes, 2 * plain.passes)
    np.testing.assert_array_equal(guided.tokens[2], plain.tokens[2])  # nothing given, so nothing to be guided to
    assert (guided.tokens[1] != plain.tokens[1]).any() and (guided.tokens[1, 1::3] == 4).all()


def test_guidance_needs_a_diffusion_sampler_and_a_scale():
    with pytest.raises(ValueError, match="Guided runs a sampler of the face 'denoise', not Autoregressive"):
        Guided(samplers.Autoregressive(), 1.0)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="at least 0"):
            Guided(Ancestral(), scale)
