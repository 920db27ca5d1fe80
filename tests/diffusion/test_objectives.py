import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.cross_entropy import cross_entropy
from diffrwkv.diffusion.objectives import MDLM, OBJECTIVES, Blocks, Diffusion
from diffrwkv.diffusion.processes import Masked, NextToken, Vocabulary
from diffrwkv.diffusion.schedules import SCHEDULES, Cosine, Linear, LogLinear

pytestmark = pytest.mark.optimised
FOLDER = pathlib.Path(__file__).parents[1] / "golden"
LOSS, LOGITS = np.load(FOLDER / "mdlm_loss.npz"), np.load(FOLDER / "mdlm_logits.npz")
MASK = int(LOGITS["mask_index"])


def build(name="mdlm", schedule="loglinear", mask_id=MASK, **options):
    sections = {"objectives": {name: options}}
    return objectives.from_config(Vocabulary(mask_id + 1, mask_id), name=name, schedule=schedule, sections=sections)


def golden_loss(logits, valid=None):
    """Our loss at the original's own z_t, times and logits."""
    x, z_t, t = (jnp.asarray(LOSS[k]) for k in ("x0", "xt", "t"))
    return build().loss_at(jnp.asarray(LOGITS[logits]), x.astype(jnp.int32), z_t.astype(jnp.int32), t[:, None], valid)


def test_subs_log_probs_match_mdlm():
    ours = build().process.predict(jnp.asarray(LOGITS["logits_raw"]), jnp.asarray(LOGITS["xt"], jnp.int32), None)
    theirs = LOGITS["log_probs_subs"]  # they write -1e6 for impossible
    np.testing.assert_allclose(np.exp(ours), np.exp(theirs), atol=1e-6)
    possible = theirs > -1e5
    np.testing.assert_array_equal(np.isfinite(ours), possible)
    np.testing.assert_allclose(np.asarray(ours)[possible], theirs[possible], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logits, name", [("logits_raw", "timecond"), ("logits_raw_sigma0", "default")])
def test_token_losses_match_mdlm(logits, name):
    loss = golden_loss(logits)
    np.testing.assert_allclose(loss.token_nats, LOSS[f"token_loss_{name}"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss.nats, LOSS[f"token_loss_{name}"].sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(loss.noised, LOSS["move"])


def test_weights_match_mdlm():
    np.testing.assert_allclose(LogLinear().weight(jnp.asarray(LOSS["t"])), LOSS["weight"], rtol=1e-5)
    np.testing.assert_allclose(LogLinear().sigma(jnp.asarray(LOSS["t"])), LOSS["sigma"], rtol=1e-5)
    np.testing.assert_allclose(LogLinear().dsigma(jnp.asarray(LOSS["t"])), LOSS["dsigma"], rtol=1e-5)


def test_reductions_match_mdlm_with_and_without_padding():
    loss = golden_loss("logits_raw")
    np.testing.assert_allclose(loss.nats.sum() / loss.tokens.sum(), LOSS["loss_timecond"], rtol=1e-5)
    assert loss.tokens.tolist() == [40, 40, 40]
    valid = jnp.asarray(LOSS["attention_mask"] > 0)
    loss = golden_loss("logits_raw", valid)
    np.testing.assert_allclose(loss.nats.sum() / loss.tokens.sum(), LOSS["loss_timecond_masked"], rtol=1e-5)
    np.testing.assert_array_equal(loss.tokens, LOSS["attention_mask"].sum(axis=1))


def test_change_of_variables_and_discrete_time_are_other_weights_of_the_same_draw():
    x, masked = jnp.asarray(LOSS["x0"], jnp.int32), LOSS["move"]
    nats = np.asarray(cross_entropy(jnp.asarray(LOGITS["logits_raw_sigma0"]), x, MASK)) * masked
    # With log(1 - alpha_t) uniform over its range the weight is the length of that range; they
    # leave out its end at t = 1, which is log(1 - eps).
    length = -math.log(1e-3)
    for name in ("change_of_variables", "importance"):
        np.testing.assert_allclose(nats * length, LOSS[f"token_loss_{name}"], rtol=2e-4, atol=1e-6)
    # T steps: t is rounded up to the next of 1/T, ..., 1 and its weight stays 1/t.
    steps = int(LOSS["T"])
    t = (np.floor(LOSS["t_discrete_in"] * steps) + 1) / steps
    weight = LogLinear().weight(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(nats * np.asarray(weight)[:, None], LOSS["token_loss_T_default"], rtol=1e-5, atol=1e-6)


def test_change_of_variables_has_a_constant_weight():
    schedule = LogLinear()
    log_masked = jnp.linspace(-6.0, -0.1, 9)
    slope = jax.vmap(jax.grad(lambda value: schedule.time(jnp.exp(value))))(log_masked)
    t = schedule.time(jnp.exp(log_masked))
    np.testing.assert_allclose(
        schedule.weight(t) * schedule.mask_probability(t) * slope, jnp.exp(log_masked), rtol=1e-5
    )


@pytest.mark.parametrize("objective", sorted(n for n, o in OBJECTIVES.items() if o.process is Masked))
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_uniform_denoiser_scores_log_v(objective, schedule):
    """But for what the schedule leaves out at its ends."""
    vocabulary, batch, length = 12, 512, 60
    objective = build(objective, schedule, mask_id=vocabulary)

    def draw(key):  # not jitted: the schedules then share their compiled parts
        x = jnp.zeros((batch, length), jnp.int32)
        t = objective.times(jax.random.fold_in(key, 1), batch, length)
        logits = jnp.zeros((batch, length, vocabulary + 1)).at[..., vocabulary].set(50.0)  # the mask's is not looked at
        return objective.loss(lambda z_t, t, **_: logits, jax.random.fold_in(key, 2), x, t)

    draws = [draw(jax.random.key(seed)) for seed in range(4)]
    nelbos = np.asarray([loss.nats.sum() / loss.tokens.sum() for loss in draws])
    first, last = objective.process.schedule.alpha(jnp.asarray([objective.time_eps, 1.0]))
    closed = float(first - last) / (1 - objective.time_eps) * math.log(vocabulary)
    assert abs(closed / math.log(vocabulary) - 1) < 0.012
    error = np.concatenate([np.asarray(d.nats / d.tokens) for d in draws]).std() / math.sqrt(4 * batch)
    assert abs(nelbos.mean() - closed) < 4 * error < 0.3
    if schedule in ("loglinear", "linear"):
        exact = (1 - objective.process.schedule.mask_probability(0.0)) * math.log(vocabulary)
        exact *= 0.999 if schedule == "loglinear" else 1.0
        assert abs(closed - exact) < 1e-5


def test_every_token_masked_costs_the_plain_cross_entropy():
    objective = build(mask_id=3)
    x = jnp.asarray([[0, 1, 2, 1, 0]])
    logits = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
    z_t = jnp.full((1, 5), 3)
    loss = objective.loss_at(jnp.asarray(logits), x, z_t, jnp.ones((1, 1)))
    expected = scipy.special.logsumexp(logits[0, :, :3], axis=1) - logits[0, np.arange(5), np.asarray(x[0])]
    np.testing.assert_allclose(loss.token_nats[0], expected, rtol=1e-5)
    assert loss.noised.all()


def test_one_token_sequences_and_wholly_invalid_rows():
    objective = build(mask_id=3)
    valid = jnp.asarray([[True], [False]])
    x = jnp.asarray([[1], [3]])  # padding may even hold the mask's own id
    loss = objective.loss(lambda z, t: jnp.ones((2, 1, 4)), jax.random.key(0), x, jnp.ones(2), valid)
    assert loss.tokens.tolist() == [1, 0] and loss.nats[1] == 0 and not loss.noised[1]
    assert np.isfinite(loss.token_nats).all()


def test_invalid_tokens_are_shown_to_the_network_but_never_masked_or_counted():
    objective = build(mask_id=5)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (6, 31)), jnp.int32)
    valid = jnp.arange(31)[None] < jnp.asarray([31, 20, 1, 7, 30, 2])[:, None]
    seen = []

    def denoise(z_t, t):
        seen.append(z_t)
        return jnp.zeros((6, 31, 6))

    loss = objective.loss(denoise, jax.random.key(1), x, jnp.full((6,), 0.9), valid)
    assert ((seen[0] == x) | valid).all() and (loss.tokens == valid.sum(axis=1)).all()
    assert (loss.token_nats[~np.asarray(valid)] == 0).all()
    assert 0.8 < loss.noised.sum() / valid.sum() < 1


def test_gradient_is_the_autodiff_of_the_log_softmax():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.integers(0, 8, (3, 7)), jnp.int32)
    logits = jnp.asarray(3 * random.normal(size=(3, 7, 9)), jnp.float32)
    scale = jnp.asarray(random.normal(size=(3, 7)), jnp.float32)

    def definition(logits):
        log_probs = jax.nn.log_softmax(logits.at[..., 8].set(-jnp.inf))
        return -(scale * jnp.take_along_axis(log_probs, x[..., None], axis=-1)[..., 0]).sum()

    def ours(logits):
        return (scale * cross_entropy(logits, x, 8)).sum()

    (value, gradient), (expected, expected_gradient) = jax.jit(
        lambda logits: (jax.value_and_grad(ours)(logits), jax.value_and_grad(definition)(logits))
    )(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)
    assert (gradient[..., 8] == 0).all()
    assert jax.eval_shape(jax.grad(ours), logits.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_give_finite_losses_and_gradients(size):
    objective = build(mask_id=4)
    x = jnp.asarray([[0, 1, 2, 3]])
    logits = size * jnp.asarray([[[1.0, -1, 0, 0, 1], [-1, 1, 1, 1, 1], [0, 0, 0, 0, 9], [1, -1, 1, -1, -1]]])

    def nats(logits):
        return objective.loss_at(logits, x, jnp.full((1, 4), 4), jnp.full((1, 1), 1e-3)).nats.sum()

    value, gradient = jax.value_and_grad(nats)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all() and (np.abs(gradient) <= 1001).all()


def test_the_backward_pass_keeps_no_second_array_of_the_logits_size():
    x = jnp.zeros((8, 64), jnp.int32)
    logits = jax.ShapeDtypeStruct((8, 64, 4096), jnp.float32)
    f = jax.jit(jax.grad(lambda logits: cross_entropy(logits, x, 4095).sum()), donate_argnums=0)
    memory = f.lower(logits).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 1.1 * 8 * 64 * 4096 * 4


def test_low_discrepancy_lowers_the_variance_of_the_mean_loss():
    def spread(low_discrepancy):
        objective = build(schedule="maskgit", mask_id=4, low_discrepancy=low_discrepancy)
        x = jnp.zeros((32, 200), jnp.int32)

        def denoise(z_t, t):  # surer of itself at late times, so that the loss depends on t
            return 3.0 * t[:, None, None] * jnp.eye(5)[None, :1] * jnp.ones((1, 200, 1))

        def mean(key):
            t = objective.times(key, 32, 9)
            return objective.loss(denoise, jax.random.fold_in(key, 1), x, t).nats.mean()

        return np.std(jax.lax.map(mean, jax.random.split(jax.random.key(0), 200)))

    assert spread(True) < 0.5 * spread(False)


def test_the_mean_loss_of_exact_conditionals_bounds_the_entropy():
    # Tokens are independent, so the marginal is the exact denoiser, and the bound is tight.
    p = np.asarray([0.5, 0.3, 0.15, 0.05])
    objective = build(schedule="linear", mask_id=4)
    logits = jnp.asarray(np.append(np.log(p), 7.0), jnp.float32)

    def draw(key):
        x = jax.random.choice(key, 4, (64, 50), p=jnp.asarray(p, jnp.float32))
        t = objective.times(jax.random.fold_in(key, 1), 64, 9)
        everywhere = jnp.broadcast_to(logits, (64, 50, 5))
        loss = objective.loss(lambda z_t, t: everywhere, jax.random.fold_in(key, 2), x, t)
        return loss.nats.sum() / loss.tokens.sum()

    values = np.asarray(jax.lax.map(draw, jax.random.split(jax.random.key(3), 100)))
    entropy = -(p * np.log(p)).sum()
    assert abs(values.mean() - entropy) < 4 * values.std() / 10 < 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((2, 0), jnp.int32)}, "L >= 1"),
        ({"x": jnp.zeros((2, 3))}, "integer"),
        ({"t": jnp.ones(3)}, r"the times \(2,\), got \(3,\)"),
        ({"valid": jnp.ones((2, 3))}, "bool"),
        ({"logits": jnp.zeros((2, 3, 4))}, "one number for each id"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {
        "x": jnp.zeros((2, 3), jnp.int32),
        "t": jnp.ones(2),
        "valid": None,
        "logits": jnp.zeros((2, 3, 5)),
    } | change
    with pytest.raises((ValueError, TypeError), match=message):
        build(mask_id=4).loss(lambda z, t: given["logits"], jax.random.key(0), given["x"], given["t"], given["valid"])


def test_bad_objectives_are_refused():
    for change in (
        {"name": "unheard_of"},
        {"mask_id": -1},
        {"time_eps": 0.0},
        {"schedule": "unheard_of"},
    ):
        with pytest.raises(ValueError):
            build(**change)
    with pytest.raises(TypeError, match="Masked's schedule must be a Schedule"):
        Masked(Vocabulary(4, 3), schedule="loglinear")
    with pytest.raises(TypeError, match="needs a process with a schedule, not NextToken"):
        Diffusion(NextToken(Vocabulary(4, 3)))


def test_an_objective_needs_its_mask_alone():
    assert MDLM(mask_id=49) == Diffusion(Masked(Vocabulary(50, 49)))
    schedule, layout = Cosine(), Blocks((4,))
    made = MDLM(3, vocab_size=9, schedule=schedule, layout=layout, time_eps=0.01)
    assert made == Diffusion(Masked(Vocabulary(9, 3), schedule), layout, time_eps=0.01)
    for name, entry in OBJECTIVES.items():
        assert entry(mask_id=5) == objectives.from_config(Vocabulary(6, 5), name=name)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("mdlm", {"mask_id": -1}, "mask_id must be"),
        ("mdlm", {"mask_id": "[MASK]"}, "mask_id must be an integer"),
        ("mdlm", {"vocab_size": 3}, "mask_id must be below the vocabulary's size, 3, got 5"),
        ("mdlm", {"colour": 1}, "'mdlm' has no option colour; it has clock, time_eps"),
        ("mdlm", {"output": "score"}, "'mdlm' has no option output"),
        ("autoregressive", {"layout": Blocks((4,))}, "goes from left to right: its layout is 'whole', not B"),
        ("autoregressive", {"schedule": Linear()}, "'autoregressive' has no schedule: leave it out"),
    ],
)
def test_an_objective_alone_refuses(name, change, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](**{"mask_id": 5, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "mdlm", "layout": "halves"}, "No layout is called 'halves'; choose one of blocks, whole"),
        ({"name": "autoregressive", "layout": "blocks"}, "goes from left to right: its layout is 'whole'"),
        ({"name": "autoregressive", "schedule": "linear"}, "has no schedule"),
        ({"name": ["mdlm"]}, "No objective is called"),
        ({"sections": {"objectives": {"mdlm": {"colour": 1}}}}, "'mdlm' has no option colour; it has clock, time_eps"),
        ({"sections": {"objectives": {"mdlm": 3}}}, "must be a section"),
        ({"sections": {"schedules": {"loglinear": {"power": 1}}}}, "'loglinear' has no option power; it has eps"),
        ({"layout": "blocks", "sections": {"layouts": {"blocks": {"size": 1}}}}, "has no option size; it has sizes"),
    ],
)
def test_choices_that_there_are_none_of_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        objectives.from_config(Vocabulary(4, 3), **change)


@pytest.mark.parametrize("name, step", [*((name, None) for name in sorted(OBJECTIVES)), ("duo", 3), ("genmd4", 3)])
def test_what_is_given_is_shown_and_does_not_count(name, step):
    """The prompt of an answer: the network sees it as it is, at any time, and no objective counts it."""
    objective = objectives.from_config(Vocabulary(7, 6), name=name)
    x = jax.random.randint(jax.random.key(0), (3, 8), 0, 6)
    answer = jnp.arange(8)[None] >= jnp.array([[2], [0], [7]])
    seen = []

    def denoise(z, t, **how):
        seen.append(z if z.ndim == 2 else jnp.where(z.max(axis=-1) == 1, jnp.argmax(z, axis=-1), -1))
        return jax.random.normal(jax.random.key(2), (*x.shape, 7))

    t = jnp.full_like(objective.times(jax.random.key(1), 3, 8), 0.95)
    state = objective.init_state() or None
    loss = objective.loss(denoise, jax.random.key(3), x, t, answer, state=state, step=step)
    assert loss.tokens.tolist() == [6, 8, 1] and not np.asarray(loss.token_nats)[~np.asarray(answer)].any()
    if not objective.causal:
        for z in seen:
            np.testing.assert_array_equal(np.asarray(z)[~np.asarray(answer)], np.asarray(x)[~np.asarray(answer)])
            assert (np.asarray(z) != np.asarray(x)).any(), "at this time, most of an answer is noise"
