"""From a run to its charts: which series, which rows, which words. Draws nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core import MemoryBreakdown, PipelinePlan
from ..errors import RecordError
from ..record import TraceEvent
from . import units
from .charts import (
    SERIES,
    Arrow,
    Bar,
    BarChart,
    Chart,
    Level,
    Line,
    LineChart,
    Row,
    thinned,
)
from .reading import DeviceMemory, RunView
from .recovered import recovery_chart, recovery_gantts
from .steps import (
    SHARES,
    TRANSFERS,
    CutUse,
    DeviceShares,
    Window,
    cut_uses,
    device_shares,
    eras,
    median_window,
    predicted_shares,
    predicted_step,
    windows,
)

MOST_ARROWS = 160
MOST_METRICS = 6
LOG_RATIO = 25.0
"""Losses that fall by more than this are drawn on a logarithmic axis."""
SHARE_WORDS = {
    "compute": "compute",
    "update": "update",
    "link": "waiting for a link",
    "ready": "ready, not run",
    "bubble": "bubble",
}
MEMORY_TERMS = (
    ("parameter_bytes", "parameters", "first"),
    ("gradient_bytes", "gradients", "second"),
    ("optimizer_bytes", "optimizer", "third"),
    ("stash_bytes", "activations", "fourth"),
    ("credit_bytes", "frames", "backward"),
    ("state_bytes", "statistics", "link"),
    ("working_bytes", "working", "update"),
    ("program_bytes", "programs", "compute"),
    ("snapshot_bytes", "snapshots", "ready"),
    ("log_bytes", "boundary log", "ready"),
    ("hosted_bytes", "hosted copies", "ready"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """What the trace says of steps; empty where there is none.

    Of a run that lost a device: of the stretch before, unless that holds no whole step.
    """

    plan: PipelinePlan | None
    """The one in force then."""
    window: Window | None
    """The step that is drawn."""
    events: tuple[TraceEvent, ...]
    """Measured ones of all kept steps."""
    predicted: tuple[TraceEvent, ...]
    """Of the step that is drawn, on the same clock."""
    measured_shares: tuple[DeviceShares, ...]
    predicted_shares: tuple[DeviceShares, ...]
    cuts: tuple[CutUse, ...]
    kept_steps: int
    """Steps that the shares are taken over."""


def step_figures(view: RunView, step: int | None = None) -> StepFigures:
    """Chooses the step to draw and sums up all kept ones.

    Args:
        step: Draw this one; None: the one of median length.

    Raises:
        RecordError: The trace does not hold that step whole.
    """
    plan = view.plan
    measured = tuple(event for event in view.events if not event.predicted)
    stretches = eras(plan, view.recoveries, measured) if plan else ()
    whole = [windows(era.plan, era.of(measured)) for era in stretches]
    if step is None:
        number = next((i for i, found in enumerate(whole) if found), 0)
    else:
        number = next((i for i, ws in enumerate(whole) if any(w.step == step for w in ws)), 0)
    found: Sequence[Window] = ()
    if stretches:
        found, plan = whole[number], stretches[number].plan
        measured = stretches[number].of(measured)
    window = median_window(found)
    if step is not None:
        window = next((w for w in found if w.step == step), None)
        if window is None:
            held = ", ".join(str(w.step) for ws in whole for w in ws) or "none"
            raise RecordError(
                f"{view.path}: its trace does not hold step {step} whole; it holds {held}"
            )
    late = [w for w in found if w.step >= 2] or list(found)
    predicted: tuple[TraceEvent, ...] = ()
    shares: tuple[DeviceShares, ...] = ()
    if plan and plan == view.plan and view.prediction and view.timeline:
        shares = predicted_shares(plan, view.prediction, view.timeline)
        if window:
            predicted = predicted_step(
                plan, view.prediction, view.timeline, step=window.step, start_s=window.start_s
            )
    elif window:  # a run of an older release: the trace alone holds what was predicted
        predicted = tuple(e for e in view.events if e.predicted and e.step == window.step)
    return StepFigures(
        plan=plan,
        window=window,
        events=measured,
        predicted=predicted,
        measured_shares=device_shares(plan, measured, late) if plan else (),
        predicted_shares=shares,
        cuts=cut_uses(plan, measured, late) if plan else (),
        kept_steps=len(late),
    )


# Over steps --------------------------------------------------------------------------------------


def loss_chart(views: Sequence[RunView]) -> LineChart | None:
    """Training loss, and the loss of evaluations where there are any; None: no step was made."""
    chart = _over_steps("loss", "Loss", views, lambda view: _column(view, None))
    ys = [y for line in chart.lines for _, y in line.points if math.isfinite(y)] if chart else []
    if chart and ys and min(ys) > 0 and max(ys) / min(ys) > LOG_RATIO:
        return _with_log(chart)
    return chart


def metric_charts(views: Sequence[RunView]) -> tuple[LineChart, ...]:
    """One per metric, the first few."""
    names = [n for v in views for row in v.rows[:1] for n in row.metrics]
    names += [n for v in views for row in v.evals[:1] for n in row.values if n != "loss"]
    found = []
    for name in list(dict.fromkeys(names))[:MOST_METRICS]:
        title = name[:1].upper() + name[1:]
        chart = _over_steps(
            f"metric-{name}", title, views, lambda view, name=name: _column(view, name)
        )
        if chart:
            found.append(chart)
    return tuple(found)


def _column(view: RunView, name: str | None) -> tuple[list, list]:
    """(training, evaluation) points of a metric; None: of the loss."""
    if name is None:
        train = [(float(row.step), row.loss) for row in view.rows]
    else:
        train = [(float(r.step), r.metrics[name]) for r in view.rows if name in r.metrics]
    key = name or "loss"
    return train, [(float(e.step), e.values[key]) for e in view.evals if key in e.values]


def _over_steps(name, title, views, column) -> LineChart | None:
    lines = []
    for index, view in enumerate(views):
        train, evaluated = column(view)
        prefix = f"{_letter(index)} " if len(views) > 1 else ""
        if train:
            points, band = thinned(train)
            lines.append(
                Line(
                    name=f"{prefix}training", points=points, band=band, role=SERIES[index],
                    is_dashed=index == 1,
                )
            )  # fmt: skip
        if evaluated:
            role = "evaluation" if len(views) == 1 else SERIES[index]
            points, _ = thinned(evaluated)
            lines.append(Line(name=f"{prefix}evaluation", points=points, role=role, has_marks=True))
    if not lines:
        return None
    return LineChart(
        name=name, title=title, x_label="step", y_label=title.lower(), lines=tuple(lines)
    )


def _with_log(chart: LineChart) -> LineChart:
    return LineChart(
        name=chart.name, title=chart.title, x_label=chart.x_label,
        y_label=f"{chart.y_label} (logarithmic)", lines=chart.lines, is_log=True,
    )  # fmt: skip


def step_time_chart(views: Sequence[RunView]) -> LineChart | None:
    """Seconds from commit to commit, and what was predicted."""
    times = [row.step_s for view in views for row in view.rows if row.step_s is not None]
    if not times:
        return None
    unit, scale = ("s", 1.0) if max(times) >= 2 else ("ms", 1e3)
    lines, levels = [], []
    for index, view in enumerate(views):
        prefix = f"{_letter(index)} " if len(views) > 1 else ""
        made = [(float(r.step), r.step_s * scale) for r in view.rows if r.step_s is not None]
        points, band = thinned(made)
        if points:
            lines.append(
                Line(
                    name=f"{prefix}measured", points=points, band=band, role=SERIES[index],
                    is_dashed=index == 1,
                )
            )  # fmt: skip
        if view.predicted_step_s is not None:
            role = "level" if len(views) == 1 else SERIES[index]
            name = f"{prefix}predicted {units.seconds(view.predicted_step_s)}"
            levels.append(Level(y=view.predicted_step_s * scale, name=name, role=role))
    return LineChart(
        name="step-time", title="Step time", x_label="step", y_label=f"{unit} per step",
        lines=tuple(lines), levels=tuple(levels), floor=0.0,
    )  # fmt: skip


def _letter(index: int) -> str:
    return "AB"[index]


# One step ----------------------------------------------------------------------------------------


def gantt_chart(view: RunView, figures: StepFigures, name: str = "gantt") -> BarChart | None:
    """The drawn step, a row per device measured and one predicted; None: no step was kept whole."""
    plan, window = figures.plan, figures.window
    if plan is None or window is None:
        return None
    mine = [e for e in figures.events if e.step == window.step]
    both = [*mine, *figures.predicted]
    end_s = max(e.end_s for e in both if e.kind not in TRANSFERS)
    unit, scale = ("s", 1.0) if end_s - window.start_s >= 2 else ("ms", 1e3)
    rows: list[Row] = []
    place: dict[tuple[str, bool], int] = {}
    for device in plan.devices:
        place[device, False] = len(rows)
        rows.append(Row(label=device))
        if figures.predicted:
            place[device, True] = len(rows)
            rows.append(Row(label="predicted", starts_group=False))
    bars = [
        Bar(
            row=place[e.device, e.predicted],
            start=(e.start_s - window.start_s) * scale,
            end=(e.end_s - window.start_s) * scale,
            role=_role(e),
            text="" if e.microbatch is None else str(e.microbatch),
            tip=_tip(e, window),
            is_predicted=e.predicted,
        )
        for e in both
        if e.kind not in TRANSFERS and (e.device, e.predicted) in place
    ]
    return BarChart(
        name=name,
        title=f"Step {window.step}, predicted and measured" if figures.predicted
        else f"Step {window.step}, measured",
        x_label=f"{unit} since step {window.step} began",
        rows=tuple(rows),
        bars=tuple(bars),
        legend=_gantt_legend(bars),
        arrows=tuple(_arrows(mine, place, window, scale)),
        is_zoomable=True,
        x_max=(end_s - window.start_s) * scale * 1.005,
    )  # fmt: skip


def _gantt_legend(bars: Iterable[Bar]) -> tuple[tuple[str, str], ...]:
    words = {"forward": "forward", "backward": "backward", "update": "update", "other": "other"}
    used = {bar.role for bar in bars}
    return tuple((role, text) for role, text in words.items() if role in used)


def _role(event: TraceEvent) -> str:
    return event.kind if event.kind in ("forward", "backward", "update") else "other"


def _tip(event: TraceEvent, window: Window) -> str:
    what = event.kind if event.microbatch is None else f"{event.kind} of {event.microbatch}"
    how = ", predicted" if event.predicted else ""
    length_s, at_s = event.end_s - event.start_s, event.start_s - window.start_s
    return f"{event.device}: {what}{how}, {units.seconds(length_s)}, at {units.seconds(at_s)}"


def _arrows(
    events: Iterable[TraceEvent],
    place: dict[tuple[str, bool], int],
    window: Window,
    scale: float,
) -> list[Arrow]:
    arrows = [
        Arrow(
            start_row=place[e.peer, False],
            start=(e.start_s - window.start_s) * scale,
            end_row=place[e.device, False],
            end=(e.end_s - window.start_s) * scale,
            tip=(
                f"{e.label} of {e.microbatch}, {e.peer} to {e.device}:"
                f" {units.seconds(e.end_s - e.start_s)}"
            ),
        )
        for e in events
        if e.kind == "receive"
        and e.peer
        and (e.peer, False) in place
        and (e.device, False) in place
    ]
    return arrows if len(arrows) <= MOST_ARROWS else []


def shares_chart(
    sides: Sequence[tuple[str, Sequence[DeviceShares], bool]], name: str = "shares"
) -> BarChart | None:
    """Shares of the step per device.

    Args:
        sides: (label of the rows, shares, is predicted), each side one row per device.
    """
    sides = [side for side in sides if side[1]]
    if not sides:
        return None
    devices = list(dict.fromkeys(s.device for _, shares, _ in sides for s in shares))
    rows, bars = [], []
    for device in devices:
        is_first = True
        for label, shares, is_predicted in sides:
            mine = next((s for s in shares if s.device == device), None)
            if mine is None:
                continue
            shown = f"{device} {label}".strip() if is_first else label
            rows.append(Row(label=shown, starts_group=is_first))
            is_first = False
            at = 0.0
            for share in SHARES:
                part = 100 * getattr(mine, share)
                if part <= 0:
                    continue
                told = units.share(part / 100)
                bars.append(
                    Bar(
                        row=len(rows) - 1, start=at, end=at + part, role=share,
                        text=told if part >= 5 else "",
                        tip=f"{device}, {label or 'measured'}: {SHARE_WORDS[share]} {told}",
                        is_predicted=is_predicted,
                    )
                )  # fmt: skip
                at += part
    return BarChart(
        name=name, title="Where the step's time goes", x_label="share of the step",
        rows=tuple(rows), bars=tuple(bars), legend=tuple(SHARE_WORDS.items()), x_max=100.0,
        x_unit=" %",
    )  # fmt: skip


def memory_chart(view: RunView) -> BarChart | None:
    """Bytes per device: measured above predicted; without a measurement the planner's terms."""
    if view.plan is None:
        return None
    if view.memory:
        return _measured_memory(view.plan, view.memory)
    if view.prediction and view.prediction.memory:
        return _planned_memory(view.plan, view.prediction.memory)
    return None


def _measured_memory(plan: PipelinePlan, found: Mapping[str, DeviceMemory]) -> BarChart:
    rows, bars = [], []
    top = max(max(m.measured_bytes, m.predicted_bytes or 0.0) for m in found.values())
    scale, unit = _unit(top)
    for device in dict.fromkeys((*plan.devices, *found)):
        memory = found.get(device)
        if memory is None:
            continue
        pairs = (
            (device, memory.measured_bytes, False),
            ("predicted", memory.predicted_bytes, True),
        )
        for label, value, is_predicted in pairs:
            if value is None:
                continue
            rows.append(Row(label=label, starts_group=not is_predicted, note=units.size(value)))
            how = "predicted" if is_predicted else "measured"
            bars.append(
                Bar(
                    row=len(rows) - 1, start=0.0, end=value / scale, role="first",
                    tip=f"{device}, {how} above idle: {units.size(value)}",
                    is_predicted=is_predicted,
                )
            )  # fmt: skip
    return BarChart(
        name="memory", title="Memory above an idle agent", x_label=unit, rows=tuple(rows),
        bars=tuple(bars), legend=(("first", "peak above idle"),), x_max=1.02 * top / scale or None,
    )  # fmt: skip


def _planned_memory(plan: PipelinePlan, found: Mapping[str, MemoryBreakdown]) -> BarChart:
    rows, bars, used = [], [], set()
    top = max(memory.training_bytes for memory in found.values())
    scale, unit = _unit(top)
    for device in plan.devices:
        memory = found.get(device)
        if memory is None:
            continue
        rows.append(Row(label=device, note=units.size(memory.training_bytes)))
        at = 0.0
        for name, words, role in MEMORY_TERMS:
            part = getattr(memory, name)
            if part > 0:
                used.add(words)
                bars.append(
                    Bar(
                        row=len(rows) - 1, start=at / scale, end=(at + part) / scale, role=role,
                        tip=f"{device}, predicted: {words} {units.size(part)}",
                    )
                )  # fmt: skip
                at += part
    legend = tuple((role, words) for _, words, role in MEMORY_TERMS if words in used)
    return BarChart(
        name="memory", title="Memory for training, predicted", x_label=unit, rows=tuple(rows),
        bars=tuple(bars), legend=legend, x_max=1.02 * top / scale or None,
    )  # fmt: skip


def _unit(top_bytes: float) -> tuple[float, str]:
    """What to divide bytes by, and what they are then."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB")):
        if top_bytes >= scale:
            return scale, unit
    return 1e3, "kB"


def memory_terms(memory: MemoryBreakdown) -> tuple[tuple[str, int], ...]:
    """(term, bytes) of those that are not 0."""
    return tuple((w, getattr(memory, n)) for n, w, _ in MEMORY_TERMS if getattr(memory, n))


def all_charts(view: RunView, figures: StepFigures) -> tuple[Chart, ...]:
    """Every chart of one run that its folder holds the figures for, in the page's order."""
    sides = (("", figures.measured_shares, False), ("predicted", figures.predicted_shares, True))
    found = (
        loss_chart([view]),
        *metric_charts([view]),
        step_time_chart([view]),
        recovery_chart(view),
        *recovery_gantts(view),
        gantt_chart(view, figures),
        shares_chart(sides),
        memory_chart(view),
    )
    return tuple(chart for chart in found if chart is not None)


def stage_layers(plan: PipelinePlan, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Names of each stage's layers; numbers where the run has no names for them."""
    known = names if len(names) == plan.num_layers else [str(i) for i in range(plan.num_layers)]
    return tuple(tuple(known[i] for i in stage.layers) for stage in plan.stages)
