"""The golden arrays in tests/golden, and how far something is from them."""

import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/NAME."""
    with np.load(FOLDER / name) as file:
        return {key: file[key] for key in file.files}


def relative_error(actual, expected) -> float:
    """|actual - expected| / |expected|, Euclidean, in float64."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))
