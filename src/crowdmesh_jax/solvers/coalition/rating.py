"""A structure, whoever made it, as a result: rated, with the certificate of single switches.

It makes no structures.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from ...core import CoalitionStructure
from .certificate import certify
from .game import Game
from .preferences import marginal
from .problem import CoalitionProblem, CoalitionResult

EPSILON = 1e-9
SAMPLE_ABOVE = 300
"""Devices beyond which certificates look at a sample."""
CERTIFIED = 64
"""Devices of that sample."""


def as_masks(groups: Iterable[Iterable[int]]) -> list[int]:
    """Groups of device indices as masks; empty ones are dropped."""
    masks = (sum(1 << device for device in group) for group in groups)
    return [mask for mask in masks if mask]


def answer(
    game: Game, masks: Sequence[int], *, solver: str, started_s: float, seed: int
) -> CoalitionResult:
    """A structure as a result, with the certificate of the marginal preference."""
    structure = game.structure(masks)
    ordered = game.masks(structure)
    certificate = certify(
        game, ordered, name="marginal", preference=marginal, epsilon=EPSILON,
        sample=CERTIFIED if game.count > SAMPLE_ABOVE else None, seed=seed,
    )  # fmt: skip
    unheld = [m for m in ordered if game.entry(m).rated.missing > 0]
    notes = ()
    if unheld:
        count = sum(m.bit_count() for m in unheld)
        notes = (f"{count} devices are in {len(unheld)} coalitions that cannot hold the model",)
    return CoalitionResult(
        structure=structure,
        values=tuple(game.valued(mask) for mask in ordered),
        problem=game.problem,
        potential=game.potential(ordered),
        certificate=certificate,
        rounds=0,
        switches=0,
        evaluations=game.evaluations,
        solve_s=time.monotonic() - started_s,
        solver=solver,
        notes=notes,
    )


def rate_structure(
    problem: CoalitionProblem,
    groups: CoalitionStructure | Iterable[Iterable[str]],
    *,
    solver: str = "by hand",
    seed: int = 0,
) -> CoalitionResult:
    """Rates a structure that somebody else made: what a coalition solver of your own returns.

    Args:
        groups: Ids per coalition; each device of the crowd in exactly one.
        solver: Named in the result.
        seed: Of the sample that the certificate looks at in crowds of more than 300.

    Raises:
        InvalidCoalitionError: The groups are no structure of this crowd.
        InfeasibleError: No device can hold any layer.
    """
    started_s = time.monotonic()
    made = groups if isinstance(groups, CoalitionStructure) else CoalitionStructure.of(groups)
    made.check(problem.crowd)
    game = Game(problem)
    return answer(game, game.masks(made), solver=solver, started_s=started_s, seed=seed)


__all__ = ["CERTIFIED", "EPSILON", "SAMPLE_ABOVE", "answer", "as_masks", "rate_structure"]
