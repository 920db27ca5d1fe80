
import pytest

from diffrwkv.data import sources
from tests.documents import DOCUMENTS, compress, jsonl, read


def test_folder_pattern_and_data_folder(tmp_path):
    for i, document in enumerate(DOCUMENTS):
        compress(tmp_path / "sub" / f"{i}.txt.xz", document.encode())
    (tmp_path / "sub" / "notes.bin").write_bytes(b"\xff")
    assert read(sources.open_source("sub", tmp_path).splits["all"]) == DOCUMENTS
    assert read(sources.open_source("sub/[12].txt.xz", tmp_path).splits["all"]) == DOCUMENTS[1:]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no text in it"):
        sources.open_source(str(tmp_path / "empty"))


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'shakespear' is neither .*tinyshakespeare.* any path"):
        sources.open_source("shakespear", tmp_path)
    with pytest.raises(ValueError, match="has no name"):
        sources.open_source("", tmp_path)


def test_max_documents_and_validation_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "b.txt").write_text("held out")
    plan = sources.plan("a.jsonl", tmp_path, validation="b.txt", max_documents=2)
    assert read(plan.readers["train"]) == DOCUMENTS[:2]
    assert read(plan.readers["validation"]) == ["held out"]
