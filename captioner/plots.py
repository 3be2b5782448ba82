"""Plots as SVG: bars, lines over steps, and pictures with their captions. Readable in light and dark mode.

from captioner.plots import bars
Path("speed.svg").write_text(bars("Images a second", {"ours": 2967, "theirs": 1709}, best="ours").svg)

A notebook shows a plot that a cell returns. Equal input gives equal bytes.
"""

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

WIDTH = 720
MARGIN = 16
ROW, BAR = 26, 16  # pixels from bar to bar, and of a bar
LETTER = 7.0  # width of a letter of 13 pixels, on average
PLOT_HEIGHT = 240
NUM_TICKS = 5
MAX_POINTS = 500
STYLE = """
.plot { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; }
.plot .ground { fill: #ffffff; stroke: #d9d9d4; } .plot text { fill: #1c1c1a; } .plot .quiet { fill: #595955; }
.plot .title { font-size: 15px; font-weight: 600; } .plot .bar { fill: #8f8f8a; } .plot .best { fill: #0a58c2; }
.plot .rule { stroke: #d9d9d4; } .plot .limit { stroke: #b04a00; stroke-width: 2; }
.plot polyline { fill: none; stroke-width: 2; stroke-linejoin: round; } .plot .line-1 { stroke: #0a58c2; }
.plot .line-2 { stroke: #b04a00; stroke-dasharray: 6 4; } .plot .line-3 { stroke: #1d7a37; stroke-dasharray: 2 3; }
@media (prefers-color-scheme: dark) {
.plot .ground { fill: #1f1f21; stroke: #38383b; } .plot text { fill: #ebebe8; } .plot .quiet { fill: #adada8; }
.plot .bar { fill: #85858a; } .plot .best { fill: #7db3ff; } .plot .rule { stroke: #38383b; }
.plot .limit { stroke: #ffab66; } .plot .line-1 { stroke: #7db3ff; } .plot .line-2 { stroke: #ffab66; }
.plot .line-3 { stroke: #79d294; }
}
"""

Ticks = list[float]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, repr=False)
class Plot:
    """An SVG document."""

    title: str
    svg: str

    def __repr__(self) -> str:
        return f"Plot({self.title!r})"

    def _repr_svg_(self) -> str:  # what notebooks show
        return self.svg


def bars(
    title: str,
    values: Mapping[str, float | None],
    *,
    labels: Mapping[str, str] | None = None,
    limits: Mapping[str, float] | None = None,
    best: str | None = None,
    note: str = "",
) -> Plot:
    """A horizontal bar for each value, by name, labelled with the value or the name's text in `labels`.

    A value of None has no bar. `limits` are drawn as marks across the bars; `best` has its own colour; `note` says
    where the values come from.
    """
    labels, limits = labels or {}, limits or {}
    texts = {
        name: labels.get(name, "not measured" if value is None else short_number(value))
        for name, value in values.items()
    }
    lines = [line for name in values for line in _wrap(name, width=48)]
    left = MARGIN + LETTER * max(map(len, lines), default=0) + 8
    right = MARGIN + LETTER * max(map(len, texts.values()), default=0) + 8
    longest = max((value for value in (*values.values(), *limits.values()) if value), default=1.0)
    scale = (WIDTH - left - right) / longest
    parts, y = [], 58.0
    for name, value in values.items():
        wrapped = _wrap(name, width=48)
        height = ROW + 16 * (len(wrapped) - 1)
        for number_of_line, line in enumerate(wrapped):
            parts.append(_text(left - 8, y + 13 + 16 * number_of_line, line, anchor="end"))
        length = scale * max(0.0, value or 0.0)
        kind = "best" if name == best else "bar"
        parts.append(f'<rect class="{kind}" x="{left:.1f}" y="{y:.1f}" width="{length:.1f}" height="{BAR}" rx="2"/>')
        if name in limits:
            at = left + scale * limits[name]
            parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 3:.1f}" y2="{y + BAR + 3:.1f}"/>')
        end = max(length, scale * limits.get(name, 0.0))
        parts.append(_text(left + end + 7, y + 13, texts[name]))
        y += height
    summary = f"{title}. " + "; ".join(f"{name}: {text}" for name, text in texts.items())
    return _document(title, summary, parts, height=y + 4, note=note)


def lines(title: str, curves: Mapping[str, Points], *, x_label: str = "step", note: str = "") -> Plot:
    """Up to three curves through (x, y) points, by name; values that are not finite are left out."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    last = max((x for points in finite.values() for x, _ in points), default=0) or 1
    y_ticks = value_ticks([y for points in finite.values() for _, y in points])
    low, high = y_ticks[0], y_ticks[-1]
    left, top, width = 64.0, 78.0, WIDTH - 64 - 2 * MARGIN

    def at(x: float, y: float) -> str:
        return f"{left + width * x / last:.1f},{top + PLOT_HEIGHT * (high - y) / (high - low):.1f}"

    parts = []
    for tick in y_ticks:
        y = top + PLOT_HEIGHT * (high - tick) / (high - low)
        parts.append(f'<line class="rule" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:,.10g}", anchor="end", kind="quiet"))
    step = round_up(last / NUM_TICKS)
    for tick in (index * step for index in range(int(last / step) + 1)):
        label = _text(
            left + width * tick / last, top + PLOT_HEIGHT + 20, f"{tick:,.10g}", anchor="middle", kind="quiet"
        )
        parts.append(label)
    parts.append(_text(left + width / 2, top + PLOT_HEIGHT + 40, x_label, anchor="middle", kind="quiet"))
    x = left
    for index, (name, points) in enumerate(finite.items(), start=1):
        parts.append(f'<polyline class="line-{index}" points="{x:.1f},54 {x + 28:.1f},54"/>')
        parts.append(_text(x + 36, 58, name))
        x += 36 + LETTER * len(name) + 28
        parts.append(f'<polyline class="line-{index}" points="{" ".join(at(*point) for point in thin(points))}"/>')
    ends = (f"{name} from {points[0][1]:,.4g} to {points[-1][1]:,.4g}" for name, points in finite.items() if points)
    return _document(title, f"{title}: {'; '.join(ends)}", parts, height=top + PLOT_HEIGHT + 52, note=note)


def pictures(title: str, shown: Sequence[tuple[Image.Image | np.ndarray, str]], *, columns: int = 4) -> Plot:
    """Images, or arrays (H, W, 3) of uint8, in rows, each with its text below; JPEGs inside the SVG."""
    cell = (WIDTH - 2 * MARGIN) / columns
    letters = max(8, int((cell - 12) / LETTER))
    parts, y = [], 46.0
    for start in range(0, len(shown), columns):
        row = [(_as_image(image), _wrap(text, width=letters)) for image, text in shown[start : start + columns]]
        height = max((cell - 12) * image.height / image.width for image, _ in row)
        for column, (image, wrapped) in enumerate(row):
            x = MARGIN + column * cell
            parts.append(
                f'<image x="{x:.1f}" y="{y:.1f}" width="{cell - 12:.1f}" '
                f'height="{(cell - 12) * image.height / image.width:.1f}" href="{_data_uri(image)}"/>'
            )
            parts += [_text(x, y + height + 16 * (index + 1), line) for index, line in enumerate(wrapped)]
        y += height + 16 * max(len(wrapped) for _, wrapped in row) + 18
    return _document(title, f"{title}: {'; '.join(text for _, text in shown)}", parts, height=y)


# ---- ticks ------------------------------------------------------------------------------------------------


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The first of the points, and every k-th up to the last, about MAX_POINTS; a single one twice: a dot."""
    stride = max(1, -(-len(points) // MAX_POINTS))
    return [*points[:1], *points[::-stride][::-1]]


def value_ticks(values: Sequence[float]) -> Ticks:
    """Round numbers at equal distances, around all values and zero."""
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    tick = round_up((high - low) / NUM_TICKS) or 1.0
    return [index * tick for index in range(math.floor(low / tick), max(1, math.ceil(high / tick)) + 1)]


def round_up(value: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `value`; 0 for 0."""
    if not value:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= value)


def short_number(value: float) -> str:
    """A number with three digits that matter, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---- SVG --------------------------------------------------------------------------------------------------


def _document(title: str, summary: str, parts: Sequence[str], *, height: float, note: str = "") -> Plot:
    notes = _wrap(note, width=100) if note else []
    below = [_text(MARGIN, height + 14 + 17 * index, line, kind="quiet") for index, line in enumerate(notes)]
    total = math.ceil(height + 17 * len(notes) + MARGIN / 2)
    return Plot(
        title,
        "\n".join(
            [
                f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" '
                f'height="{total}" role="img" aria-label="{escape(summary)}">',
                f"<title>{escape(summary)}</title>",
                f"<style>{STYLE}</style>",
                f'<rect class="ground" x=".5" y=".5" width="{WIDTH - 1}" height="{total - 1}" rx="8"/>',
                _text(MARGIN, 30, title, kind="title"),
                *parts,
                *below,
                "</svg>",
                "",
            ]
        ),
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _wrap(text: str, *, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
