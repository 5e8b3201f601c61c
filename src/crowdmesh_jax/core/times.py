"""Seconds of stages and cuts, ops and transfers with their times, and what all clocks need.

Values: neither the longest path (`timeline`) nor the simulation of shared channels (`contention`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidValueError, ScheduleError
from .schedule import OpKind, Schedule

Direction = Literal["forward", "backward"]


def _check(value: object, *names: str) -> None:
    for name in names:
        seconds = getattr(value, name)
        if not 0 <= seconds < math.inf:
            kind = type(value).__name__
            raise InvalidValueError(f"{kind}: {name} must be finite and >= 0, got {seconds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage: per microbatch (forward, backward) and per step (the rest)."""

    forward_s: float
    backward_s: float
    """All of the backward, whether it is split or not."""
    update_s: float = 0.0
    reduce_s: float = 0.0
    weight_s: float = 0.0
    """The part of `backward_s` that a split backward may do later: gradients of the weights."""

    def __post_init__(self) -> None:
        _check(self, "forward_s", "backward_s", "update_s", "reduce_s", "weight_s")
        if self.weight_s > self.backward_s:
            raise InvalidValueError(
                f"StageTimes: weight_s {self.weight_s} is a part of backward_s {self.backward_s}"
            )

    @property
    def compute_s(self) -> float:
        """C_s: forward and backward of one microbatch."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTimes:
    """Seconds of one cut per microbatch. Transfers occupy the link direction, latencies do not."""

    forward_latency_s: float = 0.0
    forward_transfer_s: float = 0.0
    backward_latency_s: float = 0.0
    backward_transfer_s: float = 0.0
    forward_channels: tuple[str, ...] = ()
    """What a transfer downstream has for itself while it lasts: those with a channel in common, of
    any cut and direction, take turns. (): its own direction of this cut alone."""
    backward_channels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(
            self,
            "forward_latency_s",
            "forward_transfer_s",
            "backward_latency_s",
            "backward_transfer_s",
        )

    @property
    def forward_s(self) -> float:
        """From the first byte sent downstream to the last one received."""
        return self.forward_latency_s + self.forward_transfer_s

    @property
    def backward_s(self) -> float:
        """The same on the way back."""
        return self.backward_latency_s + self.backward_transfer_s

    @property
    def round_trip_s(self) -> float:
        return self.forward_s + self.backward_s

    @property
    def busiest_s(self) -> float:
        """Seconds that the busier direction is occupied per microbatch; both, if they share it."""
        if not set(self.forward_channels).isdisjoint(self.backward_channels):
            return self.forward_transfer_s + self.backward_transfer_s
        return max(self.forward_transfer_s, self.backward_transfer_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOp:
    """An op and when it runs, in seconds since the step began."""

    stage: int
    kind: OpKind
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedTransfer:
    """A transfer: first byte sent at `start_s`, last received at `end_s` (latency included)."""

    cut: int
    direction: Direction
    microbatch: int
    start_s: float
    end_s: float


def deadlock(schedule: Schedule, position: Sequence[int]) -> ScheduleError:
    """What to say of stages that wait for each other for ever."""
    stuck = ", ".join(
        f"stage {s} at {ops[at]}"
        for s, (ops, at) in enumerate(zip(schedule.ops, position, strict=True))
        if at < len(ops)
    )
    return ScheduleError(f"schedule {schedule.name!r} deadlocks: {stuck}")


def op_seconds(schedule: Schedule, stages: Sequence[StageTimes]) -> list[float]:
    """Seconds of a `B` op per stage: the backward, without its weight part where it is split."""
    return [
        times.backward_s - times.weight_s if schedule.is_split(stage) else times.backward_s
        for stage, times in enumerate(stages)
    ]
