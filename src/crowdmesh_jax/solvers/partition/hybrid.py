"""The partition solver "hybrid": as `auto`, and a stage may be shared by several devices.

Problem: least step time of `evaluate` over pipelines whose stages are groups of devices. A group
splits each microbatch's rows and sums gradients once a step in a ring (`core.cost`). Rows go to the
devices in proportion to their speed on the stage's layers, by largest remainders; a device that
would get none is not in the group. Layers whose state mixes rows (BatchNorm) cannot be shared.

Search: from the best plan without sharing, from the fastest devices alone, and from the best of the
groupings of the fastest few in the order of their speed, the best of all moves is taken until none
helps: a free device joins a stage, or takes a stage of its own before or after it; a device leaves
its group or moves to a neighbour's; two neighbours become one group; a cut shifts by up to three
layers. What changes groups is tried with the cuts as they are and with new ones, the
min-max cuts of the groups' joint speeds and of the links between them.
Under "eager", depths are chosen for each candidate as solver `eager` does, within the memory of
every device of the group. Work: O(S (S + D)) moves a turn, each O(L S + S M). It proves nothing.

Such plans are predicted, not run, by this release. Source: this project; sharing a stage by rows:
Asteroid (arXiv 2408.08015), DAPPLE (PPoPP 2021).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

import numpy as np

from ...core import (
    PipelinePlan,
    Share,
    Stage,
    cut_times,
    evaluate_step_s,
    predict,
    schedule_for,
    stage_memory,
    stage_times,
)
from ...errors import InfeasibleError, InvalidPlanError, InvalidValueError
from ..check import check_plan, plan_faults
from ..problem import PartitionProblem, PartitionResult
from .auto import solve_without_sharing
from .eager import depths_to_try, step_s
from .tables import SLACK

_TURNS = 30
_GROUPED, _FASTEST, _MOST_GROUPS = 3, 8, 4
"""Groupings to start from: so many, of so many devices, into so many stages."""
_START_SHARE = 0.4
"""Of the time, for the plan without sharing."""

Groups = tuple[tuple[tuple[str, ...], int], ...]
"""Per stage, its devices and the layer after its last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridSolver:
    """Cut, order, depth and groups together, as a `PartitionSolver`."""

    time_limit_s: float = 10.0
    """Wall seconds, after which no further move is tried."""

    def __post_init__(self) -> None:
        if not self.time_limit_s > 0:
            raise InvalidValueError(f"time_limit_s must be > 0, got {self.time_limit_s}")

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InvalidValueError: The problem does not allow shared stages.
            InfeasibleError: No plan fits, shared or not; says why.
        """
        if not problem.share:
            raise InvalidValueError(
                "solver 'hybrid' shares stages: set share=True, or use solver 'auto'"
            )
        started_s = time.monotonic()
        search = _Groups(problem, started_s + self.time_limit_s)
        base: PartitionResult | None = None
        failed: InfeasibleError | None = None
        try:
            base = solve_without_sharing(problem, _START_SHARE * self.time_limit_s)
        except InfeasibleError as exc:
            failed = exc
        plan = search.run([base.plan] if base is not None else [])
        if plan is None:
            assert failed is not None
            raise failed
        check_plan(problem, plan)
        used = plan.all_devices
        return PartitionResult(
            plan=plan,
            predicted=predict(
                problem.profile, problem.crowd, plan, compile_peak_bytes=problem.compile_peak_bytes
            ),
            problem=problem,
            optimal=False,
            gap=None,
            solver="hybrid",
            solve_s=time.monotonic() - started_s,
            left_out={
                device.id: "no move with it helped" if device.id in problem.allowed_devices
                else "not allowed"
                for device in problem.crowd.devices if device.id not in used
            },
        )  # fmt: skip


@dataclass(slots=True)
class _Groups:
    """The search over groups and cuts."""

    problem: PartitionProblem
    until_s: float
    _seconds: dict[str, np.ndarray] = field(init=False)
    """Per device, forward and backward of the layers before each layer."""
    _mixing: np.ndarray = field(init=False)
    """How many of the layers before each layer have state over all rows."""
    _own: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict, init=False)
    _seen: dict[Groups, tuple[float, PipelinePlan | None]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._seconds = {}
        for device in self.problem.allowed_devices:
            total, sums = 0.0, [0.0]
            for row in self.problem.profile.layer_seconds(self.problem.crowd, device):
                total += row.forward_s + row.backward_s
                sums.append(total)
            self._seconds[device] = np.array(sums)
        mixing = [bool(layer.state_bytes) for layer in self.problem.profile.layers]
        self._mixing = np.concatenate([[0], np.cumsum(mixing)])

    def run(self, plans: Sequence[PipelinePlan]) -> PipelinePlan | None:
        """The best plan found; None where no start fits."""
        layers = self.problem.num_layers
        starts: list[Groups] = [
            tuple((stage.devices, stage.last_layer + 1) for stage in plan.stages) for plan in plans
        ]
        best_s, best = math.inf, None
        for plan in plans:
            if not plan_faults(self.problem, plan):
                at_s = _step_s(self.problem, plan)
                if at_s < best_s:
                    best_s, best = at_s, plan
        starts += [(((device,), layers),) for device in sorted(self._seconds)]
        ranked = sorted(starts, key=lambda groups: (self._best(groups)[0], groups))
        # The plan without sharing first; then the single devices, the fastest ones.
        for start in [*starts[: len(plans)], *self._grouped()[:_GROUPED], *ranked[:2]]:
            found_s, found = self._best(self._climb(start))
            if found is not None and found_s < best_s * (1 - SLACK):
                best_s, best = found_s, found
        return best

    def _grouped(self) -> list[Groups]:
        """The fastest devices in groups, neighbours in speed together; the best first."""
        order = sorted(self._seconds, key=lambda device: (float(self._seconds[device][-1]), device))
        found = []
        for size in range(2, min(len(order), _FASTEST) + 1):
            for stages in range(1, min(_MOST_GROUPS, size) + 1):
                for ends in combinations(range(1, size), stages - 1):
                    edges = pairwise((0, *ends, size))
                    groups = self._cut([tuple(order[low:high]) for low, high in edges])
                    if groups is not None and time.monotonic() < self.until_s:
                        found.append((self._best(groups)[0], groups))
        return [groups for step, groups in sorted(found) if step < math.inf]

    def _climb(self, groups: Groups) -> Groups:
        best = groups
        for _ in range(_TURNS):
            start = best
            for candidate in self._tried(start):
                if time.monotonic() > self.until_s:
                    return best
                if self._best(candidate)[0] < self._best(best)[0] * (1 - SLACK):
                    best = candidate
            if best is start:
                break
        return best

    def _tried(self, groups: Groups) -> Iterator[Groups]:
        for moved in self._moves(groups):
            yield moved
            if [devices for devices, _ in moved] != [devices for devices, _ in groups]:
                cut = self._cut([devices for devices, _ in moved])
                if cut is not None:
                    yield cut

    def _cut(self, groups: Sequence[tuple[str, ...]]) -> Groups | None:
        """The min-max cuts of groups in this order; None where they do not fit so."""
        layers = self.problem.num_layers
        best = np.full(layers + 1, np.inf)
        best[layers] = 0.0
        ends = []
        for index in reversed(range(len(groups))):
            slowest = np.maximum(self._segments(groups[index]), best[None, :])
            ends.append(slowest.argmin(axis=1))
            best = slowest.min(axis=1)
            if index:
                best = np.maximum(best, self._links(groups[index - 1], groups[index]))
        if not math.isfinite(best[0]):
            return None
        found, first = [], 0
        for devices, end in zip(groups, reversed(ends), strict=True):
            first = int(end[first])
            found.append((devices, first))
        return tuple(found)

    def _segments(self, devices: tuple[str, ...]) -> np.ndarray:
        """Seconds of layers (first, end) on a group, as if rows could be split at will."""
        key = tuple(sorted(devices))
        if key not in self._own:
            with np.errstate(divide="ignore"):
                sums = [self._seconds[device] for device in key]
                speed = sum(1.0 / (s[None, :] - s[:, None]) for s in sums)
                seconds = np.asarray(1.0 / speed)
            layers = self.problem.num_layers
            first, end = np.indices((layers + 1, layers + 1))
            seconds[end <= first] = np.inf
            if len(key) > 1:
                seconds[self._mixing[end] > self._mixing[first]] = np.inf
            self._own[key] = seconds
        return self._own[key]

    def _links(self, left: Sequence[str], right: Sequence[str]) -> np.ndarray:
        """Seconds that a microbatch occupies the busier direction, by the layer after the cut."""
        crowd, profile = self.problem.crowd, self.problem.profile
        pairs = [(crowd.link(a, b), crowd.link(b, a)) for a in left for b in right]
        rates = [math.inf, math.inf]
        for pair in pairs:
            for way, link in enumerate(pair):
                if link is None:
                    return np.full(self.problem.num_layers + 1, np.inf)
                rates[way] = min(rates[way], link.bandwidth_bytes_per_s)
        sizes = [profile.cut_bytes(layer) for layer in range(1, self.problem.num_layers)]
        busiest = [max(down / rates[0], back / rates[1]) for down, back in sizes]
        return np.array([np.inf, *busiest, np.inf])

    def _moves(self, groups: Groups) -> Iterator[Groups]:
        used = {device for devices, _ in groups for device in devices}
        free = [device for device in sorted(self._seconds) if device not in used]
        first = 0
        for index, (devices, end) in enumerate(groups):
            before, after = groups[:index], groups[index + 1 :]
            for device in free:
                yield (*before, ((*devices, device), end), *after)
                middle = (first + end) // 2
                if first < middle < end:
                    yield (*before, ((device,), middle), (devices, end), *after)
                    yield (*before, (devices, middle), ((device,), end), *after)
            for device in devices if len(devices) > 1 else ():
                others = tuple(other for other in devices if other != device)
                yield (*before, (others, end), *after)
                if before:
                    (upper, upper_end), rest = before[-1], before[:-1]
                    yield (*rest, ((*upper, device), upper_end), (others, end), *after)
                if after:
                    (lower, lower_end), rest = after[0], after[1:]
                    yield (*before, (others, end), ((*lower, device), lower_end), *rest)
            if after:
                following, following_end = after[0]
                yield (*before, ((*devices, *following), following_end), *after[1:])
                for shift in (-3, -2, -1, 1, 2, 3):
                    if first < end + shift < following_end:
                        yield (*before, (devices, end + shift), *after)
            first = end

    def _best(self, groups: Groups) -> tuple[float, PipelinePlan | None]:
        if groups not in self._seen:
            self._seen[groups] = self._made(groups)
        return self._seen[groups]

    def _made(self, groups: Groups) -> tuple[float, PipelinePlan | None]:
        """The plan of these groups with the best depths tried, and its step; None: does not fit."""
        problem = self.problem
        stages, first = [], 0
        for devices, end in groups:
            shares = self._shares(devices, first, end)
            if shares is None:
                return math.inf, None
            stages.append(
                Stage(
                    device=shares[0].device,
                    first_layer=first,
                    last_layer=end - 1,
                    recompute=problem.recompute == "always",
                    shares=shares if len(shares) > 1 else (),
                )
            )
            first = end
        plan = PipelinePlan(
            stages=tuple(stages),
            num_layers=problem.num_layers,
            microbatches=problem.microbatches,
            schedule=problem.schedule,
        )
        try:
            times = stage_times(problem.profile, problem.crowd, plan)
            cuts = cut_times(problem.profile, problem.crowd, plan)
        except InvalidPlanError:  # two devices without a link
            return math.inf, None
        if problem.schedule != "eager":
            step = evaluate_step_s(schedule_for(plan), times, cuts)
            return (step, plan) if not plan_faults(problem, plan) else (math.inf, None)
        caps = [self._cap(plan, index) for index in range(len(stages))]
        if min(caps) < 1:
            return math.inf, None
        best_s, depths = min(
            (step_s(times, cuts, depths, problem.microbatches), depths)
            for depths in depths_to_try(times, cuts, caps)
        )
        deep = tuple(replace(s, warmup=d) for s, d in zip(stages, depths, strict=True))
        plan = replace(plan, stages=deep)
        return (best_s, plan) if not plan_faults(problem, plan) else (math.inf, None)

    def _shares(self, devices: Sequence[str], first: int, end: int) -> tuple[Share, ...] | None:
        """Rows by speed, the device with the most first; None where a group may not be."""
        rows = self.problem.profile.microbatch_size
        if len(devices) == 1:
            return (Share(device=devices[0], rows=rows),)  # type: ignore[arg-type]
        if any(layer.state_bytes for layer in self.problem.profile.layers[first:end]):
            return None
        speeds = {
            d: 1 / max(float(self._seconds[d][end] - self._seconds[d][first]), 1e-12)
            for d in devices
        }
        total = math.fsum(speeds.values())
        exact = {device: rows * speed / total for device, speed in speeds.items()}
        given = {device: math.floor(share) for device, share in exact.items()}
        by_rest = sorted(devices, key=lambda d: (given[d] - exact[d], d))
        for device in by_rest[: rows - sum(given.values())]:
            given[device] += 1
        if min(given.values()) < 1:
            return None  # the same group without that device is tried by other moves
        order = sorted(devices, key=lambda d: (-given[d], d))
        return tuple(Share(device=device, rows=given[device]) for device in order)  # type: ignore[arg-type]

    def _cap(self, plan: PipelinePlan, index: int) -> int:
        """Microbatches in flight that every device of a stage has memory for."""
        problem, stage = self.problem, plan.stages[index]
        most = problem.microbatches
        rows = sum(share.rows for share in stage.shares)
        shares = [(s.device, s.rows / rows) for s in stage.shares] or [(stage.device, 1.0)]
        for device, share in shares:
            one, two = (
                stage_memory(
                    problem.profile,
                    stage,
                    stage_index=index,
                    num_stages=len(plan.stages),
                    in_flight=in_flight,
                    snapshots=problem.snapshots,
                    log_steps=problem.log_steps,
                    compile_peak_bytes=problem.compile_peak_bytes,
                    rows_share=share,
                ).training_bytes
                for in_flight in (1, 2)
            )
            limit = problem.crowd.device(device).memory_bytes
            if max(one, problem.compile_peak_bytes) > limit:
                return 0
            # The last stage's working memory may fall as the stash grows: 0 more is no limit.
            most = min(most, 1 + (limit - one) // (two - one)) if two > one else most
        return most


def _step_s(problem: PartitionProblem, plan: PipelinePlan) -> float:
    times = stage_times(problem.profile, problem.crowd, plan)
    cuts = cut_times(problem.profile, problem.crowd, plan)
    return evaluate_step_s(schedule_for(plan), times, cuts)


__all__ = ["HybridSolver"]
