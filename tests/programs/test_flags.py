"""Flags that nobody should write: each is refused in a sentence, or taken as it stands."""

import ast
import dataclasses
import json
import math

import numpy as np
import pytest

from diffrwkv import config, generation, train
from diffrwkv.cli import convert, prepare, sample, sampler_flags
from diffrwkv.cli.suites import likelihood, samples
from diffrwkv.config import UserError
from diffrwkv.diffusion.objectives import OBJECTIVES, from_config
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.diffusion.samplers import SAMPLERS

VALUES = """0 1 7 -1 3.7 1e3 1e20 1e400 99999999999999999999 4294967295 4294967296 2147483648 -0 +5 0x10 1_000 007 nan
NaN inf -inf None none null True false yes '' "" [] {} () (1,2) [1 __import__('os') a=b = == --seed - -- @file ~ ~no/x
/ . .. ../x /dev/null é 漢字 ½ ٣ 1,5 1;5 $HOME * % %s {0} x.html x.gif x.npz no/such/x.gif validation test best last
mdlm rwkv7 dual block=3 rule=factor x=1 =1 x= x==1 name=y temperature=0.5 temperature=nan""".split()
VALUES += ["", " ", " 1", "1 ", "a b", "\t", "\n", "\x00", "\x1b[2J", "\udcff", "a" * 5000, "[" * 500, "9" * 5000]

INTEGERS = {
    "evaluate": ("draws", "limit", "seed", "batch_size", "block_size", "length", "group"),
    "sample": ("num", "length", "max_new_tokens", "num_steps", "seed", "top_k", "batch_size", "block_size"),
    "samples": ("num", "length", "num_steps", "seed", "top_k", "batch_size", "block_size", "window", "stride"),
    "convert": (),
    "prepare": ("max_document_bytes", "max_documents", "shard_tokens"),
}
FLOATS = {
    "evaluate": (),
    "sample": ("guidance", "temperature", "top_p"),
    "samples": ("temperature", "top_p"),
    "convert": (),
    "prepare": ("validation_fraction",),
}
TEXTS = {
    "evaluate": ("split", "step", "data_root", "detokenizer", "packing", "text_key"),
    "sample": ("sampler", "frozen_cache", "prompts", "blank", "trace", "step"),
    "samples": ("sampler", "frozen_cache", "texts", "real", "features", "step", "text_key", "data_root"),
    "convert": ("from", "to", "input", "output", "config", "step", "push"),
    "prepare": ("input", "output", "tokenizer", "root", "text_key", "on_error", "validation"),
}
LISTS = {
    "evaluate": ("data",),
    "sample": ("prompt", "infill", "set"),
    "samples": ("set",),
    "convert": (),
    "prepare": (),
}
SWITCHES = {
    "evaluate": ("raw", "wrap", "no_wrap", "no_eos", "each_line"),
    "sample": ("no_stop_at_eos", "json", "watch", "stream", "raw"),
    "samples": ("no_stop_at_eos", "each_line", "raw"),
    "convert": ("ema", "raw"),
    "prepare": (),
}
PARSE = {
    "evaluate": likelihood.parse_arguments,
    "sample": sample.parse_arguments,
    "samples": samples.parse_arguments,
    "convert": convert.parse_arguments,
    "prepare": prepare.parse_arguments,
}
NEEDED = {
    "evaluate": [[], [("data", "x")]],
    "sample": [[], [("infill", "a_b")]],
    "samples": [[("judge", "y")], [("judge", "y"), ("texts", "z")]],
    "convert": [[("input", "x.npz")], [("to", "mdlm"), ("output", "x.npz")], [("to", "hf"), ("output", "x")]],
    "prepare": [[("input", "x.txt"), ("output", "x"), ("tokenizer", "byte")]],
}
WORKDIR = {program: [] if program == "prepare" else ["--workdir=x"] for program in PARSE}
NAMES = {"from": "source", "to": "target"}


def draw(random, program):
    """Some flags with odd values: [(flag, value or None for a switch)]."""
    flags = [*INTEGERS[program], *FLOATS[program], *TEXTS[program], *LISTS[program], *SWITCHES[program]]
    chosen = [flags[i] for i in random.integers(len(flags), size=random.integers(1, 4))]
    return [(f, None if f in SWITCHES[program] else VALUES[random.integers(len(VALUES))]) for f in chosen]


def spelt(random, given):
    arguments = []
    for flag, value in given:
        apart = value is not None and random.integers(4) == 0
        arguments += [f"--{flag}", value] if apart else [f"--{flag}" if value is None else f"--{flag}={value}"]
    return arguments


@pytest.mark.parametrize("program", PARSE)
def test_flags_are_refused_or_taken_as_they_stand(program):
    random, taken = np.random.default_rng(0), 0
    for _ in range(400):
        given = draw(random, program)
        needed = NEEDED[program][random.integers(len(NEEDED[program]))]
        needed = [(flag, value) for flag, value in needed if flag not in dict(given)]
        arguments = [*WORKDIR[program], *spelt(random, needed + given)]
        try:
            args = PARSE[program](arguments)
        except UserError as e:
            assert str(e) and "Traceback" not in str(e)
            continue
        taken += 1
        for flag, value in given:
            got = getattr(args, NAMES.get(flag, flag), None)
            if flag in INTEGERS[program]:
                assert got == int(value), arguments
            elif flag in FLOATS[program]:
                assert got == float(value) and math.isfinite(got), arguments
            elif flag in TEXTS[program]:
                assert got == value, arguments
            elif flag in ("prompt", "infill", "data"):
                assert value in got, arguments
            elif flag == "set":
                assert value.partition("=")[0] in got, arguments
    assert taken > 20


ABBREVIATED = {
    "evaluate": "--dra=2",
    "sample": "--temp=1",
    "samples": "--temp=1",
    "convert": "--inp=x",
    "prepare": "--inp=x",
}


@pytest.mark.parametrize("program", PARSE)
def test_no_flag_is_abbreviated_or_given_two_values(program):
    needed = [
        *WORKDIR[program],
        *(f"--{flag}={value}" for flag, value in NEEDED[program][0] if program in ("prepare", "samples")),
    ]
    with pytest.raises(UserError, match="nrecognized|Unknown argument|--input=WEIGHTS"):
        PARSE[program]([*needed, ABBREVIATED[program]])
    flags = ("root", "validation") if program == "prepare" else ("workdir", "step")
    for flag in flags:
        with pytest.raises(UserError, match=f"--{flag} is given twice"):
            PARSE[program]([*needed, f"--{flag}=1", f"--{flag}=2"])


def test_a_value_that_is_given_twice_is_one():
    args = sample.parse_arguments(["--workdir=x", "--workdir=x", "--seed=3", "--seed", "3", "--prompt=a", "--prompt=b"])
    assert (args.workdir, args.seed, args.prompt) == ("x", 3, ["a", "b"])
    assert sample.parse_arguments(["--workdir=x", "--seed=4"]).seed == 4  # nothing stays from an earlier call


def test_text_that_begins_like_a_flag_is_a_value():
    given = ["--workdir=x", "--prompt", "--foo=3 is no flag", "--prompt=--seed"]
    assert sample.parse_arguments(given).prompt == ["--foo=3 is no flag", "--seed"]
    with pytest.raises(UserError, match="Unknown argument '--promt=a b'. Did you mean: --prompt"):
        sample.parse_arguments(["--workdir=x", "--promt=a b"])


def test_options_of_samplers_are_refused_or_taken_as_they_stand():
    def objective_of(cls):
        name = next(name for name, entry in OBJECTIVES.items() if issubclass(entry.process, cls.needs))
        blocks = "blocks" if cls.face == "window" else "whole"
        return from_config(Vocabulary(9, 3), name=name, layout=blocks)

    built_from = {name: objective_of(cls) for name, cls in SAMPLERS.items()}
    random, number = np.random.default_rng(0), 0
    values = [value for value in VALUES if "\x00" not in value]
    values += ["[1.5, 2, 3]", "0.5", "2", "steps", "conf", "1j", "{1}"]
    for _ in range(80 * len(SAMPLERS)):
        name = list(SAMPLERS)[random.integers(len(SAMPLERS))]
        keys = [field.name for field in dataclasses.fields(SAMPLERS[name])] + ["nothing"]
        key, value = keys[random.integers(len(keys))], values[random.integers(len(values))]
        try:
            options = dict([sampler_flags.parse_option(f"{key}={value}")])
            built = generation.build_sampler(config.base(), built_from[name], name=name, **options)
        except UserError as e:
            assert str(e)
            continue
        built = getattr(built, "sampler", built)
        got, asked = getattr(built, key), options[key]
        assert got == asked or asked is None or got == tuple(asked), (name, key, value)
        number += 1
    assert number > 20


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text("from diffrwkv.config import base\n\n\ndef get_config(arg=None):\n    return base()\n")
    return path


def listed_numbers(value):
    """The numbers that a text lists, with brackets or without: a tuple."""
    listed = ast.literal_eval(value)
    return tuple(listed) if isinstance(listed, tuple | list) else (listed,)


def same(value, got):
    """Whether a value of a command line is what a config then holds."""
    if isinstance(got, bool):
        return value.lower() in ({"true", "t", "1", "y", "yes"} if got else {"false", "f", "0", "n", "no"})
    if isinstance(got, int):
        return int(value, 0 if value[:1] == "0" and not value.isdigit() else 10) == got
    if isinstance(got, float):
        return float(value) == got or (math.isnan(got) and math.isnan(float(value)))
    if isinstance(got, list):  # numbers, or one text that the constructor refuses
        return got == [value] or str(tuple(got)) == str(listed_numbers(value))
    return str(got) == value or got is None


def test_overrides_are_refused_or_taken_as_they_stand(experiment, monkeypatch):
    taken = []
    monkeypatch.setattr(train, "run", lambda cfg, workdir: taken.append((cfg, workdir)))
    random, keys, number = np.random.default_rng(0), sorted(config.flatten(config.base())), 0
    for _ in range(400):
        key, value = keys[random.integers(len(keys))], VALUES[random.integers(len(VALUES))]
        taken.clear()
        try:
            train.main([f"--config={experiment}", "--workdir=x", f"--config.{key}={value}"])
        except UserError as e:
            assert str(e)
            continue
        ((cfg, workdir),) = taken
        flat = config.flatten(cfg)
        assert workdir == "x" and same(value, flat[key]), (key, value, flat[key])
        unchanged = config.flatten(config.base())
        assert {k for k in flat if k != key and json.dumps(flat[k]) != json.dumps(unchanged[k])} == set()
        number += 1
    assert number > 40


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config.seed=1", "--config.seed=2"], "config.seed is given twice"),
        (["--config.model.remat", "--noconfig.model.remat"], "config.model.remat is given twice"),
        (["--workdir=y"], "--workdir is given twice, 'x' and 'y'"),
        (["--workdi=y"], "Unknown argument '--workdi=y'"),
        (["--config.trian.num_steps=3"], "Did you mean: config.train.num_steps"),
    ],
)
def test_train_takes_no_flag_for_another(experiment, monkeypatch, arguments, told):
    monkeypatch.setattr(train, "run", lambda cfg, workdir: pytest.fail("it ran"))
    with pytest.raises(UserError, match=told):
        train.main([f"--config={experiment}", "--workdir=x", *arguments])
