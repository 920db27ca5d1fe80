"""Tokens on disk: .npy shards and a manifest that says what they are.

A folder holds ``manifest.json`` and, per split, ``train-00000.npy``, ``train-00001.npy``, ...: rows
of uint16 tokens (uint32 where the vocabulary needs it) that are mapped, not read. Everything
appears whole or not at all: a shard is renamed into place, then the manifest that lists it. What
the manifest lists is done; so a run that was killed goes on at the first shard that is missing or
does not have its hash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv.data import tokenizers
from diffrwkv.data.download import file_sha256
from diffrwkv.data.readers import Reading
from diffrwkv.data.sources import Plan
from diffrwkv.data.splits import Tally, sha256_of_splits
from diffrwkv.data.text import Reader
from diffrwkv.data.tokenizers import Tokenizer

FORMAT = "diffrwkv-shards-1"
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 25
BPE_CHARACTERS = 1 << 28  # of training text that a bpe:N vocabulary is learned from


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      ValueError: it is not one of ours, or cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare the folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a manifest of python -m diffrwkv.prepare (format {FORMAT})"
        )
    return manifest


def _replace(path: Path, write) -> None:
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=True) + "\n"
    _replace(folder / MANIFEST, lambda file: file.write(text.encode()))


def check_same(folder: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, if a folder was prepared with other settings."""
    for key, value in want.items():
        if have.get(key) != value:
            raise ValueError(
                f"{folder} was prepared with {key} {have.get(key)!r}, not {value!r}; name another "
                "output folder, or delete this one"
            )


def write(
    folder: Path,
    readers: Mapping[str, Reader],
    tokenizer: Tokenizer,
    *,
    settings: Mapping[str, Any],
    shard_tokens: int = SHARD_TOKENS,
    info: Mapping[str, Any] | None = None,
    sha256: str | None = None,
    command: str = "",
    progress: bool = False,
    total: int | None = None,
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Tokenizes every split into shards of about ``shard_tokens`` tokens (whole pieces of text) and
    returns the manifest.

    Args:
      settings: what defines the output beside the tokenizer (input, text_key, ...); a folder that
        was begun with other settings is refused.
      info: what else to record.
      sha256: of the whole text; None: made of those of the splits.
      total: characters in all, for the progress bar.
      reading: how the readers read: the records that they leave out are recorded.

    Raises:
      ValueError: the folder was begun with other settings or another tokenizer, or the text has
        changed since.
    """
    from tqdm import tqdm

    settings = json.loads(json.dumps({**settings, "shard_tokens": shard_tokens}))
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        check_same(folder, {"tokenizer": manifest["tokenizer_name"]}, {"tokenizer": tokenizer.name})
        check_same(folder, manifest, {"tokenizer_fingerprint": tokenizer.fingerprint})
        check_same(folder, manifest["settings"], settings)
    else:
        manifest = {
            "format": FORMAT,
            "complete": False,
            "command": command,
            "info": dict(info or {}),
            "settings": settings,
            "tokenizer_name": tokenizer.name,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "tokenizer": tokenizer.to_json(),
            "dtype": tokenizer.dtype.name,
            "splits": {split: {"shards": []} for split in readers},
        }
    reading = Reading() if reading is None else reading
    for entry in manifest["splits"].values():
        for i, shard in enumerate(entry["shards"]):
            path = folder / shard["file"]
            if not path.is_file() or file_sha256(path) != shard["sha256"]:
                del entry["shards"][i:]
                entry.pop("tokens", None)
                break
    manifest["complete"] = all("tokens" in manifest["splits"][split] for split in readers)
    _write_manifest(folder, manifest)
    if manifest["complete"]:
        return manifest

    with tqdm(
        total=total,
        unit="char",
        unit_scale=True,
        desc="tokenizing",
        disable=None if progress else True,
    ) as bar:
        for split, reader in readers.items():
            entry = manifest["splits"][split]
            if "tokens" in entry:  # a split that is done
                bar.update(entry["characters"])
                continue
            for shard in _shards(
                folder, split, reader, tokenizer, entry["shards"], shard_tokens, bar
            ):
                manifest["skipped"] = {**manifest.get("skipped", {}), **reading.skipped}
                if shard["tokens"]:
                    entry["shards"].append(shard)
                    _write_manifest(folder, manifest)
                entry |= {key: shard["until"][key] for key in ("documents", "characters", "sha256")}
            entry["tokens"] = sum(shard["tokens"] for shard in entry["shards"])
    manifest["sha256"] = sha256 or sha256_of_splits(
        entry["sha256"] for entry in manifest["splits"].values()
    )
    manifest["complete"] = True
    _write_manifest(folder, manifest)
    return manifest


def _shards(
    folder: Path,
    split: str,
    reader: Reader,
    tokenizer: Tokenizer,
    done: list[dict],
    shard_tokens: int,
    bar,
) -> Iterator[dict[str, Any]]:
    """Writes the shards after ``done`` and yields what the manifest says of each; the last may have
    no tokens.

    ``until`` tells how far into the text a shard reaches, so that the next run can pass over as
    much.
    """
    pieces, tally = reader(), Tally()
    if done:
        until = done[-1]["until"]
        for text, ends in pieces:
            tally.add(text, ends)
            bar.update(len(text))
            if tally.pieces == until["pieces"]:
                break
        if tally.pieces != until["pieces"] or tally.sha256 != until["sha256"]:
            raise ValueError(
                f"the {split} text has changed since {folder} was begun; name another output "
                "folder, or delete this one"
            )
    rows: list[np.ndarray] = []
    size, index = 0, len(done)

    def save() -> dict[str, Any]:
        shard = {"file": f"{split}-{index:05d}.npy", "tokens": size}
        if size:
            _replace(folder / shard["file"], lambda file: np.save(file, np.concatenate(rows)))
            shard["sha256"] = file_sha256(folder / shard["file"])
        keys = ("pieces", "documents", "characters", "sha256")
        return {**shard, "until": {key: getattr(tally, key) for key in keys}}

    encoded = tokenizers.encode_documents(
        tokenizer, pieces, between=tally.between, done=tally.documents
    )
    for text, ids, ends in encoded:
        tally.add(text, ends)
        bar.update(len(text))
        rows.append(ids.astype(tokenizer.dtype))
        size += len(ids)
        if size >= shard_tokens:
            yield save()
            rows, size, index = [], 0, index + 1
    yield save()


def make_tokenizer(
    spec: str, plan: Plan, *, specials: bool, root: str | os.PathLike | None = None
) -> Tokenizer:
    """The tokenizer of a specification for the text of a plan.

    A char alphabet is that of all splits, so that validation has no unknown character; bpe:N is
    trained on the first ``BPE_CHARACTERS`` characters of the training text.
    """
    kind, _ = tokenizers.parse(spec)

    def all_text() -> Iterator[str]:
        tallies = []
        for reader in plan.readers.values():
            tallies.append(Tally())
            for text, _ in tallies[-1].watch(reader(), digest=False):
                yield text
        if not specials and any(tally.documents > 1 for tally in tallies):
            yield tokenizers.BLANK_LINE

    def training_text() -> Iterator[str]:
        left = BPE_CHARACTERS
        for text, _ in plan.readers["train"]():
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return

    return tokenizers.make(
        spec, all_text() if kind == "char" else training_text(), specials=specials, root=root
    )


def prepare(
    folder: Path,
    plan: Plan,
    tokenizer: str | Tokenizer,
    *,
    specials: bool = True,
    shard_tokens: int = SHARD_TOKENS,
    command: str = "",
    root: str | os.PathLike | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Tokenizes the text of a plan into ``folder``, or goes on where a run before stopped; returns
    the manifest.

    Args:
      tokenizer: a specification, or a Tokenizer. A trained one is taken from the folder if that was
        begun before.
      specials: whether a char tokenizer that is made here gets BOS and EOS.

    Raises:
      ValueError: the folder was begun with other settings or another tokenizer, or the text has
        changed since.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, not {shard_tokens}")
    if isinstance(tokenizer, str):
        tokenizers.parse(tokenizer)
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            check_same(folder, {"tokenizer": manifest["tokenizer_name"]}, {"tokenizer": tokenizer})
            check_same(folder, manifest["settings"], json.loads(json.dumps(plan.settings)))
            tokenizer = Tokenizer.from_json(manifest["tokenizer"], root)
        if isinstance(tokenizer, str):
            tokenizer = make_tokenizer(tokenizer, plan, specials=specials, root=root)
    return write(
        folder,
        plan.readers,
        tokenizer,
        settings=plan.settings,
        shard_tokens=shard_tokens,
        info={"name": plan.name, **plan.info},
        sha256=plan.sha256,
        command=command,
        progress=progress,
        total=plan.characters,
        reading=plan.reading,
    )


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, list[tuple[Path, int]]]]:
    """The manifest of a finished folder and its shards, (file, tokens), by split.

    The hashes are not checked here; running ``diffrwkv.prepare`` again with the same arguments
    does.

    Raises:
      ValueError: the folder is not finished, or a shard is missing.
    """
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise ValueError(
            f"{folder} is not finished; run this again to go on with it: {manifest['command']}"
        )
    shards = {}
    for split, entry in manifest["splits"].items():
        shards[split] = [(folder / shard["file"], shard["tokens"]) for shard in entry["shards"]]
        for path, _ in shards[split]:
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing; run this again to make it: {manifest['command']}"
                )
    return manifest, shards
