"""Prompts and answers through the programs: trained on, scored, and said to be so."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import data, evaluate
from diffrwkv.evaluator import Evaluator, count_scored
from tests.known_run import real

PAIRS = [(f"{a}+{b}=", f"{a + b}.") for a in range(9) for b in range(9)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in PAIRS))
    return path


def test_a_causal_model_is_scored_on_its_answers(pairs):
    """Against the definition: each token of an answer given all before it, the prompt too."""
    run = real("rwkv7", "autoregressive")
    dataset = data.load(
        str(pairs), tokenizer=run.tokenizer, length=12, packing="document", prompt_key="prompt", text_key="answer"
    )
    result = Evaluator(run.model, run.objective, dataset, run.mesh, batch_size=8, padded=True)(run.params)
    source, mask = dataset.validation, run.tokenizer.mask_id
    rows = np.stack([source[i] for i in range(len(source))])
    scored = np.stack([source.scored(i) for i in range(len(source))])
    late = np.concatenate([np.full((len(rows), 1), mask), rows[:, :-1]], axis=1)
    logits = np.asarray(jax.jit(lambda x: run.model.apply({"params": run.params}, x))(jnp.asarray(late)), np.float64)
    logits[..., mask] = -np.inf
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, rows[..., None], axis=-1)[..., 0]
    assert result["nelbo"] == pytest.approx(nats[scored].mean(), rel=1e-5)
    characters = sum(len(answer) for _, answer in PAIRS[-len(source) :])
    assert (result["tokens"], result["characters"], result["counted"]) == (scored.sum(), characters, "answers")
    assert result["bpc"] == pytest.approx(nats[scored].sum() / characters / np.log(2), rel=1e-5)
    part = count_scored(dataset, "validation", 3)
    assert part == (sum(len(answer) for _, answer in PAIRS[-len(source) :][:3]), scored[:3].sum())


@pytest.mark.slow
def test_trained_on_and_evaluated(programs, pairs, capsys):
    """In blocks, some of which hold prompt and answer; the programs say what they count."""
    workdir = programs.folder / "sums"
    keys = {
        "data.name": pairs,
        "data.tokenizer": "byte",
        "data.packing": "document",
        "data.prompt_key": "prompt",
        "data.text_key": "answer",
        "diffusion.layout": "blocks",
        "layouts.blocks.sizes": "(4,)",
        "train.accumulate": 2,
        "train.num_steps": 4,
        "train.sample_every": 0,
    }
    done = programs.train(workdir, *(f"--config.{key}={value}" for key, value in keys.items()))
    assert done.returncode == 0, done.stderr
    assert "Answers alone are noised and counted" in done.stdout
    info = json.loads((workdir / "run.json").read_text())["data"]
    first = PAIRS[-info["validation"]["chunks"] :][:3]
    evaluate.main([f"--workdir={workdir}", "--draws=2", "--limit=3"])
    result = json.loads((workdir / "eval.json").read_text())
    assert info["counted"] == result["counted"] == "answers"
    assert result["tokens"] == sum(len(answer) + 1 for _, answer in first)  # and the EOS behind each
