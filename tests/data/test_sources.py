import gzip
import json
import subprocess
import sys

import pytest

from diffrwkv import data
from diffrwkv.data import shards, sources
from diffrwkv.data.load import CACHE_ABOVE
from tests.documents import DOCUMENTS, compress, jsonl, read


def test_folder_pattern_and_data_folder(tmp_path):
    for i, document in enumerate(DOCUMENTS):
        compress(tmp_path / "sub" / f"{i}.txt.xz", document.encode())
    (tmp_path / "sub" / "notes.bin").write_bytes(b"\xff")
    assert read(sources.open_source("sub", tmp_path).splits["all"]) == DOCUMENTS
    assert read(sources.open_source("sub/[12].txt.xz", tmp_path).splits["all"]) == DOCUMENTS[1:]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no text in it"):
        sources.open_source(str(tmp_path / "empty"))


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'shakespear' is neither .*tinyshakespeare.* any path"):
        sources.open_source("shakespear", tmp_path)
    with pytest.raises(ValueError, match="has no name"):
        sources.open_source("", tmp_path)


def test_max_documents_and_validation_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "b.txt").write_text("held out")
    plan = sources.plan("a.jsonl", tmp_path, validation="b.txt", max_documents=2)
    assert read(plan.readers["train"]) == DOCUMENTS[:2]
    assert read(plan.readers["validation"]) == ["held out"]


@pytest.mark.parametrize("name", ["~/in/a.txt", "~/in", "~/in/*.txt", "{home}/in/*.txt", "{home}/i[n]", "~/**/a.txt"])
def test_home_and_absolute_patterns_are_like_relative_ones(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("the text")
    (tmp_path / "in" / ".b.txt").write_text("hidden")
    (tmp_path / "in" / "README.txt").write_text("not data")
    source = sources.open_source(name.format(home=tmp_path), tmp_path / "none")
    assert read(source.splits["all"]) == ["the text"]
    assert read(sources.open_source("in/*", tmp_path).splits["all"]) == ["the text"]
    assert read(sources.open_source("*.txt", "~/in").splits["all"]) == ["the text"]


def test_a_home_that_is_nobodys(tmp_path):
    for name in ("~nobody-of-that-name/a.txt", "~nobody-of-that-name/*.txt"):
        with pytest.raises(ValueError, match="neither a known name"):
            sources.open_source(name, tmp_path)


def test_a_pattern_that_matches_a_name_is_the_name(tmp_path):
    (tmp_path / "a[1].txt").write_text("the text")
    assert read(sources.open_source("a[1].txt", tmp_path).splits["all"]) == ["the text"]


def test_options_of_reading_reach_every_file_and_define_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl() + b"\n{}\n" + jsonl("body"))
    with pytest.raises(ValueError, match="line 4 of .*a.jsonl has no text under 'text'"):
        sources.plan("a.jsonl", tmp_path)
    plan = sources.plan("a.jsonl", tmp_path, on_error="skip", max_document_bytes=100, validation_fraction=0.33)
    assert [read(plan.readers[split]) for split in ("train", "validation")] == [DOCUMENTS[:1], DOCUMENTS[1:2]]
    assert plan.settings["on_error"] == "skip" and plan.settings["max_document_bytes"] == 100
    with pytest.raises(ValueError, match="on_error must be"):
        sources.plan("a.jsonl", tmp_path, on_error="ignore")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder of which a README is no data, and of whose 40 records two are bad."""
    monkeypatch.setenv("DIFFRWKV_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "README.md").write_text("about")
    lines = [json.dumps({"text": f"record {i} " + "of words " * 9}) for i in range(38)]
    (folder / "a.jsonl").write_text("\n".join([*lines[:20], "{broken", *lines[20:]]))
    (folder / "b.csv").write_text("text,x\nlast,1\nshort\n")
    return folder


@pytest.mark.parametrize("cached", [False, True])
def test_load_records_what_was_left_out(corpus, monkeypatch, cached):
    if cached:
        monkeypatch.setitem(CACHE_ABOVE, "byte", 0)
    options = dict(tokenizer="byte", length=9)
    with pytest.raises(ValueError, match=r"line 21 of .*a.jsonl is not JSON .*on_error='skip'"):
        data.load(str(corpus), **options)
    for _ in range(2):  # the second time from the cache
        info = data.load(str(corpus), **options, on_error="skip").info
        assert info["train"]["documents"] + info["validation"]["documents"] == 39
        assert info["skipped"]["records"] == 2 and "line 21 of" in info["skipped"]["first"]
        assert info["ignored"] == {"files": 1, "names": [str(corpus / "README.md")]}
        assert json.loads(json.dumps(info)) == info
    with pytest.raises(ValueError, match="line 1 of .*a.jsonl is too long"):
        data.load(str(corpus), **options, max_document_bytes=20)


def test_prepare_says_what_it_left_out(corpus, tmp_path):
    command = [sys.executable, "-m", "diffrwkv.prepare", f"--input={corpus}", "--tokenizer=byte"]
    command += [f"--output={tmp_path / 'out'}", "--shard_tokens=900"]
    done = subprocess.run([*command, "--on_error=skip"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["documents"] == 34
    for line in (
        f"{corpus}: train 34 documents, 3,084 characters (89.3%); validation 5 documents, 368 characters (10.7%)",
        f"Bad records that were left out: 2; the first: line 21 of {corpus}/a.jsonl is not JSON",
        f"Files that are no data, or there twice, and were not read: {corpus}/README.md",
    ):
        assert line in done.stderr
    loaded = data.load(str(tmp_path / "out"), tokenizer="byte", length=9)
    assert loaded.info["skipped"]["records"] == 2
    text = data.summary(loaded.info)
    assert text.startswith(f"{corpus}: train 34 documents") and "left out: 2" in text


@pytest.mark.parametrize("change", [dict(on_error="skip"), dict(max_document_bytes=1000)])
def test_a_change_of_option_is_another_text(tmp_path, change):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    shards.prepare(tmp_path / "out", sources.plan("a.jsonl", tmp_path), "byte")
    with pytest.raises(ValueError, match=f"was prepared with {next(iter(change))} "):
        shards.prepare(tmp_path / "out", sources.plan("a.jsonl", tmp_path, **change), "byte")


def test_text_to_validate_on_beside_a_prepared_folder_is_read_by_the_same_rules(corpus, tmp_path):
    shards.prepare(tmp_path / "out", sources.plan(str(corpus), on_error="skip"), "byte")
    (tmp_path / "held.jsonl").write_text('{"text": "held out"}\n{}\n')
    options = dict(tokenizer="byte", length=4, validation=str(tmp_path / "held.jsonl"))
    with pytest.raises(ValueError, match="line 2 of .*held.jsonl"):
        data.load(str(tmp_path / "out"), **options)
    info = data.load(str(tmp_path / "out"), **options, on_error="skip").info
    assert info["skipped"]["records"] == 3


def test_a_guess_of_the_size_gives_way_to_the_count(tmp_path):
    """A file that expands a thousandfold is not tokenized in memory for being small on disk."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 3_000_000))
    assert (tmp_path / "a.txt.gz").stat().st_size < 10_000
    assert sources.plan(str(tmp_path / "a.txt.gz")).size == 3_000_000
