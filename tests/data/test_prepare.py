import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from diffrwkv import config, data, files
from diffrwkv import prepare as program
from diffrwkv.data import manifest as manifests
from diffrwkv.data import shards, sources, splits
from diffrwkv.data.tokenizers import Byte
from diffrwkv.files import file_sha256


@pytest.fixture
def corpus(tmp_path):
    """40 documents of about 100 characters as jsonl."""
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"Document {i}: " + "so it goes, é. " * (i % 9 + 2)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def prepare(corpus, folder, tokenizer="byte", shard_tokens=500, **keywords):
    return shards.prepare(folder, sources.plan(str(corpus), **keywords), tokenizer, shard_tokens=shard_tokens)


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".npy"}


def tokens(source):
    return [source[i].tolist() for i in range(len(source))]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFRWKV_CACHE", str(tmp_path / "cache"))


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
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written.pop("digest") == files.digest(manifest)
    assert manifest == written == shards.read_manifest(tmp_path / "out")
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
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in content(tmp_path / "out")}
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
        write = shards.write_manifest

        def stop(*arguments):
            write(*arguments)
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        patch.setattr(shards, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "out")
    corpus.write_text(corpus.read_text().replace("Document 0", "document 0"))
    monkeypatch.setattr(shards, "check_inputs", lambda *a: None)  # as for a text that is no file
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
    shards.write_manifest(tmp_path / "out", manifest)
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


# What a folder says of itself


def values(folder, **options):
    """All that a run takes from a prepared folder."""
    dataset = data.load(str(folder), **{"tokenizer": "byte", "length": 9, **options})
    chunks = [tokens(split) for split in (dataset.train, dataset.validation)]
    return json.dumps([dataset.info, chunks, dataset.tokenizer.to_json(), dataset.characters_per_token])


@pytest.fixture
def settled(monkeypatch):
    """Files count as old, so that what was verified is noted at once."""
    monkeypatch.setattr(manifests, "SETTLED_NS", -(1 << 62))


def test_every_damage_is_refused_or_changes_nothing(corpus, tmp_path, settled):
    """Truncated, flipped, emptied, swapped, deleted, or exchanged for another folder's, any file of the folder and the
    notes of what was verified."""
    folder, other, spare = tmp_path / "out", tmp_path / "other", tmp_path / "spare"
    prepare(corpus, folder)
    prepare(corpus, other, validation_fraction=0.3)
    good, draw = values(folder), np.random.default_rng(0)
    shutil.copytree(folder, spare)
    notes = list(manifests.cache_root().glob("verified/*.json"))
    assert notes
    refused = 0
    for _ in range(240):
        files = sorted([*folder.glob("*.npy"), folder / "manifest.json", *notes])
        path = files[draw.integers(len(files))]
        before, kind = path.read_bytes(), draw.integers(7)
        if kind == 0:
            path.write_bytes(before[: draw.integers(len(before))])
        elif kind == 1:
            flipped = bytearray(before)
            flipped[draw.integers(len(before))] ^= 1 << draw.integers(8)
            path.write_bytes(flipped)
        elif kind == 2:
            path.write_bytes(b"")
        elif kind == 3:
            second = files[draw.integers(len(files))]
            path.write_bytes(second.read_bytes())
            second.write_bytes(before)
        elif kind == 4:
            path.unlink()
        elif kind == 5 and (other / path.name).exists():
            path.write_bytes((other / path.name).read_bytes())
        else:
            at = draw.integers(len(before))
            path.write_bytes(before[:at] + draw.bytes(draw.integers(1, 99)) + before[at:])
        try:
            after = values(folder)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 700, error
        else:
            assert after == good, (path, kind)
        for file in spare.iterdir():
            shutil.copy(file, folder / file.name)
    assert refused > 120
    assert values(folder) == good


def test_every_field_of_a_manifest_is_checked(corpus, tmp_path):
    """Also where its digest was made anew: by somebody else's program, or to lead out of the folder."""
    prepare(corpus, tmp_path / "out")
    good, path = shards.read_manifest(tmp_path / "out"), tmp_path / "out" / "manifest.json"
    size, places = 0, []

    def walk(value, place):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((*place, key))
            if isinstance(value[key], dict | list):
                walk(value[key], (*place, key))

    walk({key: good[key] for key in good if key not in ("settings", "command")}, ())
    for place in places:
        for wrong in (None, -1, 1 << 70, float("nan"), "../../x", []):
            manifest = json.loads(json.dumps(good))
            owner = manifest
            for key in place[:-1]:
                owner = owner[key]
            if owner[place[-1]] == wrong or (place, wrong) == (("inputs",), []):
                continue
            owner[place[-1]] = wrong
            shards.write_manifest(tmp_path / "out", manifest)
            if place[:1] in (("info",), ("inputs",)) and len(place) > 1:  # what is only passed on
                continue
            with pytest.raises(ValueError) as caught:
                data.load(str(tmp_path / "out"), tokenizer="byte", length=9)
            assert "\n" not in str(caught.value), place
            size += 1
    assert size > 200
    for text in (b"[" * 200_000, b"\xff\xfe{}", b"[1]", b"null", b'{"format": "diffrwkv-shards-1"}', b"1" * 9000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="manifest.json .*prepare the"):
            data.load(str(tmp_path / "out"), tokenizer="byte", length=9)


def test_ids_that_the_tokenizer_lacks_are_refused(corpus, tmp_path):
    """Another program's folder, all of whose hashes are right."""
    prepare(corpus, tmp_path / "out")
    for wrong in (Byte.mask_id, Byte.vocab_size, 65535):
        manifest, shard = shards.read_manifest(tmp_path / "out"), tmp_path / "out" / "train-00001.npy"
        row = np.load(shard)
        row[7] = wrong
        np.save(shard, row)
        manifest["splits"]["train"]["shards"][1] |= {"sha256": file_sha256(shard), "max_id": wrong}
        shards.write_manifest(tmp_path / "out", manifest)
        with pytest.raises(ValueError, match="train-00001.npy has ids that are not of tokenizer 'byte'"):
            data.load(str(tmp_path / "out"), tokenizer="byte", length=9)


def test_shards_are_read_once(corpus, tmp_path, settled, monkeypatch):
    prepare(corpus, tmp_path / "out")
    good = values(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "file_sha256", lambda path: pytest.fail("read again"))
        assert values(tmp_path / "out") == good
        assert prepare(corpus, tmp_path / "out")["complete"]
    shard = tmp_path / "out" / "train-00001.npy"
    stat, content = shard.stat(), bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as old as before, by its times
    with pytest.raises(ValueError, match="train-00001.npy is damaged, cut short or another file; run"):
        values(tmp_path / "out")


def test_a_shard_that_has_just_changed_is_read_again(corpus, tmp_path):
    """Within one tick of the clock a file can change twice and look the same: nothing is noted yet."""
    prepare(corpus, tmp_path / "out")
    values(tmp_path / "out")
    assert not manifests._read_notes(manifests._notes(tmp_path / "out"))


def test_without_a_cache_folder_shards_are_verified_all_the_same(corpus, tmp_path, settled, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFRWKV_CACHE", str(tmp_path / "file"))
    prepare(corpus, tmp_path / "out")
    assert values(tmp_path / "out") == values(tmp_path / "out")


# Inputs that change


@pytest.mark.parametrize("stopped", [False, True])
def test_an_input_edited_in_place_is_noticed(corpus, tmp_path, stopped, monkeypatch):
    text, lines = corpus.read_text(), []
    if stopped:
        with monkeypatch.context() as patch:
            patch.setattr(shards, "sha256_of_splits", lambda digests: pytest.fail("unused"))
            patch.setattr(shards, "file_sha256", fail_after(4, shards.file_sha256))
            with pytest.raises(KeyboardInterrupt):
                prepare(corpus, tmp_path / "out")
    else:
        prepare(corpus, tmp_path / "out")
    corpus.write_text(text.replace("Document 39", "document 39"))  # of the same size
    with pytest.raises(ValueError, match="corpus.jsonl has changed since .*out was begun; name"):
        prepare(corpus, tmp_path / "out")
    copy = tmp_path / "copy.jsonl"
    copy.write_text(text)
    copy.replace(corpus)  # another time, another inode, the same content
    plan = sources.plan(str(corpus))
    shards.prepare(tmp_path / "out", plan, "byte", shard_tokens=500, tell=lines.append)
    assert stopped or "is finished, and its shards are as they were written" in lines[0]
    prepare(corpus, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def fail_after(calls, function):
    left = iter(range(calls))

    def call(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


def test_an_input_that_changes_while_it_is_read_is_refused(corpus, tmp_path, monkeypatch):
    def append(*arguments):
        with corpus.open("a") as file:
            file.write(" ")
        return sha(*arguments)

    sha = file_sha256
    plan = sources.plan(str(corpus))
    patched = iter([sha])  # the input itself; then the first shard
    monkeypatch.setattr(shards, "file_sha256", lambda path: next(patched, append)(path))
    with pytest.raises(ValueError, match="corpus.jsonl has changed since .*out was begun"):
        shards.prepare(tmp_path / "out", plan, "byte", shard_tokens=500)
    assert not shards.read_manifest(tmp_path / "out")["complete"]


def test_a_text_without_files_that_has_changed_is_refused(tmp_path):
    def plan(text):
        readers, tally = splits.divide(lambda: iter([(text * 300, True)]), 0.1, "text")
        return sources.Plan("text", readers, 1, {"input": "text"}, (), {}, tally.sha256, tally.characters)

    shards.prepare(tmp_path / "out", plan("abc"), "byte")
    shards.prepare(tmp_path / "out", plan("abc"), "byte")
    with pytest.raises(ValueError, match="the text has changed since .*out was prepared; name"):
        shards.prepare(tmp_path / "out", plan("abd"), "byte")


# Two processes, full disks


def test_one_process_prepares_a_folder_at_a_time(corpus, tmp_path):
    folder, lines = tmp_path / "out", []
    with manifests.locked(folder):
        with pytest.raises(ValueError, match=f"is being prepared by process {os.getpid()} on .* since .*; wait"):
            prepare(corpus, folder)
        assert not (folder / "manifest.json").exists()
    (folder / ".lock").write_text("999999999\n")  # of a process that was killed
    (folder / ".part-999999999-train-00000.npy").write_bytes(b"half")
    prepare(corpus, folder)
    assert not list(folder.glob(".part-*"))
    # and one that waits finds the work done
    thread = threading.Thread(
        target=lambda: shards.prepare(
            tmp_path / "two", sources.plan(str(corpus)), "byte", shard_tokens=500, wait=lines.append
        )
    )
    with manifests.locked(tmp_path / "two"):
        thread.start()
        while not lines:
            time.sleep(0.01)
    thread.join()
    (line,) = lines
    assert re.fullmatch(f"Waiting for process {os.getpid()} on .* since .*, which tokenizes the same text", line)
    assert content(tmp_path / "two") == content(folder)


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_is_one_sentence(corpus, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        writes = iter(range(at))

        def full(descriptor):
            if next(writes, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="out/.* cannot be written .No space left on device.; what is done"):
            prepare(corpus, tmp_path / "out")
    assert not list(tmp_path.glob("out/.part-*"))
    prepare(corpus, tmp_path / "out")
    prepare(corpus, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# The program


def run_program(*arguments, wait=True):
    command = [sys.executable, "-m", "diffrwkv.prepare", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return process
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_program(corpus, tmp_path, capsys):
    code, out, err = run_program(f"--input={corpus}", f"--output={tmp_path / 'out'}", "--tokenizer=byte")
    assert code == 0, err
    counts = json.loads(out)
    assert counts["train"]["documents"] + counts["validation"]["documents"] == 40
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["command"].startswith("python -m diffrwkv.prepare --input=")
    program.main([f"--input={corpus}", f"--output={tmp_path / 'out'}", "--tokenizer=byte"])
    again = capsys.readouterr()
    assert json.loads(again.out) == counts and "out is finished, and its shards are as" in again.err


def test_program_errors_are_one_line(tmp_path):
    code, out, err = run_program("--input=missing.txt", "--output=o", "--tokenizer=byte")
    assert (code, out) == (2, "") and err.startswith("error: data set 'missing.txt' is neither")
    assert err.count("\n") == 1


def test_home_folder_in_every_path(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    program.main(["--input=~/corpus.jsonl", "--output=~/out", "--tokenizer=byte", "--validation=~/corpus.jsonl"])
    program.main(["--input=corpus.jsonl", "--output=~/two", "--tokenizer=byte", "--root=~"])
    assert shards.read_manifest(tmp_path / "out")["complete"] and (tmp_path / "two" / "train-00000.npy").is_file()


def test_flags_are_checked_before_any_work(corpus, tmp_path, monkeypatch):
    """Every flag with values of every kind: a sentence, and nothing written; or the work is begun."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("some text " * 100)
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(shards, "prepare", lambda *a, **k: begun.append(1))
    right = {"input": str(corpus), "output": "out", "tokenizer": "byte"}
    numbers = ["0", "-1", "nan", "inf", "-inf", "1e20", str(10**30), "", " ", "x", "1.5", "0x10", "9" * 5000, "True"]
    wrong = [
        *(("shard_tokens", value) for value in numbers),
        *(("max_documents", value) for value in numbers if value != str(10**30)),
        *(("max_document_bytes", value) for value in numbers if value != str(10**30)),
        *(("validation_fraction", value) for value in numbers + ["1", "-0.0"] if value != "1e-3"),
        *(("tokenizer", value) for value in [*numbers, "bpe:0", "bpe:-5", "bpe:259", "bpe:" + "9" * 30, "bpe:1e3"]),
        *(("tokenizer", value) for value in ("bpe:0300", "bpe:\uff13\uff10\uff10", "gpt3", "bpe:" + "9" * 5000)),
        *(("on_error", value) for value in numbers),
        *(("text_key", value) for value in ("", " ", "a\0b", "nothing")),
        *(("input", value) for value in ("", " ", "missing", "a\0b", "x" * 5000, "~nobody-at-all/x", "file", "*.none")),
        *(("validation", value) for value in ("", " ", "missing", "a\0b", "x" * 5000, "~nobody-at-all/x", "*.none")),
        *(("output", value) for value in ("", " ", "file", "file/in", "a\0b", "~nobody-at-all/x", "x" * 5000)),
        ("root", ""),
        ("wrong", "1"),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for flag, value in wrong:
        with pytest.raises(config.UserError) as caught:
            program.main([f"--{name}={v}" for name, v in (right | {flag: value}).items()])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 12_000, (flag, value[:50])
    for output in ("folder", "folder/out", str(tmp_path / "folder" / "a" / "b")):
        with pytest.raises(config.UserError, match="is inside of --input=folder, which is read"):
            program.main(["--input=folder", f"--output={output}", "--tokenizer=byte"])
    for name in right:
        with pytest.raises(config.UserError, match=f"required: --{name}"):
            program.main([f"--{n}={v}" for n, v in right.items() if n != name])
    assert not begun and sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_written(corpus, tmp_path, monkeypatch, capsys):
    """Refused before the text is read; but a finished one is only read."""
    arguments = [f"--input={corpus}", f"--output={tmp_path / 'out'}", "--tokenizer=byte"]
    program.main(arguments)
    monkeypatch.setattr(program.os, "access", lambda *a: False)  # root may write everywhere
    program.main(arguments)
    assert "is finished" in capsys.readouterr().err
    arguments[1] = f"--output={tmp_path / 'other'}"
    with pytest.raises(config.UserError, match="may not be written"):
        program.main(arguments)


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


@pytest.mark.slow
def test_ten_kills_and_six_signals_end_in_the_same_files(tmp_path, monkeypatch, capsys):
    """At random moments, from before the first shard to the last, some of them twice in one folder."""
    text = tmp_path / "a.txt"
    text.write_text("It goes on, and on, and on. " * 500_000)
    arguments = [f"--input={text}", "--tokenizer=byte", "--shard_tokens=1000000"]
    program.main([*arguments, f"--output={tmp_path / 'whole'}"])
    whole, draw = content(tmp_path / "whole"), np.random.default_rng(0)
    assert len(whole) > 12
    stopped = 0
    for number in [signal.SIGKILL] * 14 + [signal.SIGINT, signal.SIGTERM] * 4:
        out = tmp_path / f"out{draw.integers(6)}"
        if len(content(out) if out.exists() else ()) > 10:
            shutil.rmtree(out)
        have = len(content(out)) if out.exists() else 0
        process = run_program(*arguments, f"--output={out}", wait=False)
        shards_first, deadline = have + draw.integers(10), time.monotonic() + 60
        while process.poll() is None and (len(list(out.glob("*.npy"))) < shards_first or not out.exists()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        stopped += process.returncode in (-number, 128 + number)
        if process.returncode == 128 + number:
            assert err.endswith(f"Stopped by {number.name}.\n")
            assert "goes on where it was" in err or err.count("\n") == 1  # modules were being imported
    assert stopped >= 16
    for out in tmp_path.glob("out*"):
        program.main([*arguments, f"--output={out}"])
        assert content(out) == whole and not list(out.glob(".part-*"))
        one, other = (shards.read_manifest(folder) for folder in (out, tmp_path / "whole"))
        assert {**one, "command": ""} == {**other, "command": ""}


@pytest.mark.slow
def test_two_programs_on_one_folder(tmp_path):
    """One refuses, before it has read the text; the other's files are whole."""
    text = tmp_path / "a.txt"
    text.write_text("It goes on, and on, and on. " * 1_000_000)
    arguments = [f"--input={text}", "--tokenizer=byte", "--shard_tokens=1000000"]
    first = run_program(*arguments, f"--output={tmp_path / 'out'}", wait=False)
    while not (tmp_path / "out" / "manifest.json").exists():
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    code, _, err = run_program(*arguments, f"--output={tmp_path / 'out'}")
    told = f"error: {tmp_path / 'out'} is being prepared by process {first.pid} on .*; wait for it, or stop it\n"
    assert code == 2 and re.fullmatch(told, err)
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    code, _, err = run_program(*arguments, f"--output={tmp_path / 'out'}")
    assert code == 0 and "is finished, and its shards are as they were written" in err
