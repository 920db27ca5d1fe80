"""The speed program: what is timed is what is reported, counts are right, and fits follow from the numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from diffrwkv import networks, profile, timing
from diffrwkv.config import UserError
from diffrwkv.diffusion import objectives, samplers
from diffrwkv.diffusion.processes import Masked, Vocabulary
from tests.random_parameters import random_parameters

SMALL = ["--dim=64", "--layers=1", "--vocab_size=19", "--seconds=0"]


def tiny(name, **options):
    """A backbone in its plain form, which compiles fastest, and weights for it."""
    model = profile.build(name, dim=64, layers=1, vocab_size=19, use=profile.PLAIN, **options)
    return model, profile.random_weights(model)


def test_program(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [
        *SMALL,
        "--names",
        "dit",
        "ar_rwkv",
        "--use",
        "rwkv7=reference",
        "rwkv7.time_mix=fused",
        "--lengths",
        "16",
        "32",
        "--batch",
        "2",
        "--block_size=8",
    ]
    profile.main([*flags, "--tokens_per_pass", "4", "8", "--output=speed"])
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    ways = {(name, "pass", None, None) for name in ("dit", "ar_rwkv")} | {("ar_rwkv", "decode", "ar", 1)}
    ways |= {("dit", "decode", method, p) for method in ("full", "block", "frozen") for p in (4, 8)}
    found = [(r["name"], r["kind"], r.get("method"), r.get("tokens_per_pass"), r["length"]) for r in rows]
    assert sorted(map(str, found)) == sorted(str((*way, n)) for way in ways for n in (16, 32))
    for row in rows:
        assert 0 < row["least_ms"] <= row["milliseconds"] <= row["most_ms"] and row["cpu_ms"] > 0
        tokens = 2 * (row["length"] if row["kind"] == "pass" else row["tokens"])
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["milliseconds"])
        assert row["device"] == timing.cpu_name() and row["command"].startswith("python") and row["error"] < 1e-4
    timed = {(r["method"], r["tokens_per_pass"]): (r["tokens"], r["timed_passes"]) for r in rows if "method" in r}
    assert timed["full", 4] == (8, 2) and timed["full", 8] == (16, 2)
    assert timed["block", 4] == (8, 2) and timed["block", 8] == (8, 1) and timed["frozen", 4] == (8, 3)
    told = capsys.readouterr().out
    assert (tmp_path / "speed.md").read_text().startswith(told) and "| 2 | block | 8 | dit |" in told
    assert (
        "<svg" in (tmp_path / "speed.html").read_text()
        and ">frozen, 8 tokens a pass, batch 2<" in (tmp_path / "speed.svg").read_text()
    )

    profile.main(["--show", "speed.jsonl", "speed.jsonl", "--output=again"])  # without a measurement
    assert capsys.readouterr().out == (tmp_path / "again.md").read_text().partition("\n![")[0] == told


def test_two_sizes_stand_in_two_tables(tmp_path):
    """Of one vocabulary and precision, from one file; of one thing that was measured twice the later counts."""
    about = {"device": "x", "dtype": "float32", "vocab_size": 19, "jax": "0", "pattern": "attention", "causal": False}
    about |= {"name": "dit", "kind": "pass", "batch": 1, "tokens_per_second": 1.0}
    sizes = [profile.Options(("dit",), (8,), (1,), **own).told_size() for own in ({}, {"layers": 2}, {"size": "small"})]
    assert sizes == ["peer", "peer, layers 2", "small"]
    times = {(size, n): 10.0 * i + n for i, size in enumerate(sizes) for n in (8, 16)}
    rows = [about | {"size": size, "length": n, "milliseconds": t} for (size, n), t in times.items()]
    earlier = [row | {"milliseconds": 99.0} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in earlier + rows))
    found = profile.read(tmp_path / "rows.jsonl")
    assert sorted(map(str, found)) == sorted(map(str, rows))
    text = profile.report(found)
    for size in sizes:
        _, _, section = text.partition(f"**x, size {size}, float32, vocabulary of 19, jax 0**")
        (line,) = [line for line in section.partition("**")[0].splitlines() if line.startswith("| 1 | dit |")]
        cells = [float(cell) for cell in line.split("|")[3:5]]
        assert cells == pytest.approx([times[size, 8], times[size, 16]], rel=0.01)
        assert f">a pass, batch 1, x, size {size}<" in profile.chart(found)


def test_what_would_take_too_long_is_left_out_and_said(monkeypatch):
    """Times that grow by the square, of work that is not done."""
    model, params = tiny("dit")
    done = []

    def passes(model, params, batch, length, seconds):
        done.append(length)
        return {"milliseconds": 1e3 * (length / 16) ** 2}

    monkeypatch.setattr(profile, "one_pass", passes)
    monkeypatch.setattr(profile, "decode", lambda *arguments: {"milliseconds": 1.0})
    options = profile.Options(("dit",), (16, 32, 64, 128), (1,), block=8, tokens_per_pass=(4,), most_seconds=20)
    rows = list(profile._of_batch(model, params, profile.Decoder(model, params, 8), 1, options))
    assert done == [16, 32, 64]
    told = {(r.get("method", "pass"), r["length"]): r.get("failed") for r in rows}
    assert told["pass", 64] is told["full", 32] is told["block", 64] is None
    assert told["pass", 128] == "not run: it would take about 64 s at a time"
    assert told["full", 64] == told["frozen", 64] == "not run: it would take about 32 s at a time"
    full = {"device": "x", "dtype": "float32", "vocab_size": 19, "jax": "0", "pattern": "attention", "causal": False}
    rows = [full | {"name": "dit", "tokens_per_second": 1.0} | row for row in rows]
    assert "| 1 | dit | 1,000.0 | 4,000.0 | 16,000.0 | no time |" in profile.report(rows)
    assert "<svg" in profile.chart(rows)


@pytest.mark.parametrize("name", ["birwkv", "dit"])
def test_a_timed_block_is_the_last_one_of_a_text(name):
    model, _ = tiny(name)
    params = random_parameters(model, jnp.zeros((1, 8), jnp.int32), jnp.zeros(1))  # no token wins always
    params["embedding"] = params["embedding"].at[-1].set(0)
    decoder = profile.Decoder(model, params, 8)
    done = decoder.block(2, 32, 4).run()
    process = Masked(Vocabulary(19, 18))
    objective = objectives.Diffusion(process, objectives.Blocks((8,)))
    sampler = samplers.BlockCached(samplers.Confidence(num_steps=2), 8)
    canvas = jnp.concatenate([decoder._text(2, 24), jnp.full((2, 8), 18)], axis=1)
    network = networks.face(model, objective, params, sampler)
    whole = jax.jit(lambda z: sampler(process, network, samplers.sequence_keys(0, 2), z))(canvas)
    np.testing.assert_array_equal(done.tokens, whole.tokens[:, 24:])
    assert len(np.unique(done.tokens)) > 1


def test_operations_are_those_that_xla_counts():
    """Of attention without a loop; its bytes are no less than the least."""
    model, params = tiny("dit")
    for batch, length in ((1, 63), (3, 16)):
        z = profile.canvas(model, batch, length)
        ours, xla = (
            profile.counted(model, params, batch, length),
            profile.xla_counts(profile.compile_pass(model, params, z)),
        )
        assert 1 < xla["xla_flops"] / ours["flops"] < 1.1
        assert xla["xla_bytes"] > ours["bytes"] and ours["intensity"] == ours["flops"] / ours["bytes"]
        D, V, n = 64, 19, batch * length
        weights = 12 * D * D + D * V
        adaln = 256 * 128 + 128 * 128 + 128 * (6 * D + 2 * D)
        assert ours["flops"] == 2 * adaln + n * (2 * weights + 4 * length * D)
        assert ours["state_bytes"] == batch * 2 * 4 * length * D


def test_state_is_constant_for_a_recurrence_and_grows_for_attention():
    model, _ = tiny("birwkv")
    assert profile.state_bytes(model, 100) == profile.state_bytes(model, 10_000) >= 2 * 4 * 64 * 64
    model, _ = tiny("dit")
    assert profile.state_bytes(model, 10_000) == 100 * profile.state_bytes(model, 100)


def test_fits_are_the_best_that_are_not_negative():
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    exact = profile.fit(lengths, [3e-6 * n * n + 0.02 * n + 4 for n in lengths])
    np.testing.assert_allclose(exact, (3e-6, 0.02, 4), rtol=1e-6)
    rng = np.random.default_rng(0)
    some_zero = 0
    for _ in range(50):
        times = np.exp(rng.normal(size=6)) * np.array(lengths, float) ** rng.uniform(0, 2)
        found = np.array(profile.fit(lengths, times.tolist()))
        x = np.array(lengths, float)
        columns = np.stack([x**2, x, np.ones(6)], 1) / times[:, None]
        scale = np.linalg.norm(columns, axis=0)
        best, error = nnls(columns / scale, np.ones(6))
        assert (found >= 0).all()
        np.testing.assert_allclose(np.linalg.norm(columns @ found - 1), error, rtol=1e-6)
        np.testing.assert_allclose(found * scale, best, atol=1e-6)
        some_zero += (best == 0).any()
    assert 10 < some_zero
    with pytest.raises(ValueError, match="three lengths"):
        profile.fit([1, 2, 2], [1.0, 2.0, 2.0])


def test_where_a_linear_denoiser_overtakes():
    lengths = [256, 512, 1024, 2048]
    linear = {n: 0.1 * n for n in lengths}
    square = {n: 1e-4 * n * n for n in lengths}
    at, how = profile.crossover(linear, square)
    assert how == "measured" and at == pytest.approx(1000, rel=1e-6)
    assert profile.crossover({n: 0.01 * n for n in lengths}, square) == (256.0, "or less")
    at, how = profile.crossover({n: 0.5 * n + 7 for n in lengths}, square)
    assert how == "by the fits" and at == pytest.approx(np.roots([1e-4, -0.5, -7])[0], rel=1e-4)
    assert profile.crossover(square, {n: 0.5 * square[n] for n in lengths}) == (None, "never, by the fits")
    assert profile.crossover({1: 1.0}, {2: 1.0}) == (None, "no common length")
    assert profile.crossover({1: 2.0, 2: 2.0}, {1: 1.0, 2: 1.0}) == (None, "not up to the longest")


def test_a_long_call_is_its_own_warm_up(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "_timed", lambda run: calls.append(run()) or (times[len(calls) - 1], 0.5))
    times = [6.0, 1.0]
    assert timing.latency(lambda: 0) == {
        "milliseconds": 6000.0,
        "least_ms": 6000.0,
        "most_ms": 6000.0,
        "repeats": 1,
        "cpu_ms": 500.0,
    }
    calls.clear()
    times = [4.0, 1.0, 3.0, 2.0]
    found = timing.latency(lambda: 0, seconds=0)
    assert (found["milliseconds"], found["least_ms"], found["most_ms"], found["repeats"]) == (2000, 1000, 3000, 3)


def test_off_a_cpu_bursts_are_timed(monkeypatch):
    """As many as the seconds allow, or the repeats say, and none that is thrown away."""
    times = []
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "calls_for", lambda run, wait: 4)
    monkeypatch.setattr(timing, "burst", lambda run, wait, calls: times.append(0.05 + 0.01 * len(times)) or times[-1])
    found = timing.latency(lambda: 0, seconds=1)
    assert len(times) == 1 + 5 and found["repeats"] == 5  # 4 calls of 0.05 s are a fifth of a second
    assert [found[key] for key in ("least_ms", "milliseconds", "most_ms")] == pytest.approx([60, 80, 100])
    times.clear()
    assert timing.latency(lambda: 0, repeats=40)["repeats"] == len(times) == 10


def test_a_wrong_pass_is_not_timed(monkeypatch):
    model, params = tiny("birwkv")
    original = profile.compile_pass
    monkeypatch.setattr(profile, "compile_pass", lambda m, p, z: original(m, jax.tree.map(lambda x: x * 1.01, p), z))
    right = profile.check("birwkv", model, params, 63)  # both alike
    assert right < 1e-6
    monkeypatch.setattr(
        profile, "compile_pass", lambda m, p, z: lambda p, z: original(m, p, z)(p, z) * (1 + (m is model))
    )
    with pytest.raises(UserError, match="birwkv: a pass is 1.0e.00 off its definition: no time is measured"):
        profile.check("birwkv", model, params, 63)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--names", "gru"], "--names: there is no 'gru': choose of birwkv, "),
        (["--size", "huge"], "--size: there is no 'huge': choose of peer, "),
        (["--dtype", "int8"], "--dtype: there is no 'int8'"),
        (["--what", "train"], "--what: there is no 'train': choose of pass, decode"),
        (["--lengths", "0", "32"], "--lengths must be at least 1, got 0"),
        (["--lengths", "100"], "--lengths: 100 is no multiple of --block_size=32"),
        (["--batch", "-1"], "--batch must be at least 1"),
        (["--tokens_per_pass", "5"], "--tokens_per_pass: 5 does not divide --block_size=32"),
        (["--seconds=inf"], "--seconds must be a number of seconds"),
        (["--use", "attention"], "--use attention: write WHAT=FORM"),
        (["--append", "--output=strange"], "strange.jsonl holds no measurements of diffrwkv.profile .*no 'device'"),
        (["--append"], "--append does something where rows are measured and written"),
        (["--output", "nowhere/x"], "--output=nowhere/x: name files in a folder that is there"),
        (["--show", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--show", "strange.jsonl"], "strange.jsonl holds no measurements of diffrwkv.profile .*no 'device'"),
        (["--names", "birwkv_hybrid", "--layers", "1"], "birwkv_hybrid: pattern .* names birwkv7, but 1 layers end"),
        (["--names", "dit", "--dim", "10", "--output=strange"], "dit: .*head_dim"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange.jsonl").write_text("{}\n")
    monkeypatch.setattr(profile, "random_weights", lambda model: pytest.fail("computed"))
    with pytest.raises(UserError, match=sentence) as raised:
        profile.main(flags)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "strange.jsonl").read_text() == "{}\n"
