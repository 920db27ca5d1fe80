"""Texts to evaluate on: the named sets in their files, the rows of a text, and what is counted in them."""

import csv
import gzip
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from diffrwkv.data import data_root, datasets, evaluation, tokenizers
from diffrwkv.data.detokenizers import DETOKENIZERS
from diffrwkv.data.evaluation import Counted, Text, count, cut, read

PEERS = json.loads((Path(__file__).parent / "mdlm_documents.json").read_text())


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- The named sets ---------------------------------------------------------------------------------


def test_ptb_is_a_document_for_each_line(tmp_path):
    write(tmp_path / "ptb" / "ptb.test.txt", " a company 's <unk> \n\n $ N million \n")
    text = read("ptb", tmp_path, split="test")
    assert text.documents == ("a company's ?", "$1 million")
    assert (text.name, text.split, text.detokenizer) == ("ptb", "test", "ptb")
    assert read("ptb", tmp_path, split="test", detokenizer="none").documents == ("a company 's <unk>", "$ N million")
    write(tmp_path / "ptb" / "ptb.valid.txt", "another text")
    with pytest.raises(ValueError, match="not the text of data set 'ptb'"):  # whose hash is known
        read("ptb", tmp_path)


@pytest.mark.parametrize("form", ["raw", "parquet"])
@pytest.mark.parametrize(("name", "size"), [("wikitext103", 103), ("wikitext2_raw", 2)])
def test_wikitext_is_a_document_for_each_row_and_the_empty_ones_count(tmp_path, name, size, form):
    rows = [" \n", " = Title = \n", " \n", " One @-@ two , three . \n", ""]
    if form == "raw":
        write(tmp_path / f"wikitext-{size}-raw" / "wiki.valid.raw", "".join(rows))
        rows = rows[:-1]
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / f"wikitext-{size}-raw-v1" / "validation-00000-of-00001.parquet"
        path.parent.mkdir()
        parquet.write_table(pyarrow.table({"text": ["" if not row.strip() else row for row in rows]}), path)
    text = read(name, tmp_path)
    assert text.documents == ("", " = Title =\n", "", " One-two, three.\n", "")[: len(rows)]
    assert (text.split, text.detokenizer) == ("validation", "wikitext")


def test_lambada_is_records(tmp_path, monkeypatch):
    path = write(tmp_path / "lambada_test.jsonl", json.dumps({"text": " “A,” b "}) + "\n")
    assert list(evaluation.EVALUATION_SETS["lambada"].files) == ["test"]
    with pytest.raises(ValueError, match="not the text of data set 'lambada'"):
        read("lambada", tmp_path)
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    remote = evaluation.Remote("lambada_test.jsonl", None, known)
    known = evaluation.NamedText({"test": remote}, evaluation.EVALUATION_SETS["lambada"].documents, "lambada")
    monkeypatch.setitem(evaluation.EVALUATION_SETS, "lambada", known)
    assert read("lambada", tmp_path).documents == ('\n"A," b',)


def test_ag_news_joins_title_and_description(tmp_path):
    rows = [("3", 'Title, "one"', "Its text\\, with\nan end"), ("1", "B", "C")]
    path = tmp_path / "ag_news" / "test.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    text = read("ag_news", tmp_path)
    assert text.documents == ('Title, "one" Its text\\, with\nan end', "B C")
    assert (text.split, text.detokenizer) == ("test", "none")
    path.write_text('"1","two"\n')
    with pytest.raises(ValueError, match="row 1 of .* has 2 fields: AG News has label, title, description"):
        read("ag_news", tmp_path)


@pytest.mark.parametrize("name", ["arxiv", "pubmed"])
def test_papers_are_their_paragraphs(tmp_path, name):
    records = [{"article_text": ["one , two", "then three ."], "abstract_text": ["no"]}, {"article_text": ["four"]}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path = tmp_path / f"{name}-dataset" / "val.txt.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(lines.encode()))
    text = read(name, tmp_path)
    assert text.documents == ("one, two\nthen three.", "four") and text.detokenizer == "scientific"
    path.write_bytes(gzip.compress(lines.encode() + b'{"article": "x"}\n'))
    with pytest.raises(ValueError, match="line 3 of .* is no record with article_text"):
        read(name, tmp_path)
    path.write_bytes(gzip.compress(b'{"article_text": "a string"}\n'))  # joined, a line for each of its letters
    with pytest.raises(ValueError, match="line 1 of .* is no record with article_text .*not a list of paragraphs"):
        read(name, tmp_path)


def test_lm1b_is_the_held_out_part(tmp_path):
    for part in datasets.LM1B_FOLDERS.values():
        write(tmp_path / datasets.LM1B / part / "news", f"It 's {part[:5]} , yes .\n\n Two .\n")
    assert read("lm1b", tmp_path).documents == ("It's heldo, yes.", "Two .")
    with pytest.raises(ValueError, match="'lm1b' has no 'train' split to evaluate on; it has: test"):
        read("lm1b", tmp_path, split="train")


@pytest.mark.parametrize("name", [name for name in evaluation.SETS if name not in ("lambada", "wikitext2")])
def test_a_named_set_that_is_not_there_says_which_file_goes_where(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"data set '{name}' is not in {tmp_path}") as told:
        read(name, tmp_path)
    assert "put " in str(told.value)
    if name != "lm1b":
        for remote in evaluation.EVALUATION_SETS[name].files.values():
            assert remote.origin and remote.saved_as


def test_every_detokenizer_of_a_set_is_there():
    assert {known.detokenizer for known in evaluation.EVALUATION_SETS.values()} <= set(DETOKENIZERS)


# --- Other texts ------------------------------------------------------------------------------------


def test_any_file(tmp_path):
    path = write(tmp_path / "a.txt", "One , two\n\n  three\n<|endoftext|>\nfour")
    assert read(str(path)).documents == ("One , two\n\n  three", "four")
    assert read("a.txt", tmp_path, each_line=True, detokenizer="lm1b").documents == ("One, two", "three", "four")
    found = read(str(path))
    assert (found.split, found.detokenizer) == (None, "none")
    splits = tmp_path / "splits"
    for split in ("train", "validation", "test"):
        write(splits / f"{split}.txt", split)
    assert read(str(splits)).documents == ("validation",) and read(str(splits)).split == "validation"
    assert read(str(splits), split="test").documents == ("test",)


def test_bad_input(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    for name, options, told in [
        ("nothing", {}, "neither a known name .* texts to evaluate on have names besides: ag_news"),
        (str(path), {"split": "test"}, "a.txt has no 'test' split; it has: none"),
        (str(path), {"detokenizer": "ptb2"}, "no detokenizer 'ptb2'; there are: lambada"),
        (str(write(tmp_path / "b.txt", "")), {}, "has no text in it"),
        (str(write(tmp_path / "c.txt", " \n \n")), {"each_line": True}, "has no text in it"),
        ("ptb", {"each_line": True}, "'ptb' has the peers' documents"),
        ("ptb", {"split": "train"}, "'ptb' has no 'train' split to evaluate on; it has: validation, test"),
        ("python_reference", {}, "is in no splits, and what of it validates a run is decided when it is trained"),
    ]:
        with pytest.raises(ValueError, match=told):
            read(name, tmp_path, **options)


# --- Rows and counts --------------------------------------------------------------------------------


def text_of(documents):
    return Text("some", tuple(documents), "none", None, "")


def scored_slowly(rows, number, wrap, skip_first):
    """Characters and words, by a look at each byte of the rows that begins one."""
    characters, words, before = 0, 0, " "
    for i in range(number):
        row = rows[i][rows.valid(i)].tolist()
        for at, token in enumerate(row[1:-1] if wrap else row):
            if token >= 256:
                before = " "
                continue
            if token & 0xC0 == 0x80:
                continue
            space = token < 128 and chr(token).isspace()
            scored = not (skip_first and at == 0)
            characters += scored
            words += scored and not space and (before == " ")
            before = " " if space else "x"
    return Counted(characters, words)


DOCUMENTS = [
    "One two, three.",
    "",
    "vier fünf  sechs\nsieben",
    "é",
    "a b c d e f g h i j k l m",
    " leading",
    "trailing ",
]


@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("packing", ["concat", "document"])
@pytest.mark.parametrize("length", [3, 7, 100])
def test_counts_are_those_of_the_rows(packing, wrap, keep_first, length):
    tokenizer, documents = tokenizers.Byte(), DOCUMENTS * 3
    total = sum(len(document.encode()) + 1 for document in documents)
    for limit in (None, 1, 4):
        found = cut(
            text_of(documents),
            tokenizer,
            length=length,
            wrap=wrap,
            packing=packing,
            limit=limit,
            keep_first=keep_first,
        )
        rows = found.dataset.validation
        number = len(rows) if limit is None else min(limit, len(rows))
        counted = scored_slowly(rows, number, wrap, keep_first and not wrap)
        if packing == "document" and wrap:  # rows do not show where documents end
            counted = Counted(counted.characters, found.counted.words)
            assert limit is not None or counted.words == sum(len(document.split()) for document in documents)
        assert found.counted == counted and found.documents == len(documents)
        in_rows = sum(int(rows.valid(i).sum()) - 2 * wrap for i in range(number))
        if packing == "concat":
            assert found.dropped == total - in_rows
        elif limit is None:
            assert found.dropped == 0


def test_each_group_drops_its_own_remainder():
    """Against joining and cutting each group by itself."""
    tokenizer, documents = tokenizers.Byte(), [d for d in DOCUMENTS if d] * 4
    for group, length, wrap in itertools.product([1, 2, 5, 100], [4, 9, 20], [False, True]):
        body, expected, total = length - 2 * wrap, [], 0
        for first in range(0, len(documents), group):
            joined = [t for d in documents[first : first + group] for t in [*d.encode(), 257]]
            total += len(joined)
            for at in range(0, len(joined) - body + 1, body):
                row = joined[at : at + body]
                expected.append([256, *row, 257] if wrap else row)
        found = cut(text_of(documents), tokenizer, length=length, wrap=wrap, group=group)
        rows = found.dataset.validation
        np.testing.assert_array_equal(np.stack([rows[i] for i in range(len(rows))]), expected)
        assert found.dropped == total - len(expected) * body


def test_without_an_eos_blank_lines_stand_between_documents():
    tokenizer = tokenizers.Char("abc \n")
    found = cut(text_of(["ab c", "", "bca"]), tokenizer, length=3)
    rows = found.dataset.validation
    assert "".join(tokenizer.decode(rows[i]) for i in range(len(rows))) == "ab c\n\n\n\nbca"[:9]
    assert found.counted == Counted(9, 3) and found.dropped == 2


@pytest.mark.parametrize("tokenizer", [tokenizers.Byte(), tokenizers.Char("abc \n")], ids=["byte", "char"])
def test_documents_may_be_joined_by_nothing(tokenizer):
    found = cut(text_of(["ab c", "", "bca b"]), tokenizer, length=3, eos=False)
    rows = found.dataset.validation
    assert "".join(tokenizer.decode(rows[i]) for i in range(len(rows))) == "ab cbca b"
    assert found.counted == Counted(9, 4) and found.dropped == 0


def test_a_count_of_part_of_a_text():
    tokenizer = tokenizers.Byte()
    text = "né d'où  ça\n"
    ids = tokenizer.encode(text)
    for n in range(len(ids) + 1):
        part = text.encode()[:n].decode(errors="ignore")
        cut_off = text.encode()[:n] != part.encode()  # a character counts where it begins
        assert count(text, ids, np.arange(len(ids)) < n, tokenizer).characters == len(part) + cut_off
    assert count(text, ids, np.zeros(len(ids), bool), tokenizer) == Counted()
    assert count(text, ids, np.arange(len(ids)) > 0, tokenizer) == Counted(len(text) - 1, 2)


def test_what_cannot_be_cut():
    tokenizer, text = tokenizers.Byte(), text_of(["abc", "de"])
    for options, told in [
        ({"length": 0}, "length must be at least 1"),
        ({"length": 2, "wrap": True}, "length must be at least 3 with wrap"),
        ({"length": 4, "packing": "rows"}, "packing must be"),
        ({"length": 4, "packing": "document", "group": 2}, "group is of .* joins none"),
        ({"length": 4, "packing": "document", "eos": False}, "eos = False is of .* joins none"),
        ({"length": 4, "group": -1}, "group must be at least 1, not -1"),
        ({"length": 4, "limit": 0}, "limit must be at least 1, not 0"),
        ({"length": 50}, "some has 7 tokens, in groups of 2 documents: none fills a row of 50"),
        ({"length": 5, "group": 1}, "in groups of 1 documents: none fills a row of 5"),
        ({"length": 1, "keep_first": True}, "hold no character"),
    ]:
        with pytest.raises(ValueError, match=told):
            cut(text, tokenizer, **options)
    with pytest.raises(ValueError, match="wrap needs a tokenizer with BOS and EOS"):
        cut(text, tokenizers.Char("abcde"), length=4, wrap=True)
    with pytest.raises(ValueError, match="document 2: character 'd'"):
        cut(text, tokenizers.Char("abc\n"), length=4)


@pytest.mark.parametrize("name", PEERS["sets"])
def test_rows_are_those_of_the_peers(name):
    """The first 200 documents of each set as GPT-2's tokens, in rows of 128 by batches of 50 documents.

    mdlm_documents.json was written by the functions of kuleshov-group/mdlm at commit c112c52, dataloader.py: the
    detokenisers and `_group_texts`.
    """
    theirs, root = PEERS["sets"][name], data_root()
    try:
        tokenizer = tokenizers.GPT2(root)
        if name == "lambada" and evaluation.EVALUATION_SETS[name].files["test"].find(root) is None:
            pytest.skip(f"LAMBADA is not in {root}")
        if os.sep in name and not (root / name).is_file():
            pytest.skip(f"{name} is not in {root}")
        text = read(name, root, detokenizer=None if name in evaluation.SETS else theirs["detokenizer"])
    except (FileNotFoundError, RuntimeError) as missing:
        pytest.skip(str(missing))
    assert len(text.documents) == theirs["documents"]
    assert theirs["detokenizer"] == text.detokenizer
    first = Text(name, text.documents[:200], text.detokenizer, text.split, text.sha256)
    whole = cut(first, tokenizer, length=1).dataset.validation.store
    ids = whole.read(0, len(whole))
    assert len(ids) == theirs["tokens"] and sha256(ids) == theirs["tokens_sha256"]
    rows = cut(first, tokenizer, length=128, wrap=True, group=50).dataset.validation
    assert len(rows) == theirs["rows"]
    assert sha256(np.concatenate([rows[i] for i in range(len(rows))])) == theirs["rows_sha256"]


def sha256(ids):
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
