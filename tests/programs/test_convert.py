"""Weights of another project become a workdir that the other programs take, and come back as they were."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import checkpoint, config, convert, evaluate, generation, sample, weights
from diffrwkv.config import UserError
from diffrwkv.diffusion.processes import masked as masked_process
from diffrwkv.evaluator import Evaluator
from tests.golden_arrays import golden
from tests.test_weights import mdlm_state

CONFIG = """
from diffrwkv.config import base


def get_config(arg=None):
    c = base()
    c.data.name = {text!r}
    c.data.length = 8
    c.model.dim = 8
    c.model.num_layers = 3
    c.model.pattern = "attention"
    c.model.mixers.attention.head_dim = 4
    c.model.channel_mixer = "mlp"
    c.model.block = "dit"
    c.model.condition_dim = 6
    c.samplers.ancestral.num_steps = 4
    c.train.eval_batch_size = 8
    c.model.scan_layers = arg == "scanned"
    return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text of eight characters, a config of a tiny Transformer, and weights for both."""
    folder = tmp_path_factory.mktemp("convert")
    letters = np.random.default_rng(0).integers(8, size=900)
    (folder / "text.txt").write_text("".join("abcdefg\n"[i] for i in letters))
    (folder / "dit.py").write_text(CONFIG.format(text=str(folder / "text.txt")))
    weights.write_state_dict({"backbone." + k: v for k, v in mdlm_state(layers=3).items()}, folder / "weights.npz")
    return folder


def arguments(folder, workdir="run", **changes):
    given = {"from": "mdlm", "input": folder / "weights.npz", "config": folder / "dit.py", "workdir": folder / workdir}
    return [f"--{name}={value}" for name, value in (given | changes).items() if value is not None]


@pytest.mark.parametrize("layers", ["plain", "scanned"])
def test_there_and_back(folder, layers, capsys):
    workdir = folder / layers
    convert.main(arguments(folder, layers, config=f"{folder / 'dit.py'}:{layers}"))
    assert json.loads((workdir / "run.json").read_text())["converted"]["file"] == "weights.npz"
    flags = ["--raw", "--step=0"] if layers == "scanned" else []
    convert.main(["--to=mdlm", f"--workdir={workdir}", f"--output={folder / 'back.npz'}", *flags])
    chex.assert_trees_all_equal(weights.read_state_dict(folder / "back.npz"), mdlm_state(layers=3))
    if layers == "scanned":
        capsys.readouterr()
        sample.main([f"--workdir={workdir}", "--num=1", "--json", "--prompt=abc"])
        line = json.loads(capsys.readouterr().out)
        assert line["text"].startswith("abc") and len(line["tokens"]) == 8 and line["step"] == 0
        evaluate.main([f"--workdir={workdir}", "--draws=1", "--limit=8"])
        assert np.isfinite(json.loads((workdir / "eval.json").read_text())["nelbo"])
        with pytest.raises(UserError, match="holds a run already"):
            convert.main(arguments(folder, layers))
        with pytest.raises(UserError, match="not the parameters of a model of format 'rwkv7'"):
            convert.main(["--to=rwkv7", f"--workdir={workdir}", f"--output={folder / 'back.npz'}"])


@pytest.mark.parametrize(
    ("changes", "more", "told"),
    [
        ({"input": "no/such.npz"}, [], "No file no/such.npz"),
        ({"from": "rwkv7"}, [], "of format 'rwkv7': missing emb.weight, "),
        ({"from": "fla"}, [], "of format 'fla': missing model.embeddings.weight, "),
        ({"from": "gpt"}, [], "invalid choice: 'gpt'"),
        ({"from": None}, [], "no config.json beside it that says whose model it is"),
        ({"config": None}, [], "9 token ids, and nothing says of which tokenizer: name it by --config.data.tokenizer="),
        ({"config": None, "from": "sedd"}, [], "a model of sedd needs its config.json"),
        ({"config": None}, ["--config.data.tokenizer=byte"], "has 9 token ids, .* 'byte' has 259 with the mask"),
        ({"config": None}, ["--config.data.tokenizer=byte", "--config.model.dim=16"], "pass --config.model.dim=8"),
        ({"from": "duo"}, [], "config.model.time_conditioning is False and must be True"),
        ({}, ["--config.diffusion.name=sedd_absorb"], "config.diffusion.name is 'sedd_absorb' and must be 'mdlm'"),
        ({"input": "hf:owner"}, [], "write hf:OWNER/NAME"),
        ({"input": None}, [], "either --input"),
        ({}, ["--output=x.npz"], "--output does not go with --input"),
        ({}, ["--push=a/b"], "--push does not go with --input"),
        ({}, ["--to=mdlm"], "either --input"),
        ({}, ["--lenght=3"], "Unknown argument '--lenght=3'"),
        ({}, ["--ema"], "no moving average"),
        ({}, ["--config.model.dmi=8"], "Did you mean: config.model.dim"),
        (
            {},
            ["--config.model.dim=16", "--config.model.block=transformer"],
            "config.model.dim is 16 and must be 8; .* pass --config.model.dim=8 --config.model.block=dit",
        ),
        ({}, ["--config.model.time_conditioning=True"], "pass --config.model.time_conditioning=False"),
        ({}, ["--config.data.tokenizer=byte"], "has 9 token ids, config.data.tokenizer = 'byte' has 259 with the mask"),
        ({}, ["--config.data.name=no/such/text"], "no/such/text"),
        ({}, ["--config.sampler.name=autoregressive"], "config.sampler"),
    ],
)
def test_nothing_is_written_when_something_is_wrong(folder, changes, more, told):
    with pytest.raises(UserError, match=told):
        convert.main(arguments(folder, "wrong", **changes) + more)
    assert not (folder / "wrong").exists()


def test_a_workdir_that_holds_something_is_left_alone(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for workdir in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="is not an empty folder"):
            convert.main(arguments(folder, workdir))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


class Killed(BaseException):
    """Nothing that a program would catch."""


def test_what_was_stopped_at_any_write_does_not_load(folder, tmp_path, monkeypatch):
    places = [(checkpoint.Checkpoints, "save"), (convert, "record_run"), (config, "write_json")]
    places += [(pathlib.Path, "replace")]
    for number, (owner, name) in enumerate(places):
        for after in (False, True):
            workdir, real = tmp_path / f"{number}{after}", getattr(owner, name)

            def stopped(*args, after=after, real=real, **kwargs):
                if after:
                    real(*args, **kwargs)
                raise Killed

            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(owner, name, stopped)
                convert.main(arguments(folder, workdir))
            assert not workdir.exists()
            with pytest.raises(UserError, match="No config.json"):
                evaluate.main([f"--workdir={workdir}"])
    convert.main(arguments(folder, workdir))  # as if nothing had been
    assert {path.name for path in tmp_path.iterdir() if path.name.endswith(workdir.name)} == {workdir.name}
    convert.main(["--to=mdlm", f"--workdir={workdir}", f"--output={tmp_path / 'back.npz'}"])
    chex.assert_trees_all_equal(weights.read_state_dict(tmp_path / "back.npz"), mdlm_state(layers=3))


@pytest.mark.slow
def test_kills(folder, tmp_path):
    """SIGKILL at five moments: what is there afterwards is nothing or all of it, and the same command goes through."""
    command = [sys.executable, "-m", "diffrwkv.convert", *arguments(folder, tmp_path / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    for name in (".run.part", ".run.part/checkpoints", ".run.part/config.json", ".run.part/run.json", "run"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        while process.poll() is None and not (tmp_path / name).exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "run").exists():
            break
        with pytest.raises(UserError, match="No config.json"):
            evaluate.main([f"--workdir={tmp_path / 'run'}"])
    else:
        subprocess.run(command, check=True, env=environment, timeout=120)
    convert.main(["--to=mdlm", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'back.npz'}"])
    chex.assert_trees_all_equal(weights.read_state_dict(tmp_path / "back.npz"), mdlm_state(layers=3))


def test_weights_with_their_config_need_no_flag(folder, capsys):
    """A folder as published becomes a workdir that samples; that is released, and loaded, and made a workdir again."""
    source = folder / "published"
    source.mkdir()
    state = mdlm_state(layers=3)
    weights.write_state_dict({"backbone." + name: value for name, value in state.items()}, source / "model.safetensors")
    told = {"model_type": "mdlm", "hidden_dim": 8, "cond_dim": 6, "n_blocks": 3, "n_heads": 2, "vocab_size": 9}
    (source / "config.json").write_text(json.dumps(told | {"model_length": 8, "time_conditioning": False}))
    data = [f"--config.data.name={folder / 'text.txt'}", "--config.data.tokenizer=char", "--config.data.wrap=False"]
    convert.main(
        [f"--input={source}", f"--workdir={folder / 'alone'}", *data, "--config.samplers.ancestral.num_steps=4"]
    )
    assert "parameters of mdlm" in capsys.readouterr().out
    convert.main(["--to=hf", f"--workdir={folder / 'alone'}", f"--output={folder / 'released'}"])
    assert "in names of mdlm" in capsys.readouterr().out
    convert.main([f"--input={folder / 'released'}", f"--workdir={folder / 'again'}"])
    run = generation.load(folder / "alone")
    for name in ("released", "again"):
        other = generation.load(folder / name)
        chex.assert_trees_all_equal(other.params, run.params)
        assert other.config == run.config and other.tokenizer == run.tokenizer
    [text] = generation.generate(generation.load(folder / "released"), "abc").texts
    capsys.readouterr()
    sample.main([f"--workdir={folder / 'again'}", "--num=1", "--json", "--prompt=abc"])
    assert text.startswith("abc") and json.loads(capsys.readouterr().out)["text"] == text
    with pytest.raises(UserError, match="which is no workdir: give it as --model, .* --input="):
        sample.main([f"--workdir={folder / 'released'}"])
    with pytest.raises(UserError, match="says itself what it is"):
        convert.main([f"--input={folder / 'released'}", "--from=mdlm", f"--workdir={folder / 'x'}"])
    with pytest.raises(UserError, match="config.model.dim is 16 and must be 8"):
        convert.main([f"--input={folder / 'released'}", "--config.model.dim=16", f"--workdir={folder / 'x'}"])
    with pytest.raises(UserError, match="not an empty folder"):
        convert.main(["--to=hf", f"--workdir={folder / 'alone'}", f"--output={folder / 'released'}"])


def test_pushing_goes_to_the_hub(folder, tmp_path, monkeypatch, capsys):
    convert.main(arguments(folder, tmp_path / "run"))
    flags = ["--to=hf", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="write OWNER/NAME"):
        convert.main([*flags, f"--output={tmp_path / 'out'}", "--push=mine"])
    assert not (tmp_path / "out").exists()
    pushed = []
    monkeypatch.setattr(convert.hub, "push", lambda path, name: pushed.append((path, name)) or "there")
    convert.main([*flags, f"--output={tmp_path / 'out'}", "--push=me/mine"])
    assert pushed == [(tmp_path / "out", "me/mine")] and "there: uploaded" in capsys.readouterr().out
    for more, told in ((["--push=a/b", "--to=mdlm"], "given twice"), (["--output="], "--to needs --output")):
        with pytest.raises(UserError, match=told):
            convert.main([*flags, *more])
    with pytest.raises(UserError, match="--push goes with --to=hf"):
        convert.main(["--to=mdlm", f"--workdir={tmp_path / 'run'}", "--output=x.npz", "--push=a/b"])


def test_wrong_outputs(folder):
    for output, told in (("x.pt", ".safetensors or .npz"), ("no/such/x.npz", "no folder no/such")):
        with pytest.raises(UserError, match=told):
            convert.main(["--to=mdlm", "--workdir=x", f"--output={output}"])
    with pytest.raises(UserError, match="No config.json"):
        convert.main(["--to=mdlm", f"--workdir={folder}", f"--output={folder / 'x.npz'}"])


@pytest.mark.optimised
def test_a_text_is_scored_by_mdlms_protocol_as_mdlm_scores_it(tmp_path, monkeypatch):
    """From a file of weights and a text to the number, with the times and masks that MDLM drew."""
    network, scored = golden("mdlm_dit.npz"), golden("mdlm_loss.npz")
    letters = np.array(sorted("\nABabcdefghijklmnopqrstuvwxyz"))
    assert len(letters) == int(network["mask_index"])
    (tmp_path / "train.txt").write_text("".join(letters) * 60)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "".join(letters[scored["x0"]].ravel())}))
    (tmp_path / "dit.py").write_text(f"""
from diffrwkv.config import base

def get_config(arg=None):
    c = base()
    c.data.name = {str(tmp_path / "train.txt")!r}
    c.data.length = {scored["x0"].shape[1]}
    c.model.dim = {int(network["hidden"])}
    c.model.num_layers = {int(network["n_blocks"])}
    c.model.pattern = "attention"
    c.model.mixers.attention.head_dim = {int(network["hidden"]) // int(network["n_heads"])}
    c.model.channel_mixer = "mlp"
    c.model.block = "dit"
    c.model.condition_dim = {int(network["cond_dim"])}
    return c
""")
    state = {"backbone." + name[2:]: value for name, value in network.items() if name.startswith("w/")}
    weights.write_state_dict(state, tmp_path / "weights.npz")
    convert.main(arguments(tmp_path, config=tmp_path / "dit.py"))

    def masked(key, shape):
        assert shape == scored["u"].shape
        return jnp.asarray(scored["u"])

    monkeypatch.setattr(masked_process, "uniform", masked)
    monkeypatch.setattr(Evaluator, "_times", lambda self, key: scored["t"])
    flags = [f"--data={tmp_path / 'text.jsonl'}", "--draws=1", "--no_wrap", "--no_eos", "--batch_size=3"]
    evaluate.main([f"--workdir={tmp_path / 'run'}", *flags])
    [result] = (json.loads(path.read_text()) for path in (tmp_path / "run" / "evaluations").iterdir())
    theirs = scored["token_loss_default"].mean(dtype=np.float64)
    assert result["tokens"] == scored["x0"].size and result["nelbo"] == pytest.approx(theirs, rel=1e-5)
