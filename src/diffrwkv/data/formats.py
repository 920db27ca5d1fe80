"""What a file is: how it is compressed, and of which format.

A file is known by its first bytes and by its name. The first bytes tell how it is compressed, and
what is no text at all; the name, without the endings of compressions, tells the format. Where a name
tells none, records of JSON are known by their first characters, and anything else is text. What the
two disagree on is refused, and so is what is none of these: nothing is read as text for want of a
better idea.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import errno
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO

from diffrwkv.data.text import BLOCK, END_OF_TEXT

TEXT, JSON_LINES, JSON, CSV, TSV, PARQUET = "text", "JSON lines", "JSON", "csv", "tsv", "parquet"
TEXTS = (".txt", ".text", ".md", ".rst", ".tokens")
FORMATS = {
    **dict.fromkeys(TEXTS, TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".jl", ".jsonlines"), JSON_LINES),
    ".json": JSON,
    ".csv": CSV,
    **dict.fromkeys((".tsv", ".tab"), TSV),
    ".parquet": PARQUET,
}
COMPRESSIONS = {
    ".gz": "gzip",
    ".xz": "xz",
    ".lzma": "xz",  # the xz library knows the older format, which has no signature, by itself
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".zip": "zip",
}
# what a name says is not read, though its first bytes may not tell
ARCHIVES = (
    *(".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar"),
    *(".z", ".lz", ".lz4", ".lzo", ".br", ".sz"),
)
READS = (
    "text, JSON records (.jsonl, .ndjson, .jl, .jsonlines, .json), .csv, .tsv and .parquet, "
    "plain or compressed (.gz, .xz, .zst, .bz2, or a .zip of one file)"
)

_COMPRESSED = {
    "gzip": rb"\x1f\x8b\x08",
    "xz": rb"\xfd7zXZ\x00",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
    "zip": rb"PK(?:\x03\x04|\x05\x06)",
}
_REFUSED = {
    "a tar archive": rb"(?s)(?=.{0,256}\x00).{257}ustar[\x00 ]",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a rar archive": rb"Rar!\x1a\x07",
    "a file of lz4": rb"\x04\x22\x4d\x18",
    "a file of lzip": rb"LZIP\x01",
    "a file of Unix compress": rb"\x1f[\x9d\xa0]",
    "a PDF": rb"%PDF-",
    "an Arrow file": rb"ARROW1\x00",
    "a file of numpy arrays": rb"\x93NUMPY",
    "an HDF5 file": rb"\x89HDF\r\n",
    "a SQLite database": rb"SQLite format 3\x00",
    "text in UTF-16 or UTF-32": rb"\xff\xfe|\xfe\xff",
    "the pointer that Git LFS keeps in place of a file, not the file": rb"version https://git-lfs",
}
PARQUET_MAGIC = b"PAR1"
_RECORDS = rb'\s*(?:\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:'  # [{"key": or {"key":
BOM = codecs.BOM_UTF8
Stream = io.BufferedIOBase | IO[bytes]  # bytes to be read: the standard library's own have no type in common
_HEAD = 1 << 16  # bytes at the beginning by which a file is known


def suffixes(name: str | PurePath) -> tuple[str, str]:
    """The last two endings of a file's name that say something, in small letters.

    `a.jsonl.xz` gives `(".jsonl", ".xz")`, `a.txt` gives `(".txt", "")`.
    """
    path = PurePath(name)
    last = path.suffix.lower()
    if last in COMPRESSIONS:
        return PurePath(path.stem).suffix.lower(), last
    return last, ""


def refused(path: Path, what: str) -> ValueError:
    """The error for a file that is something else than text."""
    return ValueError(f"{path} is {what}, which is not read: unpack or convert it. What is read: {READS}")


class _Zstd(io.RawIOBase):
    """The bytes of a .zst file of any number of frames.

    Unlike the library's own stream it raises EOFError where a frame is cut off.
    """

    def __init__(self, file: BinaryIO, decompressor: Any):
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None  # the decompressor of the frame that is being read
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            # little at a time: zeros shrink to a ten-thousandth, and all that comes of it is held
            self._input = self._input or self._file.read(1024)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._output))
        buffer[:n], self._output = self._output[:n], self._output[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstd(path: Path) -> Stream:
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"reading {path} needs zstandard: pip install 'diffrwkv[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # all that zstd --long writes
    return io.BufferedReader(_Zstd(path.open("rb"), decompressor), BLOCK)


def _member(path: Path) -> tuple[Stream, str]:
    """The one file in a .zip, and its name; what macOS puts beside it does not count."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [
                name
                for name in archive.namelist()
                if not name.endswith("/") and not any(p.startswith((".", "__MACOSX")) for p in name.split("/"))
            ]
            if len(names) == 1:
                inside: Any = archive.open(names[0])  # keeps the file open; typeshed has a type of its own for it
                return io.BufferedReader(inside, BLOCK), names[0]
    except (RuntimeError, UnicodeDecodeError) as error:  # encrypted, or of a kind that Python lacks
        raise ValueError(f"{path} cannot be unpacked here ({error}); unpack it yourself") from None
    raise ValueError(f"{path} holds {len(names)} files; unpack it and name the one to read")


def _open(path: Path) -> tuple[Stream, str]:
    """The decompressed bytes, and the name of what they are: without a compression's ending, or that inside a .zip."""
    with path.open("rb") as file:
        head = file.read(64)
    claimed = COMPRESSIONS.get(suffixes(path)[1])
    found = next((kind for kind, magic in _COMPRESSED.items() if re.match(magic, head)), None)
    if claimed and not found and path.suffix.lower() != ".lzma":
        raise ValueError(
            f"{path} is damaged, or not what its name says (it does not begin as {claimed} does); fetch it again"
        )
    name = path.stem if claimed else path.name
    kind = found or claimed
    if kind == "gzip":
        return gzip.open(path, "rb"), name
    if kind == "xz":
        return lzma.open(path, "rb"), name
    if kind == "bzip2":
        return bz2.open(path, "rb"), name
    if kind == "zstd":
        return _zstd(path), name
    if kind == "zip":
        raw, inside = _member(path)
        return raw, inside if PurePath(inside).suffix.lower() in FORMATS else name
    return path.open("rb"), name


def open_binary(path: Path) -> Stream:
    """The file's bytes, decompressed; a .zip must hold exactly one file."""
    return _open(path)[0]


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turns what the decompressors raise on a damaged file into a ValueError that names it."""
    damage: Exception
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        damage = error
    except OSError as error:  # of gzip, bz2 and pyarrow; EINVAL: a .zip that points before its start
        if error.errno not in (None, errno.EINVAL):
            raise
        damage = error
    except Exception as error:  # zstandard and pyarrow have classes of their own, and are optional
        if type(error).__name__ not in ("ZstdError", "ArrowInvalid"):
            raise
        damage = error
    else:
        return
    raise ValueError(f"{path} is damaged, or not what its name says ({damage}); fetch it again") from damage


def _is_record(line: bytes) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def format_of(path: Path) -> str:
    """The format of what a file holds once it is decompressed, by its name and first bytes: a value of `FORMATS`.

    Raises:
      ValueError: it is none of these, or the two disagree.
    """
    raw, name = _open(path)
    with raw:
        head = raw.read(_HEAD)
    if (what := PurePath(name).suffix.lower()) in ARCHIVES:
        raise refused(path, f"an archive or compressed by a program of its own ({what})")
    for what, magic in _REFUSED.items():
        if re.match(magic, head):
            raise refused(path, what)
    if any(re.match(magic, head) for magic in _COMPRESSED.values()):
        raise refused(path, "compressed more than once")
    named = FORMATS.get(PurePath(name).suffix.lower())
    if (head[:4] == PARQUET_MAGIC) != (named == PARQUET):
        if named == PARQUET:
            raise ValueError(
                f"{path} is damaged, or not what its name says (it does not begin as parquet does); fetch it again"
            )
        named = PARQUET
    if named in (PARQUET, CSV, TSV):
        return named
    head = head.removeprefix(BOM)
    if named in (None, TEXT):
        if not re.match(_RECORDS, head):
            return TEXT
        if named == TEXT:
            raise ValueError(
                f"{path} is named as text and begins as JSON does: name it .jsonl or .json to read "
                f"the text in its records, or put a line {END_OF_TEXT} before it to read it as it is"
            )
    if named == JSON_LINES:
        return JSON if re.match(rb"\s*\[\s*\{", head) else JSON_LINES
    if head.lstrip()[:1] == b"[":
        return JSON
    lines = [line for line in head.split(b"\n") if line.strip()]
    return JSON_LINES if len(lines) == 1 or any(map(_is_record, lines[:2])) else JSON
