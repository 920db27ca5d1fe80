"""Whether two versions of the package compute the same: losses bit for bit, samples token for token.

    python -m benchmarks.same OLD NEW [--only=RUN ...]

OLD and NEW are folders of checkouts, or git revisions. Both train each of `RUNS` for a few steps, on a CPU, and fill
the canvases of `CALLS`; then NEW goes on from OLD's checkpoint, and samples from it. Prints a table; the exit status is
1 where something differs. A checkpoint may be refused: with one sentence, which the table has.

All settings go through `presets` and the arguments of `diffrwkv.generate`; where the versions name a key of the config
differently, `EXPERIMENT` has both names.
"""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.measure import ROOT

# Models that compile fast, of every kind that samplers and checkpoints tell apart.
EXPERIMENT = """
from diffrwkv import presets
from diffrwkv.config import base


def get_config(name):
    c = base()
    name, _, searched = name.partition("+")
    presets.configure(c, name, "peer")
    c.data.length = 64
    c.model.update({"dim": 64, "num_layers": 2, "dropout": 0.1})
    for mixer in c.model.mixers.values():
        mixer.head_dim = 16
    if searched and "objectives" in c:
        c.diffusion.schedule = "cosine"
        c.objectives.mdlm.search_mask_rates = True
        c.objectives.mdlm.mask_rates = (0.1, 0.9)
    elif searched:
        c.diffusion.schedule = type(c)({"name": "cosine", "eps": 1e-3})
        c.diffusion.search_mask_rates = True
        c.diffusion.mask_rates = (0.1, 0.9)
    c.optim.warmup_steps = 10
    c.train.log_every = 1
    c.train.eval_limit = 16
    c.train.num_samples = 1
    return c
"""

# What is trained: its --config, "" standing for the file of EXPERIMENT.
RUNS = {
    "quickstart": "experiments/quickstart.py",
    "attention": ":dit",
    "blocks": ":birwkv@8,16",
    "searched": ":birwkv@16+searched",
    "left_to_right": ":ar_rwkv",
}

# Calls of diffrwkv.generate for each run, or of diffrwkv.stream; DEFAULTS are the arguments of all.
DEFAULTS = {"length": 48, "num": 2, "seed": 3, "batch_size": 2}
PROMPTS = {"prompts": ["The ", "An object of "]}
INFILL = {"infill": ["To be ____ not to ____", "________ object"], "length": None}
CUT = {"temperature": 0.7, "top_p": 0.9, "top_k": 12}
SHORT = {"num_steps": 12}
EVERY_MASKED = {
    "ancestral": SHORT,
    "ancestral cut": SHORT | CUT | PROMPTS,
    "ancestral without cache": SHORT | {"sampler": "ancestral", "cache": False, "eps": 1e-3},
    "confidence": {"sampler": "confidence", "num_steps": 8} | PROMPTS,
    "confidence margin": {"sampler": "confidence", "score": "margin", "block": 8, "num_steps": 3, "temperature": 1.0},
    "confidence entropy": {"sampler": "confidence", "score": "entropy", "num_steps": 8},
    "confidence threshold": {"sampler": "confidence", "rule": "threshold", "threshold": 0.15},
    "confidence factor": {"sampler": "confidence", "rule": "factor", "factor": 1.0} | INFILL,
    "confidence random": {"sampler": "confidence", "score": "random", "num_steps": 8, "temperature": 1.0},
    "first_hitting": {"sampler": "first_hitting"} | INFILL,
    "ice": {"sampler": "ice", "num_steps": 8, "threshold": 0.12} | PROMPTS,
    "prophet": {"sampler": "prophet", "num_steps": 8, "gaps": (2.0, 1.0, 0.5)} | PROMPTS,
    "remdm cap": SHORT | {"sampler": "remdm", "eta": 0.1},
    "remdm rescale": SHORT | {"sampler": "remdm", "strategy": "rescale", "eta": 0.1} | PROMPTS,
    "remdm conf": SHORT | {"sampler": "remdm", "strategy": "conf"} | CUT,
    "remdm loop": SHORT | {"sampler": "remdm", "strategy": "loop", "eta": 0.1, "t_on": 0.55, "t_off": 0.05},
}
CALLS: dict[str, dict[str, dict[str, Any]]] = {
    "quickstart": EVERY_MASKED
    | {
        "guided": SHORT | {"guidance": 1.5} | PROMPTS,
        "guided confidence": {"sampler": "confidence", "num_steps": 8, "guidance": 0.5} | INFILL,
    },
    "attention": {
        f"frozen {cache} {name}": call | {"frozen_cache": cache, "block_size": 16}
        for cache in ("prefix", "dual")
        for name, call in EVERY_MASKED.items()
        if name in ("ancestral", "ancestral cut", "confidence", "confidence factor", "remdm cap")
    },
    "blocks": {f"in blocks, {name}": call for name, call in EVERY_MASKED.items() if "margin" not in name}
    | {
        "another block": SHORT | {"block_size": 4} | PROMPTS,
        "no blocks": SHORT | {"block_size": 0},
        "pipelined": {"sampler": "pipelined", "threshold": 0.15} | PROMPTS,
        "pipelined cut": {"sampler": "pipelined", "window": 2, "add_at": 0.3, "activate_at": 0.5} | CUT,
        "stream": SHORT | {"stream": True, "prompt": "The "},
    },
    "searched": {"in blocks, ancestral": SHORT},
    "left_to_right": {"one by one": {}, "one by one cut": CUT | PROMPTS, "greedy": {"temperature": 0.0} | PROMPTS},
}

# Arguments of `python -m diffrwkv.sample`, beside --workdir, --json and the length.
PROGRAM = {
    "quickstart": ["--prompt=The ", "--sampler=confidence", "--set", "rule=factor", "--set", "factor=1.0"],
    "attention": ["--frozen_cache=dual", "--block_size=16", "--num_steps=8"],
    "blocks": ["--sampler=pipelined", "--set", "threshold=0.15", "--prompt=The "],
    "searched": ["--num_steps=8", "--top_k=9"],
    "left_to_right": ["--temperature=0.8", "--prompt=The "],
}

# Fills the canvases of one run: the arguments are its workdir, the calls, and the file for the arrays.
FILL = """
import ast, sys
import numpy as np
import diffrwkv

workdir, calls, target = sys.argv[1:]
run = diffrwkv.load(workdir)
arrays = {}
for name, call in ast.literal_eval(calls).items():
    try:
        if call.pop("stream", False):
            arrays[name + ": text"] = np.array("".join(diffrwkv.stream(run, **call)))
            continue
        made = diffrwkv.generate(run, return_trace=True, **call)
        arrays |= {f"{name}: {part}": getattr(made, part) for part in ("tokens", "lengths", "passes", "trace")}
    except Exception as e:
        arrays[name + ": failed"] = np.array(f"{type(e).__name__}: {e}")
np.savez(target, **arrays)
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what was compared, whether it is the same, and what to say of it."""

    what: str
    same: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two versions.

    Attributes:
      name: "old" or "new".
      checkout: its root.
      folder: for what it writes.
    """

    name: str
    checkout: pathlib.Path
    folder: pathlib.Path

    def workdir(self, run: str) -> pathlib.Path:
        return self.folder / run

    def python(self, *arguments: str, may_refuse: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs Python on this version's code. Exits, with the end of what it said, unless it ends well.

        Args:
          may_refuse: the status 2 with a sentence, that of a `UserError`, is an answer too.
        """
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.checkout / "src"), str(self.checkout)]),
            "JAX_PLATFORMS": "cpu",
            "TQDM_DISABLE": "1",
        }
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.checkout, env=environment, capture_output=True, text=True
        )
        if done.returncode and not (may_refuse and sentence(done)):
            sys.exit(f"{self.name}: python {' '.join(arguments)[:200]}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        return done

    def train(self, run: str, steps: int, workdir: pathlib.Path, **how: Any) -> subprocess.CompletedProcess[str]:
        file = RUNS[run]
        file = f"{self.folder.parent / 'experiment.py'}{file}" if file.startswith(":") else file
        steps_of = [f"--config.train.{key}={steps}" for key in ("num_steps", "eval_every", "checkpoint_every")]
        arguments = [*steps_of, "--config.train.tensorboard=False", "--config.train.cpu_devices=2"]
        if run == "quickstart":
            arguments += ["--config.train.log_every=1", "--config.train.num_samples=1"]
        return self.python("-m", "diffrwkv.train", f"--config={file}", f"--workdir={workdir}", *arguments, **how)

    def fill(self, run: str, calls: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
        target = self.folder / f"{run}.npz"
        self.python("-c", FILL, str(self.workdir(run)), repr(calls), str(target))
        with np.load(target) as arrays:
            return dict(arrays)

    def sample(self, run: str, workdir: pathlib.Path, **how: Any) -> subprocess.CompletedProcess[str]:
        flags = ["--json", "--length=48", "--num=2", "--seed=5", *PROGRAM[run]]
        return self.python("-m", "diffrwkv.sample", f"--workdir={workdir}", *flags, **how)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a program that refused, behind warnings; "" of another."""
    lines = done.stderr.strip().splitlines()
    refused = done.returncode == 2 and lines[-1:] and "Traceback" not in done.stderr
    return lines[-1] if refused and lines[-1].startswith("error: ") else ""


def checkout(given: str, folder: pathlib.Path) -> pathlib.Path:
    """The folder `given`, or the files of the git revision `given`, written to a new `folder`."""
    path = pathlib.Path(given)
    if (path / "src" / "diffrwkv").is_dir():
        return path.resolve()
    done = subprocess.run(["git", "archive", "--format=tar", given], cwd=ROOT, capture_output=True)
    if done.returncode:
        sys.exit(f"{given} is neither a checkout's folder nor a git revision: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def losses(workdir: pathlib.Path, after: int = 0) -> dict[tuple[int, str], float]:
    """{(step, name): value} of metrics.jsonl, but for times and speeds."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    wanted = ("train/", "val/", "mask_rate/", "tokens")
    return {
        (line["step"], key): value
        for line in lines
        for key, value in line.items()
        if line["step"] > after and key.startswith(wanted) and key != "tokens_per_second"
    }


def compared_losses(what: str, old: dict[tuple[int, str], float], new: dict[tuple[int, str], float]) -> Row:
    """Equal, every number of them, and no number without its pair."""
    wrong = [key for key in old | new if key not in old or key not in new or old[key] != new[key]]
    if not old or wrong:
        first = min(wrong, default=None)
        note = f"step {first[0]} {first[1]}: {old.get(first)!r}, {new.get(first)!r}" if first else "nothing was logged"
        pairs = [(old[key], new[key]) for key in wrong if old.get(key) is not None and new.get(key) is not None]
        most = max((abs(a - b) / max(abs(a), abs(b)) for a, b in pairs), default=0.0)
        return Row(what, False, f"{len(wrong)} of {len(old | new)} numbers differ, by {most:.1e} at most; {note}")
    last = max(key for key in old if key[1] == "train/loss")
    return Row(what, True, f"{len(old)} numbers; train/loss {old[last]:.7g} at step {last[0]}")


def compared_tokens(name: str, old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> Row:
    """The arrays of the call `name`: the same ones, with the same entries. One that failed is no comparison."""
    parts = sorted({key for key in old | new if key.startswith(name + ": ")})
    failed = [str(arrays[key]) for arrays in (old, new) for key in parts if key.endswith(": failed") and key in arrays]
    if failed or not parts:
        return Row(name, False, failed[0] if failed else "nothing was generated")
    for key in parts:
        part = key.removeprefix(name + ": ")
        if key not in old or key not in new or old[key].shape != new[key].shape:
            return Row(
                name, False, f"{part}: {[arrays[key].shape if key in arrays else None for arrays in (old, new)]}"
            )
        if differ := int((old[key] != new[key]).sum()):
            return Row(name, False, f"{part}: {differ} of {old[key].size} entries differ")
    passes = old.get(name + ": passes")
    return Row(name, True, "" if passes is None else f"{passes.mean():.4g} passes")


def compared_answers(what: str, old: subprocess.CompletedProcess[str], new: subprocess.CompletedProcess[str]) -> Row:
    """Of a program that printed, or refused what it found."""
    if refused := sentence(new):
        return Row(what, True, f"refused: {refused.removeprefix('error: ')}")
    same = old.stdout == new.stdout and bool(old.stdout)
    return Row(what, same, "" if same else f"{old.stdout[:80]!r}, {new.stdout[:80]!r}")


def compare(old: Side, new: Side, runs: list[str], steps: int) -> Iterator[Row]:
    """The lines of the table, as they are known."""
    for run in runs:
        for side in (old, new):
            side.train(run, steps, side.workdir(run))
        yield compared_losses(f"{run}: trained", *(losses(side.workdir(run)) for side in (old, new)))
        calls = {name: DEFAULTS | call for name, call in CALLS[run].items()}
        for call in calls.values():
            if call.get("stream"):
                del call["num"], call["batch_size"]
        filled = [side.fill(run, calls) for side in (old, new)]
        for name in calls:
            row = compared_tokens(name, *filled)
            yield dataclasses.replace(row, what=f"{run}: {row.what}")
        printed = old.sample(run, old.workdir(run))
        yield compared_answers(f"{run}: the program `sample`", printed, new.sample(run, new.workdir(run)))
        yield compared_answers(
            f"{run}: `sample` of the old checkpoint", printed, new.sample(run, old.workdir(run), may_refuse=True)
        )
        copies = [side.workdir(f"{run}-continued") for side in (old, new)]
        for copy in copies:
            shutil.copytree(old.workdir(run), copy)
        what, more = f"{run}: the old checkpoint, continued", steps + max(steps // 2, 1)
        old.train(run, more, copies[0])
        done = new.train(run, more, copies[1], may_refuse=True)
        if refused := sentence(done):
            yield Row(what, True, f"refused: {refused.removeprefix('error: ')}")
        else:
            yield compared_losses(what, *(losses(copy, steps) for copy in copies))


def main(arguments: list[str] | None = None) -> int:
    """The program; 1 where something differs."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("old", help="a checkout's folder, or a git revision")
    p.add_argument("new", help="the same")
    p.add_argument("--steps", type=int, default=20, help="of training (20)")
    p.add_argument("--only", action="append", choices=RUNS, help="one of the runs; repeatable (all)")
    args = p.parse_args(arguments)
    different = 0
    with tempfile.TemporaryDirectory(prefix="same-") as temporary:
        folder = pathlib.Path(temporary)
        (folder / "experiment.py").write_text(EXPERIMENT)
        sides = []
        for name in ("old", "new"):
            (folder / name).mkdir()
            sides.append(Side(name, checkout(getattr(args, name), folder / f"{name}-checkout"), folder / name))
        for row in compare(*sides, args.only or list(RUNS), args.steps):
            print(f"{'same' if row.same else 'DIFFERENT':10} {row.what:45} {row.note}".rstrip(), flush=True)
            different += not row.same
    print(f"{different} differences between {args.old} and {args.new}.")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
