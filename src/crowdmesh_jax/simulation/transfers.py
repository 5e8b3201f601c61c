"""Bytes under way: who sends what to whom, at which rate now.

Devices within range send to each other at the device-to-device rate, each directed pair for itself;
all others go through the uplink, which all of them share equally. A transfer whose end has gone
stands still until somebody removes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["wave", "checkpoint", "ahead", "fetch", "switch"]
"""Copies, checkpoints, state that goes ahead of a hand-over; in a stop: fetched state, the rest."""
BACKGROUND = ("wave", "checkpoint", "ahead")


@dataclass(slots=True)
class Transfer:
    """One copy of one stage under way."""

    kind: Kind
    stage: int
    source: int
    target: int
    version: int
    left_bytes: float
    rate_bytes_per_s: float = 0.0


class Air:
    """All transfers of a world at one moment."""

    def __init__(self, d2d_bytes_per_s: float, uplink_bytes_per_s: float, server: int) -> None:
        self._d2d, self._uplink, self._server = d2d_bytes_per_s, uplink_bytes_per_s, server
        self.all: list[Transfer] = []
        self.background = 0
        """How many of them slow training down."""

    def retime(self, linked: np.ndarray, there: list[bool]) -> None:
        """Sets all rates anew: links, ends or the transfers themselves have changed."""
        up: list[Transfer] = []
        self.background = 0
        for each in self.all:
            each.rate_bytes_per_s = 0.0
            if not (there[each.source] and there[each.target]):
                continue
            if self._server not in (each.source, each.target) and linked[each.source, each.target]:
                each.rate_bytes_per_s = self._d2d
            else:
                up.append(each)
            self.background += each.kind in BACKGROUND
        for each in up:
            each.rate_bytes_per_s = self._uplink / len(up)

    def seconds_left(self) -> float:
        """Until the first one is through; infinite where none moves."""
        return min(
            (t.left_bytes / t.rate_bytes_per_s for t in self.all if t.rate_bytes_per_s > 0),
            default=float("inf"),
        )

    def advance(self, seconds: float) -> list[Transfer]:
        """Moves bytes; returns what is through, and forgets it."""
        through = []
        for each in self.all:
            if each.rate_bytes_per_s > 0:
                # Of a transfer that ends now rounding may leave a part of a byte.
                each.left_bytes -= seconds * each.rate_bytes_per_s
                if each.left_bytes <= 1e-3:
                    through.append(each)
        for each in through:
            self.all.remove(each)
        return through

    def remove(self, *kinds: Kind) -> None:
        """Ends all transfers of those kinds, unfinished."""
        self.all = [each for each in self.all if each.kind not in kinds]
