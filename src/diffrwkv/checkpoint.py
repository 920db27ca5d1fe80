"""Checkpoints of a run, `<workdir>/checkpoints/<step>/`: Orbax, wrapped so that the rest need not know it.

A checkpoint holds the training state (parameters, their average, what the objective learned, the optimiser's moments,
the step) and the state of the data iterator of every process. Writing is asynchronous: only the copy off the device is
waited for. A kill in the middle leaves a temporary folder that nobody reads.

Beside them lies `digest.json`: the step, the validation NELBO if it was measured there, the shape of each array, the
SHA-256 of every file, and a digest of all this. It is written last, by the thread that writes, before the folder gets
its name; what is read is compared with it first. Files rather than arrays are hashed, so that the loop does not wait,
nothing on disk is left out, and another mesh may read them.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from diffrwkv import config
from diffrwkv.config import UserError
from diffrwkv.files import file_sha256

DIGEST = "digest.json"
# Folders of arrays: each is read without the others. "rest" is all other keys, and has those of an item that the state
# lacks, as it lacks "objective" where there is nothing to learn.
ITEMS = ("params", "ema", "objective", "rest")


class _IteratorState:
    """What Grain's handler takes for an iterator: JSON, one file per process."""

    def __init__(self, value: Any):
        self._value = value

    def get_state(self) -> bytes:
        return json.dumps(self._value).encode()


class _Preserve(checkpoint_managers.PreservationPolicy):
    """The newest `keep` checkpoints stay, and the one with the lowest NELBO; the later one of equals."""

    def __init__(self, keep: int, nelbo: Callable[[int], float | None]):
        self._keep, self._nelbo = keep, nelbo

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        known = [(nelbo, -step) for step in steps if (nelbo := self._nelbo(step)) is not None]
        stay = {*steps[-self._keep :], *(-step for _, step in sorted(known)[:1])}
        return [step in stay for step in steps]


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
        for name in ("orbax", "absl"):  # they report every save, and log what they raise as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder = Path(workdir).resolve() / "checkpoints"
        self._keep, self._read_only = keep, read_only
        self._nelbo: dict[int, float | None] = {}
        self._record: dict[str, Any] = {}  # of the checkpoint that is being written
        if read_only and not self.folder.is_dir():
            raise UserError(f"No checkpoints in {self.folder.parent}: train first, or correct --workdir.")
        if not read_only:
            try:
                self.folder.mkdir(exist_ok=True)
            except OSError as e:
                raise UserError(f"{self.folder} cannot be made ({e.strerror}).") from None

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """What writes and deletes; reading needs none, so that no damaged file can keep it from starting."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Preserve(self._keep, self.nelbo),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # reads no file of a checkpoint
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digest),
        )
        # compression saves 8 % of the bytes of such arrays, for four times the time
        arrays = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ITEMS}
        _hush_leftovers()
        handlers = arrays | {"data": grain.checkpoint.CheckpointHandler()}
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if "_manager" not in vars(self):
            return
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise
        finally:
            with contextlib.suppress(Exception):  # `wait` has told it
                self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint on disk, ascending."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

    def best_step(self) -> int | None:
        """The step with the lowest recorded validation NELBO; None if none was recorded."""
        known = [(nelbo, s) for s in self.steps() if (nelbo := self.nelbo(s)) is not None]
        return min(known)[1] if known else None

    def nelbo(self, step: int) -> float | None:
        """The validation NELBO that a checkpoint recorded; None for a damaged one."""
        if step not in self._nelbo:
            try:
                self._nelbo[step] = self._read_record(step)["nelbo"]
            except (OSError, ValueError):
                return None
        return self._nelbo[step]

    def metrics(self, step: int) -> Any:
        """What `save` was given as `metrics`. Raises OSError or ValueError for a damaged checkpoint."""
        return self._read_record(step)["metrics"]

    def save(self, step: int, state: Any, iterator_state: Any, nelbo: float | None = None, metrics: Any = None) -> None:
        """Starts to write a checkpoint; a step that has one already is left as it is.

        Args:
          state: dict of pytrees of arrays, of any sharding: "params", "ema", "step" and others, perhaps "objective".
          iterator_state: JSON types; what this process's data iterator gave as its state.
          nelbo: the validation NELBO at this step.
          metrics: JSON types; by which metrics.jsonl is known again, see `metrics.Writer.state`.

        Raises UserError when this or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        nelbo = None if nelbo is None else float(nelbo)
        self._nelbo[step] = nelbo
        self._record = {"step": step, "nelbo": nelbo, "metrics": metrics, "arrays": _describe(state)}
        rest = {key: value for key, value in state.items() if key not in ITEMS}
        parts = {name: state[name] for name in ITEMS if name in state} | {"rest": rest}
        items = {name: ocp.args.PyTreeSave(part) for name, part in parts.items()}
        data = grain.checkpoint.CheckpointSave(_IteratorState(iterator_state))
        with self._told():
            self._manager.save(step, args=ocp.args.Composite(**items, data=data))

    def check(self) -> None:
        """Raises UserError when the last write has failed already; does not wait for it."""
        if "_manager" in vars(self):
            with self._told():
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on disk. Raises UserError when it cannot be written."""
        if "_manager" in vars(self):
            with self._told():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # whatever a full disk makes the libraries raise
            saved = self.steps()
            kept = f"that of step {saved[-1]} is kept" if saved else "there was none before"
            raise UserError(
                f"The checkpoint of step {self._record.get('step')} could not be written to {self.folder} "
                f"({_first_line(e)}): training stopped, {kept}. Make room, then run the same command again."
            ) from e

    def reached_preemption(self, step: int) -> bool:
        """Whether the scheduler has told any process to stop; all processes agree on the step."""
        return self._manager.reached_preemption(step)

    def _write_digest(self) -> None:
        """Orbax calls it on the first process, in the writing thread, when all files of a checkpoint are whole."""
        step = self._record["step"]
        temporary = [*self.folder.glob(f"{step}.orbax-checkpoint-tmp*"), self.folder / str(step)]
        folder = next(path for path in temporary if path.is_dir())
        files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/**/*") if path.is_file())
        config.write_json(config.seal(self._record | {"files": _hash(folder, files)}), folder / DIGEST)

    def _read_record(self, step: int) -> dict[str, Any]:
        """digest.json of a step. Raises OSError, or ValueError when it is damaged or another step's."""
        try:
            record = config.read_sealed(self.folder / str(step) / DIGEST)
        except FileNotFoundError:
            raise ValueError(f"it has no {DIGEST}: it is damaged, or of an earlier version of diffrwkv") from None
        if record["step"] != step:
            raise ValueError(f"it is the checkpoint of step {record['step']}")
        return record

    def _read(self, step: int, abstract: dict[str, Any], *, whole: bool = False) -> tuple[dict[str, Any], Any]:
        """(those keys of the state that `abstract` has, iterator state or None) of one checkpoint, verified.

        Args:
          abstract: jax.ShapeDtypeStruct leaves with shardings.
          whole: these are all of the state; the iterator's is read too.

        Raises whatever a damaged file makes the libraries raise.
        """
        folder = self.folder / str(step)
        with _agreed():
            record = self._read_record(step)
            written = {name.split("/")[0] for name in record["files"]}
            places: dict[str, dict[str, Any]] = {}  # an earlier version had "objective" in "rest"
            for key, part in abstract.items():
                places.setdefault(key if key in ITEMS and key in written else "rest", {})[key] = part
            read = {*places, "data"} if whole else set(places)
            known = {k: v for k, v in record["files"].items() if k.split("/")[0] in read}
            for name, found in _hash(folder, known).items():
                if found != known[name]:
                    raise ValueError(f"{name} was altered after it was written")
            stored = record["arrays"]
            if not whole:
                stored = {k: v for k, v in stored.items() if k.startswith(tuple(f"['{key}']" for key in abstract))}
            wanted = _describe(abstract)
            if wrong := [name for name in wanted | stored if wanted.get(name) != stored.get(name)]:
                raise ValueError(f"{wrong[0]} is {stored.get(wrong[0])} there, {wanted.get(wrong[0])} by this config")
        with _agreed():
            state: dict[str, Any] = {}
            for place, part in places.items():
                tree = part if place == "rest" else part[place]
                how = ocp.checkpoint_utils.construct_restore_args(tree)
                args = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=not whole)
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                    tree = reader.restore(folder / place, args=args)
                state |= tree if place == "rest" else {place: tree}
            iterator = None
            if whole:
                name = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
                iterator = json.loads((folder / "data" / name).read_bytes())
            if "step" in state and int(state["step"]) != step:
                raise ValueError(f"its state is that of step {int(state['step'])}")
        return state, iterator

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
            try:
                state, iterator_state = self._read(step, abstract_state, whole=True)
            except Exception as e:  # whatever a truncated or altered file makes the libraries raise
                _hush_leftovers()
                failure = failure or e
                passed.append(step)
                warnings.warn(f"The checkpoint of step {step} cannot be read: {_first_line(e)}", stacklevel=2)
                continue
            self._set_aside(passed)
            return step, state, iterator_state
        if failure is not None:
            raise UserError(
                f"None of the checkpoints in {self.folder.parent} can be read ({_first_line(failure)}): "
                "take another --workdir to start over."
            ) from failure
        return None

    def restore_parts(self, abstract: dict[str, Any], step: int | None = None) -> tuple[int, dict[str, Any]]:
        """(step, parts): those keys of a checkpoint's state that `abstract` has, the others unread.

        Args:
          abstract: jax.ShapeDtypeStruct leaves with shardings, such as {"ema": ...}.
          step: None takes the newest that can be read, warning about those that cannot.

        Raises UserError when there is no such step, or it does not hold arrays of these shapes.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"No checkpoints in {self.folder.parent}: train first, or correct --workdir.")
        if step is not None and step not in steps:
            raise UserError(f"No checkpoint at step {step}: there are {', '.join(map(str, steps))}.")
        failures: list[Exception] = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                return candidate, self._read(candidate, abstract)[0]
            except Exception as e:
                _hush_leftovers()
                failures.append(e)
                warnings.warn(f"The checkpoint of step {candidate} cannot be read: {_first_line(e)}", stacklevel=2)
        raise UserError(
            f"No readable checkpoint in {self.folder.parent} fits its config.json and tokenizer.json "
            f"({_first_line(failures[-1])})."
        ) from failures[-1]

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
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unreadable checkpoints are set aside")


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """False for what asyncio logs of those exceptions in Orbax that nobody fetches: the first one is raised."""
    frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else ()
    return "orbax" not in record.getMessage() and not any("orbax" in frame.filename for frame in frames)


@functools.cache
def _hush_leftovers() -> None:
    """From now on, says nothing of what a failed restore or save leaves behind in Orbax.

    Its reads and writes end after their event loop is closed, some of its coroutines are never awaited, and of many
    exceptions it raises the first. Python reports the others, seconds later, with long traces that would bury our one
    line.
    """
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        coroutine = getattr(unraisable.object, "cr_code", None)
        of_orbax = coroutine is not None and "orbax" in coroutine.co_filename
        if not of_orbax and "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = hook


def _describe(tree: Any) -> dict[str, str]:
    """{"['params']['w']": "float32[64,32]"}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in leaves}


def _hash(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: SHA-256 in hex} of files in a folder. Raises OSError."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(folder / name), names), strict=True))


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """With several processes, an exception in one of them is one in all: none goes on alone."""
    failure = None
    try:
        yield
    except Exception as e:
        failure = e
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.bool_(failure is not None))
        if failed.any() and failure is None:
            failure = ValueError(f"process {int(failed.argmax())} cannot read it")
    if failure is not None:
        raise failure


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with these shardings, as `restore` wants them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
