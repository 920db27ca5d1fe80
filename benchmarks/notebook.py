"""The notebook as programs see it: its cells, and the config of a run that they describe."""

import json
import pathlib

from benchmarks.measure import ROOT

NOTEBOOK = ROOT / "notebooks" / "colab_tpu.ipynb"


def cells(path: pathlib.Path = NOTEBOOK) -> list[dict]:
    """Its cells, in order."""
    return json.loads(path.read_text())["cells"]


def tagged(tag: str, path: pathlib.Path = NOTEBOOK) -> str:
    """The code of the one cell with this tag."""
    (cell,) = (cell for cell in cells(path) if tag in cell["metadata"].get("tags", ()))
    return "".join(cell["source"])


def parameters(path: pathlib.Path = NOTEBOOK) -> dict:
    """The names that the notebook's first cell sets, and their values."""
    names: dict = {}
    exec(tagged("parameters", path), names)
    return {name: value for name, value in names.items() if not name.startswith("__")}


def experiment(backbone: str, chip: str, chips: int, path: pathlib.Path = NOTEBOOK):
    """The config that the notebook trains on so many chips ("tpu", "gpu", "cpu") that need not be here."""
    names = parameters(path) | {"CHIP": chip, "CHIPS": chips}
    exec(tagged("experiment", path), names)
    return names["experiment"](backbone)
