"""What a file is, and its documents: text, jsonl, csv and parquet, plain or compressed."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from diffrwkv.data.text import BLOCK, Pieces, Reader
from diffrwkv.data.tokenizers import END_OF_TEXT

COMPRESSIONS = (".xz", ".gz", ".zst", ".zip")
FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")  # anything else is text
TEXTS = (".txt", ".text", ".md", ".rst", ".tokens")


def split_suffixes(path: Path) -> tuple[str, str]:
    """``(format, compression)`` by the file's name: ``a.jsonl.xz`` gives ``(".jsonl", ".xz")``,
    text gives ``""``.
    """
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    stem = Path(path.stem) if compression else path
    kind = stem.suffix.lower() if stem.suffix.lower() in FORMATS else ""
    return kind, compression


def open_binary(path: Path) -> BinaryIO:
    """The file's bytes, decompressed by its suffix; a .zip must hold exactly one file."""
    compression = split_suffixes(path)[1]
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ImportError(
                f"reading {path} needs zstandard: pip install 'diffrwkv[data]'"
            ) from None
        stream = zstandard.ZstdDecompressor().stream_reader(
            path.open("rb"), read_across_frames=True, closefd=True
        )
        return io.BufferedReader(stream, 1 << 20)
    if compression == ".zip":
        archive = zipfile.ZipFile(path)
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise ValueError(f"{path} holds {len(names)} files; unpack it and name the one to read")
        return archive.open(names[0])
    return path.open("rb")


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turns what the decompressors raise on a damaged file into a ValueError that names it."""
    try:
        yield
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged, or not what its name says ({error}); fetch it again"
        ) from error
    except Exception as error:  # zstandard and pyarrow have classes of their own, and are optional
        if type(error).__name__ not in ("ZstdError", "ArrowInvalid"):
            raise
        raise ValueError(
            f"{path} is damaged, or not what its name says ({error}); fetch it again"
        ) from error


def not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(
        f"{path} is not UTF-8 text (byte 0x{byte:02x}); convert it, for example with iconv -t utf-8"
    )


def cut(text: str, limit: int) -> int:
    """A place to cut text at, at or below ``limit``, that no tokenizer notices where there is one.

    Byte-level BPE splits before a space between two visible characters, whatever surrounds them, so
    cutting there leaves the tokens as they are.
    """
    at = limit
    while (at := text.rfind(" ", 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1 : at + 2].isspace():
            return at
    return limit


_BETWEEN = re.compile(r"(?:\A|\n)<\|endoftext\|>[ \t]*\r?\n")
_BETWEEN_AT_END = re.compile(r"(?:\A|\n)<\|endoftext\|>[ \t]*(?:\r?\n|\Z)")


def text_pieces(path: Path, *, block: int = BLOCK) -> Pieces:
    """One document, or several between lines that read ``<|endoftext|>``."""
    with open_binary(path) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        buffer, started, last = "", False, False
        while not last:
            try:
                new = stream.read(block)
            except UnicodeDecodeError as error:
                raise not_utf8(path, error) from None
            last = not new
            buffer += new
            while match := (_BETWEEN_AT_END if last else _BETWEEN).search(buffer):
                if match.start() or started:
                    yield buffer[: match.start()], True
                buffer, started = buffer[match.end() :], False
            keep = len(END_OF_TEXT) + 8  # a separator may be half read
            if not last and len(buffer) >= block + keep:
                at = cut(buffer, len(buffer) - keep)
                yield buffer[:at], False
                buffer, started = buffer[at:], True
        if buffer or started:
            yield buffer, True


def text_of(record: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(record, Mapping) or key not in record:
        have = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(
            f"{where} has no text under {key!r}; it has: {have}. Name the right one with text_key"
        )
    if not isinstance(record[key], str):
        raise ValueError(
            f"{where}: {key!r} is {type(record[key]).__name__}, not text; name another with "
            "text_key"
        )
    return record[key]


def jsonl_pieces(path: Path, text_key: str) -> Pieces:
    """One document per line, the text under ``text_key``; empty lines are passed over."""
    with open_binary(path) as raw:
        for number, line in enumerate(raw, 1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise not_utf8(path, error) from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error})") from None
            yield text_of(record, text_key, where), True


def csv_pieces(path: Path, text_key: str) -> Pieces:
    """One document per row, the text in the column ``text_key`` of the header."""
    csv.field_size_limit(sys.maxsize)
    with open_binary(path) as raw:
        delimiter = "\t" if ".tsv" in path.suffixes else ","
        rows = csv.DictReader(
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), delimiter=delimiter
        )
        try:
            for number, row in enumerate(rows, 1):
                row.pop(None, None)
                yield text_of(row, text_key, f"row {number} of {path}"), True
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from None


def parquet_pieces(path: Path, text_key: str) -> Pieces:
    """One document per row, the text in the column ``text_key``."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'diffrwkv[data]'") from None
    table = pyarrow.parquet.ParquetFile(path)
    if text_key not in table.schema_arrow.names:
        raise ValueError(
            f"{path} has no column {text_key!r}; it has: {', '.join(table.schema_arrow.names)}. "
            "Name the right one with text_key"
        )
    for batch in table.iter_batches(batch_size=256, columns=[text_key]):
        for text in batch.column(0).to_pylist():
            yield text_of({text_key: text}, text_key, f"a row of {path}"), True


def file_pieces(path: Path, text_key: str = "text") -> Pieces:
    """The documents of one file, read by what its name says: .jsonl, .csv, .tsv, .parquet, anything
    else is text.
    """
    kind = split_suffixes(path)[0]
    read = {
        ".jsonl": jsonl_pieces,
        ".csv": csv_pieces,
        ".tsv": csv_pieces,
        ".parquet": parquet_pieces,
    }
    with undamaged(path):
        yield from read[kind](path, text_key) if kind else text_pieces(path)


def nonempty(reader: Reader, what: str) -> Reader:
    """The same reader without empty documents; it raises ValueError if no text is left."""

    def read() -> Pieces:
        some = started = False
        for text, ends in reader():
            if text or started:
                yield text, ends
                some = some or bool(text)
            started = (started or bool(text)) and not ends
        if not some:
            raise ValueError(f"{what} has no text in it")

    return read
