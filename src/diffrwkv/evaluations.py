"""What suites found of a run, a file each in `<workdir>/evaluations/`: kept under all its settings, and found again."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from diffrwkv import config, files
from diffrwkv.checkpoint import DIGEST


def weights_hash(workdir: Path, step: int) -> str | None:
    """A hash of a checkpoint; None where training has removed it since it was read."""
    try:
        return files.file_sha256(workdir / "checkpoints" / str(step) / DIGEST)
    except OSError:
        return None


def path_of(workdir: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """The file of the settings: a readable name, and their hash."""
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")[-60:] or "text"
    return workdir / "evaluations" / f"{slug}-{files.digest(settings)[:8]}.json"


def kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run of the program found under the same settings, or None.

    Settings with "weights" that are None, or a judge's, are those of no known weights: nothing earlier is theirs.
    """
    if any(settings[key] is None for key in settings if key.endswith("weights")):
        return None
    try:
        result = config.read_sealed(path)
    except (OSError, ValueError):  # there is none, or it was not written to its end
        return None
    return result if {key: result.get(key) for key in settings} == settings else None


def keep(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result, by one process of all."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        config.write_json(config.seal(result), path)


def keep_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a line of JSON for each part of a result beside it, before the result itself, by one process of all."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".jsonl")
        temporary = beside.with_name(beside.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(beside)


def finite(number: float) -> float | None:
    """The number; None where it is too large for a float, which JSON has no word for."""
    return number if math.isfinite(number) else None
