"""What a prepared folder says of itself, and whether that is so.

`manifest.json` names every shard with its number of tokens, its largest id and its SHA-256, and ends with a digest of
itself; so a folder that is damaged, cut short or mixed with another is noticed when it is opened. A shard is read for
that once: its size, times and inode are noted in the cache folder, and while they stay the same it is taken as it was.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import operator
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv import files
from diffrwkv.data.tokenizers import Tokenizer
from diffrwkv.files import file_sha256

FORMAT = "diffrwkv-shards-2"
MANIFEST = "manifest.json"
LOCK = ".lock"
SETTLED_NS = 2_000_000_000  # a file that changed later than this may change again under the same time stamp


def cache_root() -> Path:
    """Where the library keeps what it can make again: `$DIFFRWKV_CACHE`, else `~/.cache/diffrwkv`."""
    return Path(os.path.expanduser(os.environ.get("DIFFRWKV_CACHE") or "~/.cache/diffrwkv"))


def shard_name(split: str, index: int) -> str:
    """The file of a split's shard."""
    return f"{split}-{index:05d}.npy"


# The manifest -----------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      ValueError: it is not one of ours, was changed, or cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare the folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a manifest of python -m diffrwkv.prepare (format {FORMAT}); if an "
            "earlier version wrote it, delete the folder and prepare the text again"
        )
    try:
        _check_fields(manifest)
    except ValueError as error:
        raise ValueError(
            f"{path} is not as prepare wrote it ({error}); restore it, or delete the folder and prepare the text again"
        ) from None
    del manifest["digest"]
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes it with its digest, whole or not at all."""
    whole = {**manifest, "digest": files.digest(manifest)}
    text = json.dumps(whole, indent=1, ensure_ascii=True) + "\n"
    replace(folder / MANIFEST, lambda file: file.write(text.encode()))


def replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file through `write(file)`, whole or not at all.

    Raises:
      OSError: it cannot be written; the message says where and why.
    """
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}); what is done stays, and the "
            "same command goes on with it"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


_TEXT = {"documents": _is_count, "characters": _is_count, "sha256": _is_sha256}
_FIELDS = {
    "complete": _is(bool),
    "command": _is(str),
    "info": _is(dict),
    "settings": _is(dict),
    "inputs": _is(list),
    "skipped": _is(dict),
    "tokenizer_name": _is(str),
    "tokenizer_fingerprint": _is_sha256,
    "tokenizer": _is(dict),
    "dtype": lambda value: value in ("uint16", "uint32"),
    "splits": lambda value: (
        type(value) is dict and {"train", "validation"} <= value.keys() <= {"train", "validation", "test"}
    ),
}
_INPUT = {"file": _is(str), "sha256": _is_sha256, "stat": _is(list)}
_SHARD = {"tokens": _is_count, "max_id": _is_count, "sha256": _is_sha256, "until": _is(dict)}


def _check_fields(manifest: dict[str, Any]) -> None:
    """Raises ValueError, naming what is missing, of the wrong type, or does not add up."""

    def check(value: Any, fields: Mapping[str, Callable[[Any], bool]], where: str) -> None:
        if type(value) is not dict:
            raise ValueError(f"{where} is {type(value).__name__}")
        for key, right in fields.items():
            if key not in value or not right(value[key]):
                raise ValueError(f"{where}{key} is {'wrong' if key in value else 'missing'}")

    check(manifest, _FIELDS, "")
    check(manifest["info"], {"name": _is(str)}, "info.")
    for i, entry in enumerate(manifest["inputs"]):
        check(entry, _INPUT, f"inputs[{i}].")
    for name, entry in manifest["skipped"].items():
        check(entry, {"records": _is_count, "first": _is(str)}, f"skipped[{name!r}].")
    for split, entry in manifest["splits"].items():
        check(entry, {"shards": _is(list)}, f"{split}.")
        for i, shard in enumerate(entry["shards"]):
            name = shard_name(split, i)
            check(shard, {"file": functools.partial(operator.eq, name), **_SHARD}, f"{name}: ")
            check(shard["until"], {"pieces": _is_count, **_TEXT}, f"{name}: until.")
        if "tokens" in entry or manifest["complete"]:
            tokens = sum(shard["tokens"] for shard in entry["shards"])
            check(entry, {"tokens": functools.partial(operator.eq, tokens), **_TEXT}, f"{split}.")
    if manifest["complete"]:
        check(manifest, {"sha256": _is_sha256}, "")
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    if manifest.get("digest") != files.digest(rest):
        raise ValueError("its digest is that of other content")


# The shards -------------------------------------------------------------------------------------


def stat_of(path: Path) -> list[int]:
    """What changes when a file is written: size, times of content and of inode, inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _notes(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_root() / "verified" / f"{name}.json"


def _read_notes(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


def find_damage(folder: Path, manifest: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """The shards of a folder that are not what its manifest says, and why: `{file: reason}`.

    A shard must have its SHA-256, type and number of tokens, and every id must be one that text can
    have: below `tokenizer.mask_id`.
    """
    shards = {s["file"]: s for entry in manifest["splits"].values() for s in entry["shards"]}
    notes_file = _notes(folder)
    notes, found = _read_notes(notes_file), {}

    def check(name: str) -> str | None:
        shard, path = shards[name], folder / name
        what = files.digest([shard, manifest["dtype"], tokenizer.mask_id])
        try:
            stat = stat_of(path)
            if notes.get(name) == [what, *stat]:
                found[name] = notes[name]
                return None
            if file_sha256(path) != shard["sha256"]:
                return "is damaged, cut short or another file"
            row = np.load(path, mmap_mode="r", allow_pickle=False)
            if row.shape != (shard["tokens"],) or row.dtype.name != manifest["dtype"]:
                return "has another length or type than its manifest says"
            if row.max(initial=0) != shard["max_id"] or shard["max_id"] >= tokenizer.mask_id:
                return f"has ids that are not of tokenizer {tokenizer.name!r}"
            if time.time_ns() - max(stat[1:3]) > SETTLED_NS and stat_of(path) == stat:
                found[name] = [what, *stat]
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        except ValueError:
            return "is no .npy file"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        damage = {name: reason for name, reason in zip(shards, threads.map(check, shards), strict=True) if reason}
    if found != notes:
        with contextlib.suppress(OSError):  # without a cache each open reads the shards
            notes_file.parent.mkdir(parents=True, exist_ok=True)
            replace(notes_file, lambda file: file.write(json.dumps(found).encode()))
    return damage


def tokenizer_of(folder: Path, manifest: Mapping[str, Any], root: str | os.PathLike | None = None) -> Tokenizer:
    """The tokenizer that a folder was prepared with.

    Raises:
      ValueError: its description does not make that tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_json(manifest["tokenizer"], root)
        if (tokenizer.name, tokenizer.fingerprint, tokenizer.dtype.name) != (
            manifest["tokenizer_name"],
            manifest["tokenizer_fingerprint"],
            manifest["dtype"],
        ):
            raise ValueError("it is another one than its name and fingerprint say")
    except ValueError as error:
        raise ValueError(
            f"{folder / MANIFEST} has a tokenizer that cannot be used ({error}); delete the folder "
            "and prepare the text again"
        ) from None
    return tokenizer


def check_inputs(folder: Path, manifest: Mapping[str, Any], files: tuple[Path, ...]) -> None:
    """Raises ValueError if a file is not the one that a folder was begun with.

    A file with the times of then is; any other is read, and its content decides.
    """
    if len(manifest["inputs"]) != len(files):
        raise ValueError(
            f"{folder} was begun with {len(manifest['inputs'])} files, not {len(files)}; name another "
            "output folder, or delete this one"
        )
    for entry, path in zip(manifest["inputs"], files, strict=True):
        if entry["stat"] != stat_of(path) and entry["sha256"] != file_sha256(path):
            raise ValueError(
                f"{path} has changed since {folder} was begun; name another output folder, or delete this one"
            )


# One process at a time --------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds a folder, so that no other process writes there.

    The system lets go of it when this process ends, however it ends. What one that is no more left half written is
    deleted.

    Args:
      wait: is called with a line before another process is waited for; None: that is an error.

    Raises:
      ValueError: another process holds it; it is named.
      OSError: the folder cannot be made or written.
    """
    waiting = wait and (lambda holder: wait(f"Waiting for {holder}, which tokenizes the same text"))
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locked = stack.enter_context(files.lock(folder / LOCK, waiting))
        except files.Held as holder:
            raise ValueError(f"{folder} is being prepared by {holder}; wait for it, or stop it") from None
        except OSError as error:
            raise OSError(f"{folder} cannot be written ({error.strerror or error}); name another folder") from error
        if locked:  # else two processes do the work twice; every file appears whole
            for part in folder.glob(".part-*"):
                part.unlink(missing_ok=True)
        yield
