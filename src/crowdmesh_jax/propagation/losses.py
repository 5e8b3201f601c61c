"""Losses worth a standby plan: each stage owner by itself, and the likeliest pairs."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..core import DeviceId, PipelinePlan
from ..errors import InvalidValueError
from .groups import HazardGroups


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Devices that are gone together, and how likely that is within the horizon."""

    devices: tuple[DeviceId, ...]
    """Sorted."""
    probability: float


def likely_losses(
    plan: PipelinePlan,
    loss_per_s: Mapping[str, float],
    *,
    horizon_s: float,
    groups: HazardGroups | None = None,
    group_loss_per_s: Mapping[str, float] | None = None,
    doubles: int = 0,
) -> tuple[Loss, ...]:
    """Every single loss of a stage owner, likeliest first, then the `doubles` likeliest pairs.

    A pair is lost within the horizon H if an event that takes both comes, or if each is lost by
    itself: c + (1 - c)(1 - exp(-a H))(1 - exp(-b H)) with c = 1 - exp(-r H), r the sum of the rates
    of the groups that both are in, and a, b the rates of what takes one and not the other.

    Args:
        loss_per_s: Device -> its own rate of being lost; not named: 0.
        groups: For what takes several.
        group_loss_per_s: Group -> rate of the event that takes all of it; not named: 0.
        doubles: How many pairs; those that cannot happen are left out.
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

    def by_groups(names: frozenset[str]) -> float:
        return math.fsum(rates.get(name, 0.0) for name in sorted(names))

    def within(rate: float) -> float:
        return -math.expm1(-rate * horizon_s)

    singles = [
        Loss(
            devices=(device,),
            probability=within(loss_per_s.get(device, 0.0) + by_groups(groups.names_of(device))),
        )
        for device in owners
    ]
    pairs = []
    for one, other in itertools.combinations(owners, 2):
        both = groups.together(one, other)
        alone = [
            within(loss_per_s.get(d, 0.0) + by_groups(groups.names_of(d) - both))
            for d in (one, other)
        ]
        common = within(by_groups(both))
        probability = common + (1 - common) * alone[0] * alone[1]
        if probability > 0:
            pairs.append(Loss(devices=(one, other), probability=probability))

    def likelier(loss: Loss) -> tuple[float, tuple[DeviceId, ...]]:
        return (-loss.probability, loss.devices)

    return (*sorted(singles, key=likelier), *heapq.nsmallest(doubles, pairs, key=likelier))
