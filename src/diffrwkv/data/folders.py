"""Which files of a folder are data, and which split each of them belongs to.

Not data, and named where the text is described: hidden files and folders (`.git`,
`.ipynb_checkpoints`, `._a.jsonl`), what goes with data (READMEs, licences, what the Hugging Face
library and `diffrwkv.prepare` write beside it), files of a format that is not read, and a file
that is there already under another name. A file that is named by its own path is always read.

A file whose name has a word for a split, first or last and numbers aside (`train-00000-of-00002`,
`wiki.valid.tokens`, `c4-validation.0001.json.gz`), belongs to it, and so does all that lies in a
folder of that name. The words are those of the Hugging Face library, `SPLITS`.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from diffrwkv.data.formats import COMPRESSIONS, FORMATS, suffixes

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# Stems of what explains data, and names of what programs write beside them.
_ABOUT = re.compile(
    r"(?i)(?:readme|licen[cs]e|copying|notice|authors|changelog|changes|contributing|citation)"
    r"(?:[-_. ].*)?"
)
_BESIDE = ("manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


def _is_data(name: str) -> bool:
    kind, compression = suffixes(name)
    known = kind in FORMATS or (compression != "" and kind[1:].strip("0123456789") == "")  # content tells
    return known and not _is_hidden(name) and not _ABOUT.fullmatch(name) and name not in _BESIDE


def _walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterable[tuple[Path, bool]]:
    """All files below a folder, and whether each is data; hidden folders as one that is not."""
    stat = folder.stat()
    if (stat.st_dev, stat.st_ino) in above:  # a link to a folder that it is in
        return
    for path in folder.iterdir():
        if path.is_dir():
            if _is_hidden(path.name):
                yield path, False
            else:
                yield from _walk(path, above | {(stat.st_dev, stat.st_ino)})
        else:
            yield path, _is_data(path.name) and (path.is_file() or path.is_symlink())


def matching(pattern: Path) -> tuple[Path, list[Path]]:
    """What an absolute or relative pattern matches, and the folder before its first `*`, `?` or `[`.

    Hidden files and folders match only what names the dot, as in a shell.
    """
    before = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    folder, rest = Path(*before), pattern.parts[len(before) :]
    if not rest or not folder.is_dir():
        return folder, []
    dotted = any(part.startswith(".") for part in rest)
    found = folder.glob(str(Path(*rest)))
    return folder, sorted(path for path in found if dotted or not any(map(_is_hidden, path.relative_to(folder).parts)))


def find(paths: Iterable[Path], *, matched: bool = False) -> tuple[list[Path], list[Path]]:
    """The files that are data among paths and below folders, in sorted order, and what was left out.

    Args:
      matched: a pattern found the paths: a README among them is left out as well.

    Raises:
      FileNotFoundError: a path does not exist, or a link leads nowhere.
      ValueError: two names differ only in how the file is compressed.
    """
    found: dict[Path, bool] = {}  # whether it is data
    for path in paths:
        if path.is_dir():
            found |= sorted(_walk(path))
        else:
            found[path] = not (matched and _ABOUT.fullmatch(path.name))
    kept: dict[Path, None] = {}
    plain: dict[Path, Path] = {}  # by the name without the ending of its compression
    seen: set[tuple[int, int]] = set()
    for path in (path for path, data in found.items() if data):
        if not path.exists():
            link = f", a link to {os.readlink(path)}," if path.is_symlink() else ""
            raise FileNotFoundError(f"{path}{link} does not exist")
        stat = path.stat()
        if (key := (stat.st_dev, stat.st_ino)) in seen:
            continue
        seen.add(key)
        name = path.with_name(path.stem) if suffixes(path)[1] else path
        if (twin := plain.setdefault(name, path)) != path:
            raise ValueError(
                f"{twin} and {path} look like one text that is there twice: move one of them away, or "
                "name the file that is to be read"
            )
        kept[path] = None
    return list(kept), [path for path in found if path not in kept]


def split_of(path: PurePath) -> str | None:
    """The split that a path, relative to its folder, names, or None."""
    for name in reversed(path.parts[:-1]):
        if (split := SPLITS.get(name.lower())) is not None:
            return split
    name = path.name
    while PurePath(name).suffix.lower() in {**COMPRESSIONS, **FORMATS}:
        name = PurePath(name).stem
    words = [w for w in re.split(r"[^a-z]+", name.lower()) if w and w != "of"]
    return next((SPLITS[word] for word in (*words[:1], *words[-1:]) if word in SPLITS), None)


def by_split(files: Iterable[Path], folder: Path) -> Mapping[str, list[Path]]:
    """Files by split, `{"all": files}` if none is held out, or all are alike.

    Raises:
      ValueError: some are for validation or test and others name no split.
    """
    files = list(files)
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        inside = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
        splits.setdefault(split_of(inside), []).append(path)
    if len(splits) < 2 or splits.keys() == {"train", None}:
        return {"all": files}
    if None in splits:
        held = next(split for split in ("validation", "test") if split in splits)
        raise ValueError(
            f"{splits[held][0]} names a split ({held}) and {splits[None][0]} none: let every file of "
            "the data set name one (train, validation, test), or none, or name a single file or pattern"
        )
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}
