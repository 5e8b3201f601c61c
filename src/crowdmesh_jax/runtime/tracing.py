"""Gathers op times as they come: per-step figures for the user, and the run's trace.

Predicted ops stand next to measured ones: each step's predicted timeline starts where the measured
step began. Only the first and last steps are kept for the trace, so that long runs stay small, and
the steps round each recovery, which has a row of its own. Ops that a recovery made void are called
`dropped_forward` and so on, those of a replay `replayed_forward`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

from ..core import OpKind, PipelinePlan, Timeline
from ..record import RECOVERY_ROW, RecoveryEvent, TraceEvent, chrome_trace
from .result import DeviceEvent
from .told import Span

KEPT_FIRST = 8
KEPT_LAST = 24
"""Steps in the trace, from the run's start and end."""
KEPT_ROUND = 2
"""Steps in the trace before and after those that a recovery ran again."""
MOST_PINNED = 64
RECEIVES = {"receive_forward": "activations", "receive_backward": "gradients"}


class TraceWriter:
    """Spans of all devices, by step."""

    def __init__(self, plan: PipelinePlan) -> None:
        self.plan = plan
        self._devices = list(plan.devices)
        self._plans = [plan]
        self._predicted: dict[int, Timeline] = {}
        """By the plan's number."""
        self._plan_times: list[float] = []
        """When each plan but the first came into force, ascending."""
        self._recoveries: list[RecoveryEvent] = []
        self._pinned: set[int] = set()
        self._spans: dict[int, list[Span]] = {}
        self._reported = -1

    def predict(self, timeline: Timeline) -> None:
        """What a step of the plan in force should be like."""
        self._predicted[len(self._plans) - 1] = timeline

    def recovered(self, event: RecoveryEvent) -> None:
        """Keeps the steps round it."""
        self._recoveries.append(event)
        first = min([event.base, *(over.from_version for over in event.take_overs)])
        around = range(first - KEPT_ROUND, event.base + event.redone_steps + KEPT_ROUND + 1)
        self._pinned |= {step for step in around if len(self._pinned) < MOST_PINNED}

    def replan(self, plan: PipelinePlan, at_s: float) -> None:
        """Other devices, or other cuts, from `at_s` on (clock of the op times)."""
        self.plan = plan
        self._plans.append(plan)
        self._plan_times.append(at_s)
        self._devices += [device for device in plan.devices if device not in self._devices]

    def add(self, spans: Sequence[Span]) -> None:
        """Files op times of one device; forgets steps from the middle of a long run."""
        for span in spans:
            self._spans.setdefault(span.step, []).append(span)
        free = sorted(step for step in self._spans if step not in self._pinned)
        for step in free[KEPT_FIRST : -KEPT_LAST - 2]:
            del self._spans[step]

    def device_events(self, step: int, step_s: float | None) -> Iterator[DeviceEvent]:
        """What each device did in the newest step of which all times have come."""
        newest = step - 1  # the op times of `step` itself are still on their way
        spans = self._spans.get(newest, ())
        if newest <= self._reported or not spans or step_s is None:
            return
        self._reported = newest
        for index, stage in enumerate(self.plan.stages):
            sums = dict.fromkeys(("forward", "backward", "update"), 0.0)
            busy_s = 0.0
            for span in spans:
                if span.device == stage.device and span.kind not in RECEIVES:
                    busy_s += span.end_s - span.start_s
                    if span.kind == "evaluate":
                        continue  # busy, but no part of the step
                    kind = span.kind if span.kind in sums else "update"
                    sums[kind] += span.end_s - span.start_s
            yield DeviceEvent(
                device=stage.device,
                stage=index,
                step=newest,
                forward_s=sums["forward"],
                backward_s=sums["backward"],
                update_s=sums["update"],
                idle_share=max(0.0, 1.0 - busy_s / step_s),
            )

    def finish(self) -> dict[str, Any]:
        """The Chrome trace of the kept steps."""
        events: list[TraceEvent] = []
        for step, spans in sorted(self._spans.items()):
            fates = [(span, self._fate(span)) for span in spans]
            for span, fate in fates:
                events.extend(self._measured(span, fate))
            begins = [span.start_s for span, fate in fates if span.kind == "forward" and not fate]
            if begins:
                events.extend(self._expected(step, min(begins)))
        for recovery in self._recoveries:
            events.extend(_recovery_row(recovery))
        devices = [*self._devices, *([RECOVERY_ROW] if self._recoveries else ())]
        meta = {"plan": self.plan.digest()}
        return chrome_trace(events, devices=devices, meta=meta)

    def _number(self, at_s: float) -> int:
        """Of the plan in force then."""
        return bisect.bisect_right(self._plan_times, at_s)

    def _fate(self, span: Span) -> str:
        """What a recovery made of an op: "dropped", "replayed", or "": it counts as it is."""
        for recovery in self._recoveries:
            parts = {name: (start_s, end_s) for name, start_s, end_s in recovery.spans}
            stopped_s, ready_s = parts["fenced"][1], parts["installed"][1]
            if span.start_s < stopped_s and span.step >= recovery.base:
                return "dropped"
            devices = [over.device for over in recovery.take_overs]
            is_within = stopped_s <= span.start_s < ready_s and span.step < recovery.base
            if is_within and span.device in devices:
                return "replayed"
        return ""

    def _measured(self, span: Span, fate: str) -> Iterator[TraceEvent]:
        common = {
            "step": span.step,
            "microbatch": span.microbatch,
            "start_s": span.start_s,
            "end_s": span.end_s,
        }
        if span.kind not in RECEIVES:
            kind = f"{fate}_{span.kind}" if fate else span.kind
            yield TraceEvent(device=span.device, kind=kind, **common)
            return
        if fate:
            return  # a frame of a step that was done again, or one out of a log
        plan = self._plans[self._number(span.start_s)]
        stage = plan.stage_of(span.device)
        if stage is None:
            return
        source = stage - 1 if span.kind == "receive_forward" else stage + 1
        if not 0 <= source < len(plan.stages):
            return
        sender, label = plan.devices[source], RECEIVES[span.kind]
        yield TraceEvent(device=sender, kind="send", peer=span.device, label=label, **common)
        yield TraceEvent(device=span.device, kind="receive", peer=sender, label=label, **common)

    def _expected(self, step: int, begin_s: float) -> Iterator[TraceEvent]:
        number = self._number(begin_s)
        timeline = self._predicted.get(number)
        for op in timeline.ops if timeline is not None else ():
            yield TraceEvent(
                device=self._plans[number].devices[op.stage],
                kind="forward" if op.kind is OpKind.FORWARD else "backward",
                step=step,
                microbatch=op.microbatch,
                start_s=begin_s + op.start_s,
                end_s=begin_s + op.end_s,
                predicted=True,
            )


def _recovery_row(event: RecoveryEvent) -> Iterator[TraceEvent]:
    for kind, start_s, end_s in event.spans:
        yield TraceEvent(
            device=RECOVERY_ROW,
            kind=kind,
            step=event.base,
            start_s=start_s,
            end_s=end_s,
            label=f"epoch {event.epoch}",
        )
