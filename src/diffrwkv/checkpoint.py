"""Checkpoints of a run, `<workdir>/checkpoints/<step>/`: Orbax, wrapped so that the rest need not know it.

A checkpoint holds the training state (parameters, their average, the optimiser's moments, the step), the state of the
data iterator of every process, a checksum of each array (Orbax notices a missing or short file, but not every altered
byte), and the validation NELBO if it was measured at that step. Writing is asynchronous: only
the copy off the device is waited for. A kill in the middle leaves a temporary folder that nobody reads.
"""

import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from diffrwkv.config import UserError

METRIC = "val/nelbo"


class _IteratorState:
    """What Grain's handler takes for an iterator: JSON, one file per process."""

    def __init__(self, value: Any = None):
        self.value = value

    def get_state(self) -> bytes:
        return json.dumps(self.value).encode()

    def set_state(self, text: bytes) -> None:
        self.value = json.loads(text)

    def start_prefetch(self) -> None:
        """Grain's handler calls this after a restore; there is nothing to start here."""


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving it waits for the last write.

    Args:
      workdir: the run's folder.
      keep: how many of the newest stay; the best by validation NELBO stays as well.
      read_only: never writes or deletes; for evaluate and sample.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise UserError(f"config.train.keep must be at least 1, got {keep}.")
        for name in ("orbax", "absl"):  # they report every save; their errors still show
            logging.getLogger(name).setLevel(logging.ERROR)
        self.folder = Path(workdir).resolve() / "checkpoints"
        self._read_only = read_only
        newest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics[METRIC],
            reverse=True,  # Orbax keeps the last of the sorted list
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics[METRIC],  # without it Orbax would not write the metrics
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
        )
        if read_only and not self.folder.is_dir():
            raise UserError(f"No checkpoints in {self.folder.parent}: train first, or correct --workdir.")
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest recorded validation NELBO; None if none was recorded."""
        known = [(m[METRIC], s) for s in self.steps() if (m := self._metrics(s))]
        return min(known)[1] if known else None

    def _metrics(self, step: int) -> dict[str, float] | None:
        with contextlib.suppress(Exception):  # a corrupt checkpoint has none
            return self._manager.metrics(step)

    def save(self, step: int, state: Any, iterator_state: Any, nelbo: float | None = None) -> None:
        """Starts to write a checkpoint; a step that has one already is left as it is.

        Args:
          state: pytree of arrays, of any sharding.
          iterator_state: JSON types; what this process's data iterator gave as its state.
          nelbo: the validation NELBO at this step.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(_IteratorState(iterator_state)),
                checksums=ocp.args.JsonSave(checksums(state)),
            ),
            metrics=None if nelbo is None else {METRIC: float(nelbo)},
        )

    def reached_preemption(self, step: int) -> bool:
        """Whether the scheduler has told any process to stop; all processes agree on the step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract_state: Any) -> tuple[int, Any, Any] | None:
        """(step, state, iterator state) of the newest checkpoint that can be read; None if there is none.

        One that cannot be read is passed over with a warning; once an older one is found that can, it is moved to
        `<workdir>/unreadable/<step>`, so that its step can be written again.

        Args:
          abstract_state: jax.ShapeDtypeStruct leaves with shardings, of the tree that was saved.

        Raises UserError when there are checkpoints and none can be read.
        """
        failure, passed = None, []
        for step in reversed(self.steps()):
            iterator = _IteratorState()
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state),
                        data=grain.checkpoint.CheckpointRestore(iterator),
                        checksums=ocp.args.JsonRestore(),
                    ),
                )
                _verify(checksums(restored["state"]), restored["checksums"])
            except Exception as e:  # whatever a truncated or altered file makes the libraries raise
                _hush_leftovers()
                failure = failure or e
                passed.append(step)
                warnings.warn(f"The checkpoint of step {step} cannot be read: {_first_line(e)}", stacklevel=2)
                continue
            self._set_aside(passed)
            return step, restored["state"], iterator.value
        if failure is not None:
            raise UserError(
                f"None of the checkpoints in {self.folder.parent} can be read ({_first_line(failure)}): "
                "take another --workdir to start over."
            ) from failure
        return None

    def restore_weights(self, name: str, abstract: Any, step: int | None = None) -> tuple[int, Any]:
        """(step, weights): only "params" or "ema" of a checkpoint.

        Args:
          name: "params" or "ema".
          abstract: jax.ShapeDtypeStruct leaves with shardings.
          step: None takes the newest that can be read, warning about those that cannot.

        Raises UserError when there is no such step, or it does not hold weights of these shapes.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"No checkpoints in {self.folder.parent}: train first, or correct --workdir.")
        if step is not None and step not in steps:
            raise UserError(f"No checkpoint at step {step}: there are {', '.join(map(str, steps))}.")
        abstract = {name: abstract}
        how = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        failure = None
        for candidate in reversed(steps) if step is None else [step]:
            try:
                # The manager remembers one handler per item, and "state" is written by another one.
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                    weights = reader.restore(self.folder / str(candidate) / "state", args=how)
                with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                    stored = reader.restore(self.folder / str(candidate) / "checksums")
                _verify(checksums(weights), stored)
                return candidate, weights[name]
            except Exception as e:
                _hush_leftovers()
                failure = e
                warnings.warn(f"The checkpoint of step {candidate} cannot be read: {_first_line(e)}", stacklevel=2)
        raise UserError(
            f"No readable checkpoint in {self.folder.parent} fits its config.json and tokenizer.json "
            f"({_first_line(failure)})."
        ) from failure

    def _set_aside(self, steps: list[int]) -> None:
        if not steps or self._read_only:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self.folder.parent / "unreadable" / str(step)
                target.parent.mkdir(exist_ok=True)
                number = 1
                while target.exists():
                    target, number = target.with_name(f"{step}-{number}"), number + 1
                (self.folder / str(step)).rename(target)
        self._manager.reload()


@functools.cache
def _hush_leftovers() -> None:
    """From now on, says nothing of what a failed restore leaves behind in Orbax.

    Its reads end after their event loop is closed, and some of its coroutines are never awaited. Python reports both as
    ignored exceptions, seconds later, with long traces that would bury our one line.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        coroutine = getattr(unraisable.object, "cr_code", None)
        of_orbax = coroutine is not None and "orbax" in coroutine.co_filename
        if not of_orbax and "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = hook


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    width = x.dtype.itemsize
    words = jax.lax.bitcast_convert_type(x, jnp.uint32 if width == 4 else jnp.uint16 if width == 2 else jnp.uint8)
    place = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def checksums(state: Any) -> dict[str, int]:
    """A 32-bit sum of each array's bits, weighted by place: exact, and the same however the array is split.

    It differs whenever one word differs, since the weights are odd. Arrays of 1, 2 or 4 bytes an element.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = jax.device_get([_checksum(x) for _, x in leaves])
    return {jax.tree_util.keystr(path): int(s) for (path, _), s in zip(leaves, sums, strict=True)}


def _verify(found: dict[str, int], stored: dict[str, int]) -> None:
    wrong = [name for name, value in found.items() if stored.get(name) != value]
    if wrong:
        raise ValueError(f"the checksum of {wrong[0]} is wrong: the file was altered")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with these shardings, as `restore` wants them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
