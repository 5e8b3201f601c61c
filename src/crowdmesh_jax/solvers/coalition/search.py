"""Moves on a coalition structure, each worked out only as far as bounds ask for.

`switch` (one device leaves for another coalition or to be alone), `swap` (two devices change
places), `merge` and `split`. Under `marginal` each accepted move lowers Phi by exactly its gain:
a move changes two coalitions, their two parts of Phi are the gain, and all others stand. It knows
the game, no strategy of starts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from .game import NOTHING, Game
from .preferences import Preference, Switch, marginal
from .problem import Cost
from .value import members_of

BATCH = 16
"""Coalitions rated per call once bounds have ranked them: few, so that the rest may be spared."""
ALL_SPLITS = 7
"""Members up to which all ways to split a coalition in two are looked at."""
LEAST = Cost(-math.inf, -math.inf)

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
        game, bit, source = self.game, 1 << device, self.home[device]
        rest = source ^ bit
        if not targets:
            return None
        best: tuple[Cost, int] | None = None
        if not self.has_potential:
            game.rate([source, rest, *targets, *(target | bit for target in targets)])
            for target in sorted(targets):
                gain = self.gain(device, target)
                if gain > floor and (best is None or gain > best[0]):
                    best = (gain, target)
            return best
        own = game.cost(source)
        joined = [target | bit for target in targets]
        least = game.bounds([rest, *joined])
        rest_least, joined_least = least[0], least[1:]
        hopes: list[tuple[Cost, int]] = []
        for target, low in zip(targets, joined_least, strict=True):
            hope = own.plus(game.cost(target)) - rest_least.plus(low)
            hopes.append((hope, target))
        hopes.sort(key=lambda pair: (-pair[0].lack, -pair[0].phi, pair[1]))
        for start in range(0, len(hopes), BATCH):
            bar = floor if best is None else max(floor, best[0])
            batch = [target for hope, target in hopes[start : start + BATCH] if hope > bar]
            if not batch:
                break
            game.rate([rest, *(target | bit for target in batch)])
            for target in batch:
                gain = self.gain(device, target)
                better = best is None or gain > best[0] or (gain == best[0] and target < best[1])
                if gain > floor and better:
                    best = (gain, target)
        return best

    def switch_pass(self, devices: Sequence[int]) -> int:
        """Each device in turn takes its best switch, if any gains; returns how many did."""
        moved = 0
        self.passes += 1
        for device in devices:
            home, seen = self.home[device], self._seen[device]
            targets = self.targets(device)
            if self._born[home] <= seen:  # only what is new can have become attractive
                targets = [m for m in targets if m and self._born[m] > seen]
            bit = 1 << device
            if not self.has_potential:
                targets = [m for m in targets if (m | bit) not in self._been[device]]
            self._seen[device] = self._clock
            found = self.best_switch(device, targets, floor=Cost(0.0, self.epsilon))
            if found is None or not found[0].is_gain(self.epsilon):
                continue
            gain, target = found
            self._been[device].add(home)
            self._replace("switch", [home, target], [home ^ bit, target | bit], gain)
            moved += 1
        return moved

    # Moves of several devices, under a potential only

    def _pairs(self, kind: str) -> Iterator[tuple[int, int]]:
        """Pairs of coalitions at least one of which is new since the last look."""
        seen = self._looked.get(kind, -1)
        self._looked[kind] = self._clock
        order = sorted(self.masks, key=lambda m: (-self.game.cost(m).phi, m))
        pairs = [
            (left, right)
            for place, left in enumerate(order)
            for right in order[place + 1 :]
            if max(self._born[left], self._born[right]) > seen
        ]
        for left, right in pairs:
            if left in self._born and right in self._born:
                yield left, right

    def _best_of(
        self, before: Cost, choices: Sequence[tuple[int, int]]
    ) -> tuple[Cost, tuple[int, int]] | None:
        """The pair of new coalitions with the largest gain over `before`, if it is worth it."""
        game, floor = self.game, Cost(0.0, self.epsilon)
        flat = game.bounds([mask for choice in choices for mask in choice])
        hopes = [
            (before - flat[2 * place].plus(flat[2 * place + 1]), choice)
            for place, choice in enumerate(choices)
        ]
        hopes = [pair for pair in hopes if pair[0].is_gain(self.epsilon)]
        hopes.sort(key=lambda pair: (-pair[0].lack, -pair[0].phi, pair[1]))
        best: tuple[Cost, tuple[int, int]] | None = None
        for start in range(0, len(hopes), BATCH):
            bar = floor if best is None else max(floor, best[0])
            batch = [choice for hope, choice in hopes[start : start + BATCH] if hope > bar]
            if not batch:
                break
            game.rate(mask for choice in batch for mask in choice)
            for choice in batch:
                gain = before - game.cost(choice[0]).plus(game.cost(choice[1]))
                if gain.is_gain(self.epsilon) and (best is None or gain > best[0]):
                    best = (gain, choice)
        return best

    def merge_pass(self) -> int:
        """Merges pairs of coalitions while that gains."""
        moved = 0
        for left, right in self._pairs("merge"):
            if (left | right).bit_count() > self.limit:
                continue
            before = self.game.cost(left).plus(self.game.cost(right))
            found = self._best_of(before, [(left | right, 0)])
            if found is not None:
                self._replace("merge", [left, right], [left | right], found[0])
                moved += 1
        return moved

    def swap_pass(self, most: int | None = None) -> int:
        """Swaps one device each between pairs of coalitions, the dearest coalitions first.

        Args:
            most: Look at pairs with one of this many dearest coalitions only.
        """
        moved = 0
        dear = sorted(self.masks, key=lambda m: (-self.game.cost(m).phi, m))
        kept = set(dear if most is None else dear[:most])
        for left, right in self._pairs("swap"):
            if most is not None and left not in kept and right not in kept:
                continue
            before = self.game.cost(left).plus(self.game.cost(right))
            choices = []
            for a in members_of(left):
                for b in members_of(right):
                    both = 1 << a | 1 << b
                    choices.append((left ^ both, right ^ both))
            if left.bit_count() == 1 and right.bit_count() == 1:
                continue  # the same structure again
            found = self._best_of(before, choices)
            if found is not None:
                self._replace("swap", [left, right], found[1], found[0])
                moved += 1
        return moved

    def split_pass(self) -> int:
        """Splits coalitions in two where that gains."""
        moved = 0
        seen = self._looked.get("split", -1)
        self._looked["split"] = self._clock
        for mask in [m for m in sorted(self.masks) if self._born[m] > seen]:
            if mask.bit_count() < 2:
                continue
            found = self._best_of(self.game.cost(mask), self._halves(mask))
            if found is not None:
                self._replace("split", [mask], found[1], found[0])
                moved += 1
        return moved

    def _halves(self, mask: int) -> list[tuple[int, int]]:
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
