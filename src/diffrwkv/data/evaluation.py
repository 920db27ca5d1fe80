"""Texts to score a model on: the sets that others report, by name, and any file; as rows of tokens, and counted.

A named set is what the peers take it for (SEDD, arXiv 2310.16834, its data.py; MDLM, arXiv 2406.07524, its
dataloader.py): the same part of the data, the same rows of it as documents, the same detokeniser. docs/evaluation.md
says where their protocols differ.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv.data.chunks import Chunks, Dataset, Documents, TokenStore
from diffrwkv.data.datasets import DATASETS, LM1B, WIKITEXT2, find_lm1b, open_lm1b
from diffrwkv.data.detokenizers import DETOKENIZERS
from diffrwkv.data.download import Remote, data_root
from diffrwkv.data.formats import CSV, PARQUET, format_of, open_binary, undamaged
from diffrwkv.data.readers import BadRecord, Reading, file_pieces, lines, parquet
from diffrwkv.data.sources import UnknownName, held_out, open_source
from diffrwkv.data.splits import Tally
from diffrwkv.data.text import Pieces
from diffrwkv.data.tokenizers import BLANK_LINE, Tokenizer, encode_documents

# --- The named sets ---------------------------------------------------------------------------------


def _lines(path: Path, reading: Reading) -> Iterator[str]:
    """The lines of a file, each with its end."""
    with undamaged(path), open_binary(path) as raw:
        yield from _records(line for _, line in lines(raw, path, reading))


def _stripped_lines(path: Path, reading: Reading) -> Iterator[str]:
    """A document each, without the spaces around them."""
    return (stripped for line in _lines(path, reading) if (stripped := line.strip()))


def _wikitext_rows(path: Path, reading: Reading) -> Iterator[str]:
    """Each line with its end; "" for one of blanks, which the peers end with an EOS like any other."""
    if format_of(path) == PARQUET:
        return (row if row.strip() else "" for row in _records(parquet(path, reading)))
    return (line if line.strip() else "" for line in _lines(path, reading))


def _records(records: Iterable[str | BadRecord]) -> Iterator[str]:
    for record in records:
        if isinstance(record, BadRecord):
            raise record
        yield record


def _texts(path: Path, reading: Reading) -> Iterator[str]:
    """The records under the key "text"."""
    return (text for text, _ in file_pieces(path, reading))


def _ag_news(path: Path, reading: Reading) -> Iterator[str]:
    """Title and description of a row `label, title, description`; or the column `text`, where they are joined."""
    if format_of(path) != CSV:
        yield from _texts(path, reading)
        return
    for number, row in enumerate(csv.reader(_lines(path, reading), skipinitialspace=True), 1):
        if len(row) != 3:
            raise ValueError(f"row {number:,} of {path} has {len(row)} fields: AG News has label, title, description")
        yield " ".join(row[1:])


def _articles(path: Path, reading: Reading) -> Iterator[str]:
    """The paragraphs under `article_text` of each line of JSON, joined by line ends (arXiv 1804.05685)."""
    for number, line in enumerate(_lines(path, reading), 1):
        try:
            paragraphs = json.loads(line)["article_text"]
            if not isinstance(paragraphs, list):
                raise TypeError(f"{type(paragraphs).__name__}, not a list of paragraphs")
            yield "\n".join(paragraphs)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number:,} of {path} is no record with article_text ({error!r})") from None


@dataclass(frozen=True)
class NamedText:
    """A text that is known by name.

    Attributes:
      files: by split; the first is the one that the peers evaluate on.
      documents: of such a file, in order.
      detokenizer: the peers'; a name in DETOKENIZERS.
    """

    files: Mapping[str, Remote]
    documents: Callable[[Path, Reading], Iterator[str]]
    detokenizer: str = "none"


def _kept(name: str, origin: str, *places: str, sha256: str | None = None) -> Remote:
    """A file that is not downloaded: its home asks for a licence, or keeps it within a large archive."""
    return Remote(name, None, sha256, places, origin)


_LAMBADA = Remote(
    "lambada/lambada_test.jsonl",
    "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ("lambada_test.jsonl", "eval/lambada_test.jsonl"),
)
_PTB_VALID = "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"


def _ptb(part: str, sha256: str | None = None) -> Remote:
    origin = f"ptb.{part}.txt of Mikolov's split"
    return _kept(f"ptb/ptb.{part}.txt", origin, f"ptb.{part}", f"ptb_{part}", f"eval/ptb_{part}", sha256=sha256)


def _wikitext_raw(size: int, split: str) -> Remote:
    hub, part = f"wikitext-{size}-raw-v1/{split}-00000-of-00001.parquet", {"validation": "valid"}.get(split, split)
    folder = f"wikitext{size}_raw" if size == 2 else f"wikitext{size}"
    origin = f"{hub} of huggingface.co/datasets/Salesforce/wikitext (or wiki.{part}.raw)"
    return _kept(hub, origin, f"{folder}/wiki.{part}.raw", f"wikitext-{size}-raw/wiki.{part}.raw")


def _papers(name: str, part: str) -> Remote:
    origin = f"{name}-dataset/{part}.txt of github.com/armancohan/long-summarization"
    return _kept(f"{name}-dataset/{part}.txt", origin, f"{name}/{part}", f"scientific_papers/{name}-dataset/{part}")


EVALUATION_SETS: dict[str, NamedText] = {
    "ag_news": NamedText(
        {
            "test": _kept(
                "ag_news/test.csv",
                "test.csv of AG News (or test-00000-of-00001.parquet of huggingface.co/datasets/fancyzhx/ag_news)",
                "ag_news_csv/test.csv",
                "ag_news/test.parquet",
                "ag_news/data/test-00000-of-00001.parquet",
            )
        },
        _ag_news,
    ),
    "arxiv": NamedText(
        {"validation": _papers("arxiv", "val"), "test": _papers("arxiv", "test")}, _articles, "scientific"
    ),
    "lambada": NamedText({"test": _LAMBADA}, _texts, "lambada"),
    "lm1b_10_11": NamedText(  # sections 10 and 11 of the 50 that `lm1b` has
        {
            "test": _kept(
                "lm1b/heldout10-11.txt",
                "1b_benchmark.dev.tokens of the University of Washington's course CSE 447",
                "eval/lm1b_heldout10-11",
                sha256="17cb1e765cc0ccbf2b25d6dfd5e7d03bc776882e579e77ed9626d65eb3bbdec7",
            )
        },
        _stripped_lines,
        "lm1b",
    ),
    "ptb": NamedText({"validation": _ptb("valid", _PTB_VALID), "test": _ptb("test")}, _stripped_lines, "ptb"),
    "pubmed": NamedText(
        {"validation": _papers("pubmed", "val"), "test": _papers("pubmed", "test")}, _articles, "scientific"
    ),
    # with <unk>, as the training data of this name; the peers' wikitext2 and wikitext103 are the raw texts
    "wikitext2": NamedText({s: WIKITEXT2[s] for s in ("validation", "test")}, _wikitext_rows, "wikitext"),
    "wikitext2_raw": NamedText({s: _wikitext_raw(2, s) for s in ("validation", "test")}, _wikitext_rows, "wikitext"),
    "wikitext103": NamedText({s: _wikitext_raw(103, s) for s in ("validation", "test")}, _wikitext_rows, "wikitext"),
}
LM1B_HELD_OUT = "lm1b"  # from the folder or the archive that trains, too
SETS = sorted([*EVALUATION_SETS, LM1B_HELD_OUT])


# --- Documents --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Documents to be scored.

    Attributes:
      name: of the set, or the path that was given.
      documents: each as it is tokenized, the detokeniser having been applied.
      detokenizer: its name.
      split: of the data set; None for a path without splits.
      sha256: of the documents, as `Tally` has it.
    """

    name: str
    documents: tuple[str, ...]
    detokenizer: str
    split: str | None
    sha256: str


def read(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    detokenizer: str | None = None,
    each_line: bool = False,
    reading: Reading | None = None,
) -> Text:
    """The documents of a named set, or of any data set, file, folder or pattern that `sources.open_source` knows.

    Args:
      root: the data folder; see `data_root`.
      split: "validation", "test" or "train"; None: the peers', of other data the validation split, else all of it.
      detokenizer: a name in DETOKENIZERS; None: the peers' for a named set, none for others.
      each_line: every line of a text is a document, without the blanks around it; for what is not named.
      reading: how the files are read of what is not named.

    Raises:
      ValueError: an unknown name, detokeniser or split, text that is empty or no text.
      FileNotFoundError: a named set is not in the data folder; the message says which file to put where.
    """
    if detokenizer is not None and detokenizer not in DETOKENIZERS:
        raise ValueError(f"there is no detokenizer {detokenizer!r}; there are: {', '.join(DETOKENIZERS)}")
    own = "none"
    found: Iterator[str]
    if name in SETS:
        if each_line:
            raise ValueError(f"{name!r} has the peers' documents: that each line is one is for other texts")
        split, own, found = _named(name, data_root(root), split)
    else:
        split, pieces = _other(name, root, split, Reading() if reading is None else reading)
        parts = (line.strip() for line in _split(pieces)) if each_line else _whole(pieces)
        found = (document for document in parts if document)
    detokenizer = own if detokenizer is None else detokenizer
    rewrite, tally = DETOKENIZERS[detokenizer], Tally()
    documents: list[str] = []
    for document in found:
        documents.append(rewrite(document))
        tally.add(documents[-1], True)
    if not any(documents):
        raise ValueError(f"{name} has no text in it")
    return Text(name, tuple(documents), detokenizer, split, tally.sha256)


def _named(name: str, root: Path, split: str | None) -> tuple[str, str, Iterator[str]]:
    """(split, the peers' detokeniser, documents) of a named set."""
    reading = Reading()
    if name == LM1B_HELD_OUT:
        splits: Iterable[str] = ("test",)  # what Hugging Face calls the held-out part
    else:
        splits = EVALUATION_SETS[name].files
    split = next(iter(splits)) if split is None else split
    if split not in splits:
        raise ValueError(f"data set {name!r} has no {split!r} split to evaluate on; it has: {', '.join(splits)}")
    if name != LM1B_HELD_OUT:
        known = EVALUATION_SETS[name]
        return split, known.detokenizer, known.documents(known.files[split].get(root, name), reading)
    if find_lm1b(root) is None:
        raise FileNotFoundError(
            f"data set 'lm1b' is not in {root}: put the folder {LM1B} or its archive {LM1B}.tar.gz (statmt.org, 1.8 "
            "GB) there, or name the folder that has it in DIFFRWKV_DATA"
        )
    pieces = open_lm1b(root, reading).splits["validation"]()
    return split, "lm1b", (stripped for sentence, _ in pieces if (stripped := sentence.strip()))


def _other(name: str, root: Any, split: str | None, reading: Reading) -> tuple[str | None, Pieces]:
    """(split, pieces) of any other text. Raises ValueError for a split that it lacks."""
    try:
        source = open_source(name, root, reading=reading)
    except UnknownName as error:
        raise ValueError(f"{error}; texts to evaluate on have names besides: {', '.join(SETS)}") from None
    if name in DATASETS and set(source.splits) == {"all"}:
        raise ValueError(
            f"data set {name!r} is in no splits, and what of it validates a run is decided when it is trained: "
            "evaluate that without naming data, or name the path of a text"
        )
    if split is None:
        own = "validation" if "validation" in source.splits else None
        return own, held_out(source)()
    if split not in source.splits:
        splits = ", ".join(s for s in source.splits if s != "all") or "none"
        raise ValueError(f"{name} has no {split!r} split; it has: {splits}")
    return split, source.splits[split]()


def _whole(pieces: Pieces) -> Iterator[str]:
    """The documents of a stream."""
    parts: list[str] = []
    for text, ends in pieces:
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts = []


def _split(pieces: Pieces) -> Iterator[str]:
    """The lines of a stream's documents."""
    return itertools.chain.from_iterable(document.split("\n") for document in _whole(pieces))


# --- Rows and counts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """What stands at the tokens that are scored. A word is what `str.split` gives; it and a character count where they
    begin.
    """

    characters: int = 0
    words: int = 0

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.characters + other.characters, self.words + other.words)


def count(text: str, ids: np.ndarray, scored: np.ndarray, tokenizer: Tokenizer) -> Counted:
    """Characters and words of a text at those of its tokens that are scored.

    Args:
      text: what `ids` decode to.
      ids: int [n]; specials among them have no characters.
      scored: bool [n].
    """
    if scored.all():
        return Counted(len(text), len(text.split()))
    if not scored.any():
        return Counted()
    encoded = text.encode()
    sizes = {i: len(tokenizer.decode_bytes([i])) for i in np.unique(ids).tolist()}
    lengths = np.array([sizes[i] for i in ids.tolist()])
    if lengths.sum() != len(encoded):
        raise ValueError(f"the tokens of {text[:40]!r} are not its bytes: {lengths.sum()} and {len(encoded)}")
    begins = np.frombuffer(encoded, np.uint8) & 0xC0 != 0x80  # bytes that begin a character
    characters = np.repeat(scored, lengths)[begins]
    words = characters[[word.start() for word in re.finditer(r"\S+", text)]]
    return Counted(int(characters.sum()), int(words.sum()))


@dataclass(frozen=True)
class Rows:
    """A text as rows of tokens.

    Attributes:
      dataset: the rows, as its `validation`.
      documents: how many the text has.
      dropped: its tokens that no row has, EOS among them.
      counted: of the tokens that are scored.
    """

    dataset: Dataset
    documents: int
    dropped: int
    counted: Counted


def cut(
    text: Text,
    tokenizer: Tokenizer,
    *,
    length: int,
    wrap: bool = False,
    packing: str = "concat",
    group: int | None = None,
    eos: bool = True,
    limit: int | None = None,
    keep_first: bool = False,
) -> Rows:
    """The rows of a text, as `load` cuts the data it trains on.

    Args:
      length: tokens in a row, BOS and EOS counted.
      wrap: a row is [BOS] + length - 2 tokens + [EOS] (MDLM).
      packing: "concat" joins the documents and drops what does not fill the last row; "document" gives each rows of
        its own, padded, and drops nothing.
      group: so many documents are joined, and the remainder of each such group is dropped: the peers' 1,000, the batch
        of Hugging Face's `map`. None: all.
      eos: each document ends with EOS; where the tokenizer has none, a blank line stands between two. False: nothing
        stands between documents that are joined (BD3-LM's zero-shot evaluation).
      limit: only the first so many rows.
      keep_first: the first token of a row is given, not scored.

    Raises:
      ValueError: a bad argument; a character that the tokenizer lacks; a text that fills no row.
    """
    if packing not in ("concat", "document"):
        raise ValueError(f"packing must be 'concat' or 'document', not {packing!r}")
    if length < (3 if wrap else 1):
        raise ValueError(f"length must be at least {3 if wrap else 1}{' with wrap' * wrap}, not {length}")
    if tokenizer.eos_id is None and (wrap or packing == "document"):
        what = "wrap" if wrap else "packing = 'document'"
        raise ValueError(f"{what} needs a tokenizer with BOS and EOS, and {tokenizer!r} has none")
    if packing == "document" and (group is not None or not eos):
        what = "group" if eos else "eos = False"
        raise ValueError(f"{what} is of documents that are joined: packing = 'document' joins none")
    for what, number in (("group", group), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, not {number}")
    body = length - 2 if wrap else length
    documents = _encode(text.documents, tokenizer, eos)
    kept = [len(ids) for _, ids in documents]
    total = sum(kept)
    if packing == "concat":
        for first in range(0, len(kept), group or len(kept)):
            part = slice(first, first + (group or len(kept)))
            kept[part] = _fill(kept[part], sum(kept[part]) // body * body)
    parts = [ids[:n].astype(tokenizer.dtype) for (_, ids), n in zip(documents, kept, strict=True)]
    store = TokenStore([np.concatenate(parts)])
    rows = (Documents if packing == "document" else Chunks)(store, tokenizer, length, wrap)
    if not len(rows):
        raise ValueError(
            f"{text.name} has {total:,} tokens, in groups of {group or len(documents):,} documents: none fills a row "
            f"of {body}; take a smaller length, a larger group, or packing = 'document'"
        )
    number = len(rows) if limit is None else min(limit, len(rows))
    if number < len(rows):
        kept = _fill(kept, number * body if isinstance(rows, Chunks) else rows.stop(number))
    counted, at = Counted(), 0
    for (document, ids), n in zip(documents, kept, strict=True):
        scored = np.arange(len(ids)) < n
        if keep_first and not wrap:
            scored &= (np.arange(len(ids)) + (at if packing == "concat" else 0)) % body > 0
        counted += count(document, ids, scored, tokenizer)
        at += n
    if not counted.characters:
        raise ValueError(
            f"the {number} rows of {text.name} that are to be scored hold no character: score more of them"
        )
    info: dict[str, Any] = {"name": text.name, "sha256": text.sha256}
    if number == len(rows) and not keep_first:
        info["validation"] = {"chunk_characters": counted.characters, "tokens": rows.count_valid()}
    return Rows(Dataset(tokenizer, rows, rows, info=info), len(documents), total - sum(kept), counted)


def _encode(documents: Iterable[str], tokenizer: Tokenizer, eos: bool) -> list[tuple[str, np.ndarray]]:
    """Of each document what stands in the row, and its tokens."""
    encoded = encode_documents(tokenizer, ((document, True) for document in documents))
    if tokenizer.eos_id is not None:
        return [(document, ids if eos else ids[:-1]) for document, ids, _ in encoded]
    return [
        (document, ids[len(BLANK_LINE) :]) if i and not eos else ((BLANK_LINE if i else "") + document, ids)
        for i, (document, ids, _) in enumerate(encoded)
    ]


def _fill(sizes: list[int], room: int) -> list[int]:
    """How much of each document, in order, there is room for."""
    filled = []
    for size in sizes:
        filled.append(min(size, room))
        room -= filled[-1]
    return filled
