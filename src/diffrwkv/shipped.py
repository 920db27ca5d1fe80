"""The models that come with the package, each a folder in models/ that `convert --to=hf` wrote; found without JAX."""

import os
from pathlib import Path

from diffrwkv.config import UserError

FOLDER = Path(__file__).parent / "models"
MODELS = {
    "books": "block diffusion on novels: BiRWKV, 1.7 million parameters",
    "books-ar": "from left to right on the same text: RWKV-7, which `books` began as, and which can judge its samples",
}


def path_of(source: str | os.PathLike) -> str | os.PathLike:
    """The folder of a model of ours; whatever is no name of one, as it is.

    Raises UserError where a name is that of something in the current folder as well.
    """
    if source not in MODELS:
        return source
    if os.path.lexists(source):
        raise UserError(
            f"{source!r} is a model that comes with diffrwkv, and lies in the current folder too: write ./{source} for "
            "the latter, or go elsewhere for the former."
        )
    return FOLDER / str(source)
