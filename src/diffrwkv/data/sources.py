"""Where text comes from: data sets by name, and any file or folder by path.

A source is one or more splits, each a *reader*: a function that starts a fresh stream of ``(text, ends)`` pieces,
``ends`` True at the last piece of each document. Streams never hold more than a document (or, for one long text, a
megabyte) in memory.

The data folder (``data_root``) is, in this order: ``config.data.root``, the environment variable ``DIFFRWKV_DATA``,
``~/.cache/diffrwkv``. A named data set is looked for there under several names, compressed or not, and downloaded to
there from its public home otherwise. Its content is checked against a SHA-256 of the *text*, so it does not matter how
the file is compressed.
"""

from __future__ import annotations

import array
import bisect
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from diffrwkv.data.tokenizers import END_OF_TEXT

Pieces = Iterator[tuple[str, bool]]
Reader = Callable[[], Pieces]

BLOCK = 1 << 20  # characters of a long text that are handed on at a time


@dataclass(frozen=True)
class Source:
    """Text to learn from.

    Attributes:
      name: the data set's name or the path that was given.
      splits: readers by split: ``{"all": ...}`` to be divided by ``divide``, or ``train``, ``validation``, ``test``.
      size: the text's bytes, about.
      files: the files that are read; their names, sizes and times key the cache of tokens.
      info: what to record with a run, such as Python's version.
    """

    name: str
    splits: Mapping[str, Reader]
    size: int
    files: tuple[Path, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


def data_root(root: str | os.PathLike | None = None) -> Path:
    """The data folder: ``root``, else ``$DIFFRWKV_DATA``, else ``~/.cache/diffrwkv``. It need not exist."""
    return Path(root or os.environ.get("DIFFRWKV_DATA") or "~/.cache/diffrwkv").expanduser()


# Files ---------------------------------------------------------------------------------------------------------------

COMPRESSIONS = (".xz", ".gz", ".zst", ".zip")
FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")  # anything else is text
TEXTS = (".txt", ".text", ".md", ".rst", ".tokens")


def split_suffixes(path: Path) -> tuple[str, str]:
    """``(format, compression)`` by the file's name: ``a.jsonl.xz`` gives ``(".jsonl", ".xz")``, text gives ``""``."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    stem = Path(path.stem) if compression else path
    kind = stem.suffix.lower() if stem.suffix.lower() in FORMATS else ""
    return kind, compression


def open_binary(path: Path) -> BinaryIO:
    """The file's bytes, decompressed by the suffix of its name; a .zip must hold exactly one file."""
    compression = split_suffixes(path)[1]
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ImportError(f"reading {path} needs zstandard: pip install 'diffrwkv[data]'") from None
        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(stream, 1 << 20)
    if compression == ".zip":
        archive = zipfile.ZipFile(path)
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise ValueError(f"{path} holds {len(names)} files; unpack it and name the one to read")
        return archive.open(names[0])
    return path.open("rb")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(f"{path} is not UTF-8 text (byte 0x{byte:02x}); convert it, for example with iconv -t utf-8")


def _cut(text: str, limit: int) -> int:
    """A place to cut text at, at or below ``limit``, that no tokenizer notices where there is one.

    Byte-level BPE splits before a space between two visible characters, whatever surrounds them, so cutting there
    leaves the tokens as they are.
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
                raise _not_utf8(path, error) from None
            last = not new
            buffer += new
            while match := (_BETWEEN_AT_END if last else _BETWEEN).search(buffer):
                if match.start() or started:
                    yield buffer[: match.start()], True
                buffer, started = buffer[match.end() :], False
            keep = len(END_OF_TEXT) + 8  # a separator may be half read
            if not last and len(buffer) >= block + keep:
                at = _cut(buffer, len(buffer) - keep)
                yield buffer[:at], False
                buffer, started = buffer[at:], True
        if buffer or started:
            yield buffer, True


def _of_record(record: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(record, Mapping) or key not in record:
        have = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"{where} has no text under {key!r}; it has: {have}. Name the right one with text_key")
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} is {type(record[key]).__name__}, not text; name another with text_key")
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
                raise _not_utf8(path, error) from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error})") from None
            yield _of_record(record, text_key, where), True


def csv_pieces(path: Path, text_key: str) -> Pieces:
    """One document per row, the text in the column ``text_key`` of the header."""
    csv.field_size_limit(sys.maxsize)
    with open_binary(path) as raw:
        delimiter = "\t" if ".tsv" in path.suffixes else ","
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), delimiter=delimiter)
        try:
            for number, row in enumerate(rows, 1):
                row.pop(None, None)
                yield _of_record(row, text_key, f"row {number} of {path}"), True
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


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
            yield _of_record({text_key: text}, text_key, f"a row of {path}"), True


def file_pieces(path: Path, text_key: str) -> Pieces:
    """The documents of one file, read by what its name says: .jsonl, .csv, .tsv, .parquet, anything else is text."""
    kind = split_suffixes(path)[0]
    if kind == "":
        return text_pieces(path)
    read = {".jsonl": jsonl_pieces, ".csv": csv_pieces, ".tsv": csv_pieces, ".parquet": parquet_pieces}[kind]
    return read(path, text_key)


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


def _readable(path: Path) -> bool:
    kind, compression = split_suffixes(path)
    return bool(kind) or Path(path.stem if compression else path.name).suffix.lower() in TEXTS


def local_source(name: str, paths: Iterable[Path], text_key: str = "text") -> Source:
    """All documents of some files and folders, folders in sorted order.

    Raises:
      FileNotFoundError: a folder has no file of a known format, or a file is missing.
      ValueError: the text is empty or not UTF-8, or a record lacks ``text_key`` (when it is read).
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _readable(p))
            if not inside:
                raise FileNotFoundError(
                    f"{path} has no text in it: no {', '.join((*TEXTS[:1], *FORMATS))} file, plain or compressed"
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    size = sum(p.stat().st_size * (3 if split_suffixes(p)[1] or p.suffix == ".parquet" else 1) for p in files)

    def read() -> Pieces:
        for path in files:
            yield from file_pieces(path, text_key)

    return Source(name, {"all": nonempty(read, name)}, size, tuple(files))


# Splits --------------------------------------------------------------------------------------------------------------


def between(reader: Reader, start: int, stop: int | None) -> Reader:
    """The characters [start, stop) of a stream; a document that is cut ends (or begins) at the cut."""

    def read() -> Pieces:
        at = 0
        for text, ends in reader():
            low, high = max(start - at, 0), len(text) if stop is None else min(stop - at, len(text))
            at += len(text)
            if low < high or (ends and low == 0 and high == len(text)):
                yield text[low:high], ends or (stop is not None and at >= stop)
            if stop is not None and at >= stop:
                return

    return read


def divide(reader: Reader, fraction: float, what: str) -> dict[str, Reader]:
    """Training and validation readers: the last ``fraction`` of the characters validates.

    One document is cut at character ``int(n * (1 - fraction))``, as the peers cut tiny Shakespeare. Several documents
    are not cut: the boundary is the end of a document nearest to that character.

    Raises:
      ValueError: ``fraction`` is not in (0, 1), or a side is empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {fraction}")
    ends, n = array.array("Q"), 0
    for text, end in reader():
        n += len(text)
        if end:
            ends.append(n)
    at = int(n * (1 - fraction))
    inner = ends[:-1]
    if inner:
        i = bisect.bisect_left(inner, at)
        at = min(inner[max(i - 1, 0) : i + 1], key=lambda end: abs(end - at))
    if not 0 < at < n:
        raise ValueError(f"{what} has {n} characters: too few to keep {fraction:g} of them for validation")
    return {"train": between(reader, 0, at), "validation": between(reader, at, None)}


# Named data sets -----------------------------------------------------------------------------------------------------


def _python_reference(root: Path) -> Source:
    """Prose of Python's own language reference, which every CPython carries: about 0.37 MB, nothing to download.

    ``pydoc_data.topics`` holds the topics that ``help()`` shows, cut from the language reference; some contain others
    whole (compound statements, the ``with`` statement). So that validation text is not seen in training, a topic is
    left out if at least half of it stands in a longer one. The rest are documents, in the order of their titles. The
    text differs a little between versions of Python: the run records version and hash.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "data set 'python_reference' is the text of help() in CPython (pydoc_data.topics), and this Python lacks "
            "it; install the full standard library, or name another data set or a text file in config.data.name"
        ) from None

    def paragraphs(text: str) -> set[str]:
        return {" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if len(p) > 60}

    seen: set[str] = set()
    kept: list[str] = []
    for text in sorted(set(topics.values()), key=lambda text: (-len(text), text)):
        mine = paragraphs(text)
        if mine and 2 * sum(map(len, mine & seen)) >= sum(map(len, mine)):
            continue
        seen |= mine
        kept.append(text.strip("\n") + "\n")

    def title(text: str) -> tuple[str, str]:
        return text.split("\n", 1)[0].strip('"').lower(), text

    kept.sort(key=title)
    info = {"python": ".".join(map(str, sys.version_info[:3]))}
    return Source("python_reference", {"all": lambda: ((text, True) for text in kept)}, sum(map(len, kept)), (), info)


@dataclass(frozen=True)
class Remote:
    """A file with a public home.

    Attributes:
      saved_as: where a download goes, relative to the data folder.
      url: its home.
      sha256: of the text inside, decompressed; the download and a file found in the data folder must both have it.
      places: other names under which it may lie in the data folder; each also with .txt, .xz, .gz, .zst, .zip.
    """

    saved_as: str
    url: str
    sha256: str
    places: tuple[str, ...] = ()

    def find(self, root: Path) -> Path | None:
        """The file in the data folder, or None."""
        for place in (self.saved_as, *self.places):
            for ending in ("", ".txt", ".xz", ".txt.xz", ".gz", ".txt.gz", ".zst", ".txt.zst", ".zip"):
                if (path := root / (place + ending)).is_file():
                    return path
        return None

    def get(self, root: Path, name: str) -> Path:
        """The file, found or downloaded, its content checked."""
        path = self.find(root)
        if path is None:
            return download(self.url, root / self.saved_as, self.sha256, name=name)
        if (found := text_sha256(path)) != self.sha256:
            raise ValueError(
                f"{path} is not the text of data set {name!r} (sha256 {found}, expected {self.sha256}); move it away, "
                "or give its path as config.data.name to train on it as it is"
            )
        return path


def text_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's decompressed bytes."""
    digest = hashlib.sha256()
    with open_binary(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, sha256: str | None, *, name: str, raw: bool = False) -> Path:
    """Downloads ``url`` to ``path`` with a progress bar; the file appears there whole and checked, or not at all.

    Args:
      sha256: of the decompressed text (of the file as it is if ``raw``).

    Raises:
      FileNotFoundError: the download failed; the message says which file to put where.
      ValueError: the content is not the expected one.
    """
    import urllib.request

    from tqdm import tqdm

    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := response.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
            if total is not None and file.tell() != total:
                raise OSError(f"the connection ended after {file.tell()} of {total} bytes")
        found = file_sha256(part) if raw else text_sha256(part)
        if sha256 is not None and found != sha256:
            raise ValueError(
                f"what {url} holds is not the text of data set {name!r} (sha256 {found}, expected {sha256}); "
                f"nothing was kept. Put the right file at {path}"
            )
        os.replace(part, path)
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(
            f"data set {name!r} is not in {path.parent} and could not be downloaded from {url} ({error}). Put the "
            f"file there as {path.name}, or name the folder that has it in DIFFRWKV_DATA or config.data.root"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes as they lie on disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


TINYSHAKESPEARE = Remote(
    "tinyshakespeare.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ("tinyshakespeare", "small/tinyshakespeare", "tinyshakespeare/input"),
)


def _tinyshakespeare(root: Path) -> Source:
    """Plays of Shakespeare in one text of 1,115,394 characters (Karpathy 2015), 65 different ones."""
    path = TINYSHAKESPEARE.get(root, "tinyshakespeare")
    return Source("tinyshakespeare", {"all": lambda: text_pieces(path)}, 1115394, (path,))


DATASETS: dict[str, Callable[[Path], Source]] = {
    "python_reference": _python_reference,
    "tinyshakespeare": _tinyshakespeare,
}


def open_source(name: str, root: str | os.PathLike | None = None, *, text_key: str = "text") -> Source:
    """The data set of that name, or the files of that path.

    Args:
      name: a name in DATASETS, or a path to a file or folder, or a pattern such as ``train/wiki_*.jsonl.xz``. A
        relative path is looked for in the working directory, then in the data folder.
      root: the data folder; see ``data_root``.
      text_key: the key or column that holds the text in jsonl, csv and parquet files.

    Raises:
      ValueError: neither a known name nor an existing path (the known names are listed).
      FileNotFoundError: a named data set is neither in the data folder nor downloadable.
    """
    folder = data_root(root)
    if name in DATASETS:
        return DATASETS[name](folder)
    for base in (Path(), folder):
        path = base / Path(name).expanduser()
        if name and path.exists():
            return local_source(name, [path], text_key)
        if any(c in name for c in "*?[") and not Path(name).is_absolute() and (found := sorted(base.glob(name))):
            return local_source(name, found, text_key)
    raise ValueError(
        f"data set {name!r} is neither a known name ({', '.join(DATASETS)}) nor a file or folder here or in {folder}; "
        "any path to text, jsonl, csv or parquet may be given"
    )
