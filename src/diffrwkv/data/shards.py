"""Tokens on disk: .npy shards and a manifest that says what they are.

A folder holds `manifest.json` and, per split, `train-00000.npy`, `train-00001.npy`, ...: rows
of uint16 tokens (uint32 where the vocabulary needs it) that are mapped, not read. Everything
appears whole or not at all: a shard is renamed into place, then the manifest that lists it. What
the manifest lists is done; so a run that was killed goes on at the first shard that is missing or
damaged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv.data import tokenizers
from diffrwkv.data.manifest import (
    FORMAT,
    MANIFEST,
    check_inputs,
    find_damage,
    locked,
    read_manifest,
    replace,
    shard_name,
    stat_of,
    tokenizer_of,
    write_manifest,
)
from diffrwkv.data.sources import Plan
from diffrwkv.data.splits import Tally, sha256_of_splits
from diffrwkv.data.text import Reader
from diffrwkv.data.tokenizers import Tokenizer
from diffrwkv.files import file_sha256

SHARD_TOKENS = 1 << 25
BPE_CHARACTERS = 1 << 28  # of training text that a bpe:N vocabulary is learned from


def check_same(folder: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, if a folder was prepared with other settings."""
    for key, value in want.items():
        if have.get(key) != value:
            raise ValueError(
                f"{folder} was prepared with {key} {have.get(key)!r}, not {value!r}; name another "
                "output folder, or delete this one"
            )


def _write(
    folder: Path,
    manifest: dict[str, Any],
    plan: Plan,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int,
    progress: bool,
) -> dict[str, Any]:
    """Tokenizes what the manifest does not list yet, and returns it complete."""
    from tqdm import tqdm

    write_manifest(folder, manifest)
    with tqdm(
        total=plan.characters,
        unit="char",
        unit_scale=True,
        desc="tokenizing",
        disable=None if progress else True,
    ) as bar:
        for split, reader in plan.readers.items():
            entry = manifest["splits"][split]
            if "tokens" in entry:  # a split that is done
                bar.update(entry["characters"])
                continue
            for shard in _shards(folder, split, reader, tokenizer, entry["shards"], shard_tokens, bar):
                manifest["skipped"] = {**manifest["skipped"], **plan.reading.skipped}
                if shard["tokens"]:
                    entry["shards"].append(shard)
                    write_manifest(folder, manifest)
                entry |= {key: shard["until"][key] for key in ("documents", "characters", "sha256")}
            entry["tokens"] = sum(shard["tokens"] for shard in entry["shards"])
    check_inputs(folder, manifest, plan.files)  # while they were read
    manifest["sha256"] = plan.sha256 or sha256_of_splits(entry["sha256"] for entry in manifest["splits"].values())
    manifest["complete"] = True
    write_manifest(folder, manifest)
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
    """Writes the shards after `done` and yields what the manifest says of each; the last may have no tokens.

    `until` tells how far into the text a shard reaches, so that the next run can pass over as
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
                f"the {split} text has changed since {folder} was begun; name another output folder, or delete this one"
            )
    rows: list[np.ndarray] = []
    size, index = 0, len(done)

    def save() -> dict[str, Any]:
        shard: dict[str, Any] = {"file": shard_name(split, index), "tokens": size}
        if size:
            row = np.concatenate(rows)
            replace(folder / shard["file"], lambda file: np.save(file, row))
            shard["sha256"] = file_sha256(folder / shard["file"])
            shard["max_id"] = int(row.max())
        keys = ("pieces", "documents", "characters", "sha256")
        return {**shard, "until": {key: getattr(tally, key) for key in keys}}

    encoded = tokenizers.encode_documents(tokenizer, pieces, between=tally.between, done=tally.documents)
    for text, ids, ends in encoded:
        tally.add(text, ends)
        bar.update(len(text))
        rows.append(ids.astype(tokenizer.dtype))
        size += len(ids)
        if size >= shard_tokens:
            yield save()
            rows, size, index = [], 0, index + 1
    yield save()


def make_tokenizer(spec: str, plan: Plan, *, specials: bool, root: str | os.PathLike | None = None) -> Tokenizer:
    """The tokenizer of a specification for the text of a plan.

    A char alphabet is that of all splits, so that validation has no unknown character; bpe:N is
    trained on the first `BPE_CHARACTERS` characters of the training text.
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

    return tokenizers.make(spec, all_text() if kind == "char" else training_text(), specials=specials, root=root)


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
    wait: Callable[[str], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tokenizes the text of a plan into shards in `folder`, or goes on where a run before stopped.

    A shard has about `shard_tokens` tokens, whole pieces of text. Returns the manifest.

    Args:
      tokenizer: a specification, or a Tokenizer. A trained one is taken from the folder if that was
        begun before.
      specials: whether a char tokenizer that is made here gets BOS and EOS.
      command: what to run again, for messages.
      wait: is called with a line before another process that prepares this folder is waited for;
        None: that is an error.
      tell: is called with lines about what was found.

    Raises:
      ValueError: the folder was begun with other settings or another tokenizer, the text has
        changed since, or another process prepares it.
      OSError: a file cannot be read or written.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, not {shard_tokens}")
    if isinstance(tokenizer, str):
        tokenizers.parse(tokenizer)
    settings = json.loads(json.dumps({**plan.settings, "shard_tokens": shard_tokens}))

    def begun() -> tuple[dict[str, Any], Tokenizer, dict[str, str]]:
        """The manifest that is there, its tokenizer, and what is damaged."""
        manifest = read_manifest(folder)
        name = tokenizer if isinstance(tokenizer, str) else tokenizer.name
        check_same(folder, {"tokenizer": manifest["tokenizer_name"]}, {"tokenizer": name})
        if isinstance(tokenizer, Tokenizer):
            check_same(folder, manifest, {"tokenizer_fingerprint": tokenizer.fingerprint})
        check_same(folder, manifest["settings"], settings)
        check_inputs(folder, manifest, plan.files)
        if manifest["complete"] and plan.sha256 not in (None, manifest["sha256"]):
            raise ValueError(
                f"the text has changed since {folder} was prepared; name another output folder, or delete this one"
            )
        made = tokenizer_of(folder, manifest, root) if isinstance(tokenizer, str) else tokenizer
        return manifest, made, find_damage(folder, manifest, made)

    if (folder / MANIFEST).exists():
        manifest, _, damage = begun()
        if manifest["complete"] and not damage:
            tell(f"{folder} is finished, and its shards are as they were written")
            return manifest
    with locked(folder, wait):
        if (folder / MANIFEST).exists():
            manifest, made, damage = begun()
            for name, reason in damage.items():
                tell(f"{folder / name} {reason}: it is made again")
            for entry in manifest["splits"].values():
                for i, shard in enumerate(entry["shards"]):
                    if shard["file"] in damage:
                        del entry["shards"][i:]
                        entry.pop("tokens", None)
                        manifest["complete"] = False
                        break
            if manifest["complete"]:  # by the process that was waited for
                return manifest
        else:
            if isinstance(tokenizer, str):
                made = make_tokenizer(tokenizer, plan, specials=specials, root=root)
            else:
                made = tokenizer
            manifest = {
                "format": FORMAT,
                "complete": False,
                "command": command,
                "info": {"name": plan.name, **plan.info},
                "settings": settings,
                "inputs": [
                    {"file": str(path), "stat": stat_of(path), "sha256": file_sha256(path)} for path in plan.files
                ],
                "skipped": {},
                "tokenizer_name": made.name,
                "tokenizer_fingerprint": made.fingerprint,
                "tokenizer": made.to_json(),
                "dtype": made.dtype.name,
                "splits": {split: {"shards": []} for split in plan.readers},
            }
        return _write(folder, manifest, plan, made, shard_tokens=shard_tokens, progress=progress)


def open_folder(folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, list[tuple[Path, int]]]]:
    """The manifest of a finished folder and its shards, (file, tokens), by split, all verified.

    Args:
      tokenizer: that of the folder; see `tokenizer_of`.

    Raises:
      ValueError: the folder is not finished, or a shard is missing or damaged.
    """
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise ValueError(f"{folder} is not finished; run this again to go on with it: {manifest['command']}")
    damage = find_damage(folder, manifest, tokenizer)
    for name, reason in sorted(damage.items(), key=lambda item: item[1] != "is missing"):
        raise ValueError(f"{folder / name} {reason}; run this again to make it: {manifest['command']}")
    shards = {
        split: [(folder / shard["file"], shard["tokens"]) for shard in entry["shards"]]
        for split, entry in manifest["splits"].items()
    }
    return manifest, shards
