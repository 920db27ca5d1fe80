import hashlib
import os
import sys
import tarfile
import types
from pathlib import Path

import pytest

from diffrwkv.data import datasets, download, readers, sources, splits
from tests.documents import read

# Named data sets


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_every_data_set_says_what_it_is(name):
    assert len(datasets.DATASETS[name].open.__doc__) > 60


def test_python_reference_has_no_text_twice():
    source = sources.open_source("python_reference")
    documents = read(source.splits["all"])
    assert sum(map(len, documents)) > 200_000
    assert source.info["python"] == ".".join(map(str, sys.version_info[:3]))
    titles = [d.split("\n", 1)[0].strip('"').lower() for d in documents]
    assert titles == sorted(titles)
    parts, _ = splits.divide(source.splits["all"], 0.1, "x")
    train, validation = read(parts["train"]), read(parts["validation"])
    lines = {line for d in train for line in d.split("\n") if len(line) > 40}
    held = [line for d in validation for line in d.split("\n") if len(line) > 40]
    assert sum(line in lines for line in held) < 0.02 * len(held)


def test_python_reference_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match="this Python lacks it"):
        sources.open_source("python_reference")


def test_tinyshakespeare_split():
    root = os.environ.get("DIFFRWKV_DATA")
    if not root or datasets.TINYSHAKESPEARE.find(Path(root)) is None:
        pytest.skip("no tiny Shakespeare: set DIFFRWKV_DATA to a folder that has it")
    plan = sources.plan("tinyshakespeare")
    (train,), (validation,) = read(plan.readers["train"]), read(plan.readers["validation"])
    assert (len(train), len(validation)) == (1003854, 111540)
    assert plan.sha256 == datasets.TINYSHAKESPEARE.sha256
    assert len(set(train) | set(validation)) == 65


def test_wikitext2_articles():
    root = os.environ.get("DIFFRWKV_DATA")
    if not root or any(r.find(Path(root)) is None for r in datasets.WIKITEXT2.values()):
        pytest.skip("no WikiText-2: set DIFFRWKV_DATA to a folder that has it")
    source = sources.open_source("wikitext2")
    validation = read(source.splits["validation"])
    assert len(validation) == 60
    text = "".join(validation).encode()
    assert hashlib.sha256(text).hexdigest() == datasets.WIKITEXT2["validation"].sha256


def test_text8_splits(tmp_path, monkeypatch):
    text = b"abcdefghij" * 10
    stand_in = download.Remote("text8.zip", "file:///none", hashlib.sha256(text).hexdigest(), ("text8",))
    monkeypatch.setattr(datasets, "TEXT8", stand_in)
    (tmp_path / "text8").write_bytes(text)
    source = sources.open_source("text8", tmp_path)
    assert read(source.splits["train"]) == [text.decode()]  # far fewer than 90 million
    assert set(source.splits) == {"train", "validation", "test"}


def test_lm1b_from_archive_and_from_folder(tmp_path):
    inside = tmp_path / "inside" / datasets.LM1B
    for split, part in datasets.LM1B_FOLDERS.items():
        (inside / part).mkdir(parents=True)
        for i in range(2):
            (inside / part / f"news.en-{i:05d}").write_text(f"{split} {i} a\n{split} {i} b\n")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / f"{datasets.LM1B}.tar.gz", "w:gz") as archive:
        archive.add(inside, datasets.LM1B)
    unpacked = sources.open_source("lm1b", tmp_path / "inside")
    packed = sources.open_source("lm1b", root)
    assert len(packed.files) == 1 and len(unpacked.files) == 4  # whose changes are noticed
    for split in ("train", "validation"):
        expected = [f"{split} {i} {c}" for i in range(2) for c in "ab"]
        assert read(unpacked.splits[split]) == expected
        assert sorted(read(packed.splits[split])) == expected


# Hugging Face, by a stand-in for its library


class Rows(list):
    def skip(self, n):
        return Rows(self[n:])

    def take(self, n):
        return Rows(self[:n])


def test_hub_that_cannot_be_reached(hub):
    hub({"train": ["a"]})

    def unreachable(name, config):
        raise ConnectionError("no route to host")

    sys.modules["datasets"].load_dataset_builder = unreachable
    with pytest.raises(RuntimeError, match="'some/thing' could not be opened .ConnectionError: no"):
        sources.open_source("hf:some/thing")


@pytest.fixture
def hub(monkeypatch):
    """Installs a stand-in for ``datasets`` that has the given splits."""

    def install(splits, counted=True):
        counts = {k: types.SimpleNamespace(num_examples=len(v)) for k, v in splits.items()}
        info = types.SimpleNamespace(splits=counts if counted else None)
        library = types.ModuleType("datasets")
        library.load_dataset_builder = lambda name, config: types.SimpleNamespace(info=info)
        library.get_dataset_split_names = lambda name, config: list(splits)

        def load_dataset(name, config, split, streaming):
            assert streaming
            return Rows({"text": text} for text in splits[split])

        library.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", library)

    return install


def test_hugging_face_splits(hub):
    texts = [f"text {i}" for i in range(20)]
    hub({"train": texts})
    splits = sources.open_source("hf:some/thing").splits
    assert read(splits["train"]) == texts[:18] and read(splits["validation"]) == texts[18:]
    splits = datasets.hugging_face("hf:some/thing", first=3).splits
    assert read(splits["validation"]) == texts[:3] and read(splits["train"]) == texts[3:]
    hub({"train": texts, "validation": ["v"]})
    assert read(sources.open_source("hf:some/thing:config").splits["validation"]) == ["v"]


def test_hugging_face_errors(hub, monkeypatch):
    hub({"train": ["a"]}, counted=False)
    with pytest.raises(ValueError, match="does not say how many rows.*--validation"):
        sources.open_source("hf:some/thing")
    hub({"test": ["a"]})
    with pytest.raises(ValueError, match="no train split; it has: test"):
        sources.open_source("hf:some/thing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'diffrwkv\[hf\]'"):
        sources.open_source("hf:some/thing")


def test_bad_rows_of_the_hub(hub):
    texts = ["a", None, "b", "\ud800", "c", "d" * 20, "e", "f", "g", "h"]
    hub({"train": texts, "validation": ["v", 5]})
    source = sources.open_source("hf:some/thing")
    with pytest.raises(ValueError, match="row 2 of split 'train' of hf:some/thing: 'text' is null"):
        read(source.splits["train"])
    reading = readers.Reading(on_error="skip", max_document_bytes=10)
    source = sources.open_source("hf:some/thing", reading=reading)
    assert read(source.splits["train"]) == list("abcefgh") and read(source.splits["validation"]) == ["v"]
    assert read(source.splits["train"]) == list("abcefgh")
    assert readers.total_skipped(reading.skipped)["records"] == 4


def test_bad_lines_of_lm1b(tmp_path):
    for part in datasets.LM1B_FOLDERS.values():
        (tmp_path / datasets.LM1B / part).mkdir(parents=True)
        (tmp_path / datasets.LM1B / part / "news").write_bytes(b"one\r\ncaf\xe9\n\ntwo\n")
    source = sources.open_source("lm1b", tmp_path)
    with pytest.raises(ValueError, match=r"news is not UTF-8 text \(byte 0xe9 at offset 8, line 2\)"):
        read(source.splits["train"])
    source = sources.open_source("lm1b", tmp_path, reading=readers.Reading(on_error="skip"))
    assert read(source.splits["train"]) == ["one", "two"]


def test_wikitext_is_read_article_by_article(tmp_path, monkeypatch):
    articles = [f" \n = Title {i} = \n \n Text of {i} . \n \n = = Section = = \n \n more \n" * 9 for i in range(4)]
    articles = [" \n" + a.replace(f" = Title {i} = ", " text ", 8)[2:] for i, a in enumerate(articles)]
    (tmp_path / "a").write_text(text := "".join(articles))
    decoded = datasets.decoded
    whole = read(lambda: datasets._wikitext_articles(tmp_path / "a"))
    assert "".join(whole) == text and len(whole) == 4
    for block in (1, 7, 50):
        monkeypatch.setattr(datasets, "decoded", lambda raw, path, block=block: decoded(raw, path, block))
        assert read(lambda: datasets._wikitext_articles(tmp_path / "a")) == whole
