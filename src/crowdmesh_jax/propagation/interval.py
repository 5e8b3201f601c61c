"""How often copies are refreshed: Young's and Daly's rule, with departures in the failure rate.

Between two waves lie T seconds of training. A wave costs c seconds (snapshot, and what its bytes
slow the pipeline down). Losses that nobody saw coming arrive at rate h; each loses the work since
the last wave, T/2 on average, of which the share `replay_share` costs time again (1: everyone rolls
back; less where only the lost stage is replayed, without bubbles), and a fixed recovery time R that
does not depend on T. Overhead per second of training, to first order in h (T + c):

    w(T) = c / T + h (replay_share T / 2 + R)

w'(T) = -c / T^2 + h replay_share / 2 vanishes at T = sqrt(2 c / (h replay_share)), and w is convex.
With replay_share 1 this is Young (CACM 17(9), 1974), first order of Daly (FGCS 22(3), 2006). The
hazard is that of the *whole* pipeline, sum over stage owners, since a wave covers all layers:
crashes, and departures that no hand-over came before. A departure that is handed over loses nothing
and must not count: counting it would shorten the interval for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidValueError

MOST_STEPS = 10_000
"""Longest interval by default, also where nothing is expected to fail."""

Bound = Literal["optimum", "least", "most", "bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An interval, and what set it."""

    steps: int
    seconds: float
    overhead: float
    """Expected share of time lost to waves and to redone work, w(T) without h R."""
    bound_by: Bound
    """"optimum": the minimum of w; "least", "most": the caller's limits; "bytes": sooner, a wave
    would begin before the last one is through, or exceed the byte budget."""


def loss_rate_per_s(
    crash_per_s: Iterable[float], leave_per_s: Iterable[float] = (), *, missed_share: float = 1.0
) -> float:
    """Losses per second that lose work: all crashes, and departures that were not handed over.

    Args:
        crash_per_s: Of each stage owner.
        leave_per_s: Of each stage owner.
        missed_share: Of departures, the part that comes unforeseen; 1 without hand-over.
    """
    if not 0 <= missed_share <= 1:
        raise InvalidValueError(f"missed_share must lie in 0..1, got {missed_share}")
    crashes, leaves = list(crash_per_s), list(leave_per_s)
    for name, rates in (("crash_per_s", crashes), ("leave_per_s", leaves)):
        for rate in rates:
            _at_least(name, rate, 0.0)
    return math.fsum(crashes) + missed_share * math.fsum(leaves)


def interval_s(cost_s: float, loss_per_s: float, *, replay_share: float = 1.0) -> float:
    """sqrt(2 cost / loss rate): seconds of training between waves; infinite if nothing fails."""
    _at_least("cost_s", cost_s, 0.0)
    _at_least("loss_per_s", loss_per_s, 0.0)
    _at_least("replay_share", replay_share, 0.0)
    rate = loss_per_s * replay_share
    if rate == 0:
        return math.inf
    # Apart, so that a tiny rate does not overflow the quotient.
    return math.sqrt(2 * cost_s) / math.sqrt(rate)


def overhead(
    seconds: float, cost_s: float, loss_per_s: float, *, replay_share: float = 1.0
) -> float:
    """w(T) without h R: the share of time lost to waves and to redone work, to first order."""
    if not seconds > 0:
        raise InvalidValueError(f"an interval must be > 0 s, got {seconds}")
    return cost_s / seconds + loss_per_s * replay_share * seconds / 2


def exact_overhead(
    seconds: float, cost_s: float, loss_per_s: float, *, recovery_s: float = 0.0
) -> float:
    """The same for exponential losses that roll everyone back, without the approximation.

    Daly's complete model: a segment of T + c seconds is begun again after each loss, so it takes
    (1/h + R)(exp(h (T + c)) - 1) on average; minus T, over T.
    """
    if not seconds > 0:
        raise InvalidValueError(f"an interval must be > 0 s, got {seconds}")
    if loss_per_s == 0:
        return cost_s / seconds
    grown = math.expm1(loss_per_s * (seconds + cost_s))
    return (1 / loss_per_s + recovery_s) * grown / seconds - 1


def interval_steps(
    cost_s: float,
    loss_per_s: float,
    step_s: float,
    *,
    replay_share: float = 1.0,
    wave_s: float = 0.0,
    least: int = 1,
    most: int = MOST_STEPS,
) -> Interval:
    """The best whole number of steps between waves.

    w is convex, so the best integer is one of the two around the optimum; they are compared.

    Args:
        cost_s: Seconds of training that one wave costs.
        loss_per_s: See `loss_rate_per_s`.
        wave_s: Seconds until a wave is through on the bulk lane, or until the byte budget allows
            the next: a lower limit, and it beats `most`.
        least: Lower limit in steps.
        most: Upper limit in steps.

    Raises:
        InvalidValueError: A negative or non-finite figure, or limits that cross.
    """
    _at_least("cost_s", cost_s, 0.0)
    _at_least("wave_s", wave_s, 0.0)
    _at_least("step_s", step_s, 0.0)
    if not step_s > 0:
        raise InvalidValueError(f"step_s must be > 0, got {step_s}")
    if not 1 <= least <= most:
        raise InvalidValueError(f"least and most must satisfy 1 <= {least} <= {most}")
    best_s = interval_s(cost_s, loss_per_s, replay_share=replay_share)
    ratio = best_s / step_s
    bound: Bound = "optimum"
    if ratio >= most:
        steps, bound = most, "most" if ratio > most else "optimum"
    else:
        below = max(1, math.floor(ratio))
        steps = min(
            (below, below + 1),
            key=lambda n: (
                overhead(n * step_s, cost_s, loss_per_s, replay_share=replay_share),
                n,
            ),
        )
        if steps > most:
            steps, bound = most, "most"
    if steps < least:
        steps, bound = least, "least"
    through = math.ceil(wave_s / step_s)
    if steps < through:
        steps, bound = through, "bytes"
    seconds = steps * step_s
    return Interval(
        steps=steps,
        seconds=seconds,
        overhead=overhead(seconds, cost_s, loss_per_s, replay_share=replay_share),
        bound_by=bound,
    )


def _at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise InvalidValueError(f"{name} must be finite and >= {least:g}, got {value}")
