"""The notebook: a clean file, a config that training takes on every chip, and all of it run on a CPU at tiny sizes."""

import ast
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import notebook
from diffrwkv import train

# Runs in a process of its own: zmq and asyncio have warnings that are not ours.
EXECUTE = """
import sys, nbclient, nbformat
nb = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(nb)
where = {"metadata": {"path": sys.argv[2]}}
try:
    nbclient.NotebookClient(nb, timeout=240, kernel_name="python3", resources=where).execute()
finally:
    nbformat.write(nb, sys.argv[1])
"""

TINY = """
from diffrwkv import presets

small = {{"dim": 16, "num_layers": 1}}
recurrent = {{"head_dim": 8, "implementation": "reference", "share": "all"}}
presets.SIZES["test"] = {{
    "birwkv": small | {{"mixers": {{"birwkv7": recurrent}}}},
    "dit": small | {{"condition_dim": 8, "mixers": {{"attention": {{"head_dim": 8}}}}}},
}}
SOURCE = ""
TEXT, TOKENIZER = {text!r}, "char"
PROMPT, TEMPLATE = "the ", "the ____ of"
BACKBONES = ["birwkv", "dit"]
SIZE = "test"
LENGTH, BATCH, STEPS, MORE_STEPS = 32, 4, 4, 2
BLOCKS = "4,0"
STREAM = 40
"""


def assigned(source):
    """Names that the code of a cell sets at its top."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            found |= {leaf.id for target in node.targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return found


def test_the_file_is_clean():
    raw = notebook.NOTEBOOK.read_text()
    nb = json.loads(raw)
    assert raw == json.dumps(nb, indent=1, ensure_ascii=False) + "\n", "as Jupyter writes it"
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    assert nb["metadata"]["kernelspec"]["name"] == "python3" and "signature" not in nb["metadata"]
    ids = [cell["id"] for cell in nb["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in nb["cells"]:
        assert cell["source"], f"{cell['id']} is empty"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"{cell['id']} has outputs"
            assert set(cell["metadata"]) <= {"tags"}, f"{cell['id']} has metadata of a session"
        else:
            assert cell["cell_type"] == "markdown" and set(cell) == {"cell_type", "id", "metadata", "source"}


@pytest.mark.parametrize("chip, chips, dtype", [("tpu", 1, "bfloat16"), ("tpu", 8, "bfloat16"), ("cpu", 2, "float32")])
def test_training_takes_its_config(chip, chips, dtype):
    for backbone in notebook.parameters()["BACKBONES"]:
        cfg = notebook.experiment(backbone, chip, chips)
        train.check(cfg)
        assert cfg.model.dtype == dtype and cfg.train.batch_size % chips == 0
        assert tuple(cfg.layouts.blocks.sizes) == (16, 0)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="at tiny sizes, on a CPU")
def test_it_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install -e '.[dev]'")
    words = np.random.default_rng(0).choice("the a of and to in is was he she it".split(), 2000)
    (tmp_path / "text.txt").write_text(" ".join(words) + "_\n")
    nb = json.loads(notebook.NOTEBOOK.read_text())
    tiny = TINY.format(text=str(tmp_path / "text.txt"))
    assert assigned(tiny) >= assigned(notebook.tagged("parameters")), "every number is replaced"
    for cell in nb["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            cell["source"] = tiny
    path = tmp_path / "run.ipynb"
    path.write_text(json.dumps(nb))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment |= {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter")}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = {cell["id"]: cell.get("outputs", []) for cell in json.loads(path.read_text())["cells"]}
    said = {name: json.dumps(parts) for name, parts in outputs.items()}
    assert "This machine has a" in said["install"] and "x cpu" in said["devices"]
    assert "step 4/4" in said["train"] and "birwkv" in said["curves"] and "<svg" in said["curves"]
    assert "<iframe" in said["shipped"] and "He opened the " in said["shipped"]
    assert "<iframe" in said["denoise"] and said["infill"].count("the ") >= 4
    assert said["score"].count("nats") == 2
    assert "Going on from step 4" in said["resume"] and "step 6/6" in said["resume"]
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["birwkv", "dit"]
    streamed = "".join("".join(part["text"]) for part in outputs["stream"])
    assert streamed.startswith("the ") and len(streamed) == 40
