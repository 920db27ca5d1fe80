"""Runs that start from weights: another run's or a file's, a causal model's among them, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import config, initial, sharding, train
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers
from diffrwkv.denoiser import Denoiser
from diffrwkv.run import load_run
from diffrwkv.weights import FORMATS, write_state_dict
from tests.programs.test_train import KILL_AT_STEP, arrays_of, losses
from tests.random_parameters import random_parameters

VOCABULARY, DIM, LAYERS = 19, 32, 2
RANKS = {"w": 4, "a": 5, "v": 6, "g": 7}


def model_of(**changes):
    """Keyword arguments of a Denoiser, all of them."""
    model = config.base().model.to_dict() | {"vocab_size": VOCABULARY, "dim": DIM, "num_layers": LAYERS}
    for name in ("rwkv7", "birwkv7"):
        model["mixers"][name] |= {"head_dim": 16, "implementation": "reference", "lora_ranks": RANKS}
    return model | changes


def causal_model():
    model = model_of(pattern="rwkv7")
    model["channel_mixers"]["rwkv7"]["shift"] = "previous"
    return model


@pytest.fixture(scope="module")
def causal():
    """(A causal model, its parameters)."""
    model = Denoiser(**causal_model())
    return model, random_parameters(model, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))


def source_of(params, model):
    params = jax.tree.map(np.asarray, params)
    return initial.Source("there", initial.needed(model), params, True, "t", None, None, {"step": 7})


def bidirectional(**options):
    model = model_of(predict_next=True)
    model["mixers"]["birwkv7"] |= options
    return model


def started(model, source):
    """The parameters that a run of this model starts with."""
    source = initial.adapted(source, model)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    fresh = random_parameters(Denoiser(**model), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1), seed=1)
    return source, initial.put(source, model, jax.device_put(fresh, sharding.replicated(mesh)))


@pytest.mark.parametrize(
    "options, length, scan",
    [
        ({"merge": "gate", "share": "projections"}, 63, False),
        pytest.param({"merge": "gate", "share": "projections"}, 1, True, marks=pytest.mark.slow),
        pytest.param({"merge": "add", "share": "none"}, 100, False, marks=pytest.mark.slow),
    ],
)
def test_a_causal_model_is_what_its_adaptation_is_in_blocks_of_one(causal, options, length, scan):
    """Step 0: the logits of every blank are those of the causal model, which read the text before it."""
    model, params = causal
    wanted = bidirectional(**options) | {"scan_layers": scan}
    source, ours = started(wanted, source_of(params, causal_model()))
    as_drawn = lambda path, x: jnp.zeros_like(x) if path[-1].key in ("m0", "m1") else x  # a gate of one half
    ours = jax.tree_util.tree_map_with_path(as_drawn, ours)
    x = jax.random.randint(jax.random.key(length), (2, length), 0, VOCABULARY - 1)
    late = jnp.concatenate([jnp.full((2, 1), VOCABULARY - 1), x[:, :-1]], axis=1)
    theirs = jax.jit(lambda x: model.apply({"params": params}, x))(late)
    blanks = jnp.full_like(x, VOCABULARY - 1)
    run = jax.jit(lambda z, x: Denoiser(**wanted).apply({"params": ours}, z, clean=x, block=1))
    np.testing.assert_allclose(run(blanks, x), theirs, atol=1e-5)
    assert "gate at zero" in " ".join(initial.summary(source, True, False))


@pytest.mark.slow
def test_the_reverse_direction_learns_from_the_first_step(causal):
    """It adds nothing, and yet its gate has a gradient; then the following tokens' mix has one too."""
    _, params = causal
    wanted = bidirectional()
    _, ours = started(wanted, source_of(params, causal_model()))
    x = jax.random.randint(jax.random.key(0), (2, 9), 0, VOCABULARY - 1)
    loss = lambda params: jnp.square(Denoiser(**wanted).apply({"params": params}, x, clean=x, block=3)).mean()
    gradient = jax.jit(jax.grad(loss))(ours)
    for layer in (f"block_{i}" for i in range(LAYERS)):
        assert float(jnp.abs(gradient[layer]["att"]["backward"]["g2"]).max()) > 1e-6
        assert float(jnp.abs(gradient[layer]["ffn"]["x_k_next"]).max()) > 1e-6
        assert not np.any(gradient[layer]["att"]["backward"]["k_k"])  # behind the gate


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 64}, "config.model.dim is 64 and must be 32"),
        ({"num_layers": 3}, "config.model.num_layers is 3 and must be 2"),
        ({"pattern": "attention"}, "config.model.pattern is 'attention'"),
        ({"block": "dit"}, "config.model.block is 'dit'"),
        ({"time_conditioning": True}, "config.model.time_conditioning is True and must be False"),
        ({"tie_embeddings": True}, "config.model.tie_embeddings"),
        ({"mixers.birwkv7.head_dim": 8}, "mixers.birwkv7.head_dim is 8 and must be 16"),
        ({"mixers.birwkv7.a_scale": 2.0}, "mixers.birwkv7.a_scale is 2.0 and must be 1.0"),
        ({"mixers.birwkv7.lora_ranks": {"w": 8}}, "mixers.birwkv7.lora_ranks"),
        ({"mixers.birwkv7.share": "all"}, "share = 'all' ties"),
        ({"channel_mixers.rwkv7.shift": "none"}, "shift is 'none' and must be 'previous'"),
        ({"channel_mixers.rwkv7.expansion": 2.0}, "expansion is 2.0 and must be 4.0"),
    ],
)
def test_another_network_is_refused(causal, change, message):
    cfg = config.base()
    model = bidirectional()
    del model["vocab_size"]
    for key, value in change.items():
        *sections, leaf = key.split(".")
        node = model
        for section in sections:
            node = node[section]
        node[leaf] = value
    with cfg.unlocked():
        cfg.model = model
    with pytest.raises(UserError) as told:
        source = initial.adapted(source_of(causal[1], causal_model()), model)
        initial.refuse_other_model(cfg, source.model, source.path)
    assert message in str(told.value) and "\n" not in str(told.value)


# --- through the program --------------------------------------------------------------------------------------------

ADAPTED = [
    "--config.model.predict_next=True",
    "--config.model.channel_mixers.rwkv7.shift=both",
    "--config.model.mixers.birwkv7.share=projections",
    "--config.diffusion.layout=blocks",
    "--config.layouts.blocks.sizes=(4,1)",
    "--config.layouts.blocks.begins=(3,0)",
    "--config.train.eval_every=4",
    "--config.train.sample_every=0",
]


@pytest.fixture(scope="session")  # not made anew where a worker comes back to this file
def adapted_run(programs, left_to_right):
    """The workdir of 6 steps from the causal run, blocks of 1 for 3 steps and of 4 for the rest; its source is gone."""
    source = programs.folder / "source"
    shutil.copytree(left_to_right, source)
    workdir = programs.folder / "adapted"
    arguments = [*ADAPTED, f"--config.train.init_from={source}", "--config.train.num_steps=6"]
    done = programs.train(workdir, *arguments)
    assert done.returncode == 0, done.stderr
    (workdir / "stdout.txt").write_text(done.stdout)
    return workdir, arguments, source


@pytest.mark.slow
def test_a_run_says_where_its_weights_are_from(adapted_run):
    workdir, _, source = adapted_run
    told = (workdir / "stdout.txt").read_text()
    assert f"Starting from {source} (step 4;" in told and "gate at zero" in told
    record = json.loads((workdir / "run.json").read_text())["initial"]
    assert record["workdir"] == str(source) and record["step"] == 4 and record["weights"] == "ema"
    assert len(record["adapted"]) == 2


@pytest.mark.slow
def test_gone_on_with_it_is_the_same_to_the_last_bit_and_needs_no_source(programs, adapted_run):
    """Stopped in the middle of its schedule of block sizes."""
    workdir, arguments, source = adapted_run
    other = programs.folder / "adapted-stopped"
    patch = KILL_AT_STEP.format(step=3, signal="SIGTERM")
    assert programs.train(other, *arguments, patch=patch).returncode == 0
    moved = source.with_name("moved")
    source.rename(moved)
    try:
        done = programs.train(other, *arguments)
    finally:
        moved.rename(source)
    assert done.returncode == 0, done.stderr
    assert "Going on from step" in done.stdout and "Starting from" not in done.stdout
    assert losses(other) == losses(workdir)
    assert arrays_of(other, 6) == arrays_of(workdir, 6)
    assert json.loads((other / "run.json").read_text())["initial"]["step"] == 4


@pytest.mark.slow
def test_nothing_moves_before_the_first_step(programs, left_to_right):
    """With a learning rate of 0, the weights are those of the source: its average, or the weights themselves."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    file = programs.folder / "there.npz"
    run = load_run(left_to_right, mesh)
    model = run.config.model.to_dict() | {"vocab_size": run.tokenizer.vocab_size}
    write_state_dict(FORMATS["rwkv7"].to_state_dict(jax.device_get(run.params), model), file)
    still = ["--config.optim.learning_rate=0", "--config.train.num_steps=1", "--config.train.sample_every=0"]
    config_file = left_to_right.parent / "ar.py"
    for name, given, raw in (
        ("average", left_to_right, False),
        ("raw", left_to_right, True),
        ("file", file, False),
    ):
        workdir = programs.folder / f"still-{name}"
        arguments = [*still, f"--config.train.init_from={given}", f"--config.train.init_raw={raw}"]
        done = programs.train(workdir, *arguments, config=config_file)
        assert done.returncode == 0, done.stderr
        theirs = load_run(left_to_right, mesh, raw=raw).params
        for part in (False, True):
            ours = load_run(workdir, mesh, raw=part).params
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        record = json.loads((workdir / "run.json").read_text())["initial"]
        assert "adapted" not in record and record.get("format") == ("rwkv7" if name == "file" else None)


def test_what_no_run_can_start_from_is_told_in_a_sentence(programs, left_to_right, trained, tmp_path):
    """Before the data are read or anything is computed."""
    (tmp_path / "damaged.npz").write_bytes(b"no weights")
    write_state_dict({"what": np.zeros(3, np.float32)}, tmp_path / "other.npz")
    (tmp_path / "letters.txt").write_text("abcdefg " * 400)
    cases = [
        (["--config.train.init_from=nowhere"], "No file nowhere"),
        ([f"--config.train.init_from={tmp_path}"], "must have one file of weights"),
        (["--config.train.init_from=hf:nobody"], "names no model of the hub"),
        ([f"--config.train.init_from={tmp_path / 'damaged.npz'}"], "cannot be read"),
        ([f"--config.train.init_from={tmp_path / 'other.npz'}"], "no config.json beside it"),
        ([f"--config.train.init_from={trained}", "--config.model.dim=24"], "config.model.dim is 24 and must be 16"),
        ([f"--config.train.init_from={trained}", "--config.data.tokenizer=byte"], "set it to the former"),
        ([f"--config.train.init_from={trained}", f"--config.data.name={programs.folder / 'tiny.py'}"], "character"),
        (["--config.train.init_raw=True"], "does nothing without"),
        ([f"--config.train.init_from={left_to_right}"], "ties the second"),
    ]
    for number, (arguments, message) in enumerate(cases):
        cfg = config.parse([f"--config={programs.config}", *arguments, "--config.train.cpu_devices=1"])
        with pytest.raises(UserError) as told:
            train.run(cfg, tmp_path / f"run-{number}")
        assert message in str(told.value) and "\n" not in str(told.value), told.value
        assert not (tmp_path / f"run-{number}" / "checkpoints").exists()


def test_a_source_of_another_vocabulary_is_refused(causal):
    source = source_of(causal[1], causal_model())
    with pytest.raises(UserError, match="19 token ids"):
        initial.check_tokenizer(source, tokenizers.Byte())
    with pytest.raises(UserError, match="another tokenizer"):
        initial.check_tokenizer(dataclasses.replace(source, tokenizer=tokenizers.Char("ab")), tokenizers.Char("ac"))
