"""The backbones' presets: matched sizes, what choosing one sets, and the table of docs/results.md."""

import json
import statistics

import pytest

from benchmarks import presets as table
from benchmarks import report
from diffrwkv import config, metrics, presets
from diffrwkv.denoiser import count_parameters
from diffrwkv.diffusion import objectives, samplers
from diffrwkv.diffusion.processes import Vocabulary

ROWS = {(r["size"], r["name"]): r for r in json.loads((report.RESULTS / "presets.json").read_text())["rows"]}
ALL = [(size, name) for size in presets.SIZES for name in presets.BACKBONES]


def test_there_is_a_row_for_each_size_and_backbone():
    assert list(ROWS) == ALL
    for (size, name), row in ROWS.items():
        assert row["vocab_size"] == presets.SIZES[size]["vocab_size"]
        assert {k: row[k] for k in ("dim", "num_layers")}.items() <= presets.SIZES[size][name].items()
        assert row["embedding_parameters"] + row["other_parameters"] == row["parameters"]


@pytest.mark.parametrize("name", presets.BACKBONES)
@pytest.mark.parametrize("size", ["peer", "tiny"])
def test_rows_are_what_a_count_gives(size, name):
    assert table.row(size, name) == ROWS[size, name]


@pytest.mark.parametrize("name", presets.BACKBONES)
def test_scanned_layers_count_as_layers_that_are_not(name):
    plain = table.shapes(table.model("peer", name, scan_layers=False))
    assert count_parameters(plain) == ROWS["peer", name]["parameters"]
    scanned = table.shapes(table.model("peer", name))
    assert metrics.model_flops_per_token(scanned) == metrics.model_flops_per_token(plain)


@pytest.mark.parametrize("size", presets.SIZES)
def test_sizes_are_matched(size):
    parameters = [ROWS[size, name]["parameters"] for name in presets.BACKBONES]
    mean = statistics.mean(parameters)
    assert max(abs(n / mean - 1) for n in parameters) < 0.06
    if size == "peer":
        assert max(parameters) <= 1_300_000


def test_state_bytes_by_hand():
    dit, birwkv = ROWS["small", "dit"], ROWS["small", "birwkv"]
    assert dit["state_bytes_per_token"] == 12 * 2 * 768 * 2  # layers, key and value, width, bfloat16
    matrices = 12 * 64 * 64 * 4  # heads, float32
    assert birwkv["state_bytes_per_token"] == 12 * 2 * (matrices + 768 * 2) / 1024


def process_of(c):
    """What a config noises texts with."""
    objective = objectives.from_config(Vocabulary(9, 8), **c.diffusion.to_dict(), sections=c.to_dict())
    return objective.process


@pytest.mark.parametrize("name", presets.BACKBONES)
def test_configure_sets_model_objective_and_sampler(name):
    c = config.base()
    presets.configure(c, name, "tiny")
    autoregressive = name in presets.AUTOREGRESSIVE
    assert c.model.dim == presets.SIZES["tiny"][name]["dim"]
    assert c.diffusion.name == ("autoregressive" if autoregressive else "mdlm")
    assert c.sampler.name == ("autoregressive" if autoregressive else "ancestral")
    assert process_of(c).causal == autoregressive
    assert c.is_locked and c.diffusion.is_locked and c.sampler.is_locked
    unchanged = config.flatten(config.base())
    sections = ("model", "diffusion.name", "sampler.name")
    assert all(v == unchanged[k] for k, v in config.flatten(c).items() if not k.startswith(sections))


@pytest.mark.parametrize("blocks", ["", "@16", "@4,0"])
@pytest.mark.parametrize(
    "objective", [name for name, entry in objectives.OBJECTIVES.items() if not entry.process.causal]
)
def test_configure_takes_an_objective_and_blocks(objective, blocks):
    c = config.base()
    presets.configure(c, f"dit/peer{blocks}~{objective}", "tiny")
    plain = config.base()
    presets.configure(plain, "dit", "peer")
    process = process_of(c)
    assert c.diffusion.name == objective and c.diffusion.schedule is None
    assert samplers.from_config(c.sampler.name, **c.samplers[c.sampler.name]).fits(process)
    assert c.model.time_conditioning == process.needs_time
    assert c.diffusion.layout == ("blocks" if blocks else "whole")
    assert c.layouts.blocks.sizes == {"": (16,), "@16": (16,), "@4,0": (4, 0)}[blocks]
    c.model.time_conditioning = False
    assert c.model == plain.model


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("ar_rwkv@16", "ar_rwkv goes from left to right: block diffusion needs another backbone"),
        ("ar_rwkv~mdlm", "ar_rwkv goes from left to right: a diffusion objective needs another backbone"),
        ("dit~autoregressive", "goes from left to right: choose one of ar_rwkv, ar_transformer"),
        ("dit~", "no objective is called ''"),
        ("dit~nonsense", "no objective is called 'nonsense': choose one of autoregressive, .*mdlm"),
        ("dit~mdlm@16", "no objective is called 'mdlm@16'"),
    ],
)
def test_what_does_not_go_together_is_refused(choice, told):
    with pytest.raises(ValueError, match=told):
        presets.configure(config.base(), choice, "tiny")


def test_configure_takes_another_size():
    a, b = config.base(), config.base()
    presets.configure(a, "dit/500m", "tiny")
    presets.configure(b, "dit", "500m")
    assert a.model == b.model
    assert a.model.num_layers == presets.SIZES["500m"]["dit"]["num_layers"]


def test_configure_names_the_choices():
    for choice, table_ in (("mamba", presets.BACKBONES), ("dit/huge", presets.SIZES)):
        with pytest.raises(ValueError, match=", ".join(table_)):
            presets.configure(config.base(), choice, "tiny")


def test_every_backbone_has_a_label():
    assert set(presets.BACKBONES) < set(report.LABELS)
