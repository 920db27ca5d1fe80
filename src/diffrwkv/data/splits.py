"""Which part of a text trains and which validates, and counts and hashes of what was read."""

from __future__ import annotations

import array
import bisect
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from diffrwkv.data.text import Pieces, Reader

NEAR = 0.5  # of the smaller side: how much larger or smaller it may get so that no document is cut


class Tally:
    """Counts and hashes the text that passes through `watch`.

    The hash is SHA-256 of the UTF-8 text with one zero byte between documents: for one document, of
    its file.
    """

    def __init__(self) -> None:
        self.pieces = self.documents = self.characters = 0
        self._digest = hashlib.sha256()
        self.between = False  # whether a document has just ended

    def watch(self, pieces: Pieces, *, digest: bool = True) -> Pieces:
        """The same pieces, counted (and hashed, if `digest`) as they are drawn."""
        for text, ends in pieces:
            self.add(text, ends, digest=digest)
            yield text, ends

    def add(self, text: str, ends: bool, *, digest: bool = True) -> None:
        """Counts one piece."""
        if digest:
            if self.between:
                self._digest.update(b"\0")
            self._digest.update(text.encode("utf-8", "surrogatepass"))
        self.between = ends
        self.pieces += 1
        self.documents += ends
        self.characters += len(text)

    @property
    def sha256(self) -> str:
        """Of what was hashed so far, in hex."""
        return self._digest.hexdigest()


def summary(info: Mapping[str, Any]) -> str:
    """What a data set is, for people: a line on its splits, and one each on what was not read.

    Args:
      info: as in `Dataset.info`.
    """
    parts = {split: info[split] for split in ("train", "validation", "test") if split in info}
    total = max(1, sum(part["characters"] for part in parts.values()))
    lines = [
        f"{info['name']}: "
        + "; ".join(
            f"{split} {part['documents']:,} documents, {part['characters']:,} characters "
            f"({part['characters'] / total:.1%})"
            for split, part in parts.items()
        )
    ]
    if info.get("counted") == "answers":
        tokens, out = (sum(part[key] for part in parts.values()) for key in ("tokens", "too_long"))
        lines.append(f"Answers alone are noised and counted: {tokens:,} tokens; pairs without room: {out:,}")
    if skipped := info.get("skipped"):
        lines.append(f"Bad records that were left out: {skipped['records']:,}; the first: {skipped['first']}")
    if ignored := info.get("ignored"):
        more = ignored["files"] - len(ignored["names"])
        names = ", ".join(ignored["names"]) + f" and {more:,} more" * (more > 0)
        lines.append(f"Files that are no data, or there twice, and were not read: {names}")
    return "\n".join(lines)


def sha256_of_splits(digests: Iterable[str]) -> str:
    """One hash for a text in splits: SHA-256 of their hashes (hex), joined by newlines."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def between(reader: Reader, start: int, stop: int | None) -> Reader:
    """The characters [start, stop) of a stream; a document that is cut ends at the cut."""

    def read() -> Pieces:
        at = 0
        for text, ends in reader():
            low, high = max(start - at, 0), len(text) if stop is None else min(stop - at, len(text))
            at += len(text)
            if low < high:
                yield text[low:high], ends or (stop is not None and at >= stop)
            elif ends and not text and start < at:  # a document may end with an empty piece
                yield "", True
            if stop is not None and at >= stop:
                return

    return read


def documents(reader: Reader, start: int, stop: int | None) -> Reader:
    """The documents [start, stop) of a stream."""

    def read() -> Pieces:
        number = 0
        for text, ends in reader():
            if stop is not None and number >= stop:
                return
            if number >= start:
                yield text, ends
            number += ends

    return read


def divide(reader: Reader, fraction: float, what: str, *, pairs: bool = False) -> tuple[dict[str, Reader], Tally]:
    """Training and validation readers, and a count of the whole: the last `fraction` of the characters validates.

    One document is cut at character `int(n * (1 - fraction))`, as the peers cut tiny Shakespeare.
    Several are divided at the end of a document nearest to that character, if it lies near: if that
    makes the smaller side larger or smaller by `NEAR` of it at most. Where none does, the document
    is cut at that character, and each side has a part of it. With `pairs` two documents, a prompt and its answer,
    stay together and whole, however far from that character their end lies.

    Raises:
      ValueError: `fraction` is not in (0, 1), or a side is empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {fraction}")
    tally, ends = Tally(), array.array("Q")
    for _, end in tally.watch(reader()):
        if end:
            ends.append(tally.characters)
    n = tally.characters
    at = int(n * (1 - fraction))
    ends = ends[1::2][:-1] if pairs else ends
    i = bisect.bisect_left(ends, at)
    near = [end for end in ends[max(i - 1, 0) : i + 1] if pairs or abs(end - at) <= NEAR * min(at, n - at)]
    at = min(near, key=lambda end: abs(end - at), default=n if pairs else at)
    if not 0 < at < n:
        raise ValueError(f"{what} has {n} characters: too few to keep {fraction:g} of them for validation")
    return {"train": between(reader, 0, at), "validation": between(reader, at, None)}, tally
