"""The frozen scenarios: files that name movement, links, crashes and noise for comparisons.

They are read as they stand; the models that they specify are made here. Choices that the files
leave open are in docs/mobility.md and beside the code. It knows no policy.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.random import Generator

from ..core import values
from ..errors import FormatError, InvalidValueError
from . import checks
from .checks import Floats
from .departures import Crashes, draw_crashes
from .gauss_markov import GaussMarkov
from .movement import Area, Movement, MovementModel
from .radio import DiscRadio
from .recorded import Seats, Trace
from .sightings import Observer
from .traces import read_csv_trace, read_sumo_fcd
from .waypoint import RandomWaypoint

REPORTING_SEED = 1000
"""Seeds from here on are for reporting; lower ones for tuning."""
_TOPICS = ("movement", "noise", "speeds", "crashes")
"""Each has random numbers of its own. Order is part of what a seed means: append only."""
_NAMES = ("calm", "gauss_markov", "sumo", "waypoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One file. Fields that belong to one kind of movement are None in the others."""

    movement: Literal["random_waypoint", "gauss_markov", "trace"]
    devices: int
    stages: int
    range_m: float
    state_bytes_per_stage: int
    changed_share: float
    """Of the state, between two copies."""
    d2d_bytes_per_s: float
    """Device to device, in range."""
    uplink_bytes_per_s: float
    """To the world outside, shared by all."""
    work_s: float
    """Useful work, in seconds without any interruption."""
    crash_per_s: float
    """Of each device."""
    velocity_noise_m_per_s: float
    """Standard deviation of each component of a velocity that is seen."""
    speed_spread: float
    """Devices compute at 1 - this to 1 + this, uniformly."""
    detect_s: float
    restart_s: float
    side_m: float | None = None
    speed_min_m_per_s: float | None = None
    speed_max_m_per_s: float | None = None
    pause_max_s: float | None = None
    alpha: float | None = None
    trace: str | None = None
    """Path of a trace, from the scenario file's folder."""
    folder: str = ""
    """Where the file was read; `trace` starts there."""

    def __post_init__(self) -> None:
        for name in ("devices", "stages", "state_bytes_per_stage"):
            checks.whole(f"scenario: {name}", getattr(self, name), least=1)
        if self.stages > self.devices:
            raise InvalidValueError(
                f"scenario: {self.stages} stages need as many devices, got {self.devices}"
            )
        for name in ("range_m", "d2d_bytes_per_s", "uplink_bytes_per_s", "work_s"):
            checks.number(f"scenario: {name}", getattr(self, name), above=True)
        for name in ("crash_per_s", "velocity_noise_m_per_s", "detect_s", "restart_s"):
            checks.number(f"scenario: {name}", getattr(self, name))
        for name in ("changed_share", "speed_spread"):
            if checks.number(f"scenario: {name}", getattr(self, name)) > 1:
                raise InvalidValueError(f"scenario: {name} must be <= 1, got {getattr(self, name)}")
        needed = {
            "random_waypoint": ("side_m", "speed_min_m_per_s", "speed_max_m_per_s", "pause_max_s"),
            "gauss_markov": ("side_m", "speed_min_m_per_s", "speed_max_m_per_s", "alpha"),
            "trace": ("trace",),
        }[self.movement]
        for name in {*_KINDS_FIELDS}:
            given = getattr(self, name) is not None
            if given != (name in needed):
                fault = "takes no" if given else "needs"
                raise FormatError(f"scenario: movement {self.movement!r} {fault} {name}")
        if self.movement != "trace":
            self.model()  # its own checks

    @classmethod
    def load(cls, path: str | Path) -> Scenario:
        """Reads a scenario from a TOML or JSON file.

        Raises:
            FormatError: The file is missing or no scenario; names the field.
            InvalidValueError: A value is out of range.
        """
        read = values.load(cls, path)
        if read.folder:
            raise FormatError(f"{path}: a scenario file does not name its own folder")
        from dataclasses import replace

        return replace(read, folder=str(Path(path).parent))

    def model(self) -> MovementModel:
        """How devices move.

        - `random_waypoint`: uniform speeds, pauses uniform from 0 to `pause_max_s`.
        - `gauss_markov`: no preferred direction, each device with its own mean speed, uniform
          between the two; `alpha` per second; reflecting borders.
        - `trace`: `Seats` in the trace, from a moment drawn by the seed.

        Raises:
            DataFileError: The trace cannot be read.
        """
        if self.movement == "trace":
            assert self.trace is not None
            return Seats(trace=_trace_of(str(Path(self.folder) / self.trace)))
        assert self.side_m is not None
        assert self.speed_min_m_per_s is not None
        assert self.speed_max_m_per_s is not None
        area = Area.square(self.side_m)
        if self.movement == "random_waypoint":
            assert self.pause_max_s is not None
            return RandomWaypoint(
                area=area,
                speed_min_m_per_s=self.speed_min_m_per_s,
                speed_max_m_per_s=self.speed_max_m_per_s,
                pause_max_s=self.pause_max_s,
            )
        assert self.alpha is not None
        return GaussMarkov.of_speeds(
            area,
            alpha=self.alpha,
            speed_min_m_per_s=self.speed_min_m_per_s,
            speed_max_m_per_s=self.speed_max_m_per_s,
        )

    def start(self, seed: int, *, dt_s: float = 1.0) -> Movement:
        """The movement of that seed, at time 0."""
        return Movement(self.model(), self.devices, seed=_child(seed, "movement"), dt_s=dt_s)

    def observer(self, seed: int, *, delay_s: float = 0.0) -> Observer:
        """What a policy may see: exact positions, velocities with noise."""
        return Observer(
            self.devices,
            _stream(seed, "noise"),
            velocity_noise_m_per_s=self.velocity_noise_m_per_s,
            delay_s=delay_s,
        )

    def radio(self) -> DiscRadio:
        """Links between devices."""
        return DiscRadio(range_m=self.range_m, in_range_bytes_per_s=self.d2d_bytes_per_s)

    def speeds(self, seed: int) -> Floats:
        """How fast devices compute, relative to the nominal one, `[devices]`."""
        spread = 2 * _stream(seed, "speeds").random(self.devices) - 1
        return 1 + self.speed_spread * spread

    def crashes(self, seed: int, until_s: float) -> Crashes:
        """Who crashes when. (Leaving is a matter of the movement: range, or a seat given up.)"""
        return draw_crashes(self.crash_per_s, self.devices, until_s, _stream(seed, "crashes"))


_KINDS_FIELDS = (
    "side_m", "speed_min_m_per_s", "speed_max_m_per_s", "pause_max_s", "alpha", "trace",
)  # fmt: skip


def scenarios() -> tuple[str, ...]:
    """Names of the frozen scenarios."""
    return _NAMES


def scenario(name: str) -> Scenario:
    """The frozen scenario of that name.

    Raises:
        InvalidValueError: There is none; names those there are.

    Example:
        >>> from crowdmesh_jax.mobility import scenario
        >>> scenario("waypoint").speed_max_m_per_s
        1.2
    """
    if name not in _NAMES:
        near = difflib.get_close_matches(str(name), _NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidValueError(f"no scenario {name!r}; {hint}known: {', '.join(_NAMES)}")
    folder = resources.files("crowdmesh_jax.mobility") / "scenarios"
    with resources.as_file(folder / f"{name}.toml") as path:
        return Scenario.load(path)


def _child(seed: int, topic: str) -> int:
    """A seed of its own for each topic."""
    number = checks.whole("seed", seed)
    sequence = np.random.SeedSequence([number, _TOPICS.index(topic)])
    return int(sequence.generate_state(1, np.uint64)[0])


def _stream(seed: int, topic: str) -> Generator:
    return np.random.default_rng(_child(seed, topic))


@lru_cache(maxsize=8)
def _trace_of(path: str) -> Trace:
    """Read once: a trace is a value."""
    reader = read_sumo_fcd if path.removesuffix(".gz").endswith(".xml") else read_csv_trace
    return reader(path)
