"""Every block of code in the text: run by a test or by .ci/run, or on a list that says why not; and every command of
every block is one that its program takes.
"""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import diffrwkv
from diffrwkv import cli, config, judging, train
from diffrwkv.config import UserError
from tests import known_run, test_house

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

HOURS = "trains for minutes or hours, or needs what did"
# Blocks that neither a test nor .ci/run runs, by their page and how they begin: why not.
NOT_RUN = {
    ("README.md", "python -m diffrwkv.sample --workdir=runs/quickstart --watch"): "--watch needs a terminal",
    ("CONTRIBUTING.md", "python3 -m venv .venv"): "what .ci/run does, and .ci/run itself",
    ("docs/clusters.md", "#!/bin/bash"): "needs Slurm",
    (
        "docs/clusters.md",
        "python -m diffrwkv.train",
    ): "two machines; two processes: test_multihost.py",
    ("docs/evaluation.md", "python -m diffrwkv.evaluate --workdir=DIR "): f"network, and {HOURS}",
    ("docs/evaluation.md", "python -m diffrwkv.evaluate --suite=choices"): "network: the files of questions",
    ("docs/evaluation.md", "pip install -e '.[lm-eval]'"): "network: the harness's tasks",
    ("docs/evaluation.md", "python -m diffrwkv.evaluate --suite=samples"): f"network: a judge, and {HOURS}",
    ("docs/profile.md", "python -m diffrwkv.profile"): "hours, and a GPU",
    ("docs/programs.md", "python -m diffrwkv.prepare  --input=TEXT"): "what the programs take, no commands",
    ("docs/programs.md", "python -m diffrwkv.train --config=experiments/text8.py:dit"): f"network, and {HOURS}",
    ("docs/programs.md", "python -m diffrwkv.train --config=experiments/text8.py:birwkv~udlm"): f"network, and {HOURS}",
    ("docs/programs.md", "python -m diffrwkv.sample --workdir=DIR --sampler=confidence"): HOURS,
    ("docs/programs.md", "python -m diffrwkv.train --config=quickstart --workdir=runs/tuned"): HOURS,
    ("docs/programs.md", "python -m diffrwkv.train --config=quickstart --workdir=runs/pairs"): "pairs of the reader",
    ("docs/programs.md", "python -m diffrwkv.train    --config"): f"network, and {HOURS}",
    ("docs/programs.md", "python -m diffrwkv.train --config=experiments/peer"): f"network, and {HOURS}",
    ("docs/programs.md", 'python -m diffrwkv.sample --workdir=DIR --prompt="The " --prompt'): HOURS,
    ("docs/programs.md", "python -m diffrwkv.sample --model=books"): "writes the GIF of the front page anew",
    ("docs/programs.md", "python -m diffrwkv.compare runs/dit"): HOURS,
    ("docs/programs.md", "python -m diffrwkv.convert --input=hf:"): "network: weights of the hub",
}
# Their Python is run below, on a tiny run.
RUN_HERE = ("README.md", "docs/evaluation.md", "docs/programs.md")


class Block(NamedTuple):
    """A block of code: its page, line, language, the mark above it (an HTML comment, or ""), and its text."""

    page: str
    line: int
    language: str
    mark: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    found = []
    text = page.read_text()
    for match in re.finditer(r"(?:<!-- ([^>]+?) -->\n+)?^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        mark, language, body = match.groups()
        line = text[: match.start(3)].count("\n") + 1
        found.append(Block(str(page.relative_to(ROOT)), line, language, mark or "", body.rstrip()))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
BASH = [block for block in BLOCKS if block.language in ("bash", "sh", "shell", "console")]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py", "pycon")]


def runner(block: Block) -> str | None:
    """Who runs it; None: nobody."""
    kind, _, name = block.mark.partition(": ") if ": " in block.mark else block.mark.partition(":")
    if kind == "ci":
        return f".ci/run ({name})" if f"readme_block {name} " in (ROOT / ".ci" / "run").read_text() else None
    if kind == "run":
        return name if (ROOT / name).is_file() else None
    if kind == "example":
        return f"tests/test_examples.py ({name})" if (ROOT / "examples" / name).is_file() else None
    if block in PYTHON and block.page in RUN_HERE:
        return "test_python_in_the_text_runs"
    return None


def excuses(block: Block) -> list[tuple[str, str]]:
    return [key for key in NOT_RUN if key[0] == block.page and block.text.startswith(key[1])]


def test_blocks_are_run_or_excused():
    assert len(BASH) > 15 and len(PYTHON) > 7, "the text has blocks, and they are found"
    faults = []
    for block in BASH + PYTHON:
        ways = [*filter(None, [runner(block)]), *excuses(block)]
        if len(ways) != 1:
            faults.append(f"{block} begins {block.text[:60]!r}: {ways or 'nobody runs it, and no reason is given'}")
    assert not faults, "\n".join(faults)
    used = {key for block in BASH + PYTHON for key in excuses(block)}
    assert not set(NOT_RUN) - used, "a reason for a block that is not there"


def test_every_block_says_its_language():
    bare = [str(block) for block in BLOCKS if not block.language and "diffrwkv." in block.text]
    assert not bare, f"these look like commands, and would not be tested: {bare}"


# --- Commands -----------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The commands of a block as words, without comments, assignments before them and what joins them."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word and set(word) <= set("&;|"):
                while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
                    words.pop(0)
                if words:
                    found.append(words)
                words = []
            else:
                words.append(word)
    return found


def is_synopsis(block: Block) -> bool:
    """Whether it says what programs take, with what is optional in brackets."""
    return "[--" in block.text


COMMANDS = [
    pytest.param(words, id=f"{block}-{i}")
    for block in BASH
    if not is_synopsis(block)
    for i, words in enumerate(commands(block.text))
]


class Taken(Exception):
    """Raised where a program would begin its work."""


def stop(*_, **__):
    raise Taken


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) of a command that is a program of ours."""
    if words[0] == "srun":
        words = words[words.index("python") :]
    if words[:2] in (["python", "-m"], ["python3", "-m"]) and words[2].split(".")[0] in ("diffrwkv", "benchmarks"):
        return words[2], words[3:]
    if words[0] == "diffrwkv":
        assert "diffrwkv" in test_house.setup_cfg()["options.entry_points"]["console_scripts"]
        return f"diffrwkv.{words[1]}", words[2:]
    return None


def take(module: str, arguments: list[str], monkeypatch) -> None:
    """Has a program read its arguments, and no more. Raises what it raises, and Taken where it takes them."""
    assert importlib.util.find_spec(module) is not None, f"there is no {module}"
    package, _, name = module.partition(".")
    if package == "diffrwkv" and name in cli.PROGRAMS:
        args = importlib.import_module(f"diffrwkv.cli.{name}").parse_arguments(arguments)
        if name == "train":
            train.check(args.config)
        stop()
    reader = importlib.import_module(module)
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *a, **k: stop(parse(*a, **k)))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    reader.main()
    raise AssertionError(f"{module} did not read its arguments")


def check_command(words: list[str], monkeypatch) -> None:
    extras, dev = test_house.setup_cfg()["options.extras_require"], ["import-linter", "mypy", "pytest", "ruff"]
    assert all(f"\n{name}" in extras["dev"] for name in dev)
    if found := program(words):
        with pytest.raises(Taken):
            take(*found, monkeypatch)
    elif words[:2] == ["pip", "install"]:
        for name in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
            assert all(extra in extras for extra in name.split(",")), f"setup.cfg has no extra {name}"
    elif words[0] in ("python", "python3"):
        known = {"pytest", "venv"}
        assert (words[1] == "-m" and words[2] in known) or (ROOT / words[1]).is_file(), f"no {words}"
    elif words[0].startswith((".", "benchmarks/")) and words[0] != ".":
        assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is no program"
    else:
        known = {".": "", "cd": "", "export": "", "lint-imports": "", "mypy": "", "ruff": "", "sbatch": ""}
        assert words[0] in known, f"{words[0]!r} is no program that this test knows"


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_taken(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    check_command([word.replace("FOLDER", str(tmp_path)) for word in words], monkeypatch)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("python -m diffrwkv.trian --workdir=x", "there is no diffrwkv.trian"),
        (
            "python -m diffrwkv.train --workdir=x --config=experiments/quickstart.py --config.optim.lr=1",
            "config.optim.lr",
        ),
        ("python -m diffrwkv.train --workdir=x --config=experiments/quick.py", "No config file"),
        ("python -m diffrwkv.train --workdir=x --config=experiments/text8.py:birwkw", "birwkw"),
        ("python -m diffrwkv.sample --workdir=DIR --max-new-tokens=3", "max-new-tokens"),
        ("python -m diffrwkv.evaluate --suite=samples --workdir=DIR --judge=AR --nim=3", "nim"),
        ("python -m benchmarks.report --chekc", "2"),
        ("pip install -e '.[lmeval]'", "no extra lmeval"),
        ("A=1 rm -r x", "'rm' is no program"),
    ],
)
def test_slips_are_noticed(command, told, monkeypatch):
    monkeypatch.chdir(ROOT)
    (words,) = commands(command)
    with pytest.raises((UserError, AssertionError, SystemExit), match=told):
        check_command(words, monkeypatch)


@pytest.mark.parametrize("block", [b for b in BASH if is_synopsis(b)], ids=str)
def test_flags_of_a_synopsis_are_there(block, capsys):
    joined = re.sub(r"\n\s+", " ", block.text)  # what goes on in the next line is indented
    for line in joined.splitlines():
        module, suite = re.match(r"python -m (\S+)\s+(--suite=\w+)?", line).groups()
        with pytest.raises((SystemExit, Taken)):
            importlib.import_module(module).main([*filter(None, [suite]), "--help"])
            raise Taken  # not every program leaves after its help
        told = capsys.readouterr().out
        flags = [f for f in re.findall(r"(?<![\w-])--[\w.]+", line) if f != "--suite" and not f.startswith("--config.")]
        assert flags and all(re.search(rf"{re.escape(flag)}\b", told) for flag in flags), f"{module} {suite}: {flags}"


def test_keys_in_the_text_are_keys_of_the_config():
    keys = config.flatten(config.base())
    sections = {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)}
    tops = {key.split(".")[0] for key in keys}
    named = set()
    for page in PAGES:
        for key in re.findall(r"\bconfig\.((?:[a-z]\w*\.)*[a-z]\w*)", page.read_text()):
            if key.split(".")[0] in tops:
                assert key in keys or key in sections, f"{page.name} names config.{key}, which is no key"
                named.add(key)
    assert len(named) > 15


# --- Python -------------------------------------------------------------------------------------------


def test_python_in_the_text_runs(tmp_path, monkeypatch):
    """On tiny networks of random weights, which read any text."""
    runs = {"runs/quickstart": known_run.real("birwkv7"), "runs/ar": known_run.real("rwkv7", "autoregressive")}
    monkeypatch.setattr(diffrwkv, "load", runs.__getitem__, raising=False)
    monkeypatch.setattr(judging, "load_judge", lambda name, mesh=None: judging.RunJudge(runs[name], name))
    monkeypatch.chdir(tmp_path)
    for page in RUN_HERE:
        texts = ["One text of some words.", "Another text, of others."]
        names = {"diffrwkv": diffrwkv, "texts": texts, "real_texts": texts}
        for block in PYTHON:
            if block.page == page:
                exec(compile(block.text, str(block), "exec"), names)
    assert (tmp_path / "x.gif").read_bytes().startswith(b"GIF")
