"""Hazards of leaving: from movement (when does it walk out?), and learned from sessions.

A hazard is a rate per second: a device that stays has left after t with probability
1 - exp(-hazard t). Rates of causes that do not know of each other add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import DataError, InvalidValueError
from . import checks
from .checks import Floats
from .heartbeats import Sessions
from .lifetime import relative_lifetime_s
from .movement import Area


def time_to_leave_disc_s(
    positions_m: ArrayLike,
    velocities_m_per_s: ArrayLike,
    *,
    centre_m: ArrayLike,
    radius_m: float,
) -> Floats:
    """Seconds until devices leave a disc if they go on straight.

    0 where they are outside; infinite where they stand still inside.
    """
    places = checks.array("positions_m", positions_m, last=2)
    centre = checks.array("centre_m", centre_m, last=2)
    return relative_lifetime_s(places - centre, velocities_m_per_s, radius_m)


def time_to_leave_area_s(
    positions_m: ArrayLike, velocities_m_per_s: ArrayLike, area: Area
) -> Floats:
    """Seconds until devices leave a rectangle if they go on straight; 0 outside."""
    places = checks.array("positions_m", positions_m, last=2)
    velocities = checks.array("velocities_m_per_s", velocities_m_per_s, last=2)
    try:
        places, velocities = np.broadcast_arrays(places, velocities)
    except ValueError as exc:
        raise InvalidValueError(f"positions and velocities do not fit: {exc}") from exc
    size_m = area.size_m
    way_m = np.where(velocities > 0, size_m - places, places)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        each_s = np.where(velocities != 0, way_m / np.abs(velocities), math.inf)
    inside = ((places >= 0) & (places <= size_m)).all(axis=-1)
    return np.where(inside, each_s.min(axis=-1), 0.0)


def movement_hazard_per_s(time_to_leave_s: ArrayLike, *, least_s: float = 1.0) -> Floats:
    """The rate whose mean time is the time until leaving: 1 / T, and 0 for never.

    Args:
        least_s: Nobody leaves sooner than this on average: who is on the border has a finite rate.
    """
    times_s = np.asarray(time_to_leave_s, np.float64)
    if np.isnan(times_s).any() or (times_s < 0).any():
        raise InvalidValueError("time_to_leave_s must be >= 0, and no NaN")
    return 1 / np.maximum(times_s, checks.number("least_s", least_s, above=True))


def crossing_hazard_per_s(speed_m_per_s: ArrayLike, radius_m: float) -> Floats:
    """Rate of leaving a disc for who crosses it straight, when nothing but the speed is known.

    2 v / (pi R): the mean chord of a disc is pi R / 2. Also a link's, with the relative speed and
    the range.
    """
    speed = checks.at_least_zero("speed_m_per_s", speed_m_per_s)
    return 2 * speed / (math.pi * checks.number("radius_m", radius_m, above=True))


def leave_probability(hazard_per_s: ArrayLike, horizon_s: float) -> Floats:
    """Probability of having left after `horizon_s`."""
    rate = checks.at_least_zero("hazard_per_s", hazard_per_s)
    return -np.expm1(-rate * checks.number("horizon_s", horizon_s))


def combined_hazard_per_s(*hazards_per_s: ArrayLike) -> Floats:
    """Of independent causes, whichever comes first: the sum.

    A rate learned from sessions counts departures of every cause, movement too. To join it with
    what the movement says now, make that the prior: `GammaPrior(mean_s=1 / movement hazard)`.
    """
    if not hazards_per_s:
        raise InvalidValueError("combined_hazard_per_s needs at least one hazard")
    total = np.zeros(())
    for place, hazard in enumerate(hazards_per_s):
        try:
            total = total + checks.at_least_zero(f"hazard {place}", hazard)
        except ValueError as exc:
            if isinstance(exc, InvalidValueError):
                raise
            raise InvalidValueError(f"hazards do not fit each other: {exc}") from exc
    return np.asarray(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class GammaPrior:
    """What is believed of a device's stays before it was watched."""

    mean_s: float | Floats
    """Mean stay, one for all or `[devices]`."""
    weight: float = 1.0
    """How many ended sessions that belief is worth."""

    def __post_init__(self) -> None:
        means = checks.array("prior: mean_s", self.mean_s)
        if not (means > 0).all():
            raise InvalidValueError(f"prior: mean_s must be > 0, got {means.min()}")
        checks.number("prior: weight", self.weight, above=True)


def exponential_hazard_per_s(sessions: Sessions, prior: GammaPrior) -> Floats:
    """Each device's rate of leaving, learned from its sessions, `[devices]`.

    The posterior mean: sessions exponential, rate ~ Gamma(weight, weight x mean). Sessions that go
    on count with their time and without an end: leaving them out would count short stays only.
    """
    mean_s = _per_device("the prior's mean_s", prior.mean_s, sessions)
    return (prior.weight + sessions.ends) / (prior.weight * mean_s + sessions.exposure())


def weibull_shape(sessions: Sessions, *, least: float = 0.05, most: float = 20.0) -> float:
    """Maximum-likelihood shape of all sessions together, those going on counted as such.

    Below 1: who has stayed long will stay longer; 1: exponential; above 1: stays come to an end.
    The likelihood's derivative in the shape falls throughout, so its zero is found by bisection.

    Raises:
        DataError: Fewer than two sessions ended: nothing to learn a shape from.
    """
    # A stay of 0 has no logarithm; it was shorter than anything measured.
    positive = sessions.duration_s[sessions.duration_s > 0]
    if int(sessions.ended.sum()) < 2 or not len(positive):
        raise DataError(
            f"{int(sessions.ended.sum())} ended sessions; a Weibull shape needs at least 2"
        )
    durations = np.maximum(sessions.duration_s, positive.min() / 2)
    logs = np.log(durations)
    highest = logs.max()
    mean_log = logs[sessions.ended].mean()

    def slope(shape: float) -> float:
        powers = np.exp(shape * (logs - highest))
        return 1 / shape + mean_log - float(powers @ logs / powers.sum())

    low, high = least, most
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def weibull_hazard_per_s(
    sessions: Sessions, age_s: ArrayLike, prior: GammaPrior, *, shape: float
) -> Floats:
    """Each device's rate of leaving now, given how long it has stayed, `[devices]`.

    Survival exp(-rate t^shape), rate ~ Gamma, so that t^shape takes the place of t in the
    exponential case; the hazard at age t is rate x shape x t^(shape - 1).

    Args:
        age_s: `[devices]`: how long each has been there.
        shape: Common to all, as from `weibull_shape`.
    """
    shape = checks.number("shape", shape, above=True)
    age = checks.at_least_zero("age_s", age_s)
    age = _per_device("age_s", age, sessions)
    mean_s = _per_device("the prior's mean_s", prior.mean_s, sessions)
    believed = (math.gamma(1 + 1 / shape) / mean_s) ** shape
    rate = (prior.weight + sessions.ends) / (prior.weight / believed + sessions.exposure(shape))
    # Below shape 1 the hazard at age 0 is infinite: nobody is younger than a thousandth of a stay.
    return rate * shape * np.maximum(age, 1e-3 * mean_s) ** (shape - 1)


def _per_device(name: str, values: ArrayLike, sessions: Sessions) -> Floats:
    made = np.asarray(values, np.float64)
    if made.shape not in ((), (sessions.devices,)):
        raise InvalidValueError(
            f"{name} must be one number or [{sessions.devices}], got {made.shape}"
        )
    return np.broadcast_to(made, (sessions.devices,))
