"""What a step should take, from stage times and hops that each device measured alone.

The same schedule and `evaluate` as the planner's; only the seconds come from the devices and the
bytes from the programs' own boundaries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..core import (
    Crowd,
    CutTimes,
    PipelinePlan,
    Prediction,
    StageTimes,
    Timeline,
    evaluate,
    pair_times,
    schedule_for,
)
from ..programs.manifest import LeafSpec, StageManifest
from ..protocol.common import ROUND_TRIP
from ..record import RunPrediction

Seconds = Mapping[str, Mapping[str, float]]


def leaf_bytes(leaves: Sequence[LeafSpec]) -> int:
    """Bytes of boundary leaves as they travel."""
    return sum(leaf.size_bytes for leaf in leaves)


def stage_times(seconds: Mapping[str, float], is_last: bool) -> StageTimes:
    """A stage's times from those of its programs."""
    backward_s = seconds.get("loss_backward", 0.0) if is_last else seconds.get("backward", 0.0)
    return StageTimes(
        forward_s=0.0 if is_last else seconds.get("forward", 0.0),
        backward_s=backward_s,
        update_s=seconds.get("update", 0.0),
        reduce_s=sum(seconds.get(name, 0.0) for name in ("merge", "scalars", "reduce")),
    )


def predict_run(
    plan: PipelinePlan,
    manifests: Sequence[StageManifest],
    crowd: Crowd,
    seconds: Seconds,
    planned: Prediction | None = None,
) -> tuple[RunPrediction, Timeline]:
    """What to expect of a run whose programs and hops take these times alone.

    Args:
        planned: The planner's own prediction, for its memory and step time.
    """
    stages = [
        stage_times(seconds.get(stage.device, {}), index == len(plan.stages) - 1)
        for index, stage in enumerate(plan.stages)
    ]
    cuts = []
    for index in range(len(plan.stages) - 1):
        upper, lower = plan.stages[index].device, plan.stages[index + 1].device
        cut = pair_times(
            crowd,
            [(upper, lower)],
            leaf_bytes(manifests[index].boundary_out),
            leaf_bytes(manifests[index].gradient_in),
        )
        round_trip_s = seconds.get(upper, {}).get(ROUND_TRIP)
        cuts.append(cut if round_trip_s is None else with_round_trip(cut, round_trip_s))
    timeline = evaluate(schedule_for(plan), stages, cuts)
    prediction = RunPrediction(
        stages=tuple(stages),
        cuts=tuple(cuts),
        step_s=timeline.step_s,
        memory={stage.device: stage.memory for stage in planned.stages} if planned else {},
        planned_step_s=planned.step_s if planned else None,
    )
    return prediction, timeline


def with_round_trip(cut: CutTimes, round_trip_s: float) -> CutTimes:
    """The cut with the latencies that explain a measured round trip of one microbatch.

    The transfers stay as they are: what a link's rate does not explain (sockets, threads, the event
    loop) delays a frame, but mostly lets the next one follow at once.
    """
    extra_s = (round_trip_s - cut.round_trip_s) / 2
    return dataclasses.replace(
        cut,
        forward_latency_s=max(0.0, cut.forward_latency_s + extra_s),
        backward_latency_s=max(0.0, cut.backward_latency_s + extra_s),
    )
