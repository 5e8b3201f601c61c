"""Judges a finished plan against its problem, apart from the tables that solvers search in.

Every plan that leaves a solver passes here, third-party solvers included. It reads the plan, the
profile and the crowd through `core` alone, and knows no search.
"""

from __future__ import annotations

from ..core import PipelinePlan, schedule_for, stage_memory
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
    unknown = [device for device in plan.devices if device not in known]
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
        if device not in plan.devices
    ]
    schedule = schedule_for(plan)
    for index, stage in enumerate(plan.stages):
        who = f"stage {index} ({stage.device})"
        if stage.device not in problem.allowed_devices:
            faults.append(f"{who}: the device may not be used")
        for layer in stage.layers:
            if not problem.allows(stage.device, layer):
                faults.append(
                    f"{who}: layer {layer} {profile.layers[layer].name!r} may not run there"
                )
        if problem.recompute == "never" and stage.recompute:
            faults.append(f"{who}: recomputes, which is not allowed")
        memory = stage_memory(
            profile,
            stage,
            stage_index=index,
            num_stages=count,
            in_flight=schedule.max_in_flight(index),
            snapshots=problem.snapshots,
            log_steps=problem.log_steps,
            compile_peak_bytes=problem.compile_peak_bytes,
        )
        limit = crowd.device(stage.device).memory_bytes
        if memory.total_bytes > limit:
            faults.append(
                f"{who}: needs {format_bytes(memory.total_bytes)}, has {format_bytes(limit)}"
            )
    for left, right in zip(plan.stages, plan.stages[1:], strict=False):
        for source, target in ((left.device, right.device), (right.device, left.device)):
            if crowd.link(source, target) is None:
                faults.append(f"no link {source!r} -> {target!r}")
    return tuple(faults)


def check_plan(problem: PartitionProblem, plan: PipelinePlan) -> None:
    """Refuses a plan that does not answer its problem.

    Raises:
        InvalidPlanError: Says everything that is wrong.
    """
    faults = plan_faults(problem, plan)
    if faults:
        raise InvalidPlanError("the plan does not answer the problem: " + "; ".join(faults))
