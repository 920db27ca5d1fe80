"""benchmarks/regular_languages.py at its smallest: every kind of row, none measured twice, and a page of them."""

import pytest

from benchmarks import measure, regular_languages, report
from diffrwkv.config import UserError


@pytest.mark.slow
def test_rows_of_the_oracle_and_of_networks(tmp_path, monkeypatch):
    output = tmp_path / "regular_languages.jsonl"
    command = ["--smoke", f"--runs={tmp_path / 'runs'}", f"--output={output}"]
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
        assert [x["hole"] for x in row["infilling"]] == [1, 16]
        assert all(0 <= x["accuracy"] < 0.6 for x in row["infilling"] + row["labelling"])
    regular_languages.main(command)
    assert measure.read(output) == rows
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "REGULAR_PASSES", (1, 64))
    page = report.regular_oracle()
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    assert [len(lines) - 2 for lines in tables] == [len(report.ORDER_LABELS), 1] and "1.00" in page
    assert report.regular_networks().count("\n| s3") == 2


def test_another_run_in_its_folder_is_refused(tmp_path):
    (tmp_path / "s3~dit-1-1500").mkdir()
    (tmp_path / "s3~dit-1-1500" / "config.json").write_text("{}")
    with pytest.raises(UserError):
        regular_languages.main(
            ["--languages=s3", "--backbones=dit", "--seeds=1", f"--runs={tmp_path}", f"--output={tmp_path / 'x'}"]
        )
