"""The partition solver "eager": cut, device order and microbatches in flight, chosen together.

Problem: least step time of `evaluate` under schedule "eager", where each stage may keep as many
microbatches in flight as its memory holds. A fixed rule for the depths (2 (S - s) - 1, as DAPPLE
and Asteroid have it) is too shallow where a round trip takes longer than a cycle, and needlessly
deep, in memory and in start-up, where links are fast.

Depths for a period T follow from the window condition (`core.cost`): from the last stage up,

    d_s = max over stages u > s of  d_u - 1 + ceil(window s..u / T)

is the shallowest that allows T; memory caps it. The least T that any depth allows is the slowest
stage or link. A step also has a beginning: a stage that runs out of forwards before the first
gradient is back waits, so depths that last until then,

    d_s = 1 + ceil((first gradient is back at s) / (slowest forward up to s)),

are tried, too, alone and up to each stage; so are the fixed rule and all that memory holds. The
exact timeline decides among them, and in the end on a few in flight more or less.

Search: with depths at will, links are hidden, and R_0 + (M - 1) max(slowest stage, busiest link)
stands for the step. The chains that are best by it and by the closed form of the fixed rule,
exactly (`dp`, over as many devices as the time allows), are the starts, with local optima of
both, min-max cuts of a few device orders and each device alone. From the best of them, the best
of all small moves (shift a cut; swap, replace, insert or drop a device) is taken until none
helps; the exact timeline judges each, with depths as above, unless max(R_0, M x slowest) already
is above the best step. Under recompute "auto", stages that memory holds back are tried
recomputed. Work: moves are O(S^2 + S D), a timeline O(S M). It proves nothing.

Source: this project. Latency-aware depth was measured against fixed ones in an event simulation
of ours: 7-33 % where a transfer nears the cycle or latency exceeds it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ...core import (
    CutTimes,
    PipelinePlan,
    Schedule,
    StageTimes,
    evaluate_step_s,
    make_schedule,
    predict,
)
from ...errors import InvalidValueError
from ..check import check_plan
from ..problem import PartitionProblem, PartitionResult
from .arrays import Costs
from .bounds import MOST_DEVICES
from .dp import Labels
from .few import chains_of_few
from .finish import left_out
from .infeasible import infeasible
from .search import cut_order, good_chains, neighbours, orders, single_chains
from .tables import SLACK, Chain, Tables

_STRETCHES = (1.0, 1.1)
"""Periods to try depths for, as multiples of the least one."""
_NEAR = 1.02
"""A move that is worse than that with one rule for depths is not tried with others."""
_STARTS = 12
_TABLE_WORK = 3e7
"""Of the dynamic program's tables, in steps."""
_CHAINS = 64
_SLACK = 0.1
"""Chains of the dynamic program that are looked at: so many, and so much above its best."""
_MOVES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerSolver:
    """Cut, order and depth together, as a `PartitionSolver`; schedule "eager" only."""

    time_limit_s: float = 10.0
    """Wall seconds, after which no further move is tried."""

    def __post_init__(self) -> None:
        if not self.time_limit_s > 0:
            raise InvalidValueError(f"time_limit_s must be > 0, got {self.time_limit_s}")

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InvalidValueError: The problem's schedule is not "eager".
            InfeasibleError: No chain fits; says why.
        """
        if problem.schedule != "eager":
            raise InvalidValueError(
                f"solver 'eager' chooses the depths of schedule 'eager', asked for"
                f" {problem.schedule!r}; set schedule='eager', or use solver 'ilp'"
            )
        return solve_by_depths(problem, time.monotonic() + self.time_limit_s)


def solve_by_depths(
    problem: PartitionProblem, until_s: float, end_s: float = math.inf
) -> PartitionResult:
    """The search and its result.

    Args:
        until_s: `time.monotonic()` after which no further move is tried.
        end_s: And after which nobody asks what a device that is left out would have done.

    Raises:
        InfeasibleError: No chain fits; says why.
    """
    started_s = time.monotonic()
    search = DepthSearch(problem, until_s)
    best = search.run()
    if best is None:
        raise infeasible(problem, lambda relaxed: bool(good_chains(relaxed)))
    chain, depths = best
    plan = search.plan(chain, depths)
    check_plan(problem, plan)
    return PartitionResult(
        plan=plan,
        predicted=predict(
            problem.profile, problem.crowd, plan, compile_peak_bytes=problem.compile_peak_bytes
        ),
        problem=problem,
        optimal=False,
        gap=None,
        solver="eager",
        solve_s=time.monotonic() - started_s,
        left_out=left_out(search.tables, chain, end_s),
    )


class ShallowTables(Tables):
    """Tables for depths that are chosen later.

    A segment fits if one microbatch in flight does, and no window bounds the period.
    """

    has_windows = False

    def in_flight(self, depth: int) -> int:
        return 1


@dataclass(slots=True)
class DepthSearch:
    """The search, with what it has seen."""

    problem: PartitionProblem
    until_s: float
    tables: ShallowTables = field(init=False)
    _seen: dict[tuple[tuple[int, int], ...], tuple[float, tuple[int, ...], Chain]] = field(
        default_factory=dict, init=False
    )
    """By (device, end) of each stage: step time, depths, and the chain with what it recomputes."""

    def __post_init__(self) -> None:
        self.tables = ShallowTables(self.problem)

    def run(self, starts: Sequence[PipelinePlan] = ()) -> tuple[Chain, tuple[int, ...]] | None:
        """The best chain found, with its depths; None where not even one fits.

        Args:
            starts: Plans of others to start from, too.
        """
        chains = self._starts(starts)
        if not chains:
            return None
        ranked = sorted(chains, key=lambda chain: (self.step_s(chain), self.tables.rank(chain)))
        best = ranked[0]
        for chain in ranked[:_STARTS]:
            found = self._climb(chain)
            if self._is_better(found, best):
                best = found
        _, depths, chain = self._depths(best)
        return chain, self._polished(chain, depths)

    def plan(self, chain: Chain, depths: Sequence[int]) -> PipelinePlan:
        """The chain as a plan with these depths."""
        plan = self.tables.plan(chain)
        stages = [
            replace(stage, warmup=depth) for stage, depth in zip(plan.stages, depths, strict=True)
        ]
        return replace(plan, stages=tuple(stages))

    def step_s(self, chain: Chain) -> float:
        """Step time with the best depths tried."""
        return self._depths(chain)[0]

    def _starts(self, plans: Sequence[PipelinePlan]) -> list[Chain]:
        tables, found = self.tables, {}
        costs = Costs(tables)
        made = [cut_order(costs, order) for order in orders(tables)]
        good = [chain for _, chain in good_chains(tables)] + single_chains(tables)
        fixed = Tables(self.problem, like=tables)
        rule = [chain for _, chain in good_chains(fixed)] + single_chains(fixed)
        made += good + rule
        half_s = (time.monotonic() + self.until_s) / 2
        for which, known in ((tables, good), (fixed, rule)):
            if known:
                made += chains_of_few(
                    which, known, half_s, work=_TABLE_WORK, slack=_SLACK, most=_CHAINS
                )
            elif which is tables and len(tables.devices) <= MOST_DEVICES:
                labels = Labels(which, half_s, [], slack=_SLACK, most=_CHAINS)
                labels.run()
                made += labels.chains
        for plan in plans:
            known = [tables.devices.index(stage.device) for stage in plan.stages]
            ends = [stage.last_layer + 1 for stage in plan.stages]
            made.append(tables.chain(list(zip(known, ends, strict=True))))
        for chain in made:
            # Made again: the tables of another schedule know other depths.
            own = chain and tables.chain([(segment.device, segment.end) for segment in chain])
            if own:
                found[tables.rank(own)] = own
        return list(found.values())

    def _is_better(self, chain: Chain, than: Chain) -> bool:
        own_s, other_s = self.step_s(chain), self.step_s(than)
        if abs(own_s - other_s) <= SLACK * max(own_s, other_s):
            return self.tables.rank(chain) < self.tables.rank(than)
        return own_s < other_s

    def _climb(self, chain: Chain) -> Chain:
        best = chain
        for _ in range(_MOVES):
            start = best
            for candidate in self._moves(start):
                if time.monotonic() > self.until_s:
                    return best
                best_s = self.step_s(best)
                if self._bound_s(candidate) >= best_s or self._quick_s(candidate) > best_s * _NEAR:
                    continue
                if self._is_better(candidate, best):
                    best = candidate
            if best is start:
                break
        return best

    def _moves(self, chain: Chain) -> Iterator[Chain]:
        return neighbours(self.tables, chain)

    def _bound_s(self, chain: Chain) -> float:
        """No depths make this chain's step shorter (updates apart, which only add)."""
        tables = self.tables
        first_s = slowest_s = 0.0
        for segment in chain:
            first_s += segment.compute_s
            slowest_s = max(slowest_s, segment.compute_s)
        for left, right in pairwise(chain):
            cut = tables.cut(left.device, right.device, right.first)
            if cut is None:
                return math.inf
            first_s += cut.round_trip_s
            slowest_s = max(slowest_s, cut.busiest_s)
        return max(first_s, tables.microbatches * slowest_s)

    def _quick_s(self, chain: Chain) -> float:
        """Step time with the one rule for depths that is mostly the best."""
        least_s = math.inf
        for variant in self._recomputed(chain):
            stages, cuts = self.tables.times(variant)
            depths = filling_depths(stages, cuts, self._caps(variant))
            least_s = min(least_s, step_s(stages, cuts, depths, self.tables.microbatches))
        return least_s

    def _depths(self, chain: Chain) -> tuple[float, tuple[int, ...], Chain]:
        """Step time with the best depths tried, these depths, and what is recomputed for them."""
        key = tuple((segment.device, segment.end) for segment in chain)
        if key not in self._seen:
            found: list[tuple[float, tuple[int, ...], Chain]] = []
            for variant in self._recomputed(chain):
                stages, cuts = self.tables.times(variant)
                for depths in depths_to_try(stages, cuts, self._caps(variant)):
                    took_s = step_s(stages, cuts, depths, self.tables.microbatches)
                    found.append((took_s, depths, variant))
            self._seen[key] = min(found, key=lambda each: each[:2])
        return self._seen[key]

    def _recomputed(self, chain: Chain) -> list[Chain]:
        """The chain, and where it may choose, with stages recomputed that memory holds back."""
        found = [chain]
        if self.problem.recompute == "auto":
            held = [
                stage
                for stage, cap in enumerate(self._caps(chain))
                if cap < self.tables.microbatches and not chain[stage].recompute
            ]
            for chosen in [[stage] for stage in held] + [
                held[: n + 1] for n in range(1, len(held))
            ]:
                found.append(
                    tuple(
                        self.tables.recomputed(segment) if stage in chosen else segment
                        for stage, segment in enumerate(chain)
                    )
                )
        return found

    def _caps(self, chain: Chain) -> list[int]:
        most = self.tables.microbatches
        return [min(most, self.tables.most_in_flight(segment)) for segment in chain]

    def _polished(self, chain: Chain, depths: tuple[int, ...]) -> tuple[int, ...]:
        """One microbatch more or less in flight, stage by stage, while that helps."""
        stages, cuts = self.tables.times(chain)
        caps, microbatches = self._caps(chain), self.tables.microbatches
        best = (step_s(stages, cuts, depths, microbatches), depths)
        improved = True
        while improved:
            improved = False
            for stage in range(len(chain)):
                for change in (-2, -1, 1, 2):
                    changed = list(best[1])
                    changed[stage] += change
                    legal = all(1 <= d <= cap for d, cap in zip(changed, caps, strict=True))
                    if not legal or any(right > left for left, right in pairwise(changed)):
                        continue
                    tried = (step_s(stages, cuts, changed, microbatches), tuple(changed))
                    if tried[0] < best[0] * (1 - SLACK):
                        best, improved = tried, True
        return best[1]


def depths_to_try(
    stages: Sequence[StageTimes], cuts: Sequence[CutTimes], caps: Sequence[int]
) -> set[tuple[int, ...]]:
    """Depths worth a timeline, see the module."""
    count = len(stages)
    steady = [depths_for(stages, cuts, caps, stretch) for stretch in _STRETCHES]
    filling = _filling(stages, cuts)
    found = set(steady)
    for base in steady[:1]:
        for until in range(1, count + 1):
            both = [max(a, b) for a, b in zip(base, filling, strict=True)]
            found.add(_within([*both[:until], *base[until:]], caps))
    found.add(_within([2 * (count - stage) - 1 for stage in range(count)], caps))
    found.add(_within(caps, caps))
    return found


def filling_depths(
    stages: Sequence[StageTimes], cuts: Sequence[CutTimes], caps: Sequence[int]
) -> tuple[int, ...]:
    """Deep enough for the least period and for the time until the first gradient is back."""
    steady = depths_for(stages, cuts, caps, 1.0)
    return _within([max(a, b) for a, b in zip(steady, _filling(stages, cuts), strict=True)], caps)


def _filling(stages: Sequence[StageTimes], cuts: Sequence[CutTimes]) -> list[int]:
    """Forwards that last until the first gradient is back."""
    depths, back_s = [1] * len(stages), stages[-1].compute_s
    for stage in range(len(stages) - 2, -1, -1):
        back_s += cuts[stage].round_trip_s
        forward_s = max(times.forward_s for times in stages[: stage + 1])
        forward_s = max(forward_s, *(cut.forward_transfer_s for cut in cuts[:stage]), 0.0)
        depths[stage] = 1 + (math.ceil(back_s / forward_s) if forward_s > 0 else 0)
        back_s += stages[stage].compute_s
    return depths


def _within(depths: Sequence[int], caps: Sequence[int]) -> tuple[int, ...]:
    """The depths within caps, and never rising downstream."""
    found: list[int] = []
    for depth, cap in zip(depths, caps, strict=True):
        found.append(min(depth, cap, *found[-1:]))
    return tuple(found)


def depths_for(
    stages: Sequence[StageTimes], cuts: Sequence[CutTimes], caps: Sequence[int], stretch: float
) -> tuple[int, ...]:
    """The shallowest depths that allow a period `stretch` times the least one, within caps.

    Args:
        caps: Most microbatches in flight per stage, by memory and by their number.
    """
    period_s = stretch * max(
        max(times.compute_s for times in stages), *(cut.busiest_s for cut in cuts), 0.0
    )
    depths = [1] * len(stages)
    for first in range(len(stages) - 2, -1, -1):
        window_s, deepest = stages[first].compute_s, depths[first + 1]
        for last in range(first + 1, len(stages)):
            window_s += cuts[last - 1].round_trip_s + stages[last].compute_s
            periods = math.ceil(window_s / period_s * (1 - 1e-12)) if period_s > 0 else 1
            deepest = max(deepest, depths[last] - 1 + periods)
        depths[first] = deepest
    return _within(depths, caps)  # a stage that memory holds back holds back all after it


def step_s(
    stages: Sequence[StageTimes],
    cuts: Sequence[CutTimes],
    depths: Sequence[int],
    microbatches: int,
) -> float:
    """Step time by the exact timeline."""
    return evaluate_step_s(_schedule(tuple(depths), microbatches), stages, cuts)


@functools.lru_cache(maxsize=4096)
def _schedule(depths: tuple[int, ...], microbatches: int) -> Schedule:
    return make_schedule("eager", len(depths), microbatches, depths)
