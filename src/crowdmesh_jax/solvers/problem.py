"""What a partition solver is asked, and what it answers.

Values only: the question (profile, crowd, pins, bans, limits), the answer (a plan with its
prediction and how far it is proven), and the Protocol that joins them. It knows no search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol, runtime_checkable

from ..core import (
    COMPILE_PEAK_BYTES,
    Crowd,
    ModelProfile,
    PipelinePlan,
    Prediction,
    search_schedule,
)
from ..errors import InvalidValueError

Recompute = Literal["never", "always", "auto"]
Objective = Literal["evaluate", "closed_form"]
WireChoice = Literal["bfloat16", "auto"]
WIRE_GAIN = 0.02
"""A cast that costs bits must make the step at least this part shorter to be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionProblem:
    """Who may run which layers of a profiled model, under which schedule and limits.

    Layers are given by index or by name and devices by id; both are kept as index and id.
    """

    profile: ModelProfile
    """Also holds the number of microbatches per step, and what one of them costs."""
    crowd: Crowd
    schedule: str = "1f1b"
    """A name of `schedules()`. What the closed form does not know is searched as if it were "1f1b"
    and ranked by its own timeline; nothing is then proven."""
    pins: Mapping[int | str, str] = field(default_factory=dict)
    """Layer -> the device that must run it ("layer 0 on the data holder")."""
    bans: Sequence[str | tuple[int | str, str]] = ()
    """Devices that get no layer, or (layer, device) pairs that must not meet."""
    devices: Sequence[str] | None = None
    """Only these may get layers; None: all of the crowd."""
    requires: Sequence[str] = ()
    """Devices that must get at least one layer. By default slow ones may be left out."""
    min_stages: int = 1
    max_stages: int | None = None
    recompute: Recompute = "never"
    """Backward recomputes the forward: never, always, or where memory asks for it ("auto")."""
    objective: Objective = "evaluate"
    """What ranks the last candidates: the exact timeline, or the closed form R_0 + (M - 1) T."""
    wire_dtype: WireChoice | None = None
    """What cuts cast float32 values to: nothing, "bfloat16" on every cut, or "auto": on those where
    it makes the step `WIRE_GAIN` shorter. It loses bits; see `Stage.wire_dtype`."""
    share: bool = False
    """Whether several devices may share a stage (solvers "asteroid" and "hybrid"; others do not).
    Such plans are predicted, not run, by this release."""
    snapshots: int = 0
    """Own copies of parameters, optimizer state and statistics that each device keeps."""
    log_steps: int = 0
    """Steps of sent boundary frames that each device keeps for replay."""
    compile_peak_bytes: int = COMPILE_PEAK_BYTES
    """What compiling takes on each device; counted where it is more than training takes."""

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.profile.layers]

        def layer_index(layer: int | str) -> int:
            if isinstance(layer, str):
                if layer not in names:
                    raise InvalidValueError(
                        f"no layer {layer!r} in the profile; known: {', '.join(names)}"
                    )
                return names.index(layer)
            if not 0 <= layer < len(names):
                raise InvalidValueError(f"layer {layer} is outside 0..{len(names) - 1}")
            return int(layer)

        def device_id(device: str) -> str:
            return self.crowd.device(device).id  # raises, naming those known

        for name, value, choices in (
            ("recompute", self.recompute, ("never", "always", "auto")),
            ("objective", self.objective, ("evaluate", "closed_form")),
            ("wire_dtype", self.wire_dtype, (None, "bfloat16", "auto")),
        ):
            if value not in choices:
                raise InvalidValueError(f"{name} must be one of {choices}, got {value!r}")
        search_schedule(self.schedule)  # raises for an unknown one
        for name, value, least in (
            ("min_stages", self.min_stages, 1),
            ("max_stages", 1 if self.max_stages is None else self.max_stages, 1),
            ("snapshots", self.snapshots, 0),
            ("log_steps", self.log_steps, 0),
            ("compile_peak_bytes", self.compile_peak_bytes, 0),
        ):
            if value < least:
                raise InvalidValueError(f"{name} must be >= {least}, got {value}")
        if self.max_stages is not None and self.max_stages < self.min_stages:
            raise InvalidValueError(
                f"max_stages {self.max_stages} is below min_stages {self.min_stages}"
            )
        pins: dict[int, str] = {}
        for layer, device in self.pins.items():
            index = layer_index(layer)
            if pins.setdefault(index, device_id(device)) != device:
                raise InvalidValueError(
                    f"layer {index} is pinned to {pins[index]!r} and to {device!r}"
                )
        bans: list[str | tuple[int, str]] = []
        for ban in self.bans:
            bans.append(
                device_id(ban) if isinstance(ban, str) else (layer_index(ban[0]), device_id(ban[1]))
            )
        devices = self.devices
        if devices is not None:
            devices = tuple(device_id(device) for device in devices)
            if not devices:
                raise InvalidValueError("devices must name at least one device, or be None")
            if len(set(devices)) != len(devices):
                raise InvalidValueError(f"devices must differ, got {devices}")
        object.__setattr__(self, "pins", MappingProxyType(pins))
        object.__setattr__(self, "bans", tuple(bans))
        object.__setattr__(self, "devices", devices)
        object.__setattr__(self, "requires", tuple(device_id(d) for d in self.requires))

    @property
    def num_layers(self) -> int:
        return len(self.profile.layers)

    @property
    def microbatches(self) -> int:
        return self.profile.microbatches

    @property
    def allowed_devices(self) -> tuple[str, ...]:
        """Devices that may get layers, in the order of `devices`, else of the crowd."""
        ids = [d.id for d in self.crowd.devices] if self.devices is None else self.devices
        return tuple(device for device in ids if device not in self.bans)

    @property
    def layer_pins(self) -> dict[int, str]:
        """The pins by layer index, in the order of the layers."""
        return {int(layer): device for layer, device in sorted(self.pins.items())}

    def allows(self, device: str, layer: int) -> bool:
        """Whether pins and bans let `device` run `layer`."""
        if device in self.bans or (layer, device) in self.bans:
            return False
        return self.pins.get(layer, device) == device


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionResult:
    """A plan, what it is predicted to take, and what is proven about it."""

    plan: PipelinePlan
    predicted: Prediction
    problem: PartitionProblem
    optimal: bool
    """No plan has a shorter closed form R_0 + (M - 1) T than the best this solver found. Never
    claimed under the medium `shared_cell`, or a schedule that another one stands for."""
    gap: float | None
    """Proven bound on (best closed form - optimum) / best; None: the solver proves nothing."""
    solve_s: float
    solver: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Device without layers -> why."""
    notes: tuple[str, ...] = ()
    """What the solver has to say of this plan: what was repaired, which policy won."""

    def explain(self, *, note: str | None = None) -> str:
        """The plan in words and numbers; see `explain`."""
        from .explain import explain

        return explain(self.plan, self.problem.profile, self.problem.crowd, result=self, note=note)


@runtime_checkable
class PartitionSolver(Protocol):
    """Chooses who runs which layers. Same problem, same plan, unless a time limit strikes."""

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: No assignment fits; says why.
            SolverError: The solver's backend failed.
        """
        ...
