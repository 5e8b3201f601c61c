"""Plans: who runs which layers, under which schedule.

A plan is a value that any process can read. It knows nothing of JAX, times or sockets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidPlanError
from . import values
from .crowd import DeviceId

WireDtype = Literal["bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A device's part of a shared stage: so many rows of each microbatch."""

    device: DeviceId
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Layers `first_layer .. last_layer` (both inside) on one device, or shared by several."""

    device: DeviceId
    first_layer: int
    last_layer: int
    recompute: bool = False
    """Backward recomputes the forward instead of keeping residuals."""
    warmup: int | None = None
    """Microbatches in flight under `eager` and `zb-h1`; None: the schedule's own rule."""
    wire_dtype: WireDtype | None = None
    """What float32 values are cast to where they cross the cut after this stage, activations down
    and gradients back; they are cast back at once. None: they travel as computed. It loses bits:
    results are bit-equal to those of the same plan in one process, not to those without it."""
    shares: tuple[Share, ...] = ()
    """Devices that split each microbatch's rows and sum gradients, `device` first; (): `device`
    alone. Planned and predicted only: this release runs one device a stage."""

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """All devices of the stage."""
        return tuple(share.device for share in self.shares) or (self.device,)

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """A partition of `num_layers` layers into consecutive stages on distinct devices."""

    stages: tuple[Stage, ...]
    num_layers: int
    microbatches: int
    schedule: str = "1f1b"
    """Name of a schedule, see `schedules()`: "gpipe", "1f1b", "eager", "zb-h1" or a plug-in."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidPlanError("a plan needs at least one stage")
        if self.microbatches < 1:
            raise InvalidPlanError(f"microbatches must be >= 1, got {self.microbatches}")
        if len(self.stages) > self.num_layers:
            raise InvalidPlanError(
                f"{len(self.stages)} stages for {self.num_layers} layers: each stage needs a layer;"
                " use fewer stages or a model with finer layers"
            )
        expected = 0
        for index, stage in enumerate(self.stages):
            if stage.first_layer != expected or stage.last_layer < stage.first_layer:
                raise InvalidPlanError(
                    f"stage {index} ({stage.device}): layers"
                    f" {stage.first_layer}-{stage.last_layer}, expected to start at"
                    f" layer {expected} and hold at least one"
                )
            if stage.warmup is not None and stage.warmup < 1:
                raise InvalidPlanError(
                    f"stage {index} ({stage.device}): warmup must be >= 1, got {stage.warmup}"
                )
            if stage.shares:
                _check_shares(index, stage)
            expected = stage.last_layer + 1
        if expected != self.num_layers:
            raise InvalidPlanError(f"stages end at layer {expected - 1} of {self.num_layers - 1}")
        last = self.stages[-1]
        if last.wire_dtype is not None:
            raise InvalidPlanError(
                f"stage {len(self.stages) - 1} ({last.device}): wire_dtype is for the cut after a"
                f" stage, and there is none after the last; got {last.wire_dtype!r}"
            )
        devices = [device for stage in self.stages for device in stage.devices]
        if len(set(devices)) != len(devices):
            twice = next(d for d in devices if devices.count(d) > 1)
            raise InvalidPlanError(f"device {twice!r} has two stages; each device holds one")

    @classmethod
    def even(
        cls,
        num_layers: int,
        devices: tuple[str, ...] | list[str],
        *,
        microbatches: int,
        schedule: str = "1f1b",
        recompute: bool = False,
    ) -> PipelinePlan:
        """Equal layer counts in the given device order; the first stages take the remainder.

        Example:
            >>> plan = PipelinePlan.even(7, ["a", "b", "c"], microbatches=4)
            >>> [(stage.device, stage.first_layer, stage.last_layer) for stage in plan.stages]
            [('a', 0, 2), ('b', 3, 4), ('c', 5, 6)]
        """
        count = len(devices)
        if count > num_layers:
            raise InvalidPlanError(
                f"{count} stages for {num_layers} layers: each stage needs a layer;"
                " use fewer devices or a model with finer layers"
            )
        size, extra = divmod(num_layers, max(count, 1))
        stages, first = [], 0
        for index, device in enumerate(devices):
            last = first + size + (index < extra) - 1
            stages.append(
                Stage(
                    device=DeviceId(device), first_layer=first, last_layer=last, recompute=recompute
                )
            )
            first = last + 1
        return cls(
            stages=tuple(stages),
            num_layers=num_layers,
            microbatches=microbatches,
            schedule=schedule,
        )

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """One per stage; of a shared stage the first."""
        return tuple(stage.device for stage in self.stages)

    @property
    def all_devices(self) -> tuple[DeviceId, ...]:
        """Every device that has layers, stage by stage."""
        return tuple(device for stage in self.stages for device in stage.devices)

    def stage_of(self, device: str) -> int | None:
        """Index of the device's stage; None where it has none."""
        for index, stage in enumerate(self.stages):
            if stage.device == device:
                return index
        return None

    def digest(self) -> str:
        """SHA-256 of the plan's JSON: equal plans, equal digests."""
        return hashlib.sha256(values.to_json(self).encode()).hexdigest()


def _check_shares(index: int, stage: Stage) -> None:
    who = f"stage {index} ({stage.device})"
    if len(stage.shares) < 2 or stage.shares[0].device != stage.device:
        raise InvalidPlanError(
            f"{who}: shares must name the stage's own device first and at least one other,"
            f" got {[share.device for share in stage.shares]}"
        )
    for share in stage.shares:
        if share.rows < 1:
            raise InvalidPlanError(f"{who}: {share.device} has {share.rows} rows, must be >= 1")
