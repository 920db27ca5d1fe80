"""All of it from outside the package: a process, an objective, a schedule, a sampler and a data set, each one class or
function and one entry, through the checks of every process and through the programs.
"""

import dataclasses
import json
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import evaluate, generation, sample, train
from diffrwkv.checks import POSITIVE
from diffrwkv.config import UserError
from diffrwkv.data import DATASETS, datasets, text
from diffrwkv.diffusion.noise import categorical, uniform
from diffrwkv.diffusion.objectives import OBJECTIVES, Diffusion, Entry
from diffrwkv.diffusion.processes import PROCESSES, Masked, Reversible, Scheduled, Vocabulary
from diffrwkv.diffusion.samplers import SAMPLERS, Sampler, Samples, sequence_keys
from diffrwkv.diffusion.samplers.base import watched
from diffrwkv.diffusion.samplers.common import blanks, canvas_keys, fold_step
from diffrwkv.diffusion.schedules import SCHEDULES, Cosine, LogLinear, Schedule
from tests.diffusion import known_law, test_processes

# --- What comes from outside --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slanted(Scheduled):
    """A token is drawn anew, the n-th of the real ones with probability ~ n^-power.

    The output is logits of the law of a token given all others, mu; with q the law of noise, the bound is that of the
    reverse process's rates in continuous time: sigma'_t q(z) sum over y != z of r phi(s / r), phi(u) = u - 1 - log u,
    where s(y) is the score of mu and r that of the clean token.
    """

    needs_time: ClassVar[bool] = True

    vocabulary: Vocabulary
    schedule: Schedule = LogLinear()
    output: str = "leave_one_out"
    power: float = 1.0

    def __post_init__(self):
        POSITIVE.check("power", self.power)

    @property
    def log_noise(self):
        """float32 [V], -inf at the mask."""
        tokens, mask = np.arange(self.vocabulary.size), self.vocabulary.mask_id
        weights = np.where(tokens == mask, 0.0, (1.0 + tokens - (tokens > mask)) ** -self.power)
        with np.errstate(divide="ignore"):
            return jnp.asarray(np.log(weights / weights.sum()), jnp.float32)

    def draw(self, key, shape):
        return categorical(key, jnp.broadcast_to(self.log_noise, (*shape, self.vocabulary.size)))

    def noise(self, key, x, t, free=None):
        when, what = jax.random.split(key)
        drawn = uniform(when, x.shape) < self.schedule.mask_probability(t)
        drawn = drawn if free is None else drawn & free
        return jnp.where(drawn, self.draw(what, x.shape).astype(x.dtype), x)

    def at(self, x):
        return self.vocabulary.tokens() == x[..., None]

    def likelihood(self, z, t):
        """log q(z_t | x) for each x, [B, L, V]; finite for a mask, which z never is."""
        kept, drawn = log(self.schedule.alpha(t))[..., None], log(self.schedule.mask_probability(t))[..., None]
        drawn = drawn + jnp.maximum(self.log_noise[z], -100)[..., None]
        return jnp.where(self.at(z), jnp.logaddexp(kept, drawn), drawn)

    def nats(self, output, x, z, t):
        log_mu = jax.nn.log_softmax(self.vocabulary.without_mask(output))
        certain = jnp.where(self.at(x), 0.0, -jnp.inf)
        here = self.at(z) | (self.vocabulary.tokens() == self.vocabulary.mask_id)

        def score(log_law):
            law = self.forward_law(log_law, t)
            return jnp.where(here, 0.0, law - jnp.take_along_axis(law, z[..., None], axis=-1))

        log_r = score(certain)
        change = score(log_mu) - log_r
        entropy = jnp.where(here, 0.0, jnp.exp(log_r) * (jnp.expm1(change) - change)).sum(axis=-1)
        rate = self.schedule.dsigma(t)  # infinite, or unknown, where alpha_t = 0
        return jnp.where(jnp.abs(rate) < 1e7, rate, 1e7) * jnp.exp(self.log_noise[z]) * entropy

    def start(self, keys, canvas, blank):
        position = jax.vmap(jax.vmap(lambda key: self.draw(key, ())))
        return jnp.where(blank, position(canvas_keys(keys, canvas.shape[1])[0]), canvas)

    def predict(self, output, z, t):
        return jax.nn.log_softmax(self.vocabulary.without_mask(output) + self.likelihood(z, t))

    def forward_law(self, log_p, s):
        """Of a law that does not sum to 1 too: what is drawn anew has all of its mass."""
        kept, drawn = log(self.schedule.alpha(s))[..., None], log(self.schedule.mask_probability(s))[..., None]
        mass, is_mask = jax.nn.logsumexp(log_p, axis=-1, keepdims=True), self.log_noise == -jnp.inf
        law = jnp.logaddexp(
            jnp.where(is_mask, 0.0, kept + log_p), jnp.where(is_mask, 0.0, mass + drawn + self.log_noise)
        )
        return jnp.where(is_mask, -jnp.inf, law)

    def reverse_law(self, log_p, z, t, s):
        alpha = self.schedule.alpha(s)
        kept, drawn = self.schedule.alpha(t) / alpha, (self.schedule.alpha(s) - self.schedule.alpha(t)) / alpha
        drawn = log(drawn)[..., None] + self.log_noise[z][..., None]
        to_z = jnp.where(self.at(z), jnp.logaddexp(log(kept)[..., None], drawn), drawn)
        return jax.nn.log_softmax(self.forward_law(log_p - self.likelihood(z, t), s) + to_z)


def log(probability):
    return jnp.log(jnp.maximum(probability, 2.0**-100))


@dataclasses.dataclass(frozen=True)
class Capped(Diffusion):
    """Trained with at most `cap` nats of a token; validated by the bound itself."""

    cap: float = 10.0

    def __post_init__(self):
        super().__post_init__()
        POSITIVE.check("cap", self.cap)

    @property
    def validation(self):
        return Diffusion(self.process, self.layout, self.time_eps, self.low_discrepancy)

    def loss_at(self, output, x, z, t, counted=None):
        loss = super().loss_at(output, x, z, t, counted)
        token_nats = jnp.minimum(loss.token_nats, self.cap)
        return loss._replace(nats=token_nats.sum(axis=1), token_nats=token_nats)


@dataclasses.dataclass(frozen=True)
class Square(Schedule):
    """alpha_t = (1 - (1 - eps) t)^2."""

    eps: float = 0.05

    def alpha(self, t):
        return (1 - (1 - self.eps) * t) ** 2

    def mask_probability(self, t):
        gone = (1 - self.eps) * t
        return gone * (2 - gone)

    def dalpha(self, t):
        return -2 * (1 - self.eps) * (1 - (1 - self.eps) * t)

    def weight(self, t):
        return -self.dalpha(t) / self.mask_probability(t)

    def time(self, mask_probability):
        return (1 - jnp.sqrt(1 - mask_probability)) / (1 - self.eps)


@dataclasses.dataclass(frozen=True)
class Renoise(Sampler):
    """A clean text is predicted at each time and noised anew to the next one; the last is the sample."""

    needs: ClassVar[type] = Reversible

    num_steps: int = 16

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        denoise, blank = watched(network, on_step), blanks(canvas, process.vocabulary.mask_id, valid)
        times = jnp.linspace(1, 1e-3, self.num_steps)
        token_keys = canvas_keys(keys, canvas.shape[1])[1]
        draw = jax.vmap(jax.vmap(categorical))

        def step(z, i):
            t, s = (jnp.full((len(z), 1), times[jnp.minimum(n, self.num_steps - 1)]) for n in (i, i + 1))
            log_p = process.predict(denoise(z, t[:, 0]), z, t)
            noised = draw(fold_step(token_keys, jnp.full(len(z), i)), process.forward_law(log_p, s))
            z = jnp.where(blank, jnp.where(i + 1 < self.num_steps, noised, jnp.argmax(log_p, -1)), z)
            return z, z

        tokens, steps = jax.lax.scan(step, process.start(keys, canvas, blank), jnp.arange(self.num_steps))
        passes = jnp.where(blank.any(axis=1), self.num_steps, 0)
        return Samples(tokens, passes, jnp.concatenate([canvas[None], steps]) if return_trace else None)


def counting(root, reading):
    """Numbers in letters."""
    words = ["one", "two", "three", "four", "five"]
    return text.Source("counting", {"all": lambda: ((f"{' '.join(words)}. ", True) for _ in range(60))}, 1500)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(PROCESSES, "slanted", Slanted)
    monkeypatch.setitem(OBJECTIVES, "slanted", Entry(Slanted, Capped, "square", fixed={"output": "leave_one_out"}))
    monkeypatch.setitem(SCHEDULES, "square", Square)
    monkeypatch.setitem(SAMPLERS, "renoise", Renoise)
    monkeypatch.setitem(DATASETS, "counting", datasets.Named(counting))


# --- The checks of every process ----------------------------------------------------------------------


CHECKS = [
    pytest.param(check, given, id="-".join([check.__name__.removeprefix("test_"), *map(str, given.values())]))
    for check, given in test_processes.CHECKS
]


@pytest.mark.parametrize("check, given", CHECKS)
def test_a_process_from_outside_passes_what_every_process_does(check, given, monkeypatch):
    weights = np.array([1, 0, 1 / 2, 1 / 3])  # the mask is the second of four
    monkeypatch.setitem(known_law.NOISE, Slanted, known_law.noise_towards(weights / weights.sum()))
    monkeypatch.setitem(test_processes.PROCESSES_HERE, "slanted", Slanted(known_law.VOCABULARY, Cosine()))
    check("slanted", **given)


# --- The programs ---------------------------------------------------------------------------------------

EXPERIMENT = """
from diffrwkv.config import base


def get_config(arg=None):
    c = base()
    c.data.name = "counting"
    c.data.length = 12
    c.model.dim = 16
    c.model.num_layers = 1
    c.model.pattern, c.model.channel_mixer, c.model.block = "attention", "mlp", "dit"
    c.model.mixers.attention.head_dim = 8
    c.model.time_conditioning = True
    c.model.condition_dim = 8
    c.diffusion.name = "slanted"
    c.sampler.name = "renoise"
    with c.unlocked():
        c.objectives.slanted = {"power": 0.5, "cap": 5.0}
        c.schedules.square = {"eps": 0.1}
        c.samplers.renoise = {"num_steps": 4}
    c.optim.warmup_steps = 0
    c.train.num_steps = 2
    c.train.batch_size = c.train.eval_batch_size = 4
    c.train.log_every = 1
    c.train.eval_limit = 4
    c.train.num_samples = 1
    c.train.cpu_devices = 1
    c.train.tensorboard = False
    return c
"""


def test_the_programs_take_what_comes_from_outside(tmp_path, capsys):
    (tmp_path / "x.py").write_text(EXPERIMENT)
    workdir = f"--workdir={tmp_path / 'run'}"
    train.main([f"--config={tmp_path / 'x.py'}", workdir, "--config.objectives.slanted.cap=6"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(0 < line["train/loss"] <= 6 for line in lines)
    run = generation.load(tmp_path / "run")
    process = Slanted(Vocabulary(run.tokenizer.vocab_size, run.tokenizer.mask_id), Square(0.1), power=0.5)
    assert run.objective == Capped(process, cap=6.0) and run.objective.validation == Diffusion(process)
    assert "sample 0 at step 2" in capsys.readouterr().out
    evaluate.main([workdir, "--draws=1", "--limit=4"])
    scored = json.loads(capsys.readouterr().out)
    assert scored["nelbo"] > 0 and math.isfinite(scored["nelbo"])
    assert json.loads((tmp_path / "run" / "eval.json").read_text()) == scored
    for chosen, passes in (
        ([], 4),
        (["--sampler=renoise", "--num_steps=3"], 3),
        (["--sampler=ancestral", "--num_steps=3"], 4),
    ):
        sample.main([workdir, "--prompt=one", "--num=2", "--json", *chosen])
        for line in map(json.loads, capsys.readouterr().out.splitlines()):
            assert line["text"].startswith("one") and len(line["text"]) == 12 and line["passes"] == passes
            assert run.tokenizer.mask_id not in line["tokens"]


@pytest.mark.parametrize(
    "override, told",
    [
        ("objectives.slanted.cap=0", "config.objectives.slanted: cap must be"),
        ("objectives.slanted.power=0", "config.objectives.slanted: power must be"),
        ("objectives.mdlm.time_eps=0.1", "config.objectives.mdlm.time_eps does nothing"),
        (
            "sampler.name=confidence",
            "'confidence' .* does not sample from .*'slanted' in one part: choose 'ancestral' or .*'renoise'",
        ),
        ("model.time_conditioning=False", "'slanted' needs a network that is told the time"),
        ("diffusion.schedule=nothing", "No schedule is called 'nothing'; choose one of .*square"),
    ],
)
def test_what_comes_from_outside_is_refused_like_the_rest(override, told, tmp_path):
    (tmp_path / "x.py").write_text(EXPERIMENT)
    with pytest.raises(UserError, match=told):
        train.main([f"--config={tmp_path / 'x.py'}", f"--workdir={tmp_path / 'run'}", f"--config.{override}"])
    assert not (tmp_path / "run").exists()


def test_a_sampler_from_outside_samples_from_masks_too():
    process = Masked(Vocabulary(5, 4))
    canvas = jnp.full((2, 6), 4).at[:, 1].set(2)
    wanted = jnp.asarray([0, 1, 2, 3, 0, 1])
    network = lambda z, t: jnp.broadcast_to(20 * jax.nn.one_hot(wanted, 5), (2, 6, 5))
    done = Renoise(num_steps=3)(process, network, sequence_keys(0, 2), canvas, return_trace=True)
    np.testing.assert_array_equal(done.tokens, [[0, 2, 2, 3, 0, 1]] * 2)
    assert done.trace.shape == (4, 2, 6) and (done.trace[0] == canvas).all() and (done.trace[-1] == done.tokens).all()
