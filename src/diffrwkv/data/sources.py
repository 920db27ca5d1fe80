"""Where text comes from: data sets by name, and any file or folder by path; and which part of it
trains and which validates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffrwkv.data.datasets import DATASETS, hugging_face
from diffrwkv.data.download import data_root
from diffrwkv.data.readers import FORMATS, TEXTS, file_pieces, nonempty, split_suffixes
from diffrwkv.data.splits import divide, documents
from diffrwkv.data.text import Pieces, Reader, Source


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
