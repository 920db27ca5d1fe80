import hashlib
import io
from pathlib import Path

import pytest

from diffrwkv.data import download, sources
from tests.documents import compress


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFRWKV_DATA", str(tmp_path))
    assert download.data_root() == tmp_path
    assert download.data_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("DIFFRWKV_DATA")
    assert download.data_root() == Path("~/.cache/diffrwkv").expanduser()


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


@pytest.mark.parametrize("name", ["set.zip", "set.txt.gz", "set.txt.xz"])
def test_a_page_in_place_of_the_file_is_refused(tmp_path, name):
    (tmp_path / "home").write_text("<html>not found</html>")
    here = download.Remote(name, (tmp_path / "home").as_uri(), "0" * 64)
    with pytest.raises(ValueError, match="holds is not the text of data set 'myset' .*Put the right file at"):
        here.get(tmp_path / "root", "myset")
    assert not list((tmp_path / "root").iterdir())


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
