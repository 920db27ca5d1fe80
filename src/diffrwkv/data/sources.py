"""Where text comes from: data sets by name, and any file or folder by path.

A source is one or more splits, each a *reader*: a function that starts a fresh stream of ``(text,
ends)`` pieces, ``ends`` True at the last piece of each document. Streams never hold more than a
document (or, for one long text, a megabyte) in memory.

The data folder (``data_root``) is, in this order: ``config.data.root``, the environment variable
``DIFFRWKV_DATA``, ``~/.cache/diffrwkv``. A named data set is looked for there under several names,
compressed or not, and downloaded to there from its public home otherwise. Its content is checked
against a SHA-256 of the *text*, so it does not matter how the file is compressed.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import csv
import functools
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
import zlib
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
      splits: readers by split: ``{"all": ...}`` to be divided by ``divide``, or ``train``,
        ``validation``, ``test``.
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
    """The data folder: ``root``, else ``$DIFFRWKV_DATA``, else ``~/.cache/diffrwkv``. It need not
    exist.
    """
    return Path(root or os.environ.get("DIFFRWKV_DATA") or "~/.cache/diffrwkv").expanduser()


# Files -------------------------------------------------------------------------------------------

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


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(
        f"{path} is not UTF-8 text (byte 0x{byte:02x}); convert it, for example with iconv -t utf-8"
    )


def _cut(text: str, limit: int) -> int:
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
                raise _not_utf8(path, error) from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error})") from None
            yield _of_record(record, text_key, where), True


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
                    f"{path} has no text in it: no {', '.join((*TEXTS[:1], *FORMATS))} file, plain "
                    "or compressed"
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    size = sum(
        p.stat().st_size * (3 if split_suffixes(p)[1] or p.suffix == ".parquet" else 1)
        for p in files
    )

    def read() -> Pieces:
        for path in files:
            yield from file_pieces(path, text_key)

    return Source(name, {"all": nonempty(read, name)}, size, tuple(files))


# Splits ------------------------------------------------------------------------------------------


class Tally:
    """Counts and hashes the text that passes through ``watch``.

    The hash is SHA-256 of the UTF-8 text with one zero byte between documents: for one document, of
    its file.
    """

    def __init__(self) -> None:
        self.pieces = self.documents = self.characters = 0
        self._digest = hashlib.sha256()
        self.between = False  # whether a document has just ended

    def watch(self, pieces: Pieces, *, digest: bool = True) -> Pieces:
        """The same pieces, counted (and hashed, if ``digest``) as they are drawn."""
        for text, ends in pieces:
            self.add(text, ends, digest=digest)
            yield text, ends

    def add(self, text: str, ends: bool, *, digest: bool = True) -> None:
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
        return self._digest.hexdigest()


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
            elif ends and low == 0 == high and start < at:  # a document may end with an empty piece
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


def divide(reader: Reader, fraction: float, what: str) -> tuple[dict[str, Reader], Tally]:
    """Training and validation readers, and a count of the whole: the last ``fraction`` of the
    characters validates.

    One document is cut at character ``int(n * (1 - fraction))``, as the peers cut tiny Shakespeare.
    Several documents are not cut: the boundary is the end of a document nearest to that character.

    Raises:
      ValueError: ``fraction`` is not in (0, 1), or a side is empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {fraction}")
    tally, ends = Tally(), array.array("Q")
    for _, end in tally.watch(reader()):
        if end:
            ends.append(tally.characters)
    n = tally.characters
    at = int(n * (1 - fraction))
    inner = ends[:-1]
    if inner:
        i = bisect.bisect_left(inner, at)
        at = min(inner[max(i - 1, 0) : i + 1], key=lambda end: abs(end - at))
    if not 0 < at < n:
        raise ValueError(
            f"{what} has {n} characters: too few to keep {fraction:g} of them for validation"
        )
    return {"train": between(reader, 0, at), "validation": between(reader, at, None)}, tally


@dataclass(frozen=True)
class Plan:
    """What to tokenize.

    Attributes:
      name: of the data set.
      readers: by split; ``train`` and ``validation`` always, ``test`` where the data set has one.
      size: the text's bytes, about.
      settings: what defines the text, JSON types; equal settings and unchanged files mean equal
        text.
      files: the files that are read.
      info: what to record with a run.
      sha256: of the whole text where it was divided here, else None.
      characters: of the whole text where it is known.
    """

    name: str
    readers: Mapping[str, Reader]
    size: int
    settings: Mapping[str, Any]
    files: tuple[Path, ...]
    info: Mapping[str, Any]
    sha256: str | None = None
    characters: int | None = None


def plan(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    text_key: str = "text",
    validation: str | None = None,
    validation_fraction: float = 0.1,
    max_documents: int | None = None,
) -> Plan:
    """Decides which text trains and which validates; the arguments are those of ``load``.

    ``max_documents`` keeps only the first so many documents (of the training split, where there is
    one).
    """
    source = open_source(name, root, text_key=text_key)
    readers, files, size = dict(source.splits), source.files, source.size
    sha256 = characters = None
    if max_documents is not None:
        first = "train" if "train" in readers else "all"
        readers[first] = documents(readers[first], 0, max_documents)
    if validation is not None:
        other = open_source(validation, root, text_key=text_key)
        files, size = files + other.files, size + other.size
        readers = {
            "train": readers.get("train") or readers["all"],
            "validation": other.splits.get("validation") or other.splits["all"],
        }
    elif "validation" not in readers:
        readers, tally = divide(readers["all"], validation_fraction, name)
        sha256, characters = tally.sha256, tally.characters
    settings = {
        "input": name,
        "files": [[path.name, path.stat().st_size] for path in files],
        "text_key": text_key,
        "validation": validation,
        "validation_fraction": validation_fraction if sha256 is not None else None,
        "max_documents": max_documents,
    }
    return Plan(name, readers, size, settings, files, source.info, sha256, characters)


# Downloads ---------------------------------------------------------------------------------------


def text_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's decompressed bytes."""
    digest = hashlib.sha256()
    with open_binary(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, sha256: str | None, *, name: str, raw: bool = False) -> Path:
    """Downloads ``url`` to ``path`` with a progress bar; the file appears there whole and checked,
    or not at all.

    Args:
      sha256: of the decompressed text (of the file as it is if ``raw``).

    Raises:
      FileNotFoundError: the download failed; the message says which file to put where.
      ValueError: the content is not the expected one.
    """
    import http.client
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
                f"what {url} holds is not the text of data set {name!r} (sha256 {found}, expected "
                f"{sha256}); nothing was kept. Put the right file at {path}"
            )
        os.replace(part, path)
    except (
        OSError,
        EOFError,
        lzma.LZMAError,
        zipfile.BadZipFile,
        http.client.HTTPException,
    ) as error:
        raise FileNotFoundError(
            f"data set {name!r} is not in {path.parent} and could not be downloaded from {url} "
            f"({error}). Put the file there as {path.name}, or name the folder that has it in "
            "DIFFRWKV_DATA or config.data.root"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes as they lie on disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Remote:
    """A file with a public home.

    Attributes:
      saved_as: where a download goes, relative to the data folder.
      url: its home.
      sha256: of the text inside, decompressed; the download and a file found in the data folder
        must both have it.
      places: other names under which it may lie in the data folder; each also with .txt, .xz, .gz,
        .zst, .zip.
    """

    saved_as: str
    url: str
    sha256: str
    places: tuple[str, ...] = ()

    def find(self, root: Path) -> Path | None:
        """The file in the data folder, or None."""
        for place in (self.saved_as, *self.places):
            for ending in (
                "",
                ".txt",
                ".xz",
                ".txt.xz",
                ".gz",
                ".txt.gz",
                ".zst",
                ".txt.zst",
                ".zip",
            ):
                if (path := root / (place + ending)).is_file():
                    return path
        return None

    def get(self, root: Path, name: str) -> Path:
        """The file, found or downloaded, its content checked."""
        path = self.find(root)
        if path is None:
            return download(self.url, root / self.saved_as, self.sha256, name=name)
        with undamaged(path):
            found = text_sha256(path)
        if found != self.sha256:
            raise ValueError(
                f"{path} is not the text of data set {name!r} (sha256 {found}, expected "
                f"{self.sha256}); move it away, or give its path as config.data.name to train on "
                "it as it is"
            )
        return path


# Named data sets ---------------------------------------------------------------------------------


def _python_reference(root: Path) -> Source:
    """Prose of Python's own language reference, which every CPython carries: about 0.37 MB, nothing
    to download.

    ``pydoc_data.topics`` holds the topics that ``help()`` shows, cut from the language reference;
    some contain others whole (compound statements, the ``with`` statement). So that validation text
    is not seen in training, a topic is left out if at least half of it stands in a longer one. The
    rest are documents, in the order of their titles. The text differs a little between versions of
    Python: the run records version and hash.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "data set 'python_reference' is the text of help() in CPython (pydoc_data.topics), "
            "and this Python lacks it; install the full standard library, or name another data "
            "set or a text file in config.data.name"
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
    return Source(
        "python_reference",
        {"all": lambda: ((text, True) for text in kept)},
        sum(map(len, kept)),
        (),
        info,
    )


TINYSHAKESPEARE = Remote(
    "tinyshakespeare.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ("tinyshakespeare", "small/tinyshakespeare", "tinyshakespeare/input"),
)


def _tinyshakespeare(root: Path) -> Source:
    """Plays of Shakespeare in one text of 1,115,394 characters, 65 different ones (Karpathy,
    char-rnn).

    The last 10 % of the characters validate: 111,540.
    """
    path = TINYSHAKESPEARE.get(root, "tinyshakespeare")
    return Source("tinyshakespeare", {"all": lambda: file_pieces(path)}, 1115394, (path,))


_WIKITEXT2_HOME = (
    "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
)
WIKITEXT2 = {
    "train": Remote(
        "wikitext2/train.txt",
        _WIKITEXT2_HOME + "train.txt",
        "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        ("wikitext2_train", "train/wikitext2_train"),
    ),
    "validation": Remote(
        "wikitext2/valid.txt",
        _WIKITEXT2_HOME + "valid.txt",
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        ("wikitext2_valid", "eval/wikitext2_valid"),
    ),
    "test": Remote(
        "wikitext2/test.txt",
        _WIKITEXT2_HOME + "test.txt",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        ("wikitext2_test", "eval/wikitext2_test"),
    ),
}


def _wikitext_articles(path: Path) -> Pieces:
    """Articles begin at a heading of one ``=`` between blank lines; joined they are the file, byte
    for byte.
    """
    with open_binary(path) as stream:
        text = stream.read().decode("utf-8")
    headings = re.finditer(r"^ \n = (?!= )[^\n]*(?<! =) = \n \n", text, re.MULTILINE)
    starts = [match.start() for match in headings]
    for start, stop in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True):
        yield text[start:stop], True


def _wikitext2(root: Path) -> Source:
    """Wikipedia's good articles, tokenised with <unk> (Merity et al., arXiv 1609.07843); one
    document per article.
    """
    paths = {split: remote.get(root, "wikitext2") for split, remote in WIKITEXT2.items()}
    splits = {split: functools.partial(_wikitext_articles, path) for split, path in paths.items()}
    return Source("wikitext2", splits, 13175278, tuple(paths.values()))


TEXT8 = Remote(
    "text8.zip",
    "http://mattmahoney.net/dc/text8.zip",
    "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
    ("text8", "text8/text8"),
)


def _text8(root: Path) -> Source:
    """10^8 characters of Wikipedia, a to z and the space (Mahoney); 90, 5 and 5 million to train,
    validate and test.
    """
    path = TEXT8.get(root, "text8")
    edges = {
        "train": (0, 90_000_000),
        "validation": (90_000_000, 95_000_000),
        "test": (95_000_000, None),
    }
    splits = {split: between(lambda: file_pieces(path), *edge) for split, edge in edges.items()}
    return Source("text8", splits, 100_000_000, (path,))


LM1B = "1-billion-word-language-modeling-benchmark-r13output"
LM1B_URL = f"http://www.statmt.org/lm-benchmark/{LM1B}.tar.gz"
LM1B_SHA256 = "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"  # of the archive
LM1B_FOLDERS = {
    "train": "training-monolingual.tokenized.shuffled",
    "validation": "heldout-monolingual.tokenized.shuffled",
}


def _lines(stream: Iterable[bytes], where: str) -> Pieces:
    for line in stream:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(Path(where), error) from None
        if text:
            yield text, True


def _lm1b(root: Path) -> Source:
    """One Billion Word Benchmark (Chelba et al., arXiv 1312.3005): sentences, each a document,
    shuffled.

    The held-out part validates, as in the peers. Read from the archive (1.8 GB) or from the folder
    it unpacks to.
    """

    def from_folder(folder: Path) -> Pieces:
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            with path.open("rb") as stream:
                yield from _lines(stream, str(path))

    def from_archive(path: Path, part: str) -> Pieces:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile() and f"/{part}/" in member.name:
                    yield from _lines(archive.extractfile(member), f"{member.name} in {path}")

    for base in (root, root / "lm1b"):
        if all((base / LM1B / part).is_dir() for part in LM1B_FOLDERS.values()):
            readers = {
                split: functools.partial(from_folder, base / LM1B / part)
                for split, part in LM1B_FOLDERS.items()
            }
            return Source("lm1b", readers, 4_150_000_000)
    places = [base / f"{LM1B}.tar.gz" for base in (root, root / "lm1b")]
    path = next((place for place in places if place.is_file()), None)
    path = path or download(LM1B_URL, places[0], LM1B_SHA256, name="lm1b", raw=True)
    readers = {
        split: functools.partial(from_archive, path, part) for split, part in LM1B_FOLDERS.items()
    }
    return Source("lm1b", readers, 4_150_000_000, (path,))


def hugging_face(
    spec: str, text_key: str = "text", *, first: int | None = None, last: int | None = None
) -> Source:
    """A Hugging Face data set, ``hf:NAME`` or ``hf:NAME:CONFIG``, streamed.

    Without a validation split of its own, the ``first`` or the ``last`` so many documents of
    ``train`` validate, or the last tenth if neither is given.

    Raises:
      ImportError: ``datasets`` is not installed.
      RuntimeError: the hub cannot be reached, or has no such data set.
      ValueError: the data set has no train split, or does not say how long it is.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{spec} needs the Hugging Face library: pip install 'diffrwkv[hf]'"
        ) from None
    name, _, config = spec.removeprefix("hf:").partition(":")
    try:
        infos = datasets.load_dataset_builder(name, config or None).info.splits or {}
        names = datasets.get_dataset_split_names(name, config or None)
    except Exception as error:  # the hub's library has many exceptions for not being reached
        raise RuntimeError(
            f"the Hugging Face data set {name!r} could not be opened ({type(error).__name__}: "
            f"{error}). Without network, give files of text, jsonl, csv or parquet instead"
        ) from error
    if "train" not in names:
        raise ValueError(
            f"the Hugging Face data set {name!r} has no train split; it has: {', '.join(names)}"
        )

    def read(split: str, start: int, stop: int | None) -> Pieces:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        rows = rows.skip(start) if start else rows
        rows = rows if stop is None else rows.take(stop - start)
        for row in rows:
            text = _of_record(row, text_key, f"a row of {spec}")
            if text:
                yield text, True

    def part(split: str, start: int = 0, stop: int | None = None) -> Reader:
        return lambda: read(split, start, stop)

    if "validation" in names:
        return Source(
            spec,
            {split: part(split) for split in ("train", "validation", "test") if split in names},
            1 << 40,
        )
    if first is not None:
        return Source(
            spec, {"train": part("train", first), "validation": part("train", 0, first)}, 1 << 40
        )
    n = getattr(infos.get("train"), "num_examples", None)
    if not n:
        raise ValueError(
            f"the Hugging Face data set {name!r} has no validation split and does not say how many "
            "rows it has; name a text to validate on with --validation"
        )
    at = n - (max(1, n // 10) if last is None else last)
    return Source(spec, {"train": part("train", 0, at), "validation": part("train", at)}, 1 << 40)


def _openwebtext(root: Path) -> Source:
    """OpenWebText (Gokaslan and Cohen 2019) from the Hugging Face hub; the last 100,000 documents
    validate (MDLM).
    """
    return hugging_face("hf:Skylion007/openwebtext", last=100_000)


def _dclm(root: Path) -> Source:
    """DCLM-baseline (arXiv 2406.11794) from the Hugging Face hub; the first 10,000 documents
    validate.

    It is far larger than a disk: give ``--max_documents``.
    """
    return hugging_face("hf:mlfoundations/dclm-baseline-1.0-parquet", first=10_000)


@dataclass(frozen=True)
class Named:
    """A data set that is known by name: what opens it, and whether it must go through
    ``diffrwkv.prepare`` first.
    """

    open: Callable[[Path], Source]
    prepared: bool = False


DATASETS: dict[str, Named] = {
    "python_reference": Named(_python_reference),
    "tinyshakespeare": Named(_tinyshakespeare),
    "wikitext2": Named(_wikitext2),
    "text8": Named(_text8),
    "lm1b": Named(_lm1b, prepared=True),
    "openwebtext": Named(_openwebtext, prepared=True),
    "dclm": Named(_dclm, prepared=True),
}


def open_source(
    name: str, root: str | os.PathLike | None = None, *, text_key: str = "text"
) -> Source:
    """The data set of that name, or the files of that path.

    Args:
      name: a name in DATASETS, ``hf:NAME``, a path to a file or folder, or a pattern such as
        ``wiki_*.jsonl.xz``. A relative path is looked for in the working directory, then in the
        data folder.
      root: the data folder; see ``data_root``.
      text_key: the key or column that holds the text in jsonl, csv and parquet files.

    Raises:
      ValueError: neither a known name nor an existing path (the known names are listed).
      FileNotFoundError: a named data set is neither in the data folder nor downloadable.
    """
    folder = data_root(root)
    if not name:
        raise ValueError("the data set has no name; set config.data.name to a known name or a path")
    if name in DATASETS:
        return DATASETS[name].open(folder)
    if name.startswith("hf:"):
        return hugging_face(name, text_key)
    for base in (Path(), folder):
        path = base / Path(name).expanduser()
        if path.exists():
            return local_source(name, [path], text_key)
        if (
            any(c in name for c in "*?[")
            and not Path(name).is_absolute()
            and (found := sorted(base.glob(name)))
        ):
            return local_source(name, found, text_key)
    raise ValueError(
        f"data set {name!r} is neither a known name ({', '.join(DATASETS)}) nor a file or folder "
        f"here or in {folder}; any path to text, jsonl, csv or parquet may be given"
    )
