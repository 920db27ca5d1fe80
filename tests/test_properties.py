"""What must hold for any input, on inputs that hypothesis draws: the same ones in each run."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from ml_collections import config_dict

from diffrwkv import config
from diffrwkv.canvas import canvas_row, text_length
from diffrwkv.config import UserError
from diffrwkv.data import splits
from diffrwkv.data.tokenizers import BPE, Byte, Char, Tokenizer, _parts
from diffrwkv.diffusion.samplers.common import truncate
from diffrwkv.diffusion.schedules import SCHEDULES

few = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# --- The config -----------------------------------------------------------------------------------------------------

NAMES = st.text("abc_", min_size=1, max_size=3)
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | st.text(max_size=3) | st.just({})
TREES = st.recursive(VALUES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8)


def nested(flat):
    tree = {}
    for key, value in flat.items():
        *path, leaf = key.split(".")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


@few
@given(st.dictionaries(NAMES, TREES, max_size=3))
def test_a_flat_config_is_the_config(tree):
    flat = config.flatten(tree)
    assert nested(flat) == tree
    assert config.differences(tree, nested(flat)) == {}
    assert not any(isinstance(value, dict) and value for value in flat.values())


def spelt(key, value):
    return f"--config.{key}={value}"


COUNT = ("objectives.mdlm.", "schedules.loglinear.")  # options of others do nothing, and are refused
NUMBERS = {
    key: range_
    for key, range_ in config.RANGES.items()
    if config.DEFAULTS[key] != {} and (key.startswith(COUNT) or not key.startswith(("objectives.", "schedules.")))
}


@st.composite
def settings_of_keys(draw):
    """Some keys with numbers of their ranges."""
    chosen = draw(st.lists(st.sampled_from(sorted(NUMBERS)), min_size=1, max_size=5, unique=True))
    given_ = {}
    for key in chosen:
        range_ = NUMBERS[key]
        if range_.integer:
            number = draw(st.integers(range_.low, range_.high))
        else:
            number = draw(st.floats(range_.low, min(range_.high, 1e30)).filter(range_._holds))
        given_[key] = number
    return given_


@few
@given(settings_of_keys())
def test_what_a_command_line_says_is_stored_and_read_back(tmp_path, numbers):
    (tmp_path / "x.py").write_text(
        "from diffrwkv.config import base\n\n\ndef get_config(arg=None):\n    return base()\n"
    )
    c = config.parse([f"--config={tmp_path / 'x.py'}", *(spelt(key, value) for key, value in numbers.items())])
    assert config.flatten(c) == config.DEFAULTS | numbers
    config.save(c, tmp_path / "config.json")
    assert config.flatten(config.load(tmp_path / "config.json")) == config.flatten(c)
    again = config_dict.ConfigDict(config.base())
    again.update_from_flattened_dict(config.flatten(c))
    assert config.flatten(again) == config.flatten(c)


# --- Noise ----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "eps": st.just(0.0) | st.floats(1e-6, 0.5),
    "power": st.floats(0.25, 4),
    "sigma_min": st.floats(1e-4, 0.1),
    "sigma_max": st.floats(0.5, 20),
}


@pytest.mark.parametrize("name", SCHEDULES)
@few
@given(st.data())
def test_a_schedule_is_undone_by_its_inverse(name, data):
    cls = SCHEDULES[name]
    schedule = cls(**{f.name: data.draw(OPTIONS[f.name], label=f.name) for f in dataclasses.fields(cls)})
    t = jnp.linspace(0.01, 1, 34, dtype=jnp.float32)
    masked = schedule.mask_probability(t)
    np.testing.assert_allclose(masked + schedule.alpha(t), 1, atol=1e-6)
    assert (jnp.diff(masked) >= 0).all() and (masked <= 1).all()
    # rounding of a probability near 1 is all that moves the time: by how much, its slope there says
    slope = -schedule.dalpha(t)
    tolerance = 2e-5 + 4 * np.finfo(np.float32).eps / np.maximum(slope, 1e-30)
    assert (jnp.abs(schedule.time(masked) - t) <= tolerance)[slope > 1e-3].all()
    p = jnp.asarray(data.draw(st.floats(0.01, float(masked[-1]) * 0.99), label="p"), jnp.float32)
    if name != "geometric" or p > 1.01 * masked[0]:
        np.testing.assert_allclose(schedule.mask_probability(schedule.time(p)), p, rtol=2e-5)


def kept_of(logits, temperature, top_p, top_k):
    """bool [V], token by token in float64; None where rounding decides."""
    x = np.asarray(logits, np.float64) / temperature
    kept = np.ones(len(x), bool)
    if top_k:
        kept = np.array([(x > value).sum() < top_k for value in x])
    p = np.where(kept, np.exp(x - x.max()), 0)
    p /= p.sum()
    if top_p < 1:
        order = np.sort(p)[::-1]
        before = np.concatenate([[0], np.cumsum(order)[:-1]])
        if (np.abs(before - top_p) < 1e-5).any():
            return None
        kept &= p >= order[before < top_p].min() * (1 - 1e-9)
    return kept


@few
@given(
    st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=6, max_size=6),  # with ties
    st.sampled_from([0.5, 1.0, 2.0]),
    st.floats(0.01, 1),
    st.integers(0, 7),
)
@example([1.0] * 6, 1.0, 0.3, 0)
@example([1.0] * 6, 1.0, 1.0, 2)
def test_truncation_keeps_the_nucleus(logits, temperature, top_p, top_k):
    kept = kept_of(logits, temperature, top_p, top_k)
    assume(kept is not None)
    row = np.asarray(truncate(jnp.asarray(logits, jnp.float32), temperature, top_p, top_k))
    np.testing.assert_array_equal(np.isfinite(row), kept)
    expected = (np.asarray(logits) - max(logits)) / temperature
    np.testing.assert_allclose(row[kept], expected[kept], rtol=1e-6)


# --- Text -----------------------------------------------------------------------------------------------------------

ALPHABET = "ab c\n"
LETTERS = Char(ALPHABET, specials=True)
TEXT = st.text(max_size=40)  # any characters, lone surrogates left out by hypothesis's default
MERGED = BPE.train(280, ["the cat sat on the mat, the hat and the rat 12 12 12\n" * 4])


@few
@given(TEXT)
@example("the the 漢字 é 12\x00\r\n   x")
def test_what_is_encoded_is_decoded(text):
    for tokenizer in (Byte(), MERGED, Char(text or "a")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.int32 and (ids < tokenizer.vocab_size - 1).all()
        read = Tokenizer.from_json(tokenizer.to_json())
        assert read == tokenizer and (read.encode(text) == ids).all()
    assert MERGED.decode_bytes(MERGED.encode(text)) == text.encode()


@few
@given(st.text("aab  c12.,\n", max_size=80), st.integers(2, 9))
def test_long_runs_are_cut_and_nothing_is_lost(text, longest):
    parts = _parts(text, longest)
    assert "".join(parts) == text
    if len(text) > 2 * longest:
        runs = (run for part in parts for run in re.findall(r"\s+|[a-z]+|\d+|[.,]+", part))
        assert len(parts) > 1 or all(len(run) <= longest for run in runs)


DOCUMENTS = st.lists(st.lists(st.text("xyz", max_size=4), min_size=1, max_size=3), min_size=1, max_size=5)


def reader_of(documents):
    """A reader of documents that come in pieces."""

    def read():
        for pieces in documents:
            for i, piece in enumerate(pieces):
                yield piece, i == len(pieces) - 1

    return read


@few
@given(DOCUMENTS, st.integers(0, 30), st.integers(0, 30))
def test_a_cut_is_a_slice(documents, start, stop):
    text = "".join("".join(pieces) for pieces in documents)
    cut = list(splits.between(reader_of(documents), start, stop)())
    assert "".join(piece for piece, _ in cut) == text[start:stop]
    if cut:
        assert cut[-1][1] or stop > len(text) or start >= stop
    some = list(splits.documents(reader_of(documents), start, stop)())
    assert [piece for piece, _ in some] == [piece for pieces in documents[start:stop] for piece in pieces]


@few
@given(DOCUMENTS, st.floats(0.01, 0.99))
def test_training_and_validation_are_the_text(documents, fraction):
    text = "".join("".join(pieces) for pieces in documents)
    try:
        readers, tally = splits.divide(reader_of(documents), fraction, "the text")
    except ValueError:
        assert not 0 < int(len(text) * (1 - fraction)) < len(text)
        return
    parts = ["".join(piece for piece, _ in readers[side]()) for side in ("train", "validation")]
    assert "".join(parts) == text and all(parts)
    assert (tally.characters, tally.documents) == (len(text), len(documents))
    off = abs(len(parts[0]) - int(len(text) * (1 - fraction)))
    assert off <= splits.NEAR * min(int(len(text) * (1 - fraction)), len(text) - int(len(text) * (1 - fraction)))


@few
@given(st.text(ALPHABET + "_", min_size=1, max_size=12), st.none() | st.integers(1, 16), st.booleans(), st.booleans())
def test_a_canvas_holds_what_is_given_where_it_is_given(template, length, bos, eos):
    wanted = [LETTERS.mask_id if c == "_" else int(LETTERS.encode(c)[0]) for c in template]
    options = {"length": length, "default_length": 16, "bos": bos, "eos": eos}
    least = len(template) + bos + eos
    for kind in ("infill", "prompt"):
        text = template if kind == "infill" else template.replace("_", "a")
        expected = wanted if kind == "infill" else list(LETTERS.encode(text))
        room = (length or (least if kind == "infill" else 16)) - least
        try:
            row = canvas_row(LETTERS, **{kind: text}, **options)
        except UserError:
            assert room < 0 or (kind == "prompt" and room == 0) or (kind == "infill" and "_" not in template)
            continue
        assert room >= 0 and row.dtype == np.int32
        begin, end = [LETTERS.bos_id] * bos, [LETTERS.eos_id] * eos
        assert row.tolist() == [*begin, *expected, *[LETTERS.mask_id] * room, *end]


@few
@given(st.lists(st.tuples(st.booleans(), st.integers(0, LETTERS.vocab_size - 2)), min_size=1, max_size=10))
def test_a_text_ends_with_the_first_eos_behind_what_is_given(positions):
    tokens = np.array([token for _, token in positions], np.int32)
    canvas = np.array([LETTERS.mask_id if blank else token for blank, token in positions], np.int32)
    length = len(positions)
    for i, (blank, token) in enumerate(positions):
        given_later = any(not b and t != LETTERS.eos_id for b, t in positions[i:])
        if blank and token == LETTERS.eos_id and not given_later:
            length = i + 1
            break
    assert text_length(tokens, canvas, LETTERS) == length
