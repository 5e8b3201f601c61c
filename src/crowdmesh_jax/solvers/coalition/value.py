"""What a coalition is worth: seconds per round, from a partition plan or from sums.

A coalition is an integer whose bits are device indices in the order of ids. It knows costs and
bounds, no search.

    tau_K = steps_K step_s(K) (1 + stall_s Lambda_K) + sync_s

`steps_K` are the rows of K over the rows of a step, `Lambda_K` is the rate at which devices with a
stage leave. `delta_K` compares label histograms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...core import Link, PipelinePlan
from ...errors import InfeasibleError, InvalidValueError
from ..problem import PartitionProblem
from .problem import CoalitionProblem
from .quick import NEVER, QuickTables

LACK_UNIT = 2.0**-20
"""Shares of missing memory are multiples of it, so that sums of them are exact."""


def members_of(mask: int) -> tuple[int, ...]:
    """Device indices of a coalition, ascending."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Rated:
    """One coalition's step, as its value says."""

    step_s: float
    missing: float
    """0 where it holds the model, else the missing share of memory in (0, 1]."""
    hazard_per_s: float
    """At which devices with a stage leave."""
    stages: tuple[tuple[str, int, int], ...] = ()
    """(device, first layer, last layer)."""


class Facts:
    """The crowd as arrays, devices in the order of ids."""

    def __init__(self, problem: CoalitionProblem) -> None:
        crowd, profile = problem.crowd, problem.profile
        devices = sorted(crowd.devices, key=lambda device: device.id)
        self.problem = problem
        self.devices = tuple(devices)
        self.ids = tuple(device.id for device in devices)
        self.index: Mapping[str, int] = {device: i for i, device in enumerate(self.ids)}
        count = len(devices)
        classes = max((len(device.label_counts) for device in devices), default=0)
        self.labels = np.zeros((count, max(classes, 1)))
        for row, device in enumerate(devices):
            self.labels[row, : len(device.label_counts)] = device.label_counts
        step_rows = profile.microbatches * profile.microbatch_size
        if problem.amounts == "rows":
            self.rows = self.labels.sum(axis=1)
        else:
            self.rows = np.full(count, float(step_rows))
        self.step_rows = float(step_rows)
        self.total_rows = float(self.rows.sum())
        whole = self.labels.sum(axis=0)
        self.whole = whole / whole.sum() if whole.sum() > 0 else whole
        self.hazard = np.array([device.leave_hazard_per_s for device in devices])
        analytic = not profile.seconds
        if analytic:
            per_flop = np.array([1.0 / device.flops_per_s for device in devices])
            flops = np.array([la.forward_flops + la.backward_flops for la in profile.layers])
            work = flops.sum() * per_flop
            typical = float(np.exp(np.log(per_flop).mean()))
            reference = flops * typical
            self.speed = typical / per_flop
        else:
            rows = np.array(
                [
                    [row.forward_s + row.backward_s for row in profile.layer_seconds(crowd, d)]
                    for d in self.ids
                ]
            )
            reference = rows.mean(axis=0)
            with np.errstate(divide="ignore", invalid="ignore"):
                # The best that a device is at any layer: no device does more than this of the mean.
                ratios = np.where(reference > 0, reference / rows, 0.0)
            # A layer that takes a device no time proves nothing; a huge speed keeps bounds valid.
            self.speed = np.minimum(ratios.max(axis=1), 1e9)
            work = rows.sum(axis=1)
        self.work_s = work
        """Seconds of a whole microbatch on each device."""
        self.reference_s = float(reference.sum())
        self.heaviest_s = float(reference.max())
        if not (0 < self.reference_s < NEVER and np.isfinite(self.speed).all()):
            raise InvalidValueError(
                "the profile's layers take no time at all; profile the job before forming"
                " coalitions"
            )
        self.able = np.array([device.memory_bytes for device in devices]) >= (
            problem.compile_peak_bytes
        )
        """Whether a device can hold any layer; sharpened by values that know more."""

    def imbalance(self, labels: np.ndarray) -> np.ndarray:
        """delta of each row of label sums, [..., classes] -> [...]; 0 for rows without data."""
        return imbalance(labels, self.whole, self.problem.imbalance)


def imbalance(labels: np.ndarray, whole: np.ndarray, kind: str) -> np.ndarray:
    """Distance of label histograms from the crowd's.

    Args:
        labels: Rows per class, [..., classes].
        whole: The crowd's histogram, sums to 1.
        kind: "js" (square root of the divergence in bits) or "emd" (sum of differences).

    Source: Jensen-Shannon, Lin 1991; earth mover's distance over labels, Zhao et al. 2018 (both
    from general knowledge). Kullback-Leibler is left out: it is infinite on a missing class.
    """
    total = labels.sum(axis=-1, keepdims=True)
    share = labels / np.where(total > 0, total, 1.0)
    if kind == "emd":
        found = np.abs(share - whole).sum(axis=-1)
    else:
        middle = 0.5 * (share + whole)
        safe = np.where(middle > 0, middle, 1.0)

        def part(p: np.ndarray) -> np.ndarray:
            return (p * np.log2(np.where(p > 0, p, 1.0) / safe)).sum(axis=-1)

        found = np.sqrt(np.maximum(0.5 * part(share) + 0.5 * part(whole), 0.0))
    return np.where(total[..., 0] > 0, found, 0.0)


class Value(Protocol):
    """Rates coalitions. Pure: the same coalition, the same rating."""

    def rate(self, masks: Sequence[int]) -> list[Rated]: ...

    def step_bound_s(self, mask: int) -> float:
        """Seconds that no step of the coalition can go below."""
        ...


def lack_of(missing_bytes: float, needed_bytes: float) -> float:
    """The missing share of memory, at least one unit and at most 1."""
    share = missing_bytes / needed_bytes if needed_bytes > 0 else 0.0
    return min(1.0, max(LACK_UNIT, math.ceil(share / LACK_UNIT) * LACK_UNIT))


class PartitionValue:
    """A coalition's step is that of the plan which a partition solver finds for its members.

    A lower bound comes first, from sums alone: with `k` stages on the fastest `k` members no
    period beats all work spread perfectly, the heaviest layer on the fastest member, or (1F1B)
    a microbatch's compute and cuts over `k`; the first microbatch pays all compute at the fastest
    member's speed and `k - 1` of the cheapest round trips.
    """

    def __init__(self, facts: Facts) -> None:
        problem = self._problem = facts.problem
        self._facts = facts
        self._quick = QuickTables(
            problem.profile,
            problem.crowd,
            facts.ids,
            schedule=problem.schedule,
            recompute=problem.recompute,
            compile_peak_bytes=problem.compile_peak_bytes,
        )
        facts.able = self._quick.usable[:-1].copy()
        self._is_quick = problem.partition_solver == "quick"
        if self._is_quick and problem.partition_options:
            from .quick import QuickSolver

            try:
                made = QuickSolver(**problem.partition_options)  # pyright: ignore[reportArgumentType]
            except TypeError as exc:
                raise InvalidValueError(f"'quick' does not take these options: {exc}") from exc
            self._quick = QuickTables(
                problem.profile,
                problem.crowd,
                facts.ids,
                schedule=problem.schedule,
                recompute=problem.recompute,
                compile_peak_bytes=problem.compile_peak_bytes,
                max_cuts=made.max_cuts,
                max_devices=made.max_devices,
            )
        if not self._is_quick:
            from ..registry import make_solver

            self._solver = make_solver(problem.partition_solver, **problem.partition_options)
        trips = self._quick.round_trips()
        self._nearest = np.minimum(trips.min(axis=1), NEVER)[:-1].tolist()
        self._speed = np.where(facts.able, facts.speed, 0.0).tolist()
        self._limit = self._quick.limits.tolist()
        self._needed = self._quick.least_bytes

    def rate(self, masks: Sequence[int]) -> list[Rated]:
        """Plans for the coalitions, one call for all of them."""
        facts = self._facts
        sets = [members_of(mask) for mask in masks]
        found = []
        if not self._is_quick:
            return [self._by_solver(members) for members in sets]
        for members, plan in zip(sets, self._quick.solve(sets), strict=True):
            if plan is None:
                found.append(self._unheld(members))
                continue
            hazard = math.fsum(facts.hazard[device] for device, _, _ in plan.chain)
            stages = tuple((facts.ids[d], first, end - 1) for d, first, end in plan.chain)
            found.append(Rated(plan.step_s, 0.0, hazard, stages))
        return found

    def plan(self, stages: Sequence[tuple[str, int, int]]) -> PipelinePlan | None:
        """The quick solver's plan behind a rating, whole; None for other solvers."""
        if not self._is_quick or not stages:
            return None
        index = self._facts.index
        return self._quick.plan(tuple((index[d], first, last + 1) for d, first, last in stages))

    def _by_solver(self, members: Sequence[int]) -> Rated:
        problem, facts = self._problem, self._facts
        question = PartitionProblem(
            profile=problem.profile,
            crowd=problem.crowd,
            devices=[facts.ids[device] for device in members],
            schedule=problem.schedule,
            recompute=problem.recompute,
            compile_peak_bytes=problem.compile_peak_bytes,
        )
        try:
            result = self._solver.solve(question)
        except InfeasibleError:
            return self._unheld(members)
        step_s = result.predicted.step_s
        if not (math.isfinite(step_s) and step_s > 0):
            raise InvalidValueError(
                f"partition solver {problem.partition_solver!r} predicts {step_s} s per step"
            )
        used = result.plan.stages
        hazard = math.fsum(facts.hazard[facts.index[stage.device]] for stage in used)
        stages = tuple((stage.device, stage.first_layer, stage.last_layer) for stage in used)
        return Rated(step_s, 0.0, hazard, stages)

    def _unheld(self, members: Sequence[int]) -> Rated:
        """Finite: as if memory and links were no matter, one device alone doing the work."""
        room = sum(self._limit[device] for device in members if self._facts.able[device])
        alone_s = min(self._facts.work_s[device] for device in members)
        missing = lack_of(self._needed - room, self._needed)
        return Rated(self._problem.profile.microbatches * float(alone_s), missing, 0.0)

    def step_bound_s(self, mask: int) -> float:
        """A bound on the closed form of a plan's step, or on its timeline for other solvers."""
        facts, speed = self._facts, self._speed
        members = members_of(mask)
        speeds = sorted((speed[device] for device in members), reverse=True)
        fastest = speeds[0]
        if fastest <= 0:
            return 0.0
        total, heaviest = facts.reference_s, facts.heaviest_s / fastest
        microbatches = self._problem.profile.microbatches
        if not self._is_quick:
            # A timeline may hide part of R_0 behind the period; this much holds for any.
            return max(microbatches * total / sum(speeds), total / fastest, microbatches * heaviest)
        first_s = total / fastest
        trip_s = min(self._nearest[device] for device in members)
        strict = self._problem.schedule == "1f1b"
        best, pooled = math.inf, 0.0
        for count, own in enumerate(speeds, start=1):
            pooled += own
            way_s = first_s + (count - 1) * trip_s
            steady = max(total / pooled, heaviest)
            if strict:
                steady = max(steady, way_s / count)
            best = min(best, way_s + (microbatches - 1) * steady)
            if way_s > best:
                break
        return best * (1 - 1e-9)


@dataclass(frozen=True, slots=True)
class Sums:
    """What the closed form knows of coalitions: sums over members, arrays of any shape."""

    count: np.ndarray
    rows: np.ndarray
    speed: np.ndarray
    square: np.ndarray
    """Sum of squared speeds."""
    memory: np.ndarray
    hazard: np.ndarray
    trip: np.ndarray
    """Speed-weighted sum of the seconds of a cut."""


class ClosedForm:
    """A coalition's step from sums over its members: O(1) to update, coarse.

    With V the sum of speeds, k = V^2 / sum of squares (how many devices share the work in effect:
    a slow one hardly counts), W the work of a microbatch and c the members' mean seconds for a
    typical cut there and back, the speed-weighted mean:

        step = (M - 1 + k) W / V + (k - 1) (1 + (M - 1) / k) c

    a pipeline of k balanced stages under the window formula. Memory is pooled. It looks at each
    device's own access (or the default link), not at pairs, and knows no layers: it ranks
    coalitions roughly, for crowds where nothing finer can be afforded.
    """

    def __init__(self, facts: Facts) -> None:
        problem = self._problem = facts.problem
        self._facts = facts
        profile = problem.profile
        sizes = sorted(sum(profile.cut_bytes(cut)) for cut in range(1, len(profile.layers)))
        # Plans cut where little crosses; a quarter of all cuts are at least as good as this one.
        size = float(sizes[len(sizes) // 4]) if sizes else 0.0
        default = problem.crowd.default_link
        self.speed = np.where(facts.able, 1.0 / facts.work_s, 0.0)
        trip = np.zeros(len(facts.devices))
        links: dict[str, list[Link]] = {}
        for link in problem.crowd.links:
            links.setdefault(link.source, []).append(link)
        for index, device in enumerate(facts.devices):
            way = device.access
            if way is not None:
                per_byte = 0.5 / way.uplink_bytes_per_s + 0.5 / way.downlink_bytes_per_s
                trip[index] = 4 * way.latency_s + size * per_byte
            elif default is not None:
                trip[index] = 2 * default.latency_s + size / default.bandwidth_bytes_per_s
            else:
                out = links.get(device.id, ())
                best = min((link.transfer_s(size) for link in out), default=0.0)
                trip[index] = 2 * best
        self.trip = trip
        self.memory = np.where(
            facts.able, np.array([float(d.memory_bytes) for d in facts.devices]), 0.0
        )
        # Parameters, gradients, optimizer state and one microbatch's residuals, wherever they are.
        self.needed = float(
            sum(2 * la.parameter_bytes + la.optimizer_bytes + 2 * la.state_bytes + la.residual_bytes
                for la in profile.layers)
        )  # fmt: skip

    def sums(self, members: np.ndarray) -> Sums:
        """Of single devices, as arrays of the shape of `members` (indices)."""
        speed = self.speed[members]
        return Sums(
            np.ones(members.shape),
            self._facts.rows[members],
            speed,
            speed**2,
            self.memory[members],
            self._facts.hazard[members],
            speed * self.trip[members],
        )

    def step_s(self, sums: Sums) -> np.ndarray:
        """Seconds of a step; of a device alone as slow as 1e30 where nobody can do anything."""
        microbatches = self._problem.profile.microbatches
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = sums.speed
            stages = np.maximum(whole**2 / sums.square, 1.0)
            cut = sums.trip / whole
            step = (microbatches - 1 + stages) / whole + (stages - 1) * (
                1 + (microbatches - 1) / stages
            ) * cut
        return np.where(whole > 0, step, 0.0)

    def missing(self, sums: Sums) -> np.ndarray:
        """0 where pooled memory holds the model, else the missing share in units of 2^-20."""
        if self.needed <= 0:
            return np.where(sums.speed > 0, 0.0, 1.0)
        share = np.clip(1.0 - sums.memory / self.needed, 0.0, 1.0)
        found = np.ceil(share / LACK_UNIT) * LACK_UNIT
        return np.where(sums.speed > 0, found, 1.0)

    def rate(self, masks: Sequence[int]) -> list[Rated]:
        """From sums over the members, in the order of ids."""
        found = []
        for mask in masks:
            members = np.array(members_of(mask), int)
            alone = self.sums(members)
            total = Sums(
                *(np.array(math.fsum(getattr(alone, name).tolist())) for name in Sums.__slots__)
            )
            found.append(
                Rated(float(self.step_s(total)), float(self.missing(total)), float(total.hazard))
            )
        return found

    def step_bound_s(self, mask: int) -> float:
        """The value itself costs as little."""
        return self.rate([mask])[0].step_s * (1 - 1e-12)


def make_value(facts: Facts) -> Value:
    """The value that the problem asks for."""
    return ClosedForm(facts) if facts.problem.value == "closed_form" else PartitionValue(facts)
