"""Two runs side by side: what differed in what was asked, and in what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from ..core import values
from . import units
from .figures import (
    StepFigures,
    gantt_chart,
    loss_chart,
    metric_charts,
    shares_chart,
    step_time_chart,
)
from .html import document, figure, table
from .page import badge, describe, notices, plan_html
from .reading import RunView
from .steps import DeviceShares

Pair = tuple[RunView, RunView]
FigurePair = tuple[StepFigures, StepFigures]
ABSENT = "absent"


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """`{"crowd.devices[0].speed": "0.5"}`: each leaf of a configuration by its path."""
    if isinstance(value, Mapping):
        parts = [(f"{prefix}.{key}" if prefix else str(key), v) for key, v in value.items()]
    elif isinstance(value, (list, tuple)):
        if not any(isinstance(item, (Mapping, list, tuple)) for item in value):
            return {prefix: ", ".join(map(str, value))}
        parts = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {prefix: f"{value:.6g}" if isinstance(value, float) else str(value)}
    return {path: text for key, v in parts for path, text in flattened(v, key).items()}


def differences(first: RunView, second: RunView) -> tuple[tuple[str, str, str], ...]:
    """(path, in the first, in the second) of all that differs in configuration and plan."""
    a, b = (
        flattened(
            {**view.config, "plan": values.to_plain(view.plan) if view.plan is not None else {}}
        )
        for view in (first, second)
    )
    paths = sorted({*a, *b})
    return tuple(
        (path, a.get(path, ABSENT), b.get(path, ABSENT))
        for path in paths
        if a.get(path) != b.get(path)
    )


def compare_page(pair: Pair, figures: FigurePair) -> str:
    """The comparison of two runs; the first is A."""
    first, second = pair
    heads = "".join(
        f'<p class="lead"><strong>{letter}</strong> {escape(view.name)}{badge(view.status)}<br>'
        f"{escape(describe(view))}</p>{notices(view)}"
        for letter, view in zip("AB", pair, strict=True)
    )
    top = (
        f'<p class="eyebrow">crowdmesh comparison</p><h1>{escape(first.name)} and'
        f" {escape(second.name)}</h1>{heads}"
    )
    metrics = "".join(f"<h3>{escape(c.title)}</h3>{figure(c)}" for c in metric_charts(pair))
    gantts = "".join(
        f"<h3>{letter}, {escape(view.name)}</h3>{figure(gantt_chart(view, of, f'gantt-{letter}'))}"
        for letter, view, of in zip("AB", pair, figures, strict=True)
        if gantt_chart(view, of)
    )
    plans = "".join(
        f"<h3>{letter}, {escape(view.name)}</h3>{plan_html(view)}"
        for letter, view in zip("AB", pair, strict=True)
    )
    sections = (
        ("summary", "Figures", _figures(pair, figures)),
        ("loss", "Loss and metrics", figure(loss_chart(pair)) + metrics),
        ("step-time", "Step time", figure(step_time_chart(pair))),
        ("shares", "Where the time goes", figure(compared_shares(figures))),
        ("gantt", "One step of each", gantts),
        ("differences", "What differs", _differences(first, second)),
        ("plan", "Plans", plans),
    )
    return document(f"{first.name} and {second.name}: crowdmesh comparison", top, sections)


def compared_shares(figures: FigurePair):
    """Measured shares of both runs, row under row; None: neither has any."""
    sides = [(letter, of.measured_shares, False) for letter, of in zip("AB", figures, strict=True)]
    return shares_chart(sides)


def _figures(pair: Pair, figures: FigurePair) -> str:
    first, second = pair
    rows = [
        _row("measured step", *(view.measured_step_s for view in pair), show=units.seconds),
        _row("predicted step", *(view.predicted_step_s for view in pair), show=units.seconds),
        _row("throughput, samples/s", *map(_throughput, pair), show=_figures_or_dash),
        _row("steps committed", *(float(v.committed) for v in pair), show=lambda v: f"{v:.0f}"),
        _row("last loss", *map(_last_loss, pair), show=_plain_or_dash),
        _row("lowest loss", *map(_lowest_loss, pair), show=_plain_or_dash),
    ]
    for name in ("compute", "link", "ready", "bubble"):
        means = [_mean_share(of.measured_shares, name) for of in figures]
        rows.append(_row(f"{name}, mean over devices", *means, show=units.share))
    return table(
        ("", f"A, {first.name}", f"B, {second.name}", "B against A"),
        [row for row in rows if row[1] != units.MISSING or row[2] != units.MISSING],
    )


def _row(what: str, a: float | None, b: float | None, *, show) -> tuple[str, str, str, str]:
    return escape(what), show(a), show(b), units.change(b, a)


def _figures_or_dash(value: float | None) -> str:
    return units.MISSING if value is None else units.figures(value)


def _plain_or_dash(value: float | None) -> str:
    return units.MISSING if value is None else units.plain(value)


def _throughput(view: RunView) -> float | None:
    batch = view.config.get("job", {}).get("batch_size")
    return batch / view.measured_step_s if batch and view.measured_step_s else None


def _last_loss(view: RunView) -> float | None:
    return view.rows[-1].loss if view.rows else None


def _lowest_loss(view: RunView) -> float | None:
    return min((row.loss for row in view.rows), default=None)


def _mean_share(shares: tuple[DeviceShares, ...], name: str) -> float | None:
    parts = [getattr(share, name) for share in shares]
    return sum(parts) / len(parts) if parts else None


def _differences(first: RunView, second: RunView) -> str:
    found = differences(first, second)
    if not found:
        return "<p>Nothing: configuration and plan are equal.</p>"
    rows = [(f"<code>{escape(p)}</code>", escape(a), escape(b)) for p, a, b in found]
    return table(("in config.toml and plan.json", "A", "B"), rows, left=(0, 1, 2))
