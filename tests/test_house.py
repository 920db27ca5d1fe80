"""The house in order: packaging against the disk, experiments that say how to run them, text without private paths."""

import configparser
import json
import re
import subprocess
from pathlib import Path

import pytest

import diffrwkv
from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(p for p in (ROOT / "experiments").glob("*.py") if "def get_config" in p.read_text())


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def committed() -> list[Path]:
    """Text files that git knows; without git (an sdist) those that a checkout would have."""
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        files = [ROOT / name for name in run.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        folders = ("src", "pallas_kernels", "tests", "experiments", "examples", "notebooks", "benchmarks", "docs")
        files = [p for folder in folders for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
    binary = {".npz", ".npy", ".png", ".svg", ".gz", ".xz"}
    return [p for p in files if p.is_file() and p.suffix not in binary]


def test_packages_are_those_on_disk():
    listed = setup_cfg()["options"]["packages"].split()
    on_disk = {
        ".".join(p.parent.relative_to(root).parts)
        for root, folder in ((ROOT / "src", "diffrwkv"), (ROOT, "pallas_kernels"))
        for p in (root / folder).rglob("*.py")
        if "__pycache__" not in p.parts
    }
    assert sorted(listed) == sorted(on_disk | {"diffrwkv.experiments"})  # which stand at the top


def test_every_package_says_what_it_is():
    placed = dict(line.split(" = ") for line in setup_cfg()["options"]["package_dir"].splitlines() if " = " in line)
    for name in setup_cfg()["options"]["packages"].split():
        own = placed.get(name) or ("" if name.split(".")[0] in placed else "src/") + name.replace(".", "/")
        assert (ROOT / own / "__init__.py").is_file(), f"{name} has no __init__.py"


def test_version_is_written_once():
    assert setup_cfg()["metadata"]["version"] == "attr: diffrwkv.__version__"
    assert f"## [{diffrwkv.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    written = [p for p in (ROOT / "src").rglob("*.py") if f'"{diffrwkv.__version__}"' in p.read_text()]
    assert written == [ROOT / "src" / "diffrwkv" / "__init__.py"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_say_how_they_are_run(path):
    text = path.read_text()
    doc = re.match(r'r?"""(.*?)"""', text, re.DOTALL)
    assert doc, "an experiment opens with a docstring"
    assert f"--config=experiments/{path.name}" in doc[1], "its docstring holds the command"
    assert "--workdir=" in doc[1]


def test_no_private_paths_or_hosts():
    pattern = re.compile("|".join(("/" + "root/", "/" + "work/", "/" + "home/", "pypi" + r"\.", "index" + "-url")))
    found = [
        f"{path.relative_to(ROOT)}:{i}: {line.strip()[:80]}"
        for path in committed()
        for i, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_golden_arrays_stay_small():
    size = sum(p.stat().st_size for p in (ROOT / "tests" / "golden").rglob("*") if p.is_file())
    assert size <= 2 * 2**20


def test_readme_has_the_commands_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    for name in ("run", "test"):
        assert re.search(rf"<!-- ci:{name} -->\n+```bash\n.+?\n```", readme, re.DOTALL), name


def test_links_in_the_text_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)  # code has brackets too
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_numbers_in_the_text_are_those_of_the_result_files():
    stale = report.stale()
    assert not stale, f"run `python -m benchmarks.report`: {', '.join(stale)} are not up to date"


def test_a_changed_number_is_noticed(tmp_path, monkeypatch):
    for name in ("README.md", "docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "README.md").unlink()
    text = (ROOT / "README.md").read_text()
    assert "2.367" in text
    (tmp_path / "README.md").write_text(text.replace("2.367", "2.366"))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.stale() == ["README.md"]


def test_the_front_page_has_the_times_of_one_device(tmp_path, monkeypatch):
    here = report.front()
    for path in report.RESULTS.iterdir():
        (tmp_path / path.name).symlink_to(path)
    rows = report.read("profile_cpu.jsonl")
    another = [json.dumps(row | {"device": "a GPU", "milliseconds": 1.0}) for row in rows]
    (tmp_path / "profile_gpu.jsonl").write_text("\n".join(another) + "\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.front() == here and "a GPU" in report.speed()


def test_missing_results_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name, block in report.BLOCKS.items():
        assert "not measured yet" in block().lower(), name
