"""Writes the numbers and plots of README.md and docs/ from the committed result files.

    python -m benchmarks.report           rewrites the marked blocks and the plots (plots need matplotlib)
    python -m benchmarks.report --check   says what is not up to date, and exits 1 if anything is

A block stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`; NAME is a key of BLOCKS. What has no result file
reads "not measured yet". Result files are JSON, or JSON lines with one measurement each, in benchmarks/results/:

    quickstart.json         {"train_seconds", "compile_seconds", "nelbo", "bpc", "parameters", "device", "commit"}
    peer_shakespeare.jsonl  {"name", "seed", "steps", "nelbo", "nelbo_se", "raw_nelbo", "parameters",
                             "curve": [[step, nelbo], ...], "device", "commit", "command"}
    denoiser_cpu.jsonl      {"name", "length", "milliseconds", "device", "commit"}, a pass of one sequence
    wkv7_cpu.jsonl          {"implementation", "direction": "forward" | "forward+backward", "B", "T", "H", "K",
                             "milliseconds", "temporary_mb", "device", "commit"}
    train_step_cpu.jsonl    {"name", "cpu_seconds", "wall_seconds", "devices", "device", "commit"}
    mdlm_reference.json     what MDLM's own code reached with the same recipe
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "*Not measured yet.*"

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
    """{"BiRWKV, gate": runs}, in the order of the file."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in read("peer_shakespeare.jsonl"):
        kind = "gate (the default)" if row["name"] == "birwkv" else row["name"].removeprefix("birwkv_")
        groups.setdefault(f"BiRWKV, {kind}", []).append(row)
    return groups


def peer() -> str:
    """Validation NELBO under the peers' recipe, every variant and MDLM."""
    header = ["denoiser", "parameters", "seeds", "EMA, step 250", "EMA, step 500", "raw, step 500"]
    rows = []
    groups = peer_groups()
    for name, runs in groups.items():
        halfway = [dict(map(tuple, r["curve"]))[250] for r in runs]
        whole = [r for r in runs if r["steps"] == 500]
        last = [mean([r[key] for r in whole]) if whole else "" for key in ("nelbo", "raw_nelbo")]
        rows.append([name, f"{runs[0]['parameters']:,}", len(runs), mean(halfway), *last])
    if not groups:
        rows.append(["BiRWKV", "", "", "not measured yet", "not measured yet", "not measured yet"])
    for other in read("mdlm_reference.json"):
        runs = other["runs"]
        last = [mean([r[key] for r in runs]) for key in ("nelbo", "raw_nelbo")]
        rows.append([other["name"], f"{other['parameters']:,}", len(runs), "", *last])
    notes = [f"\n\n{r['name']}: {r['provenance']}; standard error 0.01 a run." for r in read("mdlm_reference.json")]
    plot = "\n\n" + image("peer", "validation NELBO over training steps") if groups else ""
    table_ = table(header, rows) + "\n\nNats per character: the mean over seeds, and their range."
    return table_ + "".join(notes) + (f" {where(read('peer_shakespeare.jsonl'))}" if groups else "") + plot


def length() -> str:
    """Time of a denoiser's pass over the length of the sequence."""
    rows = read("denoiser_cpu.jsonl")
    if not rows:
        return MISSING
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
    for other in read("mdlm_reference.json"):
        cost = other["pass_cost_ratio"]
        if (cost["from"], cost["to"]) == (first, last):
            body.append([other["name"], *[""] * len(lengths), f"{cost['ratio']}×"])
    return f"{table(header, body)}\n\n{where(rows)}\n\n{image('length', 'time of a pass over length')}"


def wkv7() -> str:
    """The operator's forms: time and temporary memory."""
    rows = read("wkv7_cpu.jsonl")
    if not rows:
        return MISSING
    body = [
        [
            r["implementation"] + (f", chunk {r['chunk_size']}" if r.get("chunk_size") else ""),
            field(r, "direction"),
            " ".join(f"{k} {r[k]}" for k in "BHTK"),
            f"{field(r, 'milliseconds'):,.1f}",
            f"{field(r, 'temporary_mb'):,.1f}",
        ]
        for r in rows
    ]
    return f"{table(['form', 'pass', 'shape', 'ms', 'temporary MB'], body, left=3)}\n\n{where(rows)}"


def train_step() -> str:
    """A training step at the peers' size."""
    rows = read("train_step_cpu.jsonl")
    if not rows:
        return MISSING
    body = [[field(r, "name"), r["devices"], f"{r['cpu_seconds']:.2f}", f"{r['wall_seconds']:.2f}"] for r in rows]
    for other in read("mdlm_reference.json"):
        body.append([other["name"], "", f"{other['cpu_seconds_per_step']:.2f}", ""])
    return f"{table(['denoiser', 'devices', 'CPU s/step', 'wall s/step'], body)}\n\n{where(rows)}"


def quickstart() -> str:
    """The main job: what it costs and what it reaches."""
    rows = read("quickstart.json")
    if not rows:
        return MISSING
    r = rows[0]
    text = f"Training takes {r['train_seconds'] / 60:.1f} minutes, {r['compile_seconds']:.0f} s of it compiling"
    text += f", and reaches {r['nelbo']:.3f} nats per character" + (f" ({r['bpc']:.3f} bits)" if "bpc" in r else "")
    return f"{text}. {where(rows)}"


def image(name: str, alt: str) -> str:
    """The plot `docs/NAME.svg`; `render` mends the path for pages that lie in docs/ themselves."""
    return f"![{alt}](docs/{name}.svg)"


BLOCKS: dict[str, Callable[[], str]] = {
    "length": length,
    "peer": peer,
    "quickstart": quickstart,
    "train_step": train_step,
    "wkv7": wkv7,
}


# --- Plots ------------------------------------------------------------------------------------------------------------


def plot_length(axes: Any) -> None:
    rows = read("denoiser_cpu.jsonl")
    for name in dict.fromkeys(field(r, "name") for r in rows):
        points = sorted((field(r, "length"), field(r, "milliseconds")) for r in rows if field(r, "name") == name)
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    for other in read("mdlm_reference.json"):
        cost, base = other["pass_cost_ratio"], min(rows, key=lambda r: field(r, "length"))
        start = field(base, "milliseconds")
        label = f"{other['name']}: {cost['ratio']}×, from the first point"
        axes.plot([cost["from"], cost["to"]], [start, start * cost["ratio"]], "k:", label=label)
    axes.set(xscale="log", yscale="log", xlabel="length", ylabel="ms for one sequence")


def plot_peer(axes: Any) -> None:
    for i, (name, runs) in enumerate(peer_groups().items()):
        for j, run in enumerate(r for r in runs if r.get("curve")):
            axes.plot(*zip(*run["curve"], strict=True), color=f"C{i}", label=None if j else name, alpha=0.8)
    for other in read("mdlm_reference.json"):
        for j, run in enumerate(other["runs"]):
            axes.axhline(run["nelbo"], color="k", ls=":", label=None if j else other["name"] + ", at its last step")
    axes.set(xlabel="step", ylabel="validation NELBO, nats per character")


PLOTS = {
    "length": (plot_length, ("denoiser_cpu.jsonl", "mdlm_reference.json")),
    "peer": (plot_peer, ("peer_shakespeare.jsonl", "mdlm_reference.json")),
}


def digest(files: tuple[str, ...]) -> str | None:
    """Hash of the result files of a plot; None while the first of them is missing."""
    if not (RESULTS / files[0]).is_file():
        return None
    content = b"".join((RESULTS / f).read_bytes() for f in files if (RESULTS / f).is_file())
    return hashlib.sha256(content).hexdigest()[:16]


def stale_plots() -> dict[str, str]:
    """{plot: digest} of those that do not carry the hash of today's results."""
    out = {}
    for name, (_, files) in PLOTS.items():
        now, path = digest(files), ROOT / "docs" / f"{name}.svg"
        if now and not (path.is_file() and f"results {now}" in path.read_text()):
            out[name] = now
    return out


def draw(name: str, results: str) -> None:
    """Writes docs/NAME.svg, with the hash of the results that it shows."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    PLOTS[name][0](axes)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.patch.set_facecolor("white")
    metadata = {"Date": None, "Description": f"python -m benchmarks.report, results {results}"}
    figure.savefig(ROOT / "docs" / f"{name}.svg", metadata=metadata)
    plt.close(figure)


# --- Pages ------------------------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    if parser.parse_args(arguments).check:
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
