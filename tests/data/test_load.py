import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from diffrwkv import data, languages
from diffrwkv.data import datasets, shards, sources
from diffrwkv.data.batches import validation_batches
from diffrwkv.data.load import CACHE_ABOVE
from diffrwkv.data.tokenizers import Byte, Char


@pytest.fixture(autouse=True)
def no_network_and_own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setenv("DIFFRWKV_CACHE", str(tmp_path / "cache"))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def text_of(n):
    return "".join(chr(ord("a") + i % 23) for i in range(n))


def cache_everything(monkeypatch):
    for kind in CACHE_ABOVE:
        monkeypatch.setitem(CACHE_ABOVE, kind, 0)


def test_training_tells_the_system_not_to_read_ahead(tmp_path):
    """Linux marks such a map "rr": a cold chunk of 2 KiB fetches pages of it, not megabytes around it."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("no /proc/self/smaps")
    text = write(tmp_path / "a.txt", text_of(200_000))
    shards.prepare(tmp_path / "out", sources.plan(text), "byte")
    dataset = data.load(str(tmp_path / "out"), tokenizer="byte", length=10, packing="document")

    def flags(name):
        entries = re.findall(r"(\S*)\nSize:.*?VmFlags:([^\n]*)", Path("/proc/self/smaps").read_text(), re.DOTALL)
        return [flags.split() for path, flags in entries if path == str(tmp_path / "out" / name)]

    assert [dataset.train[i][0] for i in (0, 3)] == [ord("a"), ord(text_of(31)[-1])]
    assert len(dataset.validation[0]) == 10
    assert [("rr" in each) for each in flags("train-00000.npy")] == [True]
    assert [("rr" in each) for each in flags("validation-00000.npy")] == [False]


def test_shakespeare_without_wrapping_is_435_chunks():
    root = os.environ.get("DIFFRWKV_DATA")
    if not root or datasets.TINYSHAKESPEARE.find(Path(root)) is None:
        pytest.skip("no tiny Shakespeare: set DIFFRWKV_DATA to a folder that has it")
    dataset = data.load("tinyshakespeare", length=256)
    assert (dataset.tokenizer.vocab_size, len(dataset.train), len(dataset.validation)) == (
        66,
        3921,
        435,
    )
    assert dataset.characters_per_token == 1.0
    assert dataset.info["sha256"] == datasets.TINYSHAKESPEARE.sha256
    joined = "".join(dataset.tokenizer.decode(dataset.validation[i]) for i in range(435))
    assert joined == datasets.TINYSHAKESPEARE.find(Path(root)).read_text()[1003854:][: 435 * 256]


def test_load_counts_and_text(tmp_path):
    text = text_of(1003)
    dataset = data.load(write(tmp_path / "a.txt", text), length=10)
    assert (len(dataset.train), len(dataset.validation)) == (90, 10)
    joined = "".join(dataset.tokenizer.decode(dataset.train[i]) for i in range(90))
    assert joined == text[:900]
    info = json.loads(json.dumps(dataset.info))
    assert info["train"]["characters"] == 902 and info["validation"]["characters"] == 101
    assert info["validation"]["tokens"] == info["validation"]["chunk_characters"] == 100
    assert info["vocab_size"] == 24 and dataset.test is None and dataset.length == 10
    assert info["tokenizer_fingerprint"] == dataset.tokenizer.fingerprint


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
@pytest.mark.parametrize("packing", ["concat", "document"])
@pytest.mark.parametrize("wrap", [False, True])
def test_characters_per_token_counts_what_the_chunks_hold(tmp_path, tokenizer, packing, wrap):
    documents = [f"document {i}, it is so: é {text_of(3 * i)}" for i in range(30)]
    path = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(documents))
    dataset = data.load(path, tokenizer=tokenizer, packing=packing, wrap=wrap, length=16)
    tokens = characters = 0
    for batch in validation_batches(dataset, batch_size=4):
        tokens += int(batch["valid"].sum())
        rows = zip(batch["tokens"], batch["valid"], strict=True)
        characters += sum(len(dataset.tokenizer.decode(row[ok])) for row, ok in rows)
        assert (batch["tokens"][~batch["valid"]] == dataset.tokenizer.pad_id).all()
    # A byte-level chunk may end inside a character, which both of its halves then show.
    assert dataset.info["validation"]["tokens"] == tokens
    assert dataset.characters_per_token == pytest.approx(characters / tokens, rel=0.02)
    if tokenizer == "char":
        assert dataset.characters_per_token == characters / tokens


def test_documents_of_their_own(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t}) for t in ("ab", "cdefgh", "i")))
    other = write(tmp_path / "b.txt", "xyz")
    decode = Byte().decode

    def rows(wrap):
        load = dict(tokenizer="byte", length=5, wrap=wrap, packing="document", validation=other)
        train = data.load(path, **load).train
        return [decode(train[i][train.valid(i)], specials=True) for i in range(len(train))]

    assert rows(False) == ["ab<eos>", "cdefg", "h<eos>", "i<eos>"]
    assert rows(True) == [f"<bos>{t}<eos>" for t in ("ab", "cde", "fgh", "i")]


def test_validation_text_and_given_tokenizer(tmp_path):
    write(tmp_path / "a.txt", text_of(100))
    write(tmp_path / "b.txt", "zzz" * 20)
    dataset = data.load("a.txt", tmp_path, validation="b.txt", length=10)
    assert len(dataset.train) == 10 and len(dataset.validation) == 6
    assert dataset.tokenizer.decode(dataset.validation[0]) == "z" * 10  # in the alphabet
    alone = Char(text_of(23))
    with pytest.raises(ValueError, match=r"character 'z' \(U\+007A, position 0\) is not among"):
        data.load("a.txt", tmp_path, tokenizer=alone, validation="b.txt", length=10)
    again = data.load("b.txt", tmp_path, tokenizer=dataset.tokenizer, length=3)
    assert again.tokenizer is dataset.tokenizer


def test_default_is_embedded():
    dataset = data.load()
    assert len(dataset.train) > 500 and len(dataset.validation) > 80
    assert dataset.info["python"] and len(dataset.info["sha256"]) == 64
    assert "Python" in dataset.tokenizer.decode(np.concatenate([dataset.validation[i] for i in range(9)]))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(length=0), "length must be at least 1, not 0"),
        (dict(length=2, wrap=True), "length must be at least 3 with wrap, not 2"),
        (dict(length=60), "the validation text .* has 10 tokens: shorter than one chunk of 60"),
        (dict(length=5, packing="rows"), "packing must be 'concat' or 'document', not 'rows'"),
        (dict(length=5, train_offsets="any"), "train_offsets must be 'chunks' or 'random'"),
        (dict(length=5, packing="document", train_offsets="random"), "needs packing='concat'"),
        (dict(length=5, tokenizer="words"), "tokenizer 'words' is no tokenizer"),
        (dict(length=5, validation_fraction=1.0), "between 0 and 1"),
        (
            dict(length=5, tokenizer=Char(text_of(23)), wrap=True),
            "wrap=True needs a tokenizer with",
        ),
        (
            dict(length=5, tokenizer=Char(text_of(23)), packing="document"),
            "packing='document' needs",
        ),
        (dict(length=5, validation="nothing.txt"), "'nothing.txt' is neither a known name"),
    ],
)
def test_bad_arguments_are_one_clear_error(tmp_path, keywords, message):
    path = write(tmp_path / "a.txt", text_of(100))
    with pytest.raises(ValueError, match=message):
        data.load(path, tmp_path, **keywords)


def test_large_data_sets_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        data.load("openwebtext", tmp_path, tokenizer="gpt2")
    command = f"--input openwebtext --tokenizer gpt2 --output {tmp_path / 'openwebtext-gpt2'}"
    assert command in str(caught.value)


@pytest.mark.parametrize("tokenizer", ["char", "bpe:280"])
def test_cache_gives_the_same_tokens(tmp_path, monkeypatch, tokenizer):
    documents = "\n<|endoftext|>\n".join(text_of(n) for n in range(20, 60))
    path = write(tmp_path / "a.txt", documents)
    direct = data.load(path, tokenizer=tokenizer, length=8)
    cache_everything(monkeypatch)
    cached = data.load(path, tokenizer=tokenizer, length=8)
    assert cached.info == direct.info and cached.tokenizer == direct.tokenizer
    for split in ("train", "validation"):
        one, other = getattr(direct, split), getattr(cached, split)
        assert [one[i].tolist() for i in range(len(one))] == [other[i].tolist() for i in range(len(other))]
    folders = list((tmp_path / "cache" / "tokens").iterdir())
    assert len(folders) == 1
    monkeypatch.setattr(shards, "_shards", lambda *a: pytest.fail("tokenized again"))
    data.load(path, tokenizer=tokenizer, length=8)


def test_cache_sees_a_changed_file(tmp_path, monkeypatch):
    cache_everything(monkeypatch)
    path = write(tmp_path / "a.txt", "a" * 100)
    assert data.load(path, length=5).tokenizer.decode(data.load(path, length=5).train[0]) == "aaaaa"
    write(tmp_path / "a.txt", "b" * 100)
    os.utime(path, ns=(1, 1))
    assert data.load(path, length=5).tokenizer.decode(data.load(path, length=5).train[0]) == "bbbbb"


@pytest.mark.parametrize("damage", ["edited", "truncated", "deleted", "manifest", "unfinished"])
def test_a_damaged_cache_is_made_again_or_told(tmp_path, monkeypatch, damage):
    cache_everything(monkeypatch)
    path = write(tmp_path / "a.txt", text_of(3000))
    good = data.load(path, length=5)
    rows = [good.train[i].tolist() for i in range(len(good.train))]
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    shard, manifest = folder / "train-00000.npy", folder / "manifest.json"
    if damage == "edited":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    elif damage == "truncated":
        os.truncate(shard, 1000)
    elif damage == "deleted":
        shard.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"characters": 2700', '"characters": 2701'))
        with pytest.raises(ValueError, match="manifest.json is not as prepare wrote it .*; restore it, or delete"):
            data.load(path, length=5)
        return
    else:
        manifest.unlink()
    again = data.load(path, length=5)
    assert [again.train[i].tolist() for i in range(len(again.train))] == rows
    assert again.info == good.info


def test_words_of_a_language_are_rows():
    dataset = data.load("regular:dyck:8", length=8)
    lang = languages.language("dyck")
    assert dataset.tokenizer.to_json() == Char(lang.symbols).to_json()  # a symbol's number is its id
    rows = np.stack([dataset.train[i] for i in range(len(dataset.train))])
    assert (len(rows), len(dataset.validation)) == (
        datasets.REGULAR_WORDS["train"],
        datasets.REGULAR_WORDS["validation"],
    )
    assert lang.valid(rows).all() and len(np.unique(rows, axis=0)) == lang.count(8)
    again = data.load("regular:dyck:8", length=8)
    assert again.info["sha256"] == dataset.info["sha256"]
    assert (dataset.validation[0] != dataset.train[0]).any()
    for options in ({"length": 4}, {"length": 8, "wrap": True}, {"length": 8, "train_offsets": "random"}):
        with pytest.raises(ValueError, match=r"is one word: set config.data.length to (8|10)"):
            data.load("regular:dyck:8", **options)


@pytest.mark.parametrize(
    "name, message",
    [
        ("regular:dyck", "write regular:LANGUAGE:LENGTH"),
        ("regular:palindrome:8", "choose one of parity"),
        ("regular:dyck:7", "no word of length 7"),
        ("regular:dyck:5000", "take at most 4096"),
    ],
)
def test_no_language(name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, length=8)
