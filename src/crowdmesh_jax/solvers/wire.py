"""Which cuts of a finished plan cast what they send: all, or those where it shortens the step.

The same for every solver, those of other packages included: solvers that know nothing of casts
choose the cut, and this room's `solve` decides on the cast afterwards. It knows no search.
"""

from __future__ import annotations

from dataclasses import replace

from ..core import (
    PipelinePlan,
    WireDtype,
    cut_times,
    evaluate_step_s,
    predict,
    schedule_for,
    stage_times,
)
from .problem import WIRE_GAIN, PartitionProblem, PartitionResult
from .units import format_seconds


def with_wire(plan: PipelinePlan, cuts: frozenset[int], dtype: WireDtype) -> PipelinePlan:
    """The plan with a cast on these cuts alone; cut `i` lies after stage `i`."""
    stages = tuple(
        replace(stage, wire_dtype=dtype if index in cuts else None)
        for index, stage in enumerate(plan.stages)
    )
    return replace(plan, stages=stages)


def decide_wire(problem: PartitionProblem, result: PartitionResult) -> PartitionResult:
    """Puts the casts on a result's plan that the problem asks for.

    "auto": if casts on all cuts make the step shorter by `WIRE_GAIN` of what it takes without any,
    they are taken away again one by one, the one that is missed least first, while the step stays
    within `WIRE_GAIN` of that with all. So each cast that stays is needed for that. O(S^2)
    timelines; greedy: no set of casts is proven to be the smallest. What was proven of the plan
    was proven without casts, so nothing is claimed of a plan that "auto" gave any.
    """
    if problem.wire_dtype is None or len(result.plan.stages) == 1:
        return result
    plan, profile, crowd = result.plan, problem.profile, problem.crowd
    schedule, times = schedule_for(plan), stage_times(profile, crowd, plan)
    dtype: WireDtype = "bfloat16"
    every = frozenset(range(len(plan.stages) - 1))

    def step_s(cuts: frozenset[int]) -> float:
        made = with_wire(plan, cuts, dtype)
        return evaluate_step_s(schedule, times, cut_times(profile, crowd, made))

    chosen, plain_s, all_s = every, step_s(frozenset()), step_s(every)
    if problem.wire_dtype == "auto":
        slack_s = WIRE_GAIN * plain_s
        if plain_s - all_s < slack_s or plain_s == 0:
            chosen = frozenset()
        while chosen:
            least_s, cut = min((step_s(chosen - {cut}), cut) for cut in chosen)
            if least_s - all_s >= slack_s:
                break
            chosen = chosen - {cut}
    made = with_wire(plan, chosen, dtype)
    if made == plan:
        return result
    note = (
        f"{dtype} on the wire of {_cuts(plan, chosen)}: {format_seconds(step_s(chosen))} a step"
        f" instead of {format_seconds(plain_s)}"
    )
    return replace(
        result,
        plan=made,
        predicted=predict(profile, crowd, made, compile_peak_bytes=problem.compile_peak_bytes),
        notes=(*result.notes, note),
        optimal=result.optimal and problem.wire_dtype != "auto",
        gap=None if problem.wire_dtype == "auto" else result.gap,
    )


def _cuts(plan: PipelinePlan, cuts: frozenset[int]) -> str:
    if len(cuts) == len(plan.stages) - 1:
        return "all cuts"
    pairs = (f"{plan.stages[i].device} - {plan.stages[i + 1].device}" for i in sorted(cuts))
    return ", ".join(pairs)
