"""Every experiment file: its keys are its constructors' arguments, and its step has shapes that fit."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from benchmarks import regular_languages
from diffrwkv import config, data, generation, languages, optim, plan, presets, train
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion.layouts import LAYOUTS
from diffrwkv.diffusion.objectives import OBJECTIVES
from diffrwkv.diffusion.samplers import SAMPLERS
from diffrwkv.diffusion.schedules import SCHEDULES
from diffrwkv.mixers import CHANNEL_MIXERS, MIXERS
from diffrwkv.run import abstract_params, build, is_padded, make_optimizer
from diffrwkv.train_step import abstract_state, make_train_step

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(p for p in FOLDER.glob("*.py") if p.stem != "__init__")
DIFFUSION = [name for name, entry in OBJECTIVES.items() if not entry.process.causal]
VARIANTS = ["birwkv_add", "birwkv_tied", *(n for n in presets.BACKBONES if n != "birwkv")]  # birwkv is the default
PEERS = [pytest.param(f"{FOLDER}/peer_shakespeare.py:{n}", marks=pytest.mark.slow) for n in VARIANTS]
QUICK = ("quickstart", "owt_small")  # the first that are run, the first that are copied; each takes seconds to trace
STEPS = [str(p) if p.stem in QUICK else pytest.param(str(p), marks=pytest.mark.slow) for p in FILES]
NAMED = (
    "dclm",
    "lm1b",
    "owt_small",
    "peer_shakespeare",
    "text8",
    "wikitext2_bpe",
    "zero_shot",
)  # take the name of a backbone
LIMITS = {"peer_shakespeare": (0, 1_300_000), "owt_small": (150e6, 190e6), "dclm": (230e6, 250e6)}  # parameters


def arguments_of(function):
    return {n for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


def test_sections_are_constructors_arguments():
    c = config.base()
    assert set(c.data) == arguments_of(data.load)
    fields = {k for k, f in Denoiser.__dataclass_fields__.items() if k not in ("parent", "name", "vocab_size")}
    assert set(c.model) == fields
    for section, table in ((c.model.mixers, MIXERS), (c.model.channel_mixers, CHANNEL_MIXERS)):
        assert set(section) == set(table)
        for name, cls in table.items():
            given_by_the_denoiser = {"place", "parent", "name"}
            defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in given_by_the_denoiser}
            given = {k: v or None if k == "lora_ranks" else v for k, v in section[name].to_dict().items()}
            assert given == defaults, name
    assert set(c.optim) == {n for n in inspect.signature(optim.make_optimizer).parameters} - {"params", "num_steps"}


def test_options_are_their_constructors():
    """Keys and defaults of every objective, schedule, layout and sampler."""

    def options(cls, *others):
        return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in others}

    build_sampler_sets = {"pipelined": ("block", "stop_id")}
    tables = {
        "objectives": {name: entry.options() for name, entry in OBJECTIVES.items()},
        "schedules": {name: options(cls) for name, cls in SCHEDULES.items()},
        "layouts": {name: options(cls) for name, cls in LAYOUTS.items()},
        "samplers": {name: options(cls, *build_sampler_sets.get(name, ())) for name, cls in SAMPLERS.items()},
    }
    c = config.base()
    assert set(tables) == set(config.OPTIONS)
    for section, table in tables.items():
        assert set(c[section]) == set(table)
        for name, defaults in table.items():
            assert c[section][name].to_dict() == defaults, name


def test_there_are_all_of_them():
    names = "quickstart shakespeare_char peer_shakespeare wikitext2_bpe text8 lm1b owt_small dclm zero_shot"
    names += " regular_languages"
    assert {p.stem for p in FILES} >= set(names.split())


def test_each_is_named_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("a file of the user's of the same name")
    assert list(config.experiments().values()) == FILES
    for name, path in config.experiments().items():
        assert config.parse([f"--config={name}"]).to_dict() == config.parse([f"--config={path}"]).to_dict()
    assert config.parse(["--config=peer_shakespeare:dit@16"]).model.pattern == "attention"
    for name, told in [
        ("quickstrat", "No experiment is called 'quickstrat'. Did you mean: quickstart?"),
        ("experiments/quickstart.py", "No config file 'experiments/quickstart.py'. Did you mean: quickstart?"),
        ("text.py:dit", "No config file 'text.py'. Did you mean: text8?"),
        ("xyz", "There are books, dclm, lm1b"),
    ]:
        with pytest.raises(config.UserError, match=re.escape(told)):
            config.parse([f"--config={name}"])


@pytest.mark.parametrize("path", [*STEPS, *PEERS], ids=lambda p: Path(p).name)
def test_step_has_shapes_that_fit(path):
    cfg = config.parse([f"--config={path}"])
    train.check(cfg)
    tokenizer = plan.nominal_tokenizer(cfg.data.tokenizer)
    model, objective = build(cfg, tokenizer)
    generation.build_sampler(cfg, objective)
    params = nn.unbox(abstract_params(model, cfg.data.length))
    tx, _ = make_optimizer(cfg, params)
    state = abstract_state(params, tx)
    for name, mixer in cfg.model.mixers.items():
        if "attention" not in name:
            mixer.implementation = "reference"  # half the time to trace; above they are the experiment's own
    model, objective = build(cfg, tokenizer)
    step = make_train_step(
        model,
        objective,
        tx,
        jax.random.key(0),
        ema_decay=cfg.train.ema_decay,
        accumulate=cfg.train.accumulate,
        padded=is_padded(cfg),
    )
    shape = (cfg.train.batch_size, cfg.data.length)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), "valid": jax.ShapeDtypeStruct(shape, jnp.bool_)}
    new, measured = jax.eval_shape(step, state, batch, jax.ShapeDtypeStruct((), jnp.int32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert measured["train/loss"].shape == ()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((new["params"], new["ema"])))
    low, high = LIMITS.get(Path(path.split(":")[0]).stem, (0, 1e12))
    assert low < sum(x.size for x in jax.tree.leaves(params)) <= high


@pytest.mark.parametrize("stem", NAMED)
@pytest.mark.parametrize("name", presets.BACKBONES)
def test_every_backbone_by_name(stem, name):
    cfg = config.parse([f"--config={FOLDER}/{stem}.py:{name}"])
    model, objective = build(cfg, plan.nominal_tokenizer(cfg.data.tokenizer))
    left_to_right = generation.build_sampler(cfg, objective).face == "step"
    assert left_to_right == objective.causal == model.causal == name.startswith("ar_")
    assert cfg.model.pattern == presets.BACKBONES[name].get("pattern", "birwkv7")


def test_every_language_and_backbone_by_name():
    path = f"{FOLDER}/regular_languages.py"
    for name in languages.LANGUAGES:
        assert config.parse([f"--config={path}:{name}~dit"]).data.name == f"regular:{name}:64"
    for backbone in regular_languages.BACKBONES:
        cfg = config.parse([f"--config={path}:s3~{backbone}"])
        model, objective = build(cfg, plan.nominal_tokenizer(cfg.data.tokenizer))
        assert objective.causal == model.causal == backbone.startswith("ar_")
        assert (model.dim, model.num_layers) == (64, 2)
        scales = {cfg.model.mixers[name].a_scale for name in ("birwkv7", "rwkv7") if name in cfg.model.pattern}
        assert not scales or max(scales) == (2.0 if backbone.endswith("_a2") else 1.0)


@pytest.mark.parametrize("stem", NAMED)
def test_every_objective_by_name(stem):
    for i, name in enumerate(DIFFUSION):
        cfg = config.parse([f"--config={FOLDER}/{stem}.py:birwkv{'@16' if i % 2 else ''}~{name}"])
        assert cfg.diffusion.to_dict() == {"name": name, "schedule": None, "layout": "blocks" if i % 2 else "whole"}
        assert cfg.model.time_conditioning == OBJECTIVES[name].process.needs_time
        assert issubclass(OBJECTIVES[name].process, SAMPLERS[cfg.sampler.name].needs)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_docstring_says_how_to_run_it(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config=experiments/{path.name}" in text
    for word in ("Data:", "Hardware and time:", "Expected:"):
        assert word in text
    with pytest.raises(config.UserError):
        config.parse([f"--config={path}:nonsense"])


def test_plan_prints(capsys):
    plan.main([f"--config={FOLDER}/quickstart.py"])
    out = capsys.readouterr().out
    assert "parameters" in out and "H100" in out and "TFLOP" in out
