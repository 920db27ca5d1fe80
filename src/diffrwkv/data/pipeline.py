"""From text to batches: ``load`` makes a ``Dataset``, ``train_iterator`` and ``validation_batches``
feed from it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv.checks import check_seed
from diffrwkv.data import manifest as manifests
from diffrwkv.data import shards, sources, tokenizers
from diffrwkv.data.readers import Reading, total_skipped
from diffrwkv.data.splits import Tally, sha256_of_splits
from diffrwkv.data.tokenizers import Tokenizer


class TokenStore:
    """A row of tokens, in memory or in .npy files that are mapped when first read.

    Pickling keeps the names of the files, not their content.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray | Path],
        lengths: Sequence[int] | None = None,
        *,
        scattered: bool = False,
    ):
        """``scattered``: files are read here and there, so the system should read no further ahead."""
        self._parts = list(parts)
        if lengths is None:
            lengths = [len(part) for part in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
        self._scattered = scattered
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _part(self, i: int) -> np.ndarray:
        part = self._parts[i]
        if isinstance(part, np.ndarray):
            return part
        if i not in self._maps:
            try:
                row = np.load(part, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(f"{part} cannot be read any more ({error})") from None
            if len(row) != self._starts[i + 1] - self._starts[i]:
                raise ValueError(f"{part} has become another file while it was in use")
            if self._scattered and hasattr(mmap, "MADV_RANDOM") and isinstance(row.base, mmap.mmap):
                row.base.madvise(mmap.MADV_RANDOM)
            self._maps[i] = row
        return self._maps[i]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of {len(self)}")
        out = np.empty(stop - start, np.int32)
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < stop:
            low = int(self._starts[i])
            high = min(stop, int(self._starts[i + 1]))
            out[at - start : high - start] = self._part(i)[at - low : high - low]
            at, i = max(at, high), i + 1
        return out

    def blocks(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """All tokens in order, ``size`` at a time."""
        store = TokenStore(self._parts, np.diff(self._starts))  # with maps of its own, that are read ahead
        for start in range(0, len(self), size):
            yield store.read(start, min(start + size, len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


@dataclass(frozen=True)
class Chunks:
    """Non-overlapping chunks of one row of tokens; the remainder at its end is dropped.

    ``chunks[i]`` is int32 [length]. With ``wrap`` it is [BOS] + length - 2 tokens + [EOS] (MDLM,
    arXiv 2406.07524, its ``_group_texts``). Every position is valid: BOS and EOS are noised and
    counted as in MDLM.
    """

    store: TokenStore
    tokenizer: Tokenizer
    length: int
    wrap: bool

    @property
    def body(self) -> int:
        """Tokens of text per chunk."""
        return self.length - 2 if self.wrap else self.length

    def __len__(self) -> int:
        return len(self.store) // self.body

    def at(self, start: int) -> np.ndarray:
        """The chunk whose text begins at any token, int32 [length]."""
        tokens = self.store.read(start, start + self.body)
        if self.wrap:
            tokens = np.concatenate(
                [[self.tokenizer.bos_id], tokens, [self.tokenizer.eos_id]]
            ).astype(np.int32)
        return tokens

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"chunk {i} of {len(self)}")
        return self.at(i * self.body)

    def valid(self, i: int) -> np.ndarray:
        """Which positions hold text, bool [length]: all."""
        return np.ones(self.length, bool)

    def count_valid(self) -> int:
        """Valid positions of all chunks together."""
        return len(self) * self.length

    def dropped(self) -> np.ndarray:
        """The tokens of text that no chunk has, int32."""
        return self.store.read(len(self) * self.body, len(self.store))


class Documents:
    """One document per row, padded on the right; a longer document takes several rows, so no text
    is lost.

    ``documents[i]`` is int32 [length], padding is ``tokenizer.pad_id`` where ``valid(i)`` is False.
    With ``wrap`` a row is [BOS] + up to length - 2 tokens + [EOS]; without, up to ``length``
    tokens, the document's EOS the last of them.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, length: int, wrap: bool):
        self.store, self.tokenizer, self.length, self.wrap = store, tokenizer, length, wrap
        body = length - 2 if wrap else length
        found, at = [np.zeros(0, np.int64)], 0
        for block in store.blocks():
            found.append(np.flatnonzero(block == tokenizer.eos_id) + at)
            at += len(block)
        ends = np.concatenate(found)
        begins = np.concatenate([[0], ends + 1])[: len(ends)]
        stops = ends if wrap else ends + 1
        rows = -((begins - stops) // body)  # of each document: its length over body, rounded up
        row = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        self._starts = np.repeat(begins, rows) + row * body
        self._stops = np.minimum(self._starts + body, np.repeat(stops, rows))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        tokens = self.store.read(int(self._starts[i]), int(self._stops[i]))
        out = np.full(self.length, self.tokenizer.pad_id, np.int32)
        if self.wrap:
            out[0] = self.tokenizer.bos_id
            out[1 : len(tokens) + 1] = tokens
            out[len(tokens) + 1] = self.tokenizer.eos_id
        else:
            out[: len(tokens)] = tokens
        return out

    def valid(self, i: int) -> np.ndarray:
        """Which positions hold text, BOS or EOS, bool [length]."""
        return np.arange(self.length) < self._stops[i] - self._starts[i] + (2 if self.wrap else 0)

    def count_valid(self) -> int:
        """Valid positions of all rows together."""
        return int((self._stops - self._starts).sum()) + (2 * len(self) if self.wrap else 0)

    def dropped(self) -> np.ndarray:
        """The tokens of text that no row has: none."""
        return np.zeros(0, np.int32)


@dataclass(frozen=True)
class Dataset:
    """Text cut into chunks of one length.

    Attributes:
      tokenizer: what made the ids.
      train, validation: random-access sources; ``[i]`` is int32 [length], ``valid(i)`` bool
        [length], ``len`` the number of chunks.
      test: the same for a data set that has a test split, else None.
      info: what to record with a run, JSON types: ``name``, ``sha256`` of the text (of the file,
        for one document), ``characters_per_token``, the tokenizer's name and fingerprint, and for
        each split ``documents``, ``characters``, ``sha256``, ``chunks``, and of the chunks
        ``tokens`` (valid positions, BOS and EOS counted) and ``chunk_characters``.
        ``python_reference`` adds ``python``, its version; a folder ``ignored``, which of its files
        are not read; ``on_error="skip"`` adds ``skipped``, which records are not.
      train_offsets: "chunks" or "random"; see ``load``.
    """

    tokenizer: Tokenizer
    train: Chunks | Documents
    validation: Chunks | Documents
    test: Chunks | Documents | None = None
    info: dict[str, Any] = field(default_factory=dict)
    train_offsets: str = "chunks"

    @property
    def length(self) -> int:
        return self.train.length

    @property
    def characters_per_token(self) -> float:
        """Characters of the validation chunks per valid token of them: turns nats per token into
        bits per character.

        1.0 for characters without wrapping. BOS and EOS are tokens without characters, so with them
        it is lower.
        """
        return self.info["characters_per_token"]


Counts = dict[str, Any]

# Bytes of text above which tokens are kept in the cache: what takes more than a second or two.
CACHE_ABOVE = {"char": 1 << 26, "byte": 1 << 26, "gpt2": 1 << 22, "bpe": 1 << 21}


def cache_folder() -> Path:
    """Where tokens are kept between runs: ``$DIFFRWKV_CACHE``, else ``~/.cache/diffrwkv``."""
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
        store = TokenStore(
            [path for path, _ in parts], [tokens for _, tokens in parts], scattered=split == "train"
        )
        entry = manifest["splits"][split]
        splits[split] = store, {key: entry[key] for key in ("documents", "characters", "sha256")}
    return manifest, tokenizer, splits


def _slug(name: str, tokenizer: str | Tokenizer) -> str:
    spec = tokenizer if isinstance(tokenizer, str) else tokenizer.name
    return re.sub(r"[/:]", "-", name.removeprefix("hf:")) + "-" + spec.replace(":", "")


def find_prepared(
    name: str, root: str | os.PathLike | None, tokenizer: str | Tokenizer
) -> Path | None:
    """The folder of shards that a name means (a path, or NAME-TOKENIZER), or None."""
    if not name:
        return None
    folder, slug = sources.data_root(root), _slug(name, tokenizer)
    places = [Path(os.path.expanduser(name)), folder / name] if name not in sources.DATASETS else []
    for place in [*places, folder / slug, folder / "prepared" / slug]:
        if (place / manifests.MANIFEST).is_file():
            return place
    return None


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
) -> Dataset:
    """Finds (or downloads) text, tokenizes it, and cuts it into chunks: ``load(**config.data)``.

    Args:
      name: a name in ``DATASETS``, or a path to a file or folder of text, JSON, csv or parquet,
        plain or compressed (see ``readers`` and ``folders``), or a pattern, or a folder that
        ``diffrwkv.prepare`` made (which decides itself what validates, and under which
        ``text_key``). Relative paths are looked for in the working directory, then in the data
        folder.
      root: the data folder. None: the environment variable DIFFRWKV_DATA, else
        ``~/.cache/diffrwkv``.
      tokenizer: ``"char"``, ``"byte"``, ``"gpt2"``, ``"bpe:N"``, or a Tokenizer, such as a
        checkpoint's own.
      length: tokens per chunk, BOS and EOS counted.
      wrap: cut chunks of length - 2 and put BOS before and EOS after each, as MDLM does on
        OpenWebText.
      validation: a data set, path or pattern to validate on instead of a part of ``name``; it is
        read whole.
      validation_fraction: the last part of the characters that is kept for validation, where the
        data set has no validation split of its own. See ``splits.divide``.
      packing: ``"concat"`` joins documents by EOS (a blank line, where the tokenizer has no EOS)
        and cuts the row into chunks; ``"document"`` puts each document in rows of its own, padded,
        ``valid`` False at the padding.
      train_offsets: where training chunks begin: ``"chunks"``: at multiples of their length, so an
        epoch shows every token once; ``"random"``: anywhere, drawn anew each time, as many
        character-level peers do.
      text_key: the key or column that holds the text in JSON, csv and parquet files.
      on_error: what a record does that is broken or has no text: ``"stop"`` raises, ``"skip"``
        leaves it out and counts it in ``info["skipped"]``.
      max_document_bytes: the longest record that is read; a longer one is a bad record. A file of
        text is read in pieces, however long it is.

    Raises:
      ValueError: a bad argument; text that is empty, not UTF-8, or shorter than one chunk; a bad
        record; an unknown name.
      FileNotFoundError: a named data set is neither in the data folder nor downloadable.
    """
    if length < (3 if wrap else 1):
        raise ValueError(
            f"config.data.length must be at least {3 if wrap else 1}{' with wrap' * wrap}, not "
            f"{length}"
        )
    if packing not in ("concat", "document"):
        raise ValueError(f"config.data.packing must be 'concat' or 'document', not {packing!r}")
    if train_offsets not in ("chunks", "random"):
        raise ValueError(
            f"config.data.train_offsets must be 'chunks' or 'random', not {train_offsets!r}"
        )
    if packing == "document" and train_offsets == "random":
        raise ValueError(
            "config.data.train_offsets='random' needs packing='concat': documents begin at their "
            "start"
        )
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
        )
        tokenizer, info, skipped, splits = _tokenize(
            plan, tokenizer, root, specials=wrap or packing == "document"
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
            info["sha256"] = sha256_of_splits(
                counts["sha256"] for _, counts in splits.values()
            )

    if tokenizer.eos_id is None and (wrap or packing == "document"):
        need = "wrap=True" if wrap else "packing='document'"
        raise ValueError(
            f"config.data.{need} needs a tokenizer with BOS and EOS, and {tokenizer!r} has none"
        )
    if skipped:
        info["skipped"] = total_skipped(skipped)
    info |= {"tokenizer": tokenizer.name, "tokenizer_fingerprint": tokenizer.fingerprint}
    info |= {"vocab_size": tokenizer.vocab_size, "length": length, "wrap": wrap, "packing": packing}
    cut = Documents if packing == "document" else Chunks
    chunked = {}
    for split, (store, counts) in splits.items():
        chunked[split] = chunks = cut(store, tokenizer, length, wrap)
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
    info["characters_per_token"] = (
        info["validation"]["chunk_characters"] / info["validation"]["tokens"]
    )
    return Dataset(
        tokenizer,
        chunked["train"],
        chunked["validation"],
        chunked.get("test"),
        info,
        train_offsets=train_offsets,
    )


def _tokenize(
    plan: sources.Plan,
    tokenizer: str | Tokenizer,
    root: str | os.PathLike | None,
    *,
    specials: bool,
) -> tuple[Tokenizer, dict[str, Any], dict[str, Any], dict[str, tuple[TokenStore, Counts]]]:
    """Tokenizes a plan's text: in memory if that is quick, else into the cache, where the next run
    finds it.
    """
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
    sha256 = plan.sha256 or sha256_of_splits(
        counts["sha256"] for _, counts in splits.values()
    )
    return tokenizer, {"name": plan.name, **plan.info, "sha256": sha256}, plan.reading.skipped, splits


def _check_tokenizer(folder: Path, manifest: dict[str, Any], tokenizer: str | Tokenizer) -> None:
    have = manifest["tokenizer_name"]
    if isinstance(tokenizer, str) and tokenizer != have:
        raise ValueError(
            f"{folder} was prepared with tokenizer {have!r}, not {tokenizer!r}; set "
            f"config.data.tokenizer to {have!r} or prepare the text again"
        )
    if (
        isinstance(tokenizer, Tokenizer)
        and tokenizer.fingerprint != manifest["tokenizer_fingerprint"]
    ):
        raise ValueError(
            f"{folder} was prepared with tokenizer {have!r}, whose vocabulary is not that of "
            f"{tokenizer!r}; prepare the text again with the right one"
        )


def _refuse_unprepared(
    name: str, root: str | os.PathLike | None, tokenizer: str | Tokenizer
) -> None:
    """Large data sets are tokenized once, by a program of their own."""
    if name.startswith("hf:") or (name in sources.DATASETS and sources.DATASETS[name].prepared):
        spec = tokenizer if isinstance(tokenizer, str) else tokenizer.name
        folder = sources.data_root(root) / _slug(name, tokenizer)
        raise FileNotFoundError(
            f"data set {name!r} is large and must be tokenized first; it is not in {folder}. Run: "
            f"python -m diffrwkv.prepare --input {name} --tokenizer {spec} --output {folder}   (or "
            "set DIFFRWKV_DATA to the folder that has it)"
        )


class _Records:
    """Grain's view of a source: ``[i]`` is {"tokens", "valid"}."""

    def __init__(self, source: Chunks | Documents):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"tokens": self._source[i], "valid": self._source.valid(i)}


class _Count:
    """A source of chunk numbers, for chunks that begin anywhere."""

    def __init__(self, n: int):
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> int:
        return i


class _AnyOffset:
    """A chunk that begins at a random token; ``rng`` is Grain's, a function of seed and position in
    the stream.
    """

    def __init__(self, source: Chunks):
        self._source = source

    def __call__(self, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        start = int(rng.integers(0, len(self._source.store) - self._source.body + 1))
        return {"tokens": self._source.at(start), "valid": self._source.valid(0)}


def train_iterator(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_threads: int = 2,
    prefetch: int = 16,
):
    """An endless Grain iterator of training batches, shuffled anew each epoch.

    Yields ``{"tokens": int32 [b, length], "valid": bool [b, length]}`` with b = batch_size /
    process_count. The order is a function of ``seed`` alone: the processes together see exactly
    what one process would. ``get_state`` gives JSON types that ``set_state`` of an equal iterator
    resumes from exactly; with ``num_workers`` > 0 only with the same number of workers.

    Args:
      batch_size: the global batch.
      num_workers: worker processes; 0 reads in this one, with ``num_threads`` threads that stay
        ``prefetch`` chunks ahead.

    Raises:
      ValueError: ``batch_size`` is not a positive multiple of ``process_count``, or ``seed`` is not
        in [0, 2**32).
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    check_seed(seed)
    source = dataset.train
    random = dataset.train_offsets == "random"
    stream = grain.MapDataset.source(_Count(len(source)) if random else _Records(source)).seed(seed)
    stream = stream.shuffle().repeat(None)
    if random:
        stream = stream.random_map(_AnyOffset(source))
    # repeat() is sys.maxsize long, which batch(1) rounds, as a float, to more than a length may be
    stream = stream[process_index : 1 << 52 : process_count].batch(batch_size // process_count)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    batches = stream.to_iter_dataset(options)
    if num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's worker processes are sent the flags
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(batches)


class validation_batches:
    """Every validation chunk once, in order; iterate as often as you like.

    Yields ``{"tokens": int32 [b, length], "valid": bool [b, length]}``, b = batch_size /
    process_count: this process's rows of each global batch. The last batch is filled with rows that
      are valid nowhere.

    Args:
      batch_size: the global batch.
      limit: only the first so many chunks.
      split: ``"validation"``, ``"test"`` or ``"train"``.

    Raises:
      ValueError: a bad batch_size or limit, or a split that the data set lacks.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        limit: int | None = None,
        split: str = "validation",
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size {batch_size} must be a positive multiple of the {process_count} "
                "processes"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 chunk, not {limit}")
        self._source = (
            getattr(dataset, split, None) if split in ("train", "validation", "test") else None
        )
        if self._source is None:
            raise ValueError(f"the data set has no {split!r} split")
        self._pad_id = dataset.tokenizer.pad_id
        self._batch_size = batch_size
        self._rows = range(
            process_index * batch_size // process_count,
            (process_index + 1) * batch_size // process_count,
        )
        self.num_chunks = len(self._source) if limit is None else min(limit, len(self._source))

    def __len__(self) -> int:
        return -(-self.num_chunks // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        shape = (len(self._rows), self._source.length)
        for start in range(0, self.num_chunks, self._batch_size):
            tokens, valid = np.full(shape, self._pad_id, np.int32), np.zeros(shape, bool)
            for row, i in enumerate(start + r for r in self._rows):
                if i < self.num_chunks:
                    tokens[row], valid[row] = self._source[i], self._source.valid(i)
            yield {"tokens": tokens, "valid": valid}
