"""The report of a run: one HTML page, `report.html`, that needs no other file and can be mailed."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from captioner.attention import Attention
from captioner.files.storage import read_json_object, write_atomic
from captioner.pages import load_template
from captioner.plots import NUM_TICKS, round_up, thin, value_ticks
from train.evaluation.bootstrap import with_intervals
from train.run.tracking import HISTORY, SAMPLE_IMAGES, SAMPLES, read_rows

SMALL_SIDE_PIXELS = 96  # of the images below the heat maps
SMALL_QUALITY = 75
WARMUP_FRACTION = 0.02  # of the steps, left out of the y axis' range: the first losses are several times the others
WIDTH, HEIGHT = 398.0, 216.0  # of a chart's plot area, in the template's drawing
CHARTS = (
    ("Loss", {"training": "train/loss", "validation": "validation/loss"}),
    ("CIDEr and BLEU-4", {"CIDEr": "validation/cider", "BLEU-4": "validation/bleu4"}),
)
METRIC_NAMES = {f"bleu{n}": f"BLEU-{n}" for n in range(1, 5)} | {
    "cider": "CIDEr",
    "rouge_l": "ROUGE-L",
    "repeated_trigrams": "Repeated trigram",
    "dangling_ends": "Dangling end",
    "different_captions": "Different captions",
    "mean_tokens": "Mean tokens",
}

HistoryRow = Mapping[str, Any]
Ticks = list[tuple[float, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over the optimizer's steps, by name, as the points of SVG polylines; `summary` is the text alternative.

    Ticks are positions in the plot area, with labels. `notes` say what cannot be drawn.
    """

    title: str
    lines: dict[str, str]
    x_ticks: Ticks
    y_ticks: Ticks
    notes: list[str]
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image, and its first, middle and last (when, caption) of training. Images are data URIs, "" if gone.

    `words` are those of the last caption with attention: each word, where it looked in words, and its heat map.
    """

    image: str
    small_image: str
    captions: list[tuple[str, str]]
    words: list[tuple[str, str, str]]


def write_report(run: Path) -> None:
    """Write `report.html` from the files in the run folder; a sentence stands for what is missing.

    Raises UserError where one of its files is damaged.
    """
    history, settings, report = read_rows(run / HISTORY), _read(run / "settings.json"), _read(run / "report.json")
    evaluations = [row for row in history if any(name.startswith("validation/") for name in row)]
    columns = list(dict.fromkeys(name for row in evaluations for name in row if name.startswith("validation/")))
    charts = (_chart(title, history, lines) for title, lines in CHARTS)
    page = load_template(Path(__file__).with_name("report.html.j2")).render(
        title=run.resolve().name,
        now=datetime.now().astimezone(),
        facts=_facts(settings, evaluations, report),
        charts=[chart for chart in charts if chart],
        width=WIDTH,
        height=HEIGHT,
        metrics=[
            (_metric_name(name), _number(value) + (f" ({_number(own.low)} to {_number(own.high)})" if own else ""))
            for name, (value, own) in with_intervals(_read(run / "metrics.json")).items()
        ],
        evaluation_header=["Evaluation", *map(_metric_name, columns)],
        evaluations=[
            [_moment(row), *(_number(row[name]) if name in row else "" for name in columns)] for row in evaluations
        ],
        samples=_samples(run, {row["step"]: _moment(row) for row in evaluations}),
        settings=[
            (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else value)
            for name, value in settings.items()
            if not isinstance(value, dict)  # fingerprints
        ],
    )
    write_atomic(str(run / "report.html"), page.encode("utf-8", "replace"))  # a caption may hold half a surrogate pair


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(str(path), remedy="delete it") if path.exists() else {}


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
        time = f"{seconds / 60:,.1f} minutes" if seconds < 3600 else f"{seconds / 3600:,.2f} hours"
        facts.append(("Training time", time, note))
    return facts


def _moment(row: HistoryRow) -> str:
    epoch = row.get("epoch")
    return f"step {row['step']:,}" if epoch is None else f"epoch {epoch:,.4g}, step {row['step']:,}"


def _metric_name(name: str) -> str:
    """The display name of `validation/bleu4` or `validation_loss`."""
    short = name.removeprefix("validation/").removeprefix("validation_")
    return METRIC_NAMES.get(short, short.replace("_", " ").capitalize())


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


# ---- samples --------------------------------------------------------------------------------------------------


def _samples(run: Path, moments: Mapping[int, str]) -> list[Sample]:
    """The sample images and captions. `moments` names the evaluations by their steps."""
    rows = read_rows(run / SAMPLES)
    shown = [rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1}) if rows]
    times = [moments.get(row["step"], f"step {row['step']:,}") for row in shown]
    captions = list(zip(*(row["captions"] for row in shown), strict=False))
    attention = shown[-1].get("attention") or [None] * len(captions) if shown else []
    return [
        _sample(run / SAMPLE_IMAGES / f"{number:02d}.jpg", list(zip(times, texts, strict=True)), seen)
        for number, (texts, seen) in enumerate(zip(captions, attention, strict=False))
    ]


def _sample(file: Path, captions: list[tuple[str, str]], seen: Mapping[str, Any] | None) -> Sample:
    if not file.exists():
        return Sample(image="", small_image="", captions=captions, words=[])
    jpeg = file.read_bytes()
    words = _words(Attention.from_json(seen)) if seen else []
    return Sample(
        image=_data_uri(jpeg, "jpeg"), small_image=_small(jpeg) if words else "", captions=captions, words=words
    )


def _words(attention: Attention) -> list[tuple[str, str, str]]:
    """Each word, where it looked in words, and its heat map."""
    heat_maps = (_encode(each, "png", optimize=True) for each in attention.heat_maps())
    return list(zip(map(str.strip, attention.words), attention.texts(), heat_maps, strict=True))


def _small(jpeg: bytes) -> str:
    image = Image.open(io.BytesIO(jpeg))
    return _encode(image.resize((SMALL_SIDE_PIXELS,) * 2), "jpeg", quality=SMALL_QUALITY)


def _encode(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return _data_uri(buffer.getvalue(), kind)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---- charts ---------------------------------------------------------------------------------------------------


def _chart(title: str, history: Sequence[HistoryRow], columns: Mapping[str, str]) -> Chart | None:
    """The chart of some of the history's columns, by display name; None where it has none of them."""
    rows = {name: [row for row in history if column in row] for name, column in columns.items()}
    rows = {name: found for name, found in rows.items() if found}
    if not rows:
        return None
    last_step = max(row["step"] for row in history)
    points = {
        name: [(row["step"], row[columns[name]]) for row in found if row[columns[name]] is not None]
        for name, found in rows.items()
    }
    later = [y for pairs in points.values() for x, y in pairs if x >= WARMUP_FRACTION * last_step]
    x_tick, y_ticks = max(1.0, round_up(last_step / NUM_TICKS)), value_ticks(later)
    low, high = y_ticks[0], y_ticks[-1]

    def x_of(step: float) -> float:
        return WIDTH * step / max(1, last_step)

    def y_of(value: float) -> float:
        return HEIGHT * (high - value) / (high - low)

    notes = []
    highest = max((y for pairs in points.values() for _, y in pairs), default=low)
    if highest > high:
        notes.append(f"The first values, up to {highest:,.4g}, are above the drawing.")
    for name, found in rows.items():
        if missing := len(found) - len(points[name]):
            notes.append(f"{name}: {missing:,} of {len(found):,} values were not finite and cannot be drawn.")
    ends = (f"{name} from {pairs[0][1]:,.4g} to {pairs[-1][1]:,.4g}" for name, pairs in points.items() if pairs)
    return Chart(
        title=title,
        lines={
            name: " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in thin(pairs)) for name, pairs in points.items()
        },
        x_ticks=[(x_of(n * x_tick), f"{n * x_tick:,.10g}") for n in range(int(last_step / x_tick) + 1)],
        y_ticks=[(y_of(value), f"{value:,.10g}") for value in y_ticks],
        notes=notes,
        summary="; ".join([title, *ends]),
    )
