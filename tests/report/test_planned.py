"""The picture of a plan shows each part of a backward."""

from __future__ import annotations

import pytest

from crowdmesh_jax.core import (
    Crowd,
    LayerProfile,
    ModelProfile,
    PipelinePlan,
    predict,
)
from crowdmesh_jax.report.planned import draw_plan, plan_chart

LAYERS = tuple(
    LayerProfile(name=f"l{i}", forward_flops=1e7, backward_flops=2e7, parameter_bytes=8)
    for i in range(4)
)
PROFILE = ModelProfile(layers=LAYERS, microbatches=4, microbatch_size=2, input_bytes=8)


@pytest.mark.parametrize(("schedule", "weights"), [("1f1b", 0), ("zb-h1", 8)])
def test_weight_parts_have_bars_and_a_legend_of_their_own(schedule, weights):
    plan = PipelinePlan.even(4, ["device-0", "device-1"], microbatches=4, schedule=schedule)
    predicted = predict(PROFILE, Crowd.local((1.0, 1.0)), plan)
    chart = plan_chart(plan, predicted)
    found = [bar for bar in chart.bars if bar.role == "weight"]
    assert len(found) == weights
    assert (("weight", "weight gradients") in chart.legend) == (weights > 0)
    assert sum(bar.end - bar.start for bar in chart.bars) == pytest.approx(
        1e3 * sum(op.end_s - op.start_s for op in predicted.timeline.ops)
    )
    drawn = draw_plan(plan, predicted)
    assert drawn.count('class="fill-weight line-weight predicted"') == weights + (weights > 0)
    assert ("weight gradients of 3" in drawn) == (weights > 0)
