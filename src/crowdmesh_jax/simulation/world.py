"""The world of one scenario and seed: movement, crashes, links, and what can be seen of them.

It is made once per seed and shared by all policies, so each meets the same movement, the same
crashes and the same noise. Truth (`moment`, `departures`) is for the body; `seen` is for policies.
It knows no policy and no training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..core import Crowd, DefaultLink, Device, DeviceId, LayerProfile, Link, ModelProfile
from ..errors import InvalidValueError
from ..mobility import (
    HeartbeatLog,
    Movement,
    MovementModel,
    Scenario,
    Sightings,
    Smoother,
)
from ..mobility.checks import Bools
from ..propagation import Heard
from .takers import Chain, Vacancy, fastest

SERVER = "server"
"""The place behind the uplink that keeps checkpoints. It never fails and trains nothing."""
MICROBATCHES = 8
STEP_S = 1.0
"""A step of a pipeline of devices at speed 1; the scenarios leave it open."""
FLOPS_PER_S = 1e10
MEMORY_BYTES = 4_000_000_000
LONGEST = 4.0
"""A run is given up at so many times its useful work."""
SMOOTHED = 8
"""Noisy velocities, one a second, that a device's mean is taken of while it goes straight."""
AWAY_S = 60.0
"""A crashed device is back after this time, with nothing that it held. The scenarios leave it
open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The truth in one second."""

    linked: Bools
    """`[devices, devices]`: within range, both there."""
    there: Bools
    """`[devices]`: present and not down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What everybody knows in one second."""

    sightings: Sightings
    heard: Heard
    near: Bools
    """`[devices, devices]`: seen within range of each other, and heard lately."""


class World:
    """One seed of a scenario, second by second, read as far as somebody asks."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        *,
        model: MovementModel | None = None,
        away_s: float = AWAY_S,
        longest: float = LONGEST,
    ) -> None:
        """Starts at time 0.

        Args:
            model: Another movement than the scenario's, for tests.
            away_s: How long a crashed device is gone.
            longest: A run is given up at so many times its useful work.
        """
        if not away_s >= 0:
            raise InvalidValueError(f"away_s must be >= 0, got {away_s}")
        self.scenario, self.seed = scenario, seed
        self.devices = scenario.devices
        self.limit_s = math.ceil(longest * scenario.work_s)
        self.speeds = tuple(float(v) for v in scenario.speeds(seed))
        self.ids = tuple(f"device-{row:02d}" for row in range(self.devices))
        self._movement = (
            scenario.start(seed)
            if model is None
            else Movement(model, self.devices, seed=seed, dt_s=1.0)
        )
        self._observer = scenario.observer(seed)
        self._smoother = Smoother(self.devices, window=SMOOTHED)
        self._beats = HeartbeatLog(self.devices, period_s=1.0, timeout_s=scenario.detect_s)
        self._moments: list[Moment] = []
        self._seen: list[Seen] = []
        self._departures: list[list[tuple[float, int]]] = []
        self._occupants: np.ndarray | None = None
        self._present: Bools | None = None
        self._back_s = np.zeros(self.devices)
        crashes = scenario.crashes(seed, float(self.limit_s))
        self._crashes: list[list[tuple[float, int]]] = [[] for _ in range(self.limit_s + 1)]
        back_s = [0.0] * self.devices
        for time_s, device in zip(crashes.times_s.tolist(), crashes.devices.tolist(), strict=True):
            if time_s >= back_s[device]:  # who is down cannot crash
                back_s[device] = time_s + away_s
                self._crashes[int(time_s)].append((time_s, device))
        self._away_s = away_s

    @cached_property
    def first_chain(self) -> Chain | None:
        """Where every run begins: the fastest devices in a chain; None where there is no chain."""
        seen = self.seen(0)
        return fastest(
            Vacancy(
                owners=(-1,) * self.scenario.stages,
                lost=frozenset(range(self.scenario.stages)),
                near=seen.near,
                speeds=self.speeds,
                positions_m=seen.sightings.positions_m,
            )
        )

    def moment(self, second: int) -> Moment:
        """Who is there and who reaches whom, from that second to the next."""
        self._read(second)
        return self._moments[second]

    def seen(self, second: int) -> Seen:
        """What is known then: positions, noisy velocities, heartbeats."""
        self._read(second)
        return self._seen[second]

    def departures(self, second: int) -> list[tuple[float, int]]:
        """(time, device) of those that lose all they hold from that second to the next: crashes,
        and seats whose device went away."""
        self._read(second)
        return self._departures[second]

    def _read(self, second: int) -> None:
        while len(self._moments) <= second:
            if self._moments:
                self._movement.advance()
            self._look(len(self._moments))

    def _look(self, second: int) -> None:
        shot = self._movement.snapshot()
        gone = [(time_s, device) for time_s, device in self._crashes[second]]
        if self._occupants is not None and self._present is not None:
            left = self._present & (~shot.present | (shot.occupants != self._occupants))
            gone = [(float(second), int(row)) for row in np.flatnonzero(left)] + gone
        self._occupants, self._present = shot.occupants, shot.present
        there = shot.present & (self._back_s <= second)
        apart_m = shot.positions_m[:, None] - shot.positions_m[None]
        near = (apart_m**2).sum(axis=-1) <= self.scenario.range_m**2
        linked = near & there[:, None] & there[None]
        np.fill_diagonal(linked, False)
        self._moments.append(Moment(linked=linked, there=there))
        self._departures.append(gone)
        self._beats.hear(float(second), there, shot.occupants)
        sightings = self._smoother.smooth(self._observer.observe(shot))
        present = self._beats.present
        seen_m = sightings.positions_m[:, None] - sightings.positions_m[None]
        known = present & sightings.known
        close = (seen_m**2).sum(axis=-1) <= self.scenario.range_m**2
        close &= known[:, None] & known[None]
        np.fill_diagonal(close, False)
        heard = Heard(present=present, sessions=self._beats.sessions())
        self._seen.append(Seen(sightings=sightings, heard=heard, near=close))
        for time_s, device in self._crashes[second]:
            self._back_s[device] = time_s + self._away_s


def crowd_of(world: World, *, server: bool) -> Crowd:
    """The devices as a crowd; with the server, at the uplink's rate, for rules that name it."""
    scenario = world.scenario
    devices = [
        Device(id=DeviceId(name), flops_per_s=FLOPS_PER_S * speed, memory_bytes=MEMORY_BYTES)
        for name, speed in zip(world.ids, world.speeds, strict=True)
    ]
    links: list[Link] = []
    if server:
        devices.append(
            Device(id=DeviceId(SERVER), flops_per_s=1.0, memory_bytes=100 * MEMORY_BYTES)
        )
        for name in world.ids:
            for source, target in ((name, SERVER), (SERVER, name)):
                links.append(
                    Link(
                        source=DeviceId(source),
                        target=DeviceId(target),
                        bandwidth_bytes_per_s=scenario.uplink_bytes_per_s,
                    )
                )
    return Crowd(
        devices=tuple(devices),
        links=tuple(links),
        default_link=DefaultLink(bandwidth_bytes_per_s=scenario.d2d_bytes_per_s, latency_s=0.0),
    )


def profile_of(scenario: Scenario) -> ModelProfile:
    """One layer a stage, of equal work; a step takes `STEP_S` at speed 1. Boundary tensors weigh
    nothing: the scenarios name none."""
    # Step of 1F1B on equal stages: M + S - 1 times one stage's forward and backward.
    stage_s = STEP_S / (MICROBATCHES + scenario.stages - 1)
    size = scenario.state_bytes_per_stage
    return ModelProfile(
        layers=tuple(
            LayerProfile(
                name=f"stage{index}",
                forward_flops=FLOPS_PER_S * stage_s / 3,
                backward_flops=2 * FLOPS_PER_S * stage_s / 3,
                parameter_bytes=size // 3,
                optimizer_bytes=size - size // 3,
            )
            for index in range(scenario.stages)
        ),
        microbatches=MICROBATCHES,
        microbatch_size=1,
        input_bytes=0,
    )
