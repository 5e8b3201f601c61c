"""Devices that stay where they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from ..errors import InvalidValueError
from . import checks
from .movement import Area, everyone


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """Uniform places in an area, or the places given. Nobody moves."""

    area: Area | None = None
    positions_m: tuple[tuple[float, float], ...] = ()
    """One for each device; (): drawn from `area`."""

    def __post_init__(self) -> None:
        if (self.area is None) == (not self.positions_m):
            raise InvalidValueError("static: give an area to draw from, or positions_m, not both")
        if self.positions_m:
            checks.array("static: positions_m", self.positions_m, last=2)

    def start(self, devices: int, generator: Generator) -> StaticWalk:
        """Devices at their places.

        Raises:
            InvalidValueError: Another number of devices than of places.
        """
        if self.area is not None:
            return StaticWalk(self.area.draw(devices, generator))
        if len(self.positions_m) != devices:
            raise InvalidValueError(
                f"static: {len(self.positions_m)} places for {devices} devices; give one each"
            )
        return StaticWalk(np.array(self.positions_m, np.float64))


class StaticWalk:
    """Places."""

    def __init__(self, positions_m: np.ndarray) -> None:
        self.positions_m = positions_m
        self.velocities_m_per_s = np.zeros_like(positions_m)
        self.present = everyone(len(positions_m))
        self.occupants = np.arange(len(positions_m))

    def step(self, dt_s: float) -> None:
        """Nothing."""
