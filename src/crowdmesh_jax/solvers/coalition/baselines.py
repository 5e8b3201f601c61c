"""Coalitions as others form them: rivals for comparison and starts for the hedonic game.

All get what ours has: the same profile, links, memory and value. Those that need a number of
coalitions try several and keep the one with the least potential; those whose coalitions cannot
hold the model are repaired (`mend`), so that no rival loses by a formality. Each class says where
its rule is from and what was left open.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from ...errors import InvalidValueError
from .game import Game
from .problem import CoalitionProblem, CoalitionResult
from .rating import answer, as_masks
from .value import members_of

Groups = list[list[int]]
"""Device indices per coalition."""


def counts(game: Game) -> list[int]:
    """Numbers of coalitions worth trying: about a quarter more each time, within the size bound."""
    least = math.ceil(game.count / game.problem.size_limit)
    found, now = [], float(least)
    while now <= game.count:
        found.append(round(now))
        now = max(now * 1.25, now + 1)
    return found


def mend(game: Game, masks: Sequence[int]) -> list[int]:
    """Merges coalitions that cannot hold the model into others, each where Phi rises least."""
    left = list(masks)
    while True:
        game.rate(left)
        short = [m for m in left if game.entry(m).rated.missing > 0]
        if not short:
            return left
        short.sort(key=lambda m: (-game.entry(m).rated.missing, m))
        for mask in short:
            room = [
                m for m in left
                if m != mask and (m | mask).bit_count() <= game.problem.size_limit
            ]  # fmt: skip
            game.rate([m | mask for m in room])
            ranked = sorted(
                (game.cost(m | mask) - game.cost(m).plus(game.cost(mask)), m) for m in room
            )
            if ranked and ranked[0][0].lack < 0:
                left = [m for m in left if m not in (mask, ranked[0][1])]
                left.append(mask | ranked[0][1])
                break
        else:
            return left


def best_of(game: Game, structures: Iterable[Sequence[int]]) -> list[int]:
    """The structure with the least potential, each mended first; the earlier one where equal."""
    mended = (mend(game, masks) for masks in structures)
    return min(mended, key=game.potential)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Baseline:
    """A rule that makes structures; what is common to all of them."""

    seed: int = 0
    name: ClassVar[str] = ""

    def masks(self, game: Game) -> list[int]:
        """The rule's structure, mended."""
        raise NotImplementedError

    def form(self, problem: CoalitionProblem) -> CoalitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: No device can hold any layer, or no coalition the model.
        """
        from .hedonic import check_feasible

        started_s = time.monotonic()
        game = Game(problem)
        masks = self.masks(game)
        check_feasible(game, masks)
        return answer(game, masks, solver=self.name, started_s=started_s, seed=self.seed)

    def _rng(self) -> random.Random:
        return random.Random(f"{self.name} {self.seed}")


def grand_masks(game: Game) -> list[int]:
    """One coalition of all, or as few as the size bound allows, filled in the order of ids."""
    size = game.problem.size_limit
    ids = range(game.count)
    return as_masks(ids[start : start + size] for start in range(0, game.count, size))


def singleton_masks(game: Game) -> list[int]:
    """Each device alone."""
    return [1 << device for device in range(game.count)]


class GrandSolver(_Baseline):
    """The grand coalition: all devices train one copy.

    Variables: none. One evaluation. Under `max_size` as few coalitions as fit, filled in the order
    of ids. Source: the trivial structure of any coalition game.
    """

    name = "grand"

    def masks(self, game: Game) -> list[int]:
        return mend(game, grand_masks(game))


class SingletonsSolver(_Baseline):
    """Each device alone, as in plain federated learning; N evaluations.

    Those that cannot hold the model are merged into others. Source: FedAvg's clients (McMahan et
    al. 2017, from general knowledge).
    """

    name = "singletons"

    def masks(self, game: Game) -> list[int]:
        return mend(game, singleton_masks(game))


def random_groups(game: Game, count: int, rng: random.Random) -> Groups:
    """`count` groups of nearly equal size."""
    devices = list(range(game.count))
    rng.shuffle(devices)
    return [devices[start::count] for start in range(count)]


class RandomSolver(_Baseline):
    """Random groups of nearly equal size; the best of several numbers of groups, one draw each.

    O(N) evaluations per number of groups. Source: the usual lower bar; no paper.
    """

    name = "random"

    def masks(self, game: Game) -> list[int]:
        rng = self._rng()
        return best_of(game, [as_masks(random_groups(game, k, rng)) for k in counts(game)])


def lloyd(points: np.ndarray, count: int, rng: random.Random, rounds: int = 50) -> np.ndarray:
    """k-means: the cluster of each point. Seeded by distance (k-means++), then Lloyd's rounds.

    Source: Lloyd 1982, Arthur & Vassilvitskii 2007 (both from general knowledge).
    """
    total = len(points)
    centres = [points[rng.randrange(total)]]
    far = ((points - centres[0]) ** 2).sum(axis=1)
    while len(centres) < count:
        weights = far.tolist()
        pick = rng.choices(range(total), weights)[0] if sum(weights) > 0 else rng.randrange(total)
        centres.append(points[pick])
        far = np.minimum(far, ((points - points[pick]) ** 2).sum(axis=1))
    middle = np.array(centres)
    home = np.full(total, -1)
    for _ in range(rounds):
        away = ((points[:, None, :] - middle[None, :, :]) ** 2).sum(axis=2)
        new = away.argmin(axis=1)
        if (new == home).all():
            break
        home = new
        for cluster in range(count):
            mine = points[home == cluster]
            if len(mine):
                middle[cluster] = mine.mean(axis=0)
    return home


def cut_to_size(groups: Groups, limit: int) -> Groups:
    """Groups beyond the size bound, cut into equal parts in the order of ids."""
    found: Groups = []
    for group in groups:
        parts = math.ceil(len(group) / limit) if group else 0
        found += [sorted(group)[start::parts] for start in range(parts)]
    return found


def features(game: Game) -> np.ndarray:
    """Position and log speed of each device, each scaled to unit spread; missing positions: 0."""
    devices = game.facts.devices
    rows = np.array([(*(d.position_m or (0.0, 0.0)), 0.0) for d in devices], float)
    rows[:, 2] = np.log(np.maximum(game.facts.speed, 1e-12))
    spread = rows.std(axis=0)
    return (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


class KMeansSolver(_Baseline):
    """k-means on place and speed: devices near and alike train together.

    O(k N) per round of Lloyd and number of clusters. Left open by the practice and fixed here:
    features (x, y, log speed, each scaled to unit spread), seeding by distance, several k of which
    the least potential counts, clusters beyond `max_size` cut into equal parts.
    """

    name = "kmeans"

    def masks(self, game: Game) -> list[int]:
        rng, points = self._rng(), features(game)
        found = []
        for count in counts(game):
            home = lloyd(points, count, rng)
            groups = [np.flatnonzero(home == cluster).tolist() for cluster in range(count)]
            found.append(as_masks(cut_to_size(groups, game.problem.size_limit)))
        return best_of(game, found)


class GreedySolver(_Baseline):
    """Cheapest insertion: the fastest device first, each where the potential then rises least.

    Joining any coalition so far and starting a new one are both looked at, with exact values:
    O(N k) evaluations. One pass, nobody moves again. Source: the usual greedy; no paper.
    """

    name = "greedy"

    def masks(self, game: Game) -> list[int]:
        speed, found = game.facts.speed, []
        for device in sorted(range(game.count), key=lambda d: (-speed[d], d)):
            bit = 1 << device
            room = [m for m in found if m.bit_count() < game.problem.size_limit]
            game.rate([bit, *(m | bit for m in room)])
            ranked = [(game.cost(m | bit) - game.cost(m), m) for m in room]
            rise, mask = min([*ranked, (game.cost(bit), 0)])
            del rise
            found = [m for m in found if m != mask] + [mask | bit]
        return mend(game, found)


def dealt(
    game: Game, count: int, order: Sequence[int], price: Callable[[Sequence[int], int], float]
) -> Groups:
    """Deals devices in order to groups of nearly equal size, each where the price is lowest."""
    groups: Groups = [[] for _ in range(count)]
    size = min(math.ceil(game.count / count), game.problem.size_limit)
    for device in order:
        room = [group for group in groups if len(group) < size]
        prices = [price(group, device) for group in room]
        room[prices.index(min(prices))].append(device)
    return groups


def _skew(game: Game, group: Sequence[int], device: int) -> float:
    """By how much a group's rows away from the crowd's mix rise with the device."""
    labels, rows = game.facts.labels, game.facts.rows
    joined = labels[[*group, device]].sum(axis=0)
    after = float(game.facts.imbalance(joined)) ** 2 * float(rows[[*group, device]].sum())
    if not group:
        return after
    before = float(game.facts.imbalance(labels[list(group)].sum(axis=0))) ** 2
    return after - before * float(rows[list(group)].sum())


class DataOnlySolver(_Baseline):
    """Groups whose labels look like the crowd's; time is not looked at.

    Devices with most rows first, each to the group (of nearly equal size) where rows times delta^2
    rises least. O(N k) histograms per number of groups. Source: in the spirit of LEAP (IJCAI 2024),
    which values a coalition by how close its data is to the global mix; known to us by its abstract
    only, so the rule is ours: order, equal sizes and the measure are choices.
    """

    name = "data_only"

    def masks(self, game: Game) -> list[int]:
        rows = game.facts.rows
        order = sorted(range(game.count), key=lambda d: (-rows[d], d))
        found = [
            as_masks(dealt(game, count, order, lambda group, d: _skew(game, group, d)))
            for count in counts(game)
        ]
        return best_of(game, found)


class LatencyAndDataSolver(_Baseline):
    """Groups of devices alike in latency whose data together look like the crowd's (Eco-FL-like).

    Eco-FL (ICPP 2022) groups clients by response latency and data distribution; known to us by its
    abstract. Left open by what we know, and chosen here: latency is the device's seconds for one
    step of the whole model alone plus its typical transfer; groups start from evenly spaced
    quantiles of log latency; devices come in the order of latency; each goes to the group where
    |log latency - the group's mean| / the crowd's spread + `weight` x (delta of the group with it)
    is lowest, group sizes nearly equal; several numbers of groups, the least potential counts; no
    regrouping while training. O(N k) histograms per number of groups.
    """

    name = "latency_and_data"
    weight: ClassVar[float] = 1.0

    def masks(self, game: Game) -> list[int]:
        facts = game.facts
        latency = np.log(np.maximum(facts.work_s, 1e-30))
        spread = float(latency.std()) or 1.0
        order = sorted(range(game.count), key=lambda d: (latency[d], d))

        def groups(count: int) -> Groups:
            starts = [float(np.quantile(latency, (c + 0.5) / count)) for c in range(count)]
            made: Groups = [[] for _ in range(count)]
            size = min(math.ceil(game.count / count), game.problem.size_limit)
            for device in order:
                prices = []
                for place, group in enumerate(made):
                    if len(group) >= size:
                        continue
                    middle = float(latency[group].mean()) if group else starts[place]
                    delta = float(facts.imbalance(facts.labels[[*group, device]].sum(axis=0)))
                    away = abs(float(latency[device]) - middle) / spread
                    prices.append((away + self.weight * delta, place))
                made[min(prices)[1]].append(device)
            return made

        return best_of(game, [as_masks(groups(count)) for count in counts(game)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ExhaustiveCoalitions(_Baseline):
    """Every structure there is: set partitions in restricted-growth order, the least potential.

    Bell(N) structures (21,147 for 9 devices), at most 2^N evaluations. Proves the others right on
    tiny crowds. Among equal ones the first in order.
    """

    name: ClassVar[str] = "exhaustive"
    max_devices: int = 10

    def masks(self, game: Game) -> list[int]:
        return min(all_structures(game, self.max_devices), key=game.potential)


def all_structures(game: Game, max_devices: int = 10) -> list[list[int]]:
    """All structures within the size bound, their coalitions rated.

    Raises:
        InvalidValueError: More devices than `max_devices`.
    """
    if game.count > max_devices:
        raise InvalidValueError(
            f"{game.count} devices have too many structures to try; at most {max_devices};"
            " use solver 'hedonic'"
        )
    limit = game.problem.size_limit
    game.rate(m for m in range(1, 1 << game.count) if m.bit_count() <= limit)
    structures: list[list[int]] = [[]]
    for device in range(game.count):
        bit = 1 << device
        structures = [
            grown
            for masks in structures
            for grown in (
                *(
                    [*masks[:at], masks[at] | bit, *masks[at + 1 :]]
                    for at in range(len(masks))
                    if masks[at].bit_count() < limit
                ),
                [*masks, bit],
            )
        ]
    return structures


RIVALS: Mapping[str, type[_Baseline]] = MappingProxyType(
    {
        rival.name: rival
        for rival in (
            GrandSolver, SingletonsSolver, RandomSolver, KMeansSolver, GreedySolver, DataOnlySolver,
            LatencyAndDataSolver,
        )
    }
)  # fmt: skip
"""Those that answer at any size, by name."""

__all__ = [
    "RIVALS",
    "DataOnlySolver",
    "ExhaustiveCoalitions",
    "GrandSolver",
    "GreedySolver",
    "KMeansSolver",
    "LatencyAndDataSolver",
    "RandomSolver",
    "SingletonsSolver",
    "all_structures",
    "answer",
    "as_masks",
    "best_of",
    "counts",
    "members_of",
    "mend",
]  # fmt: skip
