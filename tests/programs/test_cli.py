"""The command line: programs by name, flags that are read before JAX is imported, and what a slip is told."""

import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import diffrwkv
from diffrwkv import bars, cli, config, profile, published, train, weights, workdir
from diffrwkv.cli import convert, sampler_flags, suites
from diffrwkv.cli import train as flags
from diffrwkv.config import UserError
from diffrwkv.diffusion import samplers
from diffrwkv.suites import SUITES

# What imports no JAX before it ends: a run of the program, status 2 or --help.
SLIPS = {
    "prepare": [
        ["--nonsense"],
        ["--input=x", "--output=y", "--tokenizer=z"],
        ["--input=nothing", "--output=y", "--tokenizer=byte"],
    ],
    "train": [
        ["--config=quickstrat", "--workdir=x"],
        ["--config=peer_shakespeare:ar_rwkv", "--workdir=x", "--config.optim.lr=1"],
        ["--config=quickstart", "--workdir=x", "--config.train.num_steps=0"],
        ["--config=quickstart", "--workdir=x", "--config.objectives.duo.tau_end=1"],
        ["--config=quickstart", f"--workdir={__file__}"],
        ["--config=quickstart", "--workdir=x", "--config.data.name=nothing.txt"],
    ],
    "plan": [["--config=quickstart", "--compil"]],
    "evaluate": [
        ["--suite=nothing"],
        ["--workdir=nothing"],
        ["--workdir={run}", "--data=nothing.txt"],
        ["--suite=choices", "--workdir={run}", "--data=nothing.jsonl"],
        ["--suite=samples", "--workdir={run}", "--judge=nothing"],
        ["--suite=samples", "--judge={run}", "--texts=nothing.txt"],
    ],
    "sample": [["--max-new-tokens=3"], ["--workdir=nothing"], ["--workdir=x", "--trace=x.jpg"]],
    "compare": [["--nonsense"]],
    "profile": [["--size=nothing"]],
    "convert": [
        ["--to=mdlm", "--workdir=nothing", "--output=x.npz"],
        ["--from=mdlm", "--workdir=x", "--input=nothing.npz", "--config=quickstart"],
    ],
    "lm_eval": [["--workdir=nothing", "--tasks=x"]],
}
WATCHED = """
import runpy, sys
sys.argv[1:], cases = [], {cases!r}
class Ended(BaseException): pass
for program, arguments in cases:
    sys.argv = ["diffrwkv", program, *arguments]
    try:
        runpy.run_module("diffrwkv", run_name="__main__")
    except SystemExit as e:
        status = e.code or 0
    heavy = sorted({{"jax", "flax", "optax", "orbax", "grain"}} & set(sys.modules))
    print("ENDED", program, arguments, status, heavy, flush=True)
"""


def test_no_program_imports_jax_before_its_flags_are_read(tmp_path):
    """In one process: what one of them imported would be seen of all that follow."""
    run, empty = tmp_path / "run", tmp_path / "empty"
    run.mkdir()
    empty.mkdir()
    config.save(config.base(), run / "config.json")
    cases = [(program, [a.format(run=run) for a in each]) for program, slips in SLIPS.items() for each in slips]
    cases += [(program, ["--help"]) for program in cli.PROGRAMS] + [("train", ["--list"])]
    cases += [("evaluate", [f"--suite={suite}", "--help"]) for suite in SUITES]
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "PYTHONPATH": ":".join(filter(None, sys.path))}
    code = WATCHED.format(cases=cases)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=empty, env=environment)
    assert done.returncode == 0, done.stderr
    ended = [line for line in done.stdout.splitlines() if line.startswith("ENDED")]
    status = [2 * (arguments[-1] not in ("--help", "--list")) for _, arguments in cases]
    assert ended == [f"ENDED {p} {a} {s} []" for (p, a), s in zip(cases, status, strict=True)], done.stderr
    assert done.stderr.count("error: ") == len(done.stderr.splitlines()) == status.count(2)
    assert list(empty.iterdir()) == []  # and no slip leaves anything


@pytest.mark.parametrize("program", cli.PROGRAMS)
def test_a_module_starts_as_its_program_does(program):
    """`python -m diffrwkv.NAME` reads the flags before the module's other lines import anything."""
    text = Path(importlib.import_module(f"diffrwkv.{program}").__file__).read_text()
    body = re.sub(r'^r?""".*?"""\n+(from __future__ import annotations\n+)?', "", text, count=1, flags=re.DOTALL)
    assert body.startswith('if __name__ == "__main__":') and body.split("\n")[3].strip() == f'cli.start("{program}")'


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_programs_by_name():
    code, out, _ = run("-m", "diffrwkv")
    assert code == 0 and all(f"  {name} " in out for name in cli.PROGRAMS)
    assert run("-m", "diffrwkv", "--version") == (0, f"diffrwkv {diffrwkv.__version__}\n", "")
    code, out, err = run("-m", "diffrwkv", "trian")
    assert (code, out, err) == (2, "", "error: No program is called 'trian'. Did you mean: train?\n")
    assert run("-m", "diffrwkv", "sample", "--help")[1].startswith("usage: diffrwkv sample ")
    assert run("-m", "diffrwkv.sample", "--help")[1].startswith("usage: python -m diffrwkv.sample ")


def test_names_that_stand_without_jax_are_those_of_the_tables():
    assert list(weights.FORMATS) == list(convert.FORMATS) and list(published.KINDS) == list(convert.KINDS)
    assert samplers.CACHES == sampler_flags.CACHES
    assert set(suites.SUITES) == set(SUITES)
    light = importlib.import_module("diffrwkv.cli.profile")
    assert light.DTYPES == list(profile.TOLERANCE)
    assert set(light.operators()) == set(profile.PLAIN)


@pytest.mark.parametrize(
    ("program", "arguments", "told"),
    [
        ("sample", ["--workdir=x", "--max-new-tokens=3"], "Did you mean: --max_new_tokens?"),
        ("sample", ["--work-dir=x"], "Did you mean: --workdir?"),
        ("sample", ["--workdir=x", "--temprature", "3"], "Did you mean: --temperature?"),
        ("sample", ["--workdir=x", "more"], "Unknown argument 'more'"),
        ("evaluate", ["--workdir=x", "--detok=lm1b"], "Did you mean: --detokenizer?"),
        ("train", ["--optim.lr=1"], "Did you mean: --config.optim.learning_rate, "),
        ("train", ["optim.learning_rate=1"], "Did you mean: --config.optim.learning_rate"),
        ("train", ["--learning-rate", "1"], "Did you mean: --config.optim.learning_rate"),
        ("train", ["--batch_size=1"], "Did you mean: --config.train.batch_size"),
        ("train", ["--config=quickstart", "--workdir=x", "--config.optim.lr=1"], "mean: config.optim.learning_rate, "),
        ("train", ["--config=quickstart", "--workdir=x", "--config.train.wd=1"], "config.optim.weight_decay"),
        ("convert", ["--from=mdlm", "--workdr=x"], "Did you mean: --workdir?"),
    ],
)
def test_a_slip_is_told_what_is_near(program, arguments, told):
    with pytest.raises(UserError, match=re.escape(told)) as e:
        importlib.import_module(f"diffrwkv.cli.{program}").parse_arguments(arguments)
    assert "\n" not in str(e.value)


KEY = r"^    (--config\.\S+=.*?)(?: +(\S.*))?$"  # in the table of --help


def test_help_of_train_has_every_key_as_one_types_it(capsys):
    with pytest.raises(SystemExit):
        flags.parse_arguments(["--help"])
    out = capsys.readouterr().out
    lines = re.findall(KEY, out, re.MULTILINE)
    typed = [argument for argument, _ in lines]
    values = {key: value for key, value in config.flatten(config.base()).items() if value != {}}
    assert sorted(t.partition("=")[0] for t in typed) == sorted(f"--config.{key}" for key in values)
    told = {argument.partition("=")[0].removeprefix("--config."): comment for argument, comment in lines}
    assert told["optim.learning_rate"] == "peak"
    assert told["objectives.gidd.time_eps"] == told["objectives.mdlm.time_eps"] == "t is drawn from [time_eps, 1]"
    assert told["samplers.remdm.top_p"] == "keep the smallest set of tokens with this much probability"
    assert re.search(r"^  samplers.remdm: \"ancestral\", which masks tokens again$", out, re.MULTILINE)


def test_what_help_of_train_shows_can_be_typed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        flags.parse_arguments(["--help", "--config=peer_shakespeare:birwkv@16,64"])
    out = capsys.readouterr().out
    typed = [shlex.split(argument)[0] for argument, _ in re.findall(KEY, out, re.MULTILINE)]
    assert "--config.layouts.blocks.sizes=16,64" in typed and "--config.model.dim=128" in typed
    chosen = ("objectives.mdlm", "schedules.loglinear", "layouts.blocks")  # options of others are refused
    skip = tuple(f"--config.{section}." for section in ("objectives", "schedules", "layouts"))
    taken = [t for t in typed if not t.startswith(skip) or t.startswith(tuple(f"--config.{c}." for c in chosen))]
    here = ["--config=peer_shakespeare:birwkv@16,64"]
    assert config.flatten(config.parse([*here, *taken])) == config.flatten(config.parse(here))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_told_what_goes_on_and_a_file_is_not(monkeypatch):
    for stream, told in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert bars.shown() == told
        with bars.waiting("reading"):
            assert stream.getvalue() == "reading ..." * told
        assert stream.getvalue().endswith("\x1b[K") == told
        bar = bars.bar(3, "evaluate", show=bars.shown(), compiles=True)
        assert ("compiling" in stream.getvalue()) == told
        before = len(stream.getvalue())
        for _ in range(3):
            bar.update()
            bar.refresh()
        bar.close()
        after = stream.getvalue()[before:]
        assert ("evaluate" in after, "3/3" in after) == (told, told)
        if told:
            assert "compiling" not in after


def test_training_without_data_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="nothing.txt"):
        train.main(
            ["--config=quickstart", f"--workdir={tmp_path / 'a' / 'b'}", f"--config.data.name={tmp_path}/nothing.txt"]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_failed_leaves_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    for path, stays in ((tmp_path / "a" / "b", False), (tmp_path / "mine", True)):
        with pytest.raises(UserError), workdir.making(path) as made, workdir.held(made):
            (made / "checkpoints").mkdir()
            raise UserError("no data")
        assert path.exists() == stays
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError), workdir.making(tmp_path / "c") as made:
        (made / "config.json").write_text("{}")
        raise UserError("behind the start")
    assert (tmp_path / "c" / "config.json").exists()
    with pytest.raises(UserError), workdir.making(tmp_path / "d") as made:
        (made / "notes.txt").write_text("somebody's")
        raise UserError("no data")
    assert (tmp_path / "d" / "notes.txt").exists()
