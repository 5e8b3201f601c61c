"""Recoveries of a run: who was lost, who took over, and where the time went. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..record import RECOVERY_ROW, RecoveryEvent, TraceEvent
from . import units
from .charts import Bar, BarChart, Row
from .reading import RunView
from .steps import TRANSFERS, recovery_places

PARTS = (
    ("noticed", "noticed", "bubble"),
    ("fenced", "all stopped", "ready"),
    ("planned", "decided", "second"),
    ("installed", "moved, loaded, replayed", "first"),
    ("first_step", "first step", "third"),
)
"""Of `RecoveryEvent.spans`: name, words, colour."""
MOST_DRAWN = 4
"""Recoveries with a picture of their own."""
STEPS_AROUND = 3
FATES = {"replayed": "link", "dropped": "bubble"}
ROLES = (
    ("forward", "forward"),
    ("backward", "backward"),
    ("update", "update"),
    ("other", "other"),
    ("link", "replayed"),
    ("bubble", "void, done again"),
)


def recovery_chart(view: RunView) -> BarChart | None:
    """Where the time of each recovery went, a row each; None: there was none."""
    events = view.recoveries
    if not events:
        return None
    longest_s = max(event.total_s for event in events)
    unit, scale = ("s", 1.0) if longest_s >= 2 else ("ms", 1e3)
    rows, bars = [], []
    for index, event in enumerate(events):
        rows.append(Row(label=_name(event), note=units.seconds(event.total_s)))
        begin_s = event.spans[0][1]
        for (_, start_s, end_s), (_, words, role) in zip(event.spans, PARTS, strict=True):
            if end_s > start_s:
                bars.append(
                    Bar(
                        row=index, start=(start_s - begin_s) * scale, end=(end_s - begin_s) * scale,
                        role=role, tip=f"{_name(event)}: {words}, {units.seconds(end_s - start_s)}",
                    )
                )  # fmt: skip
    return BarChart(
        name="recovery", title="Where the time of a recovery goes",
        x_label=f"{unit} since the last word of the lost device", rows=tuple(rows),
        bars=tuple(bars), legend=tuple((role, words) for _, words, role in PARTS),
        x_max=1.02 * longest_s * scale,
    )  # fmt: skip


def recovery_gantts(view: RunView) -> tuple[BarChart, ...]:
    """What every device did while the run recovered, for the first recoveries of the trace."""
    places = recovery_places(view.events)
    found, before = [], view.plan
    for event in view.recoveries:
        place = places.get(f"epoch {event.epoch}")
        if place is not None and before is not None and len(found) < MOST_DRAWN:
            after = event.plan.devices if event.plan else ()
            devices = list(dict.fromkeys([*before.devices, *after]))
            found.append(_gantt(view, event, place, devices, len(found) + 1))
        before = event.plan or before
    return tuple(found)


def _gantt(
    view: RunView,
    event: RecoveryEvent,
    place: tuple[float, float],
    devices: Sequence[str],
    number: int,
) -> BarChart:
    around_s = max(STEPS_AROUND * (view.measured_step_s or 0.0), 0.1 * (place[1] - place[0]))
    begin_s, end_s = place[0] - around_s, place[1] + around_s
    unit, scale = ("s", 1.0) if end_s - begin_s >= 2 else ("ms", 1e3)
    rows = [*devices, RECOVERY_ROW]
    bars = [
        Bar(
            row=rows.index(e.device),
            start=(max(e.start_s, begin_s) - begin_s) * scale,
            end=(min(e.end_s, end_s) - begin_s) * scale,
            role=_role(e),
            text=_text(e),
            tip=_tip(e, place[0]),
        )
        for e in view.events
        if e.device in rows
        and not e.predicted
        and e.kind not in TRANSFERS
        and e.end_s > begin_s
        and e.start_s < end_s
        and (e.device != RECOVERY_ROW or e.label == f"epoch {event.epoch}")
    ]
    used = {bar.role for bar in bars if bar.row < len(devices)}
    return BarChart(
        name=f"recovery-{number}",
        title=f"While the run recovered: {_name(event)}",
        x_label=f"{unit}; numbers are microbatches",
        rows=tuple(Row(label=name) for name in rows),
        bars=tuple(bars),
        legend=tuple((role, words) for role, words in ROLES if role in used),
        is_zoomable=True,
        x_max=(end_s - begin_s) * scale,
    )


def _name(event: RecoveryEvent) -> str:
    who = ", ".join(event.lost)
    return f"{who} lost, step {event.base}" if who else f"epoch {event.epoch}, step {event.base}"


def _role(event: TraceEvent) -> str:
    if event.device == RECOVERY_ROW:
        return next(role for name, _, role in PARTS if name == event.kind)
    fate, _, kind = event.kind.rpartition("_")
    if fate in FATES:
        return FATES[fate]
    return kind if kind in ("forward", "backward", "update") else "other"


def _text(event: TraceEvent) -> str:
    if event.device == RECOVERY_ROW:
        return next(words for name, words, _ in PARTS if name == event.kind)
    return "" if event.microbatch is None else str(event.microbatch)


def _tip(event: TraceEvent, origin_s: float) -> str:
    what = event.kind.replace("_", " ")
    what += "" if event.microbatch is None else f" of {event.microbatch}"
    length_s, at_s = event.end_s - event.start_s, event.start_s - origin_s
    when = f"{units.seconds(abs(at_s))} {'after' if at_s >= 0 else 'before'} the last word"
    return f"{event.device}: {what}, step {event.step}, {units.seconds(length_s)}, {when}"
