"""Values that both machines and all messages share: marks, verdicts, slots, faults, ties.

Arrays never enter the machines. A `Slot` names a set of arrays that the body keeps; an action says
which slots to fill from a frame or to attach to one. Knows nothing of the order of things.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from .. import errors
from ..core.plan import PipelinePlan
from ..errors import CrowdMeshError

LaneName = Literal["pipeline", "control", "bulk"]
ROUND_TRIP = "round_trip"
"""Among measured seconds: a microbatch to the neighbour below and its gradient back, no compute."""
"""The values of `transport.api.Lane`; this room may not import that one."""

SlotKind = Literal[
    "x", "y", "dx", "dy", "parts", "parts_below", "verdict", "tied", "state", "install",
    "eval_x", "eval_y",
]  # fmt: skip


class Mark(enum.Enum):
    """What rides in a Commit and so hits every stage at the same version (R4)."""

    EVALUATE = "evaluate"
    SNAPSHOT = "snapshot"
    """A checkpoint: each stage's state goes to the coordinator's disk."""
    WAVE = "wave"
    """Copies: each stage's state stays with its owner and goes to the holders of its layers."""
    STOP = "stop"
    FINISH = "finish"


class NonFinitePolicy(enum.Enum):
    """What a non-finite loss or gradient does."""

    HALT = "halt"
    """Nobody applies the update; the state before it is kept; the run ends."""
    CONTINUE = "continue"
    """The update is applied as the optimizer says (`apply_if_finite` skips by itself)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfEpoch:
    """What every message of a run carries."""

    run: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The name of a set of arrays that a body keeps. Its `step` is a version for "state", "eval_*".

    x, dy           arrived from upstream, downstream, for (step, microbatch)
    y, dx           made by the own forward, backward, for (step, microbatch)
    parts_below     arrived with downstream's last dy: cut scalars of all later stages, and
                    gradients of tied leaves for owners on this or earlier stages
    parts           made by FinishStep: `parts_below` without what this stage consumed, and its own
    verdict         made by Reduce on stage 0, arrived elsewhere: new globals and shared values
    tied            value of the leaves that `layer` lends, at version step + 1
    state           param, state, opt and global leaves of a stage at version `step`; `layer` is
                    the stage's first layer
    install         bundle and state of a stage; `layer` is its first layer
    eval_x, eval_y  as x and y, for a microbatch of the evaluation at version `step`
    """

    kind: SlotKind
    step: int
    microbatch: int | None = None
    layer: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The small values that ride up with a stage's last backward frame, for it and all below."""

    is_finite: bool = True
    """Loss, and where the body looks the gradients, hold neither NaN nor infinity."""
    has_weight: bool = True
    """False: the loss weights of all microbatches sum to zero; the step is skipped."""

    def plus(self, other: Parts) -> Parts:
        """Both together: one bad part makes the whole bad."""
        return Parts(
            is_finite=self.is_finite and other.is_finite,
            has_weight=self.has_weight and other.has_weight,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What stage 0 decided of a step; its arrays are in slot "verdict" (R3)."""

    is_finite: bool = True
    skip: bool = False
    """Nobody applies the update or keeps the step's statistics; the version grows all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVerdict:
    """The verdict of a step."""

    step: int
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """When the run evaluates, and over how many microbatches. Known to all before it starts."""

    microbatches: int
    every: int | None = None
    """Steps between evaluations; None: only at the last version."""
    keeps_state: bool = False
    """A snapshot of the same version is taken each time (for the best one)."""

    def __post_init__(self) -> None:
        if self.microbatches < 1:
            raise errors.InvalidValueError(
                f"an evaluation needs at least one microbatch, got {self.microbatches}"
            )
        if self.every is not None and self.every < 1:
            raise errors.InvalidValueError(f"evaluate every >= 1 steps, got {self.every}")

    def is_due(self, version: int, steps: int) -> bool:
        """Whether `version` is evaluated in a run to version `steps`."""
        return version == steps or (self.every is not None and version % self.every == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestRule:
    """Which evaluation is the best one."""

    metric: str
    """"loss" or a metric of the job."""
    mode: Literal["min", "max"]

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether `value` beats `best`; NaN never does, equal does not."""
        if value != value:
            return False
        return best is None or (value < best if self.mode == "min" else value > best)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A layer that lends leaves to later layers (tied weights), whatever the plan."""

    owner_layer: int
    borrower_layers: tuple[int, ...]

    def stages(self, plan: PipelinePlan) -> tuple[int, tuple[int, ...]]:
        """The owner's stage and the other stages that borrow, under `plan`."""
        owner = stage_of_layer(plan, self.owner_layer)
        borrowers = {stage_of_layer(plan, layer) for layer in self.borrower_layers}
        return owner, tuple(sorted(borrowers - {owner}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error as a value: it crosses processes and comes out as the same kind and text."""

    kind: str
    """Name of a class in `crowdmesh_jax.errors`; others come out as RunError."""
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """The fault that describes an exception."""
        if isinstance(error, CrowdMeshError):
            return cls(kind=type(error).__name__, text=error.message)
        return cls(kind="RunError", text=f"{type(error).__name__}: {error}")

    def error(self) -> CrowdMeshError:
        """The exception to raise."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, CrowdMeshError):
            return kind(self.text)
        return errors.RunError(f"{self.kind}: {self.text}")

    def within(self, where: str) -> Fault:
        """The same fault, saying where it happened."""
        return Fault(kind=self.kind, text=f"{where}: {self.text}")


def stage_of_layer(plan: PipelinePlan, layer: int) -> int:
    """Index of the stage that holds `layer`."""
    for index, stage in enumerate(plan.stages):
        if stage.first_layer <= layer <= stage.last_layer:
            return index
    raise errors.InvalidPlanError(
        f"no stage holds layer {layer}; the plan has layers 0-{plan.num_layers - 1}"
    )
