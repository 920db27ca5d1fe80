"""Configs: overrides, mistakes in them, and which keys a run may be continued under."""

import inspect
import io
import sys

import numpy as np
import pytest

from diffrwkv import config, convert, traces, train
from diffrwkv.config import UserError


def write(tmp_path, body):
    path = tmp_path / "x.py"
    lines = (
        "from diffrwkv.config import base",
        "def get_config(arg=None):",
        "    c = base()",
        f"    {body}",
        "    return c",
    )
    path.write_text("\n".join(lines))
    return f"--config={path}"


def test_overrides(tmp_path):
    flag = write(tmp_path, "c.model.dim = int(arg or 8)")
    c = config.parse([flag + ":24", "--config.data.root=/data", "--config.model.remat", "--config.optim.eps", "0.5"])
    assert (c.model.dim, c.data.root, c.model.remat, c.optim.eps) == (24, "/data", True, 0.5)
    assert config.parse([flag]).data.root is None
    assert c.is_locked


def test_home_is_known_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "c.model.dim = 24")
    assert config.parse(["--config=~/x.py"]).model.dim == 24
    np.savez(tmp_path / "w.npz", w=np.ones(2))
    assert list(convert.read_state_dict("~/w.npz")) == ["w"]
    convert.write_state_dict({"w": np.ones(2)}, "~/v.npz")
    assert (tmp_path / "v.npz").is_file()
    traces.check("~/t.html")
    for call in (traces.check, convert.read_state_dict, lambda path: config.parse([f"--config={path}"])):
        with pytest.raises(UserError, match="home"):
            call("~nobody-of-this-name/x.html")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--config.model.dims=3", "config.model.dim"),
        ("--config.learning_rate=3", "config.optim.learning_rate"),
        ("--config.trian.num_steps=3", "config.train.num_steps"),
        ("--config.model.dim.x=3", "Unknown key config.model.dim.x"),
        ("--config.train.xyzzy=3", "config.train."),
        ("--config.model.dim=wide", "not of type int"),
        ("--config.optim.learning_rate=fast", "not of type float"),
        ("--config.train.num_steps=1e3", "not of type int"),
        ("--config.model=3", "section"),
        ("--workdri=x", "--workdri"),
    ],
)
def test_a_wrong_override_is_one_sentence(tmp_path, override, told):
    with pytest.raises(UserError) as e:
        config.parse([write(tmp_path, "pass"), override])
    assert told in str(e.value) and "\n" not in str(e.value)


def test_a_wrong_file_is_one_sentence(tmp_path):
    for body, told in [
        ("c.model.dim = int('x')", "line 4: ValueError: invalid literal"),
        ("c.model.dmi = 3", "line 4: .*dmi.*dim"),
        ("c.model.dim = 'wide'", "line 4: TypeError"),
        ("c.model.dim = = 3", "SyntaxError"),
    ]:
        with pytest.raises(UserError, match=told):
            config.parse([write(tmp_path, body)])
    for arguments, told in [
        ([], "--config must name"),
        (["--config.model.dim=3"], "--config must name"),
        (["--config", "--config.model.dim=3"], "--config must name"),
        ([f"--config={tmp_path}/nothing.py"], "No config file"),
    ]:
        with pytest.raises(UserError, match=told):
            config.parse(arguments)


def test_json_round_trip(tmp_path):
    c = config.base()
    config.save(c, tmp_path / "config.json")
    assert config.differences(config.load(tmp_path / "config.json"), c) == {}
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(UserError):
            config.load(tmp_path / name)


def test_differences_name_the_leaves():
    a, b = config.base(), config.base()
    b.model.dim, b.train.num_steps = 3, 4
    b.model.mixers.birwkv7.lora_ranks = {"w": 2}  # a whole section may be replaced
    changed = config.differences(a, b)
    assert changed["model.dim"] == (256, 3) and changed["train.num_steps"] == (1000, 4)
    assert changed["model.mixers.birwkv7.lora_ranks.w"] == (None, 2)
    assert config.resumable("train.num_steps") and config.resumable("train.mesh.fsdp")
    assert not config.resumable("model.dim") and not config.resumable("train.batch_size")


def test_resumable_keys_exist():
    names = list(config.flatten(config.base()))
    for key in config.RESUMABLE:
        assert any(n == key or (key.endswith(".") and n.startswith(key)) for n in names), key


def test_every_key_has_a_comment():
    lines = [line.strip() for line in inspect.getsource(config.base).splitlines()]
    keys = [line for line in lines if line.startswith("c.") and "#" not in line]
    sections = [line for line in keys if line.endswith("config_dict.ConfigDict()")]
    assert keys == sections
    assert all(line.count(".") == 2 for line in sections), sections


def test_missing_workdir():
    with pytest.raises(UserError, match="Missing --workdir"):
        train.main(["--config=x.py"])
    with pytest.raises(UserError, match="--workdir"):
        train.main(["--config=x.py", "--workdir"])
    with pytest.raises(UserError, match="--workdir"):
        train.main(["--config=x.py", "--workdir="])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("c.train.num_steps = 0", "num_steps"),
        ("c.train.batch_size = 6; c.train.accumulate = 4", "multiple"),
        ("c.train.ema_decay = 1.0", "ema_decay"),
        ("c.train.keep = 0", "keep"),
    ],
)
def test_numbers_that_no_run_can_have(tmp_path, change, told):
    with pytest.raises(UserError, match=told):
        train.main([write(tmp_path, change), f"--workdir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


def test_exit_status_and_one_line(capsys, monkeypatch):
    monkeypatch.setattr(config, "use_huge_pages", lambda: None, raising=False)  # it would start pytest anew

    def main(_):
        raise UserError("Do this.")

    with pytest.raises(SystemExit) as e:
        config.run_program(main)
    assert e.value.code == 2 and capsys.readouterr().err == "error: Do this.\n"


def test_a_terminal_without_unicode_gets_escapes(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(config, "use_huge_pages", lambda: None)
    monkeypatch.setattr(sys, "stdout", stdout)
    config.run_program(lambda arguments: print("é漢", flush=True))
    assert stdout.buffer.getvalue() == b"\\xe9\\u6f22\n"
