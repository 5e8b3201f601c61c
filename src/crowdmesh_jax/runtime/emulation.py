"""Several unequal devices on one machine: what speed and which core each agent gets.

The emulated speeds are scaled by one factor so that their sum is at most 0.8 of the cores: each
op's CPU seconds are then really there when its device wants them, and the ratios between devices
are kept. Devices that are all at speed 1 and no more than the cores need no emulation: each is
pinned to a core and runs at the machine's own pace. Knows nothing of processes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..core import Crowd

CORE_SHARE = 0.8
"""Of the cores; the rest is for transport threads, the coordinator and the system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """What a launcher gives each device. `crowd` has the speeds and rates that result."""

    crowd: Crowd
    factor: float
    """All speeds were multiplied by this."""
    cores: Mapping[str, int]
    """Core that a device's agent is pinned to; devices not named float over all cores."""

    def describe(self) -> str:
        """One line for people: the factor and why."""
        if self.factor == 1.0 and self.cores:
            return "each device has a core of its own, at the machine's own speed"
        speeds = ", ".join(f"{d.id} {d.speed:.3f}" for d in self.crowd.devices)
        return f"emulated speeds, scaled by {self.factor:.3f} to fit the cores: {speeds}"


def available_cores() -> tuple[int, ...]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def emulate(crowd: Crowd, cores: tuple[int, ...] | None = None) -> Emulation:
    """Fits the crowd's speeds to the cores of this machine."""
    cores = available_cores() if cores is None else cores
    speeds = [device.speed for device in crowd.devices]
    if all(speed == 1.0 for speed in speeds) and len(speeds) <= len(cores):
        ids: list[str] = [device.id for device in crowd.devices]
        pinned = dict(zip(ids, cores, strict=False))
        return Emulation(crowd=crowd, factor=1.0, cores=pinned)
    factor = min(1.0 / max(speeds), CORE_SHARE * len(cores) / sum(speeds))
    devices = tuple(
        dataclasses.replace(
            device, speed=device.speed * factor, flops_per_s=device.flops_per_s * factor
        )
        for device in crowd.devices
    )
    return Emulation(crowd=dataclasses.replace(crowd, devices=devices), factor=factor, cores={})
