"""What an objective learns or searches, through the programs: kept, gone on with, and scored and sampled with."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest

from diffrwkv import convert, evaluate, generation, sample, train
from diffrwkv.checkpoint import Checkpoints
from diffrwkv.config import UserError
from diffrwkv.run import build
from diffrwkv.workdir import read_metrics
from tests.programs.test_train import arrays_of

EXPERIMENT = """
from diffrwkv.config import base


def get_config(arg=None):
    c = base()
    c.data.name = {text!r}
    c.data.length = 12
    c.model.dim, c.model.num_layers, c.model.condition_dim = 16, 1, 8
    c.model.pattern, c.model.channel_mixer, c.model.block = "attention", "mlp", "dit"
    c.model.mixers.attention.head_dim = 8
    c.samplers.ancestral.num_steps = 4
    c.optim.warmup_steps = 0
    c.train.num_steps = 4
    c.train.batch_size = c.train.eval_batch_size = 8
    c.train.log_every = 1
    c.train.checkpoint_every = c.train.eval_every = 2
    c.train.eval_limit = 24
    c.train.sample_every = 4
    c.train.num_samples = 1
    c.train.tensorboard = False
    return c
"""
CASES = {
    "genmd4": [
        "--config.diffusion.name=genmd4",
        "--config.objectives.genmd4.power_rate=0.5",
        "--config.model.time_conditioning=True",
    ],
    "mdlm": ["--config.objectives.mdlm.search_mask_rates=True"],
}


@pytest.fixture(scope="module", params=CASES)
def learned(request, tmp_path_factory):
    """(The name of the objective, the workdir of a run of 4 steps, what makes another one of it)."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text("to be or not to be, that is the question. " * 60)
    (folder / "x.py").write_text(EXPERIMENT.format(text=str(folder / "text.txt")))

    def run(name, *arguments):
        train.main([f"--config={folder / 'x.py'}", f"--workdir={folder / name}", *CASES[request.param], *arguments])
        return folder / name

    return request.param, run("whole"), run


def state_of(workdir, objective):
    """The objective's own of the newest checkpoint, NumPy arrays."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(objective.init_state)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return jax.device_get(checkpoints.restore_parts({"objective": abstract})[1]["objective"])


def test_training_goes_on_where_no_sample_can_be_drawn(learned, monkeypatch, capsys):
    """All steps are taken, as without samples, and the checkpoint is there."""
    _, whole, run = learned

    def refuse(self, *args, **options):
        raise UserError("The network's output was not finite")

    monkeypatch.setattr(generation.Generator, "__call__", refuse)
    mute = run("mute", "--config.train.sample_every=2", "--config.train.num_samples=1")
    told = capsys.readouterr()
    assert "No sample at step 2: The network's output was not finite" in told.out + told.err
    assert arrays_of(mute, 4) == arrays_of(whole, 4)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(learned, capsys):
    _, whole, run = learned
    run("halves", "--config.train.num_steps=2")
    halves = run("halves")
    assert "Going on from step 2" in capsys.readouterr().out
    arrays = arrays_of(whole, 4)
    assert any("objective" in name for name in arrays) and arrays == arrays_of(halves, 4)
    lines = [read_metrics(workdir / "metrics.jsonl") for workdir in (whole, halves)]
    for key in ("train/loss", "val/nelbo", "mask_rate/low"):
        assert [line.get(key) for line in lines[0]] == [line.get(key) for line in lines[1]], key


def test_it_is_scored_and_sampled_with_what_it_learned(learned, capsys):
    name, workdir, _ = learned
    run = generation.load(workdir)
    own = state_of(workdir, run.objective)
    if name == "genmd4":
        powers = np.asarray(run.objective.process.powers)
        np.testing.assert_allclose(powers, np.logaddexp(0, own["w"]), rtol=1e-6)
        assert np.abs(powers - 1).max() > 0.3
    else:
        low, high = own["mask_rates"].tolist()
        line = read_metrics(workdir / "metrics.jsonl")[-1]
        assert (np.float32(line["mask_rate/low"]), np.float32(line["mask_rate/high"])) == (low, high)
    capsys.readouterr()
    evaluate.main([f"--workdir={workdir}", "--draws=1", "--limit=24"])
    scored = json.loads(capsys.readouterr().out)["nelbo"]
    trained = read_metrics(workdir / "metrics.jsonl")[-1]["val/nelbo"]
    assert scored == pytest.approx(trained, rel=1e-5)

    sampler = generation.build_sampler(run.config, run.objective)
    canvas = np.full((8, 12), run.tokenizer.mask_id, np.int32)
    settled = generation.compiled(run, sampler)(run.params, canvas, seed=3)
    objective = build(run.config, run.tokenizer)[1]
    assert (objective == run.objective) == (name == "mdlm")
    unsettled = generation.Generator(run.model, objective, sampler, run.tokenizer, run.mesh)
    np.testing.assert_array_equal(unsettled(run.params, canvas, seed=3, state=own).tokens, settled.tokens)
    sample.main([f"--workdir={workdir}", "--prompt=to be", "--num=2", "--json"])
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert line["text"].startswith("to be") and run.tokenizer.mask_id not in line["tokens"]


def test_weights_from_elsewhere_have_it_as_it_begins(learned, tmp_path):
    name, workdir, _ = learned
    weights = tmp_path / "weights.npz"
    away = ["--to=mdlm", f"--workdir={workdir}", f"--output={weights}"]
    if name == "genmd4":  # which needs the time, and no format has such a network
        with pytest.raises(UserError, match="cannot hold a model with time_conditioning"):
            convert.main(away)
        return
    convert.main(away)
    experiment = f"--config={workdir.parent / 'x.py'}"
    convert.main(["--from=mdlm", f"--input={weights}", experiment, f"--workdir={tmp_path / 'new'}", *CASES[name]])
    run = generation.load(tmp_path / "new")
    assert state_of(tmp_path / "new", run.objective)["mask_rates"].tolist() == [0, 1]
    for a, b in zip(*map(jax.tree.leaves, (run.params, generation.load(workdir).params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_that_lost_it_is_passed_over(learned, tmp_path):
    _, whole, _ = learned
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4" / "objective")
    with pytest.warns(UserWarning, match="step 4 cannot be read"):
        assert generation.load(workdir).step == 2
    shutil.rmtree(workdir / "checkpoints" / "2" / "objective")
    with warnings.catch_warnings(), pytest.raises(UserError, match="No readable checkpoint"):
        warnings.simplefilter("ignore")
        generation.load(workdir)
