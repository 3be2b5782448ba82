"""The report: one HTML page, `report.html`, that tells what a run did; it needs no other file and can be mailed."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from captioner.files.storage import read_json, write_atomic
from captioner.pages import load_template
from train.run.tracking import HISTORY, PICTURES, SAMPLES, read_rows

REPORT = "report.html"
MAX_CURVE_POINTS = 500
MAX_MARKED_POINTS = 60  # of a curve; where there are more, its points are shown by the line alone
NUM_TICKS = 5
UNSETTLED_SHARE = 0.02  # of the steps: a first loss, several times the others, would press all curves to the ground
LEFT, RIGHT, TOP, BOTTOM = 64.0, 462.0, 10.0, 226.0  # of the plot, in the template's drawing of 480 x 270
METRIC_NAMES = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "cider": "CIDEr",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
}

Row = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point of a curve on the drawing, and what is told of it."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line of a chart; `left_out` counts its values that were not finite."""

    name: str
    marks: list[Mark]
    left_out: int

    @property
    def line(self) -> str:
        """SVG's points of the line."""
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)

    @property
    def is_marked(self) -> bool:
        """Whether the points are few enough to be seen."""
        return len(self.marks) <= MAX_MARKED_POINTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values with round numbers in it (`ticks`), and the drawing's coordinates of its ends."""

    low: float
    high: float
    ticks: list[float]
    start: float
    end: float

    def place(self, value: float) -> float:
        """The drawing's coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over the optimizer's steps, ready to be drawn; `summary` says them to who cannot see them.

    `highest` is a value above the y axis, where there is one.
    """

    title: str
    curves: list[Curve]
    x_axis: Axis
    y_axis: Axis
    highest: float | None
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A validation picture as a data URI (None: its file is gone), and what the model said of it: (when, caption)."""

    picture: str | None
    captions: list[tuple[str, str]]


def write_report(run: Path) -> None:
    """Make `report.html` from what lies in the run folder; what is not there is left out, with a sentence.

    Raises UserError where one of its files is damaged.
    """
    history, settings, report = read_rows(run / HISTORY), _read(run / "settings.json"), _read(run / "report.json")
    evaluations = [row for row in history if any(name.startswith("validation/") for name in row)]
    columns = list(dict.fromkeys(name for row in evaluations for name in row if name.startswith("validation/")))
    page = load_template(Path(__file__).with_name("report.html.j2")).render(
        tick_label=_tick_label,
        title=run.resolve().name,
        now=datetime.now().astimezone(),
        facts=_facts(settings, evaluations, report),
        charts=_charts(history),
        metrics=[(_metric_name(name), _number(value)) for name, value in _read(run / "metrics.json").items()],
        evaluation_header=["Evaluation", *map(_metric_name, columns)],
        evaluations=[
            [_moment(row), *(_number(row[name]) if name in row else "" for name in columns)] for row in evaluations
        ],
        samples=_samples(run, {row["step"]: _moment(row) for row in evaluations}),
        speed=_speed(history, report),
        settings=[(name.replace("_", " "), _setting(value)) for name, value in settings.items()],
    )
    write_atomic(str(run / REPORT), page.encode("utf-8", "replace"))  # a caption may hold half a surrogate pair


def _read(path: Path) -> dict[str, Any]:
    return read_json(str(path), remedy="delete it") if path.exists() else {}


# ---- tables ---------------------------------------------------------------------------------------------------


def _facts(settings: Row, evaluations: Sequence[Row], report: Row) -> list[tuple[str, str, str]]:
    """The headline: names, values and notes."""
    facts = []
    if "encoder" in settings:
        facts.append(("Encoder", str(settings["encoder"]), ""))
    scored = [row for row in evaluations if row.get("validation/cider") is not None]
    if scored:
        best = max(scored, key=lambda row: row["validation/cider"])
        facts.append(("Best CIDEr", f"{best['validation/cider']:.3f}", _moment(best)))
    if report.get("training_seconds"):
        seconds, note = report["training_seconds"], "the session that finished the run"
        facts.append(("Training speed", f"{report['training_images'] / seconds:,.0f} images/s", note))
        facts.append(("Training time", f"{seconds / 3600:,.2f} hours", note))
    return facts


def _moment(row: Row) -> str:
    epoch = row.get("epoch")
    return f"step {row['step']:,}" if epoch is None else f"epoch {epoch:,.4g}, step {row['step']:,}"


def _speed(history: Sequence[Row], report: Row) -> list[tuple[str, str]]:
    """What was measured: the finishing session's counts, and the whole run's rates."""
    table = []
    for part in ("training", "validation"):
        images, seconds = report.get(f"{part}_images", 0), report.get(f"{part}_seconds", 0.0)
        if seconds:
            measured = f"{images:,} images in {seconds:,.1f} s, {images / seconds:,.1f} images/s"
            table.append((f"{part.capitalize()}, the session that finished the run", measured))
    rates = (
        ("Images/s, median of the run", "train/images_per_second", median, "{:,.1f}"),
        ("Tokens/s, median of the run", "train/tokens_per_second", median, "{:,.0f}"),
        ("Share of time waiting for data, mean of the run", "train/waiting_share", fmean, "{:.1%}"),
        ("GPU memory, most of the run", "train/gpu_gigabytes", max, "{:,.1f} GB"),
    )
    for label, name, summarise, form in rates:
        if values := [value for _, value in _points(history, name)]:
            table.append((label, form.format(summarise(values))))
    return table


def _metric_name(name: str) -> str:
    """`validation/bleu4` and `validation_bleu4` as people write it."""
    short = name.removeprefix("validation/").removeprefix("validation_")
    return METRIC_NAMES.get(short, short.replace("_", " ").capitalize())


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _setting(value: Any) -> str:
    match value:
        case None:
            return "not set"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(map(str, value))
        case dict():  # fingerprints
            return ", ".join(f"{name} {part[:12]}" for name, part in value.items() if part)
        case _:
            return str(value)


# ---- samples --------------------------------------------------------------------------------------------------


def _samples(run: Path, moments: Mapping[int, str]) -> list[Sample]:
    """The pictures with their first, middle and last captions; `moments` names the evaluations by their steps."""
    rows = read_rows(run / SAMPLES)
    if not rows:
        return []
    shown = [rows[place] for place in sorted({0, len(rows) // 2, len(rows) - 1})]
    return [
        Sample(
            picture=_data_uri(run / PICTURES / f"{number:02d}.jpg"),
            captions=[
                (moments.get(row["step"], f"step {row['step']:,}"), row["captions"][number])
                for row in shown
                if number < len(row["captions"])
            ],
        )
        for number in range(len(rows[-1]["captions"]))
    ]


def _data_uri(picture: Path) -> str | None:
    if not picture.exists():
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"


# ---- charts ---------------------------------------------------------------------------------------------------


def _charts(history: Sequence[Row]) -> list[Chart]:
    """What can be drawn of the history."""
    wanted = (
        ("Loss", {"training": "train/loss", "validation": "validation/loss"}, 1),
        ("CIDEr and BLEU-4", {"CIDEr": "validation/cider", "BLEU-4": "validation/bleu4"}, 1),
        ("Learning rate", {"learning rate": "train/learning_rate"}, 1),
        ("Images per second", {"images/s": "train/images_per_second"}, 1),
        ("Time waiting for data (%)", {"waiting (%)": "train/waiting_share"}, 100),
        ("GPU memory (GB)", {"GPU memory (GB)": "train/gpu_gigabytes"}, 1),
    )
    charts = (_chart(title, history, columns, scale=scale) for title, columns, scale in wanted)
    return [chart for chart in charts if chart is not None]


def _chart(title: str, history: Sequence[Row], columns: Mapping[str, str], *, scale: float) -> Chart | None:
    """The history's columns, named as they are to be called, times `scale`; None where it has none of them."""
    lines = {
        name: [(step, value * scale) for step, value in _points(history, column)]
        for name, column in columns.items()
        if any(column in row for row in history)
    }
    if not lines:
        return None
    x_axis = step_axis(max(row["step"] for row in history))
    settled_step = UNSETTLED_SHARE * x_axis.high
    y_axis = value_axis([value for line in lines.values() for step, value in line if step >= settled_step])
    highest = max((value for line in lines.values() for _, value in line), default=0.0)
    moments = {row["step"]: _moment(row) for row in history}
    curves = []
    for name, line in lines.items():
        marks = [
            Mark(x=x_axis.place(step), y=y_axis.place(value), text=f"{name}: {value:,.4g}, {moments[step]}")
            for step, value in thin(line, MAX_CURVE_POINTS)
        ]
        num_rows = sum(columns[name] in row for row in history)
        curves.append(Curve(name=name, marks=marks, left_out=num_rows - len(line)))
    ends = (f"{name} from {line[0][1]:,.4g} to {line[-1][1]:,.4g}" for name, line in lines.items() if line)
    return Chart(
        title=title,
        curves=curves,
        x_axis=x_axis,
        y_axis=y_axis,
        highest=highest if highest > y_axis.high else None,
        summary="; ".join([title, *ends]),
    )


def _points(history: Sequence[Row], name: str) -> Points:
    """A column's (step, value) pairs, without the values that were not finite."""
    return [(row["step"], row[name]) for row in history if row.get(name) is not None]


def thin(points: Points, max_points: int) -> Points:
    """At most `max_points` of the points, in their order: the lowest and the highest of equally many neighbours."""
    if len(points) <= max_points:
        return points
    num_buckets = max_points // 2
    edges = [number * len(points) // num_buckets for number in range(num_buckets + 1)]
    places = [range(start, end) for start, end in pairwise(edges)]
    extremes = ({f(bucket, key=lambda place: points[place][1]) for f in (min, max)} for bucket in places)
    return [points[place] for bucket in extremes for place in sorted(bucket)]


def step_axis(last_step: int) -> Axis:
    """The axis from step 0 to the last one, with whole ticks."""
    tick = max(_round_up(last_step / NUM_TICKS), 1.0)
    ticks = [number * tick for number in range(int(last_step / tick) + 1)]
    return Axis(low=0.0, high=max(last_step, 1), ticks=ticks, start=LEFT, end=RIGHT)


def value_axis(values: Sequence[float]) -> Axis:
    """The axis of round numbers around all values and zero."""
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    if low == high:
        high = 1.0
    tick = _round_up((high - low) / NUM_TICKS)
    ticks = [number * tick for number in range(math.floor(low / tick), math.ceil(high / tick) + 1)]
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks, start=BOTTOM, end=TOP)


def _round_up(number: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... and their tenths, hundredths, ... that is not below `number`; 0 for 0."""
    if not number:
        return 0.0
    power = 10.0 ** math.floor(math.log10(number))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= number)


def _tick_label(value: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:,.10g}{suffix}"
    return f"{value:,.10g}"
