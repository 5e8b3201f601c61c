"""Recorded positions: who was where when, read at any time, replayed as a movement.

Between two records a node is on the straight line between them; before its first record, after its
last, and in gaps longer than `max_gap_s` it is absent. `Recorded` replays all nodes; `Seats` keeps
a crowd of fixed size out of a trace where nodes come and go.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from ..errors import DataError, InvalidValueError
from . import checks
from .checks import Bools, Floats

MAX_TRIES = 1000
"""Of drawing a moment at which all seats can be filled."""


class Trace:
    """Positions of nodes over time."""

    def __init__(
        self,
        nodes: tuple[str, ...],
        node_of_row: ArrayLike,
        times_s: ArrayLike,
        positions_m: ArrayLike,
        *,
        max_gap_s: float = 5.0,
        where: str = "trace",
    ) -> None:
        """Rows in any order.

        Args:
            node_of_row: `[rows]` numbers into `nodes`.
            positions_m: `[rows, 2]`
            max_gap_s: Silence of a node beyond which it counts as away in between.
            where: What errors call it, a file's name say.

        Raises:
            DataError: No rows, a node without rows, two rows of one node at one time.
            InvalidValueError: Values that are not finite.
        """
        self.nodes, self.where = nodes, where
        self.max_gap_s = checks.number(f"{where}: max_gap_s", max_gap_s, above=True)
        times = checks.array(f"{where}: times_s", times_s)
        places = checks.array(f"{where}: positions_m", positions_m, last=2)
        numbers = np.asarray(node_of_row, np.int64)
        if len(times) == 0:
            raise DataError(f"{where}: there is no position in it")
        if not times.shape == numbers.shape == places.shape[:1]:
            raise DataError(
                f"{where}: {numbers.shape} nodes, {times.shape} times and {places.shape} positions"
                " do not belong together"
            )
        order = np.lexsort((times, numbers))
        self._times_s, self._places_m = times[order], places[order]
        numbers = numbers[order]
        self._starts = np.searchsorted(numbers, np.arange(len(nodes)))
        self._ends = np.searchsorted(numbers, np.arange(len(nodes)), "right")
        if (self._starts == self._ends).any():
            nobody = int(np.flatnonzero(self._starts == self._ends)[0])
            raise DataError(f"{where}: node {nodes[nobody]!r} has no position")
        same = (np.diff(self._times_s) == 0) & (np.diff(numbers) == 0)
        if same.any():
            row = int(np.flatnonzero(same)[0])
            raise DataError(
                f"{where}: node {nodes[numbers[row]]!r} has two positions at"
                f" {self._times_s[row]:g} s"
            )
        self.start_s, self.end_s = float(times.min()), float(times.max())
        # Rows by node, then time, as one ascending key: one search finds all nodes' rows.
        self._stride_s = 2 * (self.end_s - self.start_s) + 1
        self._keys = self._key(numbers, self._times_s)

    def __len__(self) -> int:
        return len(self._times_s)

    def __repr__(self) -> str:
        return (
            f"Trace({self.where}: {len(self.nodes)} nodes, {len(self)} rows,"
            f" {self.start_s:g} to {self.end_s:g} s)"
        )

    def _key(self, numbers: np.ndarray, times_s: Floats | float) -> Floats:
        return numbers * self._stride_s + (times_s - self.start_s)

    @property
    def first_s(self) -> Floats:
        """When each node is first there, `[nodes]`."""
        return self._times_s[self._starts]

    @property
    def last_s(self) -> Floats:
        """When each node is last there, `[nodes]`."""
        return self._times_s[self._ends - 1]

    @property
    def bounds_m(self) -> tuple[Floats, Floats]:
        """The lowest and the highest coordinates, `[2]` each."""
        return self._places_m.min(axis=0), self._places_m.max(axis=0)

    def at(self, time_s: float) -> tuple[Floats, Floats, Bools]:
        """Positions `[nodes, 2]`, velocities `[nodes, 2]` and presence `[nodes]` at that time.

        A velocity is that towards the next record (at the last record: from the one before), 0 for
        the absent. An absent node is told at its nearest record in time, the earlier one in a gap.
        """
        inside = min(max(time_s, self.start_s), self.end_s)
        rows = np.searchsorted(self._keys, self._key(np.arange(len(self.nodes)), inside), "right")
        before = np.clip(rows - 1, self._starts, self._ends - 1)
        # Keys of many nodes are large, so they may round a record of the next instant to now.
        before -= (self._times_s[before] > time_s) & (before > self._starts)
        after = np.minimum(before + 1, self._ends - 1)
        since_s = time_s - self._times_s[before]
        gap_s = self._times_s[after] - self._times_s[before]
        # At a gap's first record the node is there still.
        present = (since_s >= 0) & np.where(
            after > before, (gap_s <= self.max_gap_s) | (since_s == 0), since_s == 0
        )
        # At the last record, and at one before a gap, the way it came is all there is to go by.
        ends = (after == before) | (gap_s > self.max_gap_s)
        came = np.where(ends, np.maximum(before - 1, self._starts), before)
        went = np.where(ends, before, after)
        took_s = self._times_s[went] - self._times_s[came]
        known = present & (took_s > 0) & (took_s <= self.max_gap_s)
        way_m = self._places_m[went] - self._places_m[came]
        velocities = np.where(known[:, None], way_m / np.where(known, took_s, 1.0)[:, None], 0.0)
        moved_m = velocities * np.where(present & ~ends, since_s, 0.0)[:, None]
        return self._places_m[before] + moved_m, velocities, present


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """All nodes of a trace, from `from_s` on; after its end everybody is away."""

    trace: Trace
    from_s: float | None = None
    """Time 0 of the movement; None: the trace's first record."""

    def start(self, devices: int, generator: Generator) -> RecordedWalk:
        """The nodes where they are at the beginning.

        Raises:
            InvalidValueError: Another number of devices than of nodes.
        """
        if devices != len(self.trace.nodes):
            raise InvalidValueError(
                f"{self.trace.where} has {len(self.trace.nodes)} nodes, asked for {devices};"
                " ask for all, or keep a number of them with Seats"
            )
        return RecordedWalk(self.trace, self.trace.start_s if self.from_s is None else self.from_s)


class RecordedWalk:
    """A time in a trace."""

    def __init__(self, trace: Trace, from_s: float) -> None:
        self._trace, self._from_s, self._steps = trace, from_s, 0
        self.occupants = np.arange(len(trace.nodes))
        self.positions_m, self.velocities_m_per_s, self.present = trace.at(from_s)

    def step(self, dt_s: float) -> None:
        """Reads the trace at the next time."""
        # Whole steps: summed up, rounding would pass a last record by a hair.
        self._steps += 1
        at_s = self._from_s + self._steps * dt_s
        self.positions_m, self.velocities_m_per_s, self.present = self._trace.at(at_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """A crowd of fixed size out of a trace: a seat for each device.

    A node that arrives takes a seat that is free, and gives it back when it leaves: to another node
    that is there without a seat, if there is one, drawn at random, in the same step; else the seat
    stays empty. A seat's `occupants` number grows by the number of seats with every newcomer, so
    that nobody takes the newcomer for the one who left.

    At its end the trace is played backwards, down to the end of the warm-up, and forwards again:
    begun anew it would make all devices leave in one step, which no crowd does.
    """

    trace: Trace
    warm_up_s: float | None = None
    """What is left out at the trace's start; time 0 is drawn uniformly from the rest. None: until
    as many nodes as seats are there for the first time, and time 0 is when so many are there."""

    def start(self, devices: int, generator: Generator) -> SeatsWalk:
        """The seats taken by nodes drawn from those that are there.

        Raises:
            InvalidValueError: The trace never has so many nodes at once.
        """
        return SeatsWalk(self, devices, generator)

    def _full_from_s(self, devices: int) -> float:
        first_s, last_s = np.sort(self.trace.first_s), np.sort(self.trace.last_s)
        # Nodes there right after each arrival: those that came less those that left before.
        there = np.arange(1, len(first_s) + 1) - np.searchsorted(last_s, first_s, "left")
        full = np.flatnonzero(there >= devices)
        if not len(full):
            raise InvalidValueError(
                f"{self.trace.where} has at most {int(there.max())} nodes at once, too few for"
                f" {devices} devices"
            )
        return float(first_s[full[0]])


class SeatsWalk:
    """Which node has which seat."""

    def __init__(self, model: Seats, devices: int, generator: Generator) -> None:
        self._trace, self._generator = model.trace, generator
        trace = model.trace
        earliest_s = (
            model._full_from_s(devices)
            if model.warm_up_s is None
            else trace.start_s + checks.number("warm_up_s", model.warm_up_s)
        )
        if earliest_s > trace.end_s:
            raise InvalidValueError(
                f"{trace.where} ends at {trace.end_s:g} s, its warm-up at {earliest_s:g} s only"
            )
        self._from_s = earliest_s
        self._at_s = float(generator.uniform(earliest_s, trace.end_s))
        if model.warm_up_s is None:
            for _ in range(MAX_TRIES):
                if int(trace.at(self._at_s)[2].sum()) >= devices:
                    break
                self._at_s = float(generator.uniform(earliest_s, trace.end_s))
            else:
                self._at_s = earliest_s
        self._played_s, self._forwards = self._at_s - earliest_s, True
        self._nodes = np.full(devices, -1)
        self.occupants = np.arange(devices)
        self.positions_m = np.zeros((devices, 2))
        self._seat(first=True)

    def step(self, dt_s: float) -> None:
        """Moves on in the trace, and turns at its ends."""
        length_s = self._trace.end_s - self._from_s
        self._played_s += dt_s
        folded_s = self._played_s % (2 * length_s) if length_s > 0 else 0.0
        self._forwards = folded_s <= length_s
        self._at_s = self._from_s + (folded_s if self._forwards else 2 * length_s - folded_s)
        self._seat()

    def _seat(self, *, first: bool = False) -> None:
        places_m, velocities, there = self._trace.at(self._at_s)
        held = self._nodes >= 0
        held[held] = there[self._nodes[held]]
        self._nodes[~held] = -1
        waiting = there.copy()
        waiting[self._nodes[held]] = False
        free, candidates = np.flatnonzero(~held), np.flatnonzero(waiting)
        count = min(len(free), len(candidates))
        if count:
            taken = free[:count]
            self._nodes[taken] = self._generator.choice(candidates, count, replace=False)
            if not first:
                self.occupants[taken] += len(self._nodes)
        self.present = self._nodes >= 0
        mine = self._nodes[self.present]
        self.positions_m[self.present] = places_m[mine]
        self.velocities_m_per_s = np.zeros_like(self.positions_m)
        way = 1.0 if self._forwards else -1.0
        self.velocities_m_per_s[self.present] = way * velocities[mine]
