"""What a run shows: its news as events for the caller, rows of metrics, figures for the result."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core import PipelinePlan, Prediction, Timeline
from ..errors import RecordError
from ..programs import StageBundle
from ..protocol import coordinator_events as ev
from ..record import Journal, RunFolder
from .crew import Crew
from .memory import MemoryReport, memory_table
from .outfit import Outfitter
from .predict import predict_run
from .recovery import RecoveryEvent
from .result import (
    BestEvent,
    CheckpointEvent,
    EvaluationEvent,
    MeasuredEvent,
    PhaseEvent,
    RunEvent,
    StepEvent,
)
from .tracing import TraceWriter

logger = logging.getLogger(__name__)

WARMUP_STEPS = 2
"""Left out of the measured step time: caches and queues fill."""
FAR_FROM_PLAN = 1.5
"""Timed stages that are so much slower than planned are worth a warning."""


class Showing:
    """Of one run, in the caller's thread.

    Args:
        plan: In force; a recovery may bring others.
        steps: Of the whole run.
        rows: Of the held-out data.
        lines: Rows of metrics.
        prediction: The planner's.
        recovers: The run survives losses; then a full disk costs rows of metrics, not the run.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        lines: Journal,
        tell: Callable[[RunEvent], None],
        crew: Crew,
        outfitter: Outfitter,
        plan: PipelinePlan,
        bundles: Sequence[StageBundle],
        steps: int,
        rows: int,
        prediction: Prediction | None,
        recovers: bool,
        best_version: int | None,
    ) -> None:
        self._folder, self._lines, self._tell = folder, lines, tell
        self._crew, self._outfitter = crew, outfitter
        self._plan, self._bundles = plan, bundles
        self._steps, self._rows = steps, rows
        self._prediction, self._recovers = prediction, recovers
        self.losses: list[float] = []
        self.metrics: dict[str, list[float]] = {}
        self.evaluations: dict[int, Mapping[str, float]] = {}
        self.recoveries: list[RecoveryEvent] = []
        self.best_version = best_version
        self._timeline: Timeline | None = None
        self._step_times: list[float] = []
        self._planned_times: int | None = None
        """How many of them are of the plan that the run began with; None: all."""
        self._memory: dict[str, MemoryReport] = {}
        self._memory_rows: dict[str, dict[str, int]] = {}
        self._trace = TraceWriter(plan)
        self._lost_rows = 0

    @property
    def predicted_step_s(self) -> float:
        """By the stages' own times; not a number where these were not taken."""
        return self._timeline.step_s if self._timeline is not None else math.nan

    @property
    def measured_step_s(self) -> float:
        """Median of the plan that the run began with; not a number before the first step."""
        planned = self._step_times[: self._planned_times] or self._step_times
        measured = planned[WARMUP_STEPS:] or planned
        return statistics.median(measured) if measured else math.nan

    def finish(self) -> None:
        """Writes what is known only at the end: the trace, and what devices held."""
        self._folder.write_trace(self._trace.finish())
        if self._crew.transport_name != "memory":  # there all devices are one process
            self._note_memory()
            self._folder.write_memory(self._memory_rows)

    def show(self, news: Any) -> None:
        """One item of news."""
        match news:
            case list():
                self._trace.add(news)
            case MemoryReport():
                self._memory[news.device] = news
            case ev.PhaseChanged(phase=phase, devices=devices):
                self._tell(PhaseEvent(phase=phase, detail=", ".join(devices)))
            case ev.StageTimes(seconds=seconds):
                manifests = [bundle.manifest for bundle in self._bundles]
                prediction, self._timeline = predict_run(
                    self._plan, manifests, self._crew.crowd, seconds, self._prediction
                )
                self._folder.write_prediction(prediction)
                self._trace.predict(self._timeline)
                self._warn_if_planned_short(self._timeline.step_s)
                self._tell(MeasuredEvent(prediction_s=self._timeline.step_s, programs_s=seconds))
            case ev.StepShown():
                self.show_step(news)
            case ev.CheckpointMissed(version=version, fault=fault):
                logger.error("no checkpoint of version %d: %s; the older one stands", version,
                             fault.text)  # fmt: skip
            case ev.EvaluationShown(version=version, values=values):
                self._show_evaluation(version, values)
            case RecoveryEvent():
                self._show_recovery(news)
            case ev.CheckpointKept(version=version):
                path = self._folder.checkpoint_path
                self._tell(CheckpointEvent(version=version, path=path))
            case ev.BestKept(version=version, metric=metric, value=value):
                self.best_version = version
                path = self._folder.best_path
                self._tell(BestEvent(version=version, metric=metric, value=value, path=path))

    def _show_recovery(self, event: RecoveryEvent) -> None:
        self.recoveries.append(event)
        try:
            self._folder.add_recovery(event)
        except RecordError as exc:
            logger.error("%s; this recovery is in no file", exc.message)
        self._trace.recovered(event)
        logger.info("%s", event.line())
        if event.plan is not None and event.plan != self._plan:
            if self._planned_times is None:
                self._planned_times = max(0, len(self._step_times) - 1)  # the last holds the loss
            self._note_memory()
            self._plan = event.plan
            self._bundles = self._outfitter.bundles(event.plan)
            self._trace.replan(event.plan, event.opened_s)
        self._tell(event)

    def _note_memory(self) -> None:
        """Of a device that has lost its stage its last stage's figures stay."""
        manifests = [bundle.manifest for bundle in self._bundles]
        self._memory_rows |= memory_table(self._plan, manifests, self._memory)

    def _warn_if_planned_short(self, timed_s: float) -> None:
        planned_s = self._prediction.step_s if self._prediction is not None else math.inf
        if timed_s > FAR_FROM_PLAN * planned_s:
            logger.warning(
                "a step takes %.1f ms by the stages' own times, %.1f times what the plan was made"
                " by: another plan may be faster. Small layers are calls and hops more than"
                " arithmetic. Plan from measured layers (cm.profile(..., measure=True);"
                " --measure), take larger microbatches, or compare with solver='single_best'",
                1e3 * timed_s,
                timed_s / planned_s,
            )

    def _show_evaluation(self, version: int, values: Mapping[str, float]) -> None:
        self.evaluations[version] = dict(values)
        row = {name: _jsonable(value) for name, value in values.items()}
        self._write_row({"version": version, "eval": row})
        self._tell(EvaluationEvent(version=version, values=values, rows=self._rows))

    def _write_row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics; where the run recovers, a full disk costs rows, not the run."""
        try:
            self._lines.append(row)
        except RecordError as exc:
            if not self._recovers:
                raise
            if not self._lost_rows:
                logger.error("%s; rows of metrics are lost until there is room", exc.message)
            self._lost_rows += 1

    def show_step(self, news: ev.StepShown) -> None:
        """A committed step."""
        values = dict(news.values)
        loss = values.pop("loss")
        self.losses.append(loss)
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(value)
        if news.step_s is not None and not news.has_evaluated:
            self._step_times.append(news.step_s)
        self._write_row(
            {"step": news.step, "loss": _jsonable(loss), "step_s": news.step_s}
            | {name: _jsonable(value) for name, value in values.items()}
            | ({"has_evaluated": True} if news.has_evaluated else {})
        )
        for event in self._trace.device_events(news.step, news.step_s):
            self._tell(event)
        self._tell(
            StepEvent(
                step=news.step, steps=self._steps, loss=loss, step_s=news.step_s, metrics=values
            )
        )


def _jsonable(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)
