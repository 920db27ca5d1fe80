"""The documents of a file: text, JSON, delimited text and parquet.

A record of a file (a line of JSON, a row) is held whole while it is read, never more than
`Reading.max_document_bytes` of it. A text is handed on in pieces, however long it is.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffrwkv.data.formats import (
    BOM,
    CSV,
    JSON,
    JSON_LINES,
    PARQUET,
    PARQUET_MAGIC,
    READS,
    TEXT,
    TSV,
    Stream,
    format_of,
    open_binary,
    refused,
    undamaged,
)
from diffrwkv.data.text import BLOCK, END_OF_TEXT, Pieces, Reader


class BadRecord(ValueError):
    """A record that is not one, or has no text; the message names file and line."""


Record = str | tuple[str, str] | BadRecord  # its text, or prompt and answer, or what is wrong


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
      text_key: the field, or the column, that holds the text of a record.
      prompt_key: that of a prompt, whose answer the text is: a record is two documents then, prompt and answer, neither
        of them empty. None: a record has no prompt.
      on_error: what a bad record does: `"stop"` raises, `"skip"` leaves the record out.
      max_document_bytes: the longest record that is read, in bytes.
      skipped: `{"records": how many were left out, "first": why the first was}`, by file, once a
        reader has passed them.
    """

    text_key: str = "text"
    on_error: str = "stop"
    max_document_bytes: int = 1 << 26
    prompt_key: str | None = None
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"config.data.on_error must be 'stop' or 'skip', not {self.on_error!r}")
        if not 1 <= self.max_document_bytes <= 1 << 40:
            raise ValueError(f"config.data.max_document_bytes must be from 1 to 2^40, not {self.max_document_bytes}")

    def pieces(self, records: Iterator[Record], name: str) -> Pieces:
        """Records as documents; bad ones raise, or are left out and counted under `name`."""
        bad = 0
        for record in records:
            if not isinstance(record, BadRecord):
                for text in (record,) if isinstance(record, str) else record:
                    yield text, True
                continue
            if self.on_error == "stop":
                raise BadRecord(f"{record} (on_error='skip' leaves such records out)") from record
            bad += 1
            entry = self.skipped.setdefault(name, {"records": 0, "first": str(record)})
            entry["records"] = max(bad, entry["records"])  # a file is read several times

    def text_of(self, record: Any, where: str) -> Record:
        """The text of a record, or what is wrong with it."""
        if self.prompt_key is None:
            return self.text_under(record, self.text_key, where)
        pair = []
        for key in (self.prompt_key, self.text_key):
            if isinstance(text := self.text_under(record, key, where), BadRecord):
                return text
            if not text:
                return BadRecord(f"{where}: {key!r} is empty: a prompt and an answer have a character at least")
            pair.append(text)
        return pair[0], pair[1]

    def text_under(self, record: Any, key: str, where: str) -> str | BadRecord:
        """The text that a record has under a key, or what is wrong with it."""
        option = "prompt_key" if key == self.prompt_key else "text_key"
        if not isinstance(record, Mapping) or key not in record:
            have = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
            return BadRecord(f"{where} has no text under {key!r}; it has: {have}. Name the right one with {option}")
        text = record[key]
        if not isinstance(text, str):
            what = "null" if text is None else type(text).__name__
            return BadRecord(f"{where}: {key!r} is {what}, not text; name another with {option}")
        try:
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            return BadRecord(
                f"{where} has half a surrogate pair (U+{ord(text[error.start]):04X}), which is no "
                f"character, at character {error.start} of its text"
            )
        if size > self.max_document_bytes:
            return self.too_long(where, size)
        return text

    def too_long(self, where: str, size: int) -> BadRecord:
        """What is said of a record of so many bytes, or at least so many."""
        return BadRecord(
            f"{where} is too long: {size:,} bytes, more than the {self.max_document_bytes:,} of "
            "max_document_bytes; cut it, or raise that"
        )


def total_skipped(skipped: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """`{"records", "first"}` of all files together, None if no record was left out."""
    if not skipped:
        return None
    records = sum(entry["records"] for entry in skipped.values())
    return {"records": records, "first": next(iter(skipped.values()))["first"]}


# Text --------------------------------------------------------------------------------------------


def not_utf8(path: Any, byte: int, offset: int, line: int) -> str:
    """What is said of a byte that is not UTF-8."""
    return (
        f"{path} is not UTF-8 text (byte 0x{byte:02x} at offset {offset:,}, line {line:,}); convert "
        "it, for example with iconv -t utf-8"
    )


def decoded(raw: Stream, path: Path, block: int = BLOCK) -> Iterator[str]:
    """The text of UTF-8 bytes, about `block` of them at a time, without a byte order mark.

    Raises:
      ValueError: a byte that is zero or not UTF-8, with its offset (decompressed) and line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, begun = 0, 1, False
    while True:
        new = raw.read(block)
        data = decoder.getstate()[0] + new
        decoder.reset()
        if (zero := new.find(b"\0")) >= 0:
            raise ValueError(
                f"{path} is not text: the byte at offset {offset + len(data) - len(new) + zero:,} "
                f"is zero. What is read: {READS}"
            )
        try:
            text = decoder.decode(data, final=not new)
        except UnicodeDecodeError as error:
            at = error.start
            line += data.count(b"\n", 0, at)
            raise ValueError(not_utf8(path, data[at], offset + at, line)) from None
        used = len(data) - len(decoder.getstate()[0])
        offset, line = offset + used, line + data.count(b"\n", 0, used)
        if text and not begun:
            text, begun = text.removeprefix("\ufeff"), True
        if text:
            yield text
        if not new:
            return


def cut(text: str, limit: int) -> int:
    """A place to cut text at, at or below `limit`, that no tokenizer notices where there is one.

    Byte-level BPE splits before a space between two visible characters, whatever surrounds them, so
    cutting there leaves the tokens as they are.
    """
    at = limit
    while (at := text.rfind(" ", 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1 : at + 2].isspace():
            return at
    return limit


_BLANKS = 32  # at most so many may stand behind a separator: more would have to be held to know whether it is one
_REST_OF_LINE = re.compile(rf"[ \t]{{0,{_BLANKS}}}\r?\n")
_REST_AT_END = re.compile(rf"[ \t]{{0,{_BLANKS}}}(?:\r?\n|\Z)")


def _separator(buffer: str, at: int, last: bool) -> tuple[int, int] | None:
    """Where the next line `<|endoftext|>` begins, with the end of the line before it, and where it ends.

    None if there is none that is whole. `buffer[at - 1]` is looked at, too.
    """
    where = at
    while (where := buffer.find(END_OF_TEXT, where)) >= 0:
        after = where + len(END_OF_TEXT)
        rest = (_REST_AT_END if last else _REST_OF_LINE).match(buffer, after)
        if rest and buffer[where - 1] == "\n":
            start = max(at, where - 1)
            start -= start > at and buffer[start - 1] == "\r"
            return start, rest.end()
        where = after
    return None


def text_pieces(path: Path, *, block: int = BLOCK) -> Pieces:
    """One document, or several between lines that read `<|endoftext|>`, up to 32 blanks behind it."""
    with open_binary(path) as raw:
        blocks = decoded(raw, path, block)
        buffer, started, last = "\n", False, False  # its first character went before, and is not handed on
        while not last:
            new = next(blocks, "")
            last = not new
            buffer += new
            at = 1
            while found := _separator(buffer, at, last):
                if found[0] > at or started:
                    yield buffer[at : found[0]], True
                at, started = found[1], False
            buffer = buffer[at - 1 :]
            keep = len(f"\r\n{END_OF_TEXT}\r") + _BLANKS  # a separator may be half read
            if not last and len(buffer) > block + keep:
                at = 1 + cut(buffer[1:], len(buffer) - 1 - keep)
                yield buffer[1:at], False
                buffer, started = buffer[at - 1 :], True
        if len(buffer) > 1 or started:
            yield buffer[1:], True


# Records -----------------------------------------------------------------------------------------

Line = tuple[int, str | BadRecord]  # its number, and its text or what is wrong with it


def lines(raw: Stream, path: Any, reading: Reading) -> Iterator[Line]:
    """The lines of UTF-8 bytes with their ends, without a byte order mark, none held that is above the limit."""
    number = offset = 0
    limit = reading.max_document_bytes
    while line := raw.readline(limit + 1):
        number += 1
        size = len(line)
        if size > limit:
            while not line.endswith(b"\n") and (line := raw.readline(BLOCK)):
                size += len(line)
            yield number, reading.too_long(f"line {number:,} of {path}", size)
        elif (zero := line.find(b"\0")) >= 0:
            yield (
                number,
                BadRecord(f"line {number:,} of {path} is not text: the byte at offset {offset + zero:,} is zero"),
            )
        else:
            text = line.removeprefix(BOM) if number == 1 else line
            try:
                yield number, text.decode("utf-8")
            except UnicodeDecodeError as error:
                at = offset + size - len(text) + error.start
                yield number, BadRecord(not_utf8(path, text[error.start], at, number))
        offset += size


def json_lines(raw: Stream, path: Path, reading: Reading) -> Iterator[Record]:
    """One document per line; empty lines are passed over."""
    for where, record in _json_lines(raw, path, reading):
        yield record if isinstance(record, BadRecord) else reading.text_of(record, where)


def _json_lines(raw: Stream, path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    """Where each line is that is not empty, and its value or what is wrong with it."""
    for number, line in lines(raw, path, reading):
        where = f"line {number:,} of {path}"
        if isinstance(line, BadRecord):
            yield where, line
        elif line and not line.isspace():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, BadRecord(f"{where} is not JSON ({error})")


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a file of JSON lines is, compressed or not, and the object in it; empty lines are passed over.

    Raises:
      ValueError: the file is damaged, or no JSON lines; or a line is no object. The message names file and line.
    """
    with undamaged(path):
        if (kind := format_of(path)) != JSON_LINES:
            raise ValueError(f"{path} is {kind}: JSON lines are wanted, an object in each (.jsonl, also compressed)")
        with open_binary(path) as raw:
            for where, record in _json_lines(raw, path, Reading()):
                if isinstance(record, BadRecord):
                    raise record
                if not isinstance(record, dict):
                    raise BadRecord(f"{where} is no JSON object but {type(record).__name__}")
                yield where, record


_NO_SPACE = re.compile(r"[^ \t\r\n]")


def json_values(raw: Stream, path: Path, reading: Reading) -> Iterator[Record]:
    """One document per element of the array that the file is, or per object of several one after the other.

    No more is held than the longest of them.

    Raises:
      ValueError: it is not JSON. What follows cannot be told apart, so `on_error` does not help.
    """
    blocks = decoded(raw, path, 1 << 16)
    decoder = json.JSONDecoder()
    buffer, at, line, number = "", 0, 1, 0
    wanted, more = 1, True  # characters to be read before the next try

    def fill() -> bool:
        nonlocal buffer, at, line, more
        line += buffer.count("\n", 0, at)
        parts, size = [buffer[at:]], len(buffer) - at
        while more and size < wanted:
            new = next(blocks, "")
            more = bool(new)
            parts.append(new)
            size += len(new)
        buffer, at = "".join(parts), 0
        return size >= wanted

    def character() -> str:
        """The next one that is not a space, "" at the end."""
        nonlocal at, wanted
        while True:
            found = _NO_SPACE.search(buffer, at)
            at = found.start() if found else len(buffer)
            wanted = 1
            if at < len(buffer) or not fill():
                return buffer[at : at + 1]

    def not_json(why: Any) -> ValueError:
        found = line + buffer.count("\n", 0, at)
        return ValueError(
            f"{path} is not JSON in what begins at line {found:,} ({why}); what follows cannot be read either"
        )

    array = character() == "["
    at += array
    first = True
    while character() != ("]" if array else ""):
        if array and not first:
            if character() != ",":
                raise not_json("no comma between two elements" if character() else "it ends within")
            at += 1
            character()
        number += 1
        while True:
            try:
                record, end = decoder.raw_decode(buffer, at)
                if end < len(buffer) or not more:
                    break
            except (ValueError, RecursionError) as error:
                # cut off, as long as the fault lies where the buffer ends
                here = getattr(error, "pos", at)
                unterminated = str(error).startswith("Unterminated string")
                if not more or (here < len(buffer) - 16 and not unterminated):
                    raise not_json(error) from None
            size = len(buffer) - at
            if size > reading.max_document_bytes:
                raise ValueError(str(reading.too_long(f"element {number:,} of {path}", size)))
            wanted = min(2 * size, reading.max_document_bytes) + 1
            fill()
        at, first = end, False
        yield reading.text_of(record, f"element {number:,} of {path}")
    at += array
    if array and character():
        raise not_json("more after the array")


def delimited(raw: Stream, path: Path, reading: Reading, delimiter: str) -> Iterator[Record]:
    """One document per row, the text in the column `text_key` of the header.

    A quoted field may hold delimiters, ends of lines and doubled quotes (RFC 4180). A quote that is
    not closed before a delimiter or the end of a line is a bad record of one line. Where tabs
    delimit, quotes are often only characters: a line that has the right number of fields without
    any quoting is read so, if the lines that its quotes would join to it have as well, and so is
    one whose quotes do not close.

    Raises:
      ValueError: the header lacks the column or has it twice.
    """
    csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
    source = _split_at_returns(lines(raw, path, reading))
    waiting: deque[Line] = deque()  # lines that a record began to take and did not
    taken: list[Line] = []  # those of the record that is being read
    tabs = delimiter == "\t"

    def feed() -> Iterator[str]:
        size = 0
        while (item := waiting.popleft() if waiting else next(source, None)) is not None:
            size = size * bool(taken) + len(str(item[1]))
            taken.append(item)
            if isinstance(item[1], BadRecord):
                raise item[1]
            if size > reading.max_document_bytes:
                raise csv.Error("its quote is not closed within max_document_bytes")
            yield item[1]

    def literally(line: str) -> list[str]:
        return line.rstrip("\r\n").split(delimiter)

    def rows() -> Iterator[tuple[int, list[str] | BadRecord]]:
        reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        columns = None
        while True:
            taken.clear()
            try:
                row = next(reader)
                several = len(taken) > 1
            except StopIteration:
                return
            except (csv.Error, BadRecord) as error:
                reader = csv.reader(feed(), delimiter=delimiter, strict=True)
                number, line = taken[0]
                waiting.extendleft(reversed(taken[1:]))
                if isinstance(line, BadRecord):
                    yield number, line
                elif tabs:
                    yield number, literally(line)
                else:
                    yield (
                        number,
                        BadRecord(f"line {number:,} of {path} has a quote out of place ({error})"),
                    )
                continue
            if not row:
                continue
            columns = columns or len(row)
            if tabs and columns > 1 and (several or len(row) != columns):
                plain = [literally(line) for _, line in taken if not isinstance(line, BadRecord)]  # none is one
                if all(len(fields) == columns for fields in plain):
                    row = plain[0]
                    waiting.extendleft(reversed(taken[1:]))
            yield taken[0][0], row

    numbered = rows()
    _, header = next(numbered, (1, []))
    if isinstance(header, BadRecord):
        raise ValueError(str(header))
    key = reading.text_key
    if header and header.count(key) != 1:
        problem = f"no text under {key!r}" if key not in header else f"more than one column {key!r}"
        raise ValueError(
            f"the header, row 1 of {path}, has {problem}; it has: {', '.join(header)}. Name the right one with text_key"
        )
    for number, row in numbered:
        where = f"line {number:,} of {path}"
        if isinstance(row, BadRecord):
            yield row
        elif len(row) != len(header):
            yield BadRecord(
                f"{where} has {len(row)} fields, and the header {len(header)}; a text that holds the "
                "delimiter must be in quotes"
            )
        else:
            yield reading.text_of(dict(zip(header, row, strict=True)), where)


def _split_at_returns(numbered: Iterator[Line]) -> Iterator[Line]:
    """Lines that end in a lone carriage return, as old files have them, one by one."""
    for number, line in numbered:
        if isinstance(line, str) and "\r" in line.removesuffix("\n").removesuffix("\r"):
            yield from ((number, part) for part in io.StringIO(line, newline=""))
        else:
            yield number, line


def parquet(path: Path, reading: Reading) -> Iterator[str | BadRecord]:
    """One document per row, the text in the column `text_key`.

    Raises:
      ValueError: there is no such column, or the file is compressed as a whole.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'diffrwkv[data]'") from None
    with path.open("rb") as file:
        if file.read(4) != PARQUET_MAGIC:
            raise refused(path, "parquet that is compressed as a whole")
    key = reading.text_key
    with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK) as table:
        if key not in table.schema_arrow.names:
            raise ValueError(
                f"{path} has no column {key!r}; it has: {', '.join(table.schema_arrow.names)}. "
                "Name the right one with text_key"
            )
        row = 0
        for group in range(table.num_row_groups):
            size, count = _size(table.metadata.row_group(group), key)
            # rows at a time: a few megabytes of them, as far as the mean tells
            some = max(1, min(1024, (1 << 23) * count // max(1, size)))
            for batch in table.iter_batches(some, [group], columns=[key], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    where = f"row {row:,} of {path}"
                    try:
                        record = {key: value.as_py()}
                    except UnicodeDecodeError as error:
                        byte = error.object[error.start]
                        yield BadRecord(f"{where} is not UTF-8 text (byte 0x{byte:02x})")
                        continue
                    yield reading.text_under(record, key, where)


def _size(group: Any, key: str) -> tuple[int, int]:
    """The bytes of a column in a row group of a parquet file, uncompressed, and its rows."""
    columns = (group.column(i) for i in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == key)
    return size, group.num_rows


def file_pieces(path: Path, reading: Reading | None = None) -> Pieces:
    """The documents of one file.

    Raises:
      ValueError: the file is damaged, not text, or of no known format; or a record is bad and
        `reading.on_error` is `"stop"`. The message names the file and the line.
    """
    reading = Reading() if reading is None else reading
    with undamaged(path):
        kind = format_of(path)
        if reading.prompt_key is not None and kind in (TEXT, PARQUET):
            raise ValueError(f"{path} is {kind}: prompts and answers are read from JSON, JSON lines, csv and tsv")
        if kind == TEXT:
            yield from text_pieces(path)
        elif kind == PARQUET:
            yield from reading.pieces(parquet(path, reading), str(path))
        else:
            with open_binary(path) as raw:
                records = {
                    JSON_LINES: lambda: json_lines(raw, path, reading),
                    JSON: lambda: json_values(raw, path, reading),
                    CSV: lambda: delimited(raw, path, reading, ","),
                    TSV: lambda: delimited(raw, path, reading, "\t"),
                }[kind]()
                yield from reading.pieces(records, str(path))


def nonempty(reader: Reader, what: str, reading: Reading | None = None) -> Reader:
    """The same reader without empty documents; it raises ValueError if no text is left."""

    def read() -> Pieces:
        some = started = False
        for text, ends in reader():
            if text or started:
                yield text, ends
                some = some or bool(text)
            started = (started or bool(text)) and not ends
        if not some:
            skipped = total_skipped(reading.skipped) if reading else None
            why = f", only {skipped['records']:,} bad records: {skipped['first']}" if skipped else ""
            raise ValueError(f"{what} has no text in it{why}")

    return read
