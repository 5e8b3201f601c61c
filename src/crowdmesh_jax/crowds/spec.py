"""What a crowd is drawn from: classes of machines and of links, and how data and stays are spread.

Values only; the figures that were fitted stand in `fitted.py`, the drawing in `generate.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..core import Backhaul
from ..errors import InvalidCrowdError
from .spreads import LogNormal, Spread


def _positive(who: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InvalidCrowdError(f"{who}: {name} must be finite and > 0, got {value}")


def _whole(who: str, name: str, value: int, least: int) -> None:
    try:
        fine = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        fine = False
    if not fine:
        raise InvalidCrowdError(f"{who}: {name} must be an integer >= {least}, got {value!r}")


def _weights(who: str, name: str, weights: Sequence[float]) -> None:
    if not weights:
        raise InvalidCrowdError(f"{who}: {name} must not be empty")
    for weight in weights:
        _positive(who, f"each weight of {name}", weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineClass:
    """Machines of one kind: how fast they train, and how much memory they have."""

    name: str
    """Starts the ids of its devices: `phone-07`."""
    flops_per_s: Spread
    """Float32 training on the CPU."""
    ram_bytes: tuple[tuple[int, float], ...]
    """(bytes, weight) of each size that is sold, smallest first."""
    memory_share: float
    """Part of the RAM that is left to a training process."""
    rank_correlation: float = 0.0
    """Of speed with RAM, as the correlation of a Gaussian copula: 0.9 means that fast machines have
    much memory, nearly always."""

    def __post_init__(self) -> None:
        who = f"machine class {self.name!r}"
        _weights(who, "ram_bytes", [weight for _, weight in self.ram_bytes])
        sizes = [size for size, _ in self.ram_bytes]
        if sizes[0] < 1 or sizes != sorted(set(sizes)):
            raise InvalidCrowdError(f"{who}: ram_bytes must increase from >= 1, got {sizes}")
        if not 0 < self.memory_share <= 1:
            raise InvalidCrowdError(
                f"{who}: memory_share must be in (0, 1], got {self.memory_share}"
            )
        if not -1 <= self.rank_correlation <= 1:
            raise InvalidCrowdError(
                f"{who}: rank_correlation must be in [-1, 1], got {self.rank_correlation}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkClass:
    """Links of one kind, from a device to its access point and back."""

    name: str
    """Starts the names of its cells: `wifi5-2`."""
    downlink_bytes_per_s: Spread
    uplink_share: LogNormal
    """Uplink as a part of the same device's downlink."""
    latency_s: LogNormal
    """One way between device and access point."""
    cell_devices: int
    """At most so many devices share an access point or base station."""
    reach_m: float
    """Devices are placed this far from theirs, at most."""

    def __post_init__(self) -> None:
        who = f"link class {self.name!r}"
        _whole(who, "cell_devices", self.cell_devices, 1)
        _positive(who, "reach_m", self.reach_m)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A part of the crowd: machines of one class, on links of some classes."""

    machine: MachineClass
    weight: float
    """Its part of the crowd, relative to the other groups."""
    links: tuple[tuple[LinkClass, float], ...]
    """(class, weight): each device has one of them."""
    stay_s: LogNormal | None = None
    """Mean time that a device stays; it differs from one to the next. None: nobody leaves."""

    def __post_init__(self) -> None:
        who = f"group of {self.machine.name!r}"
        _positive(who, "weight", self.weight)
        _weights(who, "links", [weight for _, weight in self.links])


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """How labelled rows are spread over the devices: how many, and of which classes."""

    classes: int
    alpha: float
    """Of the symmetric Dirichlet that each device's mix of classes is drawn from: 0.1 leaves it one
    or two classes, 100 nearly all alike."""
    rows: LogNormal
    """Rows per device; at least one each."""

    def __post_init__(self) -> None:
        _whole("data of a crowd", "classes", self.classes, 1)
        _positive("data of a crowd", "alpha", self.alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrowdSpec:
    """All that a crowd is drawn from, but for the seed.

    Example:
        >>> import dataclasses
        >>> from crowdmesh_jax.crowds import CAMPUS, generate
        >>> skewed = dataclasses.replace(CAMPUS.data, alpha=0.1)
        >>> crowd = generate(dataclasses.replace(CAMPUS, devices=100, data=skewed), seed=7)
        >>> len(crowd.devices), len(crowd.links)
        (100, 0)
    """

    name: str
    devices: int
    groups: tuple[Group, ...]
    data: DataSpec
    cells: int = 0
    """All devices are spread evenly over so many cells, whatever their links; 0: each link class
    has as many cells of its own as its devices need."""
    layout: Literal["square", "road"] = "square"
    """Where cells lie: in a square, or one after the other along a road."""
    backhaul: Backhaul | None = None
    """Between cells, where it is slower than what the devices have."""

    def __post_init__(self) -> None:
        who = f"crowd {self.name!r}"
        _whole(who, "devices", self.devices, 1)
        _whole(who, "cells", self.cells, 0)
        if not self.groups:
            raise InvalidCrowdError(f"{who}: groups must not be empty")
        if self.layout not in ("square", "road"):
            raise InvalidCrowdError(f"{who}: layout must be square or road, got {self.layout!r}")
