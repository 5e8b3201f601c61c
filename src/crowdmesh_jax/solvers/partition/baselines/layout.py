"""What the baselines share: who fits where, the smallest repair, and the way to a result.

A layout is a list of units (a device, or several that share a stage) with the layer at which each
ends. Memory is asked of `core.stage_memory`, once per run of layers, and kept as arrays over
(first, end). It knows limits, rules and links; no cost model and no search but the repair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....core import (
    DeviceId,
    PipelinePlan,
    Share,
    Stage,
    predict,
    search_schedule,
    stage_memory,
    warmup_depths,
)
from ....errors import InfeasibleError
from ...check import check_plan
from ...problem import PartitionProblem, PartitionResult

_ROUNDING_BYTES = 5
"""The most that rounding a part of the rows up, term by term, adds to a device's bytes."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One device, or several that share a stage, and what a rule wants of them."""

    devices: tuple[str, ...]
    wanted_end: int
    """The layer before which the rule ends its stage."""
    rows: tuple[int, ...] = ()
    """Of each microbatch, per device; (): one device has them all."""
    wanted: bool = True
    """Whether the rule gives it layers at all; others may step in when a plan is repaired."""


Layout = tuple[tuple[Unit, int], ...]
"""Units with the layer before which each ends, in the order of the stages."""


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Bytes of layers `first .. end - 1` as arrays over (first, end), for all rows."""

    fixed: np.ndarray
    credit_fixed: np.ndarray
    credit_rows: np.ndarray
    """Frames, which grow with the rows."""
    stash_fixed: np.ndarray
    stash_each: np.ndarray
    """More per microbatch in flight."""
    temp: np.ndarray
    update: np.ndarray


class Limits:
    """Which device may hold which layers, with how many rows and microbatches in flight.

    Args:
        in_flight: Microbatches in flight on a stage by the number of stages to the end, itself
            included; None: as the problem's schedule has it.
    """

    def __init__(
        self, problem: PartitionProblem, *, in_flight: Callable[[int], int] | None = None
    ) -> None:
        self.problem = problem
        self.num_layers = problem.num_layers
        self.rows = problem.profile.microbatch_size
        self.modes = {"never": (False,), "always": (True,), "auto": (False, True)}[
            problem.recompute
        ]
        self.in_flight = in_flight or self._scheduled
        states = [0, *np.cumsum([layer.state_bytes > 0 for layer in problem.profile.layers])]
        self.mixing = np.array(states)[None, :] > np.array(states)[:-1, None]
        """Over (first, end): whether a layer has state over all rows, so that none may share."""
        self._bytes = {recompute: self._measure(recompute) for recompute in self.modes}
        self._allowed: dict[str, np.ndarray] = {}
        self._caps: dict[tuple[str, bool, int], np.ndarray] = {}

    def _scheduled(self, depth: int) -> int:
        schedule = search_schedule(self.problem.schedule)
        return warmup_depths(schedule, depth, self.problem.microbatches)[0]

    def _measure(self, recompute: bool) -> _Bytes:
        problem, count = self.problem, self.num_layers
        made = {name: np.zeros((count, count + 1), dtype=np.int64) for name in _Bytes.__slots__}
        lends = any(layer.borrows for layer in problem.profile.layers)
        layers = problem.profile.layers

        def ask(first: int, end: int, in_flight: int, share: float):
            index = 0 if first == 0 else 1
            return stage_memory(
                problem.profile,
                Stage(
                    device=DeviceId("any"),
                    first_layer=first,
                    last_layer=end - 1,
                    recompute=recompute,
                ),
                stage_index=index,
                num_stages=index + 1 if end == count else index + 2,
                in_flight=in_flight,
                snapshots=problem.snapshots,
                log_steps=problem.log_steps,
                compile_peak_bytes=0,
                rows_share=share,
            )

        for first in range(count):
            temp = update = 0
            for end in range(first + 1, count + 1):
                temp = max(temp, layers[end - 1].temp_bytes)
                update += layers[end - 1].update_temp_bytes
                none, one = ask(first, end, 0, 1.0), ask(first, end, 1, 1.0)
                credit = ask(first, end, 0, 0.0).credit_bytes if lends else 0
                at = first, end
                made["fixed"][at] = (
                    none.training_bytes - none.stash_bytes - none.credit_bytes - none.working_bytes
                )
                made["credit_fixed"][at] = credit
                made["credit_rows"][at] = none.credit_bytes - credit
                made["stash_fixed"][at] = none.stash_bytes
                made["stash_each"][at] = one.stash_bytes - none.stash_bytes
                made["temp"][at], made["update"][at] = temp, update
        return _Bytes(**made)

    def allowed(self, device: str) -> np.ndarray:
        """Over (first, end): whether pins and bans let it run all these layers."""
        if device not in self._allowed:
            banned = [0]
            for layer in range(self.num_layers):
                banned.append(banned[-1] + (not self.problem.allows(device, layer)))
            sums = np.array(banned)
            self._allowed[device] = sums[None, :] == sums[:-1, None]
        return self._allowed[device]

    def caps(self, device: str, recompute: bool, depth: int) -> np.ndarray:
        """Over (first, end): the most rows that it can hold with `depth` stages to the end.

        All rows are counted to the byte, a part of them a few bytes too dear.
        """
        return self._at_depth(device, recompute, self.in_flight(depth))

    def _at_depth(self, device: str, recompute: bool, in_flight: int) -> np.ndarray:
        key = device, recompute, in_flight
        if key not in self._caps:
            self._caps[key] = self._most_rows(*key)
        return self._caps[key]

    def holds(self, unit: Unit, first: int, end: int, *, recompute: bool, in_flight: int) -> bool:
        """Whether the unit can run these layers with so many microbatches in flight."""
        return all(
            self._at_depth(device, recompute, in_flight)[first, end] >= rows
            for device, rows in zip(unit.devices, unit.rows or (self.rows,), strict=True)
        )

    def _most_rows(self, device: str, recompute: bool, in_flight: int) -> np.ndarray:
        limit = self.problem.crowd.device(device).memory_bytes
        size = self._bytes[recompute]
        stash = size.stash_fixed + in_flight * size.stash_each
        room = limit - size.fixed - size.credit_fixed
        # The update's programs run when nothing is in flight: the two needs do not add up.
        whole = room - size.credit_rows - np.maximum(stash + size.temp, size.update) >= 0
        room = room - _ROUNDING_BYTES
        with np.errstate(divide="ignore", invalid="ignore"):
            training = np.floor(self.rows * (room - size.temp) / (size.credit_rows + stash))
            updating = np.floor(self.rows * (room - size.update) / size.credit_rows)
        training = np.where(size.credit_rows + stash == 0, self.rows, training)
        updating = np.where(size.credit_rows == 0, self.rows, updating)
        part = np.minimum(training, updating)
        part = np.where(room < np.maximum(size.temp, size.update), 0, part)
        rows = np.where(whole, self.rows, np.clip(part, 0, self.rows - 1)).astype(np.int64)
        if self.problem.compile_peak_bytes > limit:
            rows[:] = 0
        return np.where(self.allowed(device), rows, 0)

    def fits(self, unit: Unit, depth: int, recompute: bool | None = None) -> np.ndarray:
        """Over (first, end): whether the unit can run these layers, `depth` stages to the end."""
        found = np.zeros((self.num_layers, self.num_layers + 1), dtype=bool)
        for mode in self.modes if recompute is None else (recompute,):
            fine = np.ones_like(found)
            for device, rows in zip(unit.devices, unit.rows or (self.rows,), strict=True):
                fine &= self.caps(device, mode, depth) >= rows
            found |= fine
        if len(unit.devices) > 1:
            found &= ~self.mixing & self.linked(unit.devices, unit.devices)
        return np.triu(found, 1)

    def linked(self, left: Sequence[str], right: Sequence[str]) -> bool:
        """Whether each device of one can talk with each of the other, both ways."""
        crowd = self.problem.crowd
        return all(
            crowd.link(a, b) is not None and crowd.link(b, a) is not None
            for a in left
            for b in right
            if a != b
        )

    def plan(self, layout: Layout, warmups: Sequence[int | None] | None = None) -> PipelinePlan:
        """The layout as a plan; recomputes only where memory or the problem asks for it.

        Under `zb-h1` a stage has as many in flight as under 1F1B: those were counted.
        """
        stages, first = [], 0
        if warmups is None and self.problem.schedule == "zb-h1":
            warmups = range(len(layout), 0, -1)
        for position, (unit, end) in enumerate(layout):
            depth = len(layout) - position
            recompute = self.modes[0] or not self.fits(unit, depth, self.modes[0])[first, end]
            stages.append(
                Stage(
                    device=DeviceId(unit.devices[0]),
                    first_layer=first,
                    last_layer=end - 1,
                    recompute=recompute and self.modes[-1],
                    warmup=None if warmups is None else warmups[position],
                    shares=tuple(
                        Share(device=DeviceId(device), rows=rows)
                        for device, rows in zip(unit.devices, unit.rows, strict=True)
                    )
                    if len(unit.devices) > 1
                    else (),
                )
            )
            first = end
        return PipelinePlan(
            stages=tuple(stages),
            num_layers=self.num_layers,
            microbatches=self.problem.microbatches,
            schedule=self.problem.schedule,
        )


def order_for_pins(problem: PartitionProblem, order: Sequence[str]) -> tuple[str, ...]:
    """The order, with pinned devices put where their layers are; the others keep their places."""
    first_pin: dict[str, int] = {}
    for layer, device in problem.layer_pins.items():
        first_pin.setdefault(device, layer)
    pinned = iter(sorted((d for d in order if d in first_pin), key=lambda d: first_pin[d]))
    found = [next(pinned) if device in first_pin else device for device in order]
    pins = problem.layer_pins
    for layer, place in ((0, 0), (problem.num_layers - 1, len(found) - 1)):
        device = pins.get(layer)
        if device in found:
            found.remove(device)
            found.insert(place, device)
    return tuple(found)


def repair(limits: Limits, units: Sequence[Unit]) -> tuple[Layout, str] | None:
    """The nearest layout that keeps all limits, rules and links, the units in this order.

    Nearest: the fewest units leave; then the number of stages stays as near as can be, so that
    others join in their place; then the fewest layers by which ends are moved, summed over the
    stages that stay; ties go to earlier ends. Exact, by a dynamic program from the back over (unit,
    stages to the end, first layer): O(D^3 L + D^2 L^2).

    Returns:
        The layout and what was changed in words, "" where nothing was; None: none fits.
    """
    problem, layers, count = limits.problem, limits.num_layers, len(units)
    wanted = sum(unit.wanted for unit in units)
    fewer = layers * (count + 1)  # a stage more or less outweighs any move of cuts
    leave = fewer * (count + 1)  # and a unit that leaves outweighs both
    never = leave * (count + 1) * 4
    must = [any(device in problem.requires for device in unit.devices) for unit in units]
    skip = [never if m else leave * unit.wanted for m, unit in zip(must, units, strict=True)]
    most = min(count, layers, problem.max_stages or count)
    best = np.full((count, most + 1, layers + 1), never, dtype=np.int64)
    step = np.zeros((count, most + 1, layers + 1, 2), dtype=np.int64)
    """Per (unit, stages to the end, first layer): where the stage ends, and the next unit."""
    ends = np.arange(layers + 1)
    for i in reversed(range(count)):
        moved = np.abs(ends - units[i].wanted_end) * units[i].wanted
        after = np.full((most + 1, layers + 1), never, dtype=np.int64)
        following = np.full((most + 1, layers + 1), count, dtype=np.int64)
        after[0, layers] = min(sum(skip[i + 1 :]), never)
        skipped = 0
        for j in range(i + 1, count):
            if skipped >= never:
                break
            if limits.linked(units[i].devices, units[j].devices):
                cost = best[j] + skipped
                nearer = cost < np.minimum(after, never)
                nearer[0] = False  # no stages left: only the end itself
                # `best[j][r]` covers the layers from its first one with r stages.
                after = np.where(nearer, cost, after)
                following = np.where(nearer, j, following)
            skipped += skip[j]
        for depth in range(1, most + 1):
            fits = limits.fits(units[i], depth)
            cost = np.where(fits, after[depth - 1][None, :] + moved[None, :], never)
            chosen = np.argmin(cost, axis=1)
            best[i, depth, :layers] = np.minimum(cost[np.arange(layers), chosen], never)
            step[i, depth, :layers, 0] = chosen
            step[i, depth, :layers, 1] = following[depth - 1, chosen]
    cheapest, start = never, (0, 0)
    for i in range(count):
        before = sum(skip[:i])
        for depth in range(max(1, problem.min_stages), most + 1):
            cost = int(best[i, depth, 0]) + before + fewer * abs(depth - wanted)
            if cost < cheapest:
                cheapest, start = cost, (i, depth)
    if cheapest >= never:
        return None
    found, first, (i, depth) = [], 0, start
    while depth:
        end, following_unit = (int(value) for value in step[i, depth, first])
        found.append((units[i], end))
        i, first, depth = following_unit, end, depth - 1
    return tuple(found), _changes(units, tuple(found))


def _changes(units: Sequence[Unit], layout: Layout) -> str:
    used = dict(layout)
    out = [d for u in units if u.wanted and u not in used for d in u.devices]
    joined = [d for u in used if not u.wanted for d in u.devices]
    moved = sum(abs(end - unit.wanted_end) for unit, end in layout if unit.wanted)
    words = []
    if out:
        words.append(f"{', '.join(out)} left out")
    if joined:
        words.append(f"{', '.join(joined)} taken in")
    if moved:
        words.append(f"ends of stages moved by {moved} layers in all")
    return "; ".join(words)


def result(
    limits: Limits,
    plan: PipelinePlan,
    *,
    solver: str,
    started_s: float,
    notes: Sequence[str] = (),
    reasons: Mapping[str, str] | None = None,
) -> PartitionResult:
    """Checks and predicts a baseline's plan.

    Raises:
        InvalidPlanError: It breaks the problem: a bug of the baseline.
    """
    problem = limits.problem
    check_plan(problem, plan)
    allowed = problem.allowed_devices
    left_out: dict[str, str] = {
        str(device): (reasons or {}).get(device, f"{solver}'s rule gives it no layers")
        if device in allowed
        else "not allowed"
        for device in sorted(device.id for device in problem.crowd.devices)
        if device not in plan.all_devices
    }
    return PartitionResult(
        plan=plan,
        predicted=predict(
            problem.profile, problem.crowd, plan, compile_peak_bytes=problem.compile_peak_bytes
        ),
        problem=problem,
        optimal=False,
        gap=None,
        solver=solver,
        left_out=left_out,
        solve_s=time.monotonic() - started_s,
        notes=tuple(note for note in notes if note),
    )


def nothing_fits(problem: PartitionProblem, solver: str, tried: str) -> InfeasibleError:
    """The error of a baseline whose plan could not be repaired."""
    limits = [
        f"{device} {problem.crowd.device(device).memory_bytes / 1e6:.6g} MB"
        for device in problem.allowed_devices
    ]
    return InfeasibleError(
        f"{solver} has no plan that meets memory, links, pins and stage limits together\n"
        f"  tried    {tried}\n"
        f"  devices  {', '.join(limits) or 'none may be used'}\n"
        '  try      solver "ilp", which searches all chains and says which limit is in the way'
    )


def repaired_chain(
    limits: Limits, units: Sequence[Unit], *, solver: str, started_s: float, notes: Sequence[str]
) -> PartitionResult:
    """A rule's units as a result, repaired where they do not fit.

    Raises:
        InfeasibleError: No repair that keeps the order of the units fits.
    """
    found = repair(limits, units)
    if found is None:
        order = ", ".join("+".join(unit.devices) for unit in units)
        raise nothing_fits(
            limits.problem, solver, f"every cut and every leaving-out in the order {order or '-'}"
        )
    layout, changes = found
    said = f"repaired, as the rule does not look at all limits: {changes}" if changes else ""
    return result(
        limits,
        limits.plan(layout),
        solver=solver,
        started_s=started_s,
        notes=[*notes, said],
    )


def islands(limits: Limits, order: Sequence[str]) -> list[tuple[str, ...]]:
    """The parts of the crowd that no link joins, each in the order given."""
    groups: list[set[str]] = []
    for device in order:
        joined = {device}
        for group in [g for g in groups if any(limits.linked((device,), (o,)) for o in g)]:
            joined |= group
            groups.remove(group)
        groups.append(joined)
    if len(groups) == 1:
        return [tuple(order)]
    return [tuple(d for d in order if d in g) for g in sorted(groups, key=sorted)]


def apart(
    limits: Limits,
    order: Sequence[str],
    solver: str,
    one: Callable[[Sequence[str]], PartitionResult],
) -> PartitionResult:
    """A rule on each part of the crowd that no link joins with the rest; the fastest plan of all.

    Raises:
        InfeasibleError: It finds no plan on any of them.
    """
    parts = islands(limits, order)
    best: PartitionResult | None = None
    problem = limits.problem
    for part in parts:
        if not set(problem.requires) <= set(part):
            continue
        try:
            found = one(part)
        except InfeasibleError:
            continue
        if best is None or found.predicted.step_s < best.predicted.step_s:
            best = found
    if best is None:
        raise nothing_fits(
            problem, solver, f"every cut and every leaving-out in the order {', '.join(order)}"
        )
    if len(parts) == 1:
        return best
    said = f"{len(parts)} parts of the crowd have no links between them: planned apart, best kept"
    return replace(best, notes=(*best.notes, said))


def mode_seconds(problem: PartitionProblem, device: str) -> tuple[list[float], list[float]]:
    """Forward and backward seconds per layer; backward holds the forward where all recompute."""
    rows = problem.profile.layer_seconds(problem.crowd, device)
    again = problem.recompute == "always"
    return (
        [row.forward_s for row in rows],
        [row.backward_s + (row.forward_s if again else 0.0) for row in rows],
    )


def pin_note(before: Sequence[str], after: Sequence[str]) -> str:
    """What `order_for_pins` changed, in words."""
    return "" if tuple(before) == tuple(after) else "devices reordered so that pins can hold"


__all__ = [
    "Layout", "Limits", "Unit", "apart", "islands", "mode_seconds", "nothing_fits",
    "order_for_pins", "pin_note", "repair", "repaired_chain", "result",
]  # fmt: skip
