import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from diffrwkv import data
from diffrwkv.data import shards, sources
from diffrwkv.data.download import file_sha256
from diffrwkv.data.tokenizers import Byte


@pytest.fixture
def corpus(tmp_path):
    """40 documents of about 100 characters as jsonl."""
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"Document {i}: " + "so it goes, é. " * (i % 9 + 2)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def prepare(corpus, folder, tokenizer="byte", shard_tokens=500, **keywords):
    return shards.prepare(
        folder, sources.plan(str(corpus), **keywords), tokenizer, shard_tokens=shard_tokens
    )


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".npy"}


def tokens(source):
    return [source[i].tolist() for i in range(len(source))]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Documents are tokenized one by one, so that shards end where they are asked to."""
    encode = shards.tokenizers.encode_documents
    monkeypatch.setattr(
        shards.tokenizers,
        "encode_documents",
        lambda *a, **k: encode(*a, **{**k, "batch_characters": 1}),
    )


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:290"])
@pytest.mark.parametrize("wrap", [False, True])
def test_shards_hold_what_load_makes_of_the_text(corpus, tmp_path, tokenizer, wrap):
    manifest = prepare(corpus, tmp_path / "out", tokenizer)
    assert manifest["complete"] and len(manifest["splits"]["train"]["shards"]) > 2
    options = dict(tokenizer=tokenizer, length=12, wrap=wrap)
    direct = data.load(str(corpus), **{**options, "packing": "document"})
    again = data.load(str(tmp_path / "out"), **{**options, "packing": "document"})
    assert tokens(again.train) == tokens(direct.train)
    assert tokens(again.validation) == tokens(direct.validation)
    assert again.tokenizer == direct.tokenizer
    for key in ("sha256", "train", "validation", "characters_per_token"):
        assert again.info[key] == direct.info[key]
    assert len(data.load(str(tmp_path / "out"), **options).train) > 10


def test_manifest_says_what_the_shards_are(corpus, tmp_path):
    manifest = prepare(corpus, tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    entry = manifest["splits"]["train"]
    row = np.concatenate([np.load(tmp_path / "out" / s["file"]) for s in entry["shards"]])
    assert row.dtype == np.uint16 and len(row) == entry["tokens"]
    texts = [json.loads(line)["text"] for line in corpus.read_text().split("\n")]
    text = Byte().decode(row)
    assert "".join(texts).startswith(text) and len(text) == entry["characters"]
    assert (row == Byte().eos_id).sum() == entry["documents"]
    for shard in entry["shards"]:
        assert file_sha256(tmp_path / "out" / shard["file"]) == shard["sha256"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
@pytest.mark.parametrize("after", range(0, 14, 2))
def test_goes_on_where_it_was_stopped(corpus, tmp_path, monkeypatch, tokenizer, after):
    """Stopped before any of its renames, a second run ends with the files of an undisturbed one."""
    shard_tokens = 500 if tokenizer == "byte" else 250
    prepare(corpus, tmp_path / "whole", tokenizer, shard_tokens)
    calls, replace = [], os.replace

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "out", tokenizer, shard_tokens)
    before = {
        name: (tmp_path / "out" / name).stat().st_mtime_ns for name in content(tmp_path / "out")
    }
    prepare(corpus, tmp_path / "out", tokenizer, shard_tokens)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    whole, out = (shards.read_manifest(tmp_path / name) for name in ("whole", "out"))
    assert whole == out
    kept = [n for n, t in before.items() if (tmp_path / "out" / n).stat().st_mtime_ns == t]
    assert len(kept) >= len(before) - 1  # at most the shard that the manifest had not yet listed


def test_a_damaged_shard_is_made_again(corpus, tmp_path):
    prepare(corpus, tmp_path / "out")
    before = content(tmp_path / "out")
    (tmp_path / "out" / "train-00001.npy").write_bytes(b"damaged")
    (tmp_path / "out" / "validation-00000.npy").unlink()
    with pytest.raises(ValueError, match="validation-00000.npy is missing; run this again"):
        data.load(str(tmp_path / "out"), tokenizer="byte", length=9)
    prepare(corpus, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_finished_folder_is_only_checked(corpus, tmp_path, monkeypatch):
    prepare(corpus, tmp_path / "out")
    monkeypatch.setattr(shards, "_shards", lambda *a: pytest.fail("tokenized again"))
    assert prepare(corpus, tmp_path / "out")["complete"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokenizer="char"), "prepared with tokenizer 'byte', not 'char'"),
        (dict(shard_tokens=400), "prepared with shard_tokens 500, not 400"),
        (dict(validation_fraction=0.2), "prepared with validation_fraction 0.1, not 0.2"),
        (dict(max_documents=7), "prepared with max_documents None, not 7"),
    ],
)
def test_other_settings_are_refused_by_name(corpus, tmp_path, change, message):
    prepare(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path / "out", **change)


def test_changed_text_is_refused(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = []
        write = shards._write_manifest

        def stop(*arguments):
            write(*arguments)
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        patch.setattr(shards, "_write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "out")
    corpus.write_text(corpus.read_text().replace("Document 0", "document 0"))
    with pytest.raises(ValueError, match="the train text has changed since .* was begun"):
        prepare(corpus, tmp_path / "out")


def test_load_refuses_what_does_not_fit(corpus, tmp_path):
    prepare(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="prepared with tokenizer 'byte', not 'char'; set config"):
        data.load(str(tmp_path / "out"), tokenizer="char", length=9)
    other = data.load(str(corpus), tokenizer="char", length=9).tokenizer
    with pytest.raises(ValueError, match="whose vocabulary is not that of Char"):
        data.load(str(tmp_path / "out"), tokenizer=other, length=9)
    manifest = shards.read_manifest(tmp_path / "out")
    manifest["complete"] = False
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not finished; run this again"):
        data.load(str(tmp_path / "out"), tokenizer="byte", length=9)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a manifest of python -m diffrwkv.prepare"):
        data.load(str(tmp_path / "out"), tokenizer="byte", length=9)


def test_a_prepared_data_set_is_found_by_its_name(corpus, tmp_path):
    prepare(corpus, tmp_path / "openwebtext-byte")
    dataset = data.load("openwebtext", tmp_path, tokenizer="byte", length=9)
    assert len(dataset.train) > 100
    (tmp_path / "held.txt").write_text("held out text")
    dataset = data.load("openwebtext", tmp_path, tokenizer="byte", length=4, validation="held.txt")
    assert dataset.tokenizer.decode(dataset.validation[0]) == "held"


def test_shards_of_large_vocabularies_are_uint32(monkeypatch, corpus, tmp_path):
    monkeypatch.setattr(Byte, "vocab_size", 2**16 + 1)
    assert prepare(corpus, tmp_path / "out")["dtype"] == "uint32"
    assert np.load(tmp_path / "out" / "train-00000.npy").dtype == np.uint32


def run_program(*arguments, wait=True):
    command = [sys.executable, "-m", "diffrwkv.prepare", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return process
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_program(corpus, tmp_path):
    code, out, err = run_program(
        f"--input={corpus}", f"--output={tmp_path / 'out'}", "--tokenizer=byte"
    )
    assert code == 0, err
    counts = json.loads(out)
    assert counts["train"]["documents"] + counts["validation"]["documents"] == 40
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["command"].startswith("python -m diffrwkv.prepare --input=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--input=missing.txt", "--output=o", "--tokenizer=byte"],
            "prepare: data set 'missing.txt' is n",
        ),
        (
            ["--input=python_reference", "--output=o", "--tokenizer=word"],
            "prepare: tokenizer 'word' is no",
        ),
        (["--output=o", "--tokenizer=byte"], "Flag --input must have a value"),
    ],
)
def test_program_errors_are_one_line(tmp_path, arguments, message):
    code, _, err = run_program(*arguments)
    assert code != 0 and message in err and "Traceback" not in err


def test_killed_program_goes_on(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("It goes on, and on, and on. " * 400_000)
    arguments = [f"--input={text}", "--tokenizer=byte", "--shard_tokens=1000000"]
    process = run_program(*arguments, f"--output={tmp_path / 'out'}", wait=False)
    deadline = time.monotonic() + 50
    while not list(tmp_path.glob("out/train-*.npy")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode == 0:
        pytest.skip("the program was done before it could be killed")
    assert not shards.read_manifest(tmp_path / "out")["complete"]
    code, _, err = run_program(*arguments, f"--output={tmp_path / 'out'}")
    assert code == 0, err
    code, _, err = run_program(*arguments, f"--output={tmp_path / 'whole'}")
    assert code == 0, err
    assert content(tmp_path / "out") == content(tmp_path / "whole")
