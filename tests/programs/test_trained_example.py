"""examples/trained.py, on the run that the programs share."""

import runpy
import sys

import pytest

from tests.test_examples import ROOT, shown


@pytest.mark.slow
def test_the_example_of_a_trained_run_prints_what_the_page_shows(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trained.py", str(trained)])
    runpy.run_path(str(ROOT / "examples" / "trained.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == shown("trained.py")[1]
