"""Charts: what is drawn is where the numbers are, inside the frame, whatever the numbers are."""

import itertools
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diffrwkv import charts
from diffrwkv.charts import Panel, Series

SVG = "{http://www.w3.org/2000/svg}"


def drawn(panels, **options):
    """The parsed chart, which must be XML."""
    return ElementTree.fromstring(charts.svg(panels, **options))


def dots(root):
    """(x, y, what it tells) of each dot."""
    return [(float(c.get("cx")), float(c.get("cy")), c.find(f"{SVG}title").text) for c in root.iter(f"{SVG}circle")]


def test_dots_are_where_the_numbers_are():
    points = [(0.0, 1.0), (50.0, 2.0), (100.0, 5.0)]
    found = dots(drawn([Panel("step", "loss", [Series("a<b>", points)])]))
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    assert [x for x, _, _ in found] == pytest.approx([left, (left + right) / 2, right], abs=0.1)
    heights = [y for _, y, _ in found]
    assert (heights[0] - heights[1]) * 3 == pytest.approx(heights[1] - heights[2], abs=0.4)  # y grows upwards
    assert found[1][2] == "a<b>: step 50, loss 2"


def test_a_logarithmic_axis_spaces_ratios_alike():
    lengths = [256.0 * 2**i for i in range(7)]
    panel = Panel("length", "ms", [Series("x", [(n, 3e-6 * n**2) for n in lengths])], x_scale="log2", y_scale="log10")
    found = dots(drawn([panel]))
    for axis in (0, 1):
        steps = np.diff([dot[axis] for dot in found])
        assert np.ptp(steps) < 0.25 and abs(steps[0]) > 10


def test_what_an_axis_cannot_show_is_left_out():
    points = [(1.0, 0.0), (2.0, -1.0), (3.0, math.nan), (math.inf, 4.0), (4.0, 10.0)]
    root = drawn([Panel("x", "y", [Series("a", points)], y_scale="log10")])
    assert [told for _, _, told in dots(root)] == ["a: x 4, y 10"]
    assert drawn([Panel("x", "y", [Series("nothing", [])])]) is not None
    with pytest.raises(ValueError, match="an axis is linear, log2 or log10, got 'log'"):
        drawn([Panel("x", "y", [Series("a", points)], x_scale="log")])


NUMBERS = st.floats(-1e12, 1e12, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


@example([(0.0, 999999999999.998)], "linear", "log10")
@example([(1e12, 3.0), (1e12 + 0.001, 3.0 + 1e-12)], "linear", "linear")
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8),
    st.sampled_from(["linear", "log2", "log10"]),
    st.sampled_from(["linear", "log2", "log10"]),
)
def test_everything_is_inside_the_frame(points, x_scale, y_scale):
    root = drawn([Panel("x", "y", [Series("a", points)], x_scale=x_scale, y_scale=y_scale)])
    shown = [p for p in points if (x_scale == "linear" or p[0] > 0) and (y_scale == "linear" or p[1] > 0)]
    found = dots(root)
    assert len(found) == len(shown)
    for x, y, _ in found:
        assert charts.LEFT - 0.1 <= x <= charts.WIDTH - charts.RIGHT + 0.1
        assert charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1
    ticks = [t for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "middle" and t.get("x")]
    assert 2 <= len(ticks) <= 14


def test_legend_has_each_label_once_and_none_over_another():
    labels = [f"a label of some length, {'x' * (7 * i % 30)} {i}" for i in range(20)]
    panel = Panel("x", "y", [Series(label, [(1.0, i), (2.0, i)]) for i, label in enumerate(labels)])
    root = drawn([panel, panel])
    texts = [t for t in root.iter(f"{SVG}text") if t.text in labels]
    assert [t.text for t in texts] == labels
    for a, b in itertools.pairwise(texts):
        same_row = a.get("y") == b.get("y")
        assert not same_row or float(a.get("x")) + 6 * len(a.text) < float(b.get("x"))
        assert float(b.get("x")) < int(root.get("width"))
    styles = {(p.get("stroke"), p.get("stroke-dasharray")) for p in root.iter(f"{SVG}path") if "h22" in p.get("d")}
    assert len(styles) == len(labels)  # eight colours, three kinds of lines


def test_tables_keep_what_stands_in_a_cell():
    assert charts.markdown_table(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n| --- | --: |\n| x\\|y | 1 2 |"
    text = charts.html_table(["<a>"], [[("<b>&", None)], [("1 ± 2", 1.0)]])
    assert (
        "<td>&lt;b&gt;&amp;</td>" in text and "<td data-value=1.0>1 ± 2</td>" in text and "<th>&lt;a&gt;</th>" in text
    )
    assert not re.search(r"https?:|src=|href=", charts.page("t", [text]))
