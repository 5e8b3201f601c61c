"""DAPPLE's planner: synchronous pipelines with early backward, by the latency around a pivot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ....core import PipelinePlan, predict
from ....errors import InvalidValueError
from ...problem import PartitionProblem, PartitionResult
from .layout import (
    Layout,
    Limits,
    Unit,
    apart,
    mode_seconds,
    nothing_fits,
    order_for_pins,
    pin_note,
    repair,
    result,
)
from .pipedream import even_rows
from .rounds import between, ring_s

Policy = Literal["best", "PA", "PB"]
_Terms = tuple[float, float, float, float]
"""Of a prefix: max of M E + E before, sum of E, max of A - B before, sum of B (see `rounds`)."""
_Path = tuple[tuple[int, int, int], ...]
"""Per stage: first device, end of devices, end of layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DappleSolver:
    """Cuts and groups for the least pipeline latency, devices in the order given.

    Problem: cut the layers into stages and the devices into consecutive groups, a group splitting
    each microbatch's rows evenly, for the least latency of a synchronous round (`rounds`: warm-up
    up to a pivot stage, M microbatches there, drain and all-reduce; transfers are stages too).

    Program over prefixes: for the first `j` layers in `s` stages on the first `m` devices, the
    prefix is kept whose latency is least when all layers left are one last stage; each is extended
    by every further stage. Variables: where stages and groups end.

    Warm-up: stage `i` of `S` forwards PA = min(S - i, D) or PB = min(2 (S - i) - 1, D) microbatches
    before its first backward, `D` being what memory holds. So its depth gives way to memory where
    the schedule is "eager"; under "1f1b" (which is PA) and "gpipe" the schedule has its own.

    Complexity: O(L^2 D^2 S) with groups, O(L^2 D) without.

    Source: DAPPLE (Fan et al., PPoPP 2021): abstract; its planner, latency and policies are
    general knowledge, not checked against the text. Asteroid's re-implementations quote the same
    latency.

    Left open, and fixed here:
    - unequal devices: their own seconds, in the order given (there all are alike, so that its three
      placement policies differ only by the machine a device is in; ours has one device each);
    - the pivot: the step with the largest M (F + B) + all before it;
    - the last stage of a kept prefix: with groups on the next 1, 2, ... devices, whichever is best;
      without groups on the next one (there: on all that are left). So devices at the end may be
      left out;
    - groups only with `problem.share`, of no more devices than rows, none over layers with state
      over rows;
    - a transfer: bytes over the slowest link of each direction between groups, with latency;
    - policy: "best" makes both plans and keeps the one predicted faster; PB where they are equal;
    - `D`: per stage, what its memory holds, never more than the stage before has;
    - ties: fewer stages, then fewer devices, then earlier cuts;
    - parts without links between them, and repair: as `by_params`, groups moved as one; if that
      fails, without groups. Depth shrinks
      before a cut moves, and a stage recomputes ("auto") only where depth 1 does not fit.
    """

    policy: Policy = "best"

    def __post_init__(self) -> None:
        if self.policy not in ("best", "PA", "PB"):
            raise InvalidValueError(f"policy must be 'best', 'PA' or 'PB', got {self.policy!r}")

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: No repair of the plan fits.
        """
        started_s = time.monotonic()
        eager = problem.schedule == "eager"
        limits = Limits(problem, in_flight=(lambda _: 1) if eager else None)
        given = problem.allowed_devices
        order = order_for_pins(problem, given)

        def on(part: Sequence[str]) -> PartitionResult:
            notes = [pin_note(given, order)]
            found = repair(limits, _units(problem, limits, part))
            if found is None and problem.share:
                notes.append("repaired: its groups fit nowhere, so every stage has one device")
                found = repair(limits, _units(replace(problem, share=False), limits, part))
            if found is None:
                raise nothing_fits(problem, "dapple", f"every cut in the order {part}")
            layout, changes = found
            if changes:
                notes.append(f"repaired, as the rule does not look at all limits: {changes}")
            plan = limits.plan(layout)
            if eager:
                plan, policy = self._warmed(limits, layout, plan)
                notes.append(f"warm-up policy {policy}")
            else:
                notes.append(f"warm-up as schedule {problem.schedule!r} has it")
            return result(limits, plan, solver="dapple", started_s=started_s, notes=notes)

        return apart(limits, order, "dapple", on)

    def _warmed(
        self, limits: Limits, layout: Layout, plan: PipelinePlan
    ) -> tuple[PipelinePlan, str]:
        problem = limits.problem
        best: tuple[float, PipelinePlan, str] | None = None
        for policy in ("PB", "PA") if self.policy == "best" else (self.policy,):
            warmups, before = [], problem.microbatches
            for index, stage in enumerate(plan.stages):
                left = len(plan.stages) - index
                most = min(before, left if policy == "PA" else 2 * left - 1)
                before = _held(limits, layout, index, stage.recompute, most)
                warmups.append(before)
            warmed = replace(
                plan,
                stages=tuple(
                    replace(stage, warmup=depth)
                    for stage, depth in zip(plan.stages, warmups, strict=True)
                ),
            )
            step_s = predict(problem.profile, problem.crowd, warmed).step_s
            if best is None or step_s < best[0] * (1 - 1e-9):
                best = step_s, warmed, policy
        assert best is not None, "at least one policy"
        return best[1], best[2]


def _held(limits: Limits, layout: Layout, index: int, recompute: bool, most: int) -> int:
    """The most microbatches in flight, up to `most`, that a stage's devices hold."""
    unit, end = layout[index]
    first = layout[index - 1][1] if index else 0
    for depth in range(most, 1, -1):
        if limits.holds(unit, first, end, recompute=recompute, in_flight=depth):
            return depth
    return 1


def _units(problem: PartitionProblem, limits: Limits, order: Sequence[str]) -> list[Unit]:
    layers, count = problem.num_layers, len(order)
    if not count:
        return []
    stages = min(count, layers, problem.max_stages or count)
    size = min(count, problem.profile.microbatch_size) if problem.share else 1
    made = {
        (a, b): _group(problem, limits, order[a:b])
        for a in range(count)
        for b in range(a + 1, min(a + size, count) + 1)
    }
    wires = {
        (a, b, c): between(problem, order[a:b], order[b:c])
        for a, b in made
        for c in range(b + 1, count + 1)
        if (b, c) in made
    }
    rounds = problem.microbatches
    best: tuple[float, int, int, _Path] | None = None

    def extend(state: _Terms, wire, group, first: int, chosen: slice | np.ndarray):
        """Terms after a transfer at `first` and a stage of layers `first .. chosen - 1`."""
        pace, before, late, back = state
        if wire is not None:
            down_s, back_s = wire[0][first], wire[1][first]
            pace = max(pace, rounds * (down_s + back_s) + before)
            late = max(late, -back)
            before, back = before + down_s + back_s, back + back_s
        forward, backward, ring = (table[first, chosen] for table in group)
        both = forward + backward
        return (
            np.maximum(pace, rounds * both + before),
            before + both,
            np.maximum(late, ring - back),
            back + backward,
        )

    start: _Terms = (-np.inf, 0.0, -np.inf, 0.0)
    frontier: dict[tuple[int, int], tuple[_Terms, int, _Path]] = {(0, 0): (start, 0, ())}
    """(devices, layers) -> terms, first device of the last stage, (first, end, layers) so far."""
    least = min(problem.min_stages, stages)
    for stage in range(1, stages + 1):
        following: dict[tuple[int, int], tuple[float, _Terms, int, _Path]] = {}
        for (used, first), (state, before_from, path) in sorted(frontier.items()):
            for stop in range(used + 1, min(used + size, count) + 1):
                group = made[used, stop]
                wire = wires.get((before_from, used, stop)) if used else None
                if group is None or (used and wire is None):
                    continue
                pace, total, late, back = extend(state, wire, group, first, slice(None))
                value = float(pace[layers] + late[layers])
                if stage >= least and np.isfinite(value):
                    key = (value, stage, stop)
                    if best is None or key < best[:3]:
                        best = (*key, (*path, (used, stop, layers)))
                if stage == stages or stop == count:
                    continue
                # The rest as one last stage, on the next devices: the best of these.
                rest = np.full(layers, np.inf)
                for last in range(stop + 1, min(stop + size, count) + 1):
                    tail, wired = made[stop, last], wires.get((used, stop, last))
                    if tail is None or wired is None:
                        continue
                    link = (wired[0] + wired[1])[:layers]
                    forward, backward, ring = (table[:, layers] for table in tail)
                    both = forward + backward
                    paced = np.maximum(pace[:layers], rounds * link + total[:layers])
                    paced = np.maximum(paced, rounds * both + total[:layers] + link)
                    lag = np.maximum(late[:layers], -back[:layers])
                    lag = np.maximum(lag, ring - back[:layers] - wired[1][:layers])
                    rest = np.fmin(rest, paced + lag)
                for end in np.flatnonzero(np.isfinite(rest)):
                    if end <= first:
                        continue
                    key = stop, int(end)
                    if key not in following or rest[end] < following[key][0]:
                        terms = (
                            float(pace[end]), float(total[end]), float(late[end]), float(back[end])
                        )  # fmt: skip
                        following[key] = (
                            float(rest[end]), terms, used, (*path, (used, stop, int(end)))
                        )  # fmt: skip
        frontier = {key: kept[1:] for key, kept in following.items()}
    if best is None:  # links are missing: the repair decides, from an even cut
        return [
            Unit((d,), max(1, layers * (i + 1) // count), wanted=i < layers)
            for i, d in enumerate(order)
        ]
    cuts = best[3]
    units = [Unit(tuple(order[a:b]), end, even_rows(problem, b - a)) for a, b, end in cuts]
    return units + [Unit((d,), layers, wanted=False) for d in order[cuts[-1][1] :]]


def _group(
    problem: PartitionProblem, limits: Limits, devices: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Forward, backward and all-reduce seconds of a group over (first, end); None: no links."""
    ring = ring_s(problem, devices)
    if ring is None:
        return None
    rows = even_rows(problem, len(devices)) or (problem.profile.microbatch_size,)
    parts: list[np.ndarray] = []
    for which in (0, 1):
        sums = [np.array([0.0, *np.cumsum(mode_seconds(problem, d)[which])]) for d in devices]
        spans = [
            (total[None, :] - total[:-1, None]) * (part / sum(rows))
            for total, part in zip(sums, rows, strict=True)
        ]
        parts.append(np.max(spans, axis=0))
    bad = ~np.triu(np.ones(parts[0].shape, dtype=bool), 1)
    if len(devices) > 1:
        bad |= limits.mixing
    parts[0] = np.where(bad, np.inf, parts[0])
    return parts[0], parts[1], ring
