"""Models that were released: --model in every program that takes one, and those that come with the package."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import convert, evaluate, generation, judging, sample, scoring, shipped
from diffrwkv.cli import runs
from diffrwkv.cli.sample import check, parse_arguments
from diffrwkv.config import UserError
from diffrwkv.run import opened
from diffrwkv.weights import read_state_dict
from tests import test_house


@pytest.fixture(scope="module")
def released(trained, left_to_right, tmp_path_factory):
    """A folder with two released models: "tiny", in bfloat16, and "tiny-ar"."""
    folder = tmp_path_factory.mktemp("models")
    convert.main(["--to=hf", f"--workdir={trained}", f"--output={folder / 'tiny'}", "--dtype=bfloat16"])
    convert.main(["--to=hf", f"--workdir={left_to_right}", f"--output={folder / 'tiny-ar'}"])
    return folder


@pytest.fixture
def named(released, monkeypatch, tmp_path):
    """The two come with the package, and the current folder is empty."""
    monkeypatch.setattr(shipped, "FOLDER", released)
    monkeypatch.setattr(shipped, "MODELS", {"tiny": "a model", "tiny-ar": "another"})
    monkeypatch.setenv("DIFFRWKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_bfloat16_halves_the_file_and_rounds_the_weights(released, trained):
    run, exact = generation.load(released / "tiny"), generation.load(trained)
    assert exact.config.train.compilation_cache and run.config.train.compilation_cache is None, "no place of a machine"
    rounded = {path.name: path.stat().st_size for path in (released / "tiny").iterdir()}
    state = read_state_dict(released / "tiny" / "model.safetensors")
    assert rounded["model.safetensors"] < 2 * sum(x.size for x in state.values()) + 4096
    assert json.loads((released / "tiny" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    chex.assert_trees_all_equal(
        run.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), exact.params)
    )


def test_a_released_model_is_sampled_by_folder_and_by_name(released, named, capsys):
    flags = ["--num=1", "--length=8", "--json", "--seed=3"]
    texts = []
    for model in (str(released / "tiny"), "tiny"):
        sample.main([f"--model={model}", *flags])
        texts.append(json.loads(capsys.readouterr().out)["text"])
    again = generation.generate(generation.load("tiny"), length=8, seed=3)
    assert texts == [again.texts[0]] * 2


def test_a_released_model_is_evaluated_and_the_result_is_kept(named, programs, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("a cat sat on a mat. " * 40)
    flags = ["--model=tiny", f"--data={tmp_path / 'other.txt'}", "--draws=2"]
    evaluate.main(flags)
    first = json.loads(capsys.readouterr().out)
    assert np.isfinite(first["nelbo"])
    kept = list((tmp_path / "cache" / "models").glob("tiny-*/evaluations/*.json"))
    assert len(kept) == 1
    evaluate.main(flags)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == first and str(kept[0]) in captured.err
    evaluate.main(["--model=tiny", "--draws=2", "--limit=8"])  # the text of training is where it was
    assert json.loads(capsys.readouterr().out)["split"] == "validation"
    assert len(list((tmp_path / "cache" / "models").glob("tiny-*/eval.json"))) == 1


def test_its_validation_text_must_be_the_one_of_training(released, named, programs, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    convert.main(["--input=tiny", f"--workdir={copy}"])
    assert generation.load(copy).step == 0
    text = programs.folder / "text.txt"
    whole = text.read_text()
    try:
        text.write_text(whole[1:] + "a")
        with pytest.raises(UserError, match="is not the one that tiny was trained with"):
            evaluate.main(["--model=tiny", "--draws=2"])
    finally:
        text.write_text(whole)


def test_a_text_that_is_not_here_is_told(named, programs, tmp_path):
    text = programs.folder / "text.txt"
    text.rename(tmp_path / "away.txt")
    try:
        for flags, flag in (([], "--data"), (["--suite=samples", "--judge=tiny-ar", "--num=2"], "--real")):
            with pytest.raises(UserError, match=f"text that tiny was trained with is not here; {flag} names another"):
                evaluate.main(["--model=tiny", *flags])
    finally:
        (tmp_path / "away.txt").rename(text)


def test_no_text_is_taken_for_that_of_a_model_of_which_nothing_says_it(named):
    silent = dataclasses.replace(opened(None, "tiny"), data={})
    with pytest.raises(UserError, match="Nothing says which text tiny was trained with: name one by --data"):
        silent.own_data(None, "--data")


def test_a_released_model_judges(named, trained, capsys):
    evaluate.main(["--suite=samples", "--model=tiny", "--judge=tiny-ar", "--num=2", "--length=16"])
    found = json.loads(capsys.readouterr().out)
    assert np.isfinite(found["samples"]["nll"]) and found["judge"] == "tiny-ar" and found["weights"]
    told = judging.judge(["a cat sat", "on a mat."], by="tiny-ar")
    assert np.isfinite(told["ppl"])
    with pytest.raises(UserError, match="a judge must be autoregressive"):
        judging.load_judge("tiny")


def test_a_name_that_means_two_things_is_refused(released, named, tmp_path):
    (tmp_path / "here" / "tiny").mkdir()
    with pytest.raises(UserError, match=r"write \./tiny"):
        generation.load("tiny")
    with pytest.raises(UserError, match=r"write \./tiny"):
        runs.check_model("tiny")


def refused(flags, match):
    with pytest.raises(UserError, match=match):
        check(parse_arguments(flags))


def test_what_is_no_model_is_told_without_jax(released, named, trained):
    refused(["--model=nothing"], "those are tiny, tiny-ar")
    refused([f"--model={trained}"], "a run's folder is --workdir's")
    refused(["--model=tiny", "--step=3"], "one set of weights")
    refused(["--model=tiny", "--raw"], "one set of weights")
    refused([f"--workdir={released / 'tiny'}"], "give it as --model")
    check(parse_arguments(["--model=tiny"]))
    check(parse_arguments(["--model=hf:owner/name"]))


def test_flags_of_releases_go_with_them(trained, tmp_path):
    with pytest.raises(UserError, match="--dtype goes with --to=hf"):
        convert.main(["--to=rwkv7", f"--workdir={trained}", f"--output={tmp_path / 'x.npz'}", "--dtype=bfloat16"])


@pytest.mark.parametrize("name", shipped.MODELS)
def test_what_comes_with_the_package(name):
    folder = shipped.path_of(name)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {"README.md", "config.json", "diffrwkv.json", "model.safetensors"}
    assert sum(files.values()) < 4_000_000
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "\nlicense: " in card and f"# {name}\n" in card
    assert "/" + "work/" not in (folder / "diffrwkv.json").read_text()
    run = generation.load(name)
    text = generation.generate(run, "It was a dark", max_new_tokens=4, seed=1).texts[0]
    assert text.startswith("It was a dark") and len(text) > len("It was a dark")
    scores = scoring.score(run, ["It was a dark night.", "Qz jx vv kqj zzxq."])
    assert scores[0].bpc < 3 < scores[1].bpc


def test_the_package_has_the_models():
    assert set(shipped.MODELS) == {path.name for path in shipped.FOLDER.iterdir()}
    data = test_house.setup_cfg()["options.package_data"]["diffrwkv"]
    assert data == "models/*/*"
