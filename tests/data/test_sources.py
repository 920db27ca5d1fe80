import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import string
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

from diffrwkv.data import datasets, download, readers, sources, splits

DOCUMENTS = ["first document, two\nlines\n", "second — café", "third " * 40]


def read(reader):
    """The documents of a stream."""
    out, current = [], ""
    for text, ends in reader():
        current += text
        if ends:
            out.append(current)
            current = ""
    assert current == "", "the last document never ended"
    return out


def compress(path, data):
    suffix = path.suffix
    if suffix == ".xz":
        data = lzma.compress(data)
    elif suffix == ".gz":
        data = gzip.compress(data)
    elif suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as appending to a .zst makes
        data = b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))
    elif suffix == ".zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("inside.txt", data)
        data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def jsonl(key="text"):
    return "\n".join(json.dumps({"id": i, key: d}) for i, d in enumerate(DOCUMENTS)).encode()


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".tsv"])
def test_every_format_and_compression(tmp_path, kind, suffix):
    if kind == ".txt":
        data = "\n<|endoftext|>\n".join(DOCUMENTS).encode()
    elif kind == ".jsonl":
        data = jsonl()
    else:
        comma = "," if kind == ".csv" else "\t"
        quoted = ['"' + d.replace('"', '""') + '"' for d in DOCUMENTS]
        data = "\r\n".join([f"id{comma}text", *(f"{i}{comma}{q}" for i, q in enumerate(quoted))])
        data = data.encode()
    path = compress(tmp_path / f"a{kind}{suffix}", data)
    source = sources.open_source(str(path))
    assert read(source.splits["all"]) == DOCUMENTS
    assert read(source.splits["all"]) == DOCUMENTS  # a reader starts afresh each time


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": [0, 1, 2], "body": DOCUMENTS})
    parquet.write_table(table, path)
    assert read(sources.open_source(str(path), text_key="body").splits["all"]) == DOCUMENTS
    with pytest.raises(ValueError, match="no column 'text'; it has: id, body.*text_key"):
        read(sources.open_source(str(path)).splits["all"])


def test_folder_pattern_and_data_folder(tmp_path):
    for i, document in enumerate(DOCUMENTS):
        compress(tmp_path / "sub" / f"{i}.txt.xz", document.encode())
    (tmp_path / "sub" / "notes.bin").write_bytes(b"\xff")
    assert read(sources.open_source("sub", tmp_path).splits["all"]) == DOCUMENTS
    assert read(sources.open_source("sub/[12].txt.xz", tmp_path).splits["all"]) == DOCUMENTS[1:]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no text in it"):
        sources.open_source(str(tmp_path / "empty"))


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_long_texts_come_in_pieces_that_join_to_the_file(tmp_path, block):
    text = "<|endoftext|>\nabc def\r\n\n" * 2 + "x" * 300 + " tail <|endoftext|> inline\n" * 9
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    documents, current = [], ""
    for piece, ends in readers.text_pieces(path, block=block):
        assert len(piece) <= 2 * block + 64
        current += piece
        if ends:
            documents.append(current)
            current = ""
    assert documents == text.removeprefix("<|endoftext|>\n").split("\n<|endoftext|>\n")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", "a.txt is not UTF-8 text .byte 0xe9"),
        ("a.txt", b"", "a.txt has no text in it"),
        ("a.txt.xz", b"no xz at all", "a.txt.xz is damaged"),
        ("a.txt.gz", b"no gz at all", "a.txt.gz is damaged"),
        ("a.txt.zst", b"no zst at all", "a.txt.zst is damaged"),
        ("a.txt.xz", lzma.compress(b"abc" * 99)[:-20], "a.txt.xz is damaged"),
        ("a.jsonl", b'{"text": "a"}\nnonsense\n', "line 2 of .*a.jsonl is not JSON"),
        (
            "a.jsonl",
            b'{"body": "a", "n": 1}\n',
            "line 1 of .* no text under 'text'; it has: body, n",
        ),
        ("a.jsonl", b'{"text": 5}\n', "'text' is int, not text"),
        ("a.jsonl", b"[1]\n", "no text under 'text'"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
        ("a.csv", b"id,body\n1,abc\n", "row 1 .* no text under 'text'; it has: id, body"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, name, data, message):
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(sources.open_source(str(tmp_path / name)).splits["all"])


def test_zip_of_several_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "a")
        archive.writestr("b.txt", "b")
    with pytest.raises(ValueError, match="a.zip holds 2 files; unpack it"):
        read(sources.open_source(str(tmp_path / "a.zip")).splits["all"])


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'shakespear' is neither .*tinyshakespeare.* any path"):
        sources.open_source("shakespear", tmp_path)
    with pytest.raises(ValueError, match="has no name"):
        sources.open_source("", tmp_path)


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFRWKV_DATA", str(tmp_path))
    assert download.data_root() == tmp_path
    assert download.data_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("DIFFRWKV_DATA")
    assert download.data_root() == Path("~/.cache/diffrwkv").expanduser()


# Splits


def pieces(*documents, size=3):
    """A reader that hands on ``size`` characters at a time."""

    def stream():
        for document in documents:
            for i in range(0, len(document), size):
                yield document[i : i + size], i + size >= len(document)

    return stream


def test_one_document_is_cut_at_the_character():
    parts, tally = splits.divide(pieces("abcdefghij"), 0.25, "x")
    assert read(parts["train"]) == ["abcdefg"] and read(parts["validation"]) == ["hij"]
    assert tally.sha256 == hashlib.sha256(b"abcdefghij").hexdigest()


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.95])
def test_several_documents_are_cut_between(fraction):
    documents = [c * (5 + 7 * i % 11) for i, c in enumerate(string.ascii_letters * 4)]
    parts, tally = splits.divide(pieces(*documents), fraction, "x")
    train, validation = read(parts["train"]), read(parts["validation"])
    assert train and validation and train + validation == documents
    ends = list(itertools.accumulate(map(len, documents)))
    at = int(ends[-1] * (1 - fraction))
    assert sum(map(len, train)) == min(ends, key=lambda e: abs(e - at))
    assert (tally.documents, tally.characters) == (208, ends[-1])


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [(1000, 9000), (9000, 1000), (10, 9980, 10), (1, 9999), (9999, 1)])
def test_a_document_is_cut_where_no_end_lies_near(sizes, fraction):
    """Neither side is ever far from what was asked for, and together they are the text."""
    documents = [c * size for c, size in zip("abc", sizes, strict=False)]
    parts, tally = splits.divide(pieces(*documents, size=100), fraction, "x")
    train, validation = ("".join(read(parts[split])) for split in ("train", "validation"))
    assert train + validation == "".join(documents)
    for have, want in ((train, 1 - fraction), (validation, fraction)):
        assert abs(len(have) - want * 10_000) <= 0.25 * 10_000 * min(fraction, 1 - fraction) + 1
    assert tally.sha256 == hashlib.sha256("\0".join(documents).encode()).hexdigest()


def test_an_end_that_lies_near_is_taken():
    parts, _ = splits.divide(pieces("a" * 88, "b" * 12), 0.1, "x")
    assert (read(parts["train"]), read(parts["validation"])) == (["a" * 88], ["b" * 12])
    parts, _ = splits.divide(pieces("a" * 87, "b" * 13), 0.1, "x")
    assert (read(parts["train"]), read(parts["validation"])) == (["a" * 87, "bbb"], ["b" * 10])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        splits.divide(pieces("abc"), fraction, "x")


def test_too_short_to_divide():
    with pytest.raises(ValueError, match="1 characters: too few"):
        splits.divide(pieces("a"), 0.1, "x")


def test_ranges_of_a_stream():
    text = "abcdefghijklmnop"
    for size in (1, 3, 100):
        reader = pieces(text, size=size)
        parts = [(0, 4), (4, 11), (11, None)]
        joined = [read(splits.between(reader, *part)) for part in parts]
        assert joined == [["abcd"], ["efghijk"], ["lmnop"]]
    numbered = pieces("a", "bb", "ccccc", "d")
    assert read(splits.documents(numbered, 1, 3)) == ["bb", "ccccc"]


def test_max_documents_and_validation_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "b.txt").write_text("held out")
    plan = sources.plan("a.jsonl", tmp_path, validation="b.txt", max_documents=2)
    assert read(plan.readers["train"]) == DOCUMENTS[:2]
    assert read(plan.readers["validation"]) == ["held out"]


# Downloads: file:// addresses, never the network


def remote(tmp_path, data, expected=None, name="home.txt"):
    home = compress(tmp_path / "home" / name, data)
    digest = hashlib.sha256(expected or data).hexdigest()
    return download.Remote("set/text" + "".join(home.suffixes), home.as_uri(), digest, ("other",))


@pytest.mark.parametrize("name", ["home.txt", "home.txt.xz", "home.zip"])
def test_download_once_then_found(tmp_path, monkeypatch, name):
    here, root = remote(tmp_path, b"the text", name=name), tmp_path / "root"
    path = here.get(root, "myset")
    assert path == root / here.saved_as and download.text_sha256(path) == here.sha256
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-done is left
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    assert here.get(root, "myset") == path


def test_found_under_another_name_and_compression(tmp_path):
    here, root = remote(tmp_path, b"the text"), tmp_path / "root"
    path = compress(root / "other.txt.xz", b"the text")
    assert here.get(root, "myset") == path


def test_wrong_content_is_refused(tmp_path):
    here, root = remote(tmp_path, b"tampered", expected=b"the text"), tmp_path / "root"
    with pytest.raises(ValueError, match="not the text of data set 'myset' .sha256"):
        here.get(root, "myset")
    assert not [p for p in root.rglob("*") if p.is_file()]
    (root / "other").write_bytes(b"something else")
    with pytest.raises(ValueError, match="move it away"):
        here.get(root, "myset")


def test_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(FileNotFoundError) as caught:
        sources.open_source("tinyshakespeare", tmp_path)
    for part in ("tinyshakespeare.txt", str(tmp_path), "DIFFRWKV_DATA", "no route to host"):
        assert part in str(caught.value)


def test_broken_off_download_leaves_nothing(tmp_path, monkeypatch):
    class Response(io.BytesIO):
        headers = {"Content-Length": "1000"}

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Response(b"half"))
    with pytest.raises(FileNotFoundError, match="ended after 4 of 1000 bytes"):
        download.download("http://x", tmp_path / "f.txt", None, name="myset")
    assert not list(tmp_path.iterdir())


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
    stand_in = download.Remote(
        "text8.zip", "file:///none", hashlib.sha256(text).hexdigest(), ("text8",)
    )
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
