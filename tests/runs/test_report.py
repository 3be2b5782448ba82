"""The report: what the page tells, that nothing in it breaks it, and that its drawings are right."""

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from html_page import HtmlPage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner.attention import Attention
from captioner.plots import MAX_POINTS, round_up, thin, value_ticks
from train.run.report import write_report

SVG = "{http://www.w3.org/2000/svg}"
FINITE = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9)


class Page(HtmlPage):
    """A run's report."""

    def __init__(self, run: Path) -> None:
        super().__init__(run / "report.html")

    def rows(self) -> list[list[str]]:
        """The cells of all tables' rows."""
        found = re.findall(r"<tr>(.*?)</tr>", self.source, re.DOTALL)
        return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found]

    def charts(self) -> dict[str, ElementTree.Element]:
        """The drawings, which must be XML too, by their titles."""
        drawings = re.findall(r"<svg xmlns.*?\n</svg>", self.source, re.DOTALL)
        return dict(zip(self.text("h3"), map(ElementTree.fromstring, drawings), strict=True))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_row(step: int, **more: Any) -> dict[str, Any]:
    values = {"loss": 3.0 - step / 100, "learning_rate": 0.001, "images_per_second": 200.0, "waiting_share": 0.25}
    return {"step": step, **{f"train/{name}": value for name, value in (values | more).items()}}


def evaluation_row(step: int, *, epoch: int, cider: float) -> dict[str, Any]:
    return {"step": step, "epoch": epoch, "validation/loss": 2.5, "validation/bleu4": 0.3, "validation/cider": cider}


def report(run: Path, *, history: list[dict[str, Any]] | None = None, **files: Any) -> Page:
    if history is not None:
        write_rows(run / "history.jsonl", history)
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    write_report(run)
    return Page(run)


def save_samples(run: Path, captions: list[list[str]], *, steps: list[int]) -> None:
    write_rows(run / "samples.jsonl", [{"step": s, "captions": c} for s, c in zip(steps, captions, strict=True)])
    (run / "samples").mkdir()
    for number in range(len(captions[0])):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(run / "samples" / f"{number:02d}.jpg")


EVALUATIONS = [evaluation_row(10 * epoch, epoch=epoch, cider=cider) for epoch, cider in ((1, 0.5), (2, 0.9), (3, 0.8))]


def test_the_headline_has_the_encoder_the_best_cider_and_the_speed(tmp_path: Path) -> None:
    page = report(
        tmp_path,
        history=EVALUATIONS,
        settings={"encoder": "resnet18"},
        report={"training_images": 7200, "training_seconds": 3600.0},
    )
    facts = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert facts == {
        "Encoder": "resnet18",
        "Best CIDEr": "0.900 epoch 2, step 20",
        "Training speed": "2 images/s the session that finished the run",
        "Training time": "1.00 hours the session that finished the run",
    }


def test_a_short_training_time_is_in_minutes(tmp_path: Path) -> None:
    page = report(tmp_path, report={"training_images": 1596, "training_seconds": 150.0})
    assert "2.5 minutes the session that finished the run" in page.text("dd")


def test_metrics_evaluations_and_settings_are_in_tables(tmp_path: Path) -> None:
    page = report(
        tmp_path,
        history=[*EVALUATIONS, {"step": 40, "epoch": 4, "validation/cider": None}],
        metrics={"cider": 0.9, "bleu4": 0.25, "bleu4_low": 0.2, "bleu4_high": 0.3, "validation_perplexity": 1234.5}
        | {"bleu1": math.nan, "own_score": 1, "dangling_ends": 0.01},
        settings={"shards": ["a", "b"], "crop": None, "resume": True, "dropout": 0.5},
    )
    rows = page.rows()
    assert ["CIDEr", "0.900"] in rows
    assert ["BLEU-4", "0.250 (0.200 to 0.300)"] in rows
    assert ["Dangling end", "0.010"] in rows
    assert not [row for row in rows if "low" in row[0]]
    assert ["Perplexity", "1,234"] in rows
    assert ["BLEU-1", "not finite"] in rows
    assert ["Own score", "1"] in rows
    assert ["Evaluation", "Loss", "BLEU-4", "CIDEr"] in rows
    assert ["epoch 2, step 20", "2.500", "0.300", "0.900"] in rows
    assert ["epoch 4, step 40", "", "", "not finite"] in rows
    assert rows[-4:] == [["shards", "a, b"], ["crop", "None"], ["resume", "True"], ["dropout", "0.5"]]


def test_a_chart_for_what_was_logged_and_no_other(tmp_path: Path) -> None:
    page = report(tmp_path, history=[*(training_row(step) for step in (10, 20)), *EVALUATIONS])
    assert list(page.charts()) == ["Loss", "CIDEr and BLEU-4"]
    assert list(report(tmp_path, history=[training_row(1)]).charts()) == ["Loss"]


def lines(chart: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of a chart's lines."""
    found = [line.attrib for line in chart.iter(f"{SVG}polyline")]
    return [
        [(float(x), float(y)) for x, y in (point.split(",") for point in line["points"].split())]
        for line in found
        if line["class"].startswith("curve")
    ]


def test_points_lie_where_the_axes_say(tmp_path: Path) -> None:
    chart = report(tmp_path, history=EVALUATIONS).charts()["CIDEr and BLEU-4"]
    labels = {text.text: text.attrib for text in chart.iter(f"{SVG}text")}
    cider = lines(chart)[0][1:]  # the first point comes twice
    assert [x for x, _ in cider] == [float(labels[step]["x"]) for step in ("10", "20", "30")]
    assert cider[2][1] == float(labels["0.8"]["y"])
    below, above = float(labels["0.2"]["y"]), float(labels["0.8"]["y"])
    assert cider[0][1] == pytest.approx((below + above) / 2, abs=0.11)
    assert below > above


def test_values_that_are_not_finite_are_counted_and_not_drawn(tmp_path: Path) -> None:
    page = report(tmp_path, history=[training_row(1), training_row(2, loss=None), training_row(3)])
    assert len(set(lines(page.charts()["Loss"])[0])) == 2
    assert "training: 1 of 3 values were not finite and cannot be drawn." in page.text("p")
    page = report(tmp_path, history=[training_row(1, loss=None), training_row(2, loss=None)])
    assert lines(page.charts()["Loss"]) == [[]]
    assert "training: 2 of 2 values were not finite and cannot be drawn." in page.text("p")


def test_a_high_first_loss_does_not_press_the_curve_to_the_ground(tmp_path: Path) -> None:
    history = [training_row(step, loss=9.0 if step == 1 else 2.0) for step in range(1, 200)]
    page = report(tmp_path, history=history)
    assert "The first values, up to 9, are above the drawing." in page.text("p")
    assert "9" not in [text.text for text in page.charts()["Loss"].iter(f"{SVG}text")]
    assert not [text for text in report(tmp_path, history=history[1:]).text("p") if "above the drawing" in text]


def test_thousands_of_rows_make_a_small_page(tmp_path: Path) -> None:
    history = [training_row(step, loss=2 + math.sin(step)) for step in range(20_000)]
    page = report(tmp_path, history=history)
    assert len(lines(page.charts()["Loss"])[0]) <= MAX_POINTS + 1
    assert len(page.source) < 50_000


def test_samples_show_how_their_captions_changed(tmp_path: Path) -> None:
    said = [[f"first at {step}", f"second at {step}"] for step in (10, 20, 30, 40, 50)]
    save_samples(tmp_path, said, steps=[10, 20, 30, 40, 50])
    page = report(tmp_path, history=EVALUATIONS)
    captions = [text for text in page.text("dd") if " at " in text]
    assert captions == [f"{which} at {step}" for which in ("first", "second") for step in (10, 30, 50)]
    assert [text for text in page.text("dt") if "step" in text][:3] == [
        "epoch 1, step 10",
        "epoch 3, step 30",
        "step 50",
    ]


def test_the_last_captions_have_a_heat_map_for_each_word(tmp_path: Path) -> None:
    """Dark where a word did not look; the image itself is embedded once more, small, whatever the number of words."""
    words = ("<b>", *(f" word{number}" for number in range(8)), ".")
    weights_TR = np.eye(4, dtype=np.float32)[np.arange(len(words)) % 4]
    seen = Attention(words=words, grid=(2, 2), weights_TR=weights_TR).to_json()
    save_samples(tmp_path, [["a dog", "a cat", "gone"]] * 2, steps=[10, 20])
    (tmp_path / "samples" / "02.jpg").unlink()
    rows = [
        {"step": 10, "captions": ["", "", ""]},
        {"step": 20, "captions": ["", "", ""], "attention": [None, seen, seen]},
    ]
    write_rows(tmp_path / "samples.jsonl", rows)
    page = report(tmp_path, history=EVALUATIONS)
    drawings = [svg["aria-label"] for svg in page.attributes("svg") if svg["viewbox"] == "0 0 96 96"]
    assert drawings == Attention.from_json(seen).texts()
    assert [text for text in page.text("title") if "looks at" in text] == drawings
    assert page.text("span")[-len(words) :] == [word.strip() for word in words]
    sources = [image["href"].partition(",") for image in page.attributes("image")]
    assert [kind for kind, _, _ in sources] == ["data:image/jpeg;base64"] + ["data:image/png;base64"] * len(words)
    assert {use["href"] for use in page.attributes("use")} == {"#sample-2"}
    for (_, _, content), weights_R in zip(sources[1:], weights_TR, strict=True):
        red, *_, opacity = Image.open(io.BytesIO(base64.b64decode(content))).split()
        assert (np.asarray(red).ravel() == 255 * weights_R).all()
        assert np.asarray(opacity).argmin() == weights_R.argmax()


@pytest.mark.parametrize(("num_shown", "expected"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 2, 3])])
def test_a_caption_is_never_shown_twice(tmp_path: Path, num_shown: int, expected: list[int]) -> None:
    save_samples(tmp_path, [[f"at {step}"] for step in range(num_shown)], steps=list(range(num_shown)))
    assert report(tmp_path).text("dd") == [f"at {step}" for step in expected]


def test_the_page_needs_no_other_file_and_no_script(tmp_path: Path) -> None:
    save_samples(tmp_path, [["a dog", "a cat"]], steps=[10])
    (tmp_path / "samples" / "01.jpg").unlink()
    page = report(tmp_path, history=EVALUATIONS)
    (image,) = page.attributes("img")
    embedded = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"), validate=True)
    assert embedded == (tmp_path / "samples" / "00.jpg").read_bytes()
    assert image["alt"] == "Validation image 1"
    assert "The image is gone." in page.text("p")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    addresses = re.findall(r"https?://[^\s\"']+", page.source)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in page.source


def test_markup_anywhere_stays_text(tmp_path: Path) -> None:
    bad = "<script>alert('\"&</script></dd>\ud83d"
    shown = bad.replace("\ud83d", "?")
    run = tmp_path / "a <b>run</b>".replace("/", "")
    run.mkdir()
    save_samples(run, [[bad]], steps=[10])
    page = report(run, history=[training_row(1)], settings={bad: bad, "encoder": bad}, metrics={bad: 1.0})
    assert not page.attributes("script")
    assert not page.attributes("b")
    assert page.text("dd") == [shown, shown]
    assert page.text("td").count(shown) == 2
    assert page.text("h1") == ["Training report of a <b>run<b>"]


def test_what_is_missing_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    page = report(tmp_path, history=[])
    assert not {"svg", "table", "img", "dl"} & {tag for tag, _ in page.elements}
    assert page.text("p")[1:] == [
        "The run logged no values, so there are no curves.",
        "The run was not evaluated: there was no validation split, or it has not come so far.",
        "The run kept no sample captions.",
        "The run folder holds no settings.",
    ]


def test_every_table_and_drawing_says_what_it_is(tmp_path: Path) -> None:
    page = report(tmp_path, history=[training_row(1), *EVALUATIONS], settings={"epochs": 3})
    drawings = [svg for svg in page.attributes("svg") if svg.get("role") == "img"]
    assert drawings[0]["aria-label"] == "Loss; training from 2.99 to 2.99; validation from 2.5 to 2.5"
    assert all(svg["aria-label"] for svg in drawings)
    assert {cell["scope"] for cell in page.attributes("th")} == {"col", "row"}
    assert len(page.attributes("caption")) == len(page.attributes("table")) == 2


@given(st.integers(0, 5 * MAX_POINTS))
def test_thinning_keeps_the_order_and_both_ends(num_points: int) -> None:
    points = [(step, 0.5) for step in range(num_points)]
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS + 1
    assert thinned == sorted(thinned)
    if points:
        assert (thinned[0], thinned[-1]) == (points[0], points[-1])


@given(st.lists(FINITE))
def test_ticks_are_few_round_and_around_all_values(values: list[float]) -> None:
    ticks = value_ticks(values)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= min([0, *values])
    assert max([0, *values]) <= ticks[-1]
    assert 0 in ticks
    for tick in ticks:
        assert math.isclose(tick, float(f"{tick:.3g}"), rel_tol=1e-9)


@given(st.floats(1e-9, 1e9))
def test_a_tick_is_the_next_round_number(number: float) -> None:
    assert number <= round_up(number) < 2.6 * number


def test_ticks_of_steps_are_whole_and_short(tmp_path: Path) -> None:
    for last_step, wanted in (
        (2_500_000, ["0", "500,000", "1,000,000", "1,500,000", "2,000,000", "2,500,000"]),
        (3, ["0", "1", "2", "3"]),
    ):
        chart = report(tmp_path, history=[training_row(1), training_row(last_step)]).charts()["Loss"]
        labels = [text.text for text in chart.iter(f"{SVG}text")]
        assert labels[-1 - len(wanted) :] == [*wanted, "step"]
