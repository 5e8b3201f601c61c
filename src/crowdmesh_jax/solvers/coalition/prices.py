"""What stability costs on a crowd so small that every structure can be looked at.

The *price of stability* is the best stable structure over the best structure there is; the *price
of anarchy* is the worst stable one over it. Both by the potential, by the mean round and by the
slowest round: the game lowers the first, users feel the others. It searches nothing cleverly.

Source: price of anarchy, Koutsoupias and Papadimitriou 1999; price of stability, Anshelevich et al.
2004 (both from general knowledge).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from .baselines import all_structures
from .game import Game
from .preferences import Switch, make_preference
from .problem import CoalitionProblem
from .rating import EPSILON
from .search import Search


@dataclass(frozen=True, slots=True, kw_only=True)
class StabilityPrice:
    """One measure of all structures of a crowd; smaller is better."""

    optimum: float
    """The least of all structures."""
    best_stable: float
    """The least of the Nash-stable ones; infinite where there are none (under preferences without
    a potential)."""
    worst_stable: float
    """The most of the Nash-stable ones; infinite where one of them leaves devices without a model
    though a structure exists that does not."""

    @property
    def of_stability(self) -> float:
        """Best stable over optimum, >= 1."""
        return self.best_stable / self.optimum

    @property
    def of_anarchy(self) -> float:
        """Worst stable over optimum, >= the price of stability."""
        return self.worst_stable / self.optimum


@dataclass(frozen=True, slots=True, kw_only=True)
class StabilityPrices:
    """What stability costs on one crowd."""

    structures: int
    """Looked at: all within the size bound."""
    stable: int
    """Of them Nash-stable."""
    potential: StabilityPrice
    mean_round: StabilityPrice
    """Seconds, coalitions weighted by their rows."""
    slowest_round: StabilityPrice
    """Seconds."""

    def __str__(self) -> str:
        lines = [f"{self.stable} of {self.structures} structures are Nash-stable"]
        for name in ("potential", "mean_round", "slowest_round"):
            price: StabilityPrice = getattr(self, name)
            lines.append(
                f"{name.replace('_', ' '):14s} price of stability {price.of_stability:.3f},"
                f" of anarchy {price.of_anarchy:.3f}"
            )
        return "\n".join(lines)


def stability_prices(
    problem: CoalitionProblem,
    *,
    preference: str | Callable[[Switch], object] = "marginal",
    epsilon: float = EPSILON,
    max_devices: int = 8,
) -> StabilityPrices:
    """Price of anarchy and price of stability, by trying every structure.

    Args:
        preference: Whose switches must not gain.
        epsilon: A structure is stable if no device gains more than this by one switch.
        max_devices: Larger crowds are refused: 4,140 structures of 8 devices, 115,975 of 10.

    Returns:
        Over all structures, the optimum and the best and worst stable ones, by three measures. A
        structure that leaves more devices without a model than needed counts as infinite.

    Raises:
        InvalidValueError: More devices than `max_devices`, or an unknown preference.
        InfeasibleError: No device can hold any layer.

    Example:
        >>> import crowdmesh_jax as cm
        >>> cm.stability_prices.__name__
        'stability_prices'
    """
    game, chosen = Game(problem), make_preference(preference)[1]
    structures = all_structures(game, max_devices)
    costs = [game.potential(masks) for masks in structures]
    least_lack = min(cost.lack for cost in costs)
    held = [cost.lack == least_lack for cost in costs]
    stable = [
        place for place, masks in enumerate(structures)
        if _is_stable(Search(game, masks, preference=chosen, epsilon=epsilon, rng=random.Random(0)))
    ]  # fmt: skip
    rounds = [game.measures(masks) for masks in structures]

    def price(values: list[float]) -> StabilityPrice:
        counted = [v if ok else math.inf for v, ok in zip(values, held, strict=True)]
        return StabilityPrice(
            optimum=min(counted),
            best_stable=min((counted[place] for place in stable), default=math.inf),
            worst_stable=max((counted[place] for place in stable), default=math.inf),
        )

    return StabilityPrices(
        structures=len(structures),
        stable=len(stable),
        potential=price([cost.phi for cost in costs]),
        mean_round=price([mean for _, mean in rounds]),
        slowest_round=price([slowest for slowest, _ in rounds]),
    )


def _is_stable(search: Search) -> bool:
    return not any(
        search.gain(device, target).is_gain(search.epsilon)
        for device in range(search.game.count)
        for target in search.targets(device)
    )


__all__ = ["StabilityPrice", "StabilityPrices", "stability_prices"]
