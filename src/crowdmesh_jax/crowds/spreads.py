"""How a figure is spread over devices: log-normal, or quantiles read off measurements.

Both are functions of a standard normal draw, so that two figures of one device (speed and memory,
say) are made to go together by drawing their normals together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidCrowdError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """`median * exp(sigma * z)`, held between `low` and `high`."""

    median: float
    sigma: float
    """Standard deviation of the natural logarithm; 0 gives every device the median."""
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.median <= self.high < math.inf:
            raise InvalidCrowdError(
                "a log-normal needs 0 < low <= median <= high < inf,"
                f" got {self.low}, {self.median}, {self.high}"
            )
        if not 0 <= self.sigma < math.inf:
            raise InvalidCrowdError(
                f"a log-normal's sigma must be finite and >= 0, got {self.sigma}"
            )

    def at(self, normal: Floats) -> Floats:
        """The figures that belong to standard normal draws, of any shape."""
        bounds = math.log(self.low / self.median), math.log(self.high / self.median)
        return self.median * np.exp(np.clip(self.sigma * normal, *bounds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """A measured distribution by its quantiles, log-normal between each two of them.

    Nothing lies beyond the first and the last: what would is put there.
    """

    points: tuple[tuple[float, float], ...]
    """(probability, figure), both increasing; probabilities between 0 and 1, exclusive."""

    def __post_init__(self) -> None:
        shares = [0.0, *(share for share, _ in self.points), 1.0]
        figures = [0.0, *(figure for _, figure in self.points), math.inf]
        for name, column in (("probabilities", shares), ("figures", figures)):
            if not all(a < b for a, b in pairwise(column)):
                raise InvalidCrowdError(
                    f"quantiles: {name} must increase strictly inside ({column[0]}, {column[-1]}),"
                    f" got {column[1:-1]}"
                )
        if len(self.points) < 2:
            raise InvalidCrowdError(f"quantiles need at least 2 points, got {len(self.points)}")

    def at(self, normal: Floats) -> Floats:
        """The figures that belong to standard normal draws, of any shape."""
        scores = [NormalDist().inv_cdf(share) for share, _ in self.points]
        logs = [math.log(figure) for _, figure in self.points]
        return np.exp(np.interp(normal, scores, logs))

    def times(self, factor: float) -> Quantiles:
        """The same distribution in another unit."""
        return Quantiles(points=tuple((share, figure * factor) for share, figure in self.points))


Spread = LogNormal | Quantiles
