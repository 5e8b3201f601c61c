"""A step of 10,000 devices: movement, what is seen of it, link lifetimes, hazards; milliseconds.

The whole step is what a simulator would ask for each second: all devices move, an observer sees
them with noise and fits velocities to the last five sightings, each device asks how long its links
to the seven others of its coalition will last, the links of all pairs in range are found and timed
anew, and each device's hazard of leaving is told. One process, one core; CPU time, which is the
time on the wall when nobody else has the core, and the last two lines tell whether anybody had.

    python benchmarks/mobility.py [--repeats 30] [--devices 10000] [--quick]
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # one core and one thread; before numpy counts them
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from _measure import arguments, cpu_per_wall, figure, interleave, report, walls

from crowdmesh_jax import mobility

RANGE_M = 40.0
NEAR = 12
"""Devices in range of a device, on average: the area grows with the crowd."""
COALITION = 8
ASKED_MS = 50.0


def models(area: mobility.Area) -> dict[str, mobility.MovementModel]:
    """One of each kind that moves."""
    return {
        "random waypoint": mobility.RandomWaypoint(area=area, pause_max_s=60.0),
        "Gauss-Markov": mobility.GaussMarkov(area=area, alpha=0.9),
        "groups of 5": mobility.GroupMovement(area=area),
    }


class World:
    """Devices of one model with all that is asked about them, part by part."""

    def __init__(self, model: mobility.MovementModel, area: mobility.Area, devices: int) -> None:
        self.area, self.devices = area, devices
        self.movement = mobility.Movement(model, devices, seed=1)
        self.observer = mobility.Observer(
            devices, np.random.default_rng(2), position_noise_m=1.0, window=5
        )
        groups = np.arange(devices).reshape(-1, COALITION)
        self.members = np.repeat(groups, COALITION, axis=0)
        for _ in range(6):  # the observer's window is full
            self.move()
            self.see()

    def move(self) -> None:
        self.movement.advance()
        self.shot = self.movement.snapshot()

    def see(self) -> None:
        self.seen = self.observer.observe(self.shot)

    def look(self) -> None:
        self.move()
        self.see()

    def coalition_lifetimes(self) -> None:
        mobility.pairwise_lifetime_s(
            self.seen.positions_m, self.seen.velocities_m_per_s, self.members, RANGE_M
        )

    def neighbour_lifetimes(self) -> None:
        first, second = mobility.pairs_in_range(self.seen.positions_m, RANGE_M)
        self.pairs = len(first)
        places, velocities = self.seen.positions_m, self.seen.velocities_m_per_s
        mobility.relative_lifetime_s(
            places[second] - places[first], velocities[second] - velocities[first], RANGE_M
        )

    def hazards(self) -> None:
        leaves_s = mobility.time_to_leave_area_s(
            self.seen.positions_m, self.seen.velocities_m_per_s, self.area
        )
        mobility.movement_hazard_per_s(leaves_s)

    def step(self) -> None:
        self.move()
        self.see()
        self.coalition_lifetimes()
        self.neighbour_lifetimes()
        self.hazards()


def main() -> None:
    options: Any = arguments(__doc__, repeats=30, devices=10_000)
    devices = 400 if options.quick else COALITION * (options.devices // COALITION)
    area = mobility.Area.square(math.sqrt(devices * math.pi * RANGE_M**2 / NEAR))
    worlds = {name: World(model, area, devices) for name, model in models(area).items()}
    works: dict[str, Callable[[], object]] = {}
    for name, world in worlds.items():
        works[f"{name}: move"] = world.move
        works[f"{name}: whole step"] = world.step
    one = worlds["random waypoint"]
    works |= {
        "random waypoint: move, see, fit velocities": one.look,
        f"lifetimes, {COALITION - 1} others each": one.coalition_lifetimes,
        "pairs in range and their lifetimes": one.neighbour_lifetimes,
        "hazards of leaving": one.hazards,
    }
    samples = interleave(works, repeats=options.repeats)
    figures = []
    for name, taken in samples.items():
        asked = {"at_most": ASKED_MS} if name.endswith("whole step") else {}
        figures.append(figure(name, [1e3 * s.cpu_s for s in taken], unit="ms", **asked))
    whole = samples["random waypoint: whole step"]
    wall_ms = [1e3 * s for s in walls(whole)]
    figures.append(figure("random waypoint: whole step, on the wall", wall_ms, unit="ms"))
    figures.append(cpu_per_wall("random waypoint: whole step", whole))
    report(
        "mobility",
        f"CPU time of a step of {devices} devices on one core; each asks for the lifetimes of its"
        f" links to {COALITION - 1} others of its coalition, and all pairs within range are found"
        f" and timed ({one.pairs} with random waypoints)",
        figures,
        quick=options.quick,
        settings={"devices": devices, "range_m": RANGE_M, "coalition": COALITION,
                  "pairs_in_range": {name: world.pairs for name, world in worlds.items()}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
