"""Checkpoints: what is kept, and what happens when a file on disk is not what was written."""

import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import checkpoint, sharding
from diffrwkv.checkpoint import Checkpoints
from diffrwkv.config import UserError


def make_state(step):
    w = jax.random.normal(jax.random.key(step), (64, 32))
    return {"params": {"w": w}, "ema": {"w": w + 1}, "opt_state": (w * 2, ()), "step": jnp.int32(step)}


def abstract():
    one = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    state = make_state(0)
    return checkpoint.abstract_like(state, jax.tree.map(lambda _: one, state))


def parts(*names):
    return {name: abstract()[name] for name in names}


@pytest.fixture
def workdir(tmp_path):
    """Checkpoints of steps 1 to 4; the second is the best."""
    with Checkpoints(tmp_path, keep=2) as c:
        for step, nelbo in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None)]:
            c.save(step, make_state(step), {"read": step}, nelbo)
    return tmp_path


def damage_truncate(folder):
    largest(folder).write_bytes(largest(folder).read_bytes()[:100])


def damage_flip(folder):
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest(folder).write_bytes(bytes(data))


def damage_remove(folder):
    largest(folder).unlink()


def damage_metadata(folder):
    for path in folder.glob("*/_METADATA"):
        path.write_text("{")


def damage_iterator(folder):
    for path in (folder / "data").iterdir():
        path.write_text("{")


def damage_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [
    damage_truncate,
    damage_flip,
    damage_remove,
    damage_metadata,
    damage_iterator,
    damage_everything,
]


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_newest_and_best_stay(workdir):
    with Checkpoints(workdir, read_only=True) as c:
        assert c.steps() == [2, 3, 4] and c.best_step() == 2


def test_round_trip_is_exact(workdir):
    with Checkpoints(workdir, keep=2) as c:
        step, state, data = c.restore(abstract())
    assert step == 4 and data == {"read": 4}
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(4)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_saved_step_survives_donation(tmp_path):
    """Writing is asynchronous: what is on disk is the state at the call, whatever is done to its buffers later."""
    double = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    state = make_state(1)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, keep=3) as c:
        for step in (1, 2, 4):
            c.save(step, state, None)
            state = double(state)
    with Checkpoints(tmp_path, keep=3) as c:
        _, state, _ = c.restore(abstract())
    np.testing.assert_array_equal(state["params"]["w"], expected["params"]["w"] * 4)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_newest_falls_back(workdir, damage):
    damage(workdir / "checkpoints" / "4")
    with Checkpoints(workdir, keep=2) as c:
        with pytest.warns(UserWarning, match="step 4 cannot be read"):
            step, state, data = c.restore(abstract())
        assert (step, data, int(state["step"])) == (3, {"read": 3}, 3)
        assert (workdir / "unreadable" / "4").is_dir() and c.steps() == [2, 3]
        c.save(4, make_state(4), {"read": 4})  # the step can be written again
        c.wait()
        assert c.restore(abstract())[0] == 4


@pytest.mark.parametrize("place", range(8))
def test_any_altered_byte_of_the_weights_is_noticed(workdir, place):
    """The file with the arrays, at places over all of it: what restores must be what was saved."""
    path = largest(workdir / "checkpoints" / "4")
    data = bytearray(path.read_bytes())
    data[(2 * place + 1) * len(data) // 16] ^= 0x10
    path.write_bytes(bytes(data))
    with Checkpoints(workdir, keep=2) as c, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step, state, _ = c.restore(abstract())
    np.testing.assert_array_equal(state["params"]["w"], make_state(step)["params"]["w"])


def test_flipped_signs_are_noticed(workdir):
    """An even number of flipped top bits cancels in any plain sum."""
    w = np.asarray(make_state(4)["params"]["w"])
    [path] = [p for p in Path(workdir, "checkpoints", "4").rglob("*") if p.is_file() and w.tobytes() in p.read_bytes()]
    path.write_bytes(path.read_bytes().replace(w.tobytes(), (-w).tobytes()))
    with Checkpoints(workdir, read_only=True) as c, pytest.warns(UserWarning, match="step 4 cannot be read.*altered"):
        assert c.restore(abstract())[0] == 3
    with Checkpoints(workdir, read_only=True) as c, pytest.warns(UserWarning, match="step 4 cannot be read.*altered"):
        assert c.restore_parts(parts("params"))[0] == 3


def copy_of_another_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "3", folder)


def iterator_of_another_step(folder):
    shutil.rmtree(folder / "data")
    shutil.copytree(folder.parent / "3" / "data", folder / "data")


def iterator_one_further(folder):
    [path] = (folder / "data").glob("process_*")
    path.write_text(path.read_text().replace("4", "5"))


def record_of_another_step(folder):
    shutil.copyfile(folder.parent / "3" / "digest.json", folder / "digest.json")


def another_nelbo(folder):
    (folder / "digest.json").write_text((folder / "digest.json").read_text().replace('"nelbo": null', '"nelbo": 0.5'))


MIXED = [copy_of_another_step, iterator_of_another_step, iterator_one_further, record_of_another_step, another_nelbo]


@pytest.mark.parametrize("damage", MIXED)
def test_parts_of_another_step_are_refused(workdir, damage):
    damage(workdir / "checkpoints" / "4")
    with Checkpoints(workdir, read_only=True) as c:
        assert c.best_step() == 2
        with pytest.warns(UserWarning, match="step 4 cannot be read"):
            step, state, data = c.restore(abstract())
        assert (step, data, int(state["step"])) == (3, {"read": 3}, 3)


def test_a_state_of_another_step_is_refused(tmp_path):
    with Checkpoints(tmp_path) as c:
        c.save(1, make_state(1), None)
        c.save(2, make_state(1), None)
    with Checkpoints(tmp_path) as c, pytest.warns(UserWarning, match="its state is that of step 1"):
        assert c.restore(abstract())[0] == 1


def test_arrays_of_another_type_are_refused(workdir):
    """Orbax would cast them."""
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16, sharding=x.sharding), abstract()["ema"])
    with warnings.catch_warnings(), Checkpoints(workdir, read_only=True) as c:
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"\['ema'\]\['w'\] is float32\[64,32\] there, float16\[64,32\] by this"):
            c.restore_parts({"ema": half})


def test_weights_need_no_other_part(workdir):
    for part in ("params", "rest", "data"):
        shutil.rmtree(workdir / "checkpoints" / "4" / part)
    with Checkpoints(workdir, read_only=True) as c:
        assert c.restore_parts(parts("ema"))[0] == 4


def test_any_damage_to_any_file_falls_back_or_changes_nothing(workdir):
    """Each file cut, emptied, altered, removed, exchanged with that of the step before; one at a time."""
    rng = np.random.default_rng(0)
    newest, before = workdir / "checkpoints" / "4", workdir / "checkpoints" / "3"
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    same = {p.relative_to(newest): p for p in files}
    assert len(files) > 25
    found = {3: 0, 4: 0}
    expected = {step: jax.tree.leaves(jax.tree.map(np.asarray, make_state(step))) for step in (3, 4)}

    def check(path, contents):
        original = path.read_bytes()
        if contents == original:
            return
        path.unlink()
        if contents is not None:
            path.write_bytes(contents)
        with warnings.catch_warnings(), Checkpoints(workdir, read_only=True) as c:
            warnings.simplefilter("ignore")
            step, state, data = c.restore(abstract())
            assert c.best_step() == 2
        path.write_bytes(original)
        assert data == {"read": step}, path
        for a, b in zip(jax.tree.leaves(state), expected[step], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=str(path))
        found[step] += 1

    for name, path in same.items():
        original = path.read_bytes()
        check(path, None)
        check(path, b"")
        check(path, original[: rng.integers(len(original))])
        altered = bytearray(original)
        altered[rng.integers(len(original))] ^= 1 << rng.integers(8)
        check(path, bytes(altered))
        check(path, (before / name).read_bytes() if (before / name).exists() else original[::-1])
    assert found[3] > 100 and found[4] > 0, found  # Orbax's own notes of the folder matter to nobody


@pytest.mark.parametrize("damage", [damage_metadata, damage_everything])
def test_reading_weights_falls_back_and_moves_nothing(workdir, damage):
    damage(workdir / "checkpoints" / "4")
    with Checkpoints(workdir, read_only=True) as c:
        with pytest.warns(UserWarning, match="step 4 cannot be read"):
            step, read = c.restore_parts(parts("ema"))
        assert step == 3 and (workdir / "checkpoints" / "4").is_dir()
        np.testing.assert_array_equal(read["ema"]["w"], make_state(3)["ema"]["w"])


def test_nothing_readable(workdir):
    for folder in Path(workdir, "checkpoints").iterdir():
        damage_truncate(folder)
    with warnings.catch_warnings(), Checkpoints(workdir, keep=2) as c:
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="None of the checkpoints"):
            c.restore(abstract())


def test_weights_of_a_step(workdir):
    with Checkpoints(workdir, read_only=True) as c:
        for name in ("params", "ema"):
            step, read = c.restore_parts(parts(name), 2)
            assert step == 2 and list(read) == [name]
            np.testing.assert_array_equal(read[name]["w"], make_state(2)[name]["w"])
        with pytest.raises(UserError, match="there are 2, 3, 4"):
            c.restore_parts(parts("ema"), 7)
        other = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, 3), x.dtype, sharding=x.sharding), abstract()["ema"])
        with warnings.catch_warnings(), pytest.raises(UserError, match="fits"):
            warnings.simplefilter("ignore")
            c.restore_parts({"ema": other})


LEARNED = {"rates": jnp.arange(3.0), "count": jnp.int32(7)}


@pytest.mark.parametrize("earlier", [False, True])
def test_what_the_objective_learned_is_an_item_of_its_own(tmp_path, monkeypatch, earlier):
    """In an earlier version it stood among the rest, and is read from there."""
    with monkeypatch.context() as m, Checkpoints(tmp_path) as c:
        if earlier:
            m.setattr(checkpoint, "ITEMS", ("params", "ema", "rest"))
        c.save(1, make_state(1) | {"objective": LEARNED}, None)
    folder = tmp_path / "checkpoints" / "1"
    assert (folder / "objective").is_dir() != earlier
    one = abstract()["step"].sharding
    wanted = abstract() | {"objective": checkpoint.abstract_like(LEARNED, jax.tree.map(lambda _: one, LEARNED))}
    with Checkpoints(tmp_path, read_only=True) as c:
        state = c.restore(wanted)[1]
        _, read = c.restore_parts({name: wanted[name] for name in ("ema", "objective")})
        with warnings.catch_warnings(), pytest.raises(UserError, match=r"\['objective'\].* by this config"):
            warnings.simplefilter("ignore")
            c.restore(abstract())  # of an objective that learns nothing
    for found in (state, read):
        np.testing.assert_array_equal(found["ema"]["w"], make_state(1)["ema"]["w"])
        assert jax.tree.map(lambda x: x.tolist(), found["objective"]) == {"rates": [0, 1, 2], "count": 7}
    assert set(state) == {*make_state(1), "objective"} and set(read) == {"ema", "objective"}
    damage_flip(folder / ("rest" if earlier else "objective"))
    with warnings.catch_warnings(), Checkpoints(tmp_path, read_only=True) as c:
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="altered"):
            c.restore_parts({name: wanted[name] for name in ("ema", "objective")})
        assert c.restore_parts({"ema": wanted["ema"]})[0] == 1


def test_no_state_has_no_item(workdir):
    assert not list(workdir.glob("checkpoints/*/objective"))
    with Checkpoints(workdir, read_only=True) as c, pytest.warns(UserWarning), pytest.raises(UserError, match="fits"):
        c.restore_parts(parts("ema") | {"objective": parts("ema")["ema"]})


def test_no_room_keeps_the_last_good_one(workdir, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m, pytest.raises(UserError, match=r"step 5 .*\(OSError: .*No space.*that of step 4"):
        m.setattr(checkpoint, "_hash", full)
        with Checkpoints(workdir) as c:
            c.save(5, make_state(5), None)
    with Checkpoints(workdir) as c:
        assert c.steps() == [2, 3, 4] and c.restore(abstract())[0] == 4
        c.save(5, make_state(5), None)
        c.wait()
        assert c.restore(abstract())[0] == 5


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep=1) as c:
        assert c.restore(abstract()) is None and c.best_step() is None
    with Checkpoints(tmp_path, read_only=True) as c, pytest.raises(UserError, match="train first"):
        c.restore_parts(parts("ema"))
    with pytest.raises(UserError, match="train first"):
        Checkpoints(tmp_path / "nowhere", read_only=True)
