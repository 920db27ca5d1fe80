import collections
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from diffrwkv import data
from diffrwkv.data import datasets, pipeline, shards, sources
from diffrwkv.data.pipeline import Chunks, Dataset, TokenStore, train_iterator, validation_batches
from diffrwkv.data.tokenizers import Byte, Char


@pytest.fixture(autouse=True)
def no_network_and_own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setenv("DIFFRWKV_CACHE", str(tmp_path / "cache"))


def numbered(n, length=3, wrap=False, **keywords):
    """A data set whose chunk i is [i * length, ...]: every token names its place."""
    tokenizer = Char("".join(map(chr, range(0x4E00, 0x4E00 + n * length))), specials=True)
    store = TokenStore([np.arange(n * length, dtype=np.uint16)])
    chunks = Chunks(store, tokenizer, length, wrap)
    return Dataset(tokenizer, chunks, chunks, **keywords)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def text_of(n):
    return "".join(chr(ord("a") + i % 23) for i in range(n))


# Token rows and chunks


def test_store_reads_across_parts(tmp_path):
    parts = [np.arange(5), np.arange(5, 5), np.arange(5, 6), np.arange(6, 13)]
    files = []
    for i, part in enumerate(parts):
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], part.astype(np.uint16))
    store = TokenStore(files, [len(part) for part in parts])
    assert len(store) == 13
    for start in range(14):
        for stop in range(start, 14):
            out = store.read(start, stop)
            assert out.dtype == np.int32 and out.tolist() == list(range(start, stop))
    with pytest.raises(IndexError):
        store.read(3, 14)
    assert np.concatenate(list(store.blocks(4))).tolist() == list(range(13))


def test_pickle_leaves_the_maps_behind(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(100_000, np.uint16))
    store = TokenStore([tmp_path / "a.npy"], [100_000])
    store.read(0, 5)
    assert len(pickle.dumps(store)) < 2000
    assert pickle.loads(pickle.dumps(store)).read(0, 5).tolist() == [0] * 5


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


def test_wrapping_is_mdlms():
    """arXiv 2406.07524, ``_group_texts``: documents end in EOS, chunks of L - 2 get BOS and EOS."""
    byte = Byte()
    stream = [*b"abcd", byte.eos_id, *b"efg", byte.eos_id]
    chunks = Chunks(TokenStore([np.array(stream, np.uint16)]), byte, 5, wrap=True)
    rows = [chunks[i].tolist() for i in range(len(chunks))]
    assert rows == [[256, *stream[:3], 257], [256, *stream[3:6], 257], [256, *stream[6:], 257]]
    assert chunks[0].dtype == np.int32 and chunks.valid(0).all()
    with pytest.raises(IndexError):
        chunks[3]


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


# load


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
    path = write(
        tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t}) for t in ("ab", "cdefgh", "i"))
    )
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
    assert "Python" in dataset.tokenizer.decode(
        np.concatenate([dataset.validation[i] for i in range(9)])
    )


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
    monkeypatch.setattr(pipeline, "CACHE_ABOVE", dict.fromkeys(pipeline.CACHE_ABOVE, 0))
    cached = data.load(path, tokenizer=tokenizer, length=8)
    assert cached.info == direct.info and cached.tokenizer == direct.tokenizer
    for split in ("train", "validation"):
        one, other = getattr(direct, split), getattr(cached, split)
        assert [one[i].tolist() for i in range(len(one))] == [
            other[i].tolist() for i in range(len(other))
        ]
    folders = list((tmp_path / "cache" / "tokens").iterdir())
    assert len(folders) == 1
    monkeypatch.setattr(pipeline.shards, "_shards", lambda *a: pytest.fail("tokenized again"))
    data.load(path, tokenizer=tokenizer, length=8)


def test_cache_sees_a_changed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "CACHE_ABOVE", dict.fromkeys(pipeline.CACHE_ABOVE, 0))
    path = write(tmp_path / "a.txt", "a" * 100)
    assert data.load(path, length=5).tokenizer.decode(data.load(path, length=5).train[0]) == "aaaaa"
    write(tmp_path / "a.txt", "b" * 100)
    os.utime(path, ns=(1, 1))
    assert data.load(path, length=5).tokenizer.decode(data.load(path, length=5).train[0]) == "bbbbb"


@pytest.mark.parametrize("damage", ["edited", "truncated", "deleted", "manifest", "unfinished"])
def test_a_damaged_cache_is_made_again_or_told(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(pipeline, "CACHE_ABOVE", dict.fromkeys(pipeline.CACHE_ABOVE, 0))
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


# Batches


def firsts(iterator, n):
    return [next(iterator)["tokens"][:, 0].tolist() for _ in range(n)]


def test_batches_have_the_promised_shapes():
    batch = next(train_iterator(numbered(7, length=5, wrap=True), batch_size=4, seed=0))
    assert batch["tokens"].shape == batch["valid"].shape == (4, 5)
    assert batch["tokens"].dtype == np.int32 and batch["valid"].dtype == bool


def test_every_epoch_has_every_chunk_in_a_new_order():
    dataset = numbered(12)
    epochs = [
        sum(firsts(train_iterator(dataset, batch_size=4, seed=3), 9)[3 * e : 3 * e + 3], [])
        for e in range(3)
    ]
    everything = list(range(0, 36, 3))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert everything not in epochs and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = sum(firsts(train_iterator(dataset, batch_size=4, seed=4), 3), [])
    assert sorted(other) == everything and other != epochs[0]


@pytest.mark.parametrize("offsets", ["chunks", "random"])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 20])
def test_resumes_exactly_at_any_step(offsets, step):
    dataset = numbered(11, length=4, train_offsets=offsets)
    make = lambda: train_iterator(dataset, batch_size=3, seed=5)
    iterator = make()
    for _ in range(step):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator)["tokens"].tolist() for _ in range(9)]
    again = make()
    next(again)
    again.set_state(state)
    assert [next(again)["tokens"].tolist() for _ in range(9)] == rest


def test_prefetching_changes_nothing():
    dataset = numbered(11)
    one = firsts(train_iterator(dataset, batch_size=2, seed=1, num_threads=1, prefetch=1), 30)
    assert one == firsts(
        train_iterator(dataset, batch_size=2, seed=1, num_threads=8, prefetch=64), 30
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_what_one_process_sees(processes):
    dataset = numbered(10)
    together = firsts(train_iterator(dataset, batch_size=4, seed=2), 15)
    shares = [
        firsts(
            train_iterator(dataset, batch_size=4, seed=2, process_index=i, process_count=processes),
            15,
        )
        for i in range(processes)
    ]
    for step in range(15):
        rows = [row for share in shares for row in share[step]]
        assert all(len(share[step]) == 4 // processes for share in shares)
        assert sorted(rows) == sorted(together[step])


@pytest.mark.parametrize("offsets", ["chunks", "random"])
@pytest.mark.parametrize("n", [1, 11])
def test_batches_of_any_size_are_the_same_stream(n, offsets):
    """Batches of one too, whole or as the share of a process, and of more than there are chunks."""
    dataset = numbered(n, train_offsets=offsets)

    def stream(batch_size, processes):
        shares = [
            train_iterator(
                dataset, batch_size=batch_size, seed=5, process_index=i, process_count=processes
            )
            for i in range(processes)
        ]
        steps = 12 // batch_size
        shares = [[next(share)["tokens"].tolist() for _ in range(steps)] for share in shares]
        # row r of a global batch is row r // processes of process r % processes
        return [
            shares[r % processes][step][r // processes]
            for step in range(steps)
            for r in range(batch_size)
        ]

    one = stream(1, 1)
    for batch_size, processes in [(2, 2), (3, 1), (4, 2), (4, 4), (12, 1)]:
        assert stream(batch_size, processes) == one, (batch_size, processes)


def test_random_offsets_reach_every_place():
    dataset = numbered(4, length=5, train_offsets="random")
    iterator = train_iterator(dataset, batch_size=8, seed=0)
    rows = np.concatenate([next(iterator)["tokens"] for _ in range(40)])
    assert (np.diff(rows, axis=1) == 1).all()
    counts = collections.Counter(rows[:, 0].tolist())
    assert set(counts) == set(range(16)) and max(counts.values()) < 45


def test_worker_processes_give_the_same_batches():
    dataset = numbered(9)
    iterator = train_iterator(dataset, batch_size=2, seed=0, num_workers=1)
    try:
        got = firsts(iterator, 6)
        state = json.loads(json.dumps(iterator.get_state()))
        rest = firsts(iterator, 2)
        iterator.set_state(state)
        assert firsts(iterator, 2) == rest
    finally:
        iterator.close()
    assert got + rest == firsts(train_iterator(dataset, batch_size=2, seed=0), 8)


@pytest.mark.parametrize("limit", [None, 1, 4, 10, 99])
@pytest.mark.parametrize("processes", [1, 2])
def test_validation_covers_every_chunk_once(limit, processes):
    dataset = numbered(10)
    seen = []
    for index in range(processes):
        batches = validation_batches(
            dataset, batch_size=4, limit=limit, process_index=index, process_count=processes
        )
        listed = list(batches)
        assert len(listed) == len(batches) == len(list(batches)) == -(-min(limit or 10, 10) // 4)
        for batch in listed:
            assert batch["tokens"].shape == (4 // processes, 3)
            assert (batch["valid"].all(1) == batch["valid"].any(1)).all()
            seen += batch["tokens"][batch["valid"].all(1), 0].tolist()
    assert sorted(seen) == list(range(0, 3 * min(limit or 10, 10), 3))
    if processes == 1:
        assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: train_iterator(d, batch_size=0, seed=0), "batch_size 0 must be"),
        (
            lambda d: train_iterator(d, batch_size=3, seed=0, process_count=2),
            "multiple of the 2 proc",
        ),
        (
            lambda d: train_iterator(d, batch_size=2, seed=0, process_index=1),
            "process_index 1 of 1",
        ),
        (lambda d: train_iterator(d, batch_size=2, seed=-1), "seed must be an integer from 0"),
        (lambda d: validation_batches(d, batch_size=2, limit=0), "limit must be at least 1"),
        (lambda d: validation_batches(d, batch_size=2, split="test"), "has no 'test' split"),
        (lambda d: validation_batches(d, batch_size=2, split="info"), "has no 'info' split"),
    ],
)
def test_bad_batches_are_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbered(4))
