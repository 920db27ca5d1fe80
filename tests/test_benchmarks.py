"""The benchmarks: what is wrong gets no time, peers get our arguments, benchmarks/gpu.sh goes on behind what fails."""

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerators, correct, hlo, launches, measure, peers, report, time_mix, wkv7
from diffrwkv.config import parse
from tests.golden_arrays import relative_error

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 24, 2, 8)


def options(**changes):
    """What `measure` reads of the command line."""
    given = {
        "implementations": ["chunked"],
        "peers": {},
        "kind": "masked",
        "dtype": "float32",
        "tolerance": 1e-4,
        "definition_until": 64,
        "chunk_size": None,
        "parts": [],
        "reverse": False,
        "rounds": 1,
        "repeats": 1,
        "on_cpu": True,
        "ceilings": None,
    }
    return argparse.Namespace(**given | changes)


def test_useful_work_by_hand():
    operations, moved = wkv7.useful((2, 100, 3, 64), "forward", 1, 2)
    assert operations == 600 * (18 * 16 * 64 + 8 * 64 * 64)
    assert moved == 600 * (5 * 128 + 256 + 128)  # r k v a b, log_w, out
    both, more = wkv7.useful((2, 100, 3, 64), "forward+backward", 2, 2)
    assert both == 2 * 3 * operations
    assert more == 2 * (moved + 600 * (2 * (5 * 128 + 256) + 128 + 512))


@pytest.mark.parametrize("sides, calls, direction", [(1, 1, "forward"), (2, 2, "forward"), (2, 1, "forward+backward")])
def test_a_pass_is_right_on_every_side(sides, calls, direction):
    given = wkv7.arguments(SHAPE, sides, "masked", "float32")
    _, expected = wkv7.judge(SHAPE, direction, *given, options())
    op = wkv7.operator("chunked", sides, calls)
    errors = wkv7.compare(wkv7.build(op, direction, *given).run(), expected)
    gradients = {"dr", "dlog_w", "dk", "dv", "da", "db"} if direction == "forward+backward" else set()
    assert set(errors) == {"out", "state"} | gradients
    assert max(errors.values()) < 1e-5
    if sides == 2:  # the sides have inputs of their own, and the second runs in reverse
        other = wkv7.build(wkv7.operator("chunked", 1, 1, reverse=True), "forward", given[0][1:], given[1][1:]).run()
        assert relative_error(expected[0][1][0], other[0][0][0]) < 1e-5


@pytest.mark.parametrize("sides", (1, 2))
def test_parts_of_the_time_axis(sides, monkeypatch):
    """What is measured in segments is right, says so, and is set beside one piece."""
    pieces = []
    split = wkv7.split
    monkeypatch.setattr(wkv7, "split", lambda *x: pieces.append(x[-1]) or split(*x))
    rows = wkv7.measure((1, 150, 2, 8), "forward+backward", sides, options(parts=[1, 3], definition_until=256))
    assert sorted(pieces) == [1, 3]  # compiled by threads, in any order
    assert [(row["parts"], row["parts_forced"]) for row in rows] == [(1, False), (1, True), (3, True)]
    assert all(row["error"] < 1e-5 for row in rows)
    assert any("3 parts of the time axis" in line for line in wkv7.compared(rows))


def test_a_row_says_in_how_many_segments_a_form_went():
    shape = 1, 65536, 12, 64
    assert [wkv7.segments("pallas_gpu", forced, 2, shape) for forced in (None, 1, 3)] == [11, 1, 3]
    assert wkv7.segments("chunked", None, 2, shape) == 1


def test_wrong_kernels_are_told(monkeypatch, tmp_path, capsys):
    """The rows say which; the exit status is an error's."""
    split = wkv7.split
    monkeypatch.setattr(wkv7, "split", lambda *x: tuple((1.1 * out, final) for out, final in split(*x)))
    mixes = time_mix.token_mixes

    def spoilt(x, *more, implementation, **rest):
        return mixes(x if implementation else 1.1 * x, *more, implementation=implementation, **rest)

    monkeypatch.setattr(time_mix, "token_mixes", spoilt)
    command = ["x", "--shapes", "1x20x1x8", "1x70x1x8/2", f"--out={tmp_path / 'x.jsonl'}"]
    monkeypatch.setattr(sys, "argv", command)
    ssd = correct.ssd
    monkeypatch.setattr(correct, "ssd", lambda reverse, **rest: ssd(reverse=False, **rest))
    pieces = [
        f"time_mix {name} {way}" for name in ("token_mixes", "operands", "finish") for way in ("forward", "backward")
    ]
    assert correct.main() == f"wrong: chunked, chunked, ssd, ssd, {pieces[0]}, {pieces[1]}"
    rows = measure.read(tmp_path / "x.jsonl")
    assert [row["implementation"] for row in rows[6:]] == ["ssd"] * 2 + ["wkv7"] * 2 + pieces
    assert [row["right"] for row in rows[6:]] == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 4
    rows = rows[:6]
    assert [row["right"] for row in rows] == [row["parts"] == 1 for row in rows] == [True] * 4 + [False] * 2
    assert rows[-1]["errors"]["out"] > 0.05 and rows[-1]["errors"]["state"] < 1e-5


def test_what_is_wrong_or_broken_gets_no_time(monkeypatch, capsys):
    def spoilt(name, *rest, **more):
        op = wkv7_operator(name, *rest, **more)
        if name == "associative":
            return lambda inputs: tuple((1.01 * out, state) for out, state in op(inputs))
        if name == "pallas_tpu":
            return lambda inputs: jax.pure_callback(lambda: 1 / 0, jnp.zeros(()))
        return op

    wkv7_operator = wkv7.operator
    monkeypatch.setattr(wkv7, "operator", spoilt)
    names = ["chunked", "associative", "pallas_tpu", "pallas_gpu"]
    rows = wkv7.measure(SHAPE, "forward", 1, options(implementations=names))
    good, wrong, broken = rows  # pallas_gpu is no GPU's here: left out, with its reason
    assert good["milliseconds"] > 0 and good["error"] < 1e-5 and good["tflops"] > 0
    assert wrong["milliseconds"] is None and "'out'" in wrong["failed"] and 5e-3 < wrong["error"] < 2e-2
    assert broken["milliseconds"] is None and broken["failed"]
    assert "pallas_gpu" in capsys.readouterr().out
    for row in rows:
        json.dumps(row, allow_nan=False)


def test_nan_is_wrong():
    given = wkv7.arguments(SHAPE, 1, "masked", "float32")
    _, expected = wkv7.judge(SHAPE, "forward", *given, options())
    nan = lambda inputs: ((jnp.full_like(inputs[0]["v"], jnp.nan), jnp.zeros((1, 2, 8, 8))),)
    one, found = wkv7.checked(lambda: wkv7.build(nan, "forward", *given), expected, 1e-4)
    assert one is None and found["error"] is None and "nan" in found["failed"]


def test_long_sequences_are_judged_by_what_was_judged():
    given = wkv7.arguments(SHAPE, 1, "masked", "float32")
    name, far = wkv7.judge(SHAPE, "forward", *given, options(definition_until=16))
    assert name == "associative"
    _, near = wkv7.judge(SHAPE, "forward", *given, options())
    assert max(wkv7.compare(far, near).values()) < 1e-5


def test_times_and_ceilings_of_an_accelerator(capsys):
    """The path that a CPU does not take, taken on a CPU."""
    ceilings = accelerators.ceilings(product=64, copied=4096)
    assert ceilings["tflops"] > 0 and ceilings["gb_s"] > 0 and ceilings["datasheet_gb_s"] is None
    (row,) = wkv7.measure(SHAPE, "forward", 1, options(on_cpu=False, ceilings=lambda: ceilings))
    assert 0 < row["least_ms"] <= row["milliseconds"] <= row["most_ms"]
    assert row["floor_ms"] > 0 and "x the floor" in capsys.readouterr().out


def test_peers_and_launches_are_compared():
    def row(name, milliseconds, sides=1, calls=1):
        at = {"B": 8, "T": 4096, "H": 12, "K": 64, "direction": "forward+backward"}
        return {"implementation": name, "milliseconds": milliseconds, "sides": sides, "calls": calls, **at}

    rows = [row("pallas_gpu", 2.0), row("chunked", 9.0), row("jla", 3.0), row("fla", 5.0), row("fla_exact", None)]
    rows += [row("pallas_gpu", 4.0, 2, 2), row("pallas_gpu", 2.5, 2, 1)]
    lines = wkv7.compared(rows)
    assert len(lines) == 2
    assert "pallas_gpu is 1.50 x as fast as jla" in lines[0]
    assert "one call 1.60 x as fast as two" in lines[1]


def test_absent_peers_are_one_line(capsys):
    missing = [name for name, module in peers.PEERS.items() if module.partition(".")[0] not in sys.modules]
    found = peers.available(missing)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(missing) - len(found)


def test_jla_has_our_conventions():
    """Its chunked form, which runs anywhere; its kernels need a Hopper GPU and say so."""
    pytest.importorskip("jla")
    inputs, cotangents = given = wkv7.arguments((1, 40, 1, 64), 1, "masked", "bfloat16")
    _, expected = wkv7.judge((1, 40, 1, 64), "forward+backward", *given, options())
    op = lambda inputs: (peers.jla(**inputs[0], implementation="chunked"),)
    errors = wkv7.compare(wkv7.build(op, "forward+backward", inputs, cotangents).run(), expected)
    assert max(errors.values()) < 5e-3
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="Hopper"):
            peers.jla(**inputs[0])


def test_fla_gets_our_arguments(monkeypatch):
    """A stand-in of chunk_rwkv7 in torch: names, layout, cotangents and gradients of the adapter."""
    torch = pytest.importorskip("torch")

    def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, **rest):
        assert scale == 1 and output_final_state and set(rest) == set(peers.FLA_LAYER)
        state, out = torch.zeros(*r.shape[:1], *r.shape[2:], v.shape[-1]), []
        r, w, k, v_, a, b = (x.float() for x in (r, w, k, v, a, b))
        for t in range(r.shape[1]):
            read = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
            state = torch.exp(w[:, t])[..., None] * state + b[:, t, ..., None] * read[:, :, None]
            state = state + k[:, t, ..., None] * v_[:, t, :, None]
            out.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
        return torch.stack(out, 1).to(v.dtype), state

    for name in ("fla", "fla.ops", "fla.ops.rwkv7"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla.ops.rwkv7"].chunk_rwkv7 = chunk_rwkv7
    given = wkv7.arguments(SHAPE, 1, "masked", "bfloat16")
    for direction in wkv7.DIRECTIONS:
        _, expected = wkv7.judge(SHAPE, direction, *given, options())
        one = wkv7.fla(direction, peers.FLA_LAYER, *given)
        errors = wkv7.compare(one.arrays(one.run()), expected)
        assert len(errors) == (2 if direction == "forward" else 8) and max(errors.values()) < 5e-3


def test_launches_are_told_by_the_profiler(tmp_path, capsys, monkeypatch):
    """A small pass on this machine: the parts add up, each launch counts once, and the operator is among them."""
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["launches", "--lengths", "96", "--scan_layers", "--out", str(out)])
    launches.main()
    (row,) = measure.read(out)
    parts = row["parts"]
    assert {"operator", "channel mix, products", "head, products"} <= set(parts)
    assert 0 < row["milliseconds"] == pytest.approx(sum(part["milliseconds"] for part in parts.values()))
    assert row["launches"] == sum(part["launches"] for part in parts.values()) > 100
    assert parts["head, products"]["launches"] == 1 and row["longest"][0]["milliseconds"] > 0
    assert "| operator |" in capsys.readouterr().out


def test_launches_that_hide_are_told_of():
    kernels = [hlo.Kernel(f"fusion.{i}", "fusion", 8, 1, "jit(f)/Denoiser/add") for i in range(5)]
    with pytest.raises(ValueError, match="Of 5 launches the profiler tells of 2"):
        launches.joined(kernels, {"fusion.0": 1.0, "fusion.1": 1.0, "other": 1.0})
    found = launches.joined(kernels, {kernel.name: 2.0 for kernel in kernels[:4]})
    assert (found["milliseconds"], found["launches"], found["untold"]) == (8.0, 4, 1)


# --- Report -----------------------------------------------------------------------------------------------------------


def test_report_of_an_accelerator(tmp_path, monkeypatch):
    """Tables and plots from files like those that gpu.sh leaves, among them rows without a time."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    kernel = {
        **{"implementation": "pallas_gpu", "direction": "forward+backward", "B": 8, "T": 4096, "H": 12, "K": 64},
        **{"sides": 2, "calls": 1, "milliseconds": 1.25, "tflops": 50.0, "gb_s": 2000.0, "floor_ms": 0.5},
        **{"dtype": "bfloat16", "kind": "masked", "error": 4e-3, "device": "NVIDIA H200", "commit": "abc"},
        **{"ceiling_tflops": 790.0, "ceiling_gb_s": 4300.0},
    }
    wrong = kernel | {"implementation": "fla", "version": "0.6.0", "sides": 1, "milliseconds": None, "error": None}
    wrong["failed"] = "wrong: {'out': 'nan'}"
    one = kernel | {"sides": 1, "milliseconds": 0.75}
    (tmp_path / "wkv7_gpu_a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (kernel, wrong)))
    (tmp_path / "wkv7_gpu_b.jsonl").write_text(json.dumps(one) + "\n")
    text = report.wkv7()
    assert "forward+backward, both sides at once" in text and "| 1.250 | 50.0 | 2,000 | 40 % | 4e-03 |" in text
    assert "fla 0.6.0" in text and "no time: wrong" in text
    assert "NVIDIA H200: 790 TFLOP/s and 4,300 GB/s" in text

    def denoiser(name, length, milliseconds):
        at = {"device": "NVIDIA H200", "commit": "abc", "dtype": "bfloat16", "dim": 768, "parameters": 170_000_000}
        at |= {"tokens_per_second": 1e6, "peak_mb": 2048.0} if milliseconds else {"failed": "RESOURCE_EXHAUSTED"}
        return json.dumps({"name": report.LABELS[name], "length": length, "milliseconds": milliseconds, **at}) + "\n"

    rows = [denoiser("birwkv", n, n / 1024) for n in (1024, 65536)]
    rows += [denoiser("dit", 1024, 0.5), denoiser("dit", 65536, 640.0), denoiser("bimamba", 1024, None)]
    (tmp_path / "denoiser_gpu_all.jsonl").write_text("".join(rows))
    text = report.length()
    assert "| BiRWKV | 1.00 (0.50×) | 64.00 (10.00×) |" in text
    assert f"| {report.LABELS['bimamba']} | failed |  |" in text and "1,000; 2.0" in text
    tried = [json.loads(rows[0]) | other for other in ({"parts": 1}, {"use": {"birwkv7.time_mix": "fused"}})]
    (tmp_path / "denoiser_gpu_tried.jsonl").write_text(
        "".join(json.dumps(row | {"milliseconds": 9.0}) + "\n" for row in tried)
    )
    assert report.length() == text, "a form that a model does not take stands for it"

    pyplot = pytest.importorskip("matplotlib.pyplot")
    for name in ("wkv7", "length"):
        figure = pyplot.figure()
        report.PLOTS[name][0](figure)
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert shown and all(axes.lines for axes in shown) and shown[0].get_ylabel()
        assert shown[0].get_legend() or figure.legends
        pyplot.close(figure)
    assert report.main(["--show", str(tmp_path), "wkv7"]) == 0


def test_report_of_speed(tmp_path, monkeypatch):
    """Tables and a plot from a file of diffrwkv.profile; the plot is stale when the file is another."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    about = {
        "device": "NVIDIA H200",
        "dtype": "bfloat16",
        "vocab_size": 9,
        "jax": "0.11",
        "causal": False,
        "kind": "pass",
    }

    def row(name, length, milliseconds):
        own = {"name": name, "pattern": {"dit": "attention"}.get(name, "birwkv7"), "batch": 1, "length": length}
        return json.dumps(about | own | {"milliseconds": milliseconds, "tokens_per_second": 1.0}) + "\n"

    rows = [row("dit", n, n * n / 1e4) for n in (256, 1024, 4096)] + [
        row("birwkv", n, n / 10) for n in (256, 1024, 4096)
    ]
    (tmp_path / "profile_gpu.jsonl").write_text("".join(rows))
    text = report.speed()
    assert "| 1 | birwkv | 25.6 | 102.4 | 409.6 |" in text and "| 1,000 |" in text and "docs/profile.svg" in text
    (name,) = report.stale_plots()
    report.draw(name, report.stale_plots()[name])
    assert name == "profile" and not report.stale_plots()
    (tmp_path / "profile_gpu.jsonl").write_text("".join(rows[1:]))
    assert list(report.stale_plots()) == ["profile"]


# --- gpu.sh -----------------------------------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env bash
# A python that does nothing, and breaks where $BREAKS says.
echo "$*" >> "$CALLS"
[[ -n ${BREAKS:-} && "$*" == *"$BREAKS"* ]] && { echo "it breaks"; exit 1; }
exit 0
"""


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs the script with the stand-in: (run, breaks) -> (exit status, calls of python, output)."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(*runs, breaks=""):
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {"PYTHON": str(stand_in), "CALLS": str(calls), "BREAKS": breaks, "DIFFRWKV_CARRY": str(tmp_path)}
        command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *runs, str(tmp_path / "out")]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        assert (tmp_path / "out" / "gpu.log").read_text().endswith(done.stdout)
        return done.returncode, calls.read_text().splitlines(), done.stdout

    return run


def test_gpu_sh_goes_on_behind_what_fails(gpu_sh):
    status, calls, output = gpu_sh(breaks="--names dit")
    assert status == 1 and output.count("FAILED") == 3 and "it breaks" in output
    programs = collections.Counter(re.search(r"-m (?:benchmarks\.)?(\S+)", line)[1] for line in calls)
    counts = {
        "correct": 4,
        "wkv7": 9,
        "denoiser": 7,
        "train_step": 3,
        "training": 4,
        "launches": 2,
        "diffrwkv.profile": 2,
    }
    assert dict(programs) == counts | {"correct": 4 + (shutil.which("compute-sanitizer") is not None)}
    assert sum("--peers jla" in line for line in calls) == 2 == sum("fla fla_exact" in line for line in calls)
    assert len(re.findall(r"^\[\d+\] == done", output, re.MULTILINE)) == len(calls) - 3


def test_gpu_sh_stops_where_the_kernels_are_wrong(gpu_sh):
    status, calls, output = gpu_sh(breaks="--only wkv7")
    assert status == 1 and "STOPPED: the kernels are wrong" in output
    assert not any("training" in line for line in calls), "the second run must not begin"
    status, calls, output = gpu_sh("A", breaks="--only ssd")
    assert status == 1 and "STOPPED" not in output and output.count("FAILED") == 2, "BiRWKV does without them here"


def test_gpu_sh_takes_one_run(gpu_sh):
    status, calls, _ = gpu_sh("B")
    assert status == 0
    assert sum("benchmarks.training" in line for line in calls) == 3
    assert not any("benchmarks.correct" in line for line in calls)


def test_gpu_sh_names_what_the_programs_have(gpu_sh):
    """Every option in the script is one of its program, or a key of the config."""
    _, calls, _ = gpu_sh()
    for line in calls:
        line, _, overrides = line.partition(" -- ")
        module = line.split()[1]
        where = "src/diffrwkv/cli/profile" if module == "diffrwkv.profile" else module.replace(".", "/")
        text = (ROOT / f"{where}.py").read_text()
        for option in (word.partition("=")[0] for word in line.split() if word.startswith("--")):
            assert f'"{option}"' in text, (module, option)
        if overrides:
            parse(overrides.split())


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    """What stands in the file, and what was measured before an end that nobody wished for."""
    measure.append(tmp_path / "x.jsonl", {"before": 1})

    def one(shape, direction, *rest):
        if direction == "forward+backward":
            raise KeyboardInterrupt
        return [{"T": shape[1]}]

    monkeypatch.setattr(wkv7, "measure", one)
    command = ["x", "--append", f"--out={tmp_path / 'x.jsonl'}", "--shapes", "1x8x1x8", "--lengths", "--sides", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        wkv7.main()
    assert measure.read(tmp_path / "x.jsonl") == [{"before": 1}, {"T": 8}]


@pytest.mark.slow
def test_gpu_sh_runs_on_a_cpu(tmp_path):
    """Every run, with the real programs, at tiny sizes."""
    letters = np.random.default_rng(0).integers(26, size=6000)
    (tmp_path / "text.txt").write_text("".join(chr(ord("a") + i) for i in letters))
    prepare = ["--tokenizer=char", f"--input={tmp_path / 'text.txt'}", f"--output={tmp_path / 'data'}"]
    subprocess.run([sys.executable, "-m", "diffrwkv.prepare", *prepare], check=True, capture_output=True)
    env = {"SMOKE": "1", "PYTHON": sys.executable, "DIFFRWKV_CARRY": str(tmp_path)}
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert not list(out.glob("*.part"))
    speeds = measure.read(out / "profile_smoke.jsonl")
    assert len(speeds) == 2 * (3 + 4) and all(row["milliseconds"] > 0 for row in speeds)
    rows = {
        name: measure.read(out / f"{name}_smoke.jsonl") for name in ("correct", "wkv7", "denoiser", "train", "step")
    }
    for row in (row for some in rows.values() for row in some):
        assert row["device"] and row["commit"] and row["jax"] == jax.__version__ and row["command"].startswith("python")
    assert all(row["right"] for row in rows["correct"])
    mixes = 6  # token mixes, operands and finish, each way; before them wkv7, in two forms where it is in one part
    expected = [(20, 1)] * (4 + mixes) + [(130, 2)] * 2 + [(130, 1)] * mixes
    expected += [(20, 1)] * 4 + [(130, 1)] * 4  # ssd, and wkv7 as other GPUs have it, of two kinds
    assert [(row["T"], row["parts"]) for row in rows["correct"]] == expected
    assert {row["T"] for row in rows["wkv7"]} == {32, 64} and all(row["milliseconds"] > 0 for row in rows["wkv7"])
    assert len(rows["denoiser"]) == 13 and all(row["milliseconds"] > 0 for row in rows["denoiser"])
    trained = {}
    for row in rows["train"]:
        trained.setdefault(row["options"][0].rpartition(":")[2], []).append(row)
    assert list(trained) == ["birwkv", "birwkv/tiny", "dit/tiny", "bimamba/tiny"]
    for some in trained.values():
        assert any(np.isfinite(row.get("tokens_per_second", np.nan)) for row in some)
    assert all(any(np.isfinite(row.get("val/nelbo", np.nan)) for row in trained[n]) for n in list(trained)[1:])


def test_the_twin_in_pytorch_is_the_same_network():
    pytest.importorskip("torch", reason="PyTorch's twin of DiT needs torch")
    from benchmarks import torch_dit

    model, params, twin = torch_dit.build()
    assert torch_dit.check(model, params, twin) < 1e-5
    twin.blocks_2_mlp_0_bias.data += 0.1
    with pytest.raises(SystemExit, match="no time"):
        torch_dit.check(model, params, twin)
