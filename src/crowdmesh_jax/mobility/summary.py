"""What a movement was like: speeds, company, and how long links last."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import checks
from .lifetime import relative_lifetime_s
from .movement import Movement, Snapshot
from .neighbours import pairs_in_range


@dataclass(frozen=True, slots=True, kw_only=True)
class MovementSummary:
    """Means over the time watched. NaN where nothing of the kind was seen."""

    devices: int
    seconds: float
    mean_present: float
    """Devices that were there."""
    mean_speed_m_per_s: float
    standing_share: float
    """Of the time that devices were there, at less than 1 cm/s."""
    mean_neighbours: float
    """Devices in range of a device."""
    alone_share: float
    """Of the time that devices were there, with nobody in range."""
    links_ended_per_s: float
    """Pairs that lost each other, a second."""
    mean_link_s: float
    """Mean lifetime of links: time that pairs were in range, over links that ended."""
    median_predicted_s: float
    """Median of the closed form's lifetimes, over all links at the end, with true velocities."""
    newcomers: int
    """Devices that took the number of one who had gone, or came back."""


def watch(
    movement: Movement, steps: int, range_m: float, *, keep: bool = True
) -> tuple[MovementSummary, list[Snapshot]]:
    """Moves on by `steps` and tells what happened, with the snapshots of all steps.

    Args:
        range_m: Up to where two devices can talk.
        keep: False: the last snapshot only, for large crowds over long times.
    """
    steps = checks.whole("steps", steps, least=1)
    range_m = checks.number("range_m", range_m, above=True)
    shots = [movement.snapshot()]
    there = moving = standing = alone = pairs_seen = 0.0
    ended = newcomers = 0
    links: np.ndarray | None = None
    for _ in range(steps):
        movement.advance()
        shot = movement.snapshot()
        first, second = pairs_in_range(shot.positions_m, range_m, present=shot.present)
        # One number a pair and its people: a newcomer's link is another link.
        names = shot.occupants[first] * 2**31 + shot.occupants[second]
        if links is not None:
            ended += len(np.setdiff1d(links, names, assume_unique=True))
        links = names
        speeds = np.hypot(*shot.velocities_m_per_s[shot.present].T)
        there += len(speeds)
        moving += float(speeds.sum())
        standing += int((speeds < 0.01).sum())
        pairs_seen += len(first)
        company = np.bincount(np.concatenate([first, second]), minlength=movement.devices)
        alone += int((company[shot.present] == 0).sum())
        before = shots[-1]
        arrived = shot.present & (~before.present | (before.occupants != shot.occupants))
        newcomers += int(arrived.sum())
        if not keep:
            shots.clear()
        shots.append(shot)
    last = shots[-1]
    first, second = pairs_in_range(last.positions_m, range_m, present=last.present)
    predicted = relative_lifetime_s(
        last.positions_m[second] - last.positions_m[first],
        last.velocities_m_per_s[second] - last.velocities_m_per_s[first],
        range_m,
    )
    seconds = steps * movement.dt_s
    return (
        MovementSummary(
            devices=movement.devices,
            seconds=seconds,
            mean_present=there / steps,
            mean_speed_m_per_s=moving / there if there else math.nan,
            standing_share=standing / there if there else math.nan,
            mean_neighbours=2 * pairs_seen / there if there else math.nan,
            alone_share=alone / there if there else math.nan,
            links_ended_per_s=ended / seconds,
            mean_link_s=pairs_seen * movement.dt_s / ended if ended else math.nan,
            median_predicted_s=float(np.median(predicted)) if len(predicted) else math.nan,
            newcomers=newcomers,
        ),
        shots,
    )
