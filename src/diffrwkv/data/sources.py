"""Where text comes from, data sets by name and any file or folder by path; which part trains and which validates."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffrwkv.data import folders
from diffrwkv.data.datasets import DATASETS, hugging_face, regular
from diffrwkv.data.download import data_root
from diffrwkv.data.formats import READS, suffixes
from diffrwkv.data.readers import Reading, file_pieces, nonempty
from diffrwkv.data.splits import divide, documents
from diffrwkv.data.text import Pieces, Reader, Source


class UnknownName(ValueError):
    """Neither a data set's name nor an existing path."""


def local_source(
    name: str,
    paths: Iterable[Path],
    reading: Reading | None = None,
    *,
    folder: Path | None = None,
) -> Source:
    """All documents of some files and folders, folders in sorted order; in splits, if files name them (see `folders`).

    Args:
      folder: what the names of splits are looked for below; by default the path, if it is one. Given
        with what a pattern matched.

    Raises:
      FileNotFoundError: a folder has no file of a known format, or a file is missing.
      ValueError: some files name a split and others none; when it is read, that the text is empty,
        or what `readers.file_pieces` raises.
    """
    paths, reading = list(paths), Reading() if reading is None else reading
    files, ignored = folders.find(paths, matched=folder is not None)
    if not files:
        raise FileNotFoundError(f"{name} has no text in it: no file of {READS}")
    size = sum(p.stat().st_size * (3 if suffixes(p)[1] or p.suffix == ".parquet" else 1) for p in files)

    def read(files: list[Path]) -> Pieces:
        for path in files:
            yield from file_pieces(path, reading)

    splits = {
        split: nonempty(functools.partial(read, part), name if split == "all" else f"{name} ({split})", reading)
        for split, part in folders.by_split(files, folder or paths[0]).items()
    }
    info = {}
    if ignored:
        info["ignored"] = {"files": len(ignored), "names": [str(path) for path in ignored[:20]]}
    return Source(name, splits, size, tuple(files), info)


def open_source(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    text_key: str = "text",
    reading: Reading | None = None,
) -> Source:
    """The data set of that name, or the files of that path.

    Args:
      name: a name in DATASETS, `hf:NAME`, `regular:LANGUAGE:LENGTH`, a path to a file or folder,
        or a pattern such as `~/wiki_*.jsonl.xz`. A relative path is looked for in the working directory, then in the
        data folder.
      root: the data folder; see `data_root`.
      text_key: the key or column that holds the text in JSON, csv and parquet files.
      reading: how files are read, `text_key` included, which is not looked at then.

    Raises:
      UnknownName: neither a known name nor an existing path (the known names are listed).
      ValueError: there is no name.
      FileNotFoundError: a named data set is neither in the data folder nor downloadable.
    """
    reading = Reading(text_key) if reading is None else reading
    where = data_root(root)
    if not name:
        raise ValueError("the data set has no name; set config.data.name to a known name or a path")
    if name in DATASETS:
        return DATASETS[name].open(where, reading)
    if name.startswith("hf:"):
        return hugging_face(name, reading)
    if name.startswith("regular:"):
        return regular(name)
    paths, inside = find(name, root)
    return local_source(name, paths, reading, folder=inside)


def find(name: str, root: str | os.PathLike | None = None) -> tuple[list[Path], Path | None]:
    """What a path or a pattern names: ([the path], None), or (what the pattern matches, the folder that it is in).

    Raises:
      UnknownName: there is no such path, nor any that matches.
    """
    where, wanted = data_root(root), Path(os.path.expanduser(name))
    for base in (Path(), where):
        path = base / wanted
        if path.exists():
            return [path], None
        inside, found = folders.matching(path)
        if found:
            return list(found), inside
    raise UnknownName(
        f"data set {name!r} is neither a known name ({', '.join(DATASETS)}) nor a file, folder or "
        f"pattern here or in {where}; any path may be given to {READS}"
    )


def check_name(name: str, root: str | os.PathLike | None = None) -> None:
    """Raises UnknownName where `open_source` would, and reads nothing."""
    if name and name not in DATASETS and not name.startswith(("hf:", "regular:")):
        find(name, root)


@dataclass(frozen=True)
class Plan:
    """What to tokenize.

    Attributes:
      name: of the data set.
      readers: by split; `train` and `validation` always, `test` where the data set has one.
      size: the text's bytes, about.
      settings: what defines the text, JSON types; equal settings and unchanged files mean equal
        text.
      files: the files that are read.
      info: what to record with a run.
      sha256: of the whole text where it was divided here and has no other split, else None.
      characters: of the whole text where it is known.
      reading: how the files are read; it knows which records were left out.
    """

    name: str
    readers: Mapping[str, Reader]
    size: int
    settings: Mapping[str, Any]
    files: tuple[Path, ...]
    info: Mapping[str, Any]
    sha256: str | None = None
    characters: int | None = None
    reading: Reading = field(default_factory=Reading)


def held_out(source: Source) -> Reader:
    """What of a data set validates another: its validation split, or all of it.

    Raises:
      ValueError: it is in splits, and none of them validates.
    """
    for split in ("validation", "all"):
        if split in source.splits:
            return source.splits[split]
    raise ValueError(
        f"data set {source.name!r} is in splits ({', '.join(source.splits)}) and none of them is for "
        "validation; name the files to validate on"
    )


def plan(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    text_key: str = "text",
    validation: str | None = None,
    validation_fraction: float = 0.1,
    max_documents: int | None = None,
    on_error: str = "stop",
    max_document_bytes: int = Reading.max_document_bytes,
    prompt_key: str | None = None,
) -> Plan:
    """Decides which text trains and which validates; the arguments are those of `load`.

    `max_documents` keeps only the first so many documents (of the training split, where there is
    one).

    Raises:
      ValueError: a bad argument, no training text, or what `open_source` and `divide` raise.
    """
    reading = Reading(text_key, on_error, max_document_bytes, prompt_key)
    pairs = prompt_key is not None
    for each in (name, validation) if pairs else ():
        if each in DATASETS or str(each).startswith("regular:"):
            raise ValueError(f"data set {each!r} is text without prompts: leave config.data.prompt_key out")
    source = open_source(name, root, reading=reading)
    readers, files, size, info = dict(source.splits), source.files, source.size, dict(source.info)
    first = "train" if "train" in readers else "all"
    if first not in readers:
        raise ValueError(f"data set {name!r} is in splits ({', '.join(readers)}) and none of them is for training")
    sha256 = characters = None
    divided = validation is None and "validation" not in readers
    if max_documents is not None:
        readers[first] = documents(readers[first], 0, max_documents * (1 + pairs))
    if validation is not None:
        other = open_source(validation, root, reading=reading)
        files, size = files + other.files, size + other.size
        if ignored := [s.info["ignored"] for s in (source, other) if "ignored" in s.info]:
            info["ignored"] = {
                "files": sum(part["files"] for part in ignored),
                "names": [name for part in ignored for name in part["names"]],
            }
        readers = {"train": readers[first], "validation": held_out(other)}
    elif divided:
        parts, tally = divide(readers.pop(first), validation_fraction, name, pairs=pairs)
        if not readers:
            sha256, characters = tally.sha256, tally.characters
        readers = parts | readers
        size = max(size, tally.characters)  # before, a guess where files are compressed
    settings = {
        "input": name,
        "files": [[path.name, path.stat().st_size] for path in files],
        "text_key": text_key,
        "validation": validation,
        "validation_fraction": validation_fraction if divided else None,
        "max_documents": max_documents,
        "on_error": on_error,
        "max_document_bytes": max_document_bytes,
    }
    if pairs:  # left out elsewhere, where folders and caches were made without
        settings["prompt_key"] = prompt_key
    return Plan(name, readers, size, settings, files, info, sha256, characters, reading=reading)
