"""The game by closed forms for thousands of devices: a coalition is a column of sums.

`ClosedForm` needs seven sums over the members and their label counts, so what a device would bring
to every coalition is one numpy expression over all columns. The formulas are those of `value.py`
and `game.py`, called on arrays: no second truth. It knows single moves and merges, no starts.

Labels are the dear part of a price (a logarithm per class), so a bound comes first (`tangents.py`),
and only pairs that could beat the best pair found are priced exactly. What is accepted or certified
is exact: a move is accepted by sums over the members made anew, so rounding does not gather. Rows
and memory are whole numbers, exact in floats.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from .game import Game
from .problem import Certificate, Cost, Deviation
from .search import Observer
from .tangents import Tangents
from .value import ClosedForm, Sums

PAIRS = 32768
"""Pairs of a device and a column looked at in one expression: its arrays stay in the cache."""
TOGETHER = 256
"""Devices that look before any of them moves, at most."""
STRIPE = 200
"""Columns that a device looks at in a striped pass."""
STRIPED_PASSES = 24
ROUNDING = 1e-4
"""Share that rounding to float32 may lift a bound by: some twenty operations and a fourth power."""
CHUNK = 16384
"""Pairs priced exactly in one expression."""
AGAIN = -2
"""Last look of a device that must look at everything again."""

Change = tuple[int, int, list[int], list[int]]
"""Two columns and the members that they would have."""


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


class ArrayGame:
    """A structure of a closed-form game under single moves and merges.

    Args:
        groups: Device indices per coalition, each device in at most one.
        epsilon: A move must gain more than this.
        observer: Called for each accepted move.
    """

    def __init__(
        self,
        game: Game,
        groups: Iterable[Sequence[int]],
        *,
        epsilon: float,
        observer: Observer | None = None,
    ) -> None:
        assert isinstance(game.value, ClosedForm)
        self.game, self.epsilon, self._observer = game, epsilon, observer
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
        self._seen = np.full(game.count, -1)
        self._clock = self.moves = self.passes = 0
        self.priced = 0
        """Pairs priced exactly."""
        self.is_cut_short = False
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
        least = self.game.weighed(named.rows, low, round_s)[1]
        hope = base[1][:, None] + self._cost[1, columns] - (1 - ROUNDING) * least
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

    # Moves

    def switch_pass(self, order: np.ndarray) -> int:
        """One look at all devices, block by block; returns how many went elsewhere.

        Who stayed in a coalition that is as it was at the last look need only look at what is new.
        """
        self.passes += 1
        moved = 0
        for start in range(0, len(order), TOGETHER):
            block = order[start : start + TOGETHER]
            is_new = self._born[self.home[block]] > self._seen[block]
            moved += self._looks(block[is_new])
            moved += self._looks(block[~is_new])
        return moved

    def _looks(self, devices: np.ndarray) -> int:
        """A look of each of these at all that is new to it."""
        moved = start = 0
        while start < len(devices):
            columns = self.columns()
            part = devices[start : start + self._block(len(columns))]
            # Asked anew: a move of this block may just have changed where these are.
            if not (self._born[self.home[devices[start:]]] > self._seen[devices[start:]]).any():
                oldest = self._seen[devices[start:]].min()
                columns = columns[self._born[columns] > oldest]
                part = devices[start : start + self._block(len(columns))]
            start += len(part)
            if len(columns):
                moved += self._switches(part, columns)
        return moved

    def striped_pass(self, order: np.ndarray, stripes: int) -> int:
        """A look of each device at one of so many parts of the columns; it settles nothing.

        Far from stability some gain is soon found anywhere, for a fraction of a pass's work.
        """
        self.passes += 1
        moved, start, turn = 0, 0, self.passes
        while start < len(order):
            columns = self.columns()
            columns = columns[turn % stripes :: stripes]
            turn += 1
            block = order[start : start + min(64, self._block(len(columns)))]
            start += len(block)
            moved += self._switches(block, columns)
            self._seen[block] = AGAIN
        return moved

    def _block(self, columns: int) -> int:
        """Devices (or coalitions) in one expression over so many columns."""
        return max(1, min(TOGETHER, PAIRS // max(1, columns)))

    def _switches(self, devices: np.ndarray, columns: np.ndarray) -> int:
        choice = self.deviations(devices, columns, floor=self.epsilon)
        self._seen[devices] = self._clock
        touched: set[int] = set()
        changes: list[Change] = []
        wants = choice.gainers(self.epsilon)
        for place in wants:
            device, column = int(devices[place]), int(choice.column[place])
            home = int(self.home[device])
            if touched & {home, column}:  # somebody was faster: look at everything again
                self._seen[device] = AGAIN
                continue
            touched |= {home, column}
            left = [other for other in self.members[home] if other != device]
            changes.append((home, column, left, [*self.members[column], device]))
        return self._change("switch", changes)

    def _change(self, kind: str, changes: Sequence[Change]) -> int:
        """Carries out changes of columns all apart, those that gain by sums made anew."""
        if not changes:
            return 0
        at = np.array([change[:2] for change in changes])
        sums, mix = self._sums_of([group for change in changes for group in change[2:]])
        after = self._cost_of(sums, mix).reshape(2, -1, 2).sum(axis=2)
        gain = self._cost[:, at].sum(axis=2) - after
        kept = (gain[0] > 0) | ((gain[0] == 0) & (gain[1] > self.epsilon))
        done = [change for change, is_kept in zip(changes, kept.tolist(), strict=True) if is_kept]
        if self._observer is not None:
            for (left, right, *groups), fall in zip(done, gain[:, kept].T.tolist(), strict=True):
                before = self.members[left], self.members[right]
                self._observer(kind, _masks(before), _masks(groups), Cost(*fall))
        if done:
            self._clock += 1
            self.moves += len(done)
            self._put(at[kept].ravel(), [group for change in done for group in change[2:]])
        return len(done)

    def merge_pass(self) -> int:
        """Merges pairs of coalitions that gain by it; returns how many did."""
        moved, all_columns = 0, np.flatnonzero(self._sums[0] > 0)
        size = self._block(len(all_columns))
        for start in range(0, len(all_columns), size):
            others = np.flatnonzero(self._sums[0] > 0)
            others = others[others >= all_columns[start]]  # each pair once
            block = np.intersect1d(all_columns[start : start + size], others)
            if not len(block) or len(others) < 2:
                continue
            choice = self.best(
                self._sums[:, block], self._mix[block], self._cost[:, block], block, others,
                floor=self.epsilon,
            )  # fmt: skip
            touched: set[int] = set()
            changes: list[Change] = []
            for place in choice.gainers(self.epsilon):
                left, right = int(block[place]), int(choice.column[place])
                if not touched & {left, right}:
                    touched |= {left, right}
                    both = self.members[left] + self.members[right]
                    changes.append((left, right, [], both))
            moved += self._change("merge", changes)
        return moved

    def descend(self, rng: random.Random, *, merges: bool = True, max_passes: int = 200) -> None:
        """Moves until no device gains by a switch nor, with `merges`, two coalitions by a merge."""
        # One order for all passes: what is new to one of a block is then new to all of it.
        order = list(range(self.game.count))
        rng.shuffle(order)
        devices = np.array(order, int)
        for _ in range(STRIPED_PASSES):
            stripes = -(-int((self._sums[0] > 0).sum()) // STRIPE)
            if stripes < 2 or self.striped_pass(devices, stripes) < len(devices) // 200:
                break
        for _ in range(max_passes):
            if self.switch_pass(devices):
                continue
            if not merges or not self.merge_pass():
                return
        self.is_cut_short = True

    def place(self, devices: Sequence[int]) -> None:
        """Puts devices that are nowhere yet where the potential then rises least, in order.

        In blocks, small beside the coalitions there are: those of a block who want the same
        coalition look again; all who want to be alone are.
        """
        start = 0
        while start < len(devices):
            there = int((self._sums[0] > 0).sum())
            size = min(self._block(there), 1 + there // 8)
            block = np.array(devices[start : start + size], int)
            start += size
            while len(block):
                nowhere = np.zeros((2, len(block)))
                home = np.full(len(block), -1)
                choice = self.best(
                    self._own[:, block], self._labels[block], nowhere, home, self.columns()
                )
                taken: dict[int, list[int]] = {}
                again, alone = [], []
                for device, column in zip(block.tolist(), choice.column.tolist(), strict=True):
                    if not self.members[column]:
                        alone.append(device)
                    elif column in taken:
                        again.append(device)
                    else:
                        taken[column] = [*self.members[column], device]
                spare = self._empty(len(alone)).tolist()
                taken |= {c: [device] for c, device in zip(spare, alone, strict=True)}
                self._put(np.array(list(taken)), list(taken.values()))
                block = np.array(again, int)

    # Stability

    def certificate(self, name: str, sample: Sequence[int] | None = None) -> Certificate:
        """The best single move of each device, or of a sample, priced exactly."""
        ids = self.game.facts.ids
        looked = np.arange(self.game.count) if sample is None else np.array(sorted(sample), int)
        columns = self.columns()
        named = [tuple(ids[d] for d in sorted(group)) for group in self.members]
        found = []
        size = self._block(len(columns))
        for start in range(0, len(looked), size):
            devices = looked[start : start + size]
            choice = self.deviations(devices, columns)
            unstable = set(choice.gainers(self.epsilon))
            for place, device in enumerate(devices.tolist()):
                lack, phi = float(choice.lack[place]), float(choice.phi[place])
                can_go = lack > -np.inf
                found.append(
                    Deviation(
                        device=ids[device],
                        target=named[choice.column[place]] if can_go else (),
                        gain=Cost(lack, phi) if can_go else Cost(0.0, 0.0),
                        welcome_gain=self._welcome(device, columns) if place in unstable else None,
                    )
                )
        return Certificate(
            preference=name, epsilon=self.epsilon, deviations=tuple(found), devices=self.game.count
        )  # fmt: skip

    def _welcome(self, device: int, columns: np.ndarray) -> Cost | None:
        """The best gain among coalitions none of whose members would wait longer for the device."""
        home = self.home[device]
        open_ = (columns != home) & (self._sums[0, columns] < self._limit)
        columns = columns[open_ & ((self._sums[0, columns] > 0) | (self._sums[0, home] > 1))]
        sums = self._sums[:, columns] + self._own[:, [device]]
        delta = self._delta(self._mix[columns] + self._labels[device])
        missing, wait, _ = self._rated(sums, delta)
        hosts_missing, hosts_wait, _ = self._rated(
            self._sums[:, columns], self._delta(self._mix[columns])
        )
        no_longer = (missing < hosts_missing) | ((missing == hosts_missing) & (wait <= hosts_wait))
        welcome = no_longer | (self._sums[0, columns] == 0)
        base = self.leaving(np.array([device]))
        lack, phi = base + self._cost[:, columns] - np.stack(self._costs(sums, delta))
        kept = np.flatnonzero(welcome & ((lack > 0) | ((lack == 0) & (phi > self.epsilon))))
        if not len(kept):
            return None
        return max(Cost(float(lack[place]), float(phi[place])) for place in kept)


def _masks(groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(1 << device for device in group) for group in groups if group)


__all__ = ["ArrayGame", "Choice"]
