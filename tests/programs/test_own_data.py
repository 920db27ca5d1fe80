"""The commands of docs/own_data.md, on a tiny text and a tiny network."""

import subprocess
import sys

import numpy as np
import pytest

from tests.test_text_blocks import BLOCKS, ROOT

WORDS = "the a of and to in is was he she it for with as his on be at by had".split()
TINY = (
    "--config.train.num_steps=2 --config.train.eval_limit=4 --config.train.num_samples=1 --config.model.dim=32 "
    "--config.model.num_layers=1 --config.data.length=32 "
    "--config.train.batch_size=4 --config.train.eval_batch_size=4 --config.train.tensorboard=false "
    "--config.train.cpu_devices=1"
)


@pytest.mark.slow
def test_the_page_leads_from_a_folder_to_samples(tmp_path, programs):
    (tmp_path / "texts").mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text(" ".join(rng.choice(WORDS, 3000)))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    blocks = [block for block in BLOCKS if block.page == "docs/own_data.md" and block.language == "bash"]
    assert [block.mark for block in blocks] == ["run: tests/programs/test_own_data.py"] * 2
    tiny = [f"--{given.strip()}" for given in TINY.split("--")[1:]]
    said = []
    for block in blocks:
        commands = []
        for command in block.text.replace("\\\n", " ").splitlines():
            kept = [
                word for word in command.split() if word.partition("=")[0] not in {t.partition("=")[0] for t in tiny}
            ]
            command = " ".join([*kept, *tiny]) if "diffrwkv.train" in command else command
            commands.append(command.replace("python", sys.executable, 1).replace("--num=4", "--num=1"))
        done = subprocess.run(
            ["bash", "-ec", "\n".join(commands)],
            cwd=tmp_path,
            env=programs.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert (tmp_path / "runs" / "mine" / "eval.json").is_file()
    assert len(said[0]) > 1000 and "the " in said[1].splitlines()[-1]
