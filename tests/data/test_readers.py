import lzma
import zipfile

import pytest

from diffrwkv.data import readers, sources
from tests.documents import DOCUMENTS, compress, jsonl, read


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
