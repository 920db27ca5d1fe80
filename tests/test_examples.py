"""Each file of examples/ runs and prints what docs/library.md says; the page has the files' own code."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = ROOT / "docs" / "library.md"
NEEDS_A_RUN = {"trained.py"}  # tests/programs/test_trained_example.py


def body(path: Path) -> str:
    """An example without its first line, which says what it is."""
    first, _, rest = path.read_text().partition("\n")
    assert re.fullmatch(r'"""[^"]+\."""', first), f"{path.name} opens with a docstring of one line"
    return rest.strip()


def shown(name: str) -> tuple[str, str]:
    """(the code, the output) of an example on the page, each a block below its mark."""
    mark = rf"<!-- example: {re.escape(name)} -->\n+```python\n(.*?)\n```\n+```text\n(.*?)\n```"
    found = re.findall(mark, PAGE.read_text(), re.DOTALL)
    assert len(found) == 1, f"docs/library.md has {name} {len(found)} times"
    return found[0]


def test_the_page_has_every_example():
    marks = re.findall(r"<!-- example: (\S+) -->", PAGE.read_text())
    assert sorted(marks) == [p.name for p in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_page_has_the_code_of_the_file(path):
    assert shown(path.name)[0] == body(path)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.name == "denoiser.py" else ())
        for p in EXAMPLES
        if p.name not in NEEDS_A_RUN
    ],
)
def test_examples_print_what_the_page_shows(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip() == shown(path.name)[1]
