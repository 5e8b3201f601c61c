"""The game by closed forms for thousands of devices: moves as array expressions over `columns.py`.

Many devices look at once; those whose best moves touch different coalitions go at once. A move is
accepted by sums over the members made anew, so rounding does not gather, and its gain is exact. It
knows switches and merges, no starts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np

from .columns import TOGETHER, Columns
from .game import Game
from .problem import Certificate, Cost, Deviation
from .search import Observer

STRIPE = 200
"""Columns that a device looks at in a striped pass."""
STRIPED_PASSES = 24
AGAIN = -2
"""Last look of a device that must look at everything again."""

Change = tuple[int, int, list[int], list[int]]
"""Two columns and the members that they would have."""


class ArrayGame(Columns):
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
        super().__init__(game, groups)
        self.epsilon, self._observer = epsilon, observer
        self._seen = np.full(game.count, -1)
        self.moves = self.passes = 0
        self.is_cut_short = False

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
            part = devices[start : start + self.block(len(columns))]
            # Asked anew: a move of this block may just have changed where these are.
            if not (self._born[self.home[devices[start:]]] > self._seen[devices[start:]]).any():
                oldest = self._seen[devices[start:]].min()
                columns = columns[self._born[columns] > oldest]
                part = devices[start : start + self.block(len(columns))]
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
            block = order[start : start + min(64, self.block(len(columns)))]
            start += len(block)
            moved += self._switches(block, columns)
            self._seen[block] = AGAIN
        return moved

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
        size = self.block(len(all_columns))
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
            size = min(self.block(there), 1 + there // 8)
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
        size = self.block(len(columns))
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


__all__ = ["ArrayGame"]
