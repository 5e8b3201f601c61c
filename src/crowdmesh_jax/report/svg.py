"""Draws charts as SVG with nothing but the standard library: a Pi makes its report alone.

In a page, colours are classes (`fill-ROLE`, `line-ROLE`) and follow the reader's light or dark; as
a file the SVG brings a style of its own. Each chart is laid out for a width: at a phone's width
labels stand above their bars instead of beside them, and letters keep their size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from . import units
from .charts import (
    COLOURS,
    Arrow,
    BarChart,
    Chart,
    Line,
    LineChart,
    Row,
    log_ticks,
    nice_ticks,
    tick_text,
    x_range,
    y_range,
)

WIDE, NARROW = 880, 388
FONT = 12
LETTER = 6.7
"""Pixels a letter of the page's font takes at most, on average, at `FONT`."""
NARROW_BELOW = 560


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values to pixels."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        if self.is_log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(value)
        else:
            low, high = self.low, self.high
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def draw(chart: Chart, width: int = WIDE) -> str:
    """The chart as an `<svg>` element for a page that has the styles."""
    body, height = _body(chart, width)
    return _element(chart, body, width, height)


def draw_file(chart: Chart, width: int = WIDE) -> str:
    """The chart as an SVG file of its own: a title, its own style, always on white."""
    body, height = _body(chart, width)
    title = f'<text class="title" x="0" y="16">{escape(chart.title)}</text>'
    inner = (
        f"<style>{file_style()}</style>"
        f'<rect class="paper" x="-12" y="-8" width="{width + 24}" height="{height + 44}"/>'
        f'{title}<g transform="translate(0 30)">{body}</g>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 {width + 24} {height + 44}"'
        f' width="{width + 24}" height="{height + 44}" role="img">'
        f"<title>{escape(chart.title)}</title>{inner}</svg>\n"
    )


def _body(chart: Chart, width: int) -> tuple[str, float]:
    """What is inside the element, and its height."""
    if isinstance(chart, LineChart):
        return _draw_lines(chart, width)
    return _draw_bars(chart, width)


def file_style() -> str:
    """Styles of a file: the page's, with fixed colours."""
    rules = [
        "text{font:12px system-ui,'Segoe UI',Roboto,'Helvetica Neue',sans-serif;fill:#2b3440}",
        "text.title{font-size:14px;font-weight:600}text.quiet{fill:#5b6672}",
        "text.inside{font-size:10px;fill:#fff;text-anchor:middle}text.inside.dark{fill:#2b3440}",
        ".middle{text-anchor:middle}.end{text-anchor:end}.paper{fill:#fff}",
        ".grid{stroke:#e3e7ec;stroke-width:1}.axis{stroke:#aab2bc;stroke-width:1}",
        ".line{fill:none;stroke-width:1.8;stroke-linejoin:round}",
        ".dashed{stroke-dasharray:6 4}.dotted{stroke-dasharray:2 3}",
        ".thin{stroke-width:1}.band{opacity:.18}.predicted{fill-opacity:.35;stroke-width:1}",
        ".arrow{stroke:#cc79a7;stroke-width:.9;fill:none;opacity:.75}.hover{display:none}",
    ]
    for role, colour in COLOURS.items():
        rules.append(f".fill-{role}{{fill:{colour}}}.line-{role}{{stroke:{colour}}}")
    return "".join(rules)


def _element(chart: Chart, body: str, width: int, height: float) -> str:
    kind = "narrow" if width < NARROW_BELOW else "wide"
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {_n(height)}" width="{width}"'
        f' height="{_n(height)}" role="img" aria-label="{escape(chart.title)}">{body}</svg>'
    )


def _n(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}" class="{style}">{escape(text)}</text>'


def _legend(entries: Iterable[tuple[str, str, str]], width: float) -> tuple[list[str], float]:
    """Swatches with words, in as many lines as they need; (role, words, "box" or "line")."""
    out, x, y = [], 0.0, 6.0
    for role, words, kind in entries:
        needed = 20 + LETTER * len(words) + 16
        if x > 0 and x + needed > width:
            x, y = 0.0, y + 18
        if kind == "box":
            out.append(
                f'<rect class="fill-{role}" x="{_n(x)}" y="{_n(y - 6)}" width="12" height="12"'
                ' rx="2"/>'
            )
        elif kind == "predicted":
            out.append(
                f'<rect class="fill-{role} line-{role} predicted" x="{_n(x + 0.5)}"'
                f' y="{_n(y - 5.5)}" width="11" height="11" rx="2"/>'
            )
        elif kind == "mark":
            out.append(f'<circle class="fill-{role}" cx="{_n(x + 7)}" cy="{_n(y)}" r="3.5"/>')
        else:
            dashes = "" if kind == "line" else f" {kind}"
            out.append(
                f'<path class="line line-{role}{dashes}" d="M{_n(x)} {_n(y)}h14" fill="none"/>'
            )
        out.append(_text(x + 19, y + 4, words))
        x += needed
    return out, (y + 20 if out else 0.0)


# Lines -------------------------------------------------------------------------------------------


def _draw_lines(chart: LineChart, width: int) -> tuple[str, float]:
    is_narrow = width < NARROW_BELOW
    entries = [
        (line.role, line.name, "mark" if line.has_marks else "dashed" if line.is_dashed else "line")
        for line in chart.lines
    ]
    entries += [(level.role, level.name, "dotted") for level in chart.levels]
    if len(entries) == 1 and not chart.levels:
        entries = []  # the title says it
    out, top = _legend(entries, width)
    low, high = y_range(chart)
    ticks = log_ticks(low, high) if chart.is_log else nice_ticks(low, high, 5)
    left = max((LETTER * len(tick_text(tick)) for tick in ticks), default=0.0) + 10
    top += 22
    height = top + (190 if is_narrow else 240)
    bottom, right = height, width - 10
    y = _Scale(low, high, bottom, top, chart.is_log)
    x = _Scale(*x_range(chart), left, right)
    out.append(_text(0, top - 12, chart.y_label, "quiet"))
    for tick in ticks:
        out.append(f'<path class="grid" d="M{_n(left)} {_n(y(tick))}H{_n(right)}"/>')
        out.append(_text(left - 6, y(tick) + 4, tick_text(tick), "end quiet"))
    x_ticks = nice_ticks(x.low, x.high, 5 if is_narrow else 10)
    for tick in (tick for tick in x_ticks if float(tick).is_integer()):
        out.append(_text(x(tick), bottom + 16, tick_text(tick), "middle quiet"))
    out.append(f'<path class="axis" d="M{_n(left)} {_n(bottom)}H{_n(right)}"/>')
    out.append(_text((left + right) / 2, bottom + 33, chart.x_label, "middle quiet"))
    for level in chart.levels:
        if low <= level.y <= high:
            out.append(
                f'<path class="line dotted line-{level.role}"'
                f' d="M{_n(left)} {_n(y(level.y))}H{_n(right)}"/>'
            )
    for line in chart.lines:
        out += _draw_line(line, x, y)
    out.append(_hover(chart, x, left, right, top, bottom))
    return "".join(out), height + 40


def _draw_line(line: Line, x: _Scale, y: _Scale) -> Iterable[str]:
    def at(px: float, py: float) -> str:
        return f"{_n(x(px))} {_n(y(py))}"

    def is_drawn(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not y.is_log)

    band = [(px, a, b) for px, a, b in line.band if is_drawn(a) and is_drawn(b)]
    if len(band) > 1:
        there = "L".join(at(px, high) for px, _, high in band)
        back = "L".join(at(px, low) for px, low, _ in reversed(band))
        yield f'<path class="band fill-{line.role}" d="M{there}L{back}Z"/>'
    stretches: list[list[str]] = [[]]
    for px, py in line.points:
        if is_drawn(py):
            stretches[-1].append(at(px, py))
        elif stretches[-1]:
            stretches.append([])
    style = f"line line-{line.role}"
    style += " dashed" if line.is_dashed else ""
    style += " thin" if line.has_marks else ""
    path = "".join(f"M{'L'.join(stretch)}" for stretch in stretches if len(stretch) > 1)
    if path:
        yield f'<path class="{style}" d="{path}"/>'
    for stretch in stretches:
        if line.has_marks or len(stretch) == 1:
            for place in stretch:
                cx, cy = place.split()
                yield f'<circle class="fill-{line.role}" cx="{cx}" cy="{cy}" r="3"/>'


def _hover(
    chart: LineChart, x: _Scale, left: float, right: float, top: float, bottom: float
) -> str:
    """What the page's script shows for the step that is pointed at."""
    series = [
        [line.name, [[round(x(px), 1), tick_text(px), units.plain(py)] for px, py in line.points]]
        for line in chart.lines
    ]
    told = escape(json.dumps(series, separators=(",", ":")), quote=True)
    return (
        f'<g class="hover" data-series="{told}" data-x="{escape(chart.x_label, quote=True)}">'
        f'<path class="axis" d="M0 {_n(top)}V{_n(bottom)}"/></g>'
        f'<rect class="catch" x="{_n(left)}" y="{_n(top)}" width="{_n(right - left)}"'
        f' height="{_n(bottom - top)}" fill="none" pointer-events="all"/>'
    )


# Bars --------------------------------------------------------------------------------------------


def _draw_bars(chart: BarChart, width: int) -> tuple[str, float]:
    is_narrow = width < NARROW_BELOW
    has_predicted = any(bar.is_predicted for bar in chart.bars)
    has_measured = any(not bar.is_predicted for bar in chart.bars)
    kind = "box" if has_measured else "predicted"
    entries = [(role, words, kind) for role, words in chart.legend]
    if has_predicted and has_measured:
        entries.append(("ready", "pale: predicted", "predicted"))
    if chart.arrows:
        entries.append(("link", "frame on its way", "line"))
    out, top = _legend(entries, width)
    top += 6
    label_width = max((LETTER * len(row.label) for row in chart.rows), default=0) + 12
    note_width = max((LETTER * len(row.note) for row in chart.rows), default=0)
    left = 0.0 if is_narrow else label_width
    right = width - (note_width + 8 if note_width else 8)
    places = _rows(chart.rows, top, is_narrow)
    bottom = (places[-1][1] if places else top) + 6
    x_max = chart.x_max or max((bar.end for bar in chart.bars), default=1.0) or 1.0
    x = _Scale(0.0, x_max, left, right)
    for tick in nice_ticks(0.0, x_max, 4 if is_narrow else 8):
        style = "middle quiet tick" if tick else "quiet tick"
        shown = f"{tick_text(tick)}{chart.x_unit}"
        out.append(f'<path class="grid tick" d="M{_n(x(tick))} {_n(top)}V{_n(bottom)}"/>')
        at = min(x(tick), width - LETTER * len(shown) / 2) if tick else x(tick)
        out.append(_text(at, bottom + 15, shown, style))
    for row, (y0, y1, label_y) in zip(chart.rows, places, strict=True):
        if is_narrow:
            out.append(_text(0, label_y, row.label, "quiet" if not row.starts_group else ""))
        else:
            style = "end quiet" if not row.starts_group else "end"
            out.append(_text(left - 8, label_y, row.label, style))
        if row.note:
            out.append(_text(right + 8, (y0 + y1) / 2 + 4, row.note, "quiet"))
    out.append(_bars_inside(chart, x, places, left, right, top, bottom))
    out.append(_text((left + right) / 2, bottom + 32, chart.x_label, "middle quiet"))
    return "".join(out), bottom + 40


def _rows(rows: Sequence[Row], top: float, is_narrow: bool) -> list[tuple[float, float, float]]:
    """(top, bottom, baseline of the label) of each row."""
    places, y = [], top
    for index, row in enumerate(rows):
        if row.starts_group and index:
            y += 8
        label_y = y + 15
        if is_narrow:
            label_y = y + 12
            y += 16
        places.append((y, y + 20, label_y))
        y += 22
    return places


def _bars_inside(
    chart: BarChart,
    x: _Scale,
    places: Sequence[tuple[float, float, float]],
    left: float,
    right: float,
    top: float,
    bottom: float,
) -> str:
    """The bars, cut off at the plot's edges so that the page's script can zoom into them."""
    out, texts = [_arrow(arrow, x, places) for arrow in chart.arrows], []
    for bar in chart.bars:
        y0, y1, _ = places[bar.row]
        x0, x1 = x(bar.start), x(bar.end)
        style = f"fill-{bar.role}"
        style += f" line-{bar.role} predicted" if bar.is_predicted else ""
        tip = f"<title>{escape(bar.tip)}</title>" if bar.tip else ""
        out.append(
            f'<rect class="{style}" x="{_n(x0)}" y="{_n(y0)}" width="{_n(max(x1 - x0, 0.6))}"'
            f' height="{_n(y1 - y0)}" rx="1.5">{tip}</rect>'
        )
        if bar.text and x1 - x0 >= 5.8 * len(bar.text) + 4:
            dark = " dark" if bar.is_predicted or bar.role in ("bubble", "backward") else ""
            middle = (x0 + x1) / 2
            texts.append(_text(middle, (y0 + y1) / 2 + 3.5, bar.text, f"inside{dark}"))
    if not chart.is_zoomable:
        return "".join((*out, *texts))
    clip = f"clip-{chart.name}-{_n(right)}"
    return (
        f'<clipPath id="{clip}"><rect x="{_n(left)}" y="{_n(top - 4)}"'
        f' width="{_n(right - left)}" height="{_n(bottom - top + 8)}"/></clipPath>'
        f'<g class="zoom" clip-path="url(#{clip})" data-left="{_n(left)}" data-right="{_n(right)}"'
        f' data-max="{x.high:.6g}" data-bottom="{_n(bottom)}" data-top="{_n(top)}">'
        f'<rect class="catch" x="{_n(left)}" y="{_n(top)}" width="{_n(right - left)}"'
        f' height="{_n(bottom - top)}" fill="none" pointer-events="all"/>'
        f'<g class="marks">{"".join(out)}</g><g class="labels">{"".join(texts)}</g></g>'
    )


def _arrow(arrow: Arrow, x: _Scale, places: Sequence[tuple[float, float, float]]) -> str:
    """From the edge of one row to the near edge of the other."""
    (top0, bottom0, _), (top1, bottom1, _) = places[arrow.start_row], places[arrow.end_row]
    begin, end = (bottom0, top1) if top1 > top0 else (top0, bottom1)
    tip = f"<title>{escape(arrow.tip)}</title>" if arrow.tip else ""
    path = f"M{_n(x(arrow.start))} {_n(begin)}L{_n(x(arrow.end))} {_n(end)}"
    return f'<path class="arrow" d="{path}">{tip}</path>'
