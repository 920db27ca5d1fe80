"""The golden arrays in tests/golden, and how far something is from them."""

import os
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent / "golden"
# Files too large to be committed lie in the folder that DIFFRWKV_GOLDEN names, one subfolder per origin.
ELSEWHERE = pathlib.Path(os.environ.get("DIFFRWKV_GOLDEN", FOLDER.parents[2] / "shared" / "golden"))


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of NAME in tests/golden or in DIFFRWKV_GOLDEN; skips the test where neither has it."""
    for path in (FOLDER / name, *(ELSEWHERE / origin / name for origin in ("mdlm", "rwkv7"))):
        if path.is_file():
            with np.load(path) as file:
                return {key: file[key] for key in file.files}
    pytest.skip(f"{name} is too large to be committed: set DIFFRWKV_GOLDEN to the folder that has it")


def relative_error(actual, expected) -> float:
    """|actual - expected| / |expected|, Euclidean, in float64."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_close(actual, expected, tolerance):
    """The relative errors of all arrays of `expected`, by name, within the tolerance."""
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors
