"""Coalitions as columns of sums: what joining each would cost, for many devices in one expression.

`ClosedForm` needs seven sums over the members and their label counts. The formulas are those of
`value.py` and `game.py`, called on arrays: no second truth. It knows costs, no moves.

Labels are the dear part of a price (a logarithm per class), so bounds come first (`tangents.py`),
and only pairs that could beat the best pair found are priced exactly. Rows and memory are whole
numbers, exact in floats, so that who holds the model is never a matter of rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from .game import Game
from .problem import Cost
from .tangents import Tangents
from .value import ClosedForm, Sums

PAIRS = 32768
"""Pairs of a device and a column looked at in one expression: its arrays stay in the cache."""
TOGETHER = 256
"""Devices looked at in one expression, at most: none of them sees the others move."""
ROUNDING = 2e-5
"""Share that rounding to float32 may lift a round by: some twenty operations."""
CHUNK = 16384
"""Pairs priced exactly in one expression."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The best column for each of some newcomers, [B] each."""

    lack: np.ndarray
    """Gains, as in `Cost`; -inf where there is nowhere to go."""
    phi: np.ndarray
    column: np.ndarray

    def gainers(self, epsilon: float) -> list[int]:
        """Places of those who gain more than epsilon, the largest gains first."""
        found = np.flatnonzero((self.lack > 0) | ((self.lack == 0) & (self.phi > epsilon)))
        order = np.lexsort((found, -self.phi[found], -self.lack[found]))
        return found[order].tolist()


class Columns:
    """A structure of a closed-form game as arrays, and what joining each coalition would cost.

    Args:
        groups: Device indices per coalition, each device in at most one.
    """

    def __init__(self, game: Game, groups: Iterable[Sequence[int]]) -> None:
        assert isinstance(game.value, ClosedForm)
        self.game = game
        self._value, facts = game.value, game.facts
        self._limit = game.problem.size_limit
        alone = self._value.sums(np.arange(game.count))
        self._own = np.stack([getattr(alone, name) for name in Sums.__slots__])
        self._labels = facts.labels
        self._has_labels = game.problem.kappa > 0 and bool(facts.whole.any())
        self.members: list[list[int]] = [sorted(group) for group in groups if len(group)]
        used = len(self.members)
        room = max(16, 2 * used)
        self.members += [[] for _ in range(room - used)]
        self.home = np.full(game.count, -1)
        self._sums = np.zeros((len(self._own), room))
        self._mix = np.zeros((room, self._labels.shape[1]))
        self._cost = np.zeros((2, room))
        self._born = np.zeros(room, int)
        self._tangents = Tangents(facts, room)
        self._clock = 0
        """Counts changes; `_born` says when a column's members last changed."""
        self.priced = 0
        """Pairs priced exactly."""
        self._put(np.arange(used), self.members[:used])

    # Columns

    def _sums_of(self, groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Sums [7, G] and labels [G, classes] of groups, made anew from their members."""
        sums = np.zeros((len(self._own), len(groups)))
        mix = np.zeros((len(groups), self._labels.shape[1]))
        held = [place for place, group in enumerate(groups) if group]
        if held:
            sizes = [len(groups[place]) for place in held]
            starts = [0, *accumulate(sizes)][:-1]
            flat = np.fromiter(chain.from_iterable(groups), int, sum(sizes))
            sums[:, held] = np.add.reduceat(self._own[:, flat], starts, axis=1)
            mix[held] = np.add.reduceat(self._labels[flat], starts, axis=0)
        return sums, mix

    def _put(self, at: np.ndarray, groups: Sequence[list[int]]) -> None:
        """Gives columns new members."""
        sums, mix = self._sums_of(groups)
        for column, group in zip(at.tolist(), groups, strict=True):
            self.members[column] = group
            self.home[group] = column
        self._sums[:, at], self._mix[at] = sums, mix
        self._cost[:, at] = self._cost_of(sums, mix)
        self._born[at] = self._clock
        if self._has_labels:
            self._tangents.set(at, mix)

    def _empty(self, count: int = 1) -> np.ndarray:
        """Columns without members."""
        spare = np.flatnonzero(self._sums[0] == 0)
        if len(spare) < count:
            room = len(self._born)
            more = max(room, count)
            self._sums = np.pad(self._sums, ((0, 0), (0, more)))
            self._mix = np.pad(self._mix, ((0, more), (0, 0)))
            self._cost = np.pad(self._cost, ((0, 0), (0, more)))
            self._born = np.pad(self._born, (0, more))
            self._tangents = self._tangents.grown(room + more)
            self.members += [[] for _ in range(more)]
            spare = np.flatnonzero(self._sums[0] == 0)
        return spare[:count]

    def columns(self) -> np.ndarray:
        """Those with members, and one without: to be alone."""
        empty = self._empty()
        return np.append(np.flatnonzero(self._sums[0] > 0), empty)

    def groups(self) -> list[list[int]]:
        """Device indices per coalition."""
        return [sorted(group) for group in self.members if group]

    # Costs

    def _rated(
        self, sums: np.ndarray, delta: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(missing, wait, phi) of coalitions with these sums [7, ...] and label distances."""
        named, value = Sums(*sums), self._value
        round_s = self.game.round_s(named.rows, value.step_s(named), named.hazard)
        wait, phi = self.game.weighed(named.rows, delta, round_s)
        return value.missing(named), wait, phi

    def _delta(self, mix: np.ndarray) -> np.ndarray:
        if not self._has_labels:
            return np.zeros(mix.shape[:-1])
        return self.game.facts.imbalance(mix)

    def _costs(self, sums: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        missing, _, phi = self._rated(sums, delta)
        held = sums[0] > 0
        lack = np.where(held & (missing > 0), sums[0] + missing, 0.0)
        return lack, np.where(held, phi, 0.0)

    def _cost_of(self, sums: np.ndarray, mix: np.ndarray) -> np.ndarray:
        """[lack and phi, ...] of coalitions with these sums and label counts."""
        return np.stack(self._costs(sums, self._delta(mix)))

    def potential(self) -> Cost:
        """Phi of the structure."""
        return Cost(float(self._cost[0].sum()), float(self._cost[1].sum()))

    def best(
        self,
        sums: np.ndarray,
        mix: np.ndarray,
        base: np.ndarray,
        home: np.ndarray,
        columns: np.ndarray,
        *,
        floor: float = -np.inf,
    ) -> Choice:
        """The best column to join for each of B newcomers; exact.

        Args:
            sums: Of the newcomers, [7, B].
            mix: Their label counts, [B, classes].
            base: What each gains by leaving where it is, [lack and phi, B].
            home: Column that each is in and cannot join, [B]; -1: none.
            columns: Those to look at.
            floor: Gains of phi up to this may be missed.
        """
        lack, hope = self._hopes(sums, mix, base, home, columns)
        top = lack.max(axis=1)
        hope[lack < top[:, None]] = -np.inf
        everyone, place = np.arange(len(home)), hope.argmax(axis=1)
        phi = self._gains(sums, mix, columns, everyone, place, base)
        hope[everyone, place] = -np.inf
        bar = phi
        if floor > -np.inf:
            bar = np.where(top > 0, phi, np.where(top == 0, np.maximum(phi, floor), np.inf))
        rows, at = np.nonzero(hope > bar[:, None])
        for start in range(0, len(rows), CHUNK):
            row, where = rows[start : start + CHUNK], at[start : start + CHUNK]
            gains = self._gains(sums, mix, columns, row, where, base)
            order = np.lexsort((where, -gains, row))
            lead = order[np.unique(row[order], return_index=True)[1]]
            lead = lead[gains[lead] > phi[row[lead]]]
            phi[row[lead]], place[row[lead]] = gains[lead], where[lead]
        phi[np.isneginf(top)] = -np.inf
        return Choice(top, phi, columns[place])

    def _hopes(
        self,
        sums: np.ndarray,
        mix: np.ndarray,
        base: np.ndarray,
        home: np.ndarray,
        columns: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gains of lack, exact, and what gains of phi are below, [B, k] each; -inf where closed.

        Bounds are worked out in float32, which halves the time, with room for its rounding.
        """
        counts = self._sums[0, columns]
        alone = (home >= 0) & (self._sums[0, home] == sums[0])
        closed = counts + sums[0][:, None] > self._limit
        closed |= columns == home[:, None]
        if not counts.all():
            closed |= alone[:, None] & (counts == 0)
        # Who joins a coalition that holds the model leaves it holding it.
        short = np.flatnonzero((self._cost[0, columns] > 0) | (counts == 0))
        lack = np.where(closed, -np.inf, base[0][:, None])
        if len(short):
            both = self._sums[:, None, columns[short]] + sums[:, :, None]
            missing = self._value.missing(Sums(*both))
            lack[:, short] += self._cost[0, columns[short]] - np.where(
                missing > 0, both[0] + missing, 0.0
            )
        single, own = self._sums[:, columns].astype(np.float32), sums.astype(np.float32)
        both = [
            None if name in ("count", "memory") else column + new[:, None]
            for name, column, new in zip(Sums.__slots__, single, own, strict=True)
        ]
        named = Sums(*both)  # pyright: ignore[reportArgumentType]
        low = self._tangents.below(mix, columns) if self._has_labels else np.zeros((), np.float32)
        round_s = self.game.round_s(named.rows, self._value.step_s(named), named.hazard)
        power = self.game.problem.power
        if power > 4:  # beyond what float32 can hold
            round_s = round_s.astype(float)
        least = self.game.weighed(named.rows, low, round_s)[1]
        hope = base[1][:, None] + self._cost[1, columns] - (1 - ROUNDING) ** (1 + power) * least
        hope[closed] = -np.inf
        return lack, hope

    def _gains(
        self,
        sums: np.ndarray,
        mix: np.ndarray,
        columns: np.ndarray,
        rows: np.ndarray,
        places: np.ndarray,
        base: np.ndarray,
    ) -> np.ndarray:
        """Exact gains of phi of pairs: rows of newcomers, places in `columns`."""
        self.priced += len(rows)
        at = columns[places]
        delta = self._delta(self._mix[at] + mix[rows])
        _, phi = self._costs(self._sums[:, at] + sums[:, rows], delta)
        return base[1, rows] + self._cost[1, at] - phi

    def leaving(self, devices: np.ndarray) -> np.ndarray:
        """What each takes off its coalition's cost by leaving it, [lack and phi, B]."""
        home = self.home[devices]
        sums = self._sums[:, home] - self._own[:, devices]
        return self._cost[:, home] - self._cost_of(sums, self._mix[home] - self._labels[devices])

    def deviations(
        self, devices: np.ndarray, columns: np.ndarray, *, floor: float = -np.inf
    ) -> Choice:
        """The best single move of each device to one of the columns."""
        return self.best(
            self._own[:, devices], self._labels[devices], self.leaving(devices),
            self.home[devices], columns, floor=floor,
        )  # fmt: skip

    def block(self, columns: int) -> int:
        """Devices (or coalitions) in one expression over so many columns."""
        return max(1, min(TOGETHER, PAIRS // max(1, columns)))


__all__ = ["Choice", "Columns"]
