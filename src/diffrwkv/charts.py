"""Line charts as SVG, and pages that hold one, without anything from elsewhere and without a plotting package.

A chart is text: it stands in a page, or alone in a file. Pointing at a dot shows its numbers.
"""

import dataclasses
import html
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffrwkv.config import UserError, at_home

# Okabe and Ito's colours, told apart by colour-blind readers too; then the same dashed, then dotted.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a6a00", "#333333")
DASHES = ("", "6 3", "2 3")

WIDTH, HEIGHT = 360, 260  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 26, 44  # around what it plots
LINE = 18  # of the legend
LETTER = 6.6  # a legend's letter is about so wide


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a panel.

    Attributes:
      label: lines of one label have one colour, and one entry in the legend.
      points: (x, y); those that an axis cannot show are left out: not finite, or not above 0 on a logarithmic one.
      dots: whether each point is marked, and named when pointed at.
      line: whether the points are joined.
    """

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = True
    line: bool = True


@dataclasses.dataclass(frozen=True)
class Panel:
    """What stands in one frame: the lines, and how their axes are scaled ("log2", "log10" or "linear")."""

    x: str
    y: str
    series: Sequence[Series]
    title: str = ""
    x_scale: str = "linear"
    y_scale: str = "linear"


def number(value: float) -> str:
    """A number for a reader: 1,024, 12,345, 3.142, 0.0125, 3.2e-07."""
    if isinstance(value, int) or (1e3 <= abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}"


class _Axis:
    """Where values lie between two ends of a panel, and its ticks."""

    def __init__(self, values: Iterable[float], scale: str, start: float, stop: float):
        if scale not in ("linear", "log2", "log10"):
            raise ValueError(f"an axis is linear, log2 or log10, got {scale!r}.")
        self.log, self.start, self.stop = scale != "linear", start, stop
        found = [v for v in values if self.shows(v)] or [1.0]
        self.low, self.high = min(found), max(found)
        if self.log:
            if self.high < self.low * (1 + 1e-6):  # all alike
                self.low, self.high = self.low / 2, self.high * 2
            self.ticks = self._powers(2 if scale == "log2" else 10)
        else:
            most = max(abs(self.low), abs(self.high))
            if self.high - self.low <= 1e-6 * most:  # all alike
                self.low, self.high = self.low - (most / 10 or 1.0), self.high + (most / 10 or 1.0)
            self.ticks = self._steps()
        self.low, self.high = min(self.low, self.ticks[0]), max(self.high, self.ticks[-1])

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def at(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def _steps(self) -> list[float]:
        """About five multiples of 1, 2 or 5 times a power of ten, the outer two beyond the values."""
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
        first, last = math.floor(self.low / step + 1e-9), math.ceil(self.high / step - 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _powers(self, base: int) -> list[float]:
        """Powers of the base, every second or third where there are many; below two decades 2 and 5 times them too."""
        low = math.floor(math.log(self.low, base) + 1e-9)
        high = math.ceil(math.log(self.high, base) - 1e-9)
        if base == 10 and high - low < 3:
            ticks = [m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5)]
            first = max([t for t in ticks if t <= self.low * (1 + 1e-9)], default=ticks[0])
            last = min([t for t in ticks if t >= self.high * (1 - 1e-9)], default=ticks[-1])
            return [t for t in ticks if first <= t <= last]
        every = -(-(high - low + 1) // 8)
        return [float(base) ** e for e in range(low, high + every, every)]


def svg(panels: Sequence[Panel], columns: int = 3) -> str:
    """The panels side by side, `columns` in a row, over one legend: an <svg> element."""
    labels = list(dict.fromkeys(s.label for panel in panels for s in panel.series))
    columns = max(1, min(columns, len(panels)))
    width, rows = columns * WIDTH, -(-len(panels) // columns)
    entries, places = _legend(labels, width)
    height = rows * HEIGHT + entries * LINE + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, panel in enumerate(panels):
        out.append(f'<g transform="translate({i % columns * WIDTH} {i // columns * HEIGHT})">')
        out += _panel(panel, labels)
        out.append("</g>")
    for label, (x, row) in zip(labels, places, strict=True):
        y = rows * HEIGHT + row * LINE + 10
        out.append(f'<path d="M{x} {y}h22" {_stroke(label, labels)}/>')
        out.append(f'<text x="{x + 28}" y="{y + 4}">{html.escape(label)}</text>')
    return "\n".join([*out, "</svg>"])


def _legend(labels: Sequence[str], width: int) -> tuple[int, list[tuple[float, int]]]:
    """(rows, (x, row) of each label), as many in a row as fit."""
    places: list[tuple[float, int]] = []
    x, row = 12.0, 0
    for label in labels:
        wide = 46 + LETTER * len(label)
        if x > 12 and x + wide > width:
            x, row = 12.0, row + 1
        places.append((round(x, 1), row))
        x += wide
    return row + 1, places


def _stroke(label: str, labels: Sequence[str]) -> str:
    i = labels.index(label)
    dash = DASHES[i // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.6" fill="none"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _panel(panel: Panel, labels: Sequence[str]) -> list[str]:
    points = [point for s in panel.series for point in s.points]
    x = _Axis((p[0] for p in points), panel.x_scale, LEFT, WIDTH - RIGHT)
    y = _Axis((p[1] for p in points), panel.y_scale, HEIGHT - BOTTOM, TOP)
    out = []
    for tick in x.ticks:
        at = f"{x.at(tick):.1f}"
        out.append(f'<path d="M{at} {TOP}V{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_short(tick)}</text>')
    for tick in y.ticks:
        at = f"{y.at(tick):.1f}"
        out.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{LEFT - 5}" y="{at}" dy="0.35em" text-anchor="end">{_short(tick)}</text>')
    out.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="#888" fill="none"/>')
    for s in panel.series:
        shown = [p for p in s.points if x.shows(p[0]) and y.shows(p[1])]
        placed = [(f"{x.at(a):.1f}", f"{y.at(b):.1f}") for a, b in shown]
        if s.line and placed:
            out.append(f'<path d="M{" ".join(f"{a},{b}" for a, b in placed)}" {_stroke(s.label, labels)}/>')
        if s.dots:
            colour = COLOURS[labels.index(s.label) % len(COLOURS)]
            for (cx, cy), (a, b) in zip(placed, shown, strict=True):
                told = html.escape(f"{s.label}: {panel.x} {number(a)}, {panel.y} {number(b)}")
                out.append(f'<circle cx="{cx}" cy="{cy}" r="2.4" fill="{colour}"><title>{told}</title></circle>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    if panel.title:
        told = html.escape(panel.title)
        out.append(f'<text x="{middle}" y="15" text-anchor="middle" font-weight="600">{told}</text>')
    out.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{html.escape(panel.x)}</text>')
    turned = f"translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    out.append(f'<text transform="{turned}" text-anchor="middle">{html.escape(panel.y)}</text>')
    return out


def _short(value: float) -> str:
    """A tick's number."""
    for least, size, letter in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if least <= abs(value) < 1e15:
            return f"{value / size:.4g}{letter}"
    return number(value)


# --- Pages ----------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #8885; text-align: right; white-space: nowrap; }}
th {{ cursor: pointer; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: Canvas; }}
svg {{ min-width: 46rem; max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>
// A click on a head sorts by that column, a second one the other way round.
for (const table of document.querySelectorAll("table")) {{
  table.tHead.addEventListener("click", event => {{
    const column = event.target.closest("th").cellIndex, rows = [...table.tBodies[0].rows];
    const up = table.dataset.by != column; table.dataset.by = up ? column : "";
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    rows.sort((a, b) => {{
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return (up ? 1 : -1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    }});
    table.tBodies[0].append(...rows);
  }});
}}
</script>
</body>
</html>
"""


def html_table(head: Sequence[str], rows: Sequence[Sequence[tuple[str, float | None]]]) -> str:
    """A <table> that can be sorted; a cell is (what it says, the number to sort it by or None)."""

    def cell(text: str, value: float | None) -> str:
        return (f"<td data-value={value!r}>" if value is not None else "<td>") + html.escape(text) + "</td>"

    body = "\n".join("<tr>" + "".join(cell(*each) for each in row) + "</tr>" for row in rows)
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; all but the first `left` columns are aligned right."""
    align = ["---"] * left + ["--:"] * (len(head) - left)
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in (head, *rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], align, *lines[1:]])


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page; the parts are HTML already. What is wider than the window is scrolled by itself."""
    wide = [f'<div class="wide">{part}</div>' if part.startswith(("<svg", "<table")) else part for part in parts]
    return PAGE.format(title=html.escape(title), body="\n".join(wide))


# --- Files ----------------------------------------------------------------------------------------


def output(name: str) -> Path:
    """The path that --output names, to which the endings of the files are added.

    Raises UserError where its folder is not there, or where no name stands behind the folder.
    """
    path = at_home(name, "--output=")
    if not path.parent.is_dir() or path.name in ("", "..") or name.endswith(os.sep):
        raise UserError(f"--output={name}: name files in a folder that is there, without their ending.")
    return path


def write(path: Path, text: str, mode: str = "w") -> None:
    """Writes a file of --output; "a" adds to it. Raises UserError."""
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        raise UserError(f"--output: {path} cannot be written ({e.strerror or e}).") from None
