"""The data folder, and files that others have too: found there, or downloaded to there.

The data folder is, in this order: `config.data.root`, the environment variable `DIFFRWKV_DATA`,
`~/.cache/diffrwkv`. Content is checked against a SHA-256 of the *text*, so it does not matter how
the file is compressed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from diffrwkv.data.formats import open_binary, undamaged
from diffrwkv.files import file_sha256


def data_root(root: str | os.PathLike | None = None) -> Path:
    """The data folder: `root`, else `$DIFFRWKV_DATA`, else `~/.cache/diffrwkv`. It need not exist."""
    return Path(os.path.expanduser(root or os.environ.get("DIFFRWKV_DATA") or "~/.cache/diffrwkv"))


def text_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's decompressed bytes."""
    digest = hashlib.sha256()
    with open_binary(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, sha256: str | None, *, name: str, raw: bool = False) -> Path:
    """Downloads `url` to `path` with a progress bar; the file appears there whole and checked, or not at all.

    Args:
      sha256: of the decompressed text (of the file as it is if `raw`).

    Raises:
      FileNotFoundError: the download failed; the message says which file to put where.
      ValueError: the content is not the expected one.
    """
    import http.client
    import urllib.request

    from tqdm import tqdm

    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := response.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
            if total is not None and file.tell() != total:
                raise OSError(f"the connection ended after {file.tell()} of {total} bytes")
        try:
            with undamaged(part):
                found = file_sha256(part) if raw else text_sha256(part)
        except ValueError as error:
            raise ValueError(
                f"what {url} holds is not the text of data set {name!r} ({error}); nothing was kept. "
                f"Put the right file at {path}"
            ) from error
        if sha256 is not None and found != sha256:
            raise ValueError(
                f"what {url} holds is not the text of data set {name!r} (sha256 {found}, expected "
                f"{sha256}); nothing was kept. Put the right file at {path}"
            )
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"data set {name!r} is not in {path.parent} and could not be downloaded from {url} "
            f"({error}). Put the file there as {path.name}, or name the folder that has it in "
            "DIFFRWKV_DATA or config.data.root"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Remote:
    """A file that others have, too.

    Attributes:
      saved_as: where a download goes, relative to the data folder.
      url: its home; None: it is not downloaded.
      sha256: of the text inside, decompressed; the download and a file found in the data folder
        must both have it. None: it is not known.
      places: other names under which it may lie in the data folder; each also with .txt, .xz, .gz,
        .zst, .zip.
      origin: where the user finds it, for the error, where it is not downloaded.
    """

    saved_as: str
    url: str | None
    sha256: str | None
    places: tuple[str, ...] = ()
    origin: str = ""

    def find(self, root: Path) -> Path | None:
        """The file in the data folder, or None."""
        for place in (self.saved_as, *self.places):
            for ending in (
                "",
                ".txt",
                ".xz",
                ".txt.xz",
                ".gz",
                ".txt.gz",
                ".zst",
                ".txt.zst",
                ".zip",
            ):
                if (path := root / (place + ending)).is_file():
                    return path
        return None

    def get(self, root: Path, name: str) -> Path:
        """The file, found or downloaded, its content checked.

        Raises:
          FileNotFoundError: it is not there; the message says which file to put where.
          ValueError: the content is not the expected one.
        """
        path = self.find(root)
        if path is None:
            if self.url is None:
                raise FileNotFoundError(
                    f"data set {name!r} is not in {root}, and is not downloaded: put {self.origin} there as "
                    f"{self.saved_as}, or name the folder that has it in DIFFRWKV_DATA"
                )
            return download(self.url, root / self.saved_as, self.sha256, name=name)
        if self.sha256 is None:
            return path
        with undamaged(path):
            found = text_sha256(path)
        if found != self.sha256:
            raise ValueError(
                f"{path} is not the text of data set {name!r} (sha256 {found}, expected "
                f"{self.sha256}); move it away, or give its path as config.data.name to train on "
                "it as it is"
            )
        return path
