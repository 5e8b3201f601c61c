"""Velocities measured with noise, averaged over the time that a device has gone straight.

A running mean of each device's measurements with its standard error. A measurement that lies
`limit` standard errors off begins it anew: the device has turned, stopped or started. It knows only
the sightings that it was given.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from . import checks
from .sightings import Sightings


class Smoother:
    """Takes sightings as they come, and gives them back with better velocities."""

    def __init__(self, devices: int, *, window: int = 8, limit: float = 3.0) -> None:
        """Nothing is known yet.

        Args:
            window: Measurements that count at most; older ones fade.
            limit: Standard errors beyond which a measurement begins a new mean.
        """
        self.devices = checks.whole("devices", devices, least=1, most=checks.MAX_DEVICES)
        self._window = checks.whole("window", window, least=1, most=1000)
        self._limit = checks.number("limit", limit, above=True)
        self._mean = np.zeros((self.devices, 2))
        self._count = np.zeros(self.devices)
        self._seen_s = np.full(self.devices, -math.inf)
        self._since_s = np.full(self.devices, -math.inf)
        self._occupants = np.full(self.devices, -1)

    def smooth(self, seen: Sightings) -> Sightings:
        """The same sightings, with mean velocities, their standard errors, and for how long each
        went straight.

        Sightings that are no news (the same time as before) change nothing.
        """
        new = seen.seen_s > self._seen_s
        other = seen.occupants != self._occupants
        sd = np.where(np.isfinite(seen.velocity_sd_m_per_s), seen.velocity_sd_m_per_s, 0.0)
        off = np.abs(seen.velocities_m_per_s - self._mean).max(axis=1)
        error = sd * np.sqrt(1 + 1 / np.maximum(self._count, 1))
        anew = new & (other | (self._count == 0) | (off > self._limit * error))
        self._count = np.where(
            anew, 1, np.where(new, np.minimum(self._count + 1, self._window), self._count)
        )
        share = np.where(anew, 1.0, np.where(new, 1 / np.maximum(self._count, 1), 0.0))
        moved = self._mean + share[:, None] * (seen.velocities_m_per_s - self._mean)
        self._mean = np.where(anew[:, None], seen.velocities_m_per_s, moved)
        self._since_s = np.where(anew, seen.seen_s, self._since_s)
        self._seen_s = np.where(new, seen.seen_s, self._seen_s)
        self._occupants = np.where(new, seen.occupants, self._occupants)
        return replace(
            seen,
            velocities_m_per_s=checks.frozen(self._mean),
            velocity_sd_m_per_s=checks.frozen(
                seen.velocity_sd_m_per_s / np.sqrt(np.maximum(self._count, 1))
            ),
            straight_s=checks.frozen(np.where(self._count > 0, self._seen_s - self._since_s, 0.0)),
        )
