"""The world's truth: where devices are and how they move, in steps of a fixed length.

A model is a frozen value that says how devices move; `Movement` runs one from a seed. What a device
or a policy may know of it is in `sightings.py`: nothing here is for a policy to see.

The step `dt_s` is part of what a seed means: the path is the same bit for bit however many calls
it is asked for in (with the same numpy release), and another `dt_s` gives another path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator

from ..errors import InvalidValueError
from . import checks
from .checks import Bools, Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """A rectangle from (0, 0) to (`width_m`, `height_m`)."""

    width_m: float
    height_m: float

    def __post_init__(self) -> None:
        for name in ("width_m", "height_m"):
            checks.number(f"area: {name}", getattr(self, name), above=True)

    @classmethod
    def square(cls, side_m: float) -> Area:
        """The square of that side."""
        return cls(width_m=side_m, height_m=side_m)

    @property
    def size_m(self) -> Floats:
        """(`width_m`, `height_m`) as an array."""
        return np.array([self.width_m, self.height_m])

    def draw(self, count: int, generator: Generator) -> Floats:
        """Uniform places, `[count, 2]`, in metres."""
        return generator.random((count, 2)) * self.size_m

    def mean_distance_m(self) -> float:
        """Mean distance of two uniform places: 0.5214 sides of a square.

        Source: Ghosh 1951 (random distances within a rectangle); remembered, and tested.
        """
        a, b = self.width_m, self.height_m
        d = math.hypot(a, b)
        inner = d * (3 - (a / b) ** 2 - (b / a) ** 2) + a**3 / b**2 + b**3 / a**2
        logs = b**2 / a * math.log((a + d) / b) + a**2 / b * math.log((b + d) / a)
        return (inner + 2.5 * logs) / 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The truth at one time. Its arrays cannot be written to."""

    time_s: float
    positions_m: Floats
    """`[devices, 2]`; of a device that is absent: where it was last, or will be first."""
    velocities_m_per_s: Floats
    """`[devices, 2]`; 0 for a device that is absent."""
    present: Bools
    """`[devices]`"""
    occupants: np.ndarray
    """`[devices]` int64: who stands behind each number. It changes where one device has gone and a
    newcomer has taken its number."""


class Walk(Protocol):
    """Devices under way. `step` moves all by `dt_s`; the arrays may be overwritten by it."""

    positions_m: Floats
    velocities_m_per_s: Floats
    present: Bools
    occupants: np.ndarray

    def step(self, dt_s: float) -> None:
        """Moves all devices by `dt_s`."""
        ...


class MovementModel(Protocol):
    """How devices move. A plug-in is a class of this shape (`registry.py`)."""

    def start(self, devices: int, generator: Generator) -> Walk:
        """Devices at time 0, in the model's stationary distribution where it has one."""
        ...


class Movement:
    """Devices that move by a model, from one seed.

    Example:
        >>> from crowdmesh_jax.mobility import Area, Movement, RandomWaypoint
        >>> model = RandomWaypoint(area=Area.square(100), speed_min_m_per_s=0.5)
        >>> movement = Movement(model, 3, seed=1)
        >>> movement.advance(60)
        >>> movement.time_s, movement.snapshot().positions_m.shape
        (60.0, (3, 2))
    """

    def __init__(self, model: MovementModel, devices: int, *, seed: int, dt_s: float = 1.0) -> None:
        """Starts at time 0.

        Args:
            seed: Any integer >= 0.
            dt_s: Length of a step; part of what the seed means.

        Raises:
            InvalidValueError: A number out of range.
        """
        self.model = model
        self.devices = checks.whole("devices", devices, least=1, most=checks.MAX_DEVICES)
        self.dt_s = checks.number("dt_s", dt_s, above=True)
        self.steps = 0
        generator = np.random.default_rng(checks.whole("seed", seed))
        self._walk = model.start(self.devices, generator)
        if self._walk.positions_m.shape != (self.devices, 2):
            raise InvalidValueError(
                f"{type(model).__name__} was asked for {self.devices} devices and gave"
                f" positions of shape {self._walk.positions_m.shape}"
            )

    @property
    def time_s(self) -> float:
        """Now: whole steps times `dt_s`, so that no rounding adds up."""
        return self.steps * self.dt_s

    def advance(self, steps: int = 1) -> None:
        """Moves on by whole steps."""
        for _ in range(checks.whole("steps", steps)):
            self._walk.step(self.dt_s)
            self.steps += 1

    def advance_to(self, time_s: float) -> None:
        """Moves on to the last step at or before `time_s`.

        Raises:
            InvalidValueError: That is in the past.
        """
        # A hair more, so that 0.3 s are three steps of 0.1 s.
        steps = math.floor(checks.number("time_s", time_s) / self.dt_s * (1 + 1e-12))
        if steps < self.steps:
            raise InvalidValueError(
                f"the movement is at {self.time_s:g} s and cannot go back to {time_s:g} s; start"
                " one anew from the same seed"
            )
        self.advance(steps - self.steps)

    def snapshot(self) -> Snapshot:
        """The truth now, as copies."""
        return Snapshot(
            time_s=self.time_s,
            positions_m=checks.frozen(self._walk.positions_m),
            velocities_m_per_s=checks.frozen(self._walk.velocities_m_per_s),
            present=checks.frozen(self._walk.present),
            occupants=checks.frozen(self._walk.occupants),
        )


def everyone(devices: int) -> Bools:
    """All are there."""
    return np.ones(devices, np.bool_)
