"""Second copies go around: who had a stage once needs only what changed when it is to run it.

Of each stage's holders the last gives its seat to the fastest device in range that has nothing of
the stage yet. Once all that may have to run it had it, nobody is left to be asked.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...core import DeviceId
from ..budget import copy_bytes, rooms
from ..foresight import Ahead, rows_of
from ..policy import PolicyView
from ..seats import Placement, Seat
from .planning import holds, link_bytes_per_s

LIKELY = 0.9
"""Chance to be in range of whoever is asked until the copy is through."""
MARGIN = 1.5
"""Over the time that a copy takes alone: waves share the link."""


def spread(view: PolicyView, ahead: Ahead, placement: Placement) -> Placement:
    """The same placement, with newcomers on last seats where a stage has several."""
    free = {d: room.memory_bytes for d, room in
            rooms(view.plan, view.profile, view.crowd, view.budget).items()}  # fmt: skip
    sizes = [copy_bytes(view.profile, s.first_layer, s.last_layer) for s in view.plan.stages]
    held = [size * view.budget.held_versions for size in sizes]
    for seats, size in zip(placement.seats, held, strict=True):
        for device, keep in seats:
            if keep == "memory":
                free[DeviceId(device)] -= size
    rows = rows_of(ahead, view.plan.devices)
    made: list[tuple[Seat, ...]] = []
    for index, (stage, seats) in enumerate(zip(view.plan.stages, placement.seats, strict=True)):
        made.append(seats)
        if len(seats) < 2 or rows[index] < 0:
            continue
        has = {h.device for h in view.holdings if holds(h, stage)}
        apart = [stage.device, *(device for device, _ in seats[:-1])]
        slowest_s = float(np.median(ahead.stage_s[index]))

        def stays(row: int, name: str, owner: str = stage.device, index: int = index) -> float:
            rate = link_bytes_per_s(view, owner, name)
            until_s = MARGIN * sizes[index] / rate if rate > 0 else 0.0
            return ahead.lasts_until((rows[index], row), until_s) if rate > 0 else 0.0

        found = [
            (float(ahead.stage_s[index, row]), name)
            for row, name in enumerate(ahead.ids)
            if ahead.stage_s[index, row] <= slowest_s
            and name not in has
            and name not in apart
            and stays(row, name) >= LIKELY
            and free[DeviceId(name)] >= held[index]
            and view.groups.apart([*apart, name])
        ]
        if found:
            name = min(found)[1]
            free[DeviceId(name)] -= held[index]
            made[-1] = (*seats[:-1], (name, "memory"))
    return replace(placement, seats=tuple(made))
