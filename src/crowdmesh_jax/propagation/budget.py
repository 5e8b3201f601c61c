"""Bytes: what copies of a range take, what a device has left for them, what waves may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core import (
    Crowd,
    MemoryBreakdown,
    ModelProfile,
    PipelinePlan,
    ReplicaPlan,
    schedule_for,
    stage_memory,
)
from ..errors import InvalidValueError
from .seats import Room

HELD_VERSIONS = 2
"""Versions of a copy that a holder keeps at once: the durable one, and that of the open wave. With
waves that overlap it is three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What copies may take and cost. The same for every policy that is compared."""

    wave_bytes: int | None = None
    """Bytes that one wave may send in all; None: no limit."""
    bulk_bytes_per_s: float = math.inf
    """Bytes per second that copies may send in all: it stretches intervals."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Device -> memory for copies, at most; not named: what its own stage leaves."""
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    """Device -> disk for copies; not named: none."""
    copies: int = 1
    """Wanted copies of each layer beside the owner's."""
    held_versions: int = HELD_VERSIONS
    snapshots: int = 1
    """Own snapshots that each owner keeps in memory."""
    log_steps: int = 0
    """Steps of sent boundary frames that each device keeps in memory for replay."""

    def __post_init__(self) -> None:
        if not self.bulk_bytes_per_s > 0:
            raise InvalidValueError(
                f"budget: bulk_bytes_per_s must be > 0, got {self.bulk_bytes_per_s}"
            )
        if self.wave_bytes is not None and self.wave_bytes < 0:
            raise InvalidValueError(f"budget: wave_bytes must be >= 0, got {self.wave_bytes}")
        for name, least in (
            ("copies", 0),
            ("held_versions", 1),
            ("snapshots", 0),
            ("log_steps", 0),
        ):
            if getattr(self, name) < least:
                raise InvalidValueError(
                    f"budget: {name} must be >= {least}, got {getattr(self, name)}"
                )
        for name in ("memory_bytes", "disk_bytes"):
            for device, size in getattr(self, name).items():
                if size < 0:
                    raise InvalidValueError(
                        f"budget: {name} of {device!r} must be >= 0, got {size}"
                    )


def copy_bytes(profile: ModelProfile, first_layer: int, last_layer: int) -> int:
    """One version of a range: parameters, optimizer state and its globals, statistics."""
    names = ("parameter_bytes", "optimizer_bytes", "state_bytes")
    return sum(profile.total(n, first_layer, last_layer) for n in names) + profile.globals_bytes


def hosted_bytes(
    replicas: ReplicaPlan,
    profile: ModelProfile,
    device: str,
    *,
    versions: int = HELD_VERSIONS,
    keep: str = "memory",
) -> int:
    """What a device holds for others in memory (or on disk), for `stage_memory(hosted_bytes=)`."""
    return sum(
        versions * copy_bytes(profile, item.first_layer, item.last_layer)
        for item in replicas.ranges
        for replica in item.replicas
        if replica.device == device and replica.keep == keep
    )


def stage_need(
    profile: ModelProfile,
    plan: PipelinePlan,
    index: int,
    *,
    snapshots: int = 0,
    log_steps: int = 0,
    hosted_bytes: int = 0,
    compile_peak_bytes: int | None = None,
) -> MemoryBreakdown:
    """Memory of one stage of a plan under its schedule."""
    schedule = schedule_for(plan)
    more = {} if compile_peak_bytes is None else {"compile_peak_bytes": compile_peak_bytes}
    return stage_memory(
        profile,
        plan.stages[index],
        stage_index=index,
        num_stages=len(plan.stages),
        in_flight=schedule.max_in_flight(index),
        awaiting_weight=schedule.max_awaiting_weight(index),
        snapshots=snapshots,
        log_steps=log_steps,
        hosted_bytes=hosted_bytes,
        **more,
    )


def rooms(
    plan: PipelinePlan, profile: ModelProfile, crowd: Crowd, budget: Budget
) -> dict[str, Room]:
    """Bytes that each device of the crowd has for copies.

    Of memory, what training leaves: copies are held while the stage trains. A device without a
    stage has all of it, up to the budget's own limit.
    """
    needs: dict[str, int] = {}
    for index, stage in enumerate(plan.stages):
        need = stage_need(
            profile, plan, index, snapshots=budget.snapshots, log_steps=budget.log_steps
        ).training_bytes
        needs.update(dict.fromkeys(stage.devices, need))
    found = {}
    for device in crowd.devices:
        left = max(0, device.memory_bytes - needs.get(device.id, 0))
        found[device.id] = Room(
            memory_bytes=min(left, budget.memory_bytes.get(device.id, left)),
            disk_bytes=budget.disk_bytes.get(device.id, 0),
        )
    return found


def move_s(profile: ModelProfile, crowd: Crowd, before: PipelinePlan, after: PipelinePlan) -> float:
    """Seconds to move the states of layers that change hands, all links at once."""
    owner = {layer: s.device for s in before.stages for layer in s.layers}
    bytes_over: dict[tuple[str, str], int] = {}
    for stage in after.stages:
        for layer in stage.layers:
            if owner[layer] != stage.device:
                pair = (str(owner[layer]), str(stage.device))
                bytes_over[pair] = bytes_over.get(pair, 0) + copy_bytes(profile, layer, layer)
    seconds = [0.0]
    for (source, target), size in bytes_over.items():
        link = crowd.link(source, target)
        rate = link.bandwidth_bytes_per_s if link is not None else 0.0
        seconds.append(size / rate if rate > 0 else math.inf)
    return max(seconds)
