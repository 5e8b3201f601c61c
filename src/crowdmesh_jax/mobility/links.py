"""A crowd as it is at one moment: places, links by radio, hazards of leaving.

Joins movement to the planner's values. A device's `access` (its way through an access point or a
base station, drawn by `cm.crowds`, say) stays as it is; a radio link between two devices in range
is added where it is faster than what they have.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ..core import Crowd, Link
from ..errors import InvalidCrowdError, InvalidValueError
from . import checks
from .neighbours import pairs_in_range
from .radio import Radio

RADIO_LATENCY_S = 0.002
"""One way over Wi-Fi, as `cm.crowds` has it for its cells."""


def crowd_at(
    crowd: Crowd,
    positions_m: ArrayLike,
    radio: Radio,
    *,
    present: ArrayLike | None = None,
    leave_hazard_per_s: ArrayLike | None = None,
    latency_s: float = RADIO_LATENCY_S,
) -> Crowd:
    """The crowd with its devices at those places.

    Links that the crowd lists pair by pair are dropped: they belonged to other places. A planner
    that asks this of sightings plans with what may be known; of a snapshot, with the truth.

    Args:
        positions_m: `[devices, 2]`, in the crowd's order.
        present: `[devices]` booleans: who is there; the others are left out.
        leave_hazard_per_s: `[devices]`; None: what the crowd says.

    Raises:
        InvalidCrowdError: Nobody is present.
        InvalidValueError: Shapes or values that do not fit.
    """
    places = checks.array("positions_m", positions_m, last=2)
    count = len(crowd.devices)
    there = np.ones(count, bool) if present is None else np.asarray(present, bool)
    hazards = (
        np.array([device.leave_hazard_per_s for device in crowd.devices])
        if leave_hazard_per_s is None
        else checks.at_least_zero("leave_hazard_per_s", leave_hazard_per_s)
    )
    if places.shape != (count, 2) or there.shape != (count,) or hazards.shape != (count,):
        raise InvalidValueError(
            f"a crowd of {count} devices needs positions ({count}, 2), presence and hazards"
            f" ({count},), got {places.shape}, {there.shape}, {hazards.shape}"
        )
    if not there.any():
        raise InvalidCrowdError("nobody is present; a crowd needs at least one device")
    devices = tuple(
        replace(device, position_m=(place[0], place[1]), leave_hazard_per_s=hazard)
        for device, place, hazard, here in zip(
            crowd.devices, places.tolist(), hazards.tolist(), there.tolist(), strict=True
        )
        if here
    )
    moved = replace(crowd, devices=devices, links=())
    first, second = pairs_in_range(places, radio.range_m, present=there)
    way_m = places[second] - places[first]
    rates = radio.rate_bytes_per_s(np.hypot(way_m[:, 0], way_m[:, 1]))
    links = []
    for a, b, rate in zip(first.tolist(), second.tolist(), rates.tolist(), strict=True):
        for source, target in ((a, b), (b, a)):
            ends = crowd.devices[source].id, crowd.devices[target].id
            has = moved.link(*ends)
            if rate > 0 and (has is None or has.bandwidth_bytes_per_s < rate):
                links.append(
                    Link(
                        source=ends[0], target=ends[1],
                        bandwidth_bytes_per_s=rate, latency_s=latency_s,
                    )
                )  # fmt: skip
    return replace(moved, links=tuple(links))
