"""Draws charts as PNG through matplotlib, the extra `plot`. The page needs none of this."""

from __future__ import annotations

import io
import math
from importlib import import_module
from typing import Any

from ..errors import MissingExtraError
from .charts import COLOURS, BarChart, Chart, LineChart, y_range

DPI = 144


def draw_png(chart: Chart) -> bytes:
    """The chart as a PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        agg = import_module("matplotlib.backends.backend_agg")
        new_figure = import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            "plots as PNG need matplotlib, which is not installed here: pip install"
            " 'crowdmesh-jax[plot]'; report.html and the SVG plots need no extra"
        ) from exc
    # A figure of its own, not pyplot's: no window system, no state shared with the user's plots.
    height = 3.4 if isinstance(chart, LineChart) else 0.32 * len(chart.rows) + 1.4
    figure = new_figure(figsize=(9.0, height), dpi=DPI, layout="constrained")
    agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="semibold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(chart.x_label)
    if isinstance(chart, LineChart):
        _lines(axes, chart)
    else:
        _bars(axes, chart)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _lines(axes: Any, chart: LineChart) -> None:
    for line in chart.lines:
        colour = COLOURS[line.role]
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        ys = [y if math.isfinite(y) else math.nan for y in ys]
        axes.plot(
            xs, ys, label=line.name, color=colour,
            linestyle="--" if line.is_dashed else "-",
            linewidth=0.8 if line.has_marks else 1.6,
            marker="o" if line.has_marks or len(xs) == 1 else None, markersize=4,
        )  # fmt: skip
        if line.band:
            x, low, high = zip(*line.band, strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    for level in chart.levels:
        axes.axhline(level.y, color=COLOURS[level.role], linestyle=":", label=level.name)
    axes.set_ylabel(chart.y_label)
    if chart.is_log:
        axes.set_yscale("log")
    axes.set_ylim(*y_range(chart))
    axes.grid(axis="y", alpha=0.3)
    if chart.lines or chart.levels:
        axes.legend(frameon=False, fontsize=9)


def _bars(axes: Any, chart: BarChart) -> None:
    x_max = chart.x_max or max((bar.end for bar in chart.bars), default=1.0) or 1.0
    for bar in chart.bars:
        colour = COLOURS[bar.role]
        axes.broken_barh(
            [(bar.start, bar.end - bar.start)],
            (bar.row - 0.42, 0.84),
            facecolors=colour,
            alpha=0.4 if bar.is_predicted else 1.0,
            edgecolor=colour if bar.is_predicted else "white",
            linewidth=0.5,
        )
        if bar.text and (bar.end - bar.start) / x_max > 0.008 * len(bar.text) + 0.006:
            dark = bar.is_predicted or bar.role in ("bubble", "backward")
            axes.text(
                (bar.start + bar.end) / 2, bar.row, bar.text, ha="center", va="center",
                fontsize=6.5, color="#2b3440" if dark else "white",
            )  # fmt: skip
    for arrow in chart.arrows:
        axes.plot(
            [arrow.start, arrow.end], [arrow.start_row, arrow.end_row],
            color=COLOURS["link"], linewidth=0.5, alpha=0.7,
        )  # fmt: skip
    for index, row in enumerate(chart.rows):
        if row.note:
            axes.text(x_max * 1.01, index, row.note, va="center", fontsize=8)
    axes.set_yticks(range(len(chart.rows)), [row.label for row in chart.rows])
    axes.invert_yaxis()
    axes.set_xlim(0, x_max)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    handles = _handles(chart)
    if handles:
        axes.legend(
            handles=handles, ncols=min(len(handles), 6), frameon=False, fontsize=8,
            loc="lower right", bbox_to_anchor=(1.0, 1.0),
        )  # fmt: skip


def _handles(chart: BarChart) -> list[Any]:
    patch = import_module("matplotlib.patches").Patch
    handles = [patch(color=COLOURS[role], label=words) for role, words in chart.legend]
    if any(bar.is_predicted for bar in chart.bars):
        handles.append(patch(facecolor="#8a8f98", alpha=0.4, label="pale: predicted"))
    return handles
