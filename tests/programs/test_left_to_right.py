"""The autoregressive yardsticks through the programs: train, evaluate, sample, and what they refuse."""

import json
from pathlib import Path

import pytest

from diffrwkv import config, generation
from diffrwkv import run as runs
from diffrwkv.data import tokenizers


def run(module):
    """A program, as code."""
    call = f"cli.run_program(lambda _: {module}.main(sys.argv[1:]))"
    return f"import sys\nfrom diffrwkv import cli, {module}\n{call}"


def test_it_is_scored_without_noise(programs, left_to_right):
    scores = []
    for seed in (0, 1):
        done = programs.python(
            run("evaluate"), f"--workdir={left_to_right}", "--draws=8", "--limit=16", f"--seed={seed}"
        )
        assert done.returncode == 0, done.stderr
        assert "--draws and --seed do nothing" in done.stderr
        scores.append(json.loads((left_to_right / "eval.json").read_text()))
    assert scores[0]["draws"] == 1 and scores[0]["nelbo"] == scores[1]["nelbo"]
    assert scores[0]["tokens"] == 16 * 16  # the first token of a sequence counts too


def test_it_goes_on_from_a_prompt_and_cannot_infill(programs, left_to_right):
    arguments = [f"--workdir={left_to_right}", "--num=2", "--length=12", "--json"]
    done = programs.python(run("sample"), *arguments, "--prompt=abc")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["passes"] for line in lines] == [12, 12]
    assert all(line["text"].startswith("abc") and len(line["tokens"]) == 12 for line in lines)
    for flag, message in (("--infill=a__d", "use a prompt"), ("--num_steps=4", "no option num_steps")):
        refused = programs.python(run("sample"), *arguments[:2], flag)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr


def build(*changes):
    """The sampler of an experiment with overrides, after everything before it was built."""
    experiment = Path(__file__).parents[2] / "experiments" / "peer_shakespeare.py"
    cfg = config.parse([f"--config={experiment}:{changes[0]}", *changes[1:]])
    model, objective = runs.build(cfg, tokenizers.Char("abcdef", specials=False))
    runs.abstract_params(model, 8)
    return generation.build_sampler(cfg, objective)


@pytest.mark.parametrize(
    "changes,message",
    [
        (["ar_rwkv", "--config.model.pattern=birwkv7"], "predicts the next token, but config.model sees it"),
        (["ar_rwkv", "--config.model.channel_mixers.rwkv7.shift=both"], "sees it"),
        (["ar_transformer", "--config.sampler.name=ancestral"], "does not sample from .* choose 'autoregressive'"),
        (["dit", "--config.sampler.name=autoregressive"], "does not sample from .* 'ancestral'"),
        (["dit", "--config.samplers.ancestral.top_p=0"], "config.samplers.ancestral: top_p must be"),
        (["dit", "--config.model.pattern=attention,"], "is none: write mixers"),
        (["dit", "--config.model.mixers.attention.head_dim=48"], "even head_dim that divides"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(config.UserError, match=message):
        build(*changes)
