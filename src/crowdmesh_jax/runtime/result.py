"""What a run tells while it goes (events) and when it ends (TrainResult)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core import PipelinePlan, Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEvent:
    """The run entered a phase: plan, export, launch, install, measure, train or finish."""

    phase: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEvent:
    """A device's part of a step: how long it computed and what it waited for (seconds)."""

    device: str
    stage: int
    step: int
    forward_s: float
    backward_s: float
    update_s: float
    idle_share: float
    """Of the step, neither computing nor sleeping off an emulated speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """A committed step."""

    step: int
    steps: int
    loss: float
    step_s: float | None
    """Since the commit before; None for the first step."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationEvent:
    """The devices evaluated their own parameters at `version` (steps made)."""

    version: int
    values: Mapping[str, float]
    """"loss" and the job's metrics, over all rows."""
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BestEvent:
    """The best version so far is complete on disk."""

    version: int
    metric: str
    value: float
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEvent:
    """The stages were timed alone; what the whole step should take."""

    prediction_s: float
    programs_s: Mapping[str, Mapping[str, float]]
    """Seconds per device and program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEvent:
    """A checkpoint is complete on disk."""

    version: int
    path: Path


RunEvent = (
    PhaseEvent | DeviceEvent | StepEvent | EvaluationEvent | MeasuredEvent | CheckpointEvent
    | BestEvent
)  # fmt: skip
OnEvent = Callable[[RunEvent], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` returns. Trees have the shapes that the user's own code gave them."""

    losses: np.ndarray = field(repr=False)
    """Float32, one per step of this call: steps `first_step` and on."""
    params: Any = field(repr=False)
    state: Any = field(repr=False)
    opt_state: Any = field(repr=False)
    metrics: Mapping[str, np.ndarray] = field(repr=False)
    """Per metric one mean per step."""
    plan: PipelinePlan
    prediction: Prediction | None = field(repr=False)
    """From profile figures, before the run; None where the plan came without a profile."""
    predicted_step_s: float
    """From stage times that each device measured alone, just before the run."""
    measured_step_s: float
    """Median time from commit to commit, after the first steps."""
    first_step: int = 0
    """The version that the run was resumed from; 0: it began anew."""
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict, repr=False)
    """Version -> "loss" and the metrics, of this call."""
    evaluated_rows: int = 0
    left_out_rows: int = 0
    """Rows of the evaluation set beyond whole microbatches."""
    best_version: int | None = None
    """The newest version kept in `run_dir/best` by this call."""
    stopped: str | None = None
    """Why a callback ended the run before its last step."""
    recoveries: tuple[Any, ...] = ()
    run_dir: Path
