"""Traces: what the files show is what happened, whatever the text is."""

import html.parser
import json
import sys

import numpy as np
import pytest

from diffrwkv import traces
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers

CHAR = tokenizers.Char("abc<>&/script @\n")
BYTE = tokenizers.Byte()


def trace_of(tokenizer, *steps, blank="_"):
    """int32 [N + 1, B, L] of texts, each step a list of B texts of one length."""

    def ids(text):
        return [tokenizer.mask_id if c == blank else tokenizer.encode(c)[0] for c in text]

    return np.array([[ids(text) for text in step] for step in steps], np.int32)


class Page(html.parser.HTMLParser):
    """What a browser would see: the text of each <pre>, the data, and every address."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.data, self.addresses, self._open = [], "", [], None
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.data)

    def handle_starttag(self, tag, attributes):
        self._open = (tag, dict(attributes).get("id"))
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, text):
        if self._open == ("pre", None):
            self.texts[-1] += text
        elif self._open == ("script", "data"):
            self.data += text

    def frames(self, sample):
        """The text of each frame, and the positions that are marked as new, as the page's script has them."""
        first, *changes = self.data["samples"][sample]["frames"]
        shown, new = list(first), [[]]
        texts = ["".join("_" if text is None else text for text in shown)]
        for frame in changes:
            for at, text, _ in frame:
                shown[at] = text
            texts.append("".join("_" if text is None else text for text in shown))
            new.append([at for at, _, name in frame if name == "new"])
        return texts, new


def test_a_page_has_every_step_that_changed_something(tmp_path):
    first, second = ("a__", "a__", "a__", "ab_", "a_c", "abc"), ("___", "_c_", "_c_", "_ci", "bci", "bci")
    trace = trace_of(CHAR, *zip(first, second, strict=True))
    traces.write(tmp_path / "x.html", trace, [3, 2], CHAR)
    page = Page(tmp_path / "x.html")
    assert page.data["steps"] == [0, 1, 3, 4, 5] and page.data["total"] == 5
    assert page.frames(0) == (["a__", "a__", "ab_", "a_c", "abc"], [[], [], [1], [2], [1]])  # one is taken back
    assert page.frames(1) == (["__", "_c", "_c", "bc", "bc"], [[], [1], [], [0], []])  # two tokens of it are shown
    assert page.texts == ["abc", "bc"] and not page.addresses


def test_markup_in_a_text_is_text(tmp_path):
    text = "</script><b>&@@a"
    trace = trace_of(CHAR, ["_" * len(text)], [text])
    traces.write(tmp_path / "x.html", trace, [len(text)], CHAR, titles=["<i>&lt;"])
    page = Page(tmp_path / "x.html")
    assert page.texts == [text] and page.frames(0)[0][-1] == text
    written = (tmp_path / "x.html").read_text()
    assert written.count("</script>") == 2 and "<b>" not in written and "<i>" not in written and "&amp;lt;" in written


def test_bytes_of_a_character_are_shown_together(tmp_path):
    end = BYTE.encode("é€a").tolist()  # two, three and one byte
    trace = np.full((4, 1, 6), BYTE.mask_id, np.int32)
    trace[1:, 0, 0], trace[2:, 0, 1:4], trace[3] = end[0], end[1:4], end
    traces.write(tmp_path / "x.html", trace, [6], BYTE)
    texts, new = Page(tmp_path / "x.html").frames(0)
    assert texts == ["______", "\ufffd_____", "é\ufffd\ufffd__", "é€a"]
    assert new[2] == [0, 1, 2, 3] and new[3][0] == 2  # a character that is complete now is new


def test_hostile_text_is_shown_and_nothing_else(tmp_path):
    text = "<!-- </pre></script><img src=x onerror=a> \x1b[2J\x00\r\x9b\u202e\u2028\ufffd&#60; &lt;\\u003c 😀"
    ids = [*BYTE.encode(text), 0xFF, 0xE2, 0x82]
    trace = np.array([np.full(len(ids), BYTE.mask_id), ids], np.int32)[:, None]
    for suffix in traces.WRITERS:
        traces.write(tmp_path / f"x{suffix}", trace, [len(ids)], BYTE, titles=[text])
    page, written = Page(tmp_path / "x.html"), (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.frames(0)[0][-1] == text + "\ufffd\ufffd\ufffd" and not page.addresses
    assert "<!--" not in written and written.count("</script>") == 2 and written.count("<pre>") == 1


def test_a_gif_has_the_frames(tmp_path):
    from PIL import Image

    trace = trace_of(CHAR, ["a__", "___"], ["ab_", "_c_"], ["ab_", "_c_"], ["abc", "_c_"], ["abc", "\nci"])
    traces.write(tmp_path / "x.GIF", trace, [3, 3], CHAR)
    with Image.open(tmp_path / "x.GIF") as image:
        assert image.n_frames == 4 and image.is_animated and image.info["loop"] == 0
        frames = []
        for i in range(4):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
    # Cells of sample 0's line, the second of the picture: position 1 is masked, then new, then old.
    (width, height), margin = traces.CELL, traces.MARGIN
    lines = [frame[margin + height : margin + 2 * height, margin:] for frame in frames]
    cells = [[line[:, i * width : (i + 1) * width] for i in range(3)] for line in lines]

    def has(cell, colour):
        return (abs(cell - np.array(colour)).max(axis=-1) < 40).any()

    assert has(cells[0][0], traces.BLUE) and has(cells[3][0], traces.BLUE)
    assert has(cells[0][1], traces.GREY) and not has(cells[0][1], traces.YELLOW)
    assert has(cells[1][1], traces.YELLOW) and has(cells[1][1], traces.INK) and has(cells[1][2], traces.GREY)
    assert not has(cells[2][1], traces.YELLOW) and has(cells[2][2], traces.YELLOW)


def test_long_lines_are_broken():
    last = traces.COLUMNS - 1
    cells, line = traces.place(["a" * last, "bc", "\n", "", None, "d"], 1)
    assert cells[1] == [(last, 1), (0, 2)] and cells[2] == [(1, 2)] and cells[5] == [(0, 3)] and line == 3
    cells, line = traces.place(["a" * (last - 2), " b", "cd", "e ", "f"], 1)  # a word goes to the next line whole
    assert cells[1] == [(last - 2, 1), (0, 2)] and cells[2] == [(1, 2), (2, 2)] and cells[4] == [(5, 2)] and line == 2
    cells, line = traces.place(["a" * (last + 1), " b"], 1)  # a blank hangs over the end
    assert cells[1] == [(last + 1, 1), (0, 2)] and line == 2


@pytest.mark.parametrize(
    ("name", "told"), [("x.mp4", r"ends in .html or .gif, got '.*x.mp4'"), ("x", "ends in"), ("no/x.gif", "no folder")]
)
def test_a_file_that_cannot_be(tmp_path, name, told):
    with pytest.raises(UserError, match=told):
        traces.check(tmp_path / name)


def test_a_gif_without_pillow_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    traces.check(tmp_path / "x.html")
    with pytest.raises(UserError, match="pip install pillow"):
        traces.check(tmp_path / "x.gif")
