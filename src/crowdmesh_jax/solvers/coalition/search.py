"""Moves on a coalition structure, each worked out only as far as bounds ask for.

`switch` (one device leaves for another coalition or to be alone), `swap` (two devices change
places), `merge` and `split`. Under `marginal` each accepted move lowers Phi by exactly its gain:
a move changes two coalitions, their two parts of Phi are the gain, and all others stand. It knows
the game, no strategy of starts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from .game import NOTHING, Game
from .preferences import Preference, Switch, marginal
from .problem import Cost
from .value import members_of

FIRST, BATCH = 4, 16
"""Coalitions rated per call once bounds have ranked them: few, so that the rest may be spared."""
TOGETHER = 32
"""Devices (or pairs of coalitions) whose questions are answered together."""
ALL_SPLITS = 7
"""Members up to which all ways to split a coalition in two are looked at."""
LEAST = Cost(-math.inf, -math.inf)

Pair = tuple[int, int]
Steps = Generator[list[int], None, Any]
"""A search for one best move: yields the coalitions that it needs rated, returns the move."""

Observer = Callable[[str, tuple[int, ...], tuple[int, ...], Cost], None]
"""(kind of move, coalitions before, after, gain), called for each accepted move."""


class Search:
    """A structure under moves.

    Args:
        masks: The structure; each device of the game in exactly one.
        preference: Of single devices over switches.
        epsilon: A move must gain more than this.
        rng: Orders devices; nothing else is random.
    """

    def __init__(
        self,
        game: Game,
        masks: Iterable[int],
        *,
        preference: Preference = marginal,
        epsilon: float,
        rng: random.Random,
        observer: Observer | None = None,
    ) -> None:
        self.game, self.preference, self.epsilon = game, preference, epsilon
        self._rng, self._observer = rng, observer
        self.limit = game.problem.size_limit
        self.has_potential = preference is marginal
        self.home = [0] * game.count
        self.masks: list[int] = []
        self._clock = 0
        self._born: dict[int, int] = {}
        for mask in sorted(masks):
            self._add(mask)
        self.moves = 0
        self.passes = 0
        self.is_cut_short = False
        """The history rule or the bound on passes ended the search, not stability."""
        self._seen: list[int] = [-1] * game.count
        self._looked: dict[str, int] = {}
        self._been: list[set[int]] = [set() for _ in range(game.count)]

    def _add(self, mask: int) -> None:
        self.masks.append(mask)
        self._born[mask] = self._clock
        for device in members_of(mask):
            self.home[device] = mask

    def _replace(self, kind: str, before: Sequence[int], after: Sequence[int], gain: Cost) -> None:
        self._clock += 1
        self.moves += 1
        new = [mask for mask in after if mask]
        for mask in before:
            if mask:
                self.masks.remove(mask)
                del self._born[mask]
        for mask in new:
            self._add(mask)
        if self._observer is not None:
            self._observer(kind, tuple(m for m in before if m), tuple(new), gain)

    # Switches

    def targets(self, device: int) -> list[int]:
        """Coalitions that the device may join; 0: alone."""
        home = self.home[device]
        found = [m for m in self.masks if m != home and m.bit_count() < self.limit]
        if home.bit_count() > 1:
            found.append(0)
        return found

    def gain(self, device: int, target: int) -> Cost:
        """What the device gains by one switch, worked out."""
        game, bit, source = self.game, 1 << device, self.home[device]
        rest, joined = source ^ bit, target | bit
        if self.has_potential:
            before = game.cost(source).plus(game.cost(target))
            return before - game.cost(rest).plus(game.cost(joined))
        ids = game.facts.ids

        def named(mask: int) -> tuple[str, ...]:
            return tuple(ids[d] for d in members_of(mask))

        return self.preference(
            Switch(
                device=ids[device],
                source=named(source),
                target=named(target),
                source_cost=game.cost(source),
                source_cost_after=game.cost(rest),
                target_cost=game.cost(target),
                target_cost_after=game.cost(joined),
                source_wait=game.entry(source).wait,
                target_wait=game.entry(target).wait if target else NOTHING,
                target_wait_after=game.entry(joined).wait,
            )
        )

    def best_switch(
        self, device: int, targets: Sequence[int], *, floor: Cost = LEAST
    ) -> tuple[Cost, int] | None:
        """The best of these switches and its gain, if above `floor`; ties go to the smaller mask.

        Under `marginal` candidates are ranked by what they could gain at most, and worked out
        until none left can beat the best.
        """
        return self._finish(self._switch_steps(device, targets, floor))

    def _switch_steps(self, device: int, targets: Sequence[int], floor: Cost) -> Steps:
        game, bit, source = self.game, 1 << device, self.home[device]
        rest = source ^ bit
        if not targets:
            return None
        best: tuple[Cost, int] | None = None
        if not self.has_potential:
            yield [source, rest, *targets, *(target | bit for target in targets)]
            for target in sorted(targets):
                gain = self.gain(device, target)
                if gain > floor and (best is None or gain > best[0]):
                    best = (gain, target)
            return best
        own = game.cost(source)
        joined = [target | bit for target in targets]
        least = game.bounds([rest, *joined])
        rises = [game.cost(t) - low for t, low in zip(targets, least[1:], strict=True)]
        if not (own - least[0]).plus(max(rises)) > floor:
            return None
        # What it leaves is in every gain: once it is known the bounds are half as loose.
        yield [rest]
        leaving = own - game.cost(rest)
        hopes = [(leaving.plus(rise), t) for t, rise in zip(targets, rises, strict=True)]
        hopes.sort(key=lambda pair: (-pair[0].lack, -pair[0].phi, pair[1]))
        for batch in _batches(len(hopes)):
            bar = floor if best is None else max(floor, best[0])
            hopeful = [target for hope, target in hopes[batch] if hope > bar]
            if not hopeful:
                break
            yield [target | bit for target in hopeful]
            for target in hopeful:
                gain = self.gain(device, target)
                if gain > floor and (
                    best is None or gain > best[0] or (gain == best[0] and target < best[1])
                ):
                    best = (gain, target)
        return best

    def _finish(self, steps: Steps) -> Any:
        """Carries a search for one best move to its end."""
        while True:
            try:
                self.game.rate(next(steps))
            except StopIteration as end:
                return end.value

    def _foresee(self, searches: Iterable[Steps]) -> None:
        """Works out what several searches will ask for, in few large batches.

        A value costs a fifth in a batch of a hundred; the searches run again afterwards, one by
        one, on the structure as it then is, and find most of what they need.
        """
        going = list(searches)
        while going:
            wanted: list[int] = []
            left = []
            for steps in going:
                masks = next(steps, None)
                if masks is not None:
                    wanted += masks
                    left.append(steps)
            self.game.rate(wanted)
            going = left

    def foresee(self, devices: Iterable[int]) -> None:
        """Works out, in few large batches, what the best switches of these devices rest on."""
        self._foresee(self._switch_steps(d, self.targets(d), LEAST) for d in devices)

    def _open(self, device: int) -> list[int]:
        """Targets that may have become attractive since the device last looked."""
        home, seen = self.home[device], self._seen[device]
        targets = self.targets(device)
        if self._born[home] <= seen:
            targets = [m for m in targets if m and self._born[m] > seen]
        if not self.has_potential:
            bit = 1 << device
            targets = [m for m in targets if (m | bit) not in self._been[device]]
        return targets

    def switch_pass(self, devices: Sequence[int]) -> int:
        """Each device in turn goes where it gains most; returns how many went."""
        moved = 0
        self.passes += 1
        floor = Cost(0.0, self.epsilon)
        for place, device in enumerate(devices):
            if place % TOGETHER == 0:
                block = devices[place : place + TOGETHER]
                self._foresee(self._switch_steps(d, self._open(d), floor) for d in block)
            home, targets = self.home[device], self._open(device)
            self._seen[device] = self._clock
            found = self.best_switch(device, targets, floor=floor)
            if found is None or not found[0].is_gain(self.epsilon):
                continue
            gain, target = found
            self._been[device].add(home)
            bit = 1 << device
            self._replace("switch", [home, target], [home ^ bit, target | bit], gain)
            moved += 1
        return moved

    # Moves of several devices, under a potential only

    def _pairs(self, kind: str) -> list[Pair]:
        """Pairs of coalitions at least one of which is new since the last look."""
        seen = self._looked.get(kind, -1)
        self._looked[kind] = self._clock
        order = sorted(self.masks, key=lambda m: (-self.game.cost(m).phi, m))
        return [
            (left, right)
            for place, left in enumerate(order)
            for right in order[place + 1 :]
            if max(self._born[left], self._born[right]) > seen
        ]

    def _best_of(
        self, before: Cost, choices: Sequence[tuple[int, int]]
    ) -> tuple[Cost, tuple[int, int]] | None:
        """The pair of new coalitions with the largest gain over `before`, if it is worth it."""
        return self._finish(self._choice_steps(before, choices))

    def _choice_steps(self, before: Cost, choices: Sequence[tuple[int, int]]) -> Steps:
        game, floor = self.game, Cost(0.0, self.epsilon)
        flat = game.bounds([mask for choice in choices for mask in choice])
        hopes = [
            (before - flat[2 * place].plus(flat[2 * place + 1]), choice)
            for place, choice in enumerate(choices)
        ]
        hopes = [pair for pair in hopes if pair[0].is_gain(self.epsilon)]
        hopes.sort(key=lambda pair: (-pair[0].lack, -pair[0].phi, pair[1]))
        best: tuple[Cost, tuple[int, int]] | None = None
        for batch in _batches(len(hopes)):
            bar = floor if best is None else max(floor, best[0])
            hopeful = [choice for hope, choice in hopes[batch] if hope > bar]
            if not hopeful:
                break
            yield [mask for choice in hopeful for mask in choice]
            for choice in hopeful:
                gain = before - game.cost(choice[0]).plus(game.cost(choice[1]))
                if gain.is_gain(self.epsilon) and (best is None or gain > best[0]):
                    best = (gain, choice)
        return best

    def _try_all(
        self, kind: str, before: Sequence[tuple[int, ...]], ways: Callable[..., list[Pair]]
    ) -> int:
        """For each of these groups of coalitions, if it still stands, the best of its ways."""
        moved = 0
        for place, masks in enumerate(before):
            if place % TOGETHER == 0:
                block = before[place : place + TOGETHER]
                self._foresee(
                    self._choice_steps(self._sum(group), ways(*group))
                    for group in block
                    if all(mask in self._born for mask in group)
                )
            if not all(mask in self._born for mask in masks):
                continue
            found = self._best_of(self._sum(masks), ways(*masks))
            if found is not None:
                self._replace(kind, masks, found[1], found[0])
                moved += 1
        return moved

    def _sum(self, masks: Iterable[int]) -> Cost:
        total = NOTHING
        for mask in masks:
            total = total.plus(self.game.cost(mask))
        return total

    def merge_pass(self) -> int:
        """Merges pairs of coalitions while that gains."""

        def both(left: int, right: int) -> list[Pair]:
            return [(left | right, 0)] if (left | right).bit_count() <= self.limit else []

        return self._try_all("merge", self._pairs("merge"), both)

    def swap_pass(self, most: int | None = None) -> int:
        """Swaps one device each between pairs of coalitions, the dearest coalitions first.

        Args:
            most: Look at pairs with one of this many dearest coalitions only.
        """

        def swapped(left: int, right: int) -> list[Pair]:
            if left.bit_count() == 1 and right.bit_count() == 1:
                return []  # the same structure again
            pairs = [(1 << a | 1 << b) for a in members_of(left) for b in members_of(right)]
            return [(left ^ both, right ^ both) for both in pairs]

        dear = sorted(self.masks, key=lambda m: (-self.game.cost(m).phi, m))
        kept = set(dear if most is None else dear[:most])
        pairs = [pair for pair in self._pairs("swap") if kept & set(pair)]
        return self._try_all("swap", pairs, swapped)

    def split_pass(self) -> int:
        """Splits coalitions in two where that gains."""
        seen = self._looked.get("split", -1)
        self._looked["split"] = self._clock
        new = [(m,) for m in sorted(self.masks) if self._born[m] > seen and m.bit_count() > 1]
        return self._try_all("split", new, self._halves)

    def _halves(self, mask: int) -> list[Pair]:
        members = members_of(mask)
        if len(members) <= ALL_SPLITS:
            parts = []
            for choice in range(1, 2 ** (len(members) - 1)):
                part = sum(1 << members[bit] for bit in range(len(members)) if choice >> bit & 1)
                parts.append((part, mask ^ part))
            return parts
        speed = self.game.facts.speed
        ordered = sorted(members, key=lambda d: (-speed[d], d))
        found = {sum(1 << d for d in ordered[:count]) for count in range(1, len(ordered))}
        found |= {sum(1 << d for d in ordered[start::2]) for start in (0, 1)}
        return [(part, mask ^ part) for part in sorted(found)]

    def descend(
        self,
        *,
        swaps: bool = True,
        merges: bool = True,
        splits: bool = True,
        max_passes: int = 200,
        devices: Sequence[int] | None = None,
    ) -> None:
        """Moves until nobody gains by any of the kinds of move.

        Args:
            devices: Only these may switch; None: all.
        """
        everyone = list(range(self.game.count)) if devices is None else sorted(devices)
        count = len(self.masks)
        for _ in range(max_passes):
            order = list(everyone)
            self._rng.shuffle(order)
            if self.switch_pass(order):
                continue
            if not self.has_potential:
                return
            if merges and self.merge_pass():
                continue
            if swaps and self.swap_pass(None if self.game.count <= 64 else max(4, count // 8)):
                continue
            if splits and self.split_pass():
                continue
            return
        self.is_cut_short = True


def _batches(count: int) -> Iterator[slice]:
    """A few first: the best hopes raise the bar for the others."""
    start = 0
    while start < count:
        size = BATCH if start else FIRST
        yield slice(start, start + size)
        start += size
