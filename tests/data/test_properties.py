"""What holds for any text: tokenizers, cuts, splits and readers, on texts that hypothesis makes up.

The examples are the same in every run (`derandomize`), and few: each property is to be quick, and to fail for all of us
or for none.
"""

import functools
import hashlib
import itertools
import json
import os
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrwkv.data import readers, splits
from diffrwkv.data.chunks import Chunks, Documents, TokenStore
from diffrwkv.data.tokenizers import TOKENIZERS, Byte, Tokenizer, encode_documents, make
from tests.data.test_tokenizers import build
from tests.documents import compress, read

few = settings(derandomize=True, max_examples=60, deadline=None, database=None)

# Whole characters, of all kinds; and what tokenizers and readers look at, close together.
CHARACTERS = st.characters(exclude_categories=["Cs"])
TRICKY = ["ab", "don't", " ", "  ", "\n", "\r\n", "\t", "\u3000", "12", "½", "-_", "é", "東京", "\U0001f600", "e\u0301",
          "<|endoftext|>", "<bos>", "_", "\ufeff", "\0"]  # fmt: skip
TEXTS = st.text(CHARACTERS, max_size=30) | st.lists(st.sampled_from(TRICKY), max_size=30).map("".join)
SOME = st.text("ab\né", min_size=1, max_size=12)


def cuts(data, n):
    """The edges of a division of n things into parts, empty ones among them."""
    return [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=6))), n]


def parts_of(data, whole):
    """A text or an array in parts, empty ones among them."""
    return [whole[start:stop] for start, stop in itertools.pairwise(cuts(data, len(whole)))]


def pieces_of(data, documents):
    """The documents as a reader's stream: each in pieces, the last of which may be empty."""
    pieces = []
    for document in documents:
        parts = parts_of(data, document)
        pieces += [(part, i == len(parts) - 1) for i, part in enumerate(parts)]
    return pieces


# Tokenizers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kind(request):
    """A type of tokenizer; GPT-2's is skipped where its vocabulary is not at hand."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or f"{os.environ.get('DIFFRWKV_DATA')}/gpt2_bpe/tiktoken_cache"
    if request.param == "gpt2" and not os.path.exists(f"{folder}/6d1cbeee0f20b3d9449abfede4726ed8212e3aee"):
        pytest.skip("no GPT-2 vocabulary: set DIFFRWKV_DATA or TIKTOKEN_CACHE_DIR to run this")
    return request.param


@functools.cache
def trained(kind):
    """A tokenizer that takes any text."""
    if kind in ("world", "json"):
        return build(kind)
    lines = ["It was the best of times, it was the worst of times.\n", "    don't\n\n\n  東京 café   12345\r\n"] * 3
    return make("bpe:320" if kind == "bpe" else kind, lines)


@pytest.mark.parametrize("kind", TOKENIZERS, indirect=True)
@few
@given(text=TEXTS, data=st.data())
def test_text_comes_back_from_its_ids(kind, text, data):
    tokenizer = make("char", [text or "a"], specials=True) if kind == "char" else trained(kind)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    parts = parts_of(data, ids)
    assert b"".join(map(tokenizer.decode_bytes, parts)) == text.encode()
    other = data.draw(TEXTS) if kind != "char" else text[::-1]
    assert [row.tolist() for row in tokenizer.encode_batch([text, other, ""])] == [
        tokenizer.encode(t).tolist() for t in (text, other, "")
    ]
    described = Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    for again in (described, pickle.loads(pickle.dumps(tokenizer))):
        assert again == tokenizer and type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
        for name in ("name", "vocab_size", "bos_id", "eos_id", "mask_id"):
            assert getattr(again, name) == getattr(tokenizer, name)
        assert again.encode(text).tolist() == ids.tolist()


@pytest.mark.parametrize("kind", ["bpe", "gpt2"], indirect=True)
@few
@given(text=TEXTS, limit=st.integers(1, 60))
def test_a_cut_at_a_space_leaves_the_tokens_as_they_are(kind, text, limit):
    """Byte-level BPE splits there anyway, so what it makes of a long text does not depend on its pieces."""
    tokenizer, limit = trained(kind), min(limit, len(text))
    at = readers.cut(text, limit)
    assert at <= limit
    if at < limit:
        joined = [*tokenizer.encode(text[:at]), *tokenizer.encode(text[at:])]
        assert joined == tokenizer.encode(text).tolist()


@few
@given(
    documents=st.lists(SOME | st.just(""), min_size=1, max_size=6),
    size=st.integers(1, 20),
    specials=st.booleans(),
    data=st.data(),
)
def test_documents_are_joined_however_they_are_batched(documents, size, specials, data):
    """By EOS after each, or by a blank line between two."""
    pieces = pieces_of(data, documents)
    tokenizer = make("char", ["".join(documents) + "\n"], specials=specials)
    rows = list(encode_documents(tokenizer, iter(pieces), batch_characters=size))
    assert [(text, ends) for text, _, ends in rows] == pieces
    ids = np.concatenate([ids for _, ids, _ in rows])
    if specials:
        assert tokenizer.decode(ids, specials=True) == "".join(f"{document}<eos>" for document in documents)
    else:
        assert tokenizer.decode(ids) == "\n\n".join(documents)


# Tokens in rows ----------------------------------------------------------------------------------


@few
@given(array=st.lists(st.integers(0, 65535), max_size=40).map(lambda x: np.array(x, np.uint16)), data=st.data())
def test_shards_read_at_any_offset_as_the_array(tmp_path_factory, array, data):
    """In files and in memory, however the array is divided among them."""
    folder = tmp_path_factory.mktemp("shards")
    parts = parts_of(data, array)
    files = [folder / f"train-{i:05d}.npy" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        np.save(file, part)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(array))] * 2)))
    for store in (TokenStore(files, [len(part) for part in parts], scattered=True), TokenStore(parts)):
        assert len(store) == len(array)
        out = store.read(start, stop)
        assert out.dtype == np.int32 and out.tolist() == array[start:stop].tolist()
        blocks = list(store.blocks(data.draw(st.integers(1, 50))))
        assert [i for block in blocks for i in block.tolist()] == array.tolist()
        for wrong in ((-1, stop), (start, len(array) + 1)):
            with pytest.raises(IndexError):
                store.read(*wrong)


@few
@given(stream=st.lists(st.integers(0, 257), max_size=40), body=st.integers(1, 9), wrap=st.booleans(), data=st.data())
def test_chunks_hold_each_token_once_in_order(stream, body, wrap, data):
    """With `wrap` as MDLM's (arXiv 2406.07524, `_group_texts`): chunks of L - 2, each between BOS and EOS."""
    byte, array = Byte(), np.array(stream, np.uint16)
    around = ([byte.bos_id], [byte.eos_id]) if wrap else ([], [])
    chunks = Chunks(TokenStore(parts_of(data, array)), byte, body + 2 * wrap, wrap)
    rows = [chunks[i] for i in range(len(chunks))]
    whole = len(stream) // body * body
    assert all(row.dtype == np.int32 for row in rows)
    assert [row.tolist() for row in rows] == [
        [*around[0], *stream[at : at + body], *around[1]] for at in range(0, whole, body)
    ]
    assert chunks.dropped().tolist() == stream[whole:]
    assert chunks.count_valid() == sum(int(chunks.valid(i).sum()) for i in range(len(chunks))) == sum(map(len, rows))
    if len(chunks):
        start = data.draw(st.integers(0, len(stream) - body))
        assert chunks.at(start).tolist() == [*around[0], *stream[start : start + body], *around[1]]
    for wrong in (-1, len(chunks)):
        with pytest.raises(IndexError):
            chunks[wrong]


@few
@given(texts=st.lists(st.binary(max_size=20), max_size=6), body=st.integers(1, 9), wrap=st.booleans(), data=st.data())
def test_packing_by_document_loses_nothing_and_mixes_nothing(texts, body, wrap, data):
    """A row holds tokens of one document; its rows joined are the document, with its EOS where nothing is wrapped."""
    byte = Byte()
    stream = np.array([i for text in texts for i in (*text, byte.eos_id)], np.uint16)
    documents = Documents(TokenStore(parts_of(data, stream)), byte, body + 2 * wrap, wrap)
    rows = [documents[i] for i in range(len(documents))]
    valid = [documents.valid(i) for i in range(len(documents))]
    assert all(
        row.dtype == np.int32 and row.shape == ok.shape == (documents.length,)
        for row, ok in zip(rows, valid, strict=True)
    )
    assert all(
        (row[~ok] == byte.pad_id).all() and (np.diff(ok.astype(int)) <= 0).all()
        for row, ok in zip(rows, valid, strict=True)
    )
    expected = []
    for text in texts:
        tokens = [*text] if wrap else [*text, byte.eos_id]
        for at in range(0, len(tokens), body):
            part = tokens[at : at + body]
            expected.append([byte.bos_id, *part, byte.eos_id] if wrap else part)
    assert [row[ok].tolist() for row, ok in zip(rows, valid, strict=True)] == expected
    assert documents.count_valid() == sum(map(len, expected)) and documents.dropped().size == 0


# Splits ------------------------------------------------------------------------------------------


@few
@given(documents=st.lists(SOME, min_size=1, max_size=6), data=st.data())
def test_ranges_of_a_stream_are_disjoint_and_cover_it(documents, data):
    """Of characters, where a document that is cut ends at the cut; and of documents."""
    pieces = pieces_of(data, documents)
    reader = lambda: iter(pieces)
    edges = cuts(data, sum(map(len, documents)))
    begins = [0, *itertools.accumulate(map(len, documents))]
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        found = read(splits.between(reader, start, None if i == len(edges) - 2 else stop))
        parts = [text[max(start - at, 0) : max(stop - at, 0)] for text, at in zip(documents, begins, strict=False)]
        assert found == [part for part in parts if part]
    for start, stop in itertools.pairwise(cuts(data, len(documents))):
        assert read(splits.documents(reader, start, stop)) == documents[start:stop]


@few
@given(
    documents=st.lists(st.integers(1, 400).map("x".__mul__), min_size=1, max_size=20),
    fraction=st.floats(0.01, 0.99),
    data=st.data(),
)
def test_training_and_validation_are_disjoint_and_cover_the_text(documents, fraction, data):
    """Cut at the end of a document if one lies near, the nearest, else at the character that the fraction asks for."""
    pieces, n = pieces_of(data, documents), sum(map(len, documents))
    asked = int(n * (1 - fraction))
    ends = list(itertools.accumulate(map(len, documents)))
    near = [abs(end - asked) for end in ends[:-1] if abs(end - asked) <= splits.NEAR * min(asked, n - asked)]
    if not 0 < asked < n:
        with pytest.raises(ValueError, match="too few to keep"):
            splits.divide(lambda: iter(pieces), fraction, "x")
        return
    parts, tally = splits.divide(lambda: iter(pieces), fraction, "x")
    train, validation = read(parts["train"]), read(parts["validation"])
    at = sum(map(len, train))
    assert abs(at - asked) == min(near, default=0) and 0 < at < n
    if at in ends:
        assert train + validation == documents
    else:
        assert [*train[:-1], train[-1] + validation[0], *validation[1:]] == documents
    assert (tally.documents, tally.characters, tally.pieces) == (len(documents), n, len(pieces))
    assert tally.sha256 == hashlib.sha256("\0".join(documents).encode()).hexdigest()


# Readers -----------------------------------------------------------------------------------------

OTHERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
OTHERS = st.recursive(OTHERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
WAYS = ["lines", "array", "objects"]


@few
@given(
    records=st.lists(st.tuples(TEXTS, OTHERS, st.booleans()), min_size=1, max_size=8),
    way=st.sampled_from(WAYS),
    layout=st.sampled_from([(None, "\n"), (0, ""), (1, " \t\r\n"), ("\t", "\r\n")]),
    ascii_only=st.booleans(),
    suffix=st.sampled_from(["", ".gz", ".zst", ".zip"]),
    block=st.sampled_from([1, 2, 7, 64, 1 << 16]),
)
def test_records_of_json_are_what_json_says(tmp_path_factory, records, way, layout, ascii_only, suffix, block):
    """Lines, an array, and objects one after the other, of any values, cut by the ends of blocks anywhere."""
    values = [
        {"text": text, "other": other} if first else {"other": other, "text": text} for text, other, first in records
    ]
    indent, between = (None, "\n") if way == "lines" else layout
    dump = functools.partial(json.dumps, ensure_ascii=ascii_only, indent=indent)
    written = between + dump(values) + between if way == "array" else between.join(map(dump, values))
    name = "a.jsonl" if way == "lines" else "a.json"
    path = compress(tmp_path_factory.mktemp("json") / (name + suffix), written.encode(), inside=name)
    decoded = readers.decoded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "decoded", lambda raw, path, _: decoded(raw, path, block))
        assert read(lambda: readers.file_pieces(path)) == [text for text, *_ in records]


BLANKS = [*("<|endoftext|>" + " " * n for n in (0, 1, 6, 32, 33)), "<|endoftext|>\t"]
LINES = [*BLANKS, " <|endoftext|>", "<|endo", "a b", "", " ", "x" * 30]


@few
@given(
    lines=st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(["\n", "\r\n", ""])), min_size=1, max_size=12),
    block=st.sampled_from([1, 2, 3, 7, 40]),
)
def test_a_file_of_text_is_cut_at_its_lines_of_end_of_text_alone(tmp_path_factory, lines, block):
    """Whatever the pieces in which it is read."""
    text = "".join(line + end for line, end in lines)
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(readers.text_pieces(path, block=block))
    assert all(len(piece) <= 2 * block + 64 for piece, _ in pieces)
    separator = re.compile(r"(?:(?:\A|\r?\n|(?<=\n))<\|endoftext\|>[ \t]{0,32}(?:\r?\n|\Z))")
    assert [d for d in read(lambda: iter(pieces)) if d] == [d for d in separator.split(text) if d]
