"""Judges a finished plan against its problem, apart from the tables that solvers search in.

Every plan that leaves a solver passes here, third-party solvers included. It reads the plan, the
profile and the crowd through `core` alone, and knows no search.
"""

from __future__ import annotations

from itertools import pairwise, permutations

from ..core import PipelinePlan, Stage, schedule_for, stage_memory
from ..errors import InvalidPlanError
from .problem import PartitionProblem
from .units import format_bytes


def plan_faults(problem: PartitionProblem, plan: PipelinePlan) -> tuple[str, ...]:
    """What is wrong with a plan as an answer to a problem; empty where nothing is."""
    profile, crowd = problem.profile, problem.crowd
    faults = []
    if plan.num_layers != len(profile.layers):
        return (f"it cuts {plan.num_layers} layers, the profile has {len(profile.layers)}",)
    if plan.microbatches != profile.microbatches:
        faults.append(
            f"it is for {plan.microbatches} microbatches, the profile for {profile.microbatches}"
        )
    if plan.schedule != problem.schedule:
        faults.append(f"its schedule is {plan.schedule!r}, asked for {problem.schedule!r}")
    known = {device.id for device in crowd.devices}
    unknown = [device for device in plan.all_devices if device not in known]
    if unknown:
        return (*faults, f"device {unknown[0]!r} is not in the crowd")
    count = len(plan.stages)
    if count < problem.min_stages:
        faults.append(f"{count} stages, at least {problem.min_stages} asked for")
    if problem.max_stages is not None and count > problem.max_stages:
        faults.append(f"{count} stages, at most {problem.max_stages} asked for")
    faults += [
        f"device {device!r} must have a stage and has none"
        for device in problem.requires
        if device not in plan.all_devices
    ]
    schedule = schedule_for(plan)
    for index, stage in enumerate(plan.stages):
        who = f"stage {index} ({stage.device})"
        for device in stage.devices:
            at = who if device == stage.device else f"{who}, shared by {device}"
            if device not in problem.allowed_devices:
                faults.append(f"{at}: the device may not be used")
            for layer in stage.layers:
                if not problem.allows(device, layer):
                    faults.append(
                        f"{at}: layer {layer} {profile.layers[layer].name!r} may not run there"
                    )
        if stage.shares:
            faults += _sharing_faults(problem, who, stage)
        if problem.wire_dtype is None and stage.wire_dtype is not None:
            faults.append(f"{who}: its cut casts to {stage.wire_dtype}, which was not asked for")
        if problem.recompute == "never" and stage.recompute:
            faults.append(f"{who}: recomputes, which is not allowed")
        rows = sum(share.rows for share in stage.shares)
        shares = [(s.device, s.rows / rows) for s in stage.shares] or [(stage.device, 1.0)]
        for device, share in shares:
            memory = stage_memory(
                profile,
                stage,
                stage_index=index,
                num_stages=count,
                in_flight=schedule.max_in_flight(index),
                awaiting_weight=schedule.max_awaiting_weight(index),
                snapshots=problem.snapshots,
                log_steps=problem.log_steps,
                compile_peak_bytes=problem.compile_peak_bytes,
                rows_share=share,
            )
            limit = crowd.device(device).memory_bytes
            if memory.total_bytes > limit:
                at = who if device == stage.device else f"{who}, shared by {device}"
                faults.append(
                    f"{at}: needs {format_bytes(memory.total_bytes)}, has {format_bytes(limit)}"
                )
    pairs = [(a, b) for stage in plan.stages for a, b in permutations(stage.devices, 2)]
    for left, right in pairwise(plan.stages):
        pairs += [pair for a in left.devices for b in right.devices for pair in ((a, b), (b, a))]
    faults += [f"no link {a!r} -> {b!r}" for a, b in pairs if crowd.link(a, b) is None]
    return tuple(faults)


def _sharing_faults(problem: PartitionProblem, who: str, stage: Stage) -> list[str]:
    faults = []
    if not problem.share:
        faults.append(f"{who}: is shared, which was not asked for")
    rows = sum(share.rows for share in stage.shares)
    if rows != problem.profile.microbatch_size:
        faults.append(
            f"{who}: shares {rows} rows, a microbatch has {problem.profile.microbatch_size}"
        )
    # BatchNorm and the like take statistics over the rows that they see.
    mixing = [
        problem.profile.layers[layer].name
        for layer in stage.layers
        if problem.profile.layers[layer].state_bytes
    ]
    if mixing:
        faults.append(f"{who}: layer {mixing[0]!r} has state over all rows and cannot be shared")
    return faults


def check_plan(problem: PartitionProblem, plan: PipelinePlan) -> None:
    """Refuses a plan that does not answer its problem.

    Raises:
        InvalidPlanError: Says everything that is wrong.
    """
    faults = plan_faults(problem, plan)
    if faults:
        raise InvalidPlanError("the plan does not answer the problem: " + "; ".join(faults))
