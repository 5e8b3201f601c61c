"""Gathers op times as they come: per-step figures for the user, and the run's trace.

Predicted ops stand next to measured ones: each step's predicted timeline starts where the measured
step began. Only the first and last steps are kept for the trace, so that long runs stay small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..core import OpKind, PipelinePlan, Timeline
from ..record import TraceEvent, chrome_trace
from .result import DeviceEvent
from .run import Span

KEPT_FIRST = 8
KEPT_LAST = 24
"""Steps in the trace, from the run's start and end."""
RECEIVES = {"receive_forward": "activations", "receive_backward": "gradients"}


class TraceWriter:
    """Spans of all devices, by step."""

    def __init__(self, plan: PipelinePlan) -> None:
        self.plan = plan
        self.predicted: Timeline | None = None
        self._devices = list(plan.devices)
        self._spans: dict[int, list[Span]] = {}
        self._reported = -1

    def replan(self, plan: PipelinePlan) -> None:
        """Other devices, or other cuts, from here on."""
        self.plan = plan
        self.predicted = None  # it was of the plan before
        self._devices += [device for device in plan.devices if device not in self._devices]

    def add(self, spans: Sequence[Span]) -> None:
        """Files op times of one device; forgets steps from the middle of a long run."""
        for span in spans:
            self._spans.setdefault(span.step, []).append(span)
        while len(self._spans) > KEPT_FIRST + KEPT_LAST + 2:
            del self._spans[sorted(self._spans)[KEPT_FIRST]]

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
            for span in spans:
                events.extend(self._measured(span))
            begins = [s.start_s for s in spans if s.kind == "forward"]
            if self.predicted is not None and begins:
                events.extend(self._predicted(step, min(begins), self.predicted))
        meta = {"plan": self.plan.digest()}
        return chrome_trace(events, devices=self._devices, meta=meta)

    def _measured(self, span: Span) -> Iterator[TraceEvent]:
        common = {
            "step": span.step,
            "microbatch": span.microbatch,
            "start_s": span.start_s,
            "end_s": span.end_s,
        }
        if span.kind not in RECEIVES:
            yield TraceEvent(device=span.device, kind=span.kind, **common)
            return
        stage = self.plan.stage_of(span.device)
        if stage is None:
            return
        source = stage - 1 if span.kind == "receive_forward" else stage + 1
        if not 0 <= source < len(self.plan.stages):
            return
        sender, label = self.plan.devices[source], RECEIVES[span.kind]
        yield TraceEvent(device=sender, kind="send", peer=span.device, label=label, **common)
        yield TraceEvent(device=span.device, kind="receive", peer=sender, label=label, **common)

    def _predicted(self, step: int, begin_s: float, timeline: Timeline) -> Iterator[TraceEvent]:
        for op in timeline.ops:
            yield TraceEvent(
                device=self.plan.devices[op.stage],
                kind="forward" if op.kind is OpKind.FORWARD else "backward",
                step=step,
                microbatch=op.microbatch,
                start_s=begin_s + op.start_s,
                end_s=begin_s + op.end_s,
                predicted=True,
            )
