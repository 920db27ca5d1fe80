"""Data sets that are known by name: `DATASETS`, those of the Hugging Face hub, and regular languages."""

from __future__ import annotations

import functools
import re
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffrwkv import languages
from diffrwkv.data.download import Remote, download
from diffrwkv.data.formats import Stream, open_binary
from diffrwkv.data.readers import BadRecord, Reading, decoded, file_pieces, lines
from diffrwkv.data.splits import between
from diffrwkv.data.text import Pieces, Reader, Source


def _python_reference(root: Path, reading: Reading) -> Source:
    """Prose of Python's own language reference, which every CPython carries: about 0.37 MB, nothing to download.

    `pydoc_data.topics` holds the topics that `help()` shows, cut from the language reference;
    some contain others whole (compound statements, the `with` statement). So that validation text
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


def _tinyshakespeare(root: Path, reading: Reading) -> Source:
    """Plays of Shakespeare in one text of 1,115,394 characters, 65 different ones (Karpathy, char-rnn).

    The last 10 % of the characters validate: 111,540.
    """
    path = TINYSHAKESPEARE.get(root, "tinyshakespeare")
    return Source("tinyshakespeare", {"all": lambda: file_pieces(path)}, 1115394, (path,))


_WIKITEXT2_HOME = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
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


_HEADING = re.compile(r"^ \n = (?!= )[^\n]*(?<! =) = \n \n", re.MULTILINE)


def _wikitext_articles(path: Path) -> Pieces:
    """Articles begin at a heading of one `=` between blank lines; joined they are the file, byte for byte."""
    buffer, heading = "", -1  # where the article's own is, below 0 as long as it has none
    with open_binary(path) as raw:
        for text in decoded(raw, path):
            buffer, at = buffer + text, 0
            for match in _HEADING.finditer(buffer):
                if 0 <= heading < match.start():
                    yield buffer[at : match.start()], True
                    at = match.start()
                heading = match.start()
            buffer, heading = buffer[at:], heading - at
    if buffer:
        yield buffer, True


def _wikitext2(root: Path, reading: Reading) -> Source:
    """Wikipedia's good articles, tokenised with <unk> (Merity et al., arXiv 1609.07843); one document per article."""
    paths = {split: remote.get(root, "wikitext2") for split, remote in WIKITEXT2.items()}
    splits = {split: functools.partial(_wikitext_articles, path) for split, path in paths.items()}
    return Source("wikitext2", splits, 13175278, tuple(paths.values()))


TEXT8 = Remote(
    "text8.zip",
    "http://mattmahoney.net/dc/text8.zip",
    "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
    ("text8", "text8/text8"),
)


def _text8(root: Path, reading: Reading) -> Source:
    """10^8 characters of Wikipedia, a to z and the space (Mahoney); 90, 5 and 5 million to train, validate and test."""
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


def _sentences(raw: Stream, where: str, reading: Reading) -> Pieces:
    found = (line if isinstance(line, BadRecord) else line.rstrip("\r\n") for _, line in lines(raw, where, reading))
    yield from reading.pieces((text for text in found if text), where)


def find_lm1b(root: Path) -> Path | None:
    """LM1B's folder or archive in the data folder, or None."""
    bases = (root, root / "lm1b")
    folders = (base / LM1B for base in bases)
    found = [folder for folder in folders if all((folder / part).is_dir() for part in LM1B_FOLDERS.values())]
    found += [path for base in bases if (path := base / f"{LM1B}.tar.gz").is_file()]
    return next(iter(found), None)


def open_lm1b(root: Path, reading: Reading) -> Source:
    """One Billion Word Benchmark (Chelba et al., arXiv 1312.3005): sentences, each a document, shuffled.

    The held-out part validates, as in the peers. Read from the archive (1.8 GB) or from the folder
    it unpacks to.
    """

    def inside(folder: Path) -> list[Path]:
        return sorted(p for p in folder.iterdir() if p.is_file())

    def from_folder(folder: Path) -> Pieces:
        for path in inside(folder):
            with path.open("rb") as stream:
                yield from _sentences(stream, str(path), reading)

    def from_archive(path: Path, part: str) -> Pieces:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile() and f"/{part}/" in member.name and (stream := archive.extractfile(member)):
                    yield from _sentences(stream, f"{member.name} in {path}", reading)

    path = find_lm1b(root) or download(LM1B_URL, root / f"{LM1B}.tar.gz", LM1B_SHA256, name="lm1b", raw=True)
    if path.is_dir():
        readers = {split: functools.partial(from_folder, path / part) for split, part in LM1B_FOLDERS.items()}
        files = [file for part in LM1B_FOLDERS.values() for file in inside(path / part)]
        return Source("lm1b", readers, 4_150_000_000, tuple(files))
    readers = {split: functools.partial(from_archive, path, part) for split, part in LM1B_FOLDERS.items()}
    return Source("lm1b", readers, 4_150_000_000, (path,))


def hugging_face(
    spec: str,
    reading: Reading | None = None,
    *,
    first: int | None = None,
    last: int | None = None,
) -> Source:
    """A Hugging Face data set, `hf:NAME` or `hf:NAME:CONFIG`, streamed.

    Without a validation split of its own, the `first` or the `last` so many documents of
    `train` validate, or the last tenth if neither is given.

    Raises:
      ImportError: `datasets` is not installed.
      RuntimeError: the hub cannot be reached, or has no such data set.
      ValueError: the data set has no train split, or does not say how long it is.
    """
    reading = Reading() if reading is None else reading
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{spec} needs the Hugging Face library: pip install 'diffrwkv[hf]'") from None
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
        raise ValueError(f"the Hugging Face data set {name!r} has no train split; it has: {', '.join(names)}")

    def read(split: str, start: int, stop: int | None) -> Pieces:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        rows = rows.skip(start) if start else rows
        rows = rows if stop is None else rows.take(stop - start)
        texts = (
            reading.text_of(row, f"row {number:,} of split {split!r} of {spec}")
            for number, row in enumerate(rows, start + 1)
        )
        pieces = reading.pieces(texts, f"{spec} {split} {start}")
        yield from ((text, ends) for text, ends in pieces if text)

    def part(split: str, start: int = 0, stop: int | None = None) -> Reader:
        return lambda: read(split, start, stop)

    if "validation" in names:
        return Source(
            spec,
            {split: part(split) for split in ("train", "validation", "test") if split in names},
            1 << 40,
        )
    if first is not None:
        return Source(spec, {"train": part("train", first), "validation": part("train", 0, first)}, 1 << 40)
    n = getattr(infos.get("train"), "num_examples", None)
    if not n:
        raise ValueError(
            f"the Hugging Face data set {name!r} has no validation split and does not say how many "
            "rows it has; name a text to validate on with --validation"
        )
    at = n - (max(1, n // 10) if last is None else last)
    return Source(spec, {"train": part("train", 0, at), "validation": part("train", at)}, 1 << 40)


def _openwebtext(root: Path, reading: Reading) -> Source:
    """OpenWebText (Gokaslan and Cohen 2019) from the Hugging Face hub; the last 100,000 documents validate (MDLM)."""
    return hugging_face("hf:Skylion007/openwebtext", reading, last=100_000)


def _dclm(root: Path, reading: Reading) -> Source:
    """DCLM-baseline (arXiv 2406.11794) from the Hugging Face hub; the first 10,000 documents validate.

    It is far larger than a disk: give `--max_documents`.
    """
    return hugging_face("hf:mlfoundations/dclm-baseline-1.0-parquet", reading, first=10_000)


REGULAR_WORDS = {"train": 2**16, "validation": 2**10}
MOST_SYMBOLS = 2**12  # of a word: all words are held


def regular(spec: str) -> Source:
    """Words of a language of `diffrwkv.languages`, `regular:LANGUAGE:LENGTH`, drawn evenly: each split from a seed.

    The words of a split follow each other without anything between, so rows must be as long as words:
    `info["word_length"]`, which `load` holds `config.data.length` to.

    Raises:
      ValueError: there is no such language, or it has no word of that length.
    """
    match = re.fullmatch(r"regular:(\w+):([1-9][0-9]{0,5})", spec)
    if not match:
        raise ValueError(f"{spec!r} names no language: write regular:LANGUAGE:LENGTH, such as regular:parity:64")
    if int(match[2]) > MOST_SYMBOLS:
        raise ValueError(f"{spec!r} has words of {match[2]} symbols: take at most {MOST_SYMBOLS}")
    language, length = languages.language(match[1]), int(match[2])
    language.log_count(length)  # refuses

    def read(seed: int, number: int) -> Pieces:
        yield "".join(language.decode(language.sample(length, number, seed))), True

    readers = {
        split: functools.partial(read, seed, number) for seed, (split, number) in enumerate(REGULAR_WORDS.items())
    }
    return Source(spec, readers, length * sum(REGULAR_WORDS.values()), (), {"word_length": length})


@dataclass(frozen=True)
class Named:
    """A data set that is known by name: what opens it, and whether it must go through `diffrwkv.prepare` first."""

    open: Callable[[Path, Reading], Source]
    prepared: bool = False


DATASETS: dict[str, Named] = {
    "python_reference": Named(_python_reference),
    "tinyshakespeare": Named(_tinyshakespeare),
    "wikitext2": Named(_wikitext2),
    "text8": Named(_text8),
    "lm1b": Named(open_lm1b, prepared=True),
    "openwebtext": Named(_openwebtext, prepared=True),
    "dclm": Named(_dclm, prepared=True),
}
