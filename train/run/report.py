"""The report of a run: one HTML page, `report.html`, that needs no other file and can be mailed."""

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
MAX_DOTS = 60  # of a line; where there are more points, the line is drawn without dots
NUM_TICKS = 5
WARMUP_FRACTION = 0.02  # of the steps, left out of the y axis' range: the first losses are several times the others
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

HistoryRow = Mapping[str, Any]
Series = list[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of a line, in the drawing's coordinates, and its tooltip."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a chart; `num_not_finite` counts the values that cannot be drawn."""

    name: str
    points: list[Point]
    num_not_finite: int

    @property
    def svg_points(self) -> str:
        """The points as SVG writes them."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)

    @property
    def has_dots(self) -> bool:
        """Whether the points are few enough for dots."""
        return len(self.points) <= MAX_DOTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values, its `ticks` at round numbers, and the drawing's coordinates of both ends."""

    low: float
    high: float
    ticks: list[float]
    start: float
    end: float

    def position(self, value: float) -> float:
        """The drawing's coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over the optimizer's steps; `summary` is the text alternative.

    `highest` is the largest value, if it is above the y axis.
    """

    title: str
    lines: list[Line]
    x_axis: Axis
    y_axis: Axis
    highest: float | None
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHistory:
    """A validation image as a data URI (None: its file is gone), and the model's captions: (when, caption)."""

    picture: str | None
    captions: list[tuple[str, str]]


def write_report(run: Path) -> None:
    """Write `report.html` from the files in the run folder; a sentence stands for what is missing.

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


def _facts(settings: HistoryRow, evaluations: Sequence[HistoryRow], report: HistoryRow) -> list[tuple[str, str, str]]:
    """Names, values and notes of the headline."""
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


def _moment(row: HistoryRow) -> str:
    epoch = row.get("epoch")
    return f"step {row['step']:,}" if epoch is None else f"epoch {epoch:,.4g}, step {row['step']:,}"


def _speed(history: Sequence[HistoryRow], report: HistoryRow) -> list[tuple[str, str]]:
    """The finishing session's counts, and the whole run's rates."""
    table = []
    for phase in ("training", "validation"):
        images, seconds = report.get(f"{phase}_images", 0), report.get(f"{phase}_seconds", 0.0)
        if seconds:
            measured = f"{images:,} images in {seconds:,.1f} s, {images / seconds:,.1f} images/s"
            table.append((f"{phase.capitalize()}, the session that finished the run", measured))
    rates = (
        ("Images/s, median of the run", "train/images_per_second", median, "{:,.1f}"),
        ("Tokens/s, median of the run", "train/tokens_per_second", median, "{:,.0f}"),
        ("Share of time waiting for data, mean of the run", "train/waiting_share", fmean, "{:.1%}"),
        ("GPU memory, most of the run", "train/gpu_gigabytes", max, "{:,.1f} GB"),
    )
    for label, name, summarise, form in rates:
        if values := [value for _, value in _series(history, name)]:
            table.append((label, form.format(summarise(values))))
    return table


def _metric_name(name: str) -> str:
    """The display name of `validation/bleu4` or `validation_bleu4`."""
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


def _samples(run: Path, moments: Mapping[int, str]) -> list[ImageHistory]:
    """The images with their first, middle and last captions; `moments` names the evaluations by their steps."""
    rows = read_rows(run / SAMPLES)
    if not rows:
        return []
    shown = [rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1})]
    return [
        ImageHistory(
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


def _charts(history: Sequence[HistoryRow]) -> list[Chart]:
    """The charts for which the history has values."""
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


def _chart(title: str, history: Sequence[HistoryRow], columns: Mapping[str, str], *, scale: float) -> Chart | None:
    """The chart of some of the history's columns, by display name, times `scale`; None where it has none of them."""
    values = {
        name: [(step, value * scale) for step, value in _series(history, column)]
        for name, column in columns.items()
        if any(column in row for row in history)
    }
    if not values:
        return None
    x_axis = step_axis(max(row["step"] for row in history))
    first_step = WARMUP_FRACTION * x_axis.high
    y_axis = value_axis([value for pairs in values.values() for step, value in pairs if step >= first_step])
    highest = max((value for pairs in values.values() for _, value in pairs), default=0.0)
    moments = {row["step"]: _moment(row) for row in history}
    lines = []
    for name, pairs in values.items():
        points = [
            Point(x=x_axis.position(step), y=y_axis.position(value), text=f"{name}: {value:,.4g}, {moments[step]}")
            for step, value in thin(pairs, MAX_CURVE_POINTS)
        ]
        num_rows = sum(columns[name] in row for row in history)
        lines.append(Line(name=name, points=points, num_not_finite=num_rows - len(pairs)))
    ends = (f"{name} from {pairs[0][1]:,.4g} to {pairs[-1][1]:,.4g}" for name, pairs in values.items() if pairs)
    return Chart(
        title=title,
        lines=lines,
        x_axis=x_axis,
        y_axis=y_axis,
        highest=highest if highest > y_axis.high else None,
        summary="; ".join([title, *ends]),
    )


def _series(history: Sequence[HistoryRow], name: str) -> Series:
    """A column's (step, value) pairs, without the values that were not finite."""
    return [(row["step"], row[name]) for row in history if row.get(name) is not None]


def thin(series: Series, max_points: int) -> Series:
    """At most `max_points` of the values, in their order: the lowest and the highest of each bucket."""
    if len(series) <= max_points:
        return series
    num_buckets = max_points // 2
    edges = [number * len(series) // num_buckets for number in range(num_buckets + 1)]
    buckets = [range(start, end) for start, end in pairwise(edges)]
    extremes = ({f(bucket, key=lambda index: series[index][1]) for f in (min, max)} for bucket in buckets)
    return [series[index] for bucket in extremes for index in sorted(bucket)]


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
    """The smallest of 1, 2 and 5 times a power of ten that is not below `number`; 0 for 0."""
    if not number:
        return 0.0
    power = 10.0 ** math.floor(math.log10(number))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= number)


def _tick_label(value: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:,.10g}{suffix}"
    return f"{value:,.10g}"
