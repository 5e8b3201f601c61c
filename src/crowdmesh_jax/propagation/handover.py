"""Planned hand-over: when a predicted departure is near enough to start moving, and to whom.

A hand-over takes `lead_s`: the bytes that the target lacks over a rate that the link falls below
only with probability `1 - quantile`, the set-up, and one step, since owners change at a step
boundary. It starts when the departure, as early as its noise allows at the same quantile, is at
most `margin` leads away, and is worth it when what is saved outweighs what it costs:

    (P(owner leaves) - P(target leaves)) x loss_s > stall_s + slowdown x transfer seconds

within the horizon of one lead after the predicted departure. It does not flap: one that stands is
given up only when the departure has moved `keep` times as far away as what starts one, and its
target is left only for one whose rank (presence x speed) is `switch` times as high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ..core import DeviceId
from ..errors import InvalidValueError

_NORMAL = NormalDist()
LEAST_RATE_SHARE = 0.1
"""However noisy a link is, so much of its predicted rate is counted on."""


SOON_S = 60.0
"""Who will leave within so long is given no stage and no copies any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A prediction: when a device goes."""

    device: DeviceId
    leaves_s: float
    """Seconds from now; infinite: not in sight."""
    sd_s: float = 0.0
    """Standard deviation of that."""

    def __post_init__(self) -> None:
        if not self.leaves_s >= 0 or not 0 <= self.sd_s < math.inf:
            raise InvalidValueError(
                f"departure of {self.device!r}: leaves_s >= 0 and 0 <= sd_s < inf wanted, got"
                f" {self.leaves_s} and {self.sd_s}"
            )

    def within(self, horizon_s: float) -> float:
        """Probability that it has left by then."""
        if math.isinf(self.leaves_s):
            return 0.0
        if self.sd_s == 0:
            return 1.0 if self.leaves_s <= horizon_s else 0.0
        return _NORMAL.cdf((horizon_s - self.leaves_s) / self.sd_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverRule:
    """Numbers of the rule above."""

    quantile: float = 0.9
    """Chance with which the noise of a departure and of a rate is allowed for."""
    margin: float = 1.5
    """It starts when the departure is at most so many leads away."""
    keep: float = 1.5
    """One that stands ends when the departure is so many times as far as it may be to start."""
    switch: float = 1.5
    """Another target must be worth so many times as much as the standing one."""
    setup_s: float = 1.0
    """Fence, programs that are compiled already, the first frames."""
    stall_s: float = 1.0
    """What the pipeline stands still for at the change."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.quantile < 1:
            raise InvalidValueError(f"hand-over: quantile must lie in 0.5..1, got {self.quantile}")
        for name in ("margin", "keep", "switch"):
            if not 1 <= getattr(self, name) < math.inf:
                raise InvalidValueError(
                    f"hand-over: {name} must be >= 1, got {getattr(self, name)}"
                )
        for name in ("setup_s", "stall_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidValueError(
                    f"hand-over: {name} must be >= 0, got {getattr(self, name)}"
                )

    @property
    def z(self) -> float:
        """Standard deviations of the quantile."""
        return _NORMAL.inv_cdf(self.quantile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who could take the layers."""

    device: DeviceId
    lacks_bytes: int
    """What it does not hold at the current version."""
    rate_bytes_per_s: float
    """Predicted, from the owner."""
    rate_sd_share: float = 0.0
    """Standard deviation of the rate, as a part of it."""
    stay: Departure | None = None
    """None: it is not expected to go."""
    rank: float = 0.0
    """Presence x speed: among those that are worth it, the highest is chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Layers that are on their way from one who will leave."""

    owner: DeviceId
    target: DeviceId
    first_layer: int
    last_layer: int
    lead_s: float
    leaves_s: float
    why: str = ""


def lead_s(target: Target, rule: HandoverRule, *, step_s: float) -> float:
    """Seconds that a hand-over to it takes, at the rule's quantile; infinite without a link."""
    if not target.rate_bytes_per_s > 0:
        return math.inf
    share = max(LEAST_RATE_SHARE, 1 - rule.z * target.rate_sd_share)
    return rule.setup_s + target.lacks_bytes / (target.rate_bytes_per_s * share) + step_s


def decide_handover(
    departure: Departure,
    first_layer: int,
    last_layer: int,
    targets: Sequence[Target],
    *,
    rule: HandoverRule,
    step_s: float,
    loss_s: float,
    slowdown: float = 0.0,
    standing: Handover | None = None,
) -> Handover | None:
    """Starts, keeps, changes or gives up the hand-over of one owner's layers.

    Args:
        departure: Of the owner.
        targets: In any order; the owner itself is passed over.
        loss_s: What an unplanned loss of the owner costs: detection, recovery, redone work.
        slowdown: Part of a second of training that each second of transfer costs.
        standing: What was decided last time, if anything.
    """
    if math.isinf(departure.leaves_s):
        return None
    good: list[tuple[Target, float]] = []
    soonest_s = max(0.0, departure.leaves_s - rule.z * departure.sd_s)
    latest_s = departure.leaves_s + rule.z * departure.sd_s
    for target in sorted(targets, key=lambda t: t.device):
        if target.device == departure.device:
            continue
        takes_s = lead_s(target, rule, step_s=step_s)
        stands = standing is not None and standing.target == target.device
        near = rule.margin * (rule.keep if stands else 1.0)
        if soonest_s > near * takes_s or takes_s > max(latest_s, departure.leaves_s + step_s):
            continue  # not near enough yet, or it cannot be done in time any more
        if worth_s(departure, target, takes_s, rule, loss_s=loss_s, slowdown=slowdown) <= 0:
            continue
        good.append((target, takes_s))
    if not good:
        return None
    best, takes_s = max(good, key=lambda pair: (pair[0].rank, -pair[1]))
    if standing is not None and best.device != standing.target:
        for target, its_s in good:
            if target.device == standing.target and best.rank < rule.switch * target.rank:
                best, takes_s = target, its_s
    return Handover(
        owner=departure.device,
        target=best.device,
        first_layer=first_layer,
        last_layer=last_layer,
        lead_s=takes_s,
        leaves_s=departure.leaves_s,
        why=(
            f"leaves in {departure.leaves_s:.0f} s (at the earliest {soonest_s:.0f} s);"
            f" moving takes {takes_s:.1f} s"
        ),
    )


def worth_s(
    departure: Departure,
    target: Target,
    takes_s: float,
    rule: HandoverRule,
    *,
    loss_s: float,
    slowdown: float,
) -> float:
    """Seconds saved on average, minus what the hand-over costs."""
    horizon_s = departure.leaves_s + takes_s
    goes = departure.within(horizon_s)
    target_goes = 0.0 if target.stay is None else target.stay.within(horizon_s)
    moving_s = max(0.0, takes_s - rule.setup_s)
    return (goes - target_goes) * loss_s - rule.stall_s - slowdown * moving_s
