import pickle

import numpy as np
import pytest

from diffrwkv.data.chunks import Chunks, TokenStore
from diffrwkv.data.tokenizers import Byte


def test_store_reads_across_parts(tmp_path):
    parts = [np.arange(5), np.arange(5, 5), np.arange(5, 6), np.arange(6, 13)]
    files = []
    for i, part in enumerate(parts):
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], part.astype(np.uint16))
    store = TokenStore(files, [len(part) for part in parts])
    assert len(store) == 13
    for start in range(14):
        for stop in range(start, 14):
            out = store.read(start, stop)
            assert out.dtype == np.int32 and out.tolist() == list(range(start, stop))
    with pytest.raises(IndexError):
        store.read(3, 14)
    assert np.concatenate(list(store.blocks(4))).tolist() == list(range(13))


def test_pickle_leaves_the_maps_behind(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(100_000, np.uint16))
    store = TokenStore([tmp_path / "a.npy"], [100_000])
    store.read(0, 5)
    assert len(pickle.dumps(store)) < 2000
    assert pickle.loads(pickle.dumps(store)).read(0, 5).tolist() == [0] * 5


def test_wrapping_is_mdlms():
    """arXiv 2406.07524, ``_group_texts``: documents end in EOS, chunks of L - 2 get BOS and EOS."""
    byte = Byte()
    stream = [*b"abcd", byte.eos_id, *b"efg", byte.eos_id]
    chunks = Chunks(TokenStore([np.array(stream, np.uint16)]), byte, 5, wrap=True)
    rows = [chunks[i].tolist() for i in range(len(chunks))]
    assert rows == [[256, *stream[:3], 257], [256, *stream[3:6], 257], [256, *stream[6:], 257]]
    assert chunks[0].dtype == np.int32 and chunks.valid(0).all()
    with pytest.raises(IndexError):
        chunks[3]
