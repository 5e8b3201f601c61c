"""Where the pipeline should go next: chains of devices by their step and by how long they last.

A chain c of devices, one a stage, each in range of the next, is left when one of its links ends, or
before. Changing costs K seconds, whatever the number of stages that move, as they move at one stop.
Let t be a chain's step time over that of the fastest devices, S(T) the chance that all its links
last T seconds, A the time until a move away from it could be through, and X what a loss costs more
than a planned stop. Kept for T seconds, a chain costs, per second of work,

    g = t (1 + (K + X (1 - S(A) + m (S(A) - S(T)))) / int_0^T S)

where m is the share of later ends that no move comes before. T is the one with the lowest g. The
standing chain's K is spent; it is left when the best g with K is lower than its own without by more
than `gain`. One rule for departures, better places and faster devices.

**Links.** Seen at offset p with relative velocity w, after H seconds

    distance = |p + w tau (1 - exp(-H / tau))|
    sigma^2  = 2 (sd tau (1 - exp(-H / tau)))^2 + u^2 tau^2 (2x - 3 + 4 exp(-x) - exp(-2x))

with x = H / tau: velocities that are forgotten at rate 1 / tau (Ornstein-Uhlenbeck). sd is the
error of each velocity, u^2 the mean square of a speed, half the device's own and half everybody's.
tau is learned: the mean time for which devices have gone straight, and `turn_s`. P(in range) =
Phi((range - distance) / sigma), to a power above 1 where velocities are forgotten, since a link may
end and be there again. That a chain's links last is the product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import InvalidValueError
from .policy import PolicyView

LOOK_AT = 256
"""Chains that are worked out at once."""
MOST_ORDERS = 20_000
"""Where there are more ways to give stages to candidates, at most two stages move at one stop."""
SPARE_CANDIDATES = 5
"""Candidates at least, beside as many as there are stages."""
_TIMES_S = np.array([0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0])
Rows = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainRule:
    """Numbers of the rule above: choices, tuned on the tuning seeds of all frozen scenarios
    together, the same everywhere."""

    persistence_s: float = 60.0
    """tau, where nobody knows for how long devices went straight."""
    turn_s: float = 10.0
    """tau where all have just turned: a turn need not change all of a velocity."""
    returns: float = 0.6
    """How much less likely a link is never to end than to be there at the end, where all turn."""
    missed: float = 0.2
    """Share of links' ends that no move comes before, of those that are not near yet."""
    candidates: int = 11
    """Devices that are looked at, the owners included: those with the best speed and links."""
    gain: float = 0.03
    """g must be lower by so much, or nothing moves."""
    look_s: float = 3.0
    """Time from one decision to the next, and until the next step boundary."""
    stop_s: float = 2.0
    """A planned stop, without bytes."""
    stage_s: float = 0.2
    """What each stage that moves costs beside: its logs and copies have to be made anew."""
    fetch_share: float = 0.5
    """Of a whole copy, what who takes over after a loss lacks, on average."""
    far_share: float = 0.1
    """Rate to who is out of range, of that in range."""
    recovery_stage_s: float = 10.0
    """The same after a loss: each stage that stays keeps the state of the newest version alive."""

    def __post_init__(self) -> None:
        for name in ("persistence_s", "turn_s", "look_s", "far_share"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidValueError(f"chain rule: {name} must be finite and > 0")
        for name in ("returns", "missed", "gain", "stop_s", "stage_s", "fetch_share",
                     "recovery_stage_s"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidValueError(f"chain rule: {name} must be finite and >= 0")
        if self.candidates < 1:
            raise InvalidValueError(f"chain rule: candidates must be >= 1, got {self.candidates}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What is expected of all devices of a view, rows in the order of their ids."""

    ids: tuple[str, ...]
    near: np.ndarray
    """`[n, n]`: in range now, both heard."""
    chance: np.ndarray
    """`[times, n, n]`: of being in range then and, by what is known, until then."""
    rate_per_s: np.ndarray
    """`[n, n]`: at which links end: 1 / life."""
    stage_s: np.ndarray
    """`[stages, n]`: forward and backward of a microbatch."""

    @classmethod
    def of(
        cls, view: PolicyView, rule: ChainRule, only: Sequence[str] | None = None
    ) -> Ahead | None:
        """From past sightings; None where nobody was seen or range means nothing.

        Args:
            only: Devices of interest; None: all of the view.
        """
        seen = view.sightings
        if seen is None or view.range_m is None:
            return None
        wanted = view.ids if only is None else [name for name in only if name in view.row_of]
        order = [view.row_of[name] for name in sorted(wanted)]
        known = seen.known[order]
        if view.heard is not None:
            known = known & np.asarray(view.heard.present)[order]
        known &= np.isfinite(seen.velocity_sd_m_per_s[order])
        at_m = seen.positions_at(seen.now_s)[order]
        velocity = seen.velocities_m_per_s[order]
        sd = np.where(known, seen.velocity_sd_m_per_s[order], 0.0)
        apart_m, relative = at_m[None] - at_m[:, None], velocity[None] - velocity[:, None]
        near = (apart_m**2).sum(axis=-1) <= view.range_m**2
        near &= known[:, None] & known[None]
        near &= _can_talk(view, order)
        tau_s = _persistence_s(view, rule)
        lasts_s = tau_s * -np.expm1(-_TIMES_S / tau_s)
        way_m = apart_m + relative * lasts_s[:, None, None, None]
        distance_m = np.sqrt((way_m**2).sum(axis=-1))
        # Between what the device itself does now and what everybody does: who stands may start.
        wander2 = (_speed2(view) + np.maximum((velocity**2).sum(axis=1) - 2 * sd**2, 0.0)) / 2
        parts = _TIMES_S / tau_s
        spread_s2 = tau_s**2 * np.maximum(
            2 * parts - 3 + 4 * np.exp(-parts) - np.exp(-2 * parts), 0.0
        )
        variance = (sd[:, None] ** 2 + sd[None] ** 2) * (lasts_s**2)[:, None, None]
        variance = variance + (wander2[:, None] + wander2[None]) / 2 * spread_s2[:, None, None]
        sigma_m = np.sqrt(np.maximum(variance, 1e-6))
        score = np.clip(1.702 * (view.range_m - distance_m) / sigma_m, -60, 60)
        # The logistic function is the normal one within 0.01.
        # Who turns now and then may be out of range between two moments in range.
        turned = 1 - lasts_s / np.maximum(_TIMES_S, 1e-9)
        turned[0] = 0.0
        inside = (1 / (1 + np.exp(-score))) ** (1 + rule.returns * turned)[:, None, None]
        chance = np.minimum.accumulate(inside, axis=0) * near
        steps_s = np.diff(_TIMES_S)[:, None, None]
        life_s = ((chance[1:] + chance[:-1]) / 2 * steps_s).sum(axis=0)
        stage_s = _stage_seconds(view, [view.ids[i] for i in order])
        return cls(
            ids=tuple(view.ids[i] for i in order),
            near=near,
            chance=chance,
            rate_per_s=1 / np.maximum(life_s, 1e-3),
            stage_s=stage_s,
        )

    def chance_at(self, seconds: float) -> np.ndarray:
        """`[n, n]`: of staying in range so long."""
        after = int(np.searchsorted(_TIMES_S, min(seconds, _TIMES_S[-1])))
        if after == 0:
            return self.chance[0]
        part = (min(seconds, _TIMES_S[-1]) - _TIMES_S[after - 1]) / (
            _TIMES_S[after] - _TIMES_S[after - 1]
        )
        return self.chance[after - 1] * (1 - part) + self.chance[after] * part

    def lasts(self, chains: np.ndarray) -> np.ndarray:
        """`[chains, times]`: chance that all links of each are there until then."""
        count = len(self.ids)
        by_pair = self.chance.reshape(len(_TIMES_S), count * count).T
        stays = np.ones((len(chains), len(_TIMES_S)))
        for stage in range(chains.shape[1] - 1):
            stays *= by_pair[chains[:, stage] * count + chains[:, stage + 1]]
        return stays

    def lasts_until(self, chain: Rows, seconds: float) -> float:
        """Chance that all links of a chain are there until then."""
        return float(np.interp(seconds, _TIMES_S, self.lasts(np.array([chain]))[0]))

    def breaks_s(self, chain: Rows) -> float:
        """When one of its links is as likely to have ended as not; the last moment that is looked
        at if that comes later."""
        stays = self.lasts(np.array([chain]))[0]
        return float(np.interp(-0.5, -stays, _TIMES_S))


def _can_talk(view: PolicyView, order: Sequence[int]) -> np.ndarray:
    """`[n, n]`: of whom the crowd knows a link, both ways."""
    found = ~np.eye(len(order), dtype=bool)
    if view.crowd.default_link is not None:
        return found
    names = [view.ids[row] for row in order]
    for a, b in itertools.combinations(range(len(names)), 2):
        talk = view.crowd.link(names[a], names[b]) and view.crowd.link(names[b], names[a])
        found[a, b] = found[b, a] = talk is not None
    return found


def _persistence_s(view: PolicyView, rule: ChainRule) -> float:
    """How long a velocity lasts: the mean time since each device turned last. Of times between
    turns that have no memory that is the mean too."""
    seen = view.sightings
    assert seen is not None
    if seen.straight_s is None or not seen.known.any():
        return rule.persistence_s
    straight_s = np.minimum(seen.straight_s[seen.known], _TIMES_S[-1])  # who never turned: inf
    straight_s = straight_s[~np.isnan(straight_s)]
    if not len(straight_s):
        return rule.persistence_s
    return math.fsum(straight_s) / len(straight_s) + rule.turn_s


def _speed2(view: PolicyView) -> float:
    """Mean square of all speeds, without the noise."""
    seen = view.sightings
    assert seen is not None
    known = seen.known & np.isfinite(seen.velocity_sd_m_per_s)
    if not known.any():
        return 0.0
    squares = (seen.velocities_m_per_s[known] ** 2).sum(axis=1)
    squares = np.maximum(squares - 2 * seen.velocity_sd_m_per_s[known] ** 2, 0.0)
    return math.fsum(squares) / len(squares)


def _stage_seconds(view: PolicyView, ids: Sequence[str]) -> np.ndarray:
    """Forward and backward of a microbatch, `[stages, devices]`."""
    profile, stages = view.profile, view.plan.stages
    flops = np.array(
        [
            sum(profile.layers[la].forward_flops + profile.layers[la].backward_flops
                for la in stage.layers)
            for stage in stages
        ]
    )  # fmt: skip
    rates = np.array([view.crowd.device(name).flops_per_s for name in ids])
    found = flops[:, None] / rates[None]
    for column, name in enumerate(ids):
        if name in profile.seconds:
            rows = profile.layer_seconds(view.crowd, name)
            for index, stage in enumerate(stages):
                found[index, column] = sum(
                    rows[la].forward_s + rows[la].backward_s for la in stage.layers
                )
    return found


@lru_cache(maxsize=8)
def _orders(candidates: int, stages: int) -> np.ndarray:
    """All ways to give stages to different candidates, `[ways, stages]`."""
    return np.array(list(itertools.permutations(range(candidates), stages)), np.int64)


def _ways(picked: np.ndarray, owners: Rows) -> np.ndarray:
    """Chains to look at, `[ways, stages]`: all of the candidates', or, of many, the standing one
    with one or two stages elsewhere and with two owners' places changed."""
    stages = len(owners)
    if math.perm(len(picked), stages) <= MOST_ORDERS:
        return picked[_orders(len(picked), stages)]
    if min(owners) < 0:
        return np.empty((0, stages), np.int64)
    idle = [int(row) for row in picked if row not in owners]
    found = []
    for a, b in itertools.combinations(range(stages), 2):
        for one, two in ((owners[b], owners[a]), *itertools.permutations([*idle, -1], 2)):
            way = list(owners)
            way[a], way[b] = (one if one >= 0 else owners[a]), (two if two >= 0 else owners[b])
            found.append(way)
    return np.unique(np.array(found, np.int64), axis=0)


def rate_of(
    lasts: np.ndarray, cost_s: np.ndarray | float, lead_s: np.ndarray, loss_s: float, missed: float
) -> np.ndarray:
    """Seconds that chains cost beside each second on them, if they are kept as long as pays.

    A link that ends before a move could be through is a loss; of those that end later the missed
    share is. `min over T of (cost + loss ((1 - S(lead)) + missed (S(lead) - S(T)))) / int_0^T S`.

    Args:
        lasts: `[chains, times]`: S.
        cost_s: What changing to each costs.
        lead_s: `[chains]`: before that nobody can leave it as planned.
    """
    after = np.searchsorted(_TIMES_S, lead_s).clip(1, len(_TIMES_S) - 1)
    part = (lead_s - _TIMES_S[after - 1]) / (_TIMES_S[after] - _TIMES_S[after - 1])
    each = np.arange(len(lasts))
    led = lasts[each, after - 1] * (1 - part) + lasts[each, after] * part
    kept_s = np.cumsum((lasts[:, 1:] + lasts[:, :-1]) / 2 * np.diff(_TIMES_S), axis=1)
    lost = (1 - led)[:, None] + missed * np.maximum(0.0, led[:, None] - lasts[:, 1:])
    first = np.asarray(cost_s)
    rate = (first[..., None] + loss_s * lost) / np.maximum(kept_s, 1e-3)
    rate[_TIMES_S[None, 1:] < lead_s[:, None]] = np.inf
    return rate.min(axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainChoice:
    """The best chain to change to."""

    chain: Rows
    g: float
    """Per second of work at the fastest chain's pace."""
    ahead_s: float
    """What has to go ahead takes so long."""


def best_chain(
    ahead: Ahead,
    rule: ChainRule,
    *,
    microbatches: int,
    owners: Rows,
    needs_s: np.ndarray,
    ahead_s: np.ndarray,
    slowdown: float,
    loss_s: float = 0.0,
) -> ChainChoice | None:
    """The chain with the lowest g other than the standing one; None where there is none in range.

    Args:
        owners: Rows of those who have the stages now.
        needs_s: `[stages, n]`: seconds of transfer until that device has that stage's state, while
            all wait; infinite where it may not have it.
        ahead_s: The same of what goes ahead, while training goes on.
        slowdown: See `Costs`.
        loss_s: What a loss costs more than a planned stop.
    """
    stages = len(owners)
    fast_s = _fastest_s(ahead, microbatches)
    rates = np.where(ahead.near, ahead.rate_per_s, np.inf)
    two = np.sort(rates, axis=1)[:, :2]
    links = np.where(np.isfinite(two), two, 1.0).sum(axis=1)
    least_s = max(float(ahead.stage_s.min(axis=1).mean()), 1e-12)
    merit = ahead.stage_s.mean(axis=0) / least_s + rule.stop_s * links
    merit[~ahead.near.any(axis=1)] = np.inf
    held = [row for row in owners if row >= 0]
    merit[held] = -np.inf
    most = max(rule.candidates, stages + SPARE_CANDIDATES)
    picked = np.argsort(merit, kind="stable")[:most]
    picked = picked[merit[picked] < np.inf]
    if len(picked) < stages:
        return None
    picked.sort()
    ways = _ways(picked, owners)
    links_ok = ahead.near[ways[:, 0], ways[:, 1]] if stages > 1 else np.ones(len(ways), bool)
    for stage in range(1, stages - 1):
        links_ok = links_ok & ahead.near[ways[:, stage], ways[:, stage + 1]]
    ways = ways[links_ok]
    if not len(ways):
        return None
    times = np.stack([ahead.stage_s[s, ways[:, s]] for s in range(stages)])
    step = (times.sum(axis=0) + (microbatches - 1) * times.max(axis=0)) / fast_s
    moved = np.stack([ways[:, s] != owners[s] for s in range(stages)])
    waits = np.stack([needs_s[s, ways[:, s]] for s in range(stages)])
    waits = np.where(moved, waits, 0.0).max(axis=0)
    early = np.stack([ahead_s[s, ways[:, s]] for s in range(stages)])
    early = np.where(moved, early, 0.0).max(axis=0)
    cost = rule.stop_s + waits + slowdown * early + rule.stage_s * moved.sum(axis=0)
    may = moved.any(axis=0) & np.isfinite(cost)
    if not may.any():
        return None
    ways, step, cost, early, waits = ways[may], step[may], cost[may], early[may], waits[may]
    if min(owners) >= 0:
        now = ahead.lasts(np.array([owners]))[0]
        until = np.interp(rule.look_s + early, _TIMES_S, now)
        cost = cost + loss_s * (np.interp(rule.look_s, _TIMES_S, now) - until)
    begun_s = rule.look_s + early + rule.stop_s + waits
    # No g is below its step: what is slower than the best g so far need not be looked at.
    order = np.argsort(step, kind="stable")
    best, best_g = -1, math.inf
    for first in range(0, len(order), LOOK_AT):
        some = order[first : first + LOOK_AT]
        if step[some[0]] > best_g:
            break
        g = step[some] * (
            1 + rate_of(ahead.lasts(ways[some]), cost[some], begun_s[some], loss_s, rule.missed)
        )
        lowest = int(np.argmin(g))
        if g[lowest] < best_g:
            best, best_g = int(some[lowest]), float(g[lowest])
    if best < 0:
        return None
    return ChainChoice(
        chain=tuple(int(v) for v in ways[best]), g=best_g, ahead_s=float(early[best])
    )


def step_share(ahead: Ahead, chain: Rows, microbatches: int) -> float:
    """t of a chain."""
    times = [float(ahead.stage_s[s, row]) for s, row in enumerate(chain)]
    return (sum(times) + (microbatches - 1) * max(times)) / _fastest_s(ahead, microbatches)


def _fastest_s(ahead: Ahead, microbatches: int) -> float:
    """A step with the fastest device for each stage, whether these are different or not."""
    fastest = ahead.stage_s.min(axis=1)
    return max(float(fastest.sum() + (microbatches - 1) * fastest.max()), 1e-12)


def rows_of(ahead: Ahead, names: tuple[str, ...]) -> Rows:
    """Rows of devices; -1 for one that is not in the view."""
    place: Mapping[str, int] = {name: row for row, name in enumerate(ahead.ids)}
    return tuple(place.get(name, -1) for name in names)
