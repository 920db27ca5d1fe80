"""Compares trained runs: `python -m diffrwkv.compare RUN RUN ... [--output=NAME] [--curve=KEY]`.

Prints one table, a row for each run: the config keys that differ, parameters, tokens and seconds trained, the last and
the best validation and every evaluation in the workdirs. With --output it writes NAME.md, NAME.csv, NAME.html and
NAME.svg too, with the curves over steps, tokens and seconds; the page needs nothing from elsewhere. A RUN is a workdir,
or a pattern such as 'runs/*', which takes the workdirs that it finds.
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("compare")

import argparse
import csv
import dataclasses
import glob
import html
import io
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv import charts, config
from diffrwkv.cli import compare as flags
from diffrwkv.config import UserError
from diffrwkv.workdir import read_metrics, read_record

MOST_POINTS = 400  # of a curve: beyond, it shows means of neighbouring lines
CURVES = ("val/nelbo", "val/bpc")  # drawn unasked: the first among runs of one tokenizer, else the second
# What an evaluation tells of its protocol: numbers under two protocols stand in two columns.
PROTOCOL = (
    *("questions_sha256", "last_word"),
    *("data", "split", "documents_sha256", "detokenizer", "each_line", "wrap", "packing", "eos", "group", "length"),
    *("limit", "block_size", "ema"),
    *("sampler", "stop_at_eos", "num", "judge_weights", "window", "stride", "features_weights"),
    *("real_sha256", "real_length"),
)
# What else it tells that is no result.
COUNTS = (
    "questions",
    *("step", "seed", "draws", "batch_size", "seconds", "documents", "records_skipped", "sequences", "tokens"),
    *("tokens_dropped", "characters", "characters_per_token", "words", "observed", "counted", "cpu_seconds"),
)
# Keys of a config that say where and how often something is written: what is trained does not depend on them.
UNTOLD = (
    "data.root",
    "train.checkpoint_every",
    "train.compilation_cache",
    "train.hosts.coordinator",
    "train.hosts.num_processes",
    "train.hosts.process_id",
    "train.keep",
    "train.log_every",
    "train.num_samples",
    "train.sample_every",
    "train.tensorboard",
    "train.wandb_project",
)
ERRORS = ("_se_draws", "_se", "_stderr")  # NAME_se_draws is the error of NAME; those of the text are left out


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A result of an evaluation.

    Attributes:
      kind: what the file says that it is: "eval", or "eval samples" for what stands under "samples".
      protocol: what it tells of PROTOCOL.
      numbers: {"nelbo": ...}, what was measured.
      step: of the weights; 0 if it does not say.
      draws: likewise.
      characters: that were scored; None if it does not say.
    """

    kind: str
    protocol: dict[str, Any]
    numbers: dict[str, float]
    step: int
    draws: int
    characters: int | None

    @property
    def label(self) -> str:
        """The kind, the data and the split."""
        told = [str(self.protocol[key]) for key in ("data", "split") if self.protocol.get(key) is not None]
        return f"{self.kind} ({', '.join(Path(name).name for name in told)})" if told else self.kind


@dataclasses.dataclass(frozen=True)
class Workdir:
    """What is known of a run.

    Attributes:
      name: its path, without what all paths have in common.
      settings: {"a.b": value} of config.json, without the options of what the run does not use.
      record: of run.json.
      lines: of metrics.jsonl, by rising steps.
      evaluations: in eval*.json and the files of the folder evaluations.
    """

    name: str
    settings: dict[str, Any]
    record: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluations: list[Evaluation]

    @property
    def tokenizer(self) -> str:
        """Its fingerprint."""
        return self.record["data"]["tokenizer_fingerprint"]

    @property
    def exact(self) -> bool:
        """Whether its NELBO is the negative log-likelihood itself."""
        return self.settings.get("diffusion.name") == "autoregressive"

    def last(self, key: str) -> Any:
        """What the last line that has `key` says of it; None if none has it."""
        return next((line[key] for line in reversed(self.lines) if line.get(key) is not None), None)

    def tokens(self, step: int) -> int:
        """Trained until a step."""
        return step * self.settings["train.batch_size"] * self.settings["data.length"]

    def curve(self, key: str, over: str) -> list[tuple[float, float]]:
        """(`over`, `key`) of the lines that have `key`, at most MOST_POINTS.

        Seconds of a line that does not tell them lie between those of its neighbours; before the first and behind the
        last line that does, there are none.
        """
        lines = [line for line in self.lines if _is_number(line.get(key))]
        if over == "step":
            x = [float(line["step"]) for line in lines]
        elif over == "tokens":
            x = [float(self.tokens(line["step"])) for line in lines]
        else:
            told = [(line["step"], line[over]) for line in self.lines if _is_number(line.get(over))]
            if not told:
                return []
            steps, seconds = np.array(told, np.float64).T
            x = np.interp([line["step"] for line in lines], steps, seconds, left=np.nan, right=np.nan).tolist()
        points = [(a, float(line[key])) for a, line in zip(x, lines, strict=True) if math.isfinite(a)]
        if len(points) <= MOST_POINTS:
            return points
        return [tuple(np.mean(part, axis=0).tolist()) for part in np.array_split(np.array(points), MOST_POINTS)]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table: a value for each run, None where it has none, and its standard error likewise."""

    name: str
    values: list[Any]
    errors: list[float | None] | None = None

    def shown(self, i: int) -> str:
        """The cell of run i for a reader."""
        value, error = self.values[i], self.errors[i] if self.errors else None
        if value is None:
            return ""
        if not _is_number(value):
            return value if isinstance(value, str) else json.dumps(value)
        if error is None:
            return charts.number(value)
        digits = max(0, min(6, 1 - math.floor(math.log10(error)))) if error > 0 else 4
        return f"{value:.{digits}f} ± {error:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several runs beside one another.

    Attributes:
      columns: of the table, the runs' names first.
      notes: sentences that a reader of the table must know.
      chart: an <svg> of the curves, or None.
    """

    columns: list[Column]
    notes: list[str]
    chart: str | None

    def _rows(self) -> range:
        return range(len(self.columns[0].values))

    def markdown(self, image: str | None = None) -> str:
        """The table and the notes; and the chart, if its file is named."""
        rows = [[column.shown(i) for column in self.columns] for i in self._rows()]
        parts = [charts.markdown_table([column.name for column in self.columns], rows), *self.notes]
        if self.chart and image:
            parts.append(f"![curves of the runs]({image})")
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """The table, all digits; a standard error has a column of its own."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        columns = [(c.name, c.values) for c in self.columns]
        for at, column in reversed(list(enumerate(self.columns))):
            if column.errors:
                columns.insert(at + 1, (f"{column.name} se", column.errors))
        writer.writerow([name for name, _ in columns])
        for i in self._rows():
            cells = [values[i] for _, values in columns]
            writer.writerow(["" if x is None else x if isinstance(x, str) else json.dumps(x) for x in cells])
        return out.getvalue()

    def html(self) -> str:
        """A page that needs nothing from elsewhere."""
        rows = [
            [(c.shown(i), float(c.values[i]) if _is_number(c.values[i]) else None) for c in self.columns]
            for i in self._rows()
        ]
        parts = [charts.html_table([c.name for c in self.columns], rows)]
        parts += [f"<p>{html.escape(note)}</p>" for note in self.notes]
        return charts.page("Comparison of runs", [*parts, self.chart or ""])

    def write(self, name: str | os.PathLike) -> list[Path]:
        """Writes NAME.md, NAME.csv, NAME.html and, where there are curves, NAME.svg. Raises UserError."""
        path = config.at_home(name, "--output=")
        files = {".md": self.markdown(f"{path.name}.svg"), ".csv": self.csv(), ".html": self.html()}
        if self.chart:
            files[".svg"] = self.chart
        written = [path.with_name(path.name + ending) for ending in files]
        for file, text in zip(written, files.values(), strict=True):
            charts.write(file, text)
        return written


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError."""
    output = None if args.output is None else charts.output(args.output)
    compared = compare(args.runs, curve=args.curve)
    print(compared.markdown(), end="")
    if output is not None:
        print(f"\nWritten: {', '.join(map(str, compared.write(output)))}", file=sys.stderr)


def compare(runs: Sequence[str | os.PathLike], *, curve: str | None = None) -> Comparison:
    """The table and the curves of runs.

    Args:
      runs: workdirs, or patterns of them.
      curve: a key of metrics.jsonl; None: the validation, in nats per token, or in bits per character where the
        tokenizers differ.

    Raises UserError for a path that is not there, where no run is among the paths, or for a key that no run has.
    """
    workdirs = [read(path, name) for path, name in _named(_found(runs))]
    mixed = len({w.tokenizer for w in workdirs}) > 1
    if curve is not None and not any(w.curve(curve, "step") for w in workdirs):
        keys = sorted({key for w in workdirs for line in w.lines for key in line if _is_number(line[key])} - {"step"})
        raise UserError(f"--curve={curve} is in no metrics.jsonl of these runs; there are {', '.join(keys) or 'none'}.")
    key = curve or CURVES[mixed]
    chart = _chart(workdirs, key)
    notes = list(_notes(workdirs, mixed))
    if chart is None:
        notes.append(f"No run has {key} in its metrics.jsonl: there are no curves.")
    return Comparison(_columns(workdirs), notes, chart)


# --- Reading --------------------------------------------------------------------------------------


def _found(runs: Sequence[str | os.PathLike]) -> list[Path]:
    """The workdirs that are named, each once. What else a pattern finds, the shell's too, is left out with a word."""
    paths: list[Path] = []
    for run in runs:
        path = config.at_home(run)
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            raise UserError(f"{str(run)!r} is not there, and finds nothing as a pattern: name workdirs of runs.")
        paths += found
    chosen = {path.resolve(): path for path in reversed(paths) if (path / "config.json").is_file()}
    if not chosen:
        raise UserError(f"No workdir of a run, a folder with a config.json, among: {', '.join(map(str, paths))}.")
    if others := [str(path) for path in paths if path.resolve() not in chosen]:
        print(f"Left out, without a config.json: {', '.join(others)}.", file=sys.stderr)
    return list(reversed(chosen.values()))


def _named(paths: list[Path]) -> list[tuple[Path, str]]:
    """Each path, and its name without the folders that all have in common."""
    real = [path.resolve() for path in paths]
    common = os.path.commonpath([path.parent for path in real])
    return [(path, str(full.relative_to(common))) for path, full in zip(paths, real, strict=True)]


def read(path: Path, name: str) -> Workdir:
    """What a workdir says. Raises UserError for a file that is missing, damaged or altered."""
    settings = config.flatten(config.load(path / "config.json"))
    lines = {line["step"]: line for line in read_metrics(path / "metrics.jsonl")}
    evaluations: list[Evaluation] = []
    for file in sorted(path.glob("eval*.json")) + sorted((path / "evaluations").glob("**/*.json")):
        kind = "eval" if file.parent != path else file.stem
        try:
            evaluations += _evaluations(config.read_json(file), kind)
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{file} is no evaluation ({e}): remove it, or evaluate again.") from None
    ordered = [lines[step] for step in sorted(lines)]
    return Workdir(name, _used(settings), read_record(path), ordered, evaluations)


def _evaluations(value: Mapping[str, Any], kind: str) -> Iterator[Evaluation]:
    """The results in a file: of its object, and of those inside, which inherit its protocol and its step."""
    protocol = {key: value[key] for key in PROTOCOL if key in value}
    numbers = {k: x for k, x in value.items() if _is_number(x) and k not in PROTOCOL and k not in COUNTS}
    if numbers:
        step, draws = (int(value.get(key) or 0) for key in ("step", "draws"))
        yield Evaluation(kind, protocol, numbers, step, draws, value.get("characters"))
    protocol |= {key: value[key] for key in ("step", "draws") if key in value}
    for key, inside in value.items():
        if key not in COUNTS:
            for one in inside if isinstance(inside, list) else [inside]:
                if isinstance(one, Mapping):
                    yield from _evaluations(protocol | dict(one), f"{kind} {key}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- The table ------------------------------------------------------------------------------------


def _used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without UNTOLD, and the options of a sampler, mixer, objective or layout that is not taken."""
    pattern = str(settings["model.pattern"])
    taken = {
        "samplers": [settings["sampler.name"]],
        "objectives": [settings["diffusion.name"]],
        "layouts": [settings["diffusion.layout"]],
        "model.mixers": [part.partition("*")[0].strip() for part in pattern.split(",")],
        "model.channel_mixers": [settings["model.channel_mixer"]],
    }

    def counts(key: str) -> bool:
        for section, names in taken.items():
            if key.startswith(section + "."):
                return key[len(section) + 1 :].partition(".")[0] in names
        return True

    return {key: value for key, value in settings.items() if counts(key) and key not in UNTOLD}


def _differing(workdirs: Sequence[Workdir]) -> dict[str, list[Any]]:
    """{config key: its value in each run} of those that differ among them; None where the run does not use the key,
    "none" where it says None.
    """
    settings = [w.settings for w in workdirs]
    found = _compared(settings)
    if any(key.startswith(("schedules.", "diffusion.schedule")) for key in found):
        found = _compared([_scheduled(each) for each in settings])
    return found


def _compared(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    out = {}
    for key in dict.fromkeys(key for each in settings for key in each):
        if len({json.dumps(each[key]) for each in settings if key in each}) > 1:
            out[key] = ["none" if each.get(key, "") is None else each.get(key) for each in settings]
    return out


def _scheduled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the name of their schedule, and its options alone. Imports JAX, with the objectives, which know
    what schedule None stands for.
    """
    name = config.chosen(settings)["schedules"]
    own = {k: v for k, v in settings.items() if not k.startswith("schedules.") or k.startswith(f"schedules.{name}.")}
    return own | {"diffusion.schedule": name}


def _columns(workdirs: Sequence[Workdir]) -> list[Column]:
    columns = [Column("run", [w.name for w in workdirs])]
    columns += [Column(key, values) for key, values in _differing(workdirs).items()]
    if len({w.tokenizer for w in workdirs}) > 1:
        data = [w.record["data"] for w in workdirs]
        columns.append(Column("tokenizer", [f"{d.get('tokenizer')}, {d.get('vocab_size')} ids" for d in data]))
    columns.append(Column("parameters", [w.record.get("parameters") for w in workdirs]))
    steps = [w.last("step") for w in workdirs]
    columns.append(Column("step", steps))
    columns.append(Column("tokens", [None if s is None else w.tokens(s) for w, s in zip(workdirs, steps, strict=True)]))
    for key in ("seconds", "cpu_seconds"):
        columns.append(Column(key.replace("_", " "), [w.last(key) for w in workdirs]))
    speeds = [[x["tokens_per_second"] for x in w.lines if _is_number(x.get("tokens_per_second"))] for w in workdirs]
    columns.append(Column("tokens/s", [statistics.median(some) if some else None for some in speeds]))
    for key in ("mfu", "train/loss"):
        columns.append(Column(key, [w.last(key) for w in workdirs]))
    columns += _with_errors([{k: w.last(k) for k in _validated(w)} for w in workdirs])
    columns += _best(workdirs)
    columns += _with_errors(_measured(workdirs))
    return [c for c in columns if any(value is not None for value in c.values)]


def _protocols(workdirs: Sequence[Workdir]) -> dict[str, list[Evaluation | None]]:
    """{label: an evaluation of each run} under one protocol; of several the one of the latest step, then of most draws.

    Where protocols of a label differ, it tells in what.
    """
    alike: dict[str, list[Evaluation]] = {}
    for each in (e for w in workdirs for e in w.evaluations):
        alike.setdefault(each.label, []).append(each)
    out: dict[str, list[Evaluation | None]] = {}
    for label, members in alike.items():
        differ = [key for key in PROTOCOL if len({json.dumps(e.protocol.get(key)) for e in members}) > 1]
        told = {id(e): ", ".join([label, *(f"{k} {_word(e.protocol.get(k))}" for k in differ)]) for e in members}
        for name in dict.fromkeys(told.values()):
            found = [[e for e in w.evaluations if told.get(id(e)) == name] for w in workdirs]
            out[name] = [max(some, key=lambda e: (e.step, e.draws), default=None) for some in found]
    return out


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] if re.fullmatch("[0-9a-f]{40,64}", value) else value
    return json.dumps(value)


def _measured(workdirs: Sequence[Workdir]) -> list[dict[str, float]]:
    """{"eval (text8, test) nelbo": number} of each run."""
    protocols = _protocols(workdirs)
    return [
        {f"{label} {key}": x for label, each in protocols.items() if (e := each[i]) for key, x in e.numbers.items()}
        for i in range(len(workdirs))
    ]


def _validated(workdir: Workdir) -> list[str]:
    return list(dict.fromkeys(key for line in workdir.lines for key in line if key.startswith("val/")))


def _with_errors(measured: Sequence[Mapping[str, float]]) -> list[Column]:
    """A column for each name; what is the error of another column stands in that one."""
    names = list(dict.fromkeys(name for each in measured for name in each))
    errors = {name + ending: name for ending in reversed(ERRORS) for name in names if name + ending in names}
    first = {name: error for error, name in errors.items()}
    return [
        Column(n, [m.get(n) for m in measured], [m.get(first[n]) for m in measured] if n in first else None)
        for n in names
        if n not in errors and not n.endswith("_se_text")
    ]


def _best(workdirs: Sequence[Workdir]) -> list[Column]:
    """The least validation NELBO of each run, and its step."""
    key = CURVES[0]
    lines = [[line for line in w.lines if _is_number(line.get(key))] for w in workdirs]
    best = [min(some, key=lambda line: line[key], default={}) for some in lines]
    return [Column(f"best {key}", [b.get(key) for b in best]), Column("at step", [b.get("step") for b in best])]


def _notes(workdirs: Sequence[Workdir], mixed: bool) -> Iterator[str]:
    """What makes numbers of two runs no comparison."""
    if mixed:
        yield (
            "The tokenizers differ: nats per token and perplexities do not compare between them, bits per character do."
        )
    texts = {(w.record["data"].get("validation", {}).get("sha256"), w.settings["train.eval_limit"]) for w in workdirs}
    if len(texts) > 1:
        yield "The runs were validated on different text: their validations do not compare, whatever the unit."
    if len({w.exact for w in workdirs}) > 1:
        exact = ", ".join(w.name for w in workdirs if w.exact)
        yield f"Exact negative log-likelihoods: {exact}; the other NELBOs are upper bounds on theirs."
    for label, each in _protocols(workdirs).items():
        scored = [e.characters for e in each if e and e.characters]
        if scored and max(scored) > 1.01 * min(scored):
            yield f"{label}: other amounts of text were scored, {min(scored):,} to {max(scored):,} characters."
        for w, e in zip(workdirs, each, strict=True):
            if e and e.step and w.lines and e.step != w.last("step"):
                yield f"{label}: {w.name} was scored at step {e.step:,}; it is at {w.last('step'):,}."
    if len({w.record.get("devices", {}).get("kind") for w in workdirs}) > 1:
        yield "The runs were trained on different devices: their seconds do not compare."
    if absent := [w.name for w in workdirs if not w.lines]:
        yield f"Without a metrics.jsonl, or nothing in it: {', '.join(absent)}."


def _chart(workdirs: Sequence[Workdir], key: str) -> str | None:
    panels = []
    for over, label in (("step", "step"), ("tokens", "tokens"), ("seconds", "seconds")):
        curves = [(w.name, w.curve(key, over)) for w in workdirs]
        series = [charts.Series(name, points, dots=len(points) <= 60) for name, points in curves if points]
        if series:
            panels.append(charts.Panel(label, UNITS.get(key, key), series))
    return charts.svg(panels) if panels else None


UNITS = {"val/nelbo": "validation NELBO, nats per token", "val/bpc": "validation NELBO, bits per character"}
