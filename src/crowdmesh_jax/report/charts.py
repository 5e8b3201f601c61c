"""Charts as values: what is drawn, not how. Two kinds are enough: lines over steps, bars in rows.

`svg.py` draws them for the page and as files, `png.py` through matplotlib. Colours are roles, which
each renderer looks up in `COLOURS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = {
    # Okabe and Ito, "Color Universal Design" (2008): told apart by all common kinds of sight.
    "forward": "#0072b2",
    "backward": "#e69f00",
    "weight": "#d55e00",
    "update": "#009e73",
    "compute": "#0072b2",
    "link": "#cc79a7",
    "ready": "#8a8f98",
    "bubble": "#dfe3e8",
    "other": "#8a8f98",
    "first": "#0072b2",
    "second": "#d55e00",
    "third": "#009e73",
    "fourth": "#cc79a7",
    "evaluation": "#d55e00",
    "level": "#009e73",
}
SERIES = ("first", "second", "third", "fourth")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series. Points whose y is not finite are gaps."""

    name: str
    points: tuple[Point, ...]
    role: str = "first"
    is_dashed: bool = False
    has_marks: bool = False
    """Drawn as separate points joined by a thin line, for values that are far apart."""
    band: tuple[tuple[float, float, float], ...] = ()
    """(x, lowest, highest) where several values were joined into one point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A horizontal line across the chart: a prediction."""

    y: float
    name: str
    role: str = "level"


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart:
    """Series over steps."""

    name: str
    """File name without its ending, and anchor."""
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    levels: tuple[Level, ...] = ()
    is_log: bool = False
    floor: float | None = None
    """The y axis starts here, at the lowest (0 for times)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A piece of a row."""

    row: int
    start: float
    end: float
    role: str
    text: str = ""
    """Inside, where there is room."""
    tip: str = ""
    """Shown when pointed at."""
    is_predicted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A label at the left; a `starts_group` row stands a little off the one before."""

    label: str
    starts_group: bool = True
    note: str = ""
    """At the right end of the row: a total, say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrow:
    """A transfer: from a time in one row to a later time in another."""

    start_row: int
    start: float
    end_row: int
    end: float
    tip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Bars in rows over a common axis that starts at 0."""

    name: str
    title: str
    x_label: str
    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    legend: tuple[tuple[str, str], ...]
    """(role, what it means)"""
    arrows: tuple[Arrow, ...] = ()
    is_zoomable: bool = False
    x_max: float | None = None
    x_unit: str = ""
    """After each number of the axis: "%"."""


Chart = LineChart | BarChart


def thinned(points: Sequence[Point], limit: int = 500) -> tuple[tuple[Point, ...], tuple]:
    """At most `limit` points and a band: neighbours become their mean, lowest and highest.

    Values that are not finite are left out of a mean; a stretch of nothing else is a gap.
    """
    if len(points) <= limit:
        return tuple(points), ()
    shown: list[Point] = []
    band: list[tuple[float, float, float]] = []
    size = math.ceil(len(points) / limit)
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        x = part[len(part) // 2][0]
        finite = [y for _, y in part if math.isfinite(y)]
        if not finite:
            shown.append((x, math.nan))
            continue
        shown.append((x, math.fsum(finite) / len(finite)))
        band.append((x, min(finite), max(finite)))
    return tuple(shown), tuple(band)


NARROWEST = 1e6
"""Of floats between the ends of an axis; with fewer, ticks that should be even are not."""


def nice_ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Round numbers in `low..high`, in steps of 1, 2 or 5 times a power of ten.

    A range too narrow for floats of its size to divide evenly has one: its low end.
    """
    span = high - low
    finest = NARROWEST * math.ulp(max(abs(low), abs(high)))
    if not (span > finest and math.isfinite(span)):
        return (low,)
    raw = span / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(number * step, 12) for number in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 of each decade in `low..high`; powers of ten alone where there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5)
    found = (factor * 10.0**decade for decade in decades for factor in factors)
    return tuple(tick for tick in found if low * 0.999 <= tick <= high * 1.001)


def y_range(chart: LineChart) -> tuple[float, float]:
    """What the y axis spans: all that is drawn, with a little room; never empty."""
    ys = [y for line in chart.lines for _, y in line.points]
    ys += [y for line in chart.lines for _, *both in line.band for y in both]
    ys += [level.y for level in chart.levels]
    ys = [y for y in ys if math.isfinite(y) and (y > 0 or not chart.is_log)]
    if not ys:
        return (0.1, 1.0) if chart.is_log else (0.0, 1.0)
    low, high = min(ys), max(ys)
    if chart.is_log:
        return (low / 1.15, high * 1.15)
    if chart.floor is not None:
        low = min(low, chart.floor)
    room = (high - low) * 0.05 or max(abs(high), 1.0) * 0.05
    return (low if low == chart.floor else low - room), high + room


def x_range(chart: LineChart) -> tuple[float, float]:
    """What the x axis spans; never empty."""
    xs = [x for line in chart.lines for x, _ in line.points]
    low, high = min(xs, default=0.0), max(xs, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def tick_text(value: float) -> str:
    """A tick's number, as short as it is exact."""
    text = f"{value:.10g}"
    return text if len(text) <= 7 else f"{value:.3g}"
