import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import tarfile
import tracemalloc
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


def documents_of(path, **options):
    """The documents of a file, and how many records were left out."""
    reading = readers.Reading(**options)
    found = read(sources.open_source(str(path), reading=reading).splits["all"])
    return found, sum(entry["records"] for entry in reading.skipped.values())


# What a file is

LINES = "".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(DOCUMENTS))
ARRAY = json.dumps([{"id": i, "text": d} for i, d in enumerate(DOCUMENTS)])


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst", ".bz2", ".lzma", ".zip", ".GZ"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.jl", LINES),
        ("a.JSONLines", LINES),
        ("a.json", LINES),
        ("a.json", ARRAY),
        ("a.json", json.dumps(json.loads(ARRAY), indent=4)),
        ("a.json", "\n".join(json.dumps(json.loads(line), indent=1) for line in LINES.splitlines())),
        ("a.jsonl", ARRAY),
        ("RC_2019-04", LINES),
        ("RC_2019-04", ARRAY),
        ("a.TSV", "id\ttext\n" + "".join(f'{i}\t"{d}"\n' for i, d in enumerate(DOCUMENTS))),
        ("a.CSV", "id,text\r\n" + "".join(f'{i},"{d}"\r\n' for i, d in enumerate(DOCUMENTS))),
        ("a.txt", "\n<|endoftext|>\n".join(DOCUMENTS)),
        ("a.txt", "\r\n<|endoftext|>\r\n".join(DOCUMENTS)),
        ("a", "\n<|endoftext|>\n".join(DOCUMENTS)),
    ],
)
def test_what_a_file_is(tmp_path, name, text, suffix):
    """Every format, under every name it goes by, however compressed, with or without a byte order mark."""
    for mark in ("", "\ufeff"):
        path = compress(tmp_path / (name + suffix), (mark + text).encode(), inside=name)
        assert documents_of(path) == (DOCUMENTS, 0)


def test_content_decides_where_the_name_says_nothing_or_wrong(tmp_path):
    whole = "\n<|endoftext|>\n".join(DOCUMENTS).encode()
    for name, data in [
        ("a.txt", gzip.compress(whole)),
        ("a.gz", lzma.compress(whole)),
        ("b.jsonl", gzip.compress(LINES.encode())),
        ("c.zst", bz2.compress(LINES.encode())),
    ]:
        (tmp_path / name).write_bytes(data)
        assert documents_of(tmp_path / name) == (DOCUMENTS, 0), name


def test_a_long_window_of_zstd_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    data = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.zst"
    path.write_bytes(data.compress(LINES.encode()) + data.flush())
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(path.read_bytes()).read()
    assert documents_of(path) == (DOCUMENTS, 0)


def gz(data):
    return gzip.compress(data, mtime=0)  # the same in every process, as it becomes a test's name


def tar(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar", tar(a=b"text"), "archive .*What is read: text, JSON"),
        ("a.tgz", gz(tar(a=b"text")), "archive"),
        ("a.tar.bz2", bz2.compress(tar(a=b"text")), "archive"),
        ("a.txt", tar(a=b"text"), "is a tar archive"),
        ("a.txt.gz", gz(tar(a=b"text")), "is a tar archive"),
        ("a", gz(tar(a=b"text")), "is a tar archive"),
        ("a.txt.gz", gz(gz(b"text")), "compressed more than once"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c\0\4", "archive"),
        ("a.txt", b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive"),
        ("a.rar", b"Rar!\x1a\x07\1\0", "archive"),
        ("a", b"Rar!\x1a\x07\1\0", "is a rar archive"),
        ("a.lz4", b"\x04\x22\x4d\x18abc", "archive or compressed"),
        ("a.txt.br", b"anything", "archive or compressed"),
        ("a.pdf", b"%PDF-1.7\nabc", "is a PDF"),
        ("a.txt", "text".encode("utf-16"), "is text in UTF-16"),
        ("a.jsonl", LINES.encode("utf-16"), "is text in UTF-16"),
        ("a.txt", "text".encode("utf-16-le"), "byte at offset 1 is zero.*What is read"),
        ("a.txt", b"x" * 3_000_000 + b"\0", "byte at offset 3,000,000 is zero"),
        ("a.txt.gz", gz(b"abc\n\0"), "byte at offset 4 is zero"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\0"}\n', "line 2 of .*byte at offset 25 is zero"),
        ("a.csv", b"text\na\nb\0\n", "line 3 of .*byte at offset 8 is zero"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("a.txt", LINES.encode(), "begins as JSON does: name it .jsonl"),
        ("a.md", ARRAY.encode(), "begins as JSON does"),
        ("a.parquet", b"text", "is damaged, or not what its name says"),
        ("a.txt.gz", b"", "is damaged, or not what its name says"),
        ("a.txt.bz2", bz2.compress(b"abc" * 99)[:-9], "a.txt.bz2 is damaged"),
        ("a.txt.gz", gz(b"abc" * 99)[:-9], "a.txt.gz is damaged"),
        ("a.json", b"[]", "has no text in it"),
        ("a.json", b'{"data": [{"text": "a"}], "n": 1}', "no text under 'text'; it has: data, n"),
        ("a.json", b'{\n "data": [{"text": "a"}]\n}', "no text under 'text'; it has: data"),
        ("a.json", b'["a", "b"]', "element 1 of .*no text under 'text'; it has: str"),
        ("a.json", b'"a"', "line 1 of .*no text under 'text'; it has: str"),
        ("a.json", b"some text", "line 1 of .*a.json is not JSON"),
        ("a.json", b"some\ntext", "not JSON in what begins at line 1"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"', "not JSON in what begins at line 2"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "not JSON in what begins at line 2"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2 .no comma between two elements"),
        ("a.json", b'[{"text": "a"}', "line 1 .it ends within"),
        ("a.json", b'[{"text": "a"}]\n[]', "line 2 .more after the array"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        documents_of(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_cut_off_zst_is_refused(tmp_path):
    """The library ends such a stream as if it were whole."""
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.compress(b"It goes on. " * 100_000 + os.urandom(5000))
    for stop in (len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"first") + whole[:stop])
        with pytest.raises(ValueError, match="a.txt.zst is damaged"):
            documents_of(tmp_path / "a.txt.zst")


@pytest.mark.parametrize("names", [["a.jsonl"], ["__MACOSX/._a.jsonl", "in/a.jsonl", "in/.DS_Store"]])
def test_zip_of_one_file(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, LINES if name.endswith("/a.jsonl") or len(names) == 1 else "x")
    assert documents_of(tmp_path / "a.zip") == (DOCUMENTS, 0)


def test_every_format_cut_off_anywhere_is_whole_or_refused(tmp_path):
    """Compressed files of which an end is missing: never a part of the text without a word."""
    data = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    for suffix, squeeze in data.items():
        whole = squeeze(LINES.encode())
        for stop in range(0, len(whole), 7):
            (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[:stop])
            with pytest.raises(ValueError, match="damaged"):
                documents_of(tmp_path / f"a.jsonl{suffix}")


# Bytes


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"one\ntwo\ncaf\xe9 x", "byte 0xe9 at offset 11, line 3"),
        ("a.txt", b"x" * (1 << 20) + "é".encode() + b"\n\xff", r"0xff at offset 1,048,579, line 2"),
        ("a.txt", b"abc\xe2\x82", "byte 0xe2 at offset 3, line 1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "byte 0xe9 at offset 27, line 2"),
        ("a.csv", b"text\na\ncaf\xe9\n", "byte 0xe9 at offset 10, line 3"),
        ("a.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', "byte 0xe9 at offset 29, line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\\ud83d"}\n', "line 2 of .*U.D83D.*character 1 of"),
        ("a.json", b'[{"text": "\\udc00"}]', "element 1 of .*U.DC00"),
    ],
)
def test_what_is_no_character_is_told_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        documents_of(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 20, 10_000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_documents_of_a_text_have_no_stray_ends(tmp_path, block, newline):
    documents = ["first\rone", "x" * 70 + "<|endoftext|>" + newline + "y", " é " * 30, "last"]
    path = tmp_path / "a.txt"
    between = f"{newline}<|endoftext|>{newline}"
    path.write_bytes(b"\xef\xbb\xbf" + (between[len(newline) :] + between.join(documents) + between).encode())
    assert read(lambda: readers.text_pieces(path, block=block)) == documents


# Records


def rows(*lines):
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize(
    ("name", "data", "documents", "bad"),
    [
        # a quote that is not closed takes no other row with it
        ("a.csv", rows("id,text", '1,"abc', "2,def", '3,"ghi"', "4,jkl"), ["def", "ghi", "jkl"], 1),
        ("a.csv", rows("id,text", '1,"abc', "2,def"), ["def"], 1),
        ("a.csv", rows("id,text", '1,"ab"c', "2,def"), ["def"], 1),
        ("a.csv", rows("id,text", '1,a"b"c', '2,"d""e,\nf"'), ['a"b"c', 'd"e,\nf'], 0),
        ("a.tsv", rows("id\ttext", '1\t"abc', "2\tdef", '3\t"ghi"'), ['"abc', "def", "ghi"], 0),
        ("a.tsv", rows("id\ttext", '1\t"a', '2\tb"'), ['"a', 'b"'], 0),
        ("a.tsv", rows("id\ttext\tx", '1\t"a\t0', '2\tb"\t0', "3\tc\t0"), ['"a', 'b"', "c"], 0),
        ("a.tsv", rows("id\ttext", '1\t"a" said b', "2\tc"), ['"a" said b', "c"], 0),
        ("a.tsv", rows("id\ttext", '1\t"two\nlines"', "2\tc"), ["two\nlines", "c"], 0),
        ("a.tsv", rows("text\tx", '"a\tb"\t0', '"a\t0'), ["a\tb", '"a'], 0),
        # a row has as many fields as the header
        ("a.csv", rows("id,text", "1,hello, world", "2,b"), ["b"], 1),
        ("a.csv", rows("id,text,x", "1,a,0", "2,b", "3,c,0"), ["a", "c"], 1),
        ("a.csv", rows("id,text", "1,a", "", "2,b"), ["a", "b"], 0),
        ("a.csv", b"id,text\r1,a\r2,b", ["a", "b"], 0),
        # broken records and ones without text
        ("a.csv", b"id,text\n1,caf\xe9\n2,b\n3,\0\n4,c\n", ["b", "c"], 2),
        ("a.jsonl", rows('{"text": "a"}', "{", '{"text": "b"}', "[1]", '{"x": 1}'), ["a", "b"], 3),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": null}\n{"text": "b"}', ["a", "b"], 2),
        ("a.jsonl", rows('{"text": "\\ud800"}', '{"text": "\\ud83d\\ude00"}'), ["\U0001f600"], 1),
        ("a.jsonl", rows("[" * 200_000, '{"text": "a"}', '{"text": ' + "1" * 5000 + "}"), ["a"], 2),
        ("a.json", b'[{"text": "a"}, {"text": null}, 3, {"text": "b"}]', ["a", "b"], 2),
    ],
)
def test_a_bad_record_stops_or_is_left_out_and_counted(tmp_path, name, data, documents, bad):
    path = tmp_path / name
    path.write_bytes(data)
    assert documents_of(path, on_error="skip") == (documents, bad)
    if bad:
        with pytest.raises(ValueError, match=r"(line|element) \d+.*\(on_error='skip' leaves") as caught:
            documents_of(path)
        assert str(path) in str(caught.value)
    else:
        assert documents_of(path) == (documents, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows("id,body", "1,a"), "header, row 1 of .*no text under 'text'; it has: id, body"),
        (rows("text,text", "a,b"), "more than one column 'text'"),
    ],
)
def test_a_bad_header_is_no_record_to_leave_out(tmp_path, data, message):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        documents_of(tmp_path / "a.csv", on_error="skip")


def test_nothing_but_bad_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl("body"))
    with pytest.raises(ValueError, match="no text in it, only 3 bad records: line 1 of .* has: id, body"):
        documents_of(tmp_path / "a.jsonl", on_error="skip")


def test_bad_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "b", "c" * 50]}), path, row_group_size=2)
    assert documents_of(path, on_error="skip", max_document_bytes=49) == (["a", "b"], 2)
    with pytest.raises(ValueError, match="row 2 of .*a.parquet: 'text' is null"):
        documents_of(path)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match="a.parquet.gz is parquet that is compressed as a whole"):
        documents_of(tmp_path / "a.parquet.gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="a.parquet is damaged"):
        documents_of(path)
    path.rename(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="b.txt is damaged"):
        documents_of(tmp_path / "b.txt")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_record_above_the_limit(tmp_path, name):
    texts = ["a" * 40, "é" * 50, "b" * 40]
    if name == "a.jsonl":
        data = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    elif name == "a.json":
        data = json.dumps([{"text": t} for t in texts], ensure_ascii=False)
    else:
        data = "text\n" + "".join(f'"{t}"\n' for t in texts)
    (tmp_path / name).write_text(data, encoding="utf-8")
    assert documents_of(tmp_path / name, max_document_bytes=200) == (texts, 0)
    with pytest.raises(ValueError, match=f"(line|element) [23] of .*{name} is too long: .* max_document_bytes"):
        documents_of(tmp_path / name, max_document_bytes=99)
    assert documents_of(tmp_path / name, max_document_bytes=99, on_error="skip") == ([texts[0], texts[2]], 1)


def test_bad_options():
    with pytest.raises(ValueError, match="on_error must be 'stop' or 'skip', not 'ignore'"):
        readers.Reading(on_error="ignore")
    for size in (0, -1, 1 << 70):
        with pytest.raises(ValueError, match=f"max_document_bytes must be from 1 to 2.40, not {size}"):
            readers.Reading(max_document_bytes=size)


# Memory: bounded by the longest document, not by what a file expands to


def peak(function):
    """The most bytes held while a function ran, and what it returns."""
    tracemalloc.start()
    try:
        result = function()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def squeezed(path, parts):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for part in parts:
            file.write(part)
    return path


def test_memory_is_bounded_by_the_longest_document(tmp_path):
    """64 MB each of text, lines, an array and rows: read through in a few megabytes."""
    block = (b"All work and no play. " * 50_000)[: 1 << 20]
    record = b'{"text": "' + block[: 1 << 16] + b'"}'
    files = [
        squeezed(tmp_path / "a.txt.gz", [block] * 64),
        squeezed(tmp_path / "b.jsonl.gz", [(record + b"\n") * 16] * 64),
        squeezed(tmp_path / "c.json.gz", [b"[" + record, *[(b"," + record) * 16] * 64, b"]"]),
        squeezed(tmp_path / "d.csv.gz", [b"text\n", *[(b'"' + block[: 1 << 16] + b'"\n') * 16] * 64]),
    ]
    for path in files:
        count = lambda path=path: sum(len(text) for text, _ in readers.file_pieces(path))
        used, characters = peak(count)
        assert characters > 60e6
        assert used < 12e6, path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_record_without_end_is_refused_in_little_memory(tmp_path, name):
    """100 MB without the end of a line, or of a quote: no more than the limit is held."""
    before = {"a.jsonl": b'{"text": "', "a.json": b'[{"text": "'}.get(name, b'text\n"')
    path = squeezed(tmp_path / (name + ".gz"), [before, *[b"spam" * (1 << 18)] * 100])
    reading = readers.Reading(max_document_bytes=1 << 20)

    def refused():
        with pytest.raises(ValueError, match="too long|not closed|not JSON"):
            list(readers.file_pieces(path, reading))

    assert peak(refused)[0] < 12e6


# Anything at all


@pytest.mark.parametrize(("suffix", "alphabet"), [("csv", 'ab",\n\r\té '), ("tsv", 'ab",\n\ré ')])
def test_what_the_csv_module_writes_is_what_is_read(tmp_path, suffix, alphabet):
    """Tabs in fields of a .tsv are left out: whether its quotes are quotes is a guess there."""
    random.seed(0)
    texts = ["".join(random.choices(alphabet, k=random.randrange(1, 12))) for _ in range(2000)]
    with (tmp_path / f"a.{suffix}").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="," if suffix == "csv" else "\t")
        writer.writerows([("id", "text", "x"), *((i, text, "y") for i, text in enumerate(texts))])
    assert documents_of(tmp_path / f"a.{suffix}") == (texts, 0)


def mutated(data):
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5])):
        i = random.randrange(len(data) + 1)
        change = random.randrange(5)
        if change == 0:
            del data[i:]
        elif change == 1:
            data[i : i + random.randrange(9)] = b""
        elif change == 2:
            data[i:i] = bytes(random.choices(b'\0"\n\r\t,{}[]\xff\\ue', k=2))
        elif change == 3:
            data[i:i] = data[: random.randrange(50)]
        elif i < len(data):
            data[i] = random.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst", ".zip"])
def test_damage_of_any_kind_is_told_with_the_file(tmp_path, suffix):
    """Some 700 damaged files: each is read, or refused in a sentence that names it."""
    random.seed(1)
    table = "".join(f'{i},"{d}"\n' for i, d in enumerate(DOCUMENTS))
    files = {"a.jsonl": LINES, "a.json": ARRAY, "a.csv": "id,text\n" + table, "a": LINES}
    files |= {"a.tsv": files["a.csv"].replace(",", "\t"), "a.txt": "\n<|endoftext|>\n".join(DOCUMENTS)}
    for name, text in files.items():
        whole = compress(tmp_path / (name + suffix), text.encode(), inside=name).read_bytes()
        for _ in range(20):
            path = tmp_path / (random.choice([name, *files]) + suffix)
            path.write_bytes(mutated(whole))
            try:
                documents_of(path, on_error=random.choice(["stop", "skip"]), max_document_bytes=1000)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error).replace(str(path), "")


def test_damaged_parquet_is_told_with_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    random.seed(2)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": DOCUMENTS * 9}), path)
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(mutated(whole))
        try:
            documents_of(path, on_error=random.choice(["stop", "skip"]))
        except ValueError as error:
            assert str(path) in str(error)
