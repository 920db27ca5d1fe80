import os
from pathlib import Path

import pytest

from diffrwkv.data import folders, sources
from tests.documents import read


def tree(root, *names, content="text of {}"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.format(name))


def ignored(source, root):
    return {os.path.relpath(name, root) for name in source.info.get("ignored", {"names": []})["names"]}


def test_what_is_hidden_or_about_the_data_is_not_data(tmp_path):
    data = ["a.txt", "b/c.txt", "d.txt.gz", "part.0001.gz", "readme_of_the_war.txt", "licences/e.txt"]
    others = ["README.md", "readme.txt", "b/LICENSE.txt", "LICENCE-MIT.md", "CHANGELOG.md", "._a.txt", "state.json"]
    others += ["picture.png", "archive.tar.gz", "dataset_infos.json", "manifest.json", "a.npy", "none"]
    hidden = [".git/x.txt", ".ipynb_checkpoints/a-checkpoint.txt", "b/__pycache__/y.txt", "__MACOSX/._a.txt"]
    tree(tmp_path, *others, *hidden, *data)
    (tmp_path / "readme_of_the_war.txt").rename(tmp_path / "the readme of the war.txt")
    files, left = folders.find([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "a.txt",
        "b/c.txt",
        "d.txt.gz",
        "licences/e.txt",
        "part.0001.gz",
        "the readme of the war.txt",
    ]
    assert {str(path.relative_to(tmp_path)) for path in left} == {
        *others,
        ".git",
        ".ipynb_checkpoints",
        "b/__pycache__",
        "__MACOSX",
    }


def test_ignored_files_are_named_in_the_record(tmp_path):
    tree(tmp_path, "a.txt", "README.md", *(f"{i}.png" for i in range(30)))
    source = sources.open_source(str(tmp_path))
    assert read(source.splits["all"]) == ["text of a.txt"]
    assert source.info["ignored"]["files"] == 31 and len(source.info["ignored"]["names"]) == 20
    tree(tmp_path / "held", "b.txt", "LICENSE.txt")
    plan = sources.plan(str(tmp_path / "a.txt"), validation=str(tmp_path / "held"))
    assert plan.info["ignored"] == {"files": 1, "names": [str(tmp_path / "held" / "LICENSE.txt")]}


def test_a_file_named_by_its_path_is_always_read(tmp_path):
    tree(tmp_path, "README.md", ".hidden.txt", "none", ".cache/a.txt")
    for name in ("README.md", ".hidden.txt", "none"):
        assert read(sources.open_source(str(tmp_path / name)).splits["all"]) == [f"text of {name}"]
    assert read(sources.open_source(str(tmp_path / ".cache")).splits["all"]) == ["text of .cache/a.txt"]


def test_a_file_that_is_there_twice_is_read_once(tmp_path):
    tree(tmp_path, "in/a.txt", "in/b.txt")
    (tmp_path / "in" / "c.txt").symlink_to(tmp_path / "in" / "a.txt")
    os.link(tmp_path / "in" / "b.txt", tmp_path / "in" / "d.txt")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    tree(tmp_path, "out/e.txt")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out")
    source = sources.open_source(str(tmp_path / "in"))
    assert read(source.splits["all"]) == ["text of in/a.txt", "text of in/b.txt", "text of out/e.txt"]
    assert ignored(source, tmp_path / "in") == {"c.txt", "d.txt"}
    source = sources.open_source(str(tmp_path / "in" / "**"))
    assert len(read(source.splits["all"])) == 3


def test_a_file_beside_its_compressed_self(tmp_path):
    tree(tmp_path, "a.txt", "in/a.txt.gz", "in/b.txt", "in/b.jsonl")
    assert len(folders.find([tmp_path])[0]) == 4
    tree(tmp_path, "in/a.txt")
    with pytest.raises(ValueError, match="in/a.txt and .*in/a.txt.gz look like one text that is there twice"):
        sources.open_source(str(tmp_path))


def test_a_link_that_leads_nowhere_is_no_less_data(tmp_path):
    tree(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match="b.txt, a link to .*gone.txt, does not exist"):
        sources.open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.jsonl", "train"),
        ("train.txt", "train"),
        ("TRAIN_01.csv.gz", "train"),
        ("wiki.train.tokens", "train"),
        ("wiki.valid.tokens", "validation"),
        ("wikitext2_valid", "validation"),
        ("c4-validation.00001-of-00008.json.gz", "validation"),
        ("val.jsonl.zst", "validation"),
        ("dev2.txt", "validation"),
        ("test-x.txt", "test"),
        ("eval.txt", "test"),
        ("train/test.txt", "train"),
        ("en/Validation/0001.txt", "validation"),
        ("test/train/a.txt", "train"),
        ("a.txt", None),
        ("0001.txt", None),
        ("trains.txt", None),
        ("retrain.txt", None),
        ("the test of time.txt", None),
        ("devs/a.txt", None),
        (".txt", None),
    ],
)
def test_split_of_a_name(name, split):
    assert folders.split_of(Path(name)) == split


@pytest.mark.parametrize(
    "names",
    [
        ["train-0.txt", "train-1.txt", "validation-0.txt", "test.txt"],
        ["train/a.txt", "train/b.txt", "valid/a.txt", "test/a.txt"],
        ["x/train/0.txt", "x/train/val.txt", "x/dev/0.txt", "y/test/train-x/../1.txt"],
    ],
)
@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_names_of_splits_are_splits(tmp_path, names, pattern):
    """Nothing that is there to validate or to test is trained on."""
    tree(tmp_path, *names)
    plan = sources.plan(str(tmp_path / pattern))
    found = {split: len(read(reader)) for split, reader in plan.readers.items()}
    assert found == {"train": 2, "validation": 1, "test": 1}
    assert plan.sha256 is None and plan.settings["validation_fraction"] is None


def test_without_a_validation_split_the_training_split_is_divided(tmp_path):
    tree(tmp_path, "train.txt", content="abcdefghij")
    tree(tmp_path, "test.txt", content="xyz")
    plan = sources.plan(str(tmp_path), validation_fraction=0.2)
    assert {split: read(reader) for split, reader in plan.readers.items()} == {
        "train": ["abcdefgh"],
        "validation": ["ij"],
        "test": ["xyz"],
    }
    assert plan.sha256 is None and plan.settings["validation_fraction"] == 0.2


def test_one_split_alone_is_all_there_is(tmp_path):
    tree(tmp_path, "train/a.txt", "train/b.txt", "test-a.txt")
    for name in ("train", "train/*.txt", "test-a.txt"):
        assert set(sources.open_source(str(tmp_path / name)).splits) == {"all"}


def test_files_with_and_without_a_split(tmp_path):
    tree(tmp_path, "train.txt", "extra.txt")
    source = sources.open_source(str(tmp_path))
    assert read(source.splits["all"]) == ["text of extra.txt", "text of train.txt"]
    tree(tmp_path, "valid.txt")
    with pytest.raises(ValueError, match=r"valid.txt names a split .validation. and .*extra.txt none: let every"):
        sources.open_source(str(tmp_path))
    tree(tmp_path / "held", "test.txt", "dev.txt")
    with pytest.raises(ValueError, match=r"in splits .validation, test. and none of them is for training"):
        sources.plan(str(tmp_path / "held"))
    plan = sources.plan(str(tmp_path / "train.txt"), validation=str(tmp_path / "held"))
    assert read(plan.readers["validation"]) == ["text of dev.txt"]
    tree(tmp_path / "other", "test.txt", "train.txt")
    with pytest.raises(ValueError, match="none of them is for validation"):
        sources.plan(str(tmp_path / "train.txt"), validation=str(tmp_path / "other"))
