import collections
import json

import numpy as np
import pytest

from diffrwkv.data.batches import train_iterator, validation_batches
from diffrwkv.data.chunks import Chunks, Dataset, TokenStore
from diffrwkv.data.tokenizers import Char


def numbered(n, length=3, wrap=False, **keywords):
    """A data set whose chunk i is [i * length, ...]: every token names its place."""
    tokenizer = Char("".join(map(chr, range(0x4E00, 0x4E00 + n * length))), specials=True)
    store = TokenStore([np.arange(n * length, dtype=np.uint16)])
    chunks = Chunks(store, tokenizer, length, wrap)
    return Dataset(tokenizer, chunks, chunks, **keywords)


def firsts(iterator, n):
    return [next(iterator)["tokens"][:, 0].tolist() for _ in range(n)]


def test_batches_have_the_promised_shapes():
    batch = next(train_iterator(numbered(7, length=5, wrap=True), batch_size=4, seed=0))
    assert batch["tokens"].shape == batch["valid"].shape == (4, 5)
    assert batch["tokens"].dtype == np.int32 and batch["valid"].dtype == bool


def test_every_epoch_has_every_chunk_in_a_new_order():
    dataset = numbered(12)
    epochs = [sum(firsts(train_iterator(dataset, batch_size=4, seed=3), 9)[3 * e : 3 * e + 3], []) for e in range(3)]
    everything = list(range(0, 36, 3))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert everything not in epochs and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = sum(firsts(train_iterator(dataset, batch_size=4, seed=4), 3), [])
    assert sorted(other) == everything and other != epochs[0]


@pytest.mark.parametrize("offsets", ["chunks", "random"])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 20])
def test_resumes_exactly_at_any_step(offsets, step):
    dataset = numbered(11, length=4, train_offsets=offsets)
    make = lambda: train_iterator(dataset, batch_size=3, seed=5)
    iterator = make()
    for _ in range(step):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator)["tokens"].tolist() for _ in range(9)]
    again = make()
    next(again)
    again.set_state(state)
    assert [next(again)["tokens"].tolist() for _ in range(9)] == rest


def test_prefetching_changes_nothing():
    dataset = numbered(11)
    one = firsts(train_iterator(dataset, batch_size=2, seed=1, num_threads=1, prefetch=1), 30)
    assert one == firsts(train_iterator(dataset, batch_size=2, seed=1, num_threads=8, prefetch=64), 30)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_what_one_process_sees(processes):
    dataset = numbered(10)
    together = firsts(train_iterator(dataset, batch_size=4, seed=2), 15)
    shares = [
        firsts(
            train_iterator(dataset, batch_size=4, seed=2, process_index=i, process_count=processes),
            15,
        )
        for i in range(processes)
    ]
    for step in range(15):
        rows = [row for share in shares for row in share[step]]
        assert all(len(share[step]) == 4 // processes for share in shares)
        assert sorted(rows) == sorted(together[step])


@pytest.mark.parametrize("offsets", ["chunks", "random"])
@pytest.mark.parametrize("n", [1, 11])
def test_batches_of_any_size_are_the_same_stream(n, offsets):
    """Batches of one too, whole or as the share of a process, and of more than there are chunks."""
    dataset = numbered(n, train_offsets=offsets)

    def stream(batch_size, processes):
        shares = [
            train_iterator(dataset, batch_size=batch_size, seed=5, process_index=i, process_count=processes)
            for i in range(processes)
        ]
        steps = 12 // batch_size
        shares = [[next(share)["tokens"].tolist() for _ in range(steps)] for share in shares]
        # row r of a global batch is row r // processes of process r % processes
        return [shares[r % processes][step][r // processes] for step in range(steps) for r in range(batch_size)]

    one = stream(1, 1)
    for batch_size, processes in [(2, 2), (3, 1), (4, 2), (4, 4), (12, 1)]:
        assert stream(batch_size, processes) == one, (batch_size, processes)


def test_random_offsets_reach_every_place():
    dataset = numbered(4, length=5, train_offsets="random")
    iterator = train_iterator(dataset, batch_size=8, seed=0)
    rows = np.concatenate([next(iterator)["tokens"] for _ in range(40)])
    assert (np.diff(rows, axis=1) == 1).all()
    counts = collections.Counter(rows[:, 0].tolist())
    assert set(counts) == set(range(16)) and max(counts.values()) < 45


def test_worker_processes_give_the_same_batches():
    dataset = numbered(9)
    iterator = train_iterator(dataset, batch_size=2, seed=0, num_workers=1)
    try:
        got = firsts(iterator, 6)
        state = json.loads(json.dumps(iterator.get_state()))
        rest = firsts(iterator, 2)
        iterator.set_state(state)
        assert firsts(iterator, 2) == rest
    finally:
        iterator.close()
    assert got + rest == firsts(train_iterator(dataset, batch_size=2, seed=0), 8)


@pytest.mark.parametrize("limit", [None, 1, 4, 10, 99])
@pytest.mark.parametrize("processes", [1, 2])
def test_validation_covers_every_chunk_once(limit, processes):
    dataset = numbered(10)
    seen = []
    for index in range(processes):
        batches = validation_batches(dataset, batch_size=4, limit=limit, process_index=index, process_count=processes)
        listed = list(batches)
        assert len(listed) == len(batches) == len(list(batches)) == -(-min(limit or 10, 10) // 4)
        for batch in listed:
            assert batch["tokens"].shape == (4 // processes, 3)
            assert (batch["valid"].all(1) == batch["valid"].any(1)).all()
            seen += batch["tokens"][batch["valid"].all(1), 0].tolist()
    assert sorted(seen) == list(range(0, 3 * min(limit or 10, 10), 3))
    if processes == 1:
        assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: train_iterator(d, batch_size=0, seed=0), "batch_size 0 must be"),
        (
            lambda d: train_iterator(d, batch_size=3, seed=0, process_count=2),
            "multiple of the 2 proc",
        ),
        (
            lambda d: train_iterator(d, batch_size=2, seed=0, process_index=1),
            "process_index 1 of 1",
        ),
        (lambda d: train_iterator(d, batch_size=2, seed=-1), "seed must be an integer from 0"),
        (lambda d: validation_batches(d, batch_size=2, limit=0), "limit must be at least 1"),
        (lambda d: validation_batches(d, batch_size=2, split="test"), "has no 'test' split"),
        (lambda d: validation_batches(d, batch_size=2, split="info"), "has no 'info' split"),
    ],
)
def test_bad_batches_are_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbered(4))
