"""Losses worth a plan made ahead: each stage owner by itself, and what goes together or at once."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..core import DeviceId, PipelinePlan
from ..errors import InvalidValueError
from .groups import HazardGroups


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Devices that are gone together, and how likely that is within the horizon."""

    devices: tuple[DeviceId, ...]
    """Sorted. Those without a stage that go with one are among them."""
    probability: float


def likely_losses(
    plan: PipelinePlan,
    loss_per_s: Mapping[str, float],
    *,
    horizon_s: float,
    groups: HazardGroups | None = None,
    group_loss_per_s: Mapping[str, float] | None = None,
    here: Collection[str] | None = None,
    doubles: int = 0,
) -> tuple[Loss, ...]:
    """Every single loss of a stage owner, likeliest first, then the `doubles` likeliest of more.

    An owner may fail by itself, and a group's event takes all of it that is here. Several devices
    are lost by one group's event, or by two of these causes within the horizon H, independently: a
    cause of rate r comes with 1 - exp(-r H), two with the product, and what several ways lead to
    with 1 - prod(1 - p) over the ways. So a pair that a group holds is lost with
    c + (1 - c) a b, where c is the chance of the group's event and a, b of theirs.

    Args:
        loss_per_s: Device -> its own rate of being lost; not named: 0.
        horizon_s: Losses within so long are one.
        groups: For what takes several.
        group_loss_per_s: Group -> rate of the event that takes all of it; not named: 0.
        here: Devices that can be lost at all; None: all that a group names, and the owners.
        doubles: How many sets of several; those that cannot happen are left out.

    Raises:
        InvalidValueError: A horizon that is not > 0, a negative count, or a rate that is negative
            or not finite.
    """
    if not horizon_s > 0 or math.isnan(horizon_s):
        raise InvalidValueError(f"horizon_s must be > 0, got {horizon_s}")
    if doubles < 0:
        raise InvalidValueError(f"doubles must be >= 0, got {doubles}")
    groups = groups or HazardGroups()
    rates = group_loss_per_s or {}
    for name, rate in (*loss_per_s.items(), *rates.items()):
        if not (math.isfinite(rate) and rate >= 0):
            raise InvalidValueError(f"loss rate of {name!r} must be finite and >= 0, got {rate}")
    owners = sorted(plan.all_devices)

    def within(rate: float) -> float:
        return -math.expm1(-rate * horizon_s)

    singles = [
        Loss(
            devices=(device,),
            probability=within(
                loss_per_s.get(device, 0.0)
                + math.fsum(rates.get(name, 0.0) for name in sorted(groups.names_of(device)))
            ),
        )
        for device in owners
    ]
    causes = [(frozenset((str(device),)), within(loss_per_s.get(device, 0.0))) for device in owners]
    for name, members in sorted(groups.members.items()):
        taken = frozenset(d for d in members if here is None or d in here)
        if not taken.isdisjoint(owners):
            causes.append((taken, within(rates.get(name, 0.0))))
    ways = {taken: [chance] for taken, chance in causes if len(taken) > 1}
    for (one, chance), (other, chance_too) in itertools.combinations(causes, 2):
        if not (one <= other or other <= one):
            ways.setdefault(one | other, []).append(chance * chance_too)
    several = [
        Loss(
            devices=tuple(DeviceId(device) for device in sorted(taken)),
            probability=_any_of(chances),
        )
        for taken, chances in ways.items()
    ]

    def likelier(loss: Loss) -> tuple[float, tuple[DeviceId, ...]]:
        return (-loss.probability, loss.devices)

    possible = [loss for loss in several if loss.probability > 0]
    return (*sorted(singles, key=likelier), *heapq.nsmallest(doubles, possible, key=likelier))


def _any_of(chances: Sequence[float]) -> float:
    """The chance that at least one comes; precise where all are small."""
    if max(chances) >= 1:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-chance) for chance in chances))
