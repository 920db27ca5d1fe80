"""Tokens cut into rows of one length: `Chunks` of one long row, `Documents` in rows of their own, or `Pairs` of them.

A `TokenStore` holds the tokens of a split, a `Dataset` the rows of all its splits.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv.data.tokenizers import Tokenizer


class TokenStore:
    """A row of tokens, in memory or in .npy files that are mapped when first read.

    Pickling keeps the names of the files, not their content.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray | Path],
        lengths: Sequence[int] | np.ndarray | None = None,
        *,
        scattered: bool = False,
    ):
        """Nothing is read yet.

        Args:
          parts: arrays, or files of them.
          lengths: of the parts; needed where one is a file.
          scattered: files are read here and there, so the system should read no further ahead.
        """
        self._parts = list(parts)
        if lengths is None:
            lengths = [len(part) for part in self._parts if isinstance(part, np.ndarray)]
            if len(lengths) < len(self._parts):
                raise TypeError("a TokenStore of files needs their lengths")
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
        """All tokens in order, `size` at a time."""
        store = TokenStore(self._parts, np.diff(self._starts))  # with maps of its own, that are read ahead
        for start in range(0, len(self), size):
            yield store.read(start, min(start + size, len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


@dataclass(frozen=True)
class Chunks:
    """Non-overlapping chunks of one row of tokens; the remainder at its end is dropped.

    `chunks[i]` is int32 [length]. With `wrap` it is [BOS] + length - 2 tokens + [EOS] (MDLM,
    arXiv 2406.07524, its `_group_texts`). Every position is valid: BOS and EOS are noised and
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
            bos, eos = self.tokenizer.wrapping()
            tokens = np.concatenate([[bos], tokens, [eos]]).astype(np.int32)
        return tokens

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"chunk {i} of {len(self)}")
        return self.at(i * self.body)

    def valid(self, i: int) -> np.ndarray:
        """Which positions hold text, bool [length]: all."""
        return np.ones(self.length, bool)

    scored = valid

    def count_valid(self) -> int:
        """Valid positions of all chunks together."""
        return len(self) * self.length

    def dropped(self) -> np.ndarray:
        """The tokens of text that no chunk has, int32."""
        return self.store.read(len(self) * self.body, len(self.store))


class Documents:
    """One document per row, padded on the right; a longer document takes several rows, so no text is lost.

    `documents[i]` is int32 [length], padding is `tokenizer.pad_id` where `valid(i)` is False.
    With `wrap` a row is [BOS] + up to length - 2 tokens + [EOS]; without, up to `length`
    tokens, the document's EOS the last of them.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, length: int, wrap: bool):
        self.store, self.tokenizer, self.length, self.wrap = store, tokenizer, length, wrap
        body = length - 2 if wrap else length
        begins, ends = _documents(store, tokenizer)
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
            bos, eos = self.tokenizer.wrapping()
            out[0], out[1 : len(tokens) + 1], out[len(tokens) + 1] = bos, tokens, eos
        else:
            out[: len(tokens)] = tokens
        return out

    def valid(self, i: int) -> np.ndarray:
        """Which positions hold text, BOS or EOS, bool [length]."""
        return np.arange(self.length) < self._stops[i] - self._starts[i] + (2 if self.wrap else 0)

    scored = valid

    def count_valid(self) -> int:
        """Valid positions of all rows together."""
        return int((self._stops - self._starts).sum()) + (2 * len(self) if self.wrap else 0)

    def stop(self, number: int) -> int:
        """How many tokens of the store the first `number` rows have; with `wrap` a document's EOS is of its last row.

        Args:
          number: at least 1.
        """
        stop = int(self._stops[number - 1])
        ends = self.wrap and self.store.read(stop, stop + 1)[0] == self.tokenizer.eos_id
        return stop + int(ends)

    def dropped(self) -> np.ndarray:
        """The tokens of text that no row has: none."""
        return np.zeros(0, np.int32)


class Pairs:
    """A prompt and its answer in each row, padded on the right, of a store in which they are documents in turn.

    `pairs[i]` is int32 [length]: the prompt, the answer and its EOS, with `wrap` a BOS before them. `scored(i)` is True
    at the answer and its EOS, `valid(i)` at all of it.

    Attributes:
      too_long: how many pairs have no room in a row, and are left out.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, length: int, wrap: bool):
        self.store, self.tokenizer, self.length, self.wrap = store, tokenizer, length, wrap
        begins, ends = (x.reshape(-1, 2) for x in _documents(store, tokenizer))
        self._prompts = (ends - begins)[:, 0]  # tokens of each
        self._answers = (ends - begins)[:, 1] + 1
        fits = wrap + self._prompts + self._answers <= length
        self.too_long = int(np.count_nonzero(~fits))
        self._starts, self._prompts, self._answers = begins[fits, 0], self._prompts[fits], self._answers[fits]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        start, prompt, answer = int(self._starts[i]), int(self._prompts[i]), int(self._answers[i])
        out = np.full(self.length, self.tokenizer.pad_id, np.int32)
        if self.wrap:
            out[0] = self.tokenizer.wrapping()[0]
        out[self.wrap : self.wrap + prompt] = self.store.read(start, start + prompt)
        begin = start + prompt + 1
        out[self.wrap + prompt : self.wrap + prompt + answer] = self.store.read(begin, begin + answer)
        return out

    def valid(self, i: int) -> np.ndarray:
        """Which positions hold a token of the pair, BOS or EOS, bool [length]."""
        return np.arange(self.length) < self.wrap + self._prompts[i] + self._answers[i]

    def scored(self, i: int) -> np.ndarray:
        """Which positions hold the answer or its EOS, bool [length]."""
        return self.valid(i) & (np.arange(self.length) >= self.wrap + self._prompts[i])

    def count_valid(self) -> int:
        """Positions of all answers together, those of EOS among them."""
        return int(self._answers.sum())

    def characters(self) -> int:
        """Characters of all answers together."""
        read = (self.store.read(s + p + 1, s + p + a) for s, p, a in self._each())
        return sum(len(self.tokenizer.decode(answer)) for answer in read)

    def _each(self) -> Iterator[tuple[int, int, int]]:
        rows = np.stack([self._starts, self._prompts, self._answers], axis=1)
        yield from (tuple(row) for row in rows.tolist())


def _documents(store: TokenStore, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Where each document begins, and where the EOS behind it is: int64 [n] each."""
    found, at = [np.zeros(0, np.int64)], 0
    for block in store.blocks():
        found.append(np.flatnonzero(block == tokenizer.eos_id) + at)
        at += len(block)
    ends = np.concatenate(found)
    return np.concatenate([[0], ends + 1])[: len(ends)], ends


@dataclass(frozen=True)
class Dataset:
    """Text cut into chunks of one length.

    Attributes:
      tokenizer: what made the ids.
      train, validation: random-access sources; `[i]` is int32 [length], `valid(i)` bool
        [length], `scored(i)` which of those count (all, but of a `Pairs`), `len` the number of chunks.
      test: the same for a data set that has a test split, else None.
      info: what to record with a run, JSON types: `name`, `sha256` of the text (of the file,
        for one document), `characters_per_token`, the tokenizer's name and fingerprint, and for
        each split `documents`, `characters`, `sha256`, `chunks`, and of the chunks
        `tokens` (valid positions, BOS and EOS counted) and `chunk_characters`.
        `python_reference` adds `python`, its version; a folder `ignored`, which of its files
        are not read; `on_error="skip"` adds `skipped`, which records are not.
      train_offsets: "chunks" or "random"; see `load`.
    """

    tokenizer: Tokenizer
    train: Chunks | Documents | Pairs
    validation: Chunks | Documents | Pairs
    test: Chunks | Documents | Pairs | None = None
    info: dict[str, Any] = field(default_factory=dict)
    train_offsets: str = "chunks"

    @property
    def length(self) -> int:
        """Tokens of a chunk, BOS and EOS counted."""
        return self.train.length

    @property
    def prompted(self) -> bool:
        """Whether rows begin with prompts, which do not count."""
        return isinstance(self.train, Pairs)

    @property
    def characters_per_token(self) -> float:
        """Characters of the validation chunks per valid token of them: turns nats per token into bits per character.

        1.0 for characters without wrapping. BOS and EOS are tokens without characters, so with them
        it is lower.
        """
        return self.info["characters_per_token"]
