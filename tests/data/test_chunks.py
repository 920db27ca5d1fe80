import pickle

import numpy as np

from diffrwkv.data.chunks import TokenStore


def test_pickle_leaves_the_maps_behind(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(100_000, np.uint16))
    store = TokenStore([tmp_path / "a.npy"], [100_000])
    store.read(0, 5)
    assert len(pickle.dumps(store)) < 2000
    assert pickle.loads(pickle.dumps(store)).read(0, 5).tolist() == [0] * 5
