"""Sampling: what is asked for is what comes back, and every wrong question gets an answer."""

import html
import io
import json
import sys

import pytest

from diffrwkv import sample
from diffrwkv.cli import sample as flags
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers

CHAR = tokenizers.Char("abc")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--workdir"),
        (["--workdir=/no/such"], "No config.json"),
        (["--workdir=x", "--num=0"], "--num"),
        (["--workdir=x", "--length=0"], "--length must be at least 1"),
        (["--workdir=x", "--num_steps=0"], "--num_steps"),
        (["--workdir=x", "--temperature=-1"], "--temperature"),
        (["--workdir=x", "--top_p=0"], "--top_p"),
        (["--workdir=x", "--top_p=1.5"], "--top_p"),
        (["--workdir=x", "--top_k=-1"], "--top_k"),
        (["--workdir=x", "--guidance=-1"], "--guidance"),
        (["--workdir=x", "--guidance=nan"], "--guidance"),
        (["--workdir=x", "--set=block"], "KEY=VALUE"),
        (["--workdir=x", "--set=name=ancestral"], "KEY=VALUE"),
        (["--workdir=x", "--length=ten"], "ten"),
        (["--workdir=x", "--prompt=a", "--infill=a_"], "exclude"),
        (["--workdir=x", "--prompt=a", "--prompts=x"], "exclude"),
        (["--workdir=x", "--prompts=no/such"], "--prompts: no/such cannot be read"),
        (["--workdir=x", "--max_new_tokens=0"], "--max_new_tokens must be at least 1"),
        (["--workdir=x", "--trace=x.mp4"], "ends in .html or .gif"),
        (["--workdir=x", "--blank=__"], "--blank"),
        (["--workdir=x", "--lenght=3"], "--lenght"),
        (["--workdir=x", "--temperature=nan"], "--temperature"),
        (["--workdir=x", "--top_p=nan"], "--top_p"),
        (["--workdir=x", "--guidance=inf"], "--guidance"),
        (["--workdir=x", "--length=1e20"], "1e20"),
        (["--workdir=x", "--num=1e12"], "1e12"),
        (["--workdir=x", "--seed=-1"], "--seed must be an integer from 0 to 4294967295, got -1"),
        (["--workdir=x", "--seed=4294967296"], "--seed"),
        (["--workdir=x", "--seed=1", "--seed=2"], "--seed is given twice, 1 and 2"),
        (["--workdir=x", "--set=block=3", "--set=block=4"], "block is given twice, 3 and 4"),
        (["--workdir=x", "--num_steps=3", "--set=num_steps=4"], "num_steps is given twice, 3 and 4"),
        (["--workdir=x", "--blank=*"], "--blank is the one character that is a blank in --infill"),
        (["--workdir=x", "--stream", "--num=4"], "leave the other flags out: --num"),
        (["--workdir=x", "--stream", "--frozen_cache=dual", "--batch_size=1"], "--batch_size, --frozen_cache"),
    ],
)
def test_wrong_flags(arguments, told):
    with pytest.raises(UserError, match=told):
        sample.main(arguments)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a\n\nb\n", "line 2 of .* is empty"),
        (b"", "line 1 of .* is empty"),
        (b"a\r\n\r\n", "line 2 of .* is empty"),
        (b"a\nb\xffc\n", r"line 2 of .* is not UTF-8 \(invalid start byte, byte 1\)"),
        ("ab".encode("utf-16"), "line 1 of .* is not UTF-8"),
    ],
)
def test_wrong_prompts(tmp_path, content, told):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=told):
        flags.read_prompts(str(tmp_path / "prompts.txt"))


def test_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for content in ("a\n b é\n", "\ufeffa\n b é", "\ufeffa\r\n b é\r\n"):
        (tmp_path / "prompts.txt").write_bytes(content.encode())
        assert flags.read_prompts("~/prompts.txt") == ["a", " b é"]
    for path in (str(tmp_path), "~nobody_at_all/x", "no\0such", "/dev/null/x"):
        with pytest.raises(UserError, match="--prompts: .* cannot be read"):
            flags.read_prompts(path)


def test_screen():
    stream = io.StringIO()
    a, mask, c = CHAR.encode("a")[0], CHAR.mask_id, CHAR.encode("c")[0]
    sample.Screen(CHAR, stream, seconds=0)([[a, mask, c], [mask, c]])
    blank = "\x1b[2m·\x1b[0m"
    assert stream.getvalue() == f"\x1b[H\x1b[2Ja{blank}c\n\n{blank}c\n"


def test_screen_shows_what_a_terminal_would_obey():
    stream = io.StringIO()
    row = [*tokenizers.Byte().encode("\x00\x1b[2J"), tokenizers.Byte.mask_id, *tokenizers.Byte().encode("é\r")]
    sample.Screen(tokenizers.Byte(), stream, seconds=0)([row])
    assert stream.getvalue() == "\x1b[H\x1b[2J\\x00\\x1b[2J\x1b[2m·\x1b[0mé\\x0d\n"


# --- The program ------------------------------------------------------------------------------------


def test_program(trained, capsys):
    sample.main([f"--workdir={trained}", "--num=3", "--infill=be ____ not", "--json", "--watch", "--batch_size=2"])
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2] and "needs a terminal" in err
    for line in lines:
        assert line["text"].startswith("be ") and line["text"].endswith(" not") and len(line["text"]) == 11
        assert len(line["tokens"]) == 11 and 1 <= line["passes"] <= 4 and line["step"] == 12
    sample.main([f"--workdir={trained}", "--num=1", "--infill=be ____ not", "--seed=0"])
    assert lines[0]["text"] in capsys.readouterr().out


def test_program_with_several_prompts_and_a_trace(trained, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\nthe end\n")
    arguments = [f"--workdir={trained}", "--num=2", "--json", "--max_new_tokens=3"]
    sample.main([*arguments, "--prompt=a", "--prompt=the end", f"--trace={tmp_path / 'x.html'}"])
    flags, _ = capsys.readouterr()
    sample.main([*arguments, f"--prompts={tmp_path / 'prompts.txt'}", "--batch_size=3"])
    assert capsys.readouterr().out == flags
    lines = [json.loads(line) for line in flags.splitlines()]
    assert [len(line["tokens"]) for line in lines] == [4, 4, 10, 10]
    assert [line["text"][:7] for line in lines[2:]] == 2 * ["the end"] and lines[0]["text"][0] == "a"
    page = (tmp_path / "x.html").read_text()
    assert page.count("<pre>") == 4 and lines[2]["text"] in html.unescape(page)


def test_program_watches_in_a_terminal(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sample.time, "sleep", lambda seconds: None)
    sample.main([f"--workdir={trained}", "--num=1", "--prompt=ab", "--prompt=the", "--max_new_tokens=2", "--watch"])
    drawn, *_, last = capsys.readouterr().out.split("\x1b[H\x1b[2J")[1:]
    blank = 2 * "\x1b[2m·\x1b[0m"
    assert drawn == f"ab{blank}\n\nthe{blank}\n" and "--- sample 1, seed 0: 5 tokens in " in last


def test_program_with_another_sampler(trained, capsys):
    options = ["--sampler=confidence", "--set=block=3", "--set=rule=factor", "--guidance=1.5"]
    sample.main([f"--workdir={trained}", "--num=2", "--infill=be ____ not", "--json", *options])
    out, err = capsys.readouterr()
    assert "does not divide the 4 positions" in err
    for line in map(json.loads, out.splitlines()):
        assert line["text"].startswith("be ") and line["text"].endswith(" not")
        assert 4 <= line["passes"] <= 8 and line["passes"] % 2 == 0  # two blocks, two passes a step


def test_program_wants_characters_that_it_knows(trained):
    with pytest.raises(UserError, match="prompt: character 'Z'"):
        sample.main([f"--workdir={trained}", "--prompt=Z"])
    with pytest.raises(UserError, match="too many"):
        sample.main([f"--workdir={trained}", "--prompt=" + "a" * 16])
