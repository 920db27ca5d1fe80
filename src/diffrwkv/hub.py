"""Models of the Hugging Face hub: "hf:OWNER/NAME", by the extra `hub`."""

import os
import re
from pathlib import Path
from typing import Any

from diffrwkv import config, shipped

PREFIX = "hf:"
# What is downloaded of a model: no code, no other framework's weights.
FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "rwkv_vocab*.txt", "README.md")


def is_model(source: str | os.PathLike) -> bool:
    """Whether it is written as a model of the hub."""
    return os.fspath(source).startswith(PREFIX)


def local(source: str | os.PathLike) -> Path:
    """A path as it is, with ~ as the shell has it; the folder of a model of the hub, downloaded unless it is at hand.

    Args:
      source: a path, a name in `shipped.MODELS`, "hf:OWNER/NAME", or "hf:OWNER/NAME/FILE" for one file of it.

    Raises:
      ValueError: malformed, or it cannot be had; offline too.
      ImportError: without the extra `hub`.
    """
    text = os.fspath(shipped.path_of(source))
    if not is_model(text):
        return config.at_home(text)
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/(.+))?", text)
    if not match:
        raise ValueError(f"{text} names no model of the hub: write hf:OWNER/NAME, or hf:OWNER/NAME/FILE.")
    name, file = match.groups()
    library = _library(text)
    try:
        if file:
            return Path(library.hf_hub_download(name, file))
        return Path(library.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as e:  # its own and its network library's, of many classes
        raise ValueError(
            f"{text} cannot be had from the hub ({type(e).__name__}: {_first_line(e)}): see that the name is right and "
            "the network there, or download it elsewhere and give the folder."
        ) from e


def push(folder: Path, name: str) -> str:
    """Uploads a folder as the model OWNER/NAME, made if it is not there; its address.

    Raises:
      ValueError: malformed, or the hub refuses it.
      ImportError: without the extra `hub`.
    """
    library = check_name(name)
    try:
        api = library.HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as e:
        raise ValueError(
            f"{folder} is written, but the hub did not take it as {name} ({type(e).__name__}: {_first_line(e)}): log "
            "in with `hf auth login`, and upload that folder."
        ) from e
    return f"https://huggingface.co/{name}"


def check_name(name: str) -> Any:
    """The library that `push` takes. Raises ValueError for what is no OWNER/NAME, ImportError without the library."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"--push={name} names no model of the hub: write OWNER/NAME.")
    return _library(f"--push={name}")


def _library(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(f"{what} needs huggingface_hub: pip install 'diffrwkv[hub]'") from None
    return huggingface_hub


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200].rstrip(".:")
