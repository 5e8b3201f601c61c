"""Small worlds that the tests of this folder share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from crowdmesh_jax.mobility import RandomWaypoint, Scenario, Static, scenario
from crowdmesh_jax.simulation import Body, Outcome, Setup, World, make_setup


def short(name: str = "waypoint", **changes: Any) -> Scenario:
    """A frozen scenario with less work."""
    return replace(scenario(name), **{"work_s": 300.0, **changes})


def still(devices: int, *, near_m: float = 10.0) -> Static:
    """Devices in a row that stand still."""
    return Static(positions_m=tuple((near_m * row, 0.0) for row in range(devices)))


def still_world(seed: int = 1, *, devices: int = 6, near_m: float = 10.0, **changes: Any) -> World:
    made = short(devices=devices, speed_spread=0.0, **changes)
    return World(made, seed, model=still(devices, near_m=near_m))


def run(world: World, setup: Setup | str, **options: Any) -> tuple[Body, Outcome]:
    made = make_setup(setup) if isinstance(setup, str) else setup
    body = Body(world, made, **options)
    return body, body.run()


class Parting:
    """A movement that is another one from some second on."""

    def __init__(self, model: RandomWaypoint, at: int, *, other: int | None) -> None:
        self._model, self._at, self._other = model, at, other

    def start(self, devices: int, generator: np.random.Generator):
        walk = self._model.start(devices, generator)
        step, done = walk.step, 0

        def parted(dt_s: float) -> None:
            nonlocal done
            done += 1
            if done > self._at and self._other is not None:
                rng = np.random.default_rng([self._other, done])
                walk.positions_m[:] = walk.positions_m[rng.permutation(devices)]
            else:
                step(dt_s)

        walk.step = parted
        return walk
