"""The picture of several solvers' plans for one problem: step time by solver. Knows no search."""

from __future__ import annotations

from collections.abc import Sequence

from . import units
from .charts import Bar, BarChart, Row
from .svg import draw_file

_LONGEST = 4.0
"""Bars end at so many times the best; the note beside them tells the rest."""


def compared_chart(title: str, rows: Sequence[tuple[str, float, str]]) -> BarChart:
    """Bars of step seconds, the shortest first.

    Args:
        rows: (name, step seconds or infinity, remark) of each solver.
    """
    ordered = sorted(rows, key=lambda row: (row[1], row[0]))
    best_s = ordered[0][1] if ordered and ordered[0][1] < float("inf") else 1.0
    unit, scale = ("s", 1.0) if best_s >= 2 else ("ms", 1e3)
    most_s = _LONGEST * best_s
    longest_s = max([step_s for _, step_s, _ in ordered if step_s < float("inf")], default=best_s)
    bars, labels = [], []
    for index, (name, step_s, remark) in enumerate(ordered):
        found = step_s < float("inf")
        labels.append(Row(label=name, note=units.seconds(step_s) if found else "no plan"))
        if found:
            bars.append(
                Bar(
                    row=index,
                    start=0.0,
                    end=min(step_s, most_s) * scale,
                    role="first" if step_s <= most_s else "other",
                    tip=f"{name}: {units.seconds(step_s)}; {remark}",
                )
            )
    return BarChart(
        name="solvers",
        title=title,
        x_label=f"{unit} a step, predicted",
        rows=tuple(labels),
        bars=tuple(bars),
        legend=(("first", "step"), ("other", f"more than {_LONGEST:g} times the best, cut off"))
        if longest_s > most_s
        else (("first", "step"),),
        x_max=min(most_s, 1.02 * longest_s) * scale,
    )


def draw_compared(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """The picture as an SVG file."""
    return draw_file(compared_chart(title, rows))
