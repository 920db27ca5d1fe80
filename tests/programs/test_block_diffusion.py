"""Block diffusion through the programs: train with blocks of several sizes, evaluate and sample at each."""

import json

import pytest

import diffrwkv
from diffrwkv import evaluate, sample
from diffrwkv.config import UserError


@pytest.fixture(scope="session")  # not made anew where a worker comes back to this file
def blocks(programs):
    """A workdir trained with blocks of 4 and 8 tokens."""
    workdir = programs.folder / "blocks"
    done = programs.train(workdir, config=f"{programs.config}:4,8")
    assert done.returncode == 0, done.stderr
    assert "--- sample 0 at step 12 ---" in done.stdout
    return workdir


@pytest.mark.slow
def test_training_alternates_and_goes_on(programs, blocks):
    """Ended after step 6 and gone on with, the same numbers as of a run that was not interrupted."""
    other = programs.folder / "blocks_in_two"
    assert programs.train(other, "--config.train.num_steps=6", config=f"{programs.config}:4,8").returncode == 0
    done = programs.train(other, config=f"{programs.config}:4,8")
    assert done.returncode == 0 and "Going on from step 6" in done.stdout, done.stderr
    read = lambda workdir: [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = lambda workdir: {line["step"]: line["train/loss"] for line in read(workdir) if "train/loss" in line}
    assert losses(blocks) == losses(other) and len(losses(blocks)) == 12


@pytest.mark.parametrize("size, told", [(None, 4), (8, 8), (0, 16), (100, 16)])
def test_evaluate_at_any_size(blocks, capsys, size, told):
    arguments = [f"--workdir={blocks}", "--draws=2", "--limit=10"]
    evaluate.main(arguments if size is None else [*arguments, f"--block_size={size}"])
    result = json.loads((blocks / "eval.json").read_text())
    assert result["block_size"] == told and 2 < result["nelbo"] < 5


def test_sample_in_blocks(blocks, capsys):
    """Longer than the training's texts, with a prompt, in blocks that do not divide it."""
    arguments = [f"--workdir={blocks}", "--num=2", "--json", "--prompt=be or ", "--length=26", "--block_size=8"]
    sample.main(arguments)
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert all(row["text"].startswith("be or ") and len(row["tokens"]) == 26 for row in rows)
    assert "blocks of 8 do not divide the 26 tokens" in err
    sample.main([*arguments, "--batch_size=1"])
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == [row["text"] for row in rows]


def test_generate_with_a_trace(blocks):
    run = diffrwkv.load(blocks)
    for sampler in ("confidence", "pipelined"):
        options = {"sampler": sampler, "return_trace": True, "block_size": 4}
        generation = diffrwkv.generate(run, ["a", "be or"], length=20, **options)
        assert generation.trace.shape[1] == 2 and (generation.trace[-1, :, :20] == generation.tokens).all()
    whole = diffrwkv.generate(run, length=16, block_size=0)
    assert whole.tokens.shape == (1, 16) and whole.passes[0] <= 16


def test_a_stream_is_what_is_generated(blocks, capsys):
    run = diffrwkv.load(blocks)
    whole = diffrwkv.generate(run, "be or", length=24, seed=3, block_size=4).texts[0]
    pieces = list(diffrwkv.stream(run, "be or", length=23, seed=3, block_size=4))
    [next_block] = [f for key, f in run.generators.items() if isinstance(key, tuple) and key[0] == "stream"]
    assert next_block._cache_size() == 1, "the blocks of a stream have one program"
    assert "".join(pieces) == whole and len(pieces) == 6
    sample.main([f"--workdir={blocks}", "--stream", "--prompt=be or", "--length=24", "--seed=3", "--block_size=4"])
    assert capsys.readouterr().out == whole + "\n"
    endless = diffrwkv.stream(run)
    assert all(len(next(endless)) == 4 for _ in range(20))


@pytest.mark.slow
def test_mask_rates_are_searched_and_kept(programs):
    """A run that is stopped goes on at the rates that it had found."""
    search = "--config.objectives.mdlm.search_mask_rates=True"
    workdir, other = programs.folder / "searched", programs.folder / "searched_whole"
    assert programs.train(workdir, search, "--config.train.num_steps=8", config=f"{programs.config}:4").returncode == 0
    done = programs.train(workdir, search, config=f"{programs.config}:4")
    assert done.returncode == 0 and "Going on from step 8" in done.stdout, done.stderr
    assert programs.train(other, search, config=f"{programs.config}:4").returncode == 0
    lines = [[json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()] for w in (workdir, other)]
    rates = [{x["step"]: (x["mask_rate/low"], x["mask_rate/high"]) for x in r if "mask_rate/low" in x} for r in lines]
    assert rates[0] == rates[1] and sorted(rates[0]) == [4, 8, 12]
    assert all(0 <= low < high <= 1 for low, high in rates[0].values())
    losses = [{x["step"]: x["train/loss"] for x in run if "train/loss" in x} for run in lines]
    assert losses[0] == losses[1]


def test_wrong_questions(blocks, trained):
    with pytest.raises(UserError, match="needs a model of block diffusion"):
        sample.main([f"--workdir={trained}", "--block_size=4"])
    with pytest.raises(UserError, match="needs blocks"):
        evaluate.main([f"--workdir={trained}", "--block_size=4"])
    with pytest.raises(UserError, match="at least 0"):
        evaluate.main([f"--workdir={blocks}", "--block_size=-1"])
    with pytest.raises(UserError, match="Guidance"):
        sample.main([f"--workdir={blocks}", "--guidance=1"])
    with pytest.raises(UserError, match="attention in every layer"):
        diffrwkv.generate(diffrwkv.load(trained), frozen_cache="dual")
    run = diffrwkv.load(blocks)
    with pytest.raises(UserError, match="has an exact state"):
        diffrwkv.generate(run, frozen_cache="dual")
    with pytest.raises(UserError, match="--sampler: threshold must be"):
        diffrwkv.generate(run, sampler="pipelined", threshold=2.0)
    with pytest.raises(UserError, match="at least 0"):
        diffrwkv.generate(run, block_size=-1)
    with pytest.raises(UserError, match="needs a model of block diffusion"):
        diffrwkv.stream(diffrwkv.load(trained))
    with pytest.raises(UserError, match="block_size of at least 1"):
        diffrwkv.stream(run, block_size=0)
    with pytest.raises(UserError, match="several at once"):
        diffrwkv.stream(run, sampler="pipelined")
    with pytest.raises(UserError, match="too many for length = 3"):
        diffrwkv.stream(run, "be or", length=3)
    with pytest.raises(UserError, match="leave the other flags out"):
        sample.main([f"--workdir={blocks}", "--stream", "--json"])


def test_wrong_blocks_in_a_config(programs, tmp_path):
    for blocks in ("x", "4,-1"):
        done = programs.train(tmp_path / "never", config=f"{programs.config}:{blocks}")
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert not (tmp_path / "never" / "checkpoints").exists()
