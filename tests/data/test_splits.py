import hashlib
import itertools
import string

import pytest

from diffrwkv.data import splits
from tests.documents import read


def pieces(*documents, size=3):
    """A reader that hands on ``size`` characters at a time."""

    def stream():
        for document in documents:
            for i in range(0, len(document), size):
                yield document[i : i + size], i + size >= len(document)

    return stream


def test_one_document_is_cut_at_the_character():
    parts, tally = splits.divide(pieces("abcdefghij"), 0.25, "x")
    assert read(parts["train"]) == ["abcdefg"] and read(parts["validation"]) == ["hij"]
    assert tally.sha256 == hashlib.sha256(b"abcdefghij").hexdigest()


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.95])
def test_several_documents_are_cut_between(fraction):
    documents = [c * (5 + 7 * i % 11) for i, c in enumerate(string.ascii_letters * 4)]
    parts, tally = splits.divide(pieces(*documents), fraction, "x")
    train, validation = read(parts["train"]), read(parts["validation"])
    assert train and validation and train + validation == documents
    ends = list(itertools.accumulate(map(len, documents)))
    at = int(ends[-1] * (1 - fraction))
    assert sum(map(len, train)) == min(ends, key=lambda e: abs(e - at))
    assert (tally.documents, tally.characters) == (208, ends[-1])


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [(1000, 9000), (9000, 1000), (10, 9980, 10), (1, 9999), (9999, 1)])
def test_a_document_is_cut_where_no_end_lies_near(sizes, fraction):
    """Neither side is ever far from what was asked for, and together they are the text."""
    documents = [c * size for c, size in zip("abc", sizes, strict=False)]
    parts, tally = splits.divide(pieces(*documents, size=100), fraction, "x")
    train, validation = ("".join(read(parts[split])) for split in ("train", "validation"))
    assert train + validation == "".join(documents)
    for have, want in ((train, 1 - fraction), (validation, fraction)):
        assert abs(len(have) - want * 10_000) <= splits.NEAR * 10_000 * min(fraction, 1 - fraction) + 1
    assert tally.sha256 == hashlib.sha256("\0".join(documents).encode()).hexdigest()


def test_an_end_that_lies_near_is_taken():
    parts, _ = splits.divide(pieces("a" * 85, "b" * 15), 0.1, "x")
    assert (read(parts["train"]), read(parts["validation"])) == (["a" * 85], ["b" * 15])
    parts, _ = splits.divide(pieces("a" * 84, "b" * 16), 0.1, "x")
    assert (read(parts["train"]), read(parts["validation"])) == (["a" * 84, "b" * 6], ["b" * 10])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        splits.divide(pieces("abc"), fraction, "x")


def test_too_short_to_divide():
    with pytest.raises(ValueError, match="1 characters: too few"):
        splits.divide(pieces("a"), 0.1, "x")


def test_ranges_of_a_stream():
    text = "abcdefghijklmnop"
    for size in (1, 3, 100):
        reader = pieces(text, size=size)
        parts = [(0, 4), (4, 11), (11, None)]
        joined = [read(splits.between(reader, *part)) for part in parts]
        assert joined == [["abcd"], ["efghijk"], ["lmnop"]]
    numbered = pieces("a", "bb", "ccccc", "d")
    assert read(splits.documents(numbered, 1, 3)) == ["bb", "ccccc"]
