import hashlib

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
