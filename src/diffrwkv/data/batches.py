"""Batches of a `Dataset`: `train_iterator` shuffles without end, `validation_batches` takes every row once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffrwkv.checks import check_seed
from diffrwkv.data.chunks import Chunks, Dataset, Documents, Pairs


class _Records:
    """Grain's view of a source: `[i]` is {"tokens", "valid"}, of pairs also {"scored"}."""

    def __init__(self, source: Chunks | Documents | Pairs):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        record = {"tokens": self._source[i], "valid": self._source.valid(i)}
        return record | {"scored": self._source.scored(i)} if isinstance(self._source, Pairs) else record


class _Count:
    """A source of chunk numbers, for chunks that begin anywhere."""

    def __init__(self, n: int):
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> int:
        return i


class _AnyOffset:
    """A chunk that begins at a random token; `rng` is Grain's, a function of seed and position in the stream."""

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

    Yields `{"tokens": int32 [b, length], "valid": bool [b, length]}` with b = batch_size /
    process_count; of prompts and answers also `"scored"`, bool, which tokens count. The order is a
    function of `seed` alone: the processes together see exactly what one process would. `get_state`
    gives JSON types that `set_state` of an equal iterator
    resumes from exactly; with `num_workers` > 0 only with the same number of workers.

    Args:
      batch_size: the global batch.
      num_workers: worker processes; 0 reads in this one, with `num_threads` threads that stay
        `prefetch` chunks ahead.

    Raises:
      ValueError: `batch_size` is not a positive multiple of `process_count`, or `seed` is not
        in [0, 2**32).
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    check_seed(seed)
    source = dataset.train
    random = dataset.train_offsets == "random"
    stream = grain.MapDataset.source(_Count(len(source)) if random else _Records(source)).seed(seed)
    stream = stream.shuffle().repeat(None)
    if random:
        if not isinstance(source, Chunks):
            raise ValueError("train_offsets='random' needs packing='concat': documents begin at their start")
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

    Yields `{"tokens": int32 [b, length], "valid": bool [b, length]}`, b = batch_size /
    process_count: this process's rows of each global batch; of prompts and answers also `"scored"`. The last batch is
    filled with rows that are valid nowhere.

    Args:
      batch_size: the global batch.
      limit: only the first so many chunks.
      split: `"validation"`, `"test"` or `"train"`.

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
            raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 chunk, not {limit}")
        source = getattr(dataset, split, None) if split in ("train", "validation", "test") else None
        if source is None:
            raise ValueError(f"the data set has no {split!r} split")
        self._source: Chunks | Documents | Pairs = source
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
            batch, scored = {"tokens": tokens, "valid": valid}, np.zeros(shape, bool)
            if isinstance(self._source, Pairs):
                batch["scored"] = scored
            for row, i in enumerate(start + r for r in self._rows):
                if i < self.num_chunks:
                    tokens[row], valid[row], scored[row] = (
                        self._source[i],
                        self._source.valid(i),
                        self._source.scored(i),
                    )
            yield batch
