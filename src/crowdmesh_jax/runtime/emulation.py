"""Several unequal devices on one machine: what speed and which core each agent gets.

Each device is pinned to a core, the fastest first to the core with the least load. The emulated
speeds are scaled by one factor so that devices which share a core need at most 0.8 of it, and one
that has a core to itself at most all of it: each op's CPU seconds are then really there when its
device wants them, caches stay warm, and the ratios between devices are kept. Knows nothing of
processes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..core import Crowd

CORE_SHARE = 0.8
"""Of a core that devices share; the rest is for transport threads and the system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """What a launcher gives each device. `crowd` has the speeds and rates that result."""

    crowd: Crowd
    factor: float
    """All speeds were multiplied by this."""
    cores: Mapping[str, int]
    """Core that a device's agent is pinned to; without emulation nobody is."""

    def describe(self) -> str:
        """One line for people: the factor and why."""
        if self.cores and all(device.speed == 1.0 for device in self.crowd.devices):
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
    loads: dict[int, list[float]] = {core: [] for core in cores}
    pinned: dict[str, int] = {}
    # The fastest first, each to the core with the least load: 4/3 of the best at most (Graham).
    for device in sorted(crowd.devices, key=lambda device: -device.speed):
        core = min(cores, key=lambda core: (sum(loads[core]), core))
        loads[core].append(device.speed)
        pinned[device.id] = core
    shared = [CORE_SHARE / sum(speeds) for speeds in loads.values() if len(speeds) > 1]
    factor = min([1.0 / max(device.speed for device in crowd.devices), *shared])
    if factor == 1.0:
        return Emulation(crowd=crowd, factor=1.0, cores=pinned)
    devices = tuple(
        dataclasses.replace(
            device, speed=device.speed * factor, flops_per_s=device.flops_per_s * factor
        )
        for device in crowd.devices
    )
    return Emulation(crowd=dataclasses.replace(crowd, devices=devices), factor=factor, cores=pinned)
