"""One tiny run, trained once, that the tests of the programs share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CONFIG = """
from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg=None):
    c = base()
    if arg is not None:
        presets.diffuse_blocks(c, arg)
    c.data.name = {text!r}
    c.data.length = 16
    c.model.dim = 16
    c.model.num_layers = 1
    c.model.dropout = 0.1
    c.model.mixers.birwkv7.head_dim = 8
    c.model.mixers.birwkv7.implementation = "reference"  # this and the next two: little to compile
    c.model.mixers.birwkv7.share = "all"
    c.model.channel_mixers.rwkv7.shift = "none"
    c.model.mixers.birwkv7.lora_ranks = {{"w": 4, "a": 4, "v": 4, "g": 4}}
    c.samplers.ancestral.num_steps = 8
    c.optim.warmup_steps = 4
    c.train.num_steps = 12
    c.train.batch_size = 8
    c.train.log_every = 1
    c.train.checkpoint_every = 2
    c.train.eval_every = 4
    c.train.eval_limit = 20
    c.train.eval_batch_size = 8
    c.train.sample_every = 12
    c.train.num_samples = 1
    c.train.tensorboard = False
    c.train.cpu_devices = 2
    c.train.compilation_cache = {cache!r}
    return c
"""

LEFT_TO_RIGHT = """
    c.model.pattern = "rwkv7"
    c.model.mixers.rwkv7.head_dim = 8
    c.model.mixers.rwkv7.implementation = "reference"
    c.model.mixers.rwkv7.lora_ranks = {"w": 4, "a": 4, "v": 4, "g": 4}
    c.model.channel_mixers.rwkv7.shift = "previous"
    c.diffusion.name = c.sampler.name = "autoregressive"
    c.train.num_steps = 4
    return c
"""

ALPHABET = "abcdefghij klmnopqrstuvwxyz.\n"


class Programs:
    """Runs the programs in processes of their own, on the tiny experiment.

    Compiling is most of a tiny run: the processes share a compilation cache and leave optimisations out.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        letters = np.random.default_rng(0).integers(len(ALPHABET), size=6000)
        (folder / "text.txt").write_text("".join(ALPHABET[i] for i in letters))
        self.config = folder / "tiny.py"
        cache = os.environ["JAX_COMPILATION_CACHE_DIR"]  # the whole test run's
        self.config.write_text(CONFIG.format(text=str(folder / "text.txt"), cache=cache))
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # cli.run_program need not start anew to set it
        }

    def python(self, code: str, *arguments, environment=None) -> subprocess.CompletedProcess:
        """Runs `code`, which finds the arguments in sys.argv[1:]."""
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment | (environment or {}), timeout=300
        )

    def train(self, workdir: Path, *arguments: str, patch: str = "", config=None) -> subprocess.CompletedProcess:
        """`python -m diffrwkv.train` on the tiny experiment or the file `config`, after the statements in `patch`."""
        code = "from diffrwkv import checkpoint, cli, config, metrics, train\nimport os, signal, sys\n" + patch
        code += "\ncli.run_program(lambda _: train.main(sys.argv[1:]))"
        return self.python(code, f"--config={config or self.config}", f"--workdir={workdir}", *arguments)


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Programs:
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="session")
def trained(programs) -> Path:
    """The workdir of an uninterrupted run of 12 steps; to be copied before it is changed."""
    workdir = programs.folder / "trained"
    done = programs.train(workdir)
    assert done.returncode == 0, done.stderr
    (workdir / "stdout.txt").write_text(done.stdout)
    return workdir


@pytest.fixture(scope="session")
def left_to_right(programs) -> Path:
    """The same for an autoregressive model of the same text: 4 steps."""
    config = programs.folder / "ar.py"
    config.write_text(programs.config.read_text().replace("\n    return c\n", LEFT_TO_RIGHT))
    workdir = programs.folder / "ar"
    done = programs.train(workdir, config=config)
    assert done.returncode == 0, done.stderr
    return workdir
