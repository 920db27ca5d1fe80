"""Where numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if asked; and the clock."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffrwkv import denoiser
from diffrwkv.config import UserError

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

    Lines beyond `step`, of a run that was cut off after its last checkpoint, are dropped first: no step stands twice.
    On processes other than the first, does nothing.

    Args:
      workdir: the run's folder.
      step: the step that the run goes on from.
      tensorboard: write event files to `<workdir>/tensorboard`.
      wandb_project: report to this project of Weights & Biases.
      config: JSON types, for Weights & Biases.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        step: int = 0,
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._active = jax.process_index() == 0
        self._board = self._wandb = None
        self.last: dict[str, Any] = {}  # the last line that stays
        if not self._active:
            return
        path = Path(workdir) / "metrics.jsonl"
        lines = [line for line in read(path) if line["step"] <= step]
        self.last = lines[-1] if lines else {}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(path)
        self._file = open(path, "a", buffering=1)
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
        """One line {"step": step, **values}; None and non-finite numbers are written as null."""
        if not self._active:
            return
        line = {"step": int(step)}
        for name, value in values.items():
            line[name] = _plain(value)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self.last = line
        numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Text for TensorBoard's text page, as it is (in a code block)."""
        if self._active and self._board:
            self._board.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        """Flushes and closes everything."""
        if not self._active:
            return
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | jax.Array | np.ndarray):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] without the file. A last line that was cut off by a kill is left out."""
    lines = []
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


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
        """{"seconds", "cpu_seconds"} since the run began, with reading, compiling and evaluating, and
        {"step_cpu_seconds"}, the laps' CPU time alone."""
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
