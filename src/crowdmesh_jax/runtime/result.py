"""What a run tells while it goes (events) and when it ends (TrainResult)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core import PipelinePlan, Prediction
from .recovery import RecoveryEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEvent:
    """The run entered a phase: plan, export, launch, gathering, installing, ... finishing, done."""

    phase: str
    """"plan", "export" and "launch" where they are due; then "gathering", "installing",
    "measuring" (unless `measure=False`), "running", "stopping" (asked to), "finishing", "done".
    With `recovery` also "protection" (what has no copy, before the run); around a loss or a change
    "pausing", "fencing", "deciding", "waiting" (for a device to return), "installing" again; a run
    that is taken up begins with "attaching"."""
    detail: str = ""
    """For people: whom it waits for, or how it is done. Empty: nothing to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEvent:
    """A device's part of a step: how long it computed and what it waited for (seconds)."""

    device: str
    """Its id in the crowd."""
    stage: int
    """Which stage of the plan it runs, from 0."""
    step: int
    """From 0; one less than the version that it makes."""
    forward_s: float
    """Seconds of all the step's microbatches together, as the next two."""
    backward_s: float
    """Seconds; the last stage's loss and recomputed forwards are in it."""
    update_s: float
    """Seconds of the optimizer's update and what belongs to it."""
    idle_share: float
    """0 .. 1, of the step: neither computing nor sleeping off an emulated speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """A committed step."""

    step: int
    """From 0; version `step + 1` is committed. A resumed run goes on counting."""
    steps: int
    """Steps to make in all, those of earlier starts too."""
    loss: float
    """Of the step's batch, by the parameters before its update."""
    step_s: float | None
    """Seconds since the commit before; None for the first step of this call."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The job's metrics, name -> mean over the step's batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationEvent:
    """The devices evaluated their own parameters at `version` (steps made)."""

    version: int
    """Steps that made the parameters."""
    values: Mapping[str, float]
    """"loss" and the job's metrics, over all rows."""
    rows: int
    """How many rows were evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestEvent:
    """The best version so far is complete on disk."""

    version: int
    """Steps that made it."""
    metric: str
    """What `keep_best` goes by."""
    value: float
    """The metric's value at that version."""
    path: Path
    """The checkpoint's folder, `best/` of the run; `cm.restore` reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEvent:
    """The stages were timed alone; what the whole step should take."""

    prediction_s: float
    """Seconds that a step should take, from these times and the crowd's links."""
    programs_s: Mapping[str, Mapping[str, float]]
    """Seconds per device and program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEvent:
    """A checkpoint is complete on disk."""

    version: int
    """Steps that made it."""
    path: Path
    """Its folder, `checkpoint/` of the run."""


RunEvent = (
    PhaseEvent | DeviceEvent | StepEvent | EvaluationEvent | MeasuredEvent | CheckpointEvent
    | BestEvent | RecoveryEvent
)  # fmt: skip
OnEvent = Callable[[RunEvent], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` returns. Trees have the shapes that the user's own code gave them."""

    losses: np.ndarray = field(repr=False)
    """Float32, one per step of this call: steps `first_step` and on."""
    params: Any = field(repr=False)
    """{layer name: tree}, as the model's own modules know them."""
    state: Any = field(repr=False)
    """{layer name: tree} of what layers keep besides parameters: running statistics, say."""
    opt_state: Any = field(repr=False)
    """The optax state of the whole model."""
    metrics: Mapping[str, np.ndarray] = field(repr=False)
    """Per metric one mean per step of this call."""
    plan: PipelinePlan
    """The plan that the run began with; after a recovery see `recoveries[-1].plan`."""
    prediction: Prediction | None = field(repr=False)
    """From profile figures, before the run; None where the plan came without a profile."""
    predicted_step_s: float
    """Seconds, from stage times that each device measured alone just before the run; NaN with
    `measure=False`."""
    measured_step_s: float
    """Seconds, the median from commit to commit after the first steps; NaN where only one was
    made. Of a run that was recovered: under the plan that it began with, as predicted."""
    first_step: int = 0
    """The version that the run was resumed from; 0: it began anew."""
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict, repr=False)
    """Version -> "loss" and the metrics, of this call."""
    evaluated_rows: int = 0
    """Rows of each evaluation; 0: there was none."""
    left_out_rows: int = 0
    """Rows of the evaluation set beyond whole microbatches."""
    best_version: int | None = None
    """The version in `run_dir/best`, kept by this call or an earlier start; None: none is."""
    stopped: str | None = None
    """Why a callback ended the run before its last step; None: it made all its steps."""
    recoveries: tuple[RecoveryEvent, ...] = ()
    """Losses that the run survived, in order."""
    run_dir: Path
    """The run's folder, absolute."""
