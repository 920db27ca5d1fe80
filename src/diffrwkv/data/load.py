"""`load`: from the name of a data set, or a path, to a `Dataset`.

The tokens come from a folder that `diffrwkv.prepare` made, from the cache, or from the text itself. Text that
takes more than a moment to tokenize goes into the cache, where the next run finds its tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv.data import manifest as manifests
from diffrwkv.data import shards, sources, tokenizers
from diffrwkv.data.chunks import Chunks, Dataset, Documents, Pairs, TokenStore
from diffrwkv.data.readers import Reading, total_skipped
from diffrwkv.data.splits import Tally, sha256_of_splits
from diffrwkv.data.tokenizers import Tokenizer

Counts = dict[str, Any]

# Bytes of text above which tokens are kept in the cache: what takes more than a second or two.
CACHE_ABOVE = {"char": 1 << 26, "byte": 1 << 26, "gpt2": 1 << 22}
CACHE_ABOVE |= dict.fromkeys(("bpe", "world", "json"), 1 << 21)


def cache_folder() -> Path:
    """Where tokens are kept between runs: `$DIFFRWKV_CACHE`, else `~/.cache/diffrwkv`."""
    return manifests.cache_root() / "tokens"


def _in_memory(reader: sources.Reader, tokenizer: Tokenizer) -> tuple[TokenStore, Counts]:
    """Tokenizes a split; counts documents and characters, hashes the text."""
    tally, rows = Tally(), []
    for text, ids, ends in tokenizers.encode_documents(tokenizer, reader()):
        tally.add(text, ends)
        rows.append(ids.astype(tokenizer.dtype))
    store = TokenStore([np.concatenate(rows)] if rows else [])
    return store, {
        "documents": tally.documents,
        "characters": tally.characters,
        "sha256": tally.sha256,
    }


def _on_disk(
    folder: Path, tokenizer: str | Tokenizer, root: str | os.PathLike | None
) -> tuple[dict[str, Any], Tokenizer, dict[str, tuple[TokenStore, Counts]]]:
    """The manifest of a prepared folder, its tokenizer, and the tokens and counts of each split.

    Raises:
      ValueError: it was prepared with another tokenizer, or is damaged.
    """
    manifest = manifests.read_manifest(folder)
    _check_tokenizer(folder, manifest, tokenizer)
    if isinstance(tokenizer, str):
        tokenizer = manifests.tokenizer_of(folder, manifest, root)
    manifest, files = shards.open_folder(folder, tokenizer)
    splits = {}
    for split, parts in files.items():
        store = TokenStore([path for path, _ in parts], [tokens for _, tokens in parts], scattered=split == "train")
        entry = manifest["splits"][split]
        splits[split] = store, {key: entry[key] for key in ("documents", "characters", "sha256")}
    return manifest, tokenizer, splits


def _slug(name: str, tokenizer: str | Tokenizer) -> str:
    spec = tokenizer if isinstance(tokenizer, str) else tokenizer.name
    return re.sub(r"[/:]", "-", name.removeprefix("hf:")) + "-" + spec.replace(":", "")


def find_prepared(name: str, root: str | os.PathLike | None, tokenizer: str | Tokenizer) -> Path | None:
    """The folder of shards that a name means (a path, or NAME-TOKENIZER), or None."""
    if not name:
        return None
    folder, slug = sources.data_root(root), _slug(name, tokenizer)
    places = [Path(os.path.expanduser(name)), folder / name] if name not in sources.DATASETS else []
    for place in [*places, folder / slug, folder / "prepared" / slug]:
        if (place / manifests.MANIFEST).is_file():
            return place
    return None


def check_name(name: str, root: str | os.PathLike | None, tokenizer: str | Tokenizer) -> None:
    """Raises ValueError for a name that is none and no path either, without reading what it names."""
    if find_prepared(name, root, tokenizer) is None:
        sources.check_name(name, root)


def load(
    name: str = "python_reference",
    root: str | os.PathLike | None = None,
    tokenizer: str | Tokenizer = "char",
    length: int = 256,
    wrap: bool = False,
    validation: str | None = None,
    validation_fraction: float = 0.1,
    packing: str = "concat",
    train_offsets: str = "chunks",
    text_key: str = "text",
    on_error: str = "stop",
    max_document_bytes: int = Reading.max_document_bytes,
    prompt_key: str | None = None,
) -> Dataset:
    """Finds (or downloads) text, tokenizes it, and cuts it into chunks: `load(**config.data)`.

    Args:
      name: a name in `DATASETS`, `regular:LANGUAGE:LENGTH`, or a path to a file or folder of text,
        JSON, csv or parquet, plain or compressed (see `readers` and `folders`), or a pattern, or a folder that
        `diffrwkv.prepare` made (which decides itself what validates, and under which
        `text_key`). Relative paths are looked for in the working directory, then in the data
        folder.
      root: the data folder. None: the environment variable DIFFRWKV_DATA, else
        `~/.cache/diffrwkv`.
      tokenizer: one of `tokenizers.FORMS`, or a Tokenizer, such as a checkpoint's own.
      length: tokens per chunk, BOS and EOS counted.
      wrap: cut chunks of length - 2 and put BOS before and EOS after each, as MDLM does on
        OpenWebText.
      validation: a data set, path or pattern to validate on instead of a part of `name`; it is
        read whole.
      validation_fraction: the last part of the characters that is kept for validation, where the
        data set has no validation split of its own. See `splits.divide`.
      packing: `"concat"` joins documents by EOS (a blank line, where the tokenizer has no EOS)
        and cuts the row into chunks; `"document"` puts each document in rows of its own, padded,
        `valid` False at the padding.
      train_offsets: where training chunks begin: `"chunks"`: at multiples of their length, so an
        epoch shows every token once; `"random"`: anywhere, drawn anew each time, as many
        character-level peers do.
      text_key: the key or column that holds the text in JSON, csv and parquet files.
      prompt_key: that of a prompt, whose answer the text is (JSON, csv; packing="document"): a row is a prompt and its
        answer, of which the answer alone is noised and counted. What has no room in a row is a bad record.
      on_error: what a record does that is broken or has no text: `"stop"` raises, `"skip"`
        leaves it out and counts it in `info["skipped"]`.
      max_document_bytes: the longest record that is read; a longer one is a bad record. A file of
        text is read in pieces, however long it is.

    Raises:
      ValueError: a bad argument; text that is empty, not UTF-8, or shorter than one chunk; a bad
        record; an unknown name.
      FileNotFoundError: a named data set is neither in the data folder nor downloadable.
    """
    if length < (3 if wrap else 1):
        raise ValueError(f"config.data.length must be at least {3 if wrap else 1}{' with wrap' * wrap}, not {length}")
    if packing not in ("concat", "document"):
        raise ValueError(f"config.data.packing must be 'concat' or 'document', not {packing!r}")
    if train_offsets not in ("chunks", "random"):
        raise ValueError(f"config.data.train_offsets must be 'chunks' or 'random', not {train_offsets!r}")
    if packing == "document" and train_offsets == "random":
        raise ValueError("config.data.train_offsets='random' needs packing='concat': documents begin at their start")
    if prompt_key is not None and packing != "document":
        raise ValueError("config.data.prompt_key needs packing='document': a row is a prompt and its answer")
    if isinstance(tokenizer, str):
        tokenizers.parse(tokenizer)

    prepared = find_prepared(name, root, tokenizer)
    if prepared is None:
        _refuse_unprepared(name, root, tokenizer)
        plan = sources.plan(
            name,
            root,
            text_key=text_key,
            validation=validation,
            validation_fraction=validation_fraction,
            on_error=on_error,
            max_document_bytes=max_document_bytes,
            prompt_key=prompt_key,
        )
        tokenizer, info, skipped, splits = _tokenize(plan, tokenizer, root, specials=wrap or packing == "document")
    elif prompt_key is not None:
        raise ValueError(
            f"{prepared} was prepared as text without prompts: name the file of prompts and answers itself"
        )
    else:
        manifest, tokenizer, splits = _on_disk(prepared, tokenizer, root)
        info = {**manifest["info"], "sha256": manifest["sha256"]}
        skipped = dict(manifest["skipped"])
        if validation is not None:
            other = find_prepared(validation, root, tokenizer)
            if other is None:
                reading = Reading(text_key, on_error, max_document_bytes)
                source = sources.open_source(validation, root, reading=reading)
                splits["validation"] = _in_memory(sources.held_out(source), tokenizer)
                skipped |= reading.skipped
            else:
                splits["validation"] = _on_disk(other, tokenizer, root)[2]["validation"]
            info["sha256"] = sha256_of_splits(counts["sha256"] for _, counts in splits.values())

    if tokenizer.eos_id is None and (wrap or packing == "document"):
        need = "wrap=True" if wrap else "packing='document'"
        raise ValueError(f"config.data.{need} needs a tokenizer with BOS and EOS, and {tokenizer!r} has none")
    if word := info.get("word_length"):
        body = length - 2 if wrap else length
        if body != word or packing != "concat" or train_offsets != "chunks":
            raise ValueError(
                f"a row of {name!r} is one word: set config.data.length to {word + 2 if wrap else word}, "
                "config.data.packing to 'concat' and config.data.train_offsets to 'chunks'"
            )
    if skipped:
        info["skipped"] = total_skipped(skipped)
    info |= {"tokenizer": tokenizer.name, "tokenizer_fingerprint": tokenizer.fingerprint}
    info |= {"vocab_size": tokenizer.vocab_size, "length": length, "wrap": wrap, "packing": packing}
    if prompt_key is not None:
        info["counted"] = "answers"
    cut = Pairs if prompt_key is not None else Documents if packing == "document" else Chunks
    chunked = {}
    for split, (store, counts) in splits.items():
        chunked[split] = chunks = cut(store, tokenizer, length, wrap)
        if isinstance(chunks, Pairs):
            info[split] = _count_pairs(name, split, chunks, counts, on_error)
            continue
        if len(chunks) == 0:
            raise ValueError(
                f"the {split} text of data set {name!r} has {len(store)} tokens: shorter than one "
                f"chunk of {length}; give more text, a smaller config.data.length, or another "
                "config.data.validation_fraction"
            )
        characters = counts["characters"]
        if tokenizer.eos_id is None:
            characters += len(tokenizers.BLANK_LINE) * (counts["documents"] - 1)
        characters -= len(tokenizer.decode(chunks.dropped()))
        info[split] = {
            **counts,
            "chunks": len(chunks),
            "tokens": chunks.count_valid(),
            "chunk_characters": characters,
        }
    info["characters_per_token"] = info["validation"]["chunk_characters"] / info["validation"]["tokens"]
    return Dataset(
        tokenizer,
        chunked["train"],
        chunked["validation"],
        chunked.get("test"),
        info,
        train_offsets=train_offsets,
    )


def _count_pairs(name: str, split: str, pairs: Pairs, counts: Counts, on_error: str) -> Counts:
    """What `Dataset.info` says of a split of prompts and answers. Raises ValueError for pairs without room."""
    if pairs.too_long and (on_error == "stop" or not len(pairs)):
        raise ValueError(
            f"{pairs.too_long} pairs of prompt and answer in the {split} text of {name!r} have more than "
            f"{pairs.length} tokens: raise config.data.length, or leave them out with config.data.on_error='skip'"
        )
    return {
        **counts,
        "documents": counts["documents"] // 2,
        "too_long": pairs.too_long,
        "chunks": len(pairs),
        "tokens": pairs.count_valid(),
        "chunk_characters": pairs.characters(),
    }


def _tokenize(
    plan: sources.Plan,
    tokenizer: str | Tokenizer,
    root: str | os.PathLike | None,
    *,
    specials: bool,
) -> tuple[Tokenizer, dict[str, Any], dict[str, Any], dict[str, tuple[TokenStore, Counts]]]:
    """Tokenizes a plan's text: in memory if that is quick, else into the cache, where the next run finds it."""
    kind = tokenizers.parse(tokenizer)[0] if isinstance(tokenizer, str) else tokenizer.type
    if plan.size > CACHE_ABOVE[kind]:
        times = [[str(path.resolve()), path.stat().st_mtime_ns] for path in plan.files]
        spec = tokenizer if isinstance(tokenizer, str) else tokenizer.fingerprint
        key = json.dumps([manifests.FORMAT, plan.settings, times, spec, specials])
        stem = re.sub(r"[^A-Za-z0-9]+", "-", plan.name).strip("-")[-40:]
        folder = cache_folder() / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        shards.prepare(
            folder,
            plan,
            tokenizer,
            specials=specials,
            root=root,
            progress=True,
            command="load again",
            wait=functools.partial(print, file=sys.stderr, flush=True),
        )
        manifest, tokenizer, splits = _on_disk(folder, tokenizer, root)
        info = {**manifest["info"], "sha256": manifest["sha256"]}
        return tokenizer, info, manifest["skipped"], splits
    if isinstance(tokenizer, str):
        tokenizer = shards.make_tokenizer(tokenizer, plan, specials=specials, root=root)
    splits = {split: _in_memory(reader, tokenizer) for split, reader in plan.readers.items()}
    sha256 = plan.sha256 or sha256_of_splits(counts["sha256"] for _, counts in splits.values())
    return tokenizer, {"name": plan.name, **plan.info, "sha256": sha256}, plan.reading.skipped, splits


def _check_tokenizer(folder: Path, manifest: dict[str, Any], tokenizer: str | Tokenizer) -> None:
    have = manifest["tokenizer_name"]
    if isinstance(tokenizer, str) and tokenizer != have:
        raise ValueError(
            f"{folder} was prepared with tokenizer {have!r}, not {tokenizer!r}; set "
            f"config.data.tokenizer to {have!r} or prepare the text again"
        )
    if isinstance(tokenizer, Tokenizer) and tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
        raise ValueError(
            f"{folder} was prepared with tokenizer {have!r}, whose vocabulary is not that of "
            f"{tokenizer!r}; prepare the text again with the right one"
        )


def _refuse_unprepared(name: str, root: str | os.PathLike | None, tokenizer: str | Tokenizer) -> None:
    """Large data sets are tokenized once, by a program of their own."""
    if name.startswith("hf:") or (name in sources.DATASETS and sources.DATASETS[name].prepared):
        spec = tokenizer if isinstance(tokenizer, str) else tokenizer.name
        folder = sources.data_root(root) / _slug(name, tokenizer)
        raise FileNotFoundError(
            f"data set {name!r} is large and must be tokenized first; it is not in {folder}. Run: "
            f"python -m diffrwkv.prepare --input {name} --tokenizer {spec} --output {folder}   (or "
            "set DIFFRWKV_DATA to the folder that has it)"
        )
