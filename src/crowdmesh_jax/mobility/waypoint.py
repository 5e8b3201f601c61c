"""Random waypoint, started in its stationary distribution.

A device goes straight to a place drawn uniformly, at a speed drawn uniformly, waits there for a
time drawn uniformly, and goes on. Started at rest at uniform places the model takes hundreds of
seconds to settle: devices get slower and gather in the middle. So time 0 is drawn from the
stationary distribution itself (perfect simulation): paused or under way in the share of time that
each takes; if under way, a leg in proportion to its length, a place uniform on it, and a speed of
density ~ 1/v (Navidi and Camp, "Stationary distributions for the random waypoint mobility model",
IEEE TMC 2004; Le Boudec and Vojnovic, INFOCOM 2005).

Known of it, and tested: mean speed under way (vmax - vmin) / ln(vmax / vmin); paused share
E[pause] / (E[pause] + E[leg] E[1/v]); on a line of length 1 places have the density 6x(1 - x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from . import checks
from .checks import Bools, Floats
from .movement import Area, everyone


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWaypoint:
    """Straight legs between uniform places of a rectangle, with pauses."""

    area: Area
    speed_min_m_per_s: float = 0.5
    """Above 0: with 0 a few legs never end and the mean speed sinks for ever (Yoon et al. 2003)."""
    speed_max_m_per_s: float = 1.5
    pause_min_s: float = 0.0
    pause_max_s: float = 0.0

    def __post_init__(self) -> None:
        low = checks.number(
            "random waypoint: speed_min_m_per_s", self.speed_min_m_per_s, above=True
        )
        checks.number("random waypoint: speed_max_m_per_s", self.speed_max_m_per_s, least=low)
        least = checks.number("random waypoint: pause_min_s", self.pause_min_s)
        checks.number("random waypoint: pause_max_s", self.pause_max_s, least=least)

    def start(self, devices: int, generator: Generator) -> WaypointWalk:
        """Devices at a typical moment."""
        return WaypointWalk(self, devices, generator)

    def mean_inverse_speed_s_per_m(self) -> float:
        """E[1/v] of a leg's speed, drawn uniformly."""
        low, high = self.speed_min_m_per_s, self.speed_max_m_per_s
        # log1p keeps its digits where the two are nearly equal.
        spread = (high - low) / low
        return math.log1p(spread) / (high - low) if spread > 1e-12 else 1 / low

    def moving_speed_m_per_s(self) -> float:
        """Mean speed over time under way: (vmax - vmin) / ln(vmax / vmin)."""
        return 1 / self.mean_inverse_speed_s_per_m()

    def pause_share(self) -> float:
        """Share of time that a device stands still."""
        pause_s = (self.pause_min_s + self.pause_max_s) / 2
        leg_s = self.area.mean_distance_m() * self.mean_inverse_speed_s_per_m()
        return pause_s / (pause_s + leg_s)

    def mean_speed_m_per_s(self) -> float:
        """Mean speed over all time, pauses included."""
        return (1 - self.pause_share()) * self.moving_speed_m_per_s()

    def draw_speeds(self, count: int, generator: Generator) -> Floats:
        """Speeds of new legs."""
        return generator.uniform(self.speed_min_m_per_s, self.speed_max_m_per_s, count)

    def draw_pauses(self, count: int, generator: Generator) -> Floats:
        """Lengths of new pauses."""
        return generator.uniform(self.pause_min_s, self.pause_max_s, count)


class WaypointWalk:
    """Each device's target, speed and what is left of its pause. Legs end inside steps, exactly."""

    def __init__(self, model: RandomWaypoint, devices: int, generator: Generator) -> None:
        self._model, self._generator = model, generator
        paused = generator.random(devices) < model.pause_share()
        origins_m, self._targets_m = _legs_by_length(model.area, devices, generator)
        along = generator.random((devices, 1))
        self.positions_m = origins_m + along * (self._targets_m - origins_m)
        # Density ~ 1/v: slow legs last longer, so more devices are found on them.
        low, high = model.speed_min_m_per_s, model.speed_max_m_per_s
        self._speeds = low * (high / low) ** generator.random(devices)
        # A pause that is found under way is found in proportion to its length, uniformly in it.
        a, b = model.pause_min_s, model.pause_max_s
        lengths_s = np.sqrt(a**2 + generator.random(devices) * (b**2 - a**2))
        self._pauses_s = np.where(paused, lengths_s * generator.random(devices), 0.0)
        # A paused device has arrived; what comes next is drawn when it goes on.
        places_m = model.area.draw(devices, generator)
        self.positions_m[paused] = places_m[paused]
        self._arrived = paused
        self.velocities_m_per_s = np.zeros((devices, 2))
        self.present = everyone(devices)
        self.occupants = np.arange(devices)
        self._head(~paused)

    def _head(self, going: Bools) -> None:
        """Points the velocities of those devices to their targets."""
        way_m = self._targets_m[going] - self.positions_m[going]
        length_m = np.hypot(way_m[:, 0], way_m[:, 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = np.where(length_m[:, None] > 0, way_m / length_m[:, None], 0.0)
        self.velocities_m_per_s[going] = unit * self._speeds[going, None]

    def step(self, dt_s: float) -> None:
        """Moves all; those that arrive or go on inside the step spend what is left of it."""
        left_s = np.full(len(self.positions_m), dt_s)
        while True:
            waiting = self._arrived & (left_s > 0)
            if waiting.any():
                spent_s = np.minimum(self._pauses_s[waiting], left_s[waiting])
                self._pauses_s[waiting] -= spent_s
                left_s[waiting] -= spent_s
                ready = waiting & (self._pauses_s <= 0)
                if ready.any():
                    self._set_off(ready)
            going = ~self._arrived & (left_s > 0)
            if not going.any():
                break
            self._go(np.flatnonzero(going), left_s)

    def _set_off(self, ready: Bools) -> None:
        count = int(ready.sum())
        self._targets_m[ready] = self._model.area.draw(count, self._generator)
        self._speeds[ready] = self._model.draw_speeds(count, self._generator)
        self._arrived[ready] = False
        self._head(ready)

    def _go(self, who: np.ndarray, left_s: Floats) -> None:
        way_m = self._targets_m[who] - self.positions_m[who]
        needs_s = np.hypot(way_m[:, 0], way_m[:, 1]) / self._speeds[who]
        arrives = needs_s <= left_s[who]
        on, there = who[~arrives], who[arrives]
        self.positions_m[on] += self.velocities_m_per_s[on] * left_s[on, None]
        left_s[on] = 0.0
        self.positions_m[there] = self._targets_m[there]
        left_s[there] -= needs_s[arrives]
        self.velocities_m_per_s[there] = 0.0
        self._arrived[there] = True
        self._pauses_s[there] = self._model.draw_pauses(len(there), self._generator)
        # Without a pause it turns at once, also where nothing of the step is left: no device
        # stands still at the end of a step unless it pauses.
        turning = np.zeros(len(left_s), np.bool_)
        turning[there] = self._pauses_s[there] <= 0
        if turning.any():
            self._set_off(turning)


def _legs_by_length(area: Area, count: int, generator: Generator) -> tuple[Floats, Floats]:
    """Ends of legs whose density is uniform times their length, by rejection; `[count, 2]` each."""
    longest_m = math.hypot(area.width_m, area.height_m)
    ends = np.empty((2, count, 2))
    found = 0
    while found < count:
        # A square accepts 37 % of pairs, a long strip 33 %.
        tries = 3 * (count - found) + 16
        a, b = area.draw(tries, generator), area.draw(tries, generator)
        length_m = np.hypot(*(b - a).T)
        kept = np.flatnonzero(generator.random(tries) * longest_m < length_m)[: count - found]
        ends[0, found : found + len(kept)], ends[1, found : found + len(kept)] = a[kept], b[kept]
        found += len(kept)
    return ends[0], ends[1]
