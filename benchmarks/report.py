"""Writes the numbers and plots of README.md and docs/ from the committed result files.

    python -m benchmarks.report           rewrites the marked blocks and the plots (plots need matplotlib)
    python -m benchmarks.report --check   says what is not up to date, and exits 1 if anything is
    python -m benchmarks.report --show OUT wkv7 length    prints blocks from the result files of another folder

A block stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`; NAME is a key of BLOCKS. What has no result file
reads "not measured yet". Result files are JSON, or JSON lines with one measurement each, in benchmarks/results/:

    quickstart.json         {"train_seconds", "compile_seconds", "bpc", "sample", "device", "commit", ...}
    peer_shakespeare.jsonl  {"name", "seed", "steps", "nelbo", "nelbo_se", "raw_nelbo", "parameters",
                             "curve": [[step, nelbo], ...], "cpu_seconds": [[step, CPU seconds of the steps], ...],
                             "device", "commit", "command"}; of two lines of one name and seed the later counts;
                             nelbo_se is of the draws
    presets.json            {"rows": [{"size", "name", ...}, ...], "commit"}, fields in benchmarks/presets.py
    denoiser_cpu.jsonl      {"name", "length", "milliseconds", "device", "commit"}, a pass of one sequence
    torch_cpu.jsonl         rows as of denoiser_cpu.jsonl and train_step_cpu.jsonl, of benchmarks/torch_dit.py
    denoiser_gpu*.jsonl     as denoiser_cpu.jsonl, with {"tokens_per_second", "peak_mb"}; also denoiser_tpu*.jsonl
    wkv7_cpu.jsonl          {"implementation", "direction": "forward" | "forward+backward", "B", "T", "H", "K",
                             "milliseconds", "temporary_mb", "device", "commit"}
    wkv7_gpu*.jsonl         the same with {"sides", "calls", "tflops", "gb_s", "floor_ms", "error", ...}, fields in
                            benchmarks/wkv7.py; also wkv7_tpu*.jsonl. "milliseconds" is null where one was wrong
    correct_gpu*.jsonl      fields in benchmarks/correct.py
    train_gpu*.jsonl        fields in benchmarks/training.py
    step_gpu*.jsonl         rows as of head.jsonl, measured
    compile_gpu.jsonl       fields in benchmarks/compile_gpu.py; compiled, not run
    compile_t4.jsonl        a training step of --gpu t4, likewise; compile_a100.jsonl of --gpu a100
    compile_tpu.jsonl       fields in benchmarks/compile_tpu.py; compiled, not run
    objectives*.jsonl       fields in benchmarks/objectives.py
    regular_languages.jsonl fields in benchmarks/regular_languages.py
    samplers.jsonl          fields in benchmarks/samplers.py
    train_step_cpu.jsonl    {"name", "devices", "cpu_seconds" (least), "median_cpu_seconds", "wall_seconds" (median),
                            "device", "commit"}
    head.jsonl              the same with {"vocabulary", "sequences", "length", "whole", "temporary_mb"}; of what was
                            compiled and not run, without seconds
    adaptation.jsonl        as peer_shakespeare.jsonl, and what benchmarks/adaptation.py says of it
    blocks.jsonl            as peer_shakespeare.jsonl, name "NAME@BLOCKS", and "nelbo_at": {size: [NELBO, error]}
    stream_cpu.jsonl        {"name", "block", "tokens", "state_kb", "points": [{"position", "milliseconds", "peak_mb"}]}
    profile_*.jsonl         what `python -m diffrwkv.profile --output=benchmarks/results/profile_...` wrote
    shipped.json            what benchmarks/shipped.py says of the models in the package; shipped_tried.jsonl of runs
                            on the way to them
    mdlm_reference.json     what MDLM's own code reached with the same recipe
"""

import argparse
import hashlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffrwkv import profile
from diffrwkv.presets import AUTOREGRESSIVE, BACKBONES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "*Not measured yet.*"

# What a name of `presets.BACKBONES`, or of a variant of experiments/peer_shakespeare.py, is called in the text.
LABELS = {
    "birwkv": "BiRWKV",
    "birwkv_hybrid": "BiRWKV hybrid",
    "dit": "DiT (MDLM's Transformer)",
    "bimamba": "BiMamba-2 (DiffuMamba)",
    "bimamba_hybrid": "BiMamba-2 hybrid (DiffuMamba-H)",
    "ar_transformer": "AR Transformer",
    "ar_rwkv": "AR RWKV-7",
    "birwkv_add": "BiRWKV, add",
    "birwkv_tied": "BiRWKV, tied",
    "birwkv_unshifted": "BiRWKV, unshifted",
    "birwkv_a2": "BiRWKV, a_scale 2",
    "ar_rwkv_a2": "AR RWKV-7, a_scale 2",
}
PEER_STEPS, PEER_LENGTH = 500, 256
FRONT_LENGTHS = (256, 1024, 4096, 16384)
SEEDS = 3
NGRAMS = (1, 2, 3, 4)
QUICKSTART_SAMPLE = 700  # characters

# A field's spellings in the programs that measure.
ALIASES = {
    "length": ("length", "L", "seq_len"),
    "milliseconds": ("milliseconds", "ms", "median_ms"),
    "temporary_mb": ("temporary_mb", "temp_mb", "temp_MB", "memory_mb"),
    "direction": ("direction", "pass", "mode"),
    "name": ("name", "model", "mixer"),
}


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a result file; [] if there is none."""
    path = RESULTS / name
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(text)] if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]


def on_accelerators(prefix: str) -> list[dict[str, Any]]:
    """The rows of all result files PREFIX_gpu*.jsonl and PREFIX_tpu*.jsonl."""
    files = [path.name for platform in ("gpu", "tpu") for path in sorted(RESULTS.glob(f"{prefix}_{platform}*.jsonl"))]
    return [row for name in files for row in read(name)]


def field(row: dict[str, Any], name: str) -> Any:
    """A field under any of its spellings. Raises KeyError naming those that there are."""
    for key in ALIASES.get(name, (name,)):
        if key in row:
            return row[key]
    raise KeyError(f"a result has no {name!r} but {sorted(row)}")


def table(header: list[str], rows: list[list[Any]], left: int = 1) -> str:
    """A Markdown table; all but the first `left` columns are aligned right."""
    align = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [header, align, *rows])


def where(rows: list[dict[str, Any]]) -> str:
    """The devices and commits of measurements, one line."""
    devices = sorted({str(r["device"]) for r in rows if "device" in r})
    commits = sorted({str(r["commit"])[:7] for r in rows if r.get("commit")})
    return f"*{', '.join(devices) or 'device not recorded'}; commit {', '.join(commits) or 'not recorded'}.*"


def mean(values: list[float], digits: int = 3) -> str:
    """`mean (lowest to highest)` of several, the value of one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# --- Blocks -----------------------------------------------------------------------------------------------------------


def peer_groups() -> dict[str, list[dict[str, Any]]]:
    """{name: its runs by seed}, in the order of LABELS; a name without runs is left out."""
    runs = {(row["name"], row["seed"]): row for row in read("peer_shakespeare.jsonl")}
    groups = {name: [runs[key] for key in sorted(runs) if key[0] == name] for name in LABELS}
    return {name: group for name, group in groups.items() if group}


def seconds_per_step(runs: list[dict[str, Any]]) -> float | None:
    """Median over runs and stretches between two evaluations of the CPU seconds of a step; None if not recorded."""
    slopes = []
    for run in runs:
        points = [(0, 0.0), *map(tuple, run.get("cpu_seconds", []))]
        slopes += [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    return statistics.median(slopes) if slopes else None


def peer_rows(names: Iterable[str]) -> list[dict[str, Any]]:
    """What the tables show of the named runs that there are, and of MDLM's own code: cells of text."""
    rows = []
    for name, runs in peer_groups().items():
        whole = [r for r in runs if r["steps"] == PEER_STEPS]
        seconds = seconds_per_step(runs)
        if name in names:
            rows.append(
                {
                    "name": name,
                    "label": LABELS[name] + (" (exact)" if name in AUTOREGRESSIVE else ""),
                    "parameters": f"{runs[0]['parameters']:,}",
                    "seeds": len(runs),
                    "nelbo": mean([r["nelbo"] for r in whole]) if whole else "",
                    "raw_nelbo": mean([r["raw_nelbo"] for r in whole]) if whole else "",
                    "seconds": "" if seconds is None else f"{seconds:.2f}",
                }
            )
    for other in read("mdlm_reference.json"):
        rows.append(
            {
                "name": other["name"],
                "label": other["name"],
                "parameters": f"{other['parameters']:,}",
                "seeds": len(other["runs"]),
                "nelbo": mean([r["nelbo"] for r in other["runs"]]),
                "raw_nelbo": mean([r["raw_nelbo"] for r in other["runs"]]),
                "seconds": f"{other['cpu_seconds_per_step']:.2f}",
            }
        )
    return rows


def peer_notes(names: Iterable[str]) -> list[str]:
    """What a reader of the table must know: units, what is not there yet, where MDLM's numbers are from."""
    groups = peer_groups()
    notes = ["Nats per character: the mean over seeds, and their range."]
    if any(name in AUTOREGRESSIVE for name in groups):
        notes[0] += (
            " The autoregressive rows are the exact negative log-likelihood of the same characters; all others are an "
            "upper bound on it."
        )
    seeds = {name: len(groups.get(name, [])) for name in BACKBONES}
    if few := [f"{LABELS[name]} ({n})" for name, n in seeds.items() if n < SEEDS]:
        notes.append(f"Fewer than {SEEDS} seeds so far: {', '.join(few)}.")
    for name, runs in groups.items():
        for run in runs:
            if name in names and run["steps"] != PEER_STEPS:
                step, nelbo = run["curve"][-1]
                notes.append(f"{LABELS[name]}, seed {run['seed']}, ran to step {step} only: EMA {nelbo:.3f} there.")
    notes += [f"{r['name']}: {r['provenance']}; standard error 0.01 a run." for r in read("mdlm_reference.json")]
    return notes


def peer() -> str:
    """Validation NELBO under the peers' recipe: every backbone, the variants of BiRWKV, and MDLM's own code."""
    if not peer_groups():
        return MISSING
    header = ["denoiser", "parameters", "seeds", f"NELBO (EMA), step {PEER_STEPS}", "raw", "CPU s/step"]
    keys = ("label", "parameters", "seeds", "nelbo", "raw_nelbo", "seconds")
    body = [[row[key] for key in keys] for row in peer_rows(LABELS)]
    notes = "\n\n".join(peer_notes(LABELS))
    plot = image("peer", "validation NELBO over training steps and over CPU seconds")
    return f"{table(header, body)}\n\n{notes} {where(read('peer_shakespeare.jsonl'))}\n\n{plot}"


def front() -> str:
    """What a pass costs over the length, and how well each denoiser learns: `speed` and `peer` in one small table."""
    if not peer_groups():
        return MISSING
    rows = profile.read(*(path for path in profiles() if path.name == "profile_cpu.jsonl"))  # of one device
    passes = [row for row in rows if (row["kind"], row["batch"], row["size"]) == ("pass", 1, "peer")]
    times = {(row["name"], row["length"]): row["milliseconds"] for row in passes}
    body = []
    for row in peer_rows(BACKBONES):
        cells = [f"{times[row['name'], n]:,.3g}" if (row["name"], n) in times else "" for n in FRONT_LENGTHS[:-1]]
        last = times.get((row["name"], FRONT_LENGTHS[-1]))
        body.append([row["label"], *cells, "" if last is None else f"{last:,.0f}", row["nelbo"]])
    head = ["denoiser", *(f"ms, {n:,} tokens" for n in FRONT_LENGTHS), f"NELBO after {PEER_STEPS} steps"]
    notes = "\n\n".join(peer_notes(BACKBONES))
    devices = f"Times: {', '.join(dict.fromkeys(row['device'] for row in passes))}, one sequence, float32."
    return f"{table(head, body)}\n\n{devices} {notes} {where(read('peer_shakespeare.jsonl'))}"


def presets() -> str:
    """What each backbone is at each size: parameters, operations and bytes per token."""
    files = read("presets.json")
    if not files:
        return MISSING
    header = ["size", "backbone", "dim", "layers", "parameters, M", "embedding and head, M", "rest, M"]
    header += ["MFLOP/token, training", "KB/token, weights", "KB/token, state"]
    body = [
        [
            f"{r['size']}, length {r['length']:,}",
            LABELS[r["name"]],
            f"{r['dim']:,}",
            r["num_layers"],
            *(f"{r[key] / 1e6:,.2f}" for key in ("parameters", "embedding_parameters", "other_parameters")),
            f"{r['train_flops_per_token'] / 1e6:,.1f}",
            *(f"{r[key] / 1e3:,.2f}" for key in ("weight_bytes_per_token", "state_bytes_per_token")),
        ]
        for r in files[0]["rows"]
    ]
    return f"{table(header, body, left=2)}\n\n*Counted from shapes; commit {files[0]['commit']}.*"


def length() -> str:
    """Time of a denoiser's pass over the length of the sequence: on a CPU, and on accelerators where that was run."""
    parts = [length_cpu(), length_accelerators()]
    if not any(parts):
        return MISSING
    return "\n\n".join([*filter(None, parts), image("length", "time of a pass over length")])


def cpu_passes() -> list[dict[str, Any]]:
    """Rows of passes over one sequence on a CPU: ours, and where it was run PyTorch's."""
    return read("denoiser_cpu.jsonl") + [row for row in read("torch_cpu.jsonl") if "length" in row]


def length_cpu() -> str:
    rows = cpu_passes()
    if not rows:
        return ""
    names = list(dict.fromkeys(field(r, "name") for r in rows))
    lengths = sorted({field(r, "length") for r in rows})
    times = {(field(r, "name"), field(r, "length")): field(r, "milliseconds") for r in rows}
    first, last = lengths[0], lengths[-1]
    body = []
    for name in names:
        cells = [f"{times[name, n]:,.1f}" if (name, n) in times else "" for n in lengths]
        ratio = f"{times[name, last] / times[name, first]:.1f}×" if {(name, first), (name, last)} <= set(times) else ""
        body.append([name, *cells, ratio])
    header = ["ms for one sequence of", *(f"{n:,}" for n in lengths), f"{last:,} / {first:,}"]
    return f"{table(header, body)}\n\n{where(rows)}"


def length_accelerators() -> str:
    """Times, how many times as fast as DiT, and memory: a table for each device and size of the models."""
    parts = []
    for rows in accelerator_passes():
        parts += [
            accelerator_times(rows),
            "Thousands of tokens per second, and the most memory that a pass holds in GB, weights and logits counted.",
            table_of_passes("1000 tokens/s; GB at", rows, speed_and_memory),
            where(rows),
        ]
    return "\n\n".join(parts)


def speed_and_memory(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second'] / 1e3:,.0f}; {row['peak_mb'] / 1024:,.1f}"


def gpu_front() -> str:
    """The times alone."""
    parts = [f"{accelerator_times(rows)}\n\n{where(rows)}" for rows in accelerator_passes()]
    return "\n\n".join(parts) or MISSING


def accelerator_passes() -> list[list[dict[str, Any]]]:
    """Rows of passes, by device and size."""
    groups: dict[tuple, list] = {}
    for row in filter(as_in_a_model, on_accelerators("denoiser")):
        groups.setdefault((row["device"], row["dtype"], row["dim"]), []).append(row)
    return list(groups.values())


def as_in_a_model(row: dict[str, Any]) -> bool:
    """Whether a pass or a step has its operators in the forms that a model takes, or attention in a named one."""
    return not row.get("parts") and set(row.get("use") or {}) <= {"attention"}


def names_of(rows: list[dict[str, Any]]) -> list[str]:
    """The denoisers of some passes, in order."""
    return [name for name in LABELS.values() if name in {row["name"] for row in rows}]


def table_of_passes(first: str, rows: list[dict[str, Any]], show: Callable[[dict[str, Any]], str]) -> str:
    """A line for each denoiser, a column for each length; nothing where it was not tried."""
    cells = {(row["name"], row["length"]): row for row in rows}
    lengths = sorted({row["length"] for row in rows})

    def cell(row: dict[str, Any] | None) -> str:
        return "" if row is None else show(row) if row["milliseconds"] else "failed"

    body = [[name, *(cell(cells.get((name, n))) for n in lengths)] for name in names_of(rows)]
    return table([first, *(f"{n:,}" for n in lengths)], body)


def accelerator_times(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, and how many times as fast as DiT that is."""
    dit = {row["length"]: row["milliseconds"] for row in rows if row["name"] == LABELS["dit"]}

    def time(row: dict[str, Any]) -> str:
        other = dit.get(row["length"])
        lead = f" ({other / row['milliseconds']:.2f}×)" if other and row["name"] != LABELS["dit"] else ""
        return f"{row['milliseconds']:,.2f}{lead}"

    sizes = {row["name"]: row["parameters"] for row in rows}
    parameters = ", ".join(f"{name} {sizes[name] / 1e6:,.0f} M" for name in names_of(rows))
    said = (
        f"One sequence on {rows[0]['device']}, {rows[0]['dtype']}, {parameters}: milliseconds, and in brackets how "
        f"many times as fast as {LABELS['dit']} that is."
    )
    return f"{said}\n\n{table_of_passes('ms for one sequence of', rows, time)}"


def wkv7() -> str:
    """The operator's forms: time and temporary memory; on accelerators beside the peers and the machine's ceilings."""
    parts = [wkv7_cpu(), wkv7_accelerators()]
    if not any(parts):
        return MISSING
    return "\n\n".join([*filter(None, parts), image("wkv7", "time of the operator over length")])


def wkv7_cpu() -> str:
    rows = read("wkv7_cpu.jsonl")
    if not rows:
        return ""
    body = [
        [
            r["implementation"] + (f", chunk {r['chunk_size']}" if r.get("chunk_size") else ""),
            field(r, "direction") + both_sides(r),
            " ".join(f"{k} {r[k]}" for k in "BHTK"),
            f"{field(r, 'milliseconds'):,.1f}" if field(r, "milliseconds") else r["failed"],
            f"{field(r, 'temporary_mb'):,.1f}" if field(r, "temporary_mb") is not None else "",
        ]
        for r in rows
    ]
    return f"{table(['form', 'pass', 'shape', 'ms', 'temporary MB'], body, left=3)}\n\n{where(rows)}"


def both_sides(row: dict[str, Any]) -> str:
    """What a row says of directions: nothing for one."""
    return {1: ", both sides at once", 2: ", both sides"}[row["calls"]] if row.get("sides") == 2 else ""


def wkv7_accelerators() -> str:
    """Each measurement beside the floor that the machine's measured ceilings put under it."""
    rows = on_accelerators("wkv7")
    body = []
    for r in rows:
        version = f" {r['version']}" if r.get("version") else ""
        segments = f", {r['parts']} segments" if r.get("parts", 1) > 1 else ""
        first = [
            r["implementation"] + version + segments,
            r["direction"] + both_sides(r),
            " ".join(f"{k} {r[k]}" for k in "BHTK"),
            f"{r['dtype']}, {r['kind']}",
        ]
        if r["milliseconds"]:
            first += [f"{r['milliseconds']:,.3f}", f"{r['tflops']:,.1f}", f"{r['gb_s']:,.0f}"]
            first += [f"{100 * r['floor_ms'] / r['milliseconds']:.0f} %" if "floor_ms" in r else ""]
        else:
            first += ["no time: " + r["failed"].replace("|", "/").replace("\n", " ")[:80], "", "", ""]
        body.append([*first, "" if r["error"] is None else f"{r['error']:.0e}"])
    if not rows:
        return ""
    ceilings: dict[str, list[dict[str, Any]]] = {}
    for r in (r for r in rows if "ceiling_gb_s" in r):
        ceilings.setdefault(r["device"], []).append(r)
    header = ["form", "pass", "shape", "inputs", "ms", "TFLOP/s", "GB/s", "of the floor", "error"]
    notes = "TFLOP/s and GB/s count useful work alone (benchmarks/wkv7.py has the formula); the floor is the time that "
    notes += "it takes at the ceilings measured in the same run: "
    for device, found in sorted(ceilings.items()):
        tflops, gb_s = (span(r[f"ceiling_{key}"] for r in found) for key in ("tflops", "gb_s"))
        notes += f"{device}: {tflops} TFLOP/s and {gb_s} GB/s. "
    return f"{table(header, body, left=4)}\n\n{notes}{where(rows)}"


def span(values: Iterable[float]) -> str:
    """The least and the greatest of some numbers, whole."""
    ascending = sorted(values)
    return " to ".join(dict.fromkeys(f"{x:,.0f}" for x in (ascending[0], ascending[-1])))


def curve_label(row: dict[str, Any]) -> str:
    """A sampler and the options that its curve keeps."""
    kept = ", ".join(f"{key} {value}" for key, value in row["curve"].items())
    return f"{row['sampler']} ({kept})" if kept else row["sampler"]


def sampler_rows(in_blocks: bool = False) -> list[dict[str, Any]]:
    """Rows of samplers.jsonl, those of a curve and of a sampler together, otherwise as they were measured.

    Those of the file's first model, which are compared among samplers; or `in_blocks` those of all others.
    """
    rows = read("samplers.jsonl")
    rows = [row for row in rows if (row["model"] != rows[0]["model"]) == in_blocks]
    first: dict[tuple[str, ...], int] = {}

    def places(row: dict[str, Any]) -> list[int]:
        kind = (sampler_model(row), row["sampler"], curve_label(row))
        return [first.setdefault(kind[:depth], len(first)) for depth in (1, 2, 3)]

    return sorted(rows, key=places)


def sampler_model(row: dict[str, Any]) -> str:
    """What a row of samplers.jsonl sampled from, as an experiment would name it."""
    model = row["model"]
    return model["pattern"] + ("@" + ",".join(map(str, model["blocks"])) if "blocks" in model else "")


def samplers() -> str:
    """What each sampler generates under each of its settings, as a judge and as counting sees it, and what it costs."""
    rows = sampler_rows()
    if not rows:
        return MISSING
    plot = image("samplers", "perplexity and entropy of samples over passes and over CPU seconds")
    return f"{samplers_table(rows)}\n\n{samplers_note(rows)} {where(rows)}\n\n{plot}"


def samplers_in_blocks() -> str:
    """The same for models that are sampled in blocks, under an exact or an approximate cache."""
    rows = sampler_rows(in_blocks=True)
    if not rows:
        return MISSING
    plot = image("samplers_in_blocks", "perplexity and entropy of samples in blocks over passes and over CPU seconds")
    return f"{samplers_table(rows, models=True)}\n\n{samplers_note(rows)} {where(rows)}\n\n{plot}"


def samplers_table(rows: list[dict[str, Any]], models: bool = False) -> str:
    body = [
        [
            *([f"`{sampler_model(r)}`"] if models else []),
            curve_label(r),
            ", ".join(f"{key} {value}" for key, value in r["varied"].items()),
            f"{r['passes']:.0f}" if "passes" in r else "",
            f"{r['cpu_seconds']:.2f}" if "cpu_seconds" in r else "",
            f"{r['ppl']:.2f} ± {r['ppl_se']:.2f}",
            f"{r['entropy']:.2f} ± {r['entropy_se']:.2f}",
            *(f"{r[f'distinct_{n}']:.3f}" for n in NGRAMS),
        ]
        for r in rows
    ]
    header = [*(["model"] if models else []), "sampler", "setting"]
    numbers = ["passes", "CPU s", "judge's perplexity", "entropy", *(f"distinct-{n}" for n in NGRAMS)]
    return table([*header, *numbers], body, left=len(header))


def samplers_note(rows: list[dict[str, Any]]) -> str:
    """What the rows of samplers.jsonl have in common."""
    r = rows[0]

    def told(model: dict[str, Any], name: str) -> str:
        counted = f"{model['parameters']:,} parameters after {model['step']:,} steps"
        return f"`{name}` with {counted}, seed {model['seed']}"

    models = dict.fromkeys(told(row["model"], sampler_model(row)) for row in rows)
    return (
        f"{r['num']} samples of {r['length']} tokens a row, {r['data']}; passes and seconds are per sample, standard "
        f"errors over samples. Sampled from: {'; '.join(models)}. The judge: {told(r['judge'], r['judge']['pattern'])}."
    )


def train_step() -> str:
    """A training step at the peers' size."""
    rows = read("train_step_cpu.jsonl") + [row for row in read("torch_cpu.jsonl") if "devices" in row]
    if not rows:
        return MISSING
    seconds = {(field(r, "name"), r["devices"]): (r["cpu_seconds"], r["median_cpu_seconds"]) for r in rows}
    body = []
    for r in rows:
        name, devices = field(r, "name"), r["devices"]
        cpu = seconds[name, devices]
        whole, blocks, _ = name.partition(", blocks of ")
        ratios = [f"{x / y:.2f}×" for x, y in zip(cpu, seconds[whole, devices], strict=True)] if blocks else ["", ""]
        body.append([name, devices, *(f"{x:.2f}" for x in (*cpu, r["wall_seconds"])), *ratios])
    columns = ["CPU s/step, least", "median", "wall s/step, median", "least CPU, of whole sequences", "medians"]
    return f"{table(['denoiser', 'devices', *columns], body)}\n\n{where(rows)}"


def head() -> str:
    """A training step with the whole output, and with the output made where the loss reads it."""
    rows = read("head.jsonl")
    if not rows:
        return MISSING
    pairs: dict[tuple[Any, ...], dict[bool, dict[str, Any]]] = {}
    for r in rows:
        setting = r["name"], r["vocabulary"], r["devices"], r["sequences"], r["length"]
        pairs.setdefault(setting, {})[r["whole"]] = r
    body = []
    for (name, vocabulary, devices, sequences, length), by in pairs.items():
        cells = [name, f"{vocabulary:,}", devices, f"{sequences} × {length:,}"]
        for key, form in (("cpu_seconds", "{:.2f}"), ("wall_seconds", "{:.2f}"), ("temporary_mb", "{:,.0f}")):
            both = [by[whole].get(key) if whole in by else None for whole in (True, False)]
            cells += ["" if x is None else form.format(x) for x in both]
            cells.append("" if None in both else f"{both[0] / both[1]:.1f}×")
        body.append(cells)
    columns = [
        f"{what}{form}" for what in ("CPU s/step, ", "wall s, ", "MB, ") for form in ("whole", "in pieces", "ratio")
    ]
    return f"{table(['denoiser', 'vocabulary', 'devices', 'batch', *columns], body)}\n\n{where(rows)}"


def blocks() -> str:
    """Block diffusion at each size, beside diffusion of the whole sequence and the causal model."""
    runs = {(row["name"], row["seed"]): row for row in read("blocks.jsonl")}
    if not runs:
        return MISSING
    groups = peer_groups()
    sizes = sorted({PEER_LENGTH} | {int(size) for row in runs.values() for size in row["nelbo_at"]})
    body = []
    for name in ("ar_rwkv", "birwkv"):
        cells = [""] * len(sizes)
        if name == "birwkv":
            cells[sizes.index(PEER_LENGTH)] = mean([r["nelbo"] for r in groups[name] if r["steps"] == PEER_STEPS])
        score = mean([r["nelbo"] for r in groups[name]]) if name == "ar_rwkv" else ""
        seconds = f"{seconds_per_step(groups[name]):.2f}"
        body.append([LABELS[name] + (", exact" if score else ", MDLM"), len(groups[name]), score, *cells, seconds])
    for name in dict.fromkeys(name for name, _ in runs):
        rows = [row for (other, _), row in sorted(runs.items()) if other == name]
        backbone, _, trained = name.partition("@")
        trained = sorted(trained.split(","), key=lambda size: int(size) or PEER_LENGTH)
        label = ", ".join("whole" if size == "0" else size for size in trained)
        cells = [mean([r["nelbo_at"][str(n)][0] for r in rows]) if str(n) in rows[0]["nelbo_at"] else "" for n in sizes]
        label = f"{LABELS[backbone]}, trained with {label}"
        body.append([label, len(rows), "", *cells, f"{seconds_per_step(rows):.2f}"])
    header = ["model", "seeds", "left to right", *(f"blocks of {n}" for n in sizes[:-1]), "whole", "CPU s/step"]
    everything = [*runs.values(), *groups["ar_rwkv"], *groups["birwkv"]]
    return f"{table(header, body)}\n\n{where(everything)}"


ADAPTATION_LABELS = {  # of benchmarks/adaptation.py
    "scratch": "random weights",
    "scratch_next": "random weights, logits at the token before",
    "longer": "random weights, and the steps of the source",
    "adapted_own": "adapted, logits at the token itself",
    "adapted_at_once": "adapted, blocks of 16 at once",
    "adapted": "adapted, blocks of 1, 4, 16",
    "forward": "forward scan alone",
    "twice": "forward scan, blanks read twice",
    "twice_own": "forward scan, blanks read twice, logits at the token itself",
    "future_seed": "forward scan, future-seed",
}
ADAPTATION_SHOWN = ("scratch", "adapted", "adapted_at_once", "forward", "twice", "future_seed")  # the table has all


def adaptation_groups() -> dict[str, list[dict[str, Any]]]:
    """{start: its runs by seed}, in the order of ADAPTATION_LABELS, of the most steps that any start was given."""
    rows = read("adaptation.jsonl")
    most = max((row["budget"] for row in rows), default=0)
    runs = {(row["name"], row["seed"]): row for row in rows if row["budget"] == most}
    groups = {name: [runs[key] for key in sorted(runs) if key[0] == name] for name in ADAPTATION_LABELS}
    return {name: group for name, group in groups.items() if group}


def on_one_device(groups: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The runs on the device that most were on: CPU seconds of others are other seconds."""
    device = statistics.mode(run["device"] for group in groups.values() for run in group)
    return {name: [run for run in group if run["device"] == device] for name, group in groups.items()}


def bound_at(run: dict[str, Any], seconds: float) -> float:
    """A run's validation NELBO after so many CPU seconds of its steps, between two evaluations on their line."""
    curve, spent = dict(map(tuple, run["curve"])), dict(map(tuple, run["cpu_seconds"]))
    points = [(spent[step], curve[step]) for step in sorted(curve)]
    for (a, before), (b, after) in itertools.pairwise(points):
        if a <= seconds <= b:
            return before + (after - before) * (seconds - a) / (b - a)
    return points[0][1] if seconds < points[0][0] else points[-1][1]


def adaptation() -> str:
    """Block diffusion from the weights of a causal model, and from none: bounds at equal steps and CPU seconds."""
    groups = adaptation_groups()
    if not groups:
        return MISSING
    runs = [run for group in groups.values() for run in group]
    there = on_one_device(groups)
    timed = [run for group in there.values() for run in group]
    short = [run for run in timed if run["name"] != "longer"]
    budget = min(run["cpu_seconds"][-1][1] for run in short)
    halves = [budget / 4, budget / 2, budget]
    body = []
    for name, group in groups.items():
        at = [mean([bound_at(run, s) for run in there[name]]) for s in halves]
        cells = at if name != "longer" else [""] * len(halves)
        end = mean([run["nelbo"] for run in group])
        parameters = f"{group[0]['parameters']:,}"
        cells += [group[0]["steps"], end, f"{seconds_per_step(there[name]):.2f}"]
        body.append([ADAPTATION_LABELS[name], len(group), parameters, *cells])
    spent = [f"after {s:,.0f} CPU s" for s in halves]
    header = ["start", "seeds", "parameters", *spent, "steps", "NELBO (EMA) at the end", "CPU s/step"]
    plot = image("adaptation", "validation NELBO over CPU seconds, by what training starts from")
    other = sorted({run["device"] for run in runs} - {run["device"] for run in timed})
    note = f"CPU seconds are of {timed[0]['device']}, without the runs on {', '.join(other)}. " if other else ""
    return f"{table(header, body)}\n\n{note}{where(runs)}\n\n{plot}"


def stream() -> str:
    """What a block costs along a text."""
    rows = read("stream_cpu.jsonl")
    if not rows:
        return MISSING
    body = [
        [
            LABELS[r["name"]],
            f"{point['position']:,}",
            f"{point['milliseconds']:.2f}",
            f"{point['milliseconds'] / r['points'][0]['milliseconds']:.3f}",
            f"{r['state_kb']:,.0f}",
            f"{point['peak_mb']:.1f}",
        ]
        for r in rows
        for point in r["points"]
    ]
    header = ["denoiser", "position", "CPU ms for a block", "of the first", "state, KB", "peak of the process, MB"]
    return f"{table(header, body)}\n\n{where(rows)}"


def around(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the time mix's pieces and of walks.py, in a list, if they were compiled: for TPUs, or for a GPU."""
    counts = {"bundles": "bundles"}
    if any("instructions" in r for r in rows if "plain_gb_accessed" in r):
        counts = {
            "instructions": "instructions of a warp, a token and head",
            "registers": "registers a thread",
            "spill_stores": "bytes of them spilled",
        }
    body = [
        [
            r["program"],
            f"B {r['B']} T {r['T']:,}",
            r["topology"].split(":")[0] if "topology" in r else "H200",
            r["dtype"],
            *(f"{r[key]:,.0f}" if r.get(key) is not None else "" for key in counts),
            r["kernels"],
            f"{r['gb_accessed']:.2f}",
            f"{r['plain_kernels']:,}",
            f"{r['plain_gb_accessed']:.2f}",
        ]
        for r in rows
        if "plain_gb_accessed" in r
    ]
    header = ["program", "tokens", "chip", "inputs", *counts.values()]
    header += ["launches", "GB moved", "launches, plain", "GB moved, plain"]
    return [table(header, body, left=4)] if body else []


def compile_tpu() -> str:
    """What the TPU's compiler says of the kernels and of whole steps."""
    rows = read("compile_tpu.jsonl")
    if not rows:
        return MISSING
    kernels = [
        [
            r["program"],
            r["topology"].split(":")[0],
            r["dtype"],
            r["directions"],
            r["chunk_size"],
            f"{r['bundles']:,}",
            f"{r['bundles_per_token_head']:.1f}",
            f"{r['gb_accessed']:.2f}",
        ]
        for r in rows
        if "bundles_per_token_head" in r
    ]
    steps = [
        [
            r["program"],
            f"{r['topology']}, {r['chips']} chips",
            f"{r['sequences']} x {r['length']:,}",
            r["kernel_launches"],
            f"{r['argument_gb']:.2f}",
            f"{r['temporary_gb']:.2f}",
        ]
        for r in rows
        if "chips" in r
    ]
    header = ["kernel", "chip", "inputs", "directions", "chunk", "bundles a chunk", "a token and head", "GB moved"]
    parts = [table(header, kernels, left=3)]
    parts += around(rows)
    if steps:
        header = ["program", "slice", "tokens", "kernels in it", "GB of arguments a chip", "GB of temporaries"]
        parts.append(table(header, steps, left=3))
    commits = where([{**r, "device": f"{r['topology'].split(':')[0]} by libtpu, jax {r['jax']}"} for r in rows])
    return "\n\n".join([*parts, commits])


def compile_gpu() -> str:
    """What ptxas makes of the kernels, and XLA of whole programs."""
    rows = read("compile_gpu.jsonl")
    if not rows:
        return MISSING
    counts = "instructions", "code", "wgmma", "conversions", "barriers"
    body = [
        [
            r["program"],
            "B {B} T {T} H {H}".format(**r),
            r["directions"],
            r["parts"],
            "one by one" if r["serialised"] else "in flight",
            *("" if r[x] is None else f"{r[x]:,}" for x in counts),
            r["registers"],
            f"{r['spill_stores']:,}",
            f"{r['shared_bytes'] / 1024:.0f}",
            f"{r['blocks']:,}",
            f"{r['blocks_in_flight']:,}",
        ]
        for r in rows
        if "serialised" in r
    ]
    header = ["kernel", "shape", "directions", "parts", "products are", "instructions a warp and chunk"]
    header += ["in the code", "wgmma", "conversions", "barriers", "registers a thread", "bytes of them spilled"]
    header += ["KB shared", "blocks", "of them in flight"]
    parts = [table(header, body, left=2)]
    parts += around(rows)
    body = [
        [
            LABELS[r["program"].removeprefix("pass of ")],
            f"{r['L']:,}",
            f"{r['gb_layer']:.1f}",
            f"{r['kernels_layer']:,}",
            *(f"{r[f'{x}s_layer']:,}" for x in ("product", "call", "fusion")),
            f"{r['small_layer']:,}",
            f"{r['least_ms']:.1f}",
        ]
        for r in rows
        if "gb_layer" in r
    ]
    if body:
        header = ["170 M pass, bfloat16", "tokens", "GB a layer", "kernels a layer", "products", "Pallas or cuDNN"]
        header += ["other", "of all below 4 MB", "ms a layer for the bytes"]
        parts.append(table(header, body))
    for r in rows:
        if "places" in r:
            body = [[place, f"{x['gb_layer']:.1f}", f"{x['kernels_layer']:,}"] for place, x in r["places"].items()]
            name = LABELS[r["program"].removeprefix("pass of ")]
            parts.append(table([f"a layer of {name} at {r['L']:,}", "GB", "kernels"], body))
    body = [
        [r["program"], f"{r['sequences']} x {r['L']:,}", f"{r['argument_gb']:.2f}", f"{r['temporary_gb']:.2f}"]
        for r in rows
        if "sequences" in r
    ]
    if body:
        parts.append(table(["program", "tokens", "GB of arguments", "GB of temporaries"], body))
    parts.append(where([{**r, "device": f"H200 by ptxas {r['ptxas']}, jax {r['jax']}"} for r in rows]))
    return "\n\n".join(parts)


def gpu_aims() -> str:
    """What was aimed at on a Hopper GPU, and what was reached."""
    passes = {r["program"].removeprefix("pass of "): r for r in read("compile_gpu.jsonl") if "tflop_layer" in r}
    times, whole = on_accelerators("wkv7"), on_accelerators("denoiser")
    if "birwkv" not in passes or not times or not whole:
        return MISSING
    counted = passes["birwkv"]
    body = [
        ["GB that a layer of the 170 M pass moves at 65,536", "at most 6", f"{counted['gb_layer']:.1f}", "counted"],
        ["its launches", "at most 20", counted["kernels_layer"], "counted"],
    ]

    def spread(row: dict[str, Any]) -> str:
        return f"{row['milliseconds']:.2f} ms ({row['least_ms']:.2f} to {row['most_ms']:.2f})"

    at = [r for r in times if (r["B"], r["T"], r["H"]) == (8, 4096, 12) and r["direction"] == "forward+backward"]
    at = [r for r in at if r["milliseconds"]]
    ours = next((r for r in at if r["implementation"] == "pallas_gpu" and r["sides"] == 1), None)
    operator = "`wkv7` forward and backward at B 8 T 4,096 H 12"
    for r in at if ours else ():
        if r["implementation"] not in ("pallas_gpu", "associative"):
            ratio = f"{r['milliseconds'] / ours['milliseconds']:.2f}"
            body.append(
                [f"{operator}: {r['implementation']}'s time to ours", "1.2", ratio, f"{spread(r)}, {spread(ours)}"]
            )
    calls = {r["calls"]: r for r in at if r["implementation"] == "pallas_gpu" and r["sides"] == 2}
    if {1, 2} <= set(calls):
        ratio = f"{calls[2]['milliseconds'] / calls[1]['milliseconds']:.2f}"
        cell = f"{spread(calls[2])}, {spread(calls[1])}"
        body.append([f"{operator}, both directions: two launches to one", "1.3", ratio, cell])
    cells = {(r["name"], r["length"]): r["milliseconds"] for rows in accelerator_passes() for r in rows}
    for length, aim in ((65536, "8.2"), (131072, "12")):
        mine, other = cells.get((LABELS["birwkv"], length)), cells.get((LABELS["dit"], length))
        ratio = f"{other / mine:.1f}" if mine and other else ""
        both = ", ".join(f"{x:,.1f} ms" if x else "not measured" for x in (other, mine))
        body.append([f"the 170 M pass at {length:,}: DiT's time to BiRWKV's", aim, ratio, both])
    return f"{table(['', 'aim', 'reached', 'from'], body)}\n\n{where([counted, *at, *whole])}"


def gpu_correct() -> str:
    """What was compared with the exact on an accelerator."""
    rows = on_accelerators("correct")
    if not rows:
        return MISSING
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        name = r["implementation"] + (f", {r['parts']} segments" if r["parts"] > 1 else "")
        judge = {"float64": "token loop, float64", "reference": "definition, float32"}.get(
            r["judged_by"], r["judged_by"]
        )
        groups.setdefault((name, judge, r["kind"]), []).append(r)
    body = []
    for (name, judge, kind), found in groups.items():
        errors = [x for r in found for x in r["errors"].values()]
        shapes = "; ".join(" ".join(f"{key} {r[key]:,}" for key in "BTHK") for r in found)
        body.append([name, shapes, kind, judge, len(found[0]["errors"])])
        body[-1].append("not finite" if None in errors else f"{max(errors):.0e}")
    header = ["bfloat16", "shapes", "inputs", "compared with", "arrays", "greatest relative error"]
    return f"{table(header, body, left=4)}\n\n{where(rows)}"


def gpu_training() -> str:
    """Training on an accelerator: speed, and the bound on the validation text over tokens."""
    rows = on_accelerators("train")
    if not rows:
        return MISSING
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in rows:
        runs.setdefault((r["options"][0].rpartition(":")[2], r["device"], r["commit"]), []).append(r)

    def option(run: list[dict[str, Any]], key: str, default: str) -> str:
        start = f"--config.{key}="
        return next((x.removeprefix(start) for x in run[0]["options"] if x.startswith(start)), default)

    tokens = sorted({r["tokens"] for r in rows if "val/nelbo" in r})
    body = []
    for (name, *_), run in runs.items():
        timed = run[1:]  # the first line has the compilation in it
        speeds = sorted(r["tokens_per_second"] / 1e3 for r in timed)
        bounds = {r["tokens"]: f"{r['val/nelbo']:.2f} ± {r['val/nelbo_se_text']:.2f}" for r in run if "val/nelbo" in r}
        body.append(
            [
                name,
                f"{option(run, 'train.batch_size', '512')} × {int(option(run, 'data.length', '1024')):,}",
                f"{statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})",
                f"{100 * statistics.median(r['mfu'] for r in timed):.1f} %",
                f"{run[-1]['tokens'] / 1e6:.1f}",
                *(bounds.get(n, "") for n in tokens),
            ]
        )
    header = ["`owt_small`", "batch", "1000 tokens/s", "MFU", "M tokens seen"]
    header += [f"NELBO after {n / 1e6:.1f} M" for n in tokens]
    steps = [r for r in on_accelerators("step") if as_in_a_model(r)]
    said = "".join(
        f"A step of {r['sequences']} × {r['length']:,} tokens of the 170 M {r['name']} takes {r['wall_seconds']:.3f} s"
        f"{' where its whole output is made' if r['whole'] else ''}. "
        for r in sorted(steps, key=lambda r: r["whole"])
    )
    return f"{table(header, body)}\n\n{said}{where([*rows, *steps])}"


def compile_t4() -> str:
    """What a training step needs on the GPU that Colab gives."""
    return step_of_another_gpu("compile_t4.jsonl", "a Tesla T4", 16, "10 M")


def compile_a100() -> str:
    """The same of the 170 M model on an A100."""
    return step_of_another_gpu("compile_a100.jsonl", "an A100", 40, "170 M")


def step_of_another_gpu(file: str, gpu: str, memory: int, parameters: str) -> str:
    rows = read(file)
    if not rows:
        return MISSING
    said = []
    for r in rows:
        tokens = r["sequences"] * r["L"]
        rate = r["gb"] / r["least_seconds"]
        said.append(
            f"Estimated, not run: a {r['program']} ({parameters} parameters, {r['dtype']}), {r['sequences']} sequences "
            f"of {r['L']:,}, compiled for {gpu}, holds {r['argument_gb'] + r['temporary_gb']:.1f} GB of its {memory} "
            f"and moves {r['gb']:.0f} GB in {r['kernels']:,} launches. At the data sheet's {rate:,.0f} GB/s that is at "
            f"least {r['least_seconds']:.2f} s, so at most {tokens / r['least_seconds']:,.0f} tokens a second."
        )
    name = gpu.partition(" ")[2]
    said.append(where([{**r, "device": f"{name} by ptxas {r['ptxas']}, jax {r['jax']}"} for r in rows]))
    return " ".join(said)


def quickstart() -> str:
    """The main job: what it costs and what it reaches."""
    rows = read("quickstart.json")
    if not rows:
        return MISSING
    r = rows[0]
    compiling = f"{r['compile_seconds']:.0f} s of it compiling"
    text = f"Training takes {r['train_seconds'] / 60:.1f} minutes, {compiling}, and reaches {r['bpc']:.3f} bits"
    text += f" per character. {where(rows)} The first of its samples, seed 0, begins:"
    sample = r["sample"][:QUICKSTART_SAMPLE].rpartition("\n")[0].strip("\n").replace("```", "` ` `")
    return f"{text}\n\n```text\n{sample}\n```"


def shipped_row() -> dict[str, Any] | None:
    return (read("shipped.json") or [None])[0]


def shipped() -> str:
    """The models in the package: their sizes, bounds, and what a judge says."""
    r = shipped_row()
    if r is None:
        return MISSING
    header = ["model", "weights, MB", "validation, nats a token", "bits per character"]
    rows = []
    for name, found in r["bounds"].items():
        size = r["models"].get(name)
        exact = found["draws"] == 1
        how = "exact" if exact else f"blocks of {found['block_size']}"
        bound = f"{found['nelbo']:.3f}" if exact else f"{found['nelbo']:.3f} ± {2 * found['nelbo_se_draws']:.3f}"
        label = name if "," in name else f"{name}, {how}"
        rows.append([label, f"{size['weights_bytes'] / 1e6:.2f}" if size else "", bound, f"{found['bpc']:.3f}"])
    j = r["judged"]
    names = {"samples": f"samples of `books`, `{j['sampler']}`", "text": "validation text"}
    keys = ("ppl", "entropy", "distinct_2", "distinct_4")
    judged = [[names[key], *(f"{j[key][k]:.{1 if k == 'ppl' else 2}f}" for k in keys)] for key in names]
    said = [f"perplexity by `{j['judge']}`", "entropy of tokens, nats", "distinct-2", "distinct-4"]
    return "\n\n".join(
        [
            table(header, rows),
            f"Bounds are of the first {r['bounds']['books']['sequences']} sequences of the validation text, whose "
            "books are not those of training; ± is two standard errors of the draws.",
            table([f"{j['num']} texts of {j['length']} tokens", *said], judged),
            f"{100 * r['words_known']:.1f} % of the {r['words']} words in the ten continuations stand twice or more in "
            f"the training text, which has {r['vocabulary']:,} such words; of as many words of the validation text "
            f"{100 * r['real_words_known']:.1f} % do.",
            where([r]),
        ]
    )


def shipped_tried() -> str:
    """The runs on the way to them, in the order in which they ran."""
    rows = read("shipped_tried.jsonl")
    if not rows:
        return MISSING

    def blocks(r: dict[str, Any]) -> str:
        return ", ".join(str(size) if size else "whole" for size in r["blocks"]) or "left to right"

    def at(r: dict[str, Any], share: float) -> str:
        step, nelbo, _ = next(point for point in r["curve"] if point[0] >= share * r["curve"][-1][0])
        return f"{nelbo:.3f} ({step:,})"

    body = [
        [
            r["date"],
            blocks(r),
            "yes" if r["adapted"] else "no",
            f"{r['learning_rate']:g}",
            f"{r['steps']:,}" + f" of {r['planned_steps']:,}" * (r["steps"] < r["planned_steps"]),
            f"{4096 / r['tokens_per_second']:.2f}",
            *(at(r, share) for share in (0.1, 0.5, 1.0)),
        ]
        for r in rows
    ]
    header = ["date", "blocks", "from `books-ar`", "learning rate", "steps", "seconds a step"]
    header += ["nats a token, early (step)", "halfway", "at the end"]
    return f"{table(header, body, left=3)}\n\n{where(rows)}"


def shipped_texts() -> str:
    """Ten continuations, as they came."""
    r = shipped_row()
    if r is None:
        return MISSING
    quoted = [f"seed {t['seed']}: {t['prompt']}▸{t['text'][len(t['prompt']) :]}".strip() for t in r["prompts"]]
    filled = [f"{t['template']}\n{t['text']}" for t in r["infill"]]
    blocks = "\n\n".join([*quoted, "Blanks filled with both sides in view, seed 0:", *filled]).replace("```", "` ` `")
    return f"```text\n{blocks}\n```\n\n{where([r])}"


def shipped_time() -> str:
    """How soon the first word stands."""
    r = shipped_row()
    if r is None:
        return MISSING
    spans = (f"`{name}` {least:.1f} to {most:.1f} s" for name, (least, most) in r["first_word_seconds"].items())
    return f"From enter to the first new word, in a new process, compiling included: {', '.join(spans)}. {where([r])}"


# What a name of `objectives.OBJECTIVES` is called in the text.
OBJECTIVE_LABELS = {
    "autoregressive": "next token",
    "mdlm": "MDLM",
    "sedd_absorb": "SEDD absorb",
    "sedd_uniform": "SEDD uniform",
    "udlm": "UDLM",
    "duo": "Duo",
    "flm": "FLM",
}


def objective_rows() -> list[dict[str, Any]]:
    """The rows of every card and CPU, the judge's first."""
    rows = [row for path in sorted(RESULTS.glob("objectives*.jsonl")) for row in read(path.name)]
    order = list(OBJECTIVE_LABELS)
    return sorted(rows, key=lambda r: (r["backbone"], order.index(r["objective"]), r["seed"]))


def objectives() -> str:
    """Bounds and samples of the same backbone, data and steps under each objective: a table for each device."""
    rows = objective_rows()
    if not rows:
        return MISSING
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["device"], r["num"]), []).append(r)
    parts = []
    for (_, num), rows in groups.items():
        parts += [f"{num} texts for each number of steps. {where(rows)}", objective_table(rows)]
    return "\n\n".join([*parts, image("objectives", "samples of each objective over network passes")])


def objective_table(rows: list[dict[str, Any]]) -> str:
    body = []
    for r in rows:
        bound = f"{r['nelbo']:.3f}" if "nelbo" in r else "none"
        bound += f" ± {r['nelbo_se_draws']:.3f}" if r.get("nelbo_se_draws") else ""
        first = [LABELS[r["backbone"]], OBJECTIVE_LABELS[r["objective"]], r["seed"], bound]
        for sample in r["samples"]:
            body.append(
                [
                    *first,
                    f"`{sample['sampler']}`",
                    f"{sample['passes']:.0f}",
                    f"{sample['ppl']:.1f} ± {sample['ppl_se']:.1f}",
                    f"{sample['entropy']:.3f}",
                    f"{sample['distinct_2']:.3f}",
                ]
            )
            first = [""] * len(first)
    for text in (r["text"] for r in rows if "text" in r):
        numbers = [f"{text['ppl']:.1f} ± {text['ppl_se']:.1f}", f"{text['entropy']:.3f}", f"{text['distinct_2']:.3f}"]
        body.append(["validation text", "", "", "", "", "", *numbers])
    header = ["model", "objective", "seed", "bound, nats/char", "sampler", "passes", "judge's perplexity", "entropy"]
    return table([*header, "distinct-2"], body, left=2)


def text_label(name: str) -> str:
    """A data set's name, or a path's without what says where it lies and how it is stored."""
    return name.rpartition("/")[2].partition(".")[0]


def zero_shot() -> str:
    """Texts and choices that a model was not trained on: a row each, a column for each backbone."""
    runs = read("zero_shot.jsonl")
    if not runs:
        return MISSING
    heads = [LABELS[run["name"]] for run in runs]
    own = ["validation split of the training text", *(f"{run['bpc']:.3f}" for run in runs)]
    body = []
    for name in runs[0]["texts"]:
        scores = [run["texts"].get(name) for run in runs]
        body.append([text_label(name), *(f"{score['bpc']:.3f}" if score else "" for score in scores)])
    parts = [f"Bits per character, {bounds(runs)}. {where(runs)}", table(["text", *heads], [own, *body])]
    asked = []
    for name in runs[0].get("choices", {}):
        scores = [run.get("choices", {}).get(name) for run in runs]
        known = next(score for score in scores if score)
        cells = (f"{100 * s['acc']:.1f} ± {100 * s['acc_se']:.1f}" if s else "" for s in scores)
        chance = f"{100 * known['chance']:.1f}" if "chance" in known else "last word"
        asked.append([text_label(name), chance, known["questions"], *cells])
    if asked:
        parts += ["Right answers, %, ± a standard error:", table(["choices", "chance", "questions", *heads], asked)]
    return "\n\n".join(parts)


def bounds(runs: list[dict[str, Any]]) -> str:
    """How the numbers of `zero_shot` were made."""
    scores = [score for run in runs for score in run["texts"].values()]
    error = max((score["nelbo_se_draws"] or 0) / score["nelbo"] for score in scores)  # None: exact
    draws = max(score["draws"] for score in scores)
    return f"of diffusion models a bound of {draws} draws, whose error is at most {100 * error:.1f} %"


REGULAR_LENGTH = 64  # of training
REGULAR_PASSES = (1, 4, 16, 32, 64)
ORDER_LABELS = {"ancestral": "uniform", "confidence": "confidence", "left_to_right": "left to right"}


def regular_oracle() -> str:
    """The share of words among whole samples of the exact posterior, by order and passes: one row for both lengths."""
    rows = [row for row in read("regular_languages.jsonl") if row["backbone"] == "oracle"]
    if not rows:
        return MISSING
    body = []
    for r in rows:
        entropy = r["entropy"][str(REGULAR_LENGTH)] / REGULAR_LENGTH
        first = [r["language"], f"{entropy:.3f}"]
        for order, label in ORDER_LABELS.items():
            shares = {s["steps"]: s["valid"] for s in r["samples"] if of_order(s, order)}
            body.append([*first, label, *(f"{shares[passes]:.2f}" for passes in REGULAR_PASSES)])
            first = ["", ""]
    header = ["language", "entropy, nats/symbol", "order"]
    header += ["1 pass", *(f"{passes} passes" for passes in REGULAR_PASSES[1:])]
    one = [s["valid"] for r in rows for s in r["samples"] if s["order"] == "first_hitting"]
    num = next(s["num"] for s in rows[0]["samples"] if s["length"] == REGULAR_LENGTH)
    note = (
        f"The share of words among {num} samples of {REGULAR_LENGTH} symbols. With one symbol in each pass, at its own "
        f"time (`first_hitting`), it is at least {min(one):.2f} for every language and length. {where(rows)}"
    )
    plot = image("regular_languages", "share of words among samples over network passes, for each language")
    return f"{table(header, body)}\n\n{note}\n\n{over_lengths(rows)}\n\n{plot}"


def over_lengths(rows: list[dict[str, Any]]) -> str:
    """Uniform order: the share of words where passes grow with the length."""
    lengths = sorted({s["length"] for r in rows for s in r["samples"]})
    parts = ((4, "length/4 passes"), (1, "as many passes as symbols"))

    def cell(row: dict[str, Any], length: int, passes: int) -> str:
        samples = [s for s in row["samples"] if of_order(s, "ancestral", length) and s["steps"] == passes]
        return short_mean([s["valid"] for s in samples])

    body = [
        [r["language"], *(cell(r, length, length // part) for part, _ in parts for length in lengths)] for r in rows
    ]
    header = ["uniform order, length", *(f"{length}, {label}" for _, label in parts for length in lengths)]
    return table(header, body)


def of_order(sample: dict[str, Any], order: str, length: int = REGULAR_LENGTH) -> bool:
    return (sample["order"], sample["length"]) == (order, length)


def regular_networks() -> str:
    """What trained networks make of the same languages: how often each ran, then what came of it, over seeds."""
    rows = [row for row in read("regular_languages.jsonl") if row["backbone"] != "oracle"]
    exact = {row["language"]: row for row in read("regular_languages.jsonl") if row["backbone"] == "oracle"}
    if not rows:
        return MISSING
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in sorted(rows, key=lambda r: list(LABELS).index(r["backbone"])):
        groups.setdefault((r["language"], r["backbone"]), []).append(r)
    recipes = {(r["steps"], r["label_steps"], r["symbols"]) for r in rows}
    if len(recipes) > 1:
        raise ValueError(f"regular_languages.jsonl has networks of several recipes: {sorted(recipes)}")
    (steps, label_steps, symbols), *_ = recipes
    languages = list(dict.fromkeys([*(r["language"] for r in rows), *exact]))
    backbones = [name for name in LABELS if any(name == backbone for _, backbone in groups)]
    ran = [[name, *(len(groups.get((name, b), ())) or "–" for b in backbones)] for name in languages]
    parts = [table(["seeds that ran", *(LABELS[b] for b in backbones)], ran)]
    for columns in (REGULAR_LAW, REGULAR_SAMPLES):
        body = []
        for name in languages:
            own = [(LABELS[b], runs) for (language, b), runs in groups.items() if language == name]
            if columns is REGULAR_SAMPLES and own and name in exact:
                own = [("*the exact posterior*", [exact[name]]), *own]
            body += [
                [name if i == 0 else "", label, *(regular_cell(runs, *column) for column in columns.values())]
                for i, (label, runs) in enumerate(own)
            ]
        parts.append(table(["language", "model", *columns], body, left=2))
    parts.append(
        f"{steps:,} steps of {symbols:,} symbols, and {label_steps:,} for the labels; "
        f"{least_and_most([x['parameters'] for x in rows])} parameters, with the ids that no language has. The mean "
        f"over seeds, and their range; – where nothing was measured. Samples of the exact posterior: "
        f"{rows_num(list(exact.values()))}; of a network: {rows_num(rows)} for each seed. {where(rows)}"
    )
    parts.append(image("regular_gaps", "distance from the law over the length of words, for each language"))
    return "\n\n".join(parts)


# {column: (part of a row, what is measured, which of its entries)}
REGULAR_LAW: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gap at 64": ("likelihood", "gap", {"length": 64}),
    "at 128": ("likelihood", "gap", {"length": 128}),
    "at 512": ("likelihood", "gap", {"length": 512}),
    "hole of 1": ("infilling", "accuracy", {"length": 64, "hole": 1}),
    "of 16": ("infilling", "accuracy", {"length": 64, "hole": 16}),
    "of 1 in 512": ("infilling", "accuracy", {"length": 512, "hole": 1}),
    "labels at 64": ("labelling", "accuracy", {"length": 64}),
    "last at 64": ("labelling", "last", {"length": 64}),
    "all at 512": ("labelling", "accuracy", {"length": 512}),
}
ONE_BY_ONE = ("first_hitting", "autoregressive")
REGULAR_SAMPLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "4 passes": ("samples", "valid", {"length": 64, "order": ("ancestral",), "steps": 4}),
    "16": ("samples", "valid", {"length": 64, "order": ("ancestral",), "steps": 16}),
    "64": ("samples", "valid", {"length": 64, "order": ("ancestral",), "steps": 64}),
    "by confidence, 64": ("samples", "valid", {"length": 64, "order": ("confidence",), "steps": 64}),
    "left to right, 64": ("samples", "valid", {"length": 64, "order": ("left_to_right",), "steps": 64}),
    "one by one, 64": ("samples", "valid", {"length": 64, "order": ONE_BY_ONE}),
    "one by one, 128": ("samples", "valid", {"length": 128, "order": ONE_BY_ONE}),
}


def regular_cell(runs: list[dict[str, Any]], part: str, key: str, which: dict[str, Any]) -> str:
    """The mean and range of what the runs have there, – of nothing."""

    def fits(entry: dict[str, Any]) -> bool:
        return all(entry[k] in v if isinstance(v, tuple) else entry[k] == v for k, v in which.items())

    found = [x[key] for run in runs for x in run.get(part, ()) if fits(x)]
    lost = found.count(None)  # numbers beyond float32
    told = short_mean([x for x in found if x is not None])
    return f"{told}, {lost} overflow" if 0 < lost < len(found) else "overflow" if lost else told


def rows_num(rows: list[dict[str, Any]]) -> str:
    """How many samples of the training length."""
    return least_and_most([s["num"] for r in rows for s in r["samples"] if s["length"] == REGULAR_LENGTH])


def short_mean(values: list[float]) -> str:
    """`mean (lowest to highest)`, the value alone where two digits tell no difference, – of nothing."""
    if not values:
        return "–"
    alike = f"{min(values):.2f}" == f"{max(values):.2f}"
    return mean(values[:1] if alike else values, 2)


def least_and_most(values: list[int]) -> str:
    return " to ".join(f"{value:,}" for value in sorted({min(values), max(values)}))


def profiles() -> list[Path]:
    """The files that `python -m diffrwkv.profile` wrote."""
    return sorted(RESULTS.glob("profile_*.jsonl"))


def speed() -> str:
    """Passes and ways of decoding, as diffrwkv.profile reports them."""
    files = profiles()
    if not files:
        return MISSING
    plot = image("profile", "time of a pass, and tokens per second of each way of decoding, over length")
    return f"{profile.report(profile.read(*files))}\n{plot}"


def image(name: str, alt: str) -> str:
    """The plot `docs/NAME.svg`; `render` mends the path for pages that lie in docs/ themselves."""
    return f"![{alt}](docs/{name}.svg)"


BLOCKS: dict[str, Callable[[], str]] = {
    "adaptation": adaptation,
    "blocks": blocks,
    "compile_a100": compile_a100,
    "compile_gpu": compile_gpu,
    "compile_t4": compile_t4,
    "compile_tpu": compile_tpu,
    "front": front,
    "gpu_aims": gpu_aims,
    "gpu_correct": gpu_correct,
    "gpu_front": gpu_front,
    "gpu_training": gpu_training,
    "head": head,
    "length": length,
    "objectives": objectives,
    "peer": peer,
    "presets": presets,
    "quickstart": quickstart,
    "regular_networks": regular_networks,
    "regular_oracle": regular_oracle,
    "samplers": samplers,
    "samplers_in_blocks": samplers_in_blocks,
    "speed": speed,
    "shipped": shipped,
    "shipped_texts": shipped_texts,
    "shipped_time": shipped_time,
    "shipped_tried": shipped_tried,
    "stream": stream,
    "train_step": train_step,
    "wkv7": wkv7,
    "zero_shot": zero_shot,
}


# --- Plots ------------------------------------------------------------------------------------------------------------


LEGEND = {"frameon": False, "fontsize": 8}


def by_device(cpu: list[dict[str, Any]], others: str) -> dict[str, list[dict[str, Any]]]:
    """{device: the rows that have a time}, the CPU's first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in cpu + on_accelerators(others):
        if field(row, "milliseconds"):
            groups.setdefault(row["device"], []).append(row)
    return groups


def length_axis(axes: Any, lengths: Iterable[int]) -> None:
    """A logarithmic axis whose ticks are lengths that were measured, not all of them where they are many."""
    ticks = sorted(set(lengths))
    ticks = ticks[:: -(-len(ticks) // 6)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.xaxis.set_tick_params(which="minor", bottom=False)
    plain_numbers(axes)


def plain_numbers(axes: Any) -> None:
    """A logarithmic upright axis whose ticks are numbers as one writes them: 1, 2, 5, 10."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def plot_length(figure: Any) -> None:
    """A panel for each device; a denoiser has its colour in all of them."""
    groups = {device: [*filter(as_in_a_model, rows)] for device, rows in by_device(cpu_passes(), "denoiser").items()}
    names = list(dict.fromkeys(field(r, "name") for rows in groups.values() for r in rows))
    lines = {}
    for axes, (device, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for i, name in enumerate(names):
            points = sorted((field(r, "length"), field(r, "milliseconds")) for r in rows if field(r, "name") == name)
            if points:
                (lines[name],) = axes.plot(*zip(*points, strict=True), "o-", color=f"C{i}", ms=4)
        title = device if len(groups) > 1 else ""
        axes.set(xlabel="length", ylabel="ms for one sequence", title=title)
        length_axis(axes, (field(r, "length") for r in rows))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, **LEGEND)


def plot_wkv7(figure: Any) -> None:
    """Nanoseconds per token and head over the length, one side; flat is linear."""
    groups = by_device(read("wkv7_cpu.jsonl"), "wkv7")
    curves = {d: rows for d, rows in groups.items() if len({r["T"] for r in rows if r.get("sides", 1) == 1}) > 1}
    groups = curves or groups  # one length is no curve: the table has it
    figure.set_size_inches(8, 3.2 * len(groups))
    panels = figure.subplots(len(groups), 2, sharey="row", squeeze=False)
    for (device, rows), pair in zip(groups.items(), panels, strict=True):
        rows = [r for r in rows if r.get("sides", 1) == 1]
        longest = max(rows, key=lambda r: r["T"])
        rows = [r for r in rows if all(r.get(key) == longest.get(key) for key in ("H", "K", "dtype", "kind"))]
        names = list(dict.fromkeys(r["implementation"] for r in rows))
        for axes, direction in zip(pair, ("forward", "forward+backward"), strict=True):
            for i, name in enumerate(names):
                points = {
                    r["T"]: 1e6 * field(r, "milliseconds") / (r["B"] * r["T"] * r["H"])
                    for r in sorted(rows, key=lambda r: r["B"])
                    if (r["implementation"], field(r, "direction")) == (name, direction)
                }
                if points:
                    axes.plot(sorted(points), [points[t] for t in sorted(points)], "o-", color=f"C{i}", label=name)
            axes.set(xlabel="tokens", title=f"{direction}, H {longest['H']}, K {longest['K']}")
            axes.set_visible(axes.has_data())
            if axes.has_data():
                length_axis(axes, (r["T"] for r in rows if field(r, "direction") == direction))
        first = next(axes for axes in pair if axes.get_visible())
        first.set(ylabel=f"{device}\nns per token and head")
        first.legend(**LEGEND)


def plot_peer(figure: Any) -> None:
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    shown = ("birwkv", "dit", "bimamba", "ar_transformer", "ar_rwkv")  # the table has all
    for name, runs in peer_groups().items():
        if name not in shown:
            continue
        i = list(LABELS).index(name)
        for j, run in enumerate(runs):
            style = {"color": f"C{i}", "lw": 0.9, "marker": ".", "ms": 3, "ls": "--" if name in AUTOREGRESSIVE else "-"}
            steps, nelbo = zip(*run["curve"], strict=True)
            over_steps.plot(steps, nelbo, label=None if j else LABELS[name], **style)
            seconds = dict(map(tuple, run.get("cpu_seconds", [])))
            if seconds:
                over_seconds.plot([seconds[step] for step in steps], nelbo, **style)
    for other in read("mdlm_reference.json"):
        for j, run in enumerate(other["runs"]):
            seconds = other["steps"] * other["cpu_seconds_per_step"]
            label = None if j else f"{other['name']}, at its end"
            over_steps.plot(other["steps"], run["nelbo"], "kx", ms=5, label=label)
            over_seconds.plot(seconds, run["nelbo"], "kx", ms=5)
    over_steps.set(xlabel="step", ylabel="validation NELBO, nats per character")
    over_seconds.set(xlabel="CPU seconds of the steps")
    figure.legend(*over_steps.get_legend_handles_labels(), loc="outside right center", **LEGEND)


def plot_adaptation(figure: Any) -> None:
    """The mean over seeds, and each of them as a point."""
    axes = figure.subplots()
    groups = on_one_device(adaptation_groups())
    for i, (name, runs) in enumerate((name, groups[name]) for name in ADAPTATION_SHOWN if name in groups):
        curves = [dict(map(tuple, run["curve"])) for run in runs]
        spent = [dict(map(tuple, run["cpu_seconds"])) for run in runs]
        steps = sorted(set.intersection(*map(set, curves)))
        mean_of = [statistics.mean(values[step] for values in curves) for step in steps]
        seconds = [statistics.mean(values[step] for values in spent) for step in steps]
        style = {"color": f"C{i}", "lw": 1.2, "ls": "--" if name == "scratch" else "-"}
        axes.plot(seconds, mean_of, label=ADAPTATION_LABELS[name], **style)
        for values, each in zip(curves, spent, strict=True):
            axes.plot([each[step] for step in steps], [values[step] for step in steps], ".", color=f"C{i}", ms=3)
    axes.set(xlabel="CPU seconds of the steps", ylabel="validation NELBO in blocks of 16, nats per character")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", **LEGEND)


def plot_objectives(figure: Any) -> None:
    """Perplexity and entropy of samples over passes, a row for each backbone; real text is the dashed line."""
    rows = [r for r in objective_rows() if r["objective"] != "autoregressive"]
    texts = [r["text"] for r in objective_rows() if "text" in r]
    backbones = sorted({r["backbone"] for r in rows}, reverse=True)
    panels = figure.subplots(len(backbones), 2, sharex=True, sharey="col", squeeze=False)
    named: dict[str, Any] = {}
    for backbone, pair in zip(backbones, panels, strict=True):
        for axes, key in zip(pair, ("ppl", "entropy"), strict=True):
            axes.set_xscale("log", base=2)
            for text in texts:
                named["validation text"] = axes.axhline(text[key], color="k", ls="--", lw=0.9)
            for r in (r for r in rows if r["backbone"] == backbone):
                points = sorted((sample["passes"], sample[key]) for sample in r["samples"])
                color = f"C{list(OBJECTIVE_LABELS).index(r['objective'])}"
                [line] = axes.plot(*zip(*points, strict=True), marker=".", color=color)
                named.setdefault(OBJECTIVE_LABELS[r["objective"]], line)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set(title=LABELS.get(backbone, backbone), ylabel="judge's perplexity" if key == "ppl" else "entropy")
    for axes in panels[-1]:
        axes.set(xlabel="network passes")
    figure.legend(named.values(), named.keys(), loc="outside right center", **LEGEND)


def plot_regular(figure: Any) -> None:
    """Share of words over passes, a panel for each language: the oracle in two orders, networks in a uniform one.

    A network's curve is the mean over seeds, in their range.
    """
    shown = ("oracle", "birwkv", "birwkv_a2", "dit", "bimamba")
    rows = [row for row in read("regular_languages.jsonl") if row["backbone"] in shown]
    languages = list(dict.fromkeys(row["language"] for row in rows))
    panels = figure.subplots(-(-len(languages) // 4), 4, sharex=True, sharey=True, squeeze=False).flat
    curves: dict[tuple[str, str], dict[int, list[float]]] = {}
    names: dict[str, Any] = {}
    for row in rows:
        exact = row["backbone"] == "oracle"
        for sample in row["samples"]:
            if sample["length"] != REGULAR_LENGTH:
                continue
            if sample["order"] not in (("ancestral", "left_to_right") if exact else ("ancestral",)):
                continue
            name = f"oracle, {ORDER_LABELS[sample['order']]}" if exact else LABELS[row["backbone"]]
            curves.setdefault((row["language"], name), {}).setdefault(sample["steps"], []).append(sample["valid"])
    for language, axes in zip(languages, panels, strict=False):
        for (where_from, name), points in curves.items():
            if where_from != language:
                continue
            oracle = name.startswith("oracle")
            color = "k" if oracle else f"C{list(LABELS.values()).index(name.removesuffix(', a_scale 2'))}"
            line = {"oracle, left to right": "--", LABELS["birwkv_a2"]: "--"}.get(name, "-")
            style = {"color": color, "ls": line, "marker": "" if oracle else ".", "lw": 1.2 if oracle else 0.9}
            passes = sorted(points)
            means = [statistics.mean(points[k]) for k in passes]
            names.setdefault(name, axes.plot(passes, means, **style)[0])
            if not oracle:
                least, most = ([f(points[k]) for k in passes] for f in (min, max))
                axes.fill_between(passes, least, most, color=color, alpha=0.15, lw=0)
        axes.set(title=language, xlabel="passes")
        axes.set_xscale("log", base=2)
    for axes in panels:
        axes.set_visible(False)
    figure.axes[0].set(ylabel="share of words")
    figure.legend(names.values(), names.keys(), loc="outside right center", **LEGEND)


def plot_regular_gaps(figure: Any) -> None:
    """Nats that a network is away from the law over the length of words, a panel for each language."""
    shown = ("birwkv", "birwkv_a2", "dit", "bimamba", "ar_rwkv", "ar_transformer")
    rows = [row for row in read("regular_languages.jsonl") if row["backbone"] in shown]
    languages = list(dict.fromkeys(row["language"] for row in rows))
    panels = figure.subplots(-(-len(languages) // 4), 4, sharex=True, sharey=True, squeeze=False).flat
    for language, axes in zip(languages, panels, strict=False):
        for name in shown:
            points: dict[int, list[float]] = {}
            for row in rows:
                if (row["language"], row["backbone"]) == (language, name):
                    for entry in row["likelihood"]:
                        if entry["gap"] is not None:
                            points.setdefault(entry["length"], []).append(max(entry["gap"], 1e-3))
            color = f"C{list(LABELS).index(name.removesuffix('_a2'))}"
            line = "--" if name == "birwkv_a2" else ":" if name.startswith("ar_") else "-"
            style = {"color": color, "ls": line, "marker": ".", "lw": 1.0, "label": LABELS[name]}
            lengths = sorted(points)
            axes.plot(lengths, [statistics.mean(points[k]) for k in lengths], **style)
            least, most = ([f(points[k]) for k in lengths] for f in (min, max))
            axes.fill_between(lengths, least, most, color=color, alpha=0.15, lw=0)
        axes.set(title=language, xlabel="symbols in a word", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks([64, 128, 256, 512], ["64", "128", "256", "512"])
    for axes in panels:
        axes.set_visible(False)
    figure.axes[0].set(ylabel="gap, nats a word")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", **LEGEND)


def plot_samplers(figure: Any) -> None:
    shown = ("ancestral", "autoregressive", "confidence (temperature 1.0)", "first_hitting", "remdm (strategy cap)")
    draw_samplers(figure, sampler_rows(), curve_label, (*shown, "prophet (temperature 1.0)"))


def plot_samplers_in_blocks(figure: Any) -> None:
    def label(row: dict[str, Any]) -> str:
        return f"{sampler_model(row)} {curve_label(row)}" if "passes" in row else curve_label(row)

    text = [row for row in sampler_rows() if "passes" not in row]
    ways = ("ancestral (block_size 4)", "ancestral (block_size 16)", "ancestral (block_size 0)", "first_hitting")
    ways = (*ways, "pipelined (block_size 16, temperature 1.0)", "ancestral (frozen_cache dual, block_size 32)")
    draw_samplers(figure, text + sampler_rows(in_blocks=True), label, ways)


def draw_samplers(
    figure: Any, rows: list[dict[str, Any]], label_of: Callable[[dict[str, Any]], str], shown: tuple[str, ...]
) -> None:
    """Perplexity above, entropy below; real text is the dashed line. The tables have what is not `shown`.

    All are shown where hardly one of `shown` was measured.
    """
    chosen = [row for row in rows if "passes" not in row or curve_label(row) in shown]
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in chosen if len({label_of(row) for row in chosen}) > 3 else rows:
        curves.setdefault(label_of(row), []).append(row)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for pair, key in zip(panels, ("ppl", "entropy"), strict=True):
        for axes, cost in zip(pair, ("passes", "cpu_seconds"), strict=True):
            axes.set_xscale("log", base=2 if cost == "passes" else 10)
            axes.xaxis.set_major_formatter("{x:g}")
            for i, (label, points) in enumerate(curves.items()):
                if cost not in points[0]:
                    axes.axhline(points[0][key], color="k", ls="--", lw=0.9, label=label)
                    continue
                points = sorted(points, key=lambda row: row[cost])
                values = ([row[name] for row in points] for name in (cost, key, f"{key}_se"))
                axes.errorbar(*values, label=label, color=f"C{i % 10}", marker="os^vDP*X<>"[i % 9], ms=4, lw=0.9)
    panels[0, 0].set(ylabel="judge's perplexity")
    plain_numbers(panels[0, 0])
    panels[1, 0].set(ylabel="entropy of a sample, nats", xlabel="passes")
    panels[1, 1].set(xlabel="CPU seconds per sample")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", **LEGEND)


# {plot: (what draws it on a figure, its size in inches, its result files as patterns)}
PLOTS: dict[str, tuple[Any, tuple[float, ...], tuple[str, ...]]] = {
    "adaptation": (plot_adaptation, (9, 3.8), ("adaptation.jsonl",)),
    "length": (plot_length, (9, 4.2), ("denoiser_cpu.jsonl", "torch_cpu.jsonl", "denoiser_[gt]pu*.jsonl")),
    "peer": (plot_peer, (9, 3.8), ("peer_shakespeare.jsonl", "mdlm_reference.json")),
    "objectives": (plot_objectives, (10, 5.5), ("objectives*.jsonl",)),
    "profile": (None, (), ("profile_*.jsonl",)),  # drawn by diffrwkv.profile
    "regular_languages": (plot_regular, (10, 4.6), ("regular_languages.jsonl",)),
    "regular_gaps": (plot_regular_gaps, (10, 4.6), ("regular_languages.jsonl",)),
    "samplers": (plot_samplers, (10, 5.5), ("samplers.jsonl",)),
    "samplers_in_blocks": (plot_samplers_in_blocks, (11, 5.5), ("samplers.jsonl",)),
    "wkv7": (plot_wkv7, (8, 3.2), ("wkv7_cpu.jsonl", "wkv7_[gt]pu*.jsonl")),
}


def digest(files: tuple[str, ...]) -> str | None:
    """Hash of the result files of a plot; None while the first of them is missing."""
    if not any(RESULTS.glob(files[0])):
        return None
    content = b"".join(path.read_bytes() for pattern in files for path in sorted(RESULTS.glob(pattern)))
    return hashlib.sha256(content).hexdigest()[:16]


def stale_plots() -> dict[str, str]:
    """{plot: digest} of those that do not carry the hash of today's results."""
    out = {}
    for name, (_, _, files) in PLOTS.items():
        now, path = digest(files), ROOT / "docs" / f"{name}.svg"
        if now and not (path.is_file() and f"results {now}" in path.read_text()):
            out[name] = now
    return out


def draw(name: str, results: str) -> None:
    """Writes docs/NAME.svg, with the hash of the results that it shows."""
    plot, size, _ = PLOTS[name]
    if plot is None:
        svg = profile.chart(profile.read(*profiles()))
        note = f"<desc>python -m benchmarks.report, results {results}</desc>\n</svg>"
        (ROOT / "docs" / f"{name}.svg").write_text(svg.removesuffix("</svg>") + note)
        return
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=size, layout="constrained")
    plot(figure)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.patch.set_facecolor("white")
    metadata = {"Date": None, "Description": f"python -m benchmarks.report, results {results}"}
    figure.savefig(ROOT / "docs" / f"{name}.svg", metadata=metadata)
    plt.close(figure)


# --- Pages ------------------------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    cards = (ROOT / "src" / "diffrwkv" / "models").glob("*/README.md")
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(cards)]


def render(page: Path) -> str:
    """The page's text with its blocks written anew. Raises ValueError for an unknown or unfinished block."""
    text = page.read_text()
    if len(re.findall("<!-- begin:", text)) != len(re.findall("<!-- end:", text)):
        raise ValueError(f"{page.name}: a marked block has no begin or no end.")

    def block(match: re.Match) -> str:
        if match[1] not in BLOCKS:
            raise ValueError(f"{page.name} has a block {match[1]!r}; there are {', '.join(sorted(BLOCKS))}.")
        body = BLOCKS[match[1]]()
        if page.parent.name == "docs":
            body = body.replace("](docs/", "](")
        return f"<!-- begin:{match[1]} -->\n{body}\n<!-- end:{match[1]} -->"

    return re.sub(r"<!-- begin:(\w+) -->.*?<!-- end:\1 -->", block, text, flags=re.DOTALL)


def stale() -> list[str]:
    """Pages and plots that differ from what the result files say."""
    texts = [str(p.relative_to(ROOT)) for p in pages() if render(p) != p.read_text()]
    return texts + [f"docs/{name}.svg" for name in stale_plots()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is not up to date")
    parser.add_argument("--show", nargs="+", metavar=("FOLDER", "BLOCK"), help="print blocks from a folder's results")
    args = parser.parse_args(arguments)
    if args.show:
        global RESULTS
        RESULTS = Path(args.show[0])
        print("\n\n".join(BLOCKS[name]() for name in args.show[1:]))
        return 0
    if args.check:
        old = stale()
        print("not up to date: " + ", ".join(old) if old else "every number is that of its result file")
        return bool(old)
    for page in pages():
        page.write_text(render(page))
    for name, results in stale_plots().items():
        draw(name, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
