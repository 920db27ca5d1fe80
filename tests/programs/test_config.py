"""Configs: overrides, mistakes in them, and which keys a run may be continued under."""

import copy
import dataclasses
import inspect
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from diffrwkv import cli, config, traces, train, weights
from diffrwkv.config import UserError
from diffrwkv.diffusion import objectives, samplers
from diffrwkv.diffusion.processes import Vocabulary

# Configs that earlier versions stored, and the fields of what they built from them.
STORED = json.loads((Path(__file__).parents[1] / "golden" / "stored_configs.json").read_text())


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
    assert list(weights.read_state_dict("~/w.npz")) == ["w"]
    weights.write_state_dict({"w": np.ones(2)}, "~/v.npz")
    assert (tmp_path / "v.npz").is_file()
    traces.check("~/t.html")
    for call in (traces.check, weights.read_state_dict, lambda path: config.parse([f"--config={path}"])):
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
        ("--config.diffusion.time_eps=0.1", "config.objectives.mdlm.time_eps"),
        ("--config.sampler.num_steps=3", "config.samplers.ancestral.num_steps"),
        ("--config.samplers.ancestral=3", "section"),
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


def changed(**keys):
    c = config.base()
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return c


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ({"objectives__sedd_absorb__time_eps": 0.1, "layouts__blocks__sizes": (4,)}, set()),
        ({"schedules__polynomial__power": 3.0}, set()),
        ({"diffusion__schedule": "loglinear"}, set()),  # it is the objective's own
        ({"objectives__mdlm__time_eps": 0.1}, {"objectives.mdlm.time_eps"}),
        ({"schedules__loglinear__eps": 0.1}, {"schedules.loglinear.eps"}),
        (
            {"diffusion__schedule": "cosine", "schedules__cosine__eps": 0.1, "schedules__loglinear__eps": 0.1},
            {"diffusion.schedule", "schedules.cosine.eps", "schedules.loglinear.eps"},
        ),
        (
            {"diffusion__layout": "blocks", "layouts__blocks__sizes": (4,)},
            {"diffusion.layout", "layouts.blocks.sizes"},
        ),
        ({"samplers__prophet__block": 4}, {"samplers.prophet.block"}),
    ],
)
def test_options_that_nothing_chooses_make_no_difference(given, keys):
    for pair in ((config.base(), changed(**given)), (changed(**given), config.base())):
        found = config.differences(*pair)
        assert set(found) == keys
        assert all(config.resumable(key) == key.startswith("sampler") for key in found)


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


def fields(value):
    """As the golden file has them: {"is": class, field: ...}."""
    if dataclasses.is_dataclass(value):
        own = {f.name: fields(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__} | own
    return list(value) if isinstance(value, tuple) else value


def as_before(objective):
    """The fields of an objective, as they were when one class was one objective."""
    new = fields(objective)
    process, layout = new.pop("process"), new.pop("layout")
    if process["is"] == "NextToken":
        return {"is": "Autoregressive", "mask_id": process["vocabulary"]["mask_id"]}
    assert process["output"] == "mean"
    own = {"schedule": process["schedule"], "mask_id": process["vocabulary"]["mask_id"]}
    if layout.pop("is") == "Whole":
        assert (new.pop("mask_rates"), new.pop("search_mask_rates")) == ([0.0, 1.0], False)
        return new | own | {"is": "MDLM"}
    assert layout.pop("begins") == []
    return new | own | {"is": "BlockDiffusion", "blocks": layout.pop("sizes")} | layout


@pytest.mark.parametrize("name", STORED)
def test_what_earlier_versions_stored_is_read_as_they_meant_it(name, tmp_path):
    stored, whole = STORED[name]["stored"], "model" in STORED[name]["stored"]
    before = copy.deepcopy(stored)
    if not whole:  # the other sections are those of any run
        stored = STORED["mdlm"]["stored"] | stored
        stored = config.seal(stored)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    c = config.load(tmp_path / "config.json")
    assert before == STORED[name]["stored"]  # it was not changed
    assert set(config.flatten(c)) == set(config.flatten(config.base()))
    objective = objectives.from_config(Vocabulary(9, 8), **c.diffusion.to_dict(), sections=c.to_dict())
    built = {"objective": as_before(objective)}
    sampler = samplers.from_config(c.sampler.name, **c.samplers[c.sampler.name])
    built["sampler"] = fields(sampler)
    wanted = {part: value for part, value in STORED[name].items() if part != "stored"}
    assert wanted and wanted.items() <= built.items()
    config.check_values(c)
    sections = ("diffusion", "sampler", *config.OPTIONS)
    for section in set(stored) - {"digest", *sections}:
        now = {k: v for k, v in config.flatten(c[section]).items() if not f"{section}.{k}".startswith(config.YOUNGER)}
        assert now == config.flatten(stored[section])
    config.save(c, tmp_path / "again.json")
    assert config.differences(config.load(tmp_path / "again.json"), c) == {}


def test_a_run_of_an_earlier_version_goes_on_under_todays_experiment(tmp_path):
    stored = STORED["mdlm"]["stored"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    c = config.base()
    c.model.num_layers, c.model.dim, c.seed, c.objectives.mdlm.time_eps = 4, 128, 3, 2e-3
    found = config.differences(config.load(tmp_path / "config.json"), c)
    assert found == {"samplers.ancestral.num_steps": (256, 128), "samplers.ancestral.top_k": (5, 0)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["diffusion"].update(name="mine"), "config.diffusion.name = 'mine' is no objective"),
        (lambda c: c["diffusion"].pop("name"), "config.diffusion.name is missing"),
        (lambda c: c["diffusion"].update(width=3), "config.diffusion.width is no option of 'mdlm'"),
        (lambda c: c["diffusion"].update(blocks=[3]), "config.diffusion.blocks is no option of 'mdlm'"),
        (lambda c: c["diffusion"].update(schedule="linear"), "config.diffusion.schedule is not"),
        (lambda c: c["diffusion"]["schedule"].update(name="mine"), "config.diffusion.schedule.name = 'mine'"),
        (lambda c: c["diffusion"]["schedule"].update(power=3), "config.diffusion.schedule.power is no option"),
        (lambda c: c["diffusion"].update(name="autoregressive"), "config.diffusion.schedule is not"),
        (lambda c: c["sampler"].update(name="mine"), "config.sampler.name = 'mine'"),
        (lambda c: c["sampler"].update(name=["mine"]), "config.sampler.name = "),
        (lambda c: c["sampler"].update(width=3), "config.sampler.width is no option of 'ancestral'"),
        (lambda c: c.pop("sampler"), "config.sampler.name is missing"),
        (lambda c: c.update(sampler=3), "config.sampler.name is missing"),
    ],
)
def test_what_cannot_be_translated_is_refused(tmp_path, change, told):
    stored = copy.deepcopy(STORED["mdlm"]["stored"])
    change(stored)
    (tmp_path / "config.json").write_text(json.dumps(config.seal(stored)))
    with pytest.raises(UserError, match=f"is not a configuration .*{re.escape(told)}") as e:
        config.load(tmp_path / "config.json")
    assert "\n" not in str(e.value)


def test_options_that_a_run_was_stored_without_are_the_defaults(tmp_path):
    """An objective or a sampler that came later is no reason to refuse a run."""
    c = config.base()
    c.samplers.ancestral.num_steps = 77
    stored = c.to_dict()
    del stored["samplers"]["prophet"], stored["samplers"]["remdm"]["eta"], stored["objectives"]["sedd_absorb"]
    config.write_json(config.seal(stored), tmp_path / "config.json")
    assert config.differences(config.load(tmp_path / "config.json"), c) == {}
    stored["samplers"]["ancestral"]["width"] = 3
    config.write_json(config.seal(stored), tmp_path / "config.json")
    with pytest.raises(UserError, match="config.samplers.ancestral.width is missing, or not a key"):
        config.load(tmp_path / "config.json")
    stored["samplers"]["ancestral"] = 3
    config.write_json(config.seal(stored), tmp_path / "config.json")
    with pytest.raises(UserError, match="config.samplers.ancestral is missing, or not a key"):
        config.load(tmp_path / "config.json")


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
    monkeypatch.setattr(cli, "use_huge_pages", lambda: None, raising=False)  # it would start pytest anew

    def main(_):
        raise UserError("Do this.")

    with pytest.raises(SystemExit) as e:
        cli.run_program(main)
    assert e.value.code == 2 and capsys.readouterr().err == "error: Do this.\n"


def test_a_terminal_without_unicode_gets_escapes(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(cli, "use_huge_pages", lambda: None)
    monkeypatch.setattr(sys, "stdout", stdout)
    cli.run_program(lambda arguments: print("é漢", flush=True))
    assert stdout.buffer.getvalue() == b"\\xe9\\u6f22\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize("given", ["", "--xla_a=1", "--xla_cpu_enable_concurrency_optimized_scheduler=true"])
def test_a_program_starts_anew_once_and_keeps_the_users_flags(given, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *a: started.append(a))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.setenv("XLA_FLAGS", given)
    cli.use_huge_pages()
    cli.use_huge_pages()
    assert len(started) == 1
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    flags = os.environ["XLA_FLAGS"].split()
    assert set(given.split()) <= set(flags)
    assert sum("concurrency_optimized_scheduler" in flag for flag in flags) == 1
