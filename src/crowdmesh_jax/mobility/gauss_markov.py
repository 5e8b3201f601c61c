"""Gauss-Markov: a velocity that remembers itself.

Velocities follow v' = a v + (1 - a) m + s sqrt(1 - a^2) w with w standard normal, each component by
itself, a = alpha^dt (Liang and Haas 1999; the variant by components of Camp, Boleng and Davies
2002). Stationary: mean m, standard deviation s of each component, autocorrelation alpha^t after t
seconds, whatever the step. Started there.

At a border the path is mirrored; that component of the velocity and of its mean is turned with it,
so that speeds keep their distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from ..errors import InvalidValueError
from . import checks
from .checks import Floats
from .movement import Area, everyone


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussMarkov:
    """Velocities with memory, on a rectangle with reflecting borders or without any border."""

    area: Area
    """Where devices start, uniformly, and stay."""
    alpha: float = 0.9
    """Correlation of a velocity with itself one second later; 0: none, 1: never changes."""
    sigma_m_per_s: float = 0.5
    """Standard deviation of each component. Speeds are Rayleigh, with the mean 1.2533 sigma, where
    the mean velocity is 0."""
    mean_m_per_s: tuple[float, float] = (0.0, 0.0)
    """Mean velocity, east and north."""
    sigma_max_m_per_s: float | None = None
    """Devices may differ: each draws its own sigma, uniform from `sigma_m_per_s` to this."""
    bounded: bool = True
    """False: no border; devices leave the area."""

    def __post_init__(self) -> None:
        alpha = checks.number("gauss-markov: alpha", self.alpha)
        if alpha > 1:
            raise InvalidValueError(f"gauss-markov: alpha must be <= 1, got {self.alpha}")
        low = checks.number("gauss-markov: sigma_m_per_s", self.sigma_m_per_s)
        if self.sigma_max_m_per_s is not None:
            checks.number("gauss-markov: sigma_max_m_per_s", self.sigma_max_m_per_s, least=low)
        mean = checks.array("gauss-markov: mean_m_per_s", self.mean_m_per_s, last=2)
        if mean.shape != (2,):
            raise InvalidValueError(f"gauss-markov: mean_m_per_s must be a pair, got {mean.shape}")

    @classmethod
    def of_speeds(
        cls, area: Area, *, alpha: float, speed_min_m_per_s: float, speed_max_m_per_s: float
    ) -> GaussMarkov:
        """No preferred direction; each device's mean speed uniform between the two."""
        low = checks.number("gauss-markov: speed_min_m_per_s", speed_min_m_per_s)
        high = checks.number("gauss-markov: speed_max_m_per_s", speed_max_m_per_s, least=low)
        per_sigma = math.sqrt(math.pi / 2)
        return cls(
            area=area, alpha=alpha,
            sigma_m_per_s=low / per_sigma, sigma_max_m_per_s=high / per_sigma,
        )  # fmt: skip

    def start(self, devices: int, generator: Generator) -> GaussMarkovWalk:
        """Devices at uniform places, velocities as at any later time."""
        return GaussMarkovWalk(self, devices, generator)


class GaussMarkovWalk:
    """Velocities, and each device's own mean, turned at borders."""

    def __init__(self, model: GaussMarkov, devices: int, generator: Generator) -> None:
        self._model, self._generator = model, generator
        high = model.sigma_max_m_per_s
        spread = 0.0 if high is None else high - model.sigma_m_per_s
        self._sigma = model.sigma_m_per_s + spread * generator.random((devices, 1))
        self._mean = np.tile(np.array(model.mean_m_per_s, np.float64), (devices, 1))
        self.positions_m = model.area.draw(devices, generator)
        normal = generator.standard_normal((devices, 2))
        self.velocities_m_per_s = self._mean + self._sigma * normal
        self.present = everyone(devices)
        self.occupants = np.arange(devices)

    def step(self, dt_s: float) -> None:
        """Moves all by their velocities, then draws the velocities of the next step."""
        self.positions_m = self.positions_m + self.velocities_m_per_s * dt_s
        if self._model.bounded:
            turned = _reflect(self.positions_m, self._model.area.size_m)
            self.velocities_m_per_s = self.velocities_m_per_s * turned
            self._mean = self._mean * turned
        alpha = self._model.alpha**dt_s
        # (1 - a)(1 + a): 1 - a**2 loses its digits near 1.
        fresh = math.sqrt((1 - alpha) * (1 + alpha))
        normal = self._generator.standard_normal(self.positions_m.shape)
        self.velocities_m_per_s = (
            alpha * self.velocities_m_per_s
            + (1 - alpha) * self._mean
            + fresh * self._sigma * normal
        )


def _reflect(positions_m: Floats, size_m: Floats) -> Floats:
    """Folds positions back into the area, in place; -1 where a component was turned, else 1.

    A fast device may cross it more than once in a step.
    """
    folded = np.mod(positions_m, 2 * size_m)
    turned = np.where(folded > size_m, -1.0, 1.0)
    np.minimum(folded, 2 * size_m - folded, out=positions_m)
    return turned
