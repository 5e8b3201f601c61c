"""What a device or a policy may know of the movement: past positions, with noise, and estimates.

An `Observer` is shown snapshots of the truth as they happen and hands out `Sightings`: copies, with
noise from the generator that it was given, as late as `delay_s` says. It never sees a `Movement`,
so nothing of the future can reach a policy that gets sightings only.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from ..errors import InvalidValueError
from . import checks
from .checks import Bools, Floats
from .movement import Snapshot

MAX_KEPT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sightings:
    """What is known at `now_s`. Arrays are copies that cannot be written to."""

    now_s: float
    seen_s: Floats
    """When each device was last seen, `[devices]`; -inf: never, or not since it took its number."""
    positions_m: Floats
    """Where, with noise, `[devices, 2]`; 0 where never seen."""
    velocities_m_per_s: Floats
    """Measured with noise, or estimated from past positions; 0 where neither is possible yet."""
    velocity_sd_m_per_s: Floats
    """Standard error of each component, from the noise alone, `[devices]`; infinite: unknown."""
    occupants: np.ndarray
    """Who stood behind each number when last seen; -1: nobody seen yet."""
    straight_s: Floats | None = None
    """For how long no turn, stop or start of each was noticed, `[devices]`; None: nobody looked."""

    @property
    def known(self) -> Bools:
        """Who was seen at all."""
        return np.isfinite(self.seen_s)

    @property
    def age_s(self) -> Floats:
        """How old each sighting is; infinite where there is none."""
        return self.now_s - self.seen_s

    def positions_at(self, time_s: float) -> Floats:
        """Where devices would be if they went on straight from where they were seen."""
        ahead_s = np.where(self.known, time_s - np.where(self.known, self.seen_s, 0.0), 0.0)
        return self.positions_m + self.velocities_m_per_s * ahead_s[:, None]


class Observer:
    """Turns the truth, as it happens, into sightings."""

    def __init__(
        self,
        devices: int,
        generator: Generator,
        *,
        position_noise_m: float = 0.0,
        velocity_noise_m_per_s: float | None = None,
        delay_s: float = 0.0,
        window: int = 5,
        missed_share: float = 0.0,
    ) -> None:
        """Nothing is known yet.

        Args:
            generator: For the noise; of its own, so that the noise changes no path.
            position_noise_m: Standard deviation of each coordinate.
            velocity_noise_m_per_s: Standard deviation of each component of a measured velocity.
                None: velocities are not measured, but fitted to the last positions.
            delay_s: How long it takes until what was seen is known.
            window: Sightings that a velocity is fitted to, by least squares.
            missed_share: Share of sightings that fail, at random.
        """
        self.devices = checks.whole("devices", devices, least=1, most=checks.MAX_DEVICES)
        self._generator = generator
        self._noise_m = checks.number("position_noise_m", position_noise_m)
        self._velocity_noise = (
            None
            if velocity_noise_m_per_s is None
            else checks.number("velocity_noise_m_per_s", velocity_noise_m_per_s)
        )
        self._delay_s = checks.number("delay_s", delay_s)
        self._window = checks.whole("window", window, least=2, most=1000)
        self._missed = checks.number("missed_share", missed_share)
        if self._missed > 1:
            raise InvalidValueError(f"missed_share must be <= 1, got {missed_share}")
        self._seen: deque[_Seen] = deque()
        self._occupants = np.full(self.devices, -1)
        self._newest: list[Floats] | None = None
        self._last_s = self._told_s = -math.inf

    def observe(self, snapshot: Snapshot) -> Sightings:
        """Looks at the truth now, and tells what is known now.

        Raises:
            InvalidValueError: Another number of devices, or a time that is not after the last.
        """
        if len(snapshot.positions_m) != self.devices:
            raise InvalidValueError(
                f"an observer of {self.devices} devices was shown {len(snapshot.positions_m)}"
            )
        if not snapshot.time_s > self._last_s:
            raise InvalidValueError(
                f"shown {snapshot.time_s:g} s after {self._last_s:g} s; time must go on"
            )
        self._last_s = snapshot.time_s
        # The same count of draws at each look, whoever is there.
        normal = self._generator.standard_normal((2, self.devices, 2))
        seen = snapshot.present & (self._generator.random(self.devices) >= self._missed)
        noise = 0.0 if self._velocity_noise is None else self._velocity_noise
        self._seen.append(
            _Seen(
                snapshot.time_s,
                snapshot.positions_m + self._noise_m * normal[0],
                snapshot.velocities_m_per_s + noise * normal[1],
                seen,
                snapshot.occupants,
            )
        )
        if len(self._seen) > MAX_KEPT:
            raise InvalidValueError(
                f"delay_s = {self._delay_s:g} holds back over {MAX_KEPT} looks; look less often"
            )
        return self._tell()

    def _tell(self) -> Sightings:
        known = [each for each in self._seen if each.time_s <= self._last_s - self._delay_s]
        fresh = [each for each in known if each.time_s > self._told_s]
        for _ in range(len(known) - self._window):
            self._seen.popleft()
        known = known[-self._window :]
        if self._newest is None:
            nowhere = np.zeros((self.devices, 2))
            never = np.full(self.devices, -math.inf)
            self._newest = [never, nowhere, nowhere.copy()]
        seen_s, places_m, velocities = self._newest
        for each in fresh:
            self._told_s = each.time_s
            who = each.seen
            seen_s[who], places_m[who] = each.time_s, each.positions_m[who]
            velocities[who] = each.velocities_m_per_s[who]
            self._occupants[who] = each.occupants[who]
        if self._velocity_noise is None:
            velocities, sd = self._fitted(known)
        else:
            sd = np.where(np.isfinite(seen_s), self._velocity_noise, math.inf)
        return Sightings(
            now_s=self._last_s,
            seen_s=checks.frozen(seen_s),
            positions_m=checks.frozen(places_m),
            velocities_m_per_s=checks.frozen(velocities),
            velocity_sd_m_per_s=checks.frozen(sd),
            occupants=checks.frozen(self._occupants),
        )

    def _fitted(self, known: list[_Seen]) -> tuple[Floats, Floats]:
        """Slopes of straight lines through each device's last positions, and their errors."""
        if not known:
            return np.zeros((self.devices, 2)), np.full(self.devices, math.inf)
        counts = np.stack([e.seen & (e.occupants == self._occupants) for e in known]).astype(float)
        times_s = np.array([e.time_s for e in known]) - known[-1].time_s
        places_m = np.stack([e.positions_m for e in known])
        many = counts.sum(axis=0)
        safe = np.maximum(many, 1)
        since_s = times_s[:, None] - times_s @ counts / safe
        square = (counts * since_s**2).sum(axis=0)
        enough = (many >= 2) & (square > 0)
        # Centred times add up to 0, so the mean position drops out.
        slope = np.einsum("wn,wnd->nd", counts * since_s, places_m)
        bottom = np.where(enough, square, 1.0)
        velocities = np.where(enough[:, None], slope / bottom[:, None], 0.0)
        return velocities, np.where(enough, self._noise_m / np.sqrt(bottom), math.inf)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look."""

    time_s: float
    positions_m: Floats
    velocities_m_per_s: Floats
    seen: Bools
    occupants: np.ndarray
