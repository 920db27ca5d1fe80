"""Writes the denoising of a batch to a file that can be shown: a page for a browser, or an animated GIF.

Both show the sequences after each step that changed one of them: masks dimmed, what was given in blue, what the step
revealed on yellow. The page is one file without anything from elsewhere, with a slider and a button to play. The GIF
lays the text out as it ends, so that nothing moves; it is drawn with a fixed-width font of the system, or else with the
one that Pillow brings, which is none and has Latin letters only.
"""

import contextlib
import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffrwkv.config import UserError, at_home
from diffrwkv.data import Tokenizer

COLUMNS = 48  # characters in a line of a GIF, which can be read on a telephone


def write(
    path: str | os.PathLike,
    trace: np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    tokenizer: Tokenizer,
    *,
    titles: Sequence[str] | None = None,
) -> None:
    """Writes a trace to `path`, as its ending says: one of `WRITERS`.

    Args:
      trace: int32 [N + 1, B, L], of a sampler.
      lengths: B numbers; of each sequence only so many tokens are shown.
      titles: B lines, to stand above the sequences; None: their numbers.

    Raises UserError as `check` does, and when the file cannot be written.
    """
    check(path)
    path = at_home(path)
    titles = [f"sample {i}" for i in range(trace.shape[1])] if titles is None else list(titles)
    try:
        WRITERS[path.suffix.lower()](path, trace, lengths, tokenizer, titles)
    except OSError as e:
        raise UserError(f"The trace cannot be written to {path}: {e.strerror or e}.") from None


def check(path: str | os.PathLike) -> None:
    """Raises UserError for an ending that no writer has, a folder that is not there, or a GIF without Pillow."""
    path = at_home(path)
    if path.suffix.lower() not in WRITERS:
        raise UserError(f"A trace is written to a file that ends in {' or '.join(WRITERS)}, got {str(path)!r}.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {str(path.parent)!r} to write the trace to.")
    if path.suffix.lower() == ".gif":
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise UserError("A GIF needs Pillow: pip install pillow, or write the trace to an .html file.") from None


def changing_steps(trace: np.ndarray) -> list[int]:
    """0, and the steps of a trace [N + 1, B, L] after which some sequence is another than before."""
    changed = (trace[1:] != trace[:-1]).any(axis=(1, 2))
    return [0, *(np.flatnonzero(changed) + 1).tolist()]


def pieces(ids: Sequence[int], tokenizer: Tokenizer, known: dict[tuple[int, ...], str]) -> list[str | None]:
    """What to show at each position: text, None at a mask.

    Bytes that only together are a character are shown at the first of them.

    Args:
      ids: one sequence.
      known: texts decoded before; added to.
    """
    shown: list[str | None] = []
    while (at := len(shown)) < len(ids):
        if ids[at] == tokenizer.mask_id:
            shown.append(None)
            continue
        for stop in range(at + 1, min(at + 4, len(ids)) + 1):  # a character has four bytes at most
            if ids[stop - 1] == tokenizer.mask_id:
                stop = at + 1
                break
            group = tuple(ids[at:stop])
            if group not in known:
                known[group] = tokenizer.decode(group, specials=True)
            if "\ufffd" not in known[group] or _is_text(tokenizer.decode_bytes(group, specials=True)):
                break
        else:
            stop = at + 1
        shown += [known[tuple(ids[at:stop])], *[""] * (stop - at - 1)]
    return shown


def _is_text(encoded: bytes) -> bool:
    try:
        encoded.decode()
    except UnicodeDecodeError:
        return False
    return True


def frames(trace: np.ndarray, length: int, tokenizer: Tokenizer) -> Iterator[tuple[list[str | None], np.ndarray]]:
    """(pieces, bool [length]: what is new, text that is now complete among it) of one sequence, int32 [frames, L]."""
    known: dict[tuple[int, ...], str] = {}
    before, shown_before = trace[0, :length], pieces(trace[0, :length].tolist(), tokenizer, known)
    for z in trace[:, :length]:
        shown = pieces(z.tolist(), tokenizer, known)
        other = np.array([text != old for text, old in zip(shown, shown_before, strict=True)], bool)
        yield shown, (other | (z != before)) & (z != tokenizer.mask_id)
        before, shown_before = z, shown


# --- A page -----------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Denoising, step by step</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 60em; margin: 0 auto; padding: 1em }
  nav { position: sticky; top: 0; display: flex; gap: 1em; align-items: center; padding: .5em 0; background: Canvas }
  nav input { flex: 1; min-width: 5em }
  button { font: inherit }
  nav[hidden] { display: none }
  output { min-width: 9em; text-align: right; font-variant-numeric: tabular-nums }
  h2 { font-size: 1em; margin: 1.5em 0 0; opacity: .6 }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0; font: 15px/1.5 ui-monospace, monospace }
  .given { color: #2563eb }
  .mask { opacity: .3; display: inline-block }  /* a line may end beside it, and the word before stays where it is */
  .new { background: #fde047; color: #000 }
</style>
<nav hidden>
  <button type="button">Play</button>
  <input type="range" min="0" aria-label="step">
  <output></output>
</nav>
<main>
@@
</main>
<script type="application/json" id="data">@@</script>
<script>
  const {steps, total, samples} = JSON.parse(document.getElementById("data").textContent)
  const [button, slider, told] = ["button", "input", "output"].map(name => document.querySelector(name))
  const rows = [...document.querySelectorAll("pre")].map((pre, i) => {
    pre.textContent = ""
    return samples[i].frames[0].map(() => pre.appendChild(document.createElement("span")))
  })
  let now = 0, timer = null

  function paint(span, text, name) {
    span.textContent = text === null ? "\\u00b7" : text
    span.className = text === null ? "mask" : name
  }
  function begin() {
    samples.forEach(({frames}, i) => frames[0].forEach((text, at) => paint(rows[i][at], text, "given")))
    now = 0
  }
  function show(frame) {
    if (frame < now) begin()
    while (now < frame) {
      now++
      for (const span of document.querySelectorAll(".new")) span.className = ""
      samples.forEach(({frames}, i) => frames[now].forEach(([at, text, name]) => paint(rows[i][at], text, name)))
    }
    slider.value = frame
    told.textContent = `step ${steps[frame]} of ${total}`
  }
  function stop() {
    clearInterval(timer)
    timer = null
    button.textContent = "Play"
  }
  button.onclick = () => {
    if (timer) return stop()
    if (now == steps.length - 1) show(0)
    button.textContent = "Pause"
    timer = setInterval(() => now < steps.length - 1 ? show(now + 1) : stop(), 120)
  }
  slider.oninput = () => { stop(); show(+slider.value) }
  slider.max = steps.length - 1
  document.querySelector("nav").hidden = false
  begin()
  show(0)
</script>
"""


def write_html(
    path: Path, trace: np.ndarray, lengths: Sequence[int] | np.ndarray, tokenizer: Tokenizer, titles: list[str]
) -> None:
    """The page; arguments as of `write`. Without scripts it shows the texts as they end."""
    steps = changing_steps(trace)
    samples, texts = [], []
    for i, title in enumerate(titles):
        changes: list[list[Any]] = []
        before: list[str | None] = []
        for shown, new in frames(trace[steps, i], lengths[i], tokenizer):
            if not changes:
                changes.append(shown)
            else:  # at, text, class
                at = [k for k, text in enumerate(shown) if new[k] or text != before[k]]
                changes.append([[k, shown[k], "new" if new[k] else ""] for k in at])
            before = shown
        samples.append({"frames": changes})
        last = html.escape("".join("·" if text is None else text for text in before))
        texts.append(f"<h2>{html.escape(title)}</h2>\n<pre>{last}</pre>")
    data = json.dumps({"steps": steps, "total": len(trace) - 1, "samples": samples}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # nothing in it ends the script
    before_texts, before_data, end = PAGE.split("@@")
    path.write_text(before_texts + "\n".join(texts) + before_data + data + end, encoding="utf-8")


# --- A GIF ------------------------------------------------------------------------------------------

CELL = (10, 22)  # pixels of a character
FONTS = ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf", "Menlo.ttc", "consola.ttf")
MARGIN = 16
INK, BLUE, HEADING = (32, 32, 36), (37, 99, 235), (130, 130, 136)
GREY, YELLOW, PAPER = (214, 214, 220), (253, 224, 71), (255, 255, 255)


def write_gif(
    path: Path, trace: np.ndarray, lengths: Sequence[int] | np.ndarray, tokenizer: Tokenizer, titles: list[str]
) -> None:
    """The animation, one frame for each step that changed something; arguments as of `write`."""
    from PIL import Image, ImageDraw, ImageFont

    steps = changing_steps(trace)
    sequences = [list(frames(trace[steps, i], lengths[i], tokenizer)) for i in range(len(titles))]
    font = ImageFont.load_default(CELL[1] - 7)
    for name in FONTS:
        with contextlib.suppress(OSError):  # the system has no such font
            font = ImageFont.truetype(name, CELL[1] - 6, layout_engine=ImageFont.Layout.BASIC)
            break
    places, title_lines, line = [], [], 0
    for sequence in sequences:
        title_lines.append(line)
        cells, line = place(sequence[-1][0], line + 1)
        places.append(cells)
        line += 2
    size = (2 * MARGIN + COLUMNS * CELL[0], 2 * MARGIN + (line - 1) * CELL[1])

    def box(column, line, columns=1):
        left, top = MARGIN + column * CELL[0], MARGIN + line * CELL[1]
        return left, top, left + columns * CELL[0] - 1, top + CELL[1] - 1

    images = []
    for number, step in enumerate(steps):
        image = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(image)
        for title, at, cells, sequence in zip(titles, title_lines, places, sequences, strict=True):
            heading = f"{title}, step {step} of {len(trace) - 1}"
            draw.text(box(0, at)[:2], heading.encode("ascii", "replace").decode(), HEADING, font)
            (shown, new), start = sequence[number], sequence[0][0]
            for position, own in enumerate(cells):
                if (text := shown[position]) is None:
                    for column, line in own:
                        left, top, right, bottom = box(column, line)
                        draw.rectangle((left + 3, top + 9, right - 3, bottom - 8), GREY)
                    continue
                if new[position]:
                    for column, line in own:
                        draw.rectangle(box(column, line), YELLOW)
                colour = INK if start[position] is None else BLUE
                for (column, line), character in zip(own, text, strict=False):
                    if character.isprintable():
                        left, _, right, bottom = box(column, line)
                        draw.text(((left + right) / 2, bottom - 7), character, colour, font, anchor="ms")
        images.append(image)
    durations = [120] * (len(images) - 1) + [3000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def place(shown: list[str | None], line: int) -> tuple[list[list[tuple[int, int]]], int]:
    """((column, line) of each character of each piece, the last line): from `line` on, `COLUMNS` wide.

    A word that a line has no room for begins the next one, unless none has.
    """
    whole = "".join(text or "" for text in shown)
    ends = [match.end() for match in re.finditer(r"\S+|\s", whole) for _ in match[0]]
    column, at, cells = 0, 0, []
    for text in shown:
        own = []
        for character in text or "":
            begins, room = ends[at - 1] == at, COLUMNS - column
            hangs = room == 0 and character == " "  # over the end, so that the next line begins with a word
            if not hangs and (room == 0 or (begins and column and room < ends[at] - at <= COLUMNS)):
                column, line = 0, line + 1
            own.append((column, line))
            column, at = column + 1, at + 1
            if character == "\n" or hangs:
                column, line = 0, line + 1
        cells.append(own)
    return cells, line


WRITERS = {".html": write_html, ".gif": write_gif}
