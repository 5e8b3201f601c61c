"""What placement is asked and what it answers: prospects, rooms, seats, and what a set is worth.

Values and judgement; the search is in `placement`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core import DeviceId, Keep
from ..errors import InvalidValueError
from .groups import HazardGroups

LEAST_PRESENCE = 0.02
"""Nobody is asked to keep a copy who will be gone with a higher probability than 1 - this."""

Value = tuple[int, float]
"""(weight of ranges with a copy in billionths, weighted expected speed). The first is whole, so
that sums in another order are the same number: it decides before the second is looked at."""
WEIGHT_UNIT = 1_000_000_000
Seat = tuple[str, Keep]
Lack = Literal["nobody", "hazard", "memory", "bytes", "competition"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """What a device promises as holder of one range."""

    device: DeviceId
    presence: float
    """Chance that it is there and reachable when the owner is lost."""
    speed: float = 1.0
    """How fast it would go on with the range, relative to the fastest device, in 0..1."""

    def __post_init__(self) -> None:
        for name in ("presence", "speed"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InvalidValueError(
                    f"prospect {self.device!r}: {name} must lie in 0..1, got {value}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRange:
    """A range of layers that wants copies."""

    owner: DeviceId
    first_layer: int
    last_layer: int
    held_bytes: int
    """What a holder must keep room for: all versions of the range that it may hold at once."""
    wave_bytes: int
    """What one wave sends to each holder."""
    prospects: tuple[Prospect, ...] = ()
    weight: float = 1.0
    """How much a copy of it matters: the owner's chance of being lost, say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes that a device has for copies."""

    memory_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """Ranges that want copies, devices with room, and limits."""

    ranges: tuple[PlacementRange, ...]
    rooms: Mapping[str, Room]
    """Device -> room; a device that is not named has none."""
    groups: HazardGroups = field(default_factory=HazardGroups)
    copies: int = 1
    """Wanted copies of each range, beside the owner's."""
    wave_bytes: int | None = None
    """Bytes that one wave may send in all; None: no limit."""
    least_presence: float = LEAST_PRESENCE

    def __post_init__(self) -> None:
        if self.copies < 0:
            raise InvalidValueError(f"copies must be >= 0, got {self.copies}")
        for item in self.ranges:
            if item.held_bytes < 0 or item.wave_bytes < 0 or not 0 <= item.weight < math.inf:
                raise InvalidValueError(
                    f"placement of layers {item.first_layer}-{item.last_layer}:"
                    " bytes and weight must be finite and >= 0"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unprotected:
    """A range that gets no copy, and why."""

    owner: DeviceId
    first_layer: int
    last_layer: int
    lack: Lack
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Holders of each range, in the order of the problem's ranges."""

    seats: tuple[tuple[Seat, ...], ...]
    """Per range: (device, where it keeps the copy), the most valuable first."""
    value: Value
    bound: Value
    """No placement is worth more. Equal to `value` where `optimal`."""
    optimal: bool
    guarantee: float
    """At least this part of the optimum, whatever the case: 1, or 1 / (1 + k) of the greedy."""
    unprotected: tuple[Unprotected, ...] = ()

    @property
    def protection(self) -> Literal["full", "partial", "none"]:
        """Whether all, some or none of the ranges have a copy."""
        if not self.unprotected:
            return "full"
        return "partial" if any(self.seats) else "none"

    def tell(self, *, checkpoint_step: int | None = None) -> str:
        """What is protected and what remains where it is not; "" where all is.

        To be said before training starts, not when a device is gone.

        Args:
            checkpoint_step: Newest checkpoint; None: the one that is written before step 0.
        """
        if not self.unprotected:
            return ""
        count = len(self.seats)
        lines = [
            (
                f"{len(self.unprotected)} of {count} ranges of layers have no second copy:"
                f" protection is {self.protection}"
            )
        ]
        for item in self.unprotected:
            lines.append(
                f"  layers {item.first_layer}-{item.last_layer} of {item.owner}: {item.detail}"
            )
        back = (
            "version 0, the checkpoint written before step 0"
            if checkpoint_step is None
            else f"the checkpoint of step {checkpoint_step}"
        )
        owners = ", ".join(sorted({item.owner for item in self.unprotected}))
        lines.append(
            f"  remains  if {owners} is lost, all stages roll back to {back}; losses of others are"
            " covered by their copies"
            if self.protection == "partial"
            else f"  remains  any loss rolls all stages back to {back}"
        )
        lines.append(
            "  try      more memory or disk for copies, more bytes a wave, checkpoints more often"
        )
        return "\n".join(lines)


def set_value(item: PlacementRange, devices: Sequence[str]) -> Value:
    """(weight in billionths, weighted f) of those holders; (0, 0) of none."""
    if not devices:
        return (0, 0.0)
    found = [prospect for prospect in item.prospects if prospect.device in devices]
    chosen = sorted(found, key=lambda p: (-p.speed, p.device)) if len(found) > 1 else found
    expected, nobody_faster = 0.0, 1.0
    for prospect in chosen:
        expected += prospect.speed * prospect.presence * nobody_faster
        nobody_faster *= 1 - prospect.presence
    return (round(item.weight * WEIGHT_UNIT), item.weight * expected)


def feasible(problem: PlacementProblem, seats: Sequence[Sequence[Seat]]) -> bool:
    """Whether holders of all ranges together keep every limit."""
    used: dict[Seat, int] = {}
    sent = 0
    for item, chosen in zip(problem.ranges, seats, strict=True):
        if len(chosen) > problem.copies:
            return False
        if not problem.groups.apart([item.owner, *(device for device, _ in chosen)]):
            return False
        for seat in chosen:
            used[seat] = used.get(seat, 0) + item.held_bytes
            sent += item.wave_bytes
    if problem.wave_bytes is not None and sent > problem.wave_bytes:
        return False
    return all(size <= room_of(problem, seat) for seat, size in used.items())


def room_of(problem: PlacementProblem, seat: Seat) -> int:
    """Bytes that a device has there in all."""
    device, keep = seat
    room = problem.rooms.get(device, Room())
    return room.memory_bytes if keep == "memory" else room.disk_bytes
