"""Named crowds: a shelf of boards, a campus, cars on a road, two cells with a slow line between."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from ..core import Backhaul, Crowd
from ..errors import InvalidCrowdError
from . import fitted
from .generate import generate
from .spec import CrowdSpec, Group

LAB_SHELF = CrowdSpec(
    name="lab_shelf",
    devices=8,
    groups=(
        Group(machine=fitted.WORKSTATION, weight=1, links=((fitted.ETHERNET, 1.0),)),
        Group(machine=fitted.JETSON, weight=2, links=((fitted.ETHERNET, 1.0),)),
        Group(machine=fitted.PI5, weight=1, links=((fitted.ETHERNET, 1.0),)),
        Group(machine=fitted.PI4, weight=2, links=((fitted.ETHERNET, 1.0),)),
        Group(machine=fitted.PHONE, weight=2, links=((fitted.WIFI_5, 1.0),)),
    ),
    data=fitted.data(10.0, fitted.WRITERS),
)
CAMPUS = CrowdSpec(
    name="campus",
    devices=40,
    groups=(
        Group(
            machine=fitted.PHONE,
            weight=7,
            links=(
                (fitted.WIFI_4, 1.0), (fitted.WIFI_5, 4.0), (fitted.WIFI_6, 2.5),
                (fitted.NR_STATIC, 2.5),
            ),
            stay_s=fitted.STATIC_STAY_S,
        ),
        Group(
            machine=fitted.LAPTOP,
            weight=3,
            links=((fitted.WIFI_5, 5.0), (fitted.WIFI_6, 5.0)),
            stay_s=fitted.VISIT_STAY_S,
        ),
    ),
    data=fitted.data(0.3, fitted.POSTERS),
)  # fmt: skip
VEHICULAR = CrowdSpec(
    name="vehicular",
    devices=24,
    groups=(
        Group(
            machine=fitted.PHONE,
            weight=7,
            links=((fitted.NR_DRIVE, 1.0),),
            stay_s=fitted.DRIVE_STAY_S,
        ),
        Group(
            machine=fitted.JETSON,
            weight=3,
            links=((fitted.NR_DRIVE, 1.0),),
            stay_s=fitted.DRIVE_STAY_S,
        ),
    ),
    data=fitted.data(0.5, fitted.POSTERS),
    layout="road",
)
TWO_CELLS = CrowdSpec(
    name="two_cells",
    devices=16,
    groups=(
        Group(
            machine=fitted.PHONE,
            weight=6,
            links=((fitted.WIFI_5, 1.0), (fitted.WIFI_6, 1.0)),
            stay_s=fitted.STATIC_STAY_S,
        ),
        Group(
            machine=fitted.LAPTOP,
            weight=4,
            links=((fitted.WIFI_6, 1.0),),
            stay_s=fitted.VISIT_STAY_S,
        ),
    ),
    data=fitted.data(0.3, fitted.WRITERS),
    cells=2,
    # An estimate: 20 Mbit/s and 25 ms, a radio relay or a busy line.
    backhaul=Backhaul(bandwidth_bytes_per_s=2.5e6, latency_s=0.025),
)

PRESETS: Mapping[str, CrowdSpec] = MappingProxyType(
    {spec.name: spec for spec in (LAB_SHELF, CAMPUS, VEHICULAR, TWO_CELLS)}
)
"""The specifications by name."""


def preset(name: str, devices: int | None = None, *, seed: int) -> Crowd:
    """The crowd of that name.

    Args:
        devices: How many; None: the preset's own number.
        seed: Any integer >= 0; the same seed gives the same crowd.

    Raises:
        InvalidCrowdError: No such preset (names the nearest), or a number out of range.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidCrowdError(f"no crowd {name!r}; {hint}known: {', '.join(PRESETS)}")
    spec = PRESETS[name]
    return generate(spec if devices is None else dataclasses.replace(spec, devices=devices), seed)


def lab_shelf(devices: int | None = None, *, seed: int) -> Crowd:
    """A shelf of boards on a gigabit switch, two phones on its Wi-Fi; nobody leaves. 8 devices."""
    return preset("lab_shelf", devices, seed=seed)


def campus(devices: int | None = None, *, seed: int) -> Crowd:
    """Phones and laptops of people who stay a while, on Wi-Fi and 5G; skewed labels. 40 devices."""
    return preset("campus", devices, seed=seed)


def vehicular(devices: int | None = None, *, seed: int) -> Crowd:
    """Phones and boards in cars along a road, on 5G; each leaves within a minute. 24 devices."""
    return preset("vehicular", devices, seed=seed)


def two_cells(devices: int | None = None, *, seed: int) -> Crowd:
    """Two Wi-Fi cells, fast inside, with 20 Mbit/s and 25 ms between them. 16 devices."""
    return preset("two_cells", devices, seed=seed)
