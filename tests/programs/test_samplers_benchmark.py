"""benchmarks/samplers.py on tiny models: a line for each setting, none measured twice, wrong pairs refused."""

import json

import pytest

from benchmarks import report, samplers
from diffrwkv.diffusion.samplers import SAMPLERS, from_config
from diffrwkv.diffusion.schedules import LogLinear

pytestmark = pytest.mark.slow

FEW = {"ancestral": [{"num_steps": (2, 4)}], "confidence": [{"temperature": 1.0, "block": 4, "num_steps": (2,)}]}


@pytest.fixture
def measure(programs, trained, left_to_right, tmp_path):
    """Runs the benchmark with FEW settings: (flags that differ) -> (the process, the lines of its file)."""
    out = tmp_path / "samplers.jsonl"

    def run(*arguments, **flags):
        flags = {"workdir": trained, "judge": left_to_right, "num": 4, "batch_size": 2, "out": out} | flags
        code = "import sys\nfrom benchmarks import samplers\nfrom diffrwkv import config\n"
        code += f"samplers.SETTINGS = {FEW!r}\nconfig.run_program(lambda _: samplers.main(sys.argv[1:]))"
        done = programs.python(code, *(f"--{key}={value}" for key, value in flags.items()), *arguments)
        return done, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    return run


def test_a_line_for_each_setting(measure, tmp_path, monkeypatch):
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
    assert report.samplers_short().count("| ancestral |") == 1
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = pyplot.figure()
    report.PLOTS["samplers"][0](figure)
    assert all(len(axes.lines) >= 4 for axes in figure.axes)
    pyplot.close(figure)

    done, rows = measure(seed=1)
    assert done.returncode == 2 and "lines of other models, samples or seeds" in done.stderr and rows == more


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


def test_every_setting_is_one_of_its_sampler():
    assert set(samplers.SETTINGS) <= set(SAMPLERS)
    lines = samplers.settings(SAMPLERS)
    assert {name for name, *_ in lines} == set(SAMPLERS)
    names = [json.dumps([name, kept | varied]) for name, kept, varied in lines]
    assert len(set(names)) == len(names)
    for name, kept, varied in lines:
        from_config(name, schedule=LogLinear(), **kept | varied)
