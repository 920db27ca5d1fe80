"""Where numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if asked; and the clock."""

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffrwkv import denoiser
from diffrwkv.config import UserError
from diffrwkv.workdir import aside, metrics_line, metrics_lines

# Peak dense bfloat16 FLOP/s of one device, by a part of `jax.Device.device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None when the table does not have it (every CPU)."""
    for kind, peak in PEAK_FLOPS.items():
        if kind in device.device_kind:
            return peak
    return None


def model_flops_per_token(params: Any) -> float:
    """FLOPs of a training step per token, 6 N (arXiv 2001.08361), N counting what multiplies activations.

    Matrices count, the embedding look-up and vectors do not. What the mixer does beyond its matrices is left out, so a
    utilisation from it errs on the low side.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    matrices = jax.tree.leaves(denoiser.matrix_mask(params))
    return 6.0 * sum(
        math.prod(x.shape)
        for (path, x), matrix in zip(leaves, matrices, strict=True)
        if matrix and "embedding" not in jax.tree_util.keystr(path[-1:])
    )


class Writer:
    """Appends one JSON object per step to `<workdir>/metrics.jsonl`, and mirrors it.

    Lines beyond `step`, of a run that was cut off after its last checkpoint, are moved to `<workdir>/aside` first, and
    so is what is not a line of ours: no step stands twice. On processes other than the first, does nothing.

    Args:
      workdir: the run's folder.
      step: the step that the run goes on from.
      state: what `state` gave at that step; a word is said if the lines are others now. None: nothing to compare with.
      tensorboard: write event files to `<workdir>/tensorboard`.
      wandb_project: report to this project of Weights & Biases.
      config: JSON types, for Weights & Biases.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        step: int = 0,
        *,
        state: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._active = jax.process_index() == 0
        self._board = self._wandb = None
        self.last: dict[str, Any] = {}  # the last line that stays
        if not self._active:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        with self._told():
            kept, others = _split(self._path, step)
            if others:
                target = aside(Path(workdir), self._path.name)
                target.write_bytes(b"".join(others))
                print(f"Moved {len(others)} lines of {self._path.name} to {target}: the run goes on from step {step}.")
            self._rewrite(b"".join(line for line, _ in kept))
        self.last = kept[-1][1] if kept else {}
        self._sha256 = hashlib.sha256(b"".join(line for line, _ in kept[:-1]))  # of all before the last
        self._last_text = kept[-1][0] if kept else b""
        if state is not None and (found := self.state()) is not None:
            if any(found["last"].get(k) != v for k, v in state["last"].items()) or state["sha256"] != found["sha256"]:
                print(
                    f"{self._path} is not what it was when the checkpoint of step {step} was written: numbers in it "
                    "were altered, or lines are lost.",
                    flush=True,
                )
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError("config.train.wandb_project needs wandb: pip install 'diffrwkv[wandb]'.") from None
            self._wandb = wandb.init(project=wandb_project, dir=str(workdir), config=dict(config or {}), resume="allow")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line {"step": step, **values}; None and non-finite numbers are written as null.

        Values for the step of the last line are added to it. Raises UserError when there is no room.
        """
        if not self._active:
            return
        values = {name: _plain(value) for name, value in values.items()}
        line = {"step": int(step), **values}
        with self._told():
            if self.last.get("step") == step:
                line = self.last | line
                text = json.dumps(line, allow_nan=False).encode() + b"\n"
                self._file.close()
                self._rewrite(self._path.read_bytes().removesuffix(self._last_text) + text)
            else:
                text = json.dumps(line, allow_nan=False).encode() + b"\n"
                self._sha256.update(self._last_text)
                if self._file.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.last, self._last_text = line, text
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def state(self) -> dict[str, Any] | None:
        """{"sha256": of all lines before the last, "last": the last line}; None on processes other than the first."""
        return {"sha256": self._sha256.hexdigest(), "last": self.last} if self._active else None

    def write_text(self, step: int, name: str, text: str) -> None:
        """Text for TensorBoard's text page, as it is (in a code block)."""
        if self._active and self._board:
            self._board.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def _rewrite(self, contents: bytes) -> None:
        """The file with other contents, the old ones or the new ones after a kill; open to be appended to."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_bytes(contents)
        temporary.replace(self._path)
        self._file = open(self._path, "ab", buffering=0)  # each line at once, and none later again if it fails

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"{self._path} cannot be written ({e.strerror}): training stopped, the newest checkpoint is kept. "
                "Make room, then run the same command again."
            ) from None

    def close(self) -> None:
        """Flushes and closes everything."""
        if not self._active:
            return
        self._file.close()
        if self._board:
            try:
                self._board.close()
            except OSError as e:  # all its numbers are in metrics.jsonl
                print(f"TensorBoard's file is not complete ({e.strerror}).", flush=True)
                self._board.file_writer.event_writer.close = lambda: None  # it would try again at exit
        if self._wandb:
            self._wandb.finish()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | jax.Array | np.ndarray):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def _split(path: Path, step: int) -> tuple[list[tuple[bytes, dict[str, Any]]], list[bytes]]:
    """(lines of rising steps up to `step`, each with its value; the others) of a metrics.jsonl."""
    kept: list[tuple[bytes, dict[str, Any]]] = []
    others: list[bytes] = []
    for line in metrics_lines(path):
        value = metrics_line(line)
        if value is not None and (kept[-1][1]["step"] if kept else 0) < value["step"] <= step:
            kept.append((line, value))
        else:
            others.append(line)
    return kept, others


class Clock:
    """Wall and CPU seconds of a run, going on from its earlier sessions, and the pauses taken out of the speed."""

    def __init__(self):
        self._wall = self._window = time.perf_counter()
        self._cpu = self._cpu_window = time.process_time()
        self._paused = self._cpu_paused = self._steps_cpu = 0.0

    def go_on_from(self, line: Mapping[str, Any]) -> None:
        """Adds the totals of the last line that an earlier session wrote."""
        self._wall -= line.get("seconds", 0.0)
        self._cpu -= line.get("cpu_seconds", 0.0)
        self._steps_cpu = line.get("step_cpu_seconds", 0.0)

    def begin(self) -> None:
        """The first step is about to be taken: what was before does not count in `lap`."""
        self._window, self._cpu_window = time.perf_counter(), time.process_time()
        self._paused = self._cpu_paused = 0.0

    def pause(self) -> "_Pause":
        """`with clock.pause():` what happens inside does not count in `lap`."""
        return _Pause(self)

    def lap(self) -> float:
        """Seconds since the last lap, pauses left out."""
        seconds = time.perf_counter() - self._window - self._paused
        self._steps_cpu += time.process_time() - self._cpu_window - self._cpu_paused
        self.begin()
        return seconds

    def totals(self) -> dict[str, float]:
        """{"seconds", "cpu_seconds", "step_cpu_seconds"}: since the run began, the last of the laps alone.

        The first two count reading, compiling and evaluating too.
        """
        return {
            "step_cpu_seconds": round(self._steps_cpu, 3),
            "seconds": round(time.perf_counter() - self._wall, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
        }


class _Pause:
    def __init__(self, clock: Clock):
        self._clock = clock

    def __enter__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def __exit__(self, *_: Any) -> None:
        self._clock._paused += time.perf_counter() - self._begin[0]
        self._clock._cpu_paused += time.process_time() - self._begin[1]
