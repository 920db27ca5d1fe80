"""benchmarks/regular_languages.py at its smallest: every kind of row, none measured twice, and a page of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import measure, regular_languages, report
from diffrwkv.config import UserError
from diffrwkv.diffusion.objectives import Diffusion
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.languages import language


@pytest.mark.slow
def test_rows_of_the_oracle_and_of_networks(tmp_path, monkeypatch):
    output = tmp_path / "regular_languages.jsonl"
    command = ["--smoke", f"--output={output}"]
    regular_languages.main(command)
    oracle, diffusion, causal = rows = measure.read(output)
    assert [row["backbone"] for row in rows] == ["oracle", "dit", "ar_transformer"]
    one_by_one = [s for s in oracle["samples"] if s["steps"] == 64 and s["order"] in ("first_hitting", "left_to_right")]
    assert [s["valid"] for s in one_by_one] == [1.0, 1.0]
    assert all(s["valid"] == 0 for s in oracle["samples"] if s["steps"] == 1)
    assert {s["order"] for s in diffusion["samples"]} == {*regular_languages.ORDERS, "first_hitting"}
    assert {s["order"] for s in causal["samples"]} == {"autoregressive"}
    for row in (diffusion, causal):  # untrained: far from the language, and from its labels
        assert [x["length"] for x in row["likelihood"]] == [64, 72]
        assert all(x["gap"] > 10 for x in row["likelihood"])
        assert [(x["length"], x["hole"]) for x in row["infilling"]] == [(64, 1), (64, 16), (72, 1)]
        assert all(0 <= x["accuracy"] < 0.6 for x in row["infilling"] + row["labelling"])
    regular_languages.main(command)
    assert measure.read(output) == rows
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "REGULAR_PASSES", (1, 64))
    page = report.regular_oracle()
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    assert [len(lines) - 2 for lines in tables] == [len(report.ORDER_LABELS), 1] and "1.00" in page
    coverage, law, samples, _, plot = report.regular_networks().split("\n\n")
    assert plot.endswith("(docs/regular_gaps.svg)")
    assert [len(part.splitlines()) - 2 for part in (coverage, law, samples)] == [1, 2, 3]
    assert coverage.splitlines()[2] == "| s3 | 1 | 1 |"
    lost = diffusion | {"likelihood": [entry | {"gap": None, "gap_se": None} for entry in diffusion["likelihood"]]}
    measure.write(output, [oracle, lost, causal])  # a state passed float32
    assert "| overflow |" in report.regular_networks()


@pytest.mark.parametrize("name", ["s3", "parity"])
def test_the_gap_of_a_known_model(name):
    """Of one that knows the symbols and nothing else; and the exact posterior's bound is the entropy."""
    lang, length, number = language(name), 16, 2048
    known = jnp.where(jnp.arange(128) < len(lang.symbols), 0.0, -jnp.inf)
    objective = Diffusion(Masked(Vocabulary(128, 127)))

    def nats(key, words, t):
        return objective.loss(lambda z, t: jnp.broadcast_to(known, (*z.shape, 128)), key, words, t).nats

    exact = regular_languages.exact_nats(name, objective, length, number)
    over = regular_languages.in_parts(jax.jit(nats), name, objective, length, number) - exact
    for draws, expected in (
        (over, length * np.log(len(lang.symbols)) - lang.log_count(length)),
        (exact, lang.log_count(length)),
    ):
        assert abs(draws.mean() - expected) < 4 * draws.std() / number**0.5


@pytest.mark.slow
def test_a_run_that_diverges_is_refused(tmp_path):
    output = tmp_path / "x.jsonl"
    command = ["--languages=s3", "--backbones=dit", "--seeds=1", "--steps=3", "--label_steps=1", f"--output={output}"]
    command += ["--batch_size=4", "--set", "config.optim.warmup_steps=1", "config.optim.learning_rate=1e30"]
    with pytest.raises(UserError, match="s3~dit, seed 1, diverged at step"):
        regular_languages.main(command)
    assert not output.exists()
