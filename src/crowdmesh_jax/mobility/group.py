"""Reference-point group movement: people who walk together.

Each group has a centre that moves by a model of its own; each member has a fixed reference point
beside the centre and strays from it a little (Hong, Gerla, Pei and Chiang, "A group mobility model
for ad hoc wireless networks", MSWiM 1999). There a member's place jumps to a new random vector at
each tick; here it walks straight to a new one within `stray_period_s`, so that velocities are those
of the path. A member is never farther than `spread_m + stray_m` from its centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.random import Generator

from ..errors import InvalidValueError
from . import checks
from .checks import Floats
from .movement import Area, MovementModel, everyone
from .waypoint import RandomWaypoint


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMovement:
    """Groups of `group_size` (the last one may be smaller) around centres that move."""

    area: Area
    """Members stay inside: centres keep `spread_m + stray_m` from its border."""
    group_size: int = 5
    spread_m: float = 10.0
    """Reference points lie uniformly in this disc around the centre."""
    stray_m: float = 2.0
    """How far a member may be from its reference point."""
    stray_period_s: float = 10.0
    """A member walks to a new place around its reference point in this time."""
    speed_min_m_per_s: float = 0.5
    speed_max_m_per_s: float = 1.5
    pause_max_s: float = 0.0
    """Centres are random waypoints with these speeds and pauses."""
    centres: MovementModel | None = None
    """Another movement of centres; where they go is then up to it."""

    def __post_init__(self) -> None:
        checks.whole("group movement: group_size", self.group_size, least=1)
        for name in ("spread_m", "stray_m"):
            checks.number(f"group movement: {name}", getattr(self, name))
        checks.number("group movement: stray_period_s", self.stray_period_s, above=True)
        if self.centres is None:
            self._waypoints()

    def _waypoints(self) -> RandomWaypoint:
        margin_m = self.spread_m + self.stray_m
        if 2 * margin_m >= min(self.area.width_m, self.area.height_m):
            raise InvalidValueError(
                f"group movement: groups of radius {margin_m:g} m do not fit into an area of"
                f" {self.area.width_m:g} x {self.area.height_m:g} m; lower spread_m or stray_m"
            )
        inner = replace(
            self.area,
            width_m=self.area.width_m - 2 * margin_m, height_m=self.area.height_m - 2 * margin_m,
        )  # fmt: skip
        return RandomWaypoint(
            area=inner,
            speed_min_m_per_s=self.speed_min_m_per_s,
            speed_max_m_per_s=self.speed_max_m_per_s,
            pause_max_s=self.pause_max_s,
        )

    def start(self, devices: int, generator: Generator) -> GroupWalk:
        """Groups at a typical moment of their centres."""
        return GroupWalk(self, devices, generator)


class GroupWalk:
    """Centres, reference points and strays; `groups[device]` is its group's number."""

    def __init__(self, model: GroupMovement, devices: int, generator: Generator) -> None:
        self._model, self._generator = model, generator
        self.groups = np.arange(devices) // model.group_size
        count = int(self.groups[-1]) + 1
        if model.centres is None:
            self._shift_m = np.full(2, model.spread_m + model.stray_m)
            centres = cast(MovementModel, model._waypoints())
        else:
            self._shift_m, centres = np.zeros(2), model.centres
        self._centres = centres.start(count, generator)
        self._references_m = _in_disc(devices, model.spread_m, generator)
        self._from_m = _in_disc(devices, model.stray_m, generator)
        self._to_m = _in_disc(devices, model.stray_m, generator)
        # Members do not all turn at once: each is somewhere on its way.
        self._phase = generator.random(devices)
        self.occupants = np.arange(devices)
        self.present = everyone(devices)
        self._place()

    @property
    def centres_m(self) -> Floats:
        """Where each device's centre is, `[devices, 2]`."""
        return (self._centres.positions_m + self._shift_m)[self.groups]

    def _place(self) -> None:
        stray_m = self._from_m + self._phase[:, None] * (self._to_m - self._from_m)
        self.positions_m = self.centres_m + self._references_m + stray_m
        self.velocities_m_per_s = (
            self._centres.velocities_m_per_s[self.groups]
            + (self._to_m - self._from_m) / self._model.stray_period_s
        )
        self.present = self._centres.present[self.groups]

    def step(self, dt_s: float) -> None:
        """Moves centres and members."""
        self._centres.step(dt_s)
        self._phase = self._phase + dt_s / self._model.stray_period_s
        turning = np.flatnonzero(self._phase >= 1)
        if len(turning):
            # However long the step: one turn per device is drawn, the phase is what is left.
            self._from_m[turning] = self._to_m[turning]
            self._to_m[turning] = _in_disc(len(turning), self._model.stray_m, self._generator)
            self._phase[turning] -= np.floor(self._phase[turning])
        self._place()


def _in_disc(count: int, radius_m: float, generator: Generator) -> Floats:
    """Uniform places in a disc around 0, `[count, 2]`."""
    radius, turn = generator.random((2, count))
    length_m, angle = radius_m * np.sqrt(radius), 2 * math.pi * turn
    return np.stack([length_m * np.cos(angle), length_m * np.sin(angle)], axis=1)
