"""Crashes: devices that stop without a sign, at a constant rate each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from . import checks
from .checks import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Crashes:
    """When which device crashes, in order of time."""

    times_s: Floats
    devices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.times_s)


def draw_crashes(
    hazard_per_s: float, devices: int, until_s: float, generator: Generator
) -> Crashes:
    """A Poisson process for each device, up to `until_s`.

    A constant hazard has no memory: a device that was started again crashes at the same rate, so
    nothing needs to be known of restarts. The count is Poisson, times uniform, devices uniform.
    """
    rate = checks.number("hazard_per_s", hazard_per_s)
    devices = checks.whole("devices", devices, least=1, most=checks.MAX_DEVICES)
    until_s = checks.number("until_s", until_s)
    count = int(generator.poisson(rate * devices * until_s))
    times_s = np.sort(generator.random(count) * until_s)
    return Crashes(times_s=times_s, devices=generator.integers(devices, size=count))
