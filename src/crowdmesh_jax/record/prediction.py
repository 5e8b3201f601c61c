"""What was predicted for a run, kept beside what it measured: `prediction.json`.

The seconds of stages and cuts are kept, not the timeline they make: `evaluate` makes it again,
whole and exact. Knows nothing of where the figures come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core import (
    CutTimes,
    MemoryBreakdown,
    PipelinePlan,
    StageTimes,
    Timeline,
    evaluate,
    schedule_for,
)

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPrediction:
    """A step as it was predicted just before the run, and what the planner thought of memory."""

    stages: tuple[StageTimes, ...]
    """In plan order, from programs that each device timed alone."""
    cuts: tuple[CutTimes, ...]
    """One less than stages."""
    step_s: float
    """From commit to commit, by `evaluate`."""
    memory: Mapping[str, MemoryBreakdown] = field(default_factory=dict)
    """Per device; empty where the plan came without a profile."""
    planned_step_s: float | None = None
    """What the solver thought of the plan, from the profile; None where it came without one."""
    format_version: int = FORMAT_VERSION

    def timeline(self, plan: PipelinePlan) -> Timeline:
        """The predicted step, op by op.

        Raises:
            ScheduleError: The plan has another number of stages, or an unknown schedule.
        """
        return evaluate(schedule_for(plan), self.stages, self.cuts)
