"""Where a step's time went, device by device, from op times; the same rule for predicted ones.

A step's window runs from the first stage's first forward to the same moment of the next step, on
all devices alike; work of neighbouring steps that reaches into it counts, as its own reaches out.
Each instant of a device in the window belongs to exactly one share:

- `compute`: a forward or backward runs.
- `update`: any other op runs (reduce, update, snapshot, bookkeeping of the step).
- `link`: no op runs, and the frame that the next one needs is on its way.
- `bubble`: no op runs, and nobody has sent yet what the next one needs (a frame, or the commit).
- `ready`: no op runs although all that the next one needs is there: the runtime's own time, or a
  core that was busy with something else.

Knows nothing of pictures.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core import PipelinePlan, Timeline
from ..record import RECOVERY_ROW, RecoveryEvent, RunPrediction, TraceEvent, timeline_events
from .reading import WARMUP_STEPS

ACTIVATIONS, GRADIENTS = "activations", "gradients"
SHARES = ("compute", "update", "link", "ready", "bubble")
TRANSFERS = ("send", "receive")


@dataclass(frozen=True, slots=True)
class Window:
    """A step, from `start_s` to the start of the next one, on the trace's clock."""

    step: int
    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Era:
    """A stretch of the trace under one plan, undisturbed by a recovery."""

    plan: PipelinePlan
    start_s: float
    end_s: float

    def of(self, events: Iterable[TraceEvent]) -> tuple[TraceEvent, ...]:
        """The events that began in it."""
        return tuple(e for e in events if self.start_s <= e.start_s < self.end_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceShares:
    """Shares of a window, between 0 and 1; they add up to 1. See the module."""

    device: str
    compute: float
    update: float
    link: float
    ready: float
    bubble: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CutUse:
    """One direction of one cut."""

    source: str
    target: str
    transfer_s: float
    """Median per microbatch, from the first byte sent to the last one received."""
    busy_share: float
    """Of the windows, in which at least one transfer was under way."""


def recovery_places(events: Iterable[TraceEvent]) -> dict[str, tuple[float, float]]:
    """When recoveries began and ended on the trace's clock, by "epoch N"."""
    places: dict[str, tuple[float, float]] = {}
    for event in events:
        if event.device == RECOVERY_ROW:
            start_s, end_s = places.get(event.label, (event.start_s, event.end_s))
            places[event.label] = min(start_s, event.start_s), max(end_s, event.end_s)
    return places


def eras(
    plan: PipelinePlan, recoveries: Iterable[RecoveryEvent], events: Iterable[TraceEvent]
) -> tuple[Era, ...]:
    """The trace before, between and after its recoveries.

    Args:
        plan: The one that the trace begins with.
    """
    places = recovery_places(events)
    found, start_s = [], -math.inf
    for recovery in recoveries:
        place = places.get(f"epoch {recovery.epoch}")
        if place is None:
            continue  # of a former start of this run
        found.append(Era(plan=plan, start_s=start_s, end_s=place[0]))
        plan, start_s = recovery.plan or plan, place[1]
    return (*found, Era(plan=plan, start_s=start_s, end_s=math.inf))


def windows(plan: PipelinePlan, events: Iterable[TraceEvent]) -> tuple[Window, ...]:
    """The steps that were measured whole: all ops of all devices, and the next step's start.

    Steps that an evaluation lengthened are left out.
    """
    ops: dict[int, int] = defaultdict(int)
    starts: dict[int, float] = {}
    first = plan.devices[0]
    evaluations = []
    for event in events:
        if event.kind == "evaluate":
            evaluations.append(event)
        if event.predicted or event.kind not in ("forward", "backward"):
            continue
        ops[event.step] += 1
        if event.device == first and event.kind == "forward":
            starts[event.step] = min(event.start_s, starts.get(event.step, event.start_s))
    whole = 2 * len(plan.stages) * plan.microbatches
    found = (
        Window(step, starts[step], starts[step + 1])
        for step in sorted(starts)
        if ops[step] == whole and starts.get(step + 1, 0.0) > starts[step]
    )
    return tuple(
        window
        for window in found
        if not any(e.start_s < window.end_s and e.end_s > window.start_s for e in evaluations)
    )


def median_window(found: Sequence[Window]) -> Window | None:
    """The step of median length (the shorter one of two), warm-up left out where others are."""
    later = [window for window in found if window.step >= WARMUP_STEPS] or list(found)
    later.sort(key=lambda window: (window.length_s, window.step))
    return later[(len(later) - 1) // 2] if later else None


def predicted_step(
    plan: PipelinePlan, prediction: RunPrediction, timeline: Timeline, *, step: int, start_s: float
) -> tuple[TraceEvent, ...]:
    """A predicted step as events: ops and transfers, the reduce and the updates after them."""
    events = list(timeline_events(plan, timeline, step=step, start_s=start_s))
    commit_s, down_s = start_s + timeline.commit_s, 0.0
    for index, times in enumerate(prediction.stages):
        ended_s = start_s + max(op.end_s for op in timeline.stage_ops(index))
        parts = (
            ("reduce", ended_s, times.reduce_s),
            ("update", commit_s + down_s, times.update_s),
        )
        events += [
            TraceEvent(
                device=plan.devices[index],
                kind=kind,
                step=step,
                start_s=begin_s,
                end_s=begin_s + length_s,
                predicted=True,
            )
            for kind, begin_s, length_s in parts
            if length_s > 0
        ]
        if index < len(prediction.cuts):
            down_s += prediction.cuts[index].forward_latency_s
    return tuple(events)


def predicted_shares(
    plan: PipelinePlan, prediction: RunPrediction, timeline: Timeline
) -> tuple[DeviceShares, ...]:
    """The shares of a predicted step among its like."""
    events: list[TraceEvent] = []
    for step in (-1, 0, 1):
        start_s = step * timeline.step_s
        events += predicted_step(plan, prediction, timeline, step=step, start_s=start_s)
    return device_shares(plan, events, [Window(0, 0.0, timeline.step_s)])


def device_shares(
    plan: PipelinePlan, events: Sequence[TraceEvent], found: Sequence[Window]
) -> tuple[DeviceShares, ...]:
    """Shares over all given windows together, per device in plan order.

    Args:
        events: All measured, or all predicted.
    """
    total_s = sum(window.length_s for window in found)
    if total_s <= 0:
        return ()
    shares = []
    for index, device in enumerate(plan.devices):
        ops = [e for e in events if e.device == device and e.kind not in TRANSFERS]
        ops.sort(key=lambda e: (e.start_s, e.end_s))
        frames = {
            (e.label, e.step, e.microbatch): (e.start_s, e.end_s)
            for e in events
            if e.device == device and e.kind == "receive"
        }
        is_last = index == len(plan.stages) - 1
        sums: dict[str, float] = dict.fromkeys(SHARES, 0.0)
        for window in found:
            for name, length_s in _walk(ops, frames, window, is_first=index == 0, is_last=is_last):
                sums[name] += length_s
        of_all = {name: seconds / total_s for name, seconds in sums.items()}
        shares.append(
            DeviceShares(
                device=device,
                compute=of_all["compute"],
                update=of_all["update"],
                link=of_all["link"],
                ready=of_all["ready"],
                bubble=of_all["bubble"],
            )
        )
    return tuple(shares)


def _walk(
    ops: Sequence[TraceEvent],
    frames: Mapping[tuple[str, int, int | None], tuple[float, float]],
    window: Window,
    *,
    is_first: bool,
    is_last: bool,
) -> Iterable[tuple[str, float]]:
    """(share, seconds) of a device from the window's start to its end, without a gap."""
    at_s = window.start_s
    for op in ops:
        if op.end_s <= at_s:
            continue
        if at_s >= window.end_s:
            return
        begin_s, end_s = max(op.start_s, at_s), min(op.end_s, window.end_s)
        if begin_s > at_s:
            gap = (at_s, min(begin_s, window.end_s))
            yield from _gap(op, gap, frames, is_first=is_first, is_last=is_last)
        if end_s > begin_s:
            yield "compute" if op.kind in ("forward", "backward") else "update", end_s - begin_s
        at_s = max(at_s, min(op.end_s, window.end_s))
    if at_s < window.end_s:
        yield "bubble", window.end_s - at_s


def _gap(
    op: TraceEvent,
    gap: tuple[float, float],
    frames: Mapping[tuple[str, int, int | None], tuple[float, float]],
    *,
    is_first: bool,
    is_last: bool,
) -> Iterable[tuple[str, float]]:
    """What an idle stretch before `op` was spent on."""
    begin_s, end_s = gap
    if op.kind == "forward" and not is_first:
        frame = frames.get((ACTIVATIONS, op.step, op.microbatch))
    elif op.kind == "backward" and not is_last:
        frame = frames.get((GRADIENTS, op.step, op.microbatch))
    elif op.kind == "update" and not is_first:
        frame = None  # waits for the commit, whose way down no trace shows
    else:
        yield "ready", end_s - begin_s
        return
    if frame is None:
        yield "bubble", end_s - begin_s
        return
    sent_s = min(max(frame[0], begin_s), end_s)
    there_s = min(max(frame[1], sent_s), end_s)
    yield "bubble", sent_s - begin_s
    yield "link", there_s - sent_s
    yield "ready", end_s - there_s


def cut_uses(
    plan: PipelinePlan, events: Sequence[TraceEvent], found: Sequence[Window]
) -> tuple[CutUse, ...]:
    """Both directions of each cut, downstream first; those without a transfer are left out."""
    total_s = sum(window.length_s for window in found)
    uses = []
    for upper, lower in zip(plan.devices, plan.devices[1:], strict=False):
        for source, target in ((upper, lower), (lower, upper)):
            spans = sorted(
                (e.start_s, e.end_s)
                for e in events
                if e.kind == "receive" and e.device == target and e.peer == source
            )
            lengths_s = [
                end_s - start_s
                for start_s, end_s in spans
                if any(window.start_s <= start_s < window.end_s for window in found)
            ]
            if lengths_s and total_s > 0:
                busy_s = sum(_covered(spans, window) for window in found)
                uses.append(
                    CutUse(
                        source=source,
                        target=target,
                        transfer_s=statistics.median(lengths_s),
                        busy_share=busy_s / total_s,
                    )
                )
    return tuple(uses)


def _covered(spans: Sequence[tuple[float, float]], window: Window) -> float:
    """Seconds of the window in at least one span; `spans` are sorted."""
    covered_s, at_s = 0.0, window.start_s
    for start_s, end_s in spans:
        start_s, end_s = max(start_s, at_s), min(end_s, window.end_s)
        if end_s > start_s:
            covered_s += end_s - start_s
            at_s = end_s
    return covered_s
