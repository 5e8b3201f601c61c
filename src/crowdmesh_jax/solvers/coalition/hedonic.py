"""The coalition solver "hedonic": a game in which each device goes where it prefers to be.

Problem: a structure in which no device gains by a single switch (Nash-stable), with a low potential

    Phi = sum over coalitions K of  (n_K / n) [tau_K (1 + kappa delta_K^2) / tau_0]^p

`tau_K` is the coalition's predicted round (`value.py`), `delta_K` its distance from the crowd's
labels, `n_K / n` its share of the rows. Under the preference `marginal` a device's gain by a switch
is the fall of Phi, so better response ends: each switch lowers Phi by more than epsilon, and there
are finitely many structures. Pair swaps, merges and splits, which lower Phi as well, leave bad
equilibria, and several starts find better ones. After any of them switches run again, so what is
returned is stable.

Variables: the member set of each coalition. Work: a pass is O(N k) switches for k coalitions, most
of them spared by bounds; values are memoised by member set.

Source: hedonic games and stability, Dreze and Greenberg 1980, Bogomolnaia and Jackson 2002 (known
generally); the switch rule with a potential is the utilitarian order of Saad et al. (TMC 2011,
known generally), with marginal utility as in this project's design.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ...core import CoalitionStructure, Crowd
from ...errors import InfeasibleError, InvalidValueError
from .arrays import ArrayGame
from .baselines import (
    RIVALS,
    GreedySolver,
    grand_masks,
    mend,
    random_groups,
    singleton_masks,
)
from .certificate import FEW, certify
from .game import Game
from .preferences import Preference, Switch, make_preference, marginal
from .problem import Certificate, CoalitionProblem, CoalitionResult
from .rating import CERTIFIED, EPSILON, SAMPLE_ABOVE, as_masks
from .search import Observer, Search

MANY = 1000
"""Devices beyond which closed forms have one start and a sampled certificate."""
SAMPLED = 512
"""Devices whose deviations are looked at there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HedonicSolver:
    """Better response from several starts, as a `CoalitionSolver`."""

    preference: str | Callable[[Switch], object] = "marginal"
    starts: int = 4
    """Structures to start from: greedy, singletons, the grand coalition, then random ones. Beyond
    64 devices the first alone (closed forms: beyond 1000)."""
    rivals: Sequence[str] = ()
    """Other solvers (greedy, kmeans, ...) whose structures are starts as well: the potential is
    then no higher than theirs. Not for closed forms of more than 64 devices."""
    choose: Literal["potential", "rounds"] = "potential"
    """Which of the equilibria found is returned: the one with the least potential, or the one that
    is above no start's mean or slowest round, if there is one, and among those the one whose
    slowest round is shortest."""
    repair: bool = True
    """Whether swaps, merges and splits help after the switches; without them: the game alone."""
    epsilon: float = EPSILON
    """A move must gain more than this part of the potential."""
    seed: int = 0
    """Orders devices and makes random starts."""
    observer: Observer | None = None
    """Called for each accepted move of every start."""

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise InvalidValueError(f"starts must be >= 1, got {self.starts}")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise InvalidValueError(f"epsilon must be finite and >= 0, got {self.epsilon}")
        make_preference(self.preference)
        if self.choose not in ("potential", "rounds"):
            raise InvalidValueError(f"choose must be 'potential' or 'rounds', got {self.choose!r}")
        unknown = [name for name in self.rivals if name not in RIVALS]
        if unknown:
            raise InvalidValueError(
                f"no rival {unknown[0]!r} to start from; known: {', '.join(RIVALS)}"
            )

    def form(self, problem: CoalitionProblem) -> CoalitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: No device can hold any layer, or no coalition the model.
        """
        started_s = time.monotonic()
        game = Game(problem)
        if self._is_by_arrays(game):
            return self._by_arrays(game, self._array_starts(game), started_s)
        return self._best(game, self._starts(game), started_s)

    def reform(
        self, before: CoalitionResult, crowd: Crowd, *, hysteresis: float = 0.02
    ) -> CoalitionResult:
        """Forms coalitions anew after devices joined, left or changed, from where they stand.

        Those who stay keep their coalition; newcomers go where Phi then rises least; then better
        response runs, in which a move must gain more than `hysteresis` of the potential, so that a
        small change of a link does not make everybody move. With 0 the result is a stable
        structure of the new crowd; else it is stable up to that gain, and its certificate says so.

        Args:
            hysteresis: Share of the potential that a move must gain while the crowd re-forms.

        Raises:
            InvalidValueError: `hysteresis` is not in [0, 1).
        """
        if not 0 <= hysteresis < 1:
            raise InvalidValueError(f"hysteresis must lie in [0, 1), got {hysteresis}")
        started_s = time.monotonic()
        game = Game(replace(before.problem, crowd=crowd))
        if self._is_by_arrays(game):
            made = self._standing(game, before.structure)
            floor = hysteresis * made.potential().phi
            made.epsilon = max(self.epsilon, floor)
            return self._by_arrays(game, [made], started_s)
        masks = placed(game, before.structure)
        floor = hysteresis * game.potential(masks).phi
        sluggish = replace(self, epsilon=max(self.epsilon, floor), starts=1)
        return sluggish._best(game, [masks], started_s)

    def _standing(self, game: Game, structure: CoalitionStructure) -> ArrayGame:
        """A former structure in the game's crowd, newcomers placed."""
        index = game.facts.index
        groups = [[index[d] for d in group if d in index] for group in structure.coalitions]
        made = ArrayGame(game, groups, epsilon=self.epsilon, observer=self.observer)
        made.place(np.flatnonzero(made.home < 0).tolist())
        return made

    def _is_by_arrays(self, game: Game) -> bool:
        return game.is_by_sums and game.count > FEW and self.preference in ("marginal", marginal)

    def _array_starts(self, game: Game) -> Iterator[ArrayGame]:
        """Placed by demand; in crowds where that is cheap by speed, too, and each device alone."""
        speed, rows = game.facts.speed, game.facts.rows
        demand = rows / np.maximum(speed, 1e-12)
        orders = [demand, speed][: self.starts if game.count <= MANY else 1]
        for key in orders:
            made = ArrayGame(game, [], epsilon=self.epsilon, observer=self.observer)
            made.place(sorted(range(game.count), key=lambda d: (-key[d], d)))
            yield made
        if self.starts > 2 and game.count <= MANY:
            alone = [[device] for device in range(game.count)]
            yield ArrayGame(game, alone, epsilon=self.epsilon, observer=self.observer)

    def _by_arrays(
        self, game: Game, starts: Iterable[ArrayGame], started_s: float
    ) -> CoalitionResult:
        best: ArrayGame | None = None
        rounds = switches = 0
        for number, made in enumerate(starts):
            made.descend(random.Random(f"hedonic {self.seed} {number}"), merges=self.repair)
            rounds, switches = rounds + made.passes, switches + made.moves
            if best is None or made.potential() < best.potential():
                best = made
        assert best is not None
        masks = as_masks(best.groups())
        check_feasible(game, masks)
        sample = None
        if game.count > MANY:
            rng = random.Random(f"certificate {self.seed}")
            sample = rng.sample(range(game.count), SAMPLED)
        return self._told(
            game, masks, best.certificate("marginal", sample), rounds, switches, started_s,
            ["ended by the bound on passes, not by stability"] if best.is_cut_short else [],
        )  # fmt: skip

    def _starts(self, game: Game) -> list[Sequence[int]]:
        found: list[Sequence[int]] = [GreedySolver(seed=self.seed).masks(game)]
        theirs = [RIVALS[name](seed=self.seed).masks(game) for name in self.rivals]
        if game.count > FEW:
            return found + theirs
        found += [singleton_masks(game), grand_masks(game)]
        rng = random.Random(f"starts {self.seed}")
        while len(found) < self.starts:
            count = rng.randint(1, max(1, game.count // 2))
            groups = random_groups(game, max(count, -(-game.count // game.problem.size_limit)), rng)
            found.append(mend(game, as_masks(groups)))
        return found[: self.starts] + theirs

    def _best(
        self, game: Game, starts: Sequence[Sequence[int]], started_s: float
    ) -> CoalitionResult:
        name, preference = make_preference(self.preference)
        found = [
            self._descend(game, masks, preference, number) for number, masks in enumerate(starts)
        ]
        rounds, switches = sum(one.passes for one in found), sum(one.moves for one in found)
        best = min(found, key=lambda one: game.potential(one.masks))
        if self.choose == "rounds":
            best = found[best_by_rounds(game, [one.masks for one in found], starts)]
        check_feasible(game, best.masks)
        certificate = certify(
            game,
            game.masks(game.structure(best.masks)),
            name=name,
            preference=preference,
            epsilon=self.epsilon,
            sample=CERTIFIED if game.count > SAMPLE_ABOVE else None,
            seed=self.seed,
        )
        notes = []
        if best.is_cut_short:
            notes.append("ended by the bound on passes, not by stability")
        if not best.has_potential:
            notes.append(f"preference {name!r} has no potential: ended by the history rule")
        return self._told(game, best.masks, certificate, rounds, switches, started_s, notes)

    def _told(
        self,
        game: Game,
        masks: Sequence[int],
        certificate: Certificate,
        rounds: int,
        switches: int,
        started_s: float,
        notes: list[str],
    ) -> CoalitionResult:
        structure = game.structure(masks)
        ordered = game.masks(structure)
        unheld = [mask for mask in ordered if game.entry(mask).rated.missing > 0]
        if unheld:
            count = sum(mask.bit_count() for mask in unheld)
            notes = [*notes, f"{count} devices are in coalitions that cannot hold the model"]
        return CoalitionResult(
            structure=structure,
            values=tuple(game.valued(mask) for mask in ordered),
            problem=game.problem,
            potential=game.potential(ordered),
            certificate=certificate,
            rounds=rounds,
            switches=switches,
            evaluations=game.evaluations,
            solve_s=time.monotonic() - started_s,
            solver="hedonic",
            notes=tuple(notes),
        )

    def _descend(
        self, game: Game, masks: Sequence[int], preference: Preference, number: int
    ) -> Search:
        search = Search(
            game,
            masks,
            preference=preference,
            epsilon=self.epsilon,
            rng=random.Random(f"hedonic {self.seed} {number}"),
            observer=self.observer,
        )
        large = game.count > SAMPLE_ABOVE
        search.descend(
            swaps=self.repair and not large, merges=self.repair, splits=self.repair and not large
        )
        return search


def best_by_rounds(
    game: Game, found: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> int:
    """Which structure's mean and slowest round are best.

    First, how little of either is above the least of `others`; then the slowest, for which all
    wait; then the mean. Those that leave devices without a model lose.
    """
    known = [game.measures(masks) for masks in others if game.potential(masks).lack == 0]
    slowest_s = min((slowest for slowest, _ in known), default=math.inf)
    mean_s = min((mean for _, mean in known), default=math.inf)

    def rank(place: int) -> tuple[float, ...]:
        cost, (slowest, mean) = game.potential(found[place]), game.measures(found[place])
        above = max(slowest / slowest_s - 1, 0.0) + max(mean / mean_s - 1, 0.0)
        return cost.lack, above, slowest, mean, place

    return min(range(len(found)), key=rank)


def placed(game: Game, structure: CoalitionStructure) -> list[int]:
    """A former structure in the game's crowd: who left is gone, newcomers where Phi rises least."""
    index = game.facts.index
    masks = [
        sum(1 << index[device] for device in members if device in index)
        for members in structure.coalitions
    ]
    masks = [mask for mask in masks if mask]
    known = 0
    for mask in masks:
        known |= mask
    for device in range(game.count):
        bit = 1 << device
        if known & bit:
            continue
        room = [mask for mask in masks if mask.bit_count() < game.problem.size_limit]
        game.rate([bit, *(mask | bit for mask in room)])
        ranked = [(game.cost(mask | bit) - game.cost(mask), mask) for mask in room]
        _, chosen = min([*ranked, (game.cost(bit), 0)])
        masks = [mask for mask in masks if mask != chosen] + [chosen | bit]
    return mend(game, masks)


def check_feasible(game: Game, masks: Sequence[int]) -> None:
    """Refuses structures in which nobody holds the model, if the whole crowd cannot either.

    Raises:
        InfeasibleError: No coalition of the crowd can hold the model.
    """
    if not game.holds_with(masks) and not game.holds_with(grand_masks(game)):
        size = game.problem.size_limit
        bound = "" if size >= game.count else f" of at most {size} devices (max_size)"
        raise InfeasibleError(
            f"no coalition{bound} can hold the model\n"
            f"  devices  {game.count}, {sum(d.memory_bytes for d in game.facts.devices) / 1e9:.1f}"
            " GB together\n"
            "  try      recompute='auto', fewer rows per microbatch, a larger max_size"
        )


__all__ = ["HedonicSolver", "check_feasible", "placed"]
