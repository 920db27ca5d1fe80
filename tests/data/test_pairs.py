"""Prompts and answers: rows that hold one pair each, of which the answer alone counts."""

import json

import numpy as np
import pytest

from diffrwkv import data
from diffrwkv.data import splits
from diffrwkv.data.load import CACHE_ABOVE

RNG = np.random.default_rng(5)


def words(least, most):
    return "".join(RNG.choice(list("abcdé .\n"), size=RNG.integers(least, most + 1)))


PAIRS = [(words(1, 12), words(1, 9)) for _ in range(40)]
LENGTH = 64  # of bytes


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFRWKV_CACHE", str(tmp_path / "cache"))


def file_of(folder, pairs=PAIRS, name="pairs.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in pairs) + "\n")
    return path


def load(path, **options):
    keys = {"prompt_key": "prompt", "text_key": "answer", "packing": "document"}
    return data.load(str(path), **{"tokenizer": "byte", "length": LENGTH, **keys, **options})


def read_back(dataset, source):
    """(prompt, answer) of each row, by its masks; and that nothing else is in it."""
    tokenizer, pairs = dataset.tokenizer, []
    for i in range(len(source)):
        row, valid, scored = source[i], source.valid(i), source.scored(i)
        assert row.dtype == np.int32 and row.shape == valid.shape == scored.shape == (dataset.length,)
        assert (row[~valid] == tokenizer.pad_id).all() and not (scored & ~valid).any()
        assert row[scored][-1] == tokenizer.eos_id and valid.sum() == np.flatnonzero(scored)[-1] + 1
        assert (np.diff(np.flatnonzero(scored)) == 1).all()
        pairs.append((tokenizer.decode(row[valid & ~scored]), tokenizer.decode(row[scored])))
    return pairs


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("wrap", [False, True])
def test_rows_are_the_pairs(tmp_path, tokenizer, wrap):
    dataset = load(file_of(tmp_path), tokenizer=tokenizer, wrap=wrap)
    rows = [read_back(dataset, source) for source in (dataset.train, dataset.validation)]
    assert rows[0] + rows[1] == PAIRS and rows[1]
    if wrap:
        assert dataset.train[0][0] == dataset.tokenizer.bos_id and not dataset.train.scored(0)[0]
    for split, pairs in zip(("train", "validation"), rows, strict=True):
        info = dataset.info[split]
        assert info["documents"] == info["chunks"] == len(pairs)
        assert info["chunk_characters"] == sum(len(answer) for _, answer in pairs)
        ids = sum(len(dataset.tokenizer.encode(answer)) + 1 for _, answer in pairs)
        assert info["tokens"] == ids == sum(int(getattr(dataset, split).scored(i).sum()) for i in range(len(pairs)))
    assert dataset.prompted and "Answers alone" in splits.summary(dataset.info)


def test_batches_say_what_counts(tmp_path):
    dataset = load(file_of(tmp_path))
    batch = next(data.train_iterator(dataset, batch_size=4, seed=0))
    assert batch["scored"].shape == (4, LENGTH) and (batch["scored"] <= batch["valid"]).all()
    known = {tuple(row) for row in map(dataset.train.__getitem__, range(len(dataset.train)))}
    assert {tuple(row) for row in batch["tokens"]} <= known
    last = list(data.validation_batches(dataset, batch_size=3))[-1]
    empty = ~last["valid"].any(axis=1)
    assert not last["scored"][empty].any() and last["scored"][~empty].any(axis=1).all()
    plain = data.load(str(file_of(tmp_path)), tokenizer="byte", length=16, text_key="answer")
    assert not plain.prompted and set(next(data.train_iterator(plain, batch_size=2, seed=0))) == {"tokens", "valid"}


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9])
def test_no_pair_is_divided(tmp_path, fraction):
    """However long one of them is: the end of a document next to the place is no end of a pair."""
    pairs = [("p" * 40, "a"), ("q", "b" * 300), ("r" * 500, "c"), ("s", "d")]
    dataset = load(file_of(tmp_path, pairs), length=512, validation_fraction=fraction)
    found = [read_back(dataset, source) for source in (dataset.train, dataset.validation)]
    assert found[0] + found[1] == pairs and all(found)
    with pytest.raises(ValueError, match="too few"):
        load(file_of(tmp_path, pairs[:1], "one.jsonl"), length=512)


def test_the_cache_gives_the_same_rows(tmp_path, monkeypatch):
    path = file_of(tmp_path)
    plain = load(path)
    for kind in CACHE_ABOVE:
        monkeypatch.setitem(CACHE_ABOVE, kind, 0)
    for _ in range(2):  # made, then found
        cached = load(path)
        assert read_back(cached, cached.train) == read_back(plain, plain.train)
        assert cached.info["validation"] == plain.info["validation"]
    answers = data.load(str(path), tokenizer="byte", length=16, text_key="answer")  # of the same file, not the pairs
    assert answers.info["train"]["documents"] == plain.info["train"]["documents"]


def test_a_pair_without_room_stops_or_is_left_out(tmp_path):
    path = file_of(tmp_path, [*PAIRS[:5], ("x" * 70, "y"), *PAIRS[5:]])
    with pytest.raises(ValueError, match="1 pairs .* more than 64 tokens: raise config.data.length"):
        load(path)
    dataset = load(path, on_error="skip")
    assert dataset.info["train"]["too_long"] == 1
    assert read_back(dataset, dataset.train) + read_back(dataset, dataset.validation) == PAIRS
    exact = load(file_of(tmp_path, [("ab", "cd")] * 4, "exact.jsonl"), length=5)
    assert exact.train.valid(0).all()
    with pytest.raises(ValueError, match="have more than 4 tokens"):
        load(file_of(tmp_path, [("ab", "cd")] * 4, "exact.jsonl"), length=4)


@pytest.mark.parametrize(
    "record, message",
    [
        ('{"prompt": "", "answer": "a"}', "'prompt' is empty"),
        ('{"prompt": "p", "answer": ""}', "'answer' is empty"),
        ('{"answer": "a"}', "no text under 'prompt'.*prompt_key"),
        ('{"prompt": "p"}', "no text under 'answer'.*text_key"),
        ('{"prompt": 3, "answer": "a"}', "'prompt' is int, not text; name another with prompt_key"),
    ],
)
def test_bad_records(tmp_path, record, message):
    path = file_of(tmp_path)
    path.write_text(record + "\n" + path.read_text())
    with pytest.raises(ValueError, match=message):
        load(path)
    dataset = load(path, on_error="skip")
    assert dataset.info["skipped"]["records"] == 1
    assert read_back(dataset, dataset.train) + read_back(dataset, dataset.validation) == PAIRS


def test_what_has_no_prompts_is_refused(tmp_path):
    (tmp_path / "plain.txt").write_text("text " * 50)
    with pytest.raises(ValueError, match="is text: prompts and answers are read from JSON"):
        load(tmp_path / "plain.txt")
    with pytest.raises(ValueError, match="text without prompts"):
        load("python_reference")
    with pytest.raises(ValueError, match="text without prompts"):
        load("regular:parity:8")
    with pytest.raises(ValueError, match="needs packing='document'"):
        load(file_of(tmp_path), packing="concat")


def test_csv_has_prompts_too(tmp_path):
    (tmp_path / "pairs.csv").write_text('prompt,answer\n"a, b",c\nd,e\nf,g\n')
    dataset = load(tmp_path / "pairs.csv", validation_fraction=0.3)
    assert read_back(dataset, dataset.train) + read_back(dataset, dataset.validation) == [
        ("a, b", "c"),
        ("d", "e"),
        ("f", "g"),
    ]
