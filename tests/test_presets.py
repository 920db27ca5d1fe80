"""The backbones' presets: matched sizes, what choosing one sets, and the table of docs/results.md."""

import json
import statistics

import pytest

from benchmarks import presets as table
from benchmarks import report
from diffrwkv import config, metrics, presets
from diffrwkv.denoiser import count_parameters
from diffrwkv.diffusion import objectives, samplers

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


@pytest.mark.parametrize("name", presets.BACKBONES)
def test_configure_sets_model_objective_and_sampler(name):
    c = config.base()
    presets.configure(c, name, "tiny")
    autoregressive = name in presets.AUTOREGRESSIVE
    assert c.model.dim == presets.SIZES["tiny"][name]["dim"]
    assert c.diffusion.name == ("autoregressive" if autoregressive else "mdlm")
    assert c.sampler.name == ("autoregressive" if autoregressive else "ancestral")
    assert objectives.from_config(mask_id=1, **c.diffusion.to_dict()).causal == autoregressive
    assert samplers.SAMPLERS[c.sampler.name].causal == autoregressive
    assert c.is_locked and c.diffusion.is_locked and c.sampler.is_locked
    assert c.optim == config.base().optim


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
