"""What a step should take, from stage times that each device measured alone.

The same schedule and `evaluate` as the planner's; only the seconds come from the devices and the
bytes from the programs' own boundaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..core import Crowd, CutTimes, PipelinePlan, StageTimes, Timeline, evaluate, schedule_for
from ..programs.manifest import LeafSpec, StageManifest

Seconds = Mapping[str, Mapping[str, float]]


def leaf_bytes(leaves: Sequence[LeafSpec]) -> int:
    """Bytes of boundary leaves as they travel."""
    return sum(int(np.prod(leaf.shape)) * _item_bytes(leaf.dtype) for leaf in leaves)


def _item_bytes(dtype: str) -> int:
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype)).itemsize


def stage_times(seconds: Mapping[str, float], is_last: bool) -> StageTimes:
    """A stage's times from those of its programs."""
    backward_s = seconds.get("loss_backward", 0.0) if is_last else seconds.get("backward", 0.0)
    return StageTimes(
        forward_s=0.0 if is_last else seconds.get("forward", 0.0),
        backward_s=backward_s,
        update_s=seconds.get("update", 0.0),
        reduce_s=sum(seconds.get(name, 0.0) for name in ("merge", "scalars", "reduce")),
    )


def predict_timeline(
    plan: PipelinePlan, manifests: Sequence[StageManifest], crowd: Crowd, seconds: Seconds
) -> Timeline:
    """The exact timeline of a step with these program times."""
    stages = [
        stage_times(seconds.get(stage.device, {}), index == len(plan.stages) - 1)
        for index, stage in enumerate(plan.stages)
    ]
    cuts = []
    for index in range(len(plan.stages) - 1):
        upper, lower = plan.stages[index].device, plan.stages[index + 1].device
        down, back = crowd.link(upper, lower), crowd.link(lower, upper)
        assert down is not None, "the plan was checked against the crowd"
        assert back is not None, "the plan was checked against the crowd"
        down_bytes = leaf_bytes(manifests[index].boundary_out)
        back_bytes = leaf_bytes(manifests[index].gradient_in)
        cuts.append(
            CutTimes(
                forward_latency_s=down.latency_s,
                forward_transfer_s=down_bytes / down.bandwidth_bytes_per_s,
                backward_latency_s=back.latency_s,
                backward_transfer_s=back_bytes / back.bandwidth_bytes_per_s,
            )
        )
    return evaluate(schedule_for(plan), stages, cuts)
