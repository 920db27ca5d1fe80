"""benchmarks/samplers.py on tiny models: a line for each setting, none measured twice, wrong pairs refused."""

import json

import pytest

from benchmarks import report, samplers
from diffrwkv import config, generation, presets
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.diffusion.samplers import SAMPLERS, from_config

pytestmark = pytest.mark.slow

FEW = {
    "whole": {
        "ancestral": [{"num_steps": (2, 4)}],
        "confidence": [{"temperature": 1.0, "block": 4, "num_steps": (2,)}],
    },
    "blocks": {
        "ancestral": [{"block_size": 4, "num_steps": (2,)}],
        "pipelined": [{"block_size": 4, "threshold": (0.5,)}],
    },
}


@pytest.fixture
def measure(programs, trained, left_to_right, tmp_path):
    """Runs the benchmark with FEW settings: (flags that differ) -> (the process, the lines of its file)."""
    out = tmp_path / "samplers.jsonl"

    def run(*arguments, **flags):
        flags = {"workdir": trained, "judge": left_to_right, "num": 4, "batch_size": 2, "out": out} | flags
        code = "import sys\nfrom benchmarks import samplers\nfrom diffrwkv import cli\n"
        code += f"samplers.SETTINGS = {FEW!r}\ncli.run_program(lambda _: samplers.main(sys.argv[1:]))"
        done = programs.python(code, *(f"--{key}={value}" for key, value in flags.items()), *arguments)
        return done, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    return run


def test_a_line_for_each_setting(measure, programs, tmp_path, monkeypatch):
    done, rows = measure("--samplers", "ancestral", "autoregressive", "first_hitting")
    assert done.returncode == 0, done.stderr
    names = ["validation text", "ancestral", "ancestral", "autoregressive", "first_hitting"]
    assert [row["sampler"] for row in rows] == names
    assert [row.get("passes") for row in rows[3:]] == [16, 16] and all(row["passes"] <= 5 for row in rows[1:3])
    for row in rows:
        assert row["ppl"] > 1 and row["nll_se"] > 0 and 0 < row["distinct_1"] <= row["distinct_2"] <= 1
        assert len(row["sample"]) == 16 and row["num"] == 4 and row["device"] and row["command"]
    assert all(row["cpu_seconds"] > 0 and row["wall_seconds"] > 0 for row in rows[1:])

    done, more = measure("--samplers", "ancestral", "confidence")
    assert done.returncode == 0 and more[:5] == rows and len(more) == 6, "only what is new is measured"

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.samplers()
    assert "| confidence (temperature 1.0, block 4) | num_steps 2 | 8 |" in text and "4 samples of 16 tokens" in text
    table = text.splitlines()
    blocks = programs.folder / "sampled_blocks"
    trained = programs.train(blocks, "--config.train.num_steps=4", config=f"{programs.config}:4,8")
    assert trained.returncode == 0, trained.stderr
    done, both = measure("--samplers", "ancestral", "autoregressive", "pipelined", workdir=blocks)
    assert done.returncode == 0 and both[:6] == more and len(both) == 8, done.stderr
    assert [row["sampler"] for row in both[6:]] == ["ancestral", "pipelined"]
    assert all(row["model"]["blocks"] == [4, 8] for row in both[6:])
    assert 0 < both[6]["passes"] <= 4 * 2 + 3 and both[7]["passes"] > 0
    text = report.samplers_in_blocks()
    for begins in ("ancestral (block_size 4) | num_steps 2 |", "pipelined (block_size 4) | threshold 0.5 |"):
        assert f"| `birwkv7@4,8` | {begins}" in text
    assert report.samplers().splitlines()[:8] == table[:8], "the first model's table stays as it was"
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for plot, curves in (("samplers", 4), ("samplers_in_blocks", 3)):
        figure = pyplot.figure()
        report.PLOTS[plot][0](figure)
        assert all(len(axes.lines) >= curves for axes in figure.axes)
        pyplot.close(figure)

    done, rows = measure(seed=1)
    assert done.returncode == 2 and "lines of another judge or other samples" in done.stderr and rows == both


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        ({"judge": "workdir"}, "only an autoregressive one"),
        ({"workdir": "judge"}, "name a diffusion model"),
        ({"num": 3}, "multiple of --batch_size"),
        ({"num": 400}, "chunks validate"),
    ],
)
def test_what_does_not_fit_together_is_refused(measure, trained, left_to_right, swap, message):
    models = {"workdir": trained, "judge": left_to_right}
    done, rows = measure(**{key: models.get(value, value) for key, value in swap.items()})
    assert done.returncode == 2 and message in done.stderr and not rows, done.stderr


class Run:
    """What `settings` and `build_sampler` want to know of a run."""

    def __init__(self, backbone):
        self.config = config.base()
        presets.configure(self.config, backbone, "tiny")
        sections = self.config.to_dict()
        self.objective = objectives.from_config(Vocabulary(10, 9), **self.config.diffusion.to_dict(), sections=sections)


@pytest.mark.parametrize("backbone", ["birwkv", "birwkv@4,16", "dit", "dit@16"])
def test_every_setting_is_one_of_its_sampler(backbone):
    run = Run(backbone)
    lines = samplers.settings(run, samplers.NAMES)
    names = [json.dumps([name, kept | varied]) for name, kept, varied in lines]
    assert len(set(names)) == len(names) > 5
    if "@" not in backbone:
        fitting = {name for name, cls in SAMPLERS.items() if generation.fits(cls, run.objective.process)}
        assert {name for name, *_ in lines} == fitting | {"autoregressive"}
    assert any("frozen_cache" in kept for _, kept, _ in lines) == (backbone == "dit")
    assert {*samplers.SETTINGS["whole"], *samplers.SETTINGS["frozen"]} <= set(SAMPLERS)
    assert set(samplers.SETTINGS["blocks"]) <= set(samplers.NAMES)
    for name, kept, varied in lines:
        if samplers.is_causal(name):
            from_config(name, **kept | varied)
        else:
            generation.build_sampler(run.config, run.objective, name=name, **kept | varied)
