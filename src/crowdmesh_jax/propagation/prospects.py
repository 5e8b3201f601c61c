"""What past, noisy sightings and heartbeats say of the time ahead: who stays, who stays in range.

Straight motion from where a device was seen. Two devices that are in range now and in range at the
horizon were in range all the time between, since a disc is convex; so the chance of co-residence is
that of being in range at the horizon, with a normal error of the distance:

    P = Phi((range - distance at H) / sigma),   sigma^2 = 2 (sd_v (H + age))^2 + (turns |w| H)^2

sd_v is the error of each velocity, |w| their relative speed, and `turns` the part of a relative way
that turning makes uncertain; 0.25 is a choice of ours, not tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from ..mobility import (
    GammaPrior,
    Sessions,
    Sightings,
    exponential_hazard_per_s,
    link_lifetime_s,
)
from .handover import Departure
from .policy import PolicyView

_NORMAL = NormalDist()
TURNS = 0.25
UNKNOWN = 0.5
"""Chance of being in range of a device that was never seen."""
LEAST_RATE_PER_S = 1e-9
PRIOR_WEIGHT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Predictions from one view."""

    view: PolicyView
    turns: float = TURNS
    unknown: float = UNKNOWN
    _rates: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    _all: list[np.ndarray] = field(default_factory=list, init=False, repr=False, compare=False)
    _now_m: list[np.ndarray] = field(default_factory=list, init=False, repr=False, compare=False)

    def loss_rate_per_s(self, device: str) -> float:
        """Rate at which a device goes, for whatever reason, learned from heartbeats.

        The belief before heartbeats is the crowd's `leave_hazard_per_s` and the crash rate.
        """
        if device not in self._rates:
            self._rates[device] = self._learned(device)
        return self._rates[device]

    def _learned(self, device: str) -> float:
        costs, crowd, heard = self.view.costs, self.view.crowd, self.view.heard

        def prior(name: str) -> float:
            believed = crowd.device(name).leave_hazard_per_s + costs.crash_per_s
            return max(LEAST_RATE_PER_S, believed)

        if heard is None or device not in self.view.row_of:
            return prior(device)
        if not self._all:
            sessions = heard.sessions
            # Sorted: a sum that does not depend on the order in which sessions were kept.
            order = np.lexsort((sessions.duration_s, sessions.device))
            ordered = Sessions(
                devices=sessions.devices,
                device=sessions.device[order],
                duration_s=sessions.duration_s[order],
                ended=sessions.ended[order],
            )
            means_s = np.array([1 / prior(name) for name in self.view.ids])
            belief = GammaPrior(mean_s=means_s, weight=PRIOR_WEIGHT)
            self._all.append(exponential_hazard_per_s(ordered, belief))
        return float(self._all[0][self.view.row_of[device]])

    def stays(self, device: str, horizon_s: float) -> float:
        """Probability that it neither crashes nor leaves by itself within the horizon."""
        if not self.view.is_present(device):
            return 0.0
        return math.exp(-self.loss_rate_per_s(device) * horizon_s) * (
            1 - max((d.within(horizon_s) for d in self.view.departures if d.device == device),
                    default=0.0)
        )  # fmt: skip

    def in_range(self, one: str, other: str, horizon_s: float) -> float:
        """Probability that two devices stay in range of each other until the horizon."""
        if one == other:
            return 1.0
        pair = self._pair(one, other)
        if pair is None:
            return 1.0 if self.view.range_m is None or self.view.sightings is None else self.unknown
        apart_m, relative, sd, age_s = pair
        range_m = self.view.range_m
        assert range_m is not None
        now_m = math.hypot(*apart_m)
        at_m = math.hypot(*(apart_m + relative * horizon_s))
        if not math.isfinite(sd):
            return self.unknown if now_m <= range_m else 0.0
        drift_m = math.hypot(
            math.sqrt(2) * sd * (horizon_s + age_s), self.turns * math.hypot(*relative) * horizon_s
        )
        if now_m > range_m:
            return 0.0
        if drift_m == 0:
            return 1.0 if at_m <= range_m else 0.0
        return _NORMAL.cdf((range_m - at_m) / drift_m)

    def link_ends(self, one: str, other: str) -> Departure | None:
        """When two devices lose each other, as a departure of `one`; None: not in sight."""
        pair = self._pair(one, other)
        if pair is None:
            return None
        apart_m, relative, sd, age_s = pair
        range_m = self.view.range_m
        assert range_m is not None
        zero = np.zeros(2)
        leaves_s = float(link_lifetime_s(zero, zero, apart_m, relative, range_m))
        speed = math.hypot(*relative)
        if math.isinf(leaves_s) or not math.isfinite(sd) or speed == 0:
            return None
        drift_m = math.hypot(math.sqrt(2) * sd * (leaves_s + age_s), self.turns * speed * leaves_s)
        # Where the border is crossed, an error along the way shifts the time by it over the speed.
        return Departure(device=_id(self.view, one), leaves_s=leaves_s, sd_s=drift_m / speed)

    def _pair(self, one: str, other: str) -> tuple[np.ndarray, np.ndarray, float, float] | None:
        """(offset now, relative velocity, larger error of a velocity, age); None: not known."""
        view = self.view
        seen: Sightings | None = view.sightings
        if seen is None or view.range_m is None:
            return None
        if one not in view.row_of or other not in view.row_of:
            return None
        a, b = view.row_of[one], view.row_of[other]
        if not (seen.known[a] and seen.known[b]):
            return None
        if not self._now_m:
            self._now_m.append(seen.positions_at(seen.now_s))
        at_m = self._now_m[0]
        return (
            at_m[b] - at_m[a],
            seen.velocities_m_per_s[b] - seen.velocities_m_per_s[a],
            float(max(seen.velocity_sd_m_per_s[a], seen.velocity_sd_m_per_s[b])),
            float(max(seen.age_s[a], seen.age_s[b])),
        )

    def rate_bytes_per_s(self, source: str, target: str) -> float:
        """What the link carries now; 0 without one, or out of range."""
        link = self.view.crowd.link(source, target)
        if link is None or self.in_range(source, target, 0.0) == 0:
            return 0.0
        return link.bandwidth_bytes_per_s


def _id(view: PolicyView, device: str):  # the crowd's own spelling, typed
    return view.crowd.device(device).id
