"""Documents in files, and out of streams of pieces."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pytest

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


def compress(path, data, inside="inside.txt"):
    """Writes data as the path's ending has it; ``inside``: the name of the file in a .zip."""
    suffix = path.suffix.lower()
    if suffix == ".xz":
        data = lzma.compress(data)
    elif suffix == ".lzma":
        data = lzma.compress(data, lzma.FORMAT_ALONE)
    elif suffix == ".bz2":
        data = bz2.compress(data)
    elif suffix == ".gz":
        data = gzip.compress(data)
    elif suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as appending to a .zst makes
        data = b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))
    elif suffix == ".zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(inside, data)
        data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def jsonl(key="text"):
    return "\n".join(json.dumps({"id": i, key: d}) for i, d in enumerate(DOCUMENTS)).encode()
