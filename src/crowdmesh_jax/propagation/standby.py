"""Standby plans: what would be installed if a device, or two, were lost; solved ahead.

For each loss, in this order: the lost stage goes whole to a device without a stage (a holder of
its copy before any other), so that every survivor keeps its cut and its programs; else it is merged
into a neighbouring stage whose device holds its copy; else the chain is cut anew over the
survivors, by the solver that the caller passes. Copies that a device hosts stay in its memory
through all of it (they are dropped when the next wave is complete), and are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..core import DeviceId, PipelinePlan, ReplicaPlan, Stage, WireDtype, predict
from ..errors import CrowdMeshError, InfeasibleError, SolverError
from ..solvers import PartitionProblem, PartitionSolver, plan_faults, solve
from ..solvers.units import format_bytes
from .budget import HELD_VERSIONS, hosted_bytes, stage_need
from .losses import Loss

Mode = Literal["take_over", "spread", "recut"]
How = Literal["take_over", "merge", "spread", "recut", "none"]
MOST_SPARES = 6
"""Spares that are tried for each lost stage."""
MERGE_SLOWER = 1.25
"""A merge is installed unless a new cut's step is shorter by more than this factor: the new cut
moves layers between survivors, the merge moves none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageKey:
    """What a stage's programs depend on; equal keys, equal programs. The device is not in it."""

    first_layer: int
    last_layer: int
    num_layers: int
    recompute: bool = False
    """Without meaning at the last stage, and False there."""
    wire_in: WireDtype | None = None
    wire_out: WireDtype | None = None


def stage_key(plan: PipelinePlan, index: int) -> StageKey:
    """The key of one stage of a plan."""
    stage = plan.stages[index]
    return StageKey(
        first_layer=stage.first_layer,
        last_layer=stage.last_layer,
        num_layers=plan.num_layers,
        recompute=stage.recompute and index < len(plan.stages) - 1,
        wire_in=plan.stages[index - 1].wire_dtype if index else None,
        wire_out=stage.wire_dtype,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMove:
    """Layers that a device does not own yet, and where their state comes from."""

    to: DeviceId
    first_layer: int
    last_layer: int
    source: DeviceId | None
    """A surviving owner, or a holder (`to` itself: nothing travels); None: no copy is left, and all
    stages roll back to the newest checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyPlan:
    """The answer to one loss."""

    lost: tuple[DeviceId, ...]
    probability: float
    how: How
    plan: PipelinePlan | None
    """None: nothing fits; `why` says what is missing."""
    step_s: float | None
    moves: tuple[LayerMove, ...]
    programs: tuple[tuple[DeviceId, StageKey], ...]
    """What must be exported, shipped and compiled ahead: stages that their device does not run
    today."""
    why: str


def standby_plans(
    problem: PartitionProblem,
    plan: PipelinePlan,
    replicas: ReplicaPlan,
    losses: Sequence[Loss],
    *,
    solver: str | PartitionSolver,
    mode: Mode = "take_over",
    held_versions: int = HELD_VERSIONS,
) -> tuple[StandbyPlan, ...]:
    """One plan for each loss, in the order given.

    Args:
        problem: What the running plan answered: profile, crowd, pins, bans.
        replicas: Who holds which copies.
        losses: See `likely_losses`.
        solver: For new cuts.
        mode: "take_over": as the module says. "spread": lost layers go to both neighbours in
            proportion to their speed (Asteroid). "recut": always a new cut (FTPipeHD).
    """
    hosted: dict[str, int] = {
        device.id: hosted_bytes(replicas, problem.profile, device.id, versions=held_versions)
        for device in problem.crowd.devices
    }
    work = _Work(problem=problem, plan=plan, replicas=replicas, hosted=hosted, solver=solver)
    return tuple(_answer(work, loss, mode) for loss in losses)


def programs_ahead(plans: Iterable[StandbyPlan]) -> dict[DeviceId, tuple[StageKey, ...]]:
    """Device -> all stages that it should have compiled, the likeliest loss first."""
    found: dict[DeviceId, dict[StageKey, None]] = {}
    for plan in sorted(plans, key=lambda p: (-p.probability, p.lost)):
        for device, key in plan.programs:
            found.setdefault(device, {})[key] = None
    return {device: tuple(keys) for device, keys in sorted(found.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    problem: PartitionProblem
    plan: PipelinePlan
    replicas: ReplicaPlan
    hosted: Mapping[str, int]
    solver: str | PartitionSolver

    def without(self, lost: Sequence[str], *, reserve: bool) -> PartitionProblem:
        """The problem of the survivors; `reserve`: hosted copies are taken off their memory.

        It also takes them off what compiling may use, which is on the safe side.
        """
        crowd = self.problem.crowd
        if reserve:
            crowd = replace(
                crowd,
                devices=tuple(
                    replace(d, memory_bytes=max(1, d.memory_bytes - self.hosted[d.id]))
                    for d in crowd.devices
                ),
            )
        return replace(
            self.problem,
            crowd=crowd,
            bans=(*self.problem.bans, *(d for d in lost if d not in self.problem.bans)),
            requires=tuple(d for d in self.problem.requires if d not in lost),
        )

    def faults(self, plan: PipelinePlan, lost: Sequence[str]) -> tuple[str, ...]:
        """What is wrong with a plan after a loss, memory with hosted copies included."""
        problem = self.without(lost, reserve=False)
        # Stages that were cut with fewer or more than asked for stay as good as they were.
        problem = replace(problem, min_stages=1, max_stages=None)
        found = list(plan_faults(problem, plan))
        for index, stage in enumerate(plan.stages):
            need = stage_need(
                problem.profile,
                plan,
                index,
                snapshots=problem.snapshots,
                log_steps=problem.log_steps,
                hosted_bytes=self.hosted[stage.device],
                compile_peak_bytes=problem.compile_peak_bytes,
            ).total_bytes
            has = problem.crowd.device(stage.device).memory_bytes
            if need > has:
                found.append(
                    f"{stage.device}: needs {format_bytes(need)} with the copies that it hosts, has"
                    f" {format_bytes(has)}"
                )
        return tuple(found)

    def holds(self, device: str, stage: Stage) -> bool:
        """Whether a device holds copies of all layers of a stage."""
        return all(device in self.replicas.holders_of(layer) for layer in stage.layers)

    def step_s(self, plan: PipelinePlan) -> float:
        return predict(self.problem.profile, self.problem.crowd, plan).step_s


def _answer(work: _Work, loss: Loss, mode: Mode) -> StandbyPlan:
    lost = loss.devices
    stages = [
        index for index, stage in enumerate(work.plan.stages) if set(stage.devices) & set(lost)
    ]
    if not stages:
        return _made(work, loss, "take_over", work.plan, "no stage was there; the plan stays")
    shared = any(stage.shares for stage in work.plan.stages)
    if mode != "recut" and not shared:
        if mode == "spread":
            plan = _spread(work, lost, stages)
            if plan is not None:
                return _made(work, loss, "spread", plan, "lost layers go to both neighbours")
        else:
            found = _same_cuts(work, lost, stages)
            if found is not None and not found[1]:
                names = ", ".join(found[2].devices[index] for index in stages)
                return _made(work, loss, "take_over", found[2], f"{names}: same cut")
            if found is not None:
                cut, _ = _recut(work, lost)
                if cut is None or work.step_s(found[2]) <= MERGE_SLOWER * work.step_s(cut):
                    why = "a neighbour holds the copy and takes the stage to its own"
                    return _made(work, loss, "merge", found[2], why)
                return _made(work, loss, "recut", cut, "a merge would be too slow")
    cut, why = _recut(work, lost)
    if cut is None:
        return StandbyPlan(
            lost=lost, probability=loss.probability, how="none", plan=None, step_s=None, moves=(),
            programs=(), why=why,
        )  # fmt: skip
    return _made(work, loss, "recut", cut, why)


def _same_cuts(
    work: _Work, lost: Sequence[str], stages: Sequence[int]
) -> tuple[float, int, PipelinePlan] | None:
    """Others in the places of the lost: fewest merges, most holders, then the shortest step.

    Returns (step seconds, merges, plan).
    """
    problem = work.problem
    spares = [
        device
        for device in sorted(problem.allowed_devices)
        if device not in work.plan.all_devices and device not in lost
    ]
    choices: list[list[str]] = []
    for index in stages:
        stage = work.plan.stages[index]

        def seconds(device: str, stage: Stage = stage) -> float:
            rows = problem.profile.layer_seconds(problem.crowd, device)
            return sum(rows[la].forward_s + rows[la].backward_s for la in stage.layers)

        ranked = sorted(spares, key=lambda d, s=stage: (not work.holds(d, s), seconds(d), d))
        neighbours = [
            work.plan.stages[near].device
            for near in (index - 1, index + 1)
            if 0 <= near < len(work.plan.stages) and near not in stages
        ]
        choices.append(ranked[:MOST_SPARES] + [d for d in neighbours if work.holds(d, stage)])
    best: tuple[tuple[int, int, float, tuple[str, ...]], PipelinePlan] | None = None
    for chosen in itertools.product(*choices):
        merges = sum(device in work.plan.devices for device in chosen)
        if len(set(chosen)) < len(chosen) and not merges:
            continue
        plan = _replaced(work.plan, dict(zip(stages, chosen, strict=True)))
        if plan is None or work.faults(plan, lost):
            continue
        others = sum(
            not work.holds(d, work.plan.stages[i]) for i, d in zip(stages, chosen, strict=True)
        )
        key = (merges, others, work.step_s(plan), chosen)
        if best is None or key < best[0]:
            best = (key, plan)
    return None if best is None else (best[0][2], best[0][0], best[1])


def _replaced(plan: PipelinePlan, takers: Mapping[int, str]) -> PipelinePlan | None:
    """The plan with other devices at some stages; neighbours of the same device become one."""
    made: list[Stage] = []
    for index, stage in enumerate(plan.stages):
        new = replace(stage, device=DeviceId(takers.get(index, stage.device)))
        if made and made[-1].device == new.device:
            kept = new if index not in takers else made[-1]  # how the survivor ran its own part
            made[-1] = replace(
                kept,
                first_layer=made[-1].first_layer,
                last_layer=new.last_layer,
                wire_dtype=new.wire_dtype,
            )
        else:
            made.append(new)
    if len({stage.device for stage in made}) < len(made):
        return None
    return replace(plan, stages=tuple(made))


def _spread(work: _Work, lost: Sequence[str], stages: Sequence[int]) -> PipelinePlan | None:
    """Lost layers to both neighbours in proportion to flops_per_s, cut where flops say."""
    crowd, profile = work.problem.crowd, work.problem.profile
    bounds = {i: (s.first_layer, s.last_layer) for i, s in enumerate(work.plan.stages)}
    kept = [i for i in bounds if i not in stages]
    if not kept:
        return None
    ends = {i: list(bounds[i]) for i in kept}
    for _, run in itertools.groupby(enumerate(stages), key=lambda pair: pair[1] - pair[0]):
        indices = [index for _, index in run]
        first, last = bounds[indices[0]][0], bounds[indices[-1]][1]
        before, after = indices[0] - 1, indices[-1] + 1
        if before < 0:
            ends[after][0] = first
        elif after >= len(bounds):
            ends[before][1] = last
        else:
            rates = [crowd.device(work.plan.stages[i].device).flops_per_s for i in (before, after)]
            flops = [
                layer.forward_flops + layer.backward_flops
                for layer in profile.layers[first : last + 1]
            ]
            goal = sum(flops) * rates[0] / sum(rates)
            count = min(range(len(flops) + 1), key=lambda n: (abs(sum(flops[:n]) - goal), n))
            ends[before][1] = first + count - 1
            ends[after][0] = first + count
    plan = replace(
        work.plan,
        stages=tuple(
            replace(work.plan.stages[i], first_layer=ends[i][0], last_layer=ends[i][1])
            for i in kept
        ),
    )
    plan = _last_cut_open(plan)
    return None if work.faults(plan, lost) else plan


def _last_cut_open(plan: PipelinePlan) -> PipelinePlan:
    """After the last stage there is no cut, so nothing that it casts to."""
    last = plan.stages[-1]
    if last.wire_dtype is None:
        return plan
    return replace(plan, stages=(*plan.stages[:-1], replace(last, wire_dtype=None)))


def _recut(work: _Work, lost: Sequence[str]) -> tuple[PipelinePlan | None, str]:
    try:
        plan = solve(work.without(lost, reserve=True), solver=work.solver).plan
    except (InfeasibleError, SolverError) as exc:
        return None, exc.message
    except CrowdMeshError as exc:  # a pin on a lost device, nobody left: no plan, and it is told
        return None, exc.message
    faults = work.faults(plan, lost)
    if faults:
        return None, "; ".join(faults)
    return plan, "cut anew over the survivors"


def _made(work: _Work, loss: Loss, how: How, plan: PipelinePlan, why: str) -> StandbyPlan:
    running = {
        (stage.device, stage_key(work.plan, index)) for index, stage in enumerate(work.plan.stages)
    }
    needed = [(stage.device, stage_key(plan, index)) for index, stage in enumerate(plan.stages)]
    moves = _moves(work, plan, loss.devices)
    bare = [f"{m.first_layer}-{m.last_layer}" for m in moves if m.source is None]
    if bare:
        why += f"; no copy of layers {', '.join(bare)} is left: all stages roll back"
    return StandbyPlan(
        lost=loss.devices,
        probability=loss.probability,
        how=how,
        plan=plan,
        step_s=work.step_s(plan),
        moves=moves,
        programs=tuple(item for item in needed if item not in running),
        why=why,
    )


def _moves(work: _Work, plan: PipelinePlan, lost: Sequence[str]) -> tuple[LayerMove, ...]:
    owner = {layer: stage.device for stage in work.plan.stages for layer in stage.layers}
    found: list[LayerMove] = []
    for stage in plan.stages:
        for layer in stage.layers:
            if owner[layer] == stage.device:
                continue
            source: DeviceId | None = owner[layer]
            if source in lost:
                holders = [h for h in work.replicas.holders_of(layer) if h not in lost]
                own = stage.device in holders
                source = stage.device if own else (holders[0] if holders else None)
            last = found[-1] if found else None
            if last is not None and (last.to, last.source, last.last_layer + 1) == (
                stage.device,
                source,
                layer,
            ):
                found[-1] = replace(last, last_layer=layer)
            else:
                found.append(
                    LayerMove(to=stage.device, first_layer=layer, last_layer=layer, source=source)
                )
    return tuple(found)
