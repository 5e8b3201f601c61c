"""Who takes over after a loss, for rules that say nothing of crowds: the fewest changes, then speed
or nearness.

The published rivals train on a fixed set of devices; a scenario has many more devices than stages.
All get the same choice of takers from what is seen now: as few stages as possible change hands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Chain = tuple[int, ...]
"""One device for each stage, by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vacancy:
    """A pipeline that cannot go on, as it is known."""

    owners: Chain
    lost: frozenset[int]
    """Stages whose owner is not heard any more."""
    near: np.ndarray
    """`[devices, devices]`: seen in range of each other, and heard."""
    speeds: Sequence[float]
    positions_m: np.ndarray


def successors(vacancy: Vacancy) -> Iterator[Chain]:
    """All chains that could go on with the fewest changes; none where no chain is there."""
    owners, near = vacancy.owners, vacancy.near
    stages = range(len(owners))
    anyone = [int(device) for device in np.flatnonzero(near.any(axis=1))]
    beside = {device: [int(d) for d in np.flatnonzero(near[device])] for device in anyone}

    def fill(chosen: Chain, changed: frozenset[int]) -> Iterator[Chain]:
        index = len(chosen)
        if index == len(owners):
            yield chosen
            return
        if index not in changed:
            if not chosen or near[chosen[-1], owners[index]]:
                yield from fill((*chosen, owners[index]), changed)
            return
        for device in beside.get(chosen[-1], ()) if chosen else anyone:
            if device not in chosen and device not in owners:
                yield from fill((*chosen, device), changed)

    for count in range(max(1, len(vacancy.lost)), len(owners) + 1):
        found = False
        for changed in itertools.combinations(stages, count):
            if vacancy.lost <= set(changed):
                for chain in fill((), frozenset(changed)):
                    found = True
                    yield chain
        if found:
            return


def fastest(vacancy: Vacancy) -> Chain | None:
    """The chain whose slowest device is the fastest; then the sum of speeds."""
    speeds = vacancy.speeds

    def rank(chain: Chain) -> tuple[float, float]:
        return min(speeds[d] for d in chain), sum(sorted(speeds[d] for d in chain))

    return _best(vacancy, rank)


def nearest(vacancy: Vacancy) -> Chain | None:
    """The chain whose longest link is the shortest: the strongest signal."""
    places_m = vacancy.positions_m

    def rank(chain: Chain) -> tuple[float, ...]:
        apart_m = [
            float(np.hypot(*(places_m[a] - places_m[b]))) for a, b in itertools.pairwise(chain)
        ]
        return (-max(apart_m, default=0.0),)

    return _best(vacancy, rank)


def _best(vacancy: Vacancy, rank: Callable[[Chain], tuple[float, ...]]) -> Chain | None:
    # Of equals the lower device numbers.
    return max(
        successors(vacancy), key=lambda chain: (rank(chain), [-d for d in chain]), default=None
    )
