"""Plots: the documents' are what the data gives, and a plot says in words and at the right lengths what was given."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.plots import bars, lines, pictures
from measuring.figures import at_least, at_most, plot
from plots import IMAGES, draw_all

SVG = "{http://www.w3.org/2000/svg}"
NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=90)


def test_the_drawn_plots_are_those_of_the_data() -> None:
    drawn = draw_all()
    assert set(drawn) == {"captioning", "captions", "packing", "streaming"}
    assert drawn == {path.stem: path.read_text() for path in IMAGES.glob("*.svg") if path.stem in drawn}


@pytest.mark.parametrize("path", sorted(IMAGES.glob("data/*.json")), ids=lambda path: path.stem)
def test_each_figure_of_a_plot_is_in_the_documents(path: Path) -> None:
    content, page = json.loads(path.read_text()), (IMAGES.parent / "performance.md").read_text()
    assert content["labels"].keys() == content["values"].keys()
    for label in content["labels"].values():
        assert any(
            re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d])", page) for figure in re.findall(r"[\d.,]+", label)
        ), label


@given(values=st.dictionaries(NAMES, st.just(0.0) | st.floats(1e-6, 1e9) | st.none(), min_size=1, max_size=8))
def test_bars_are_as_long_as_their_values_and_stay_inside(values: dict[str, float | None]) -> None:
    svg = ElementTree.fromstring(bars("a <title>", values, best=next(iter(values))).svg)
    rects = [rect for rect in svg.iter(f"{SVG}rect") if rect.get("class") in ("bar", "best")]
    lengths = [float(rect.get("width", "")) for rect in rects]
    known = [value or 0.0 for value in values.values()]
    scale = max(lengths) / max(known) if max(known) else 0
    assert lengths == pytest.approx([scale * value for value in known], abs=0.11)
    assert all(0 <= float(rect.get("x", "")) + float(rect.get("width", "")) <= 720 for rect in rects)
    assert all(name in (svg.get("aria-label") or "") for name in values)


def test_lines_leave_out_what_is_not_finite_and_say_where_they_end() -> None:
    svg = ElementTree.fromstring(lines("Loss", {"training": [(1, 4.0), (2, float("nan")), (3, 1.0)], "none": []}).svg)
    assert svg.get("aria-label") == "Loss: training from 4 to 1"
    points = [line.get("points", "").split() for line in svg.iter(f"{SVG}polyline")]
    assert [len(set(each)) for each in points] == [2, 2, 2, 0]  # a key and a curve each


def test_pictures_keep_their_shape_and_have_their_texts() -> None:
    wide = np.zeros((10, 20, 3), dtype=np.uint8)
    svg = ElementTree.fromstring(pictures("Two", [(wide, "a < b"), (wide.swapaxes(0, 1), "long " * 20)]).svg)
    sizes = [(float(image.get("width", "")), float(image.get("height", ""))) for image in svg.iter(f"{SVG}image")]
    assert [round(width / height, 2) for width, height in sizes] == [2, 0.5]
    assert "a < b" in [text.text for text in svg.iter(f"{SVG}text")]


def test_a_benchmarks_plot_shows_what_was_measured_against_its_bar() -> None:
    found = [at_least("speed", 3.0, 1.5), at_most("blocks", 0, 0), at_least("gone", None, 2), at_most("nan", np.nan, 1)]
    svg = ElementTree.fromstring(plot(found, {"date": "today"}, title="x").svg)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"3 (1.5)", "0 (0)", "not measured", "today"} < set(texts)
    lengths = [float(rect.get("width", "")) for rect in svg.iter(f"{SVG}rect") if rect.get("class") == "bar"]
    starts = [float(rect.get("x", "")) for rect in svg.iter(f"{SVG}rect") if rect.get("class") == "bar"]
    marks = [float(line.get("x1", "")) for line in svg.iter(f"{SVG}line")]
    assert marks[0] == pytest.approx(starts[0] + lengths[0] / 2, abs=0.2)  # the value is twice the bar
    assert lengths[1:] == [0, 0, 0]
