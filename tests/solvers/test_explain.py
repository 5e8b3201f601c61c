"""What `explain` says about a plan."""

from __future__ import annotations

import re

import pytest
from partition_problems import chain_profile

from crowdmesh_jax.core import Crowd, PipelinePlan, predict
from crowdmesh_jax.solvers import PartitionProblem, explain, solve
from crowdmesh_jax.solvers.units import format_bytes, format_bytes_of, format_seconds

CROWD = Crowd.local((1.0, 0.5, 0.001))
PROFILE = chain_profile(12)


def test_the_step_time_comes_first_and_adds_up():
    result = solve(PartitionProblem(profile=PROFILE, crowd=CROWD))
    first = result.explain().splitlines()[0]
    predicted = result.predicted
    assert first.startswith(f"step {format_seconds(predicted.step_s)}")
    assert f"first microbatch {format_seconds(predicted.first_microbatch_s)}" in first
    assert f"7 x {format_seconds(predicted.period_s)}" in first
    assert "bound by" in first


def test_each_stage_has_a_row_with_its_layers_and_memory():
    result = solve(PartitionProblem(profile=PROFILE, crowd=CROWD))
    lines = result.explain().splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("stage"))
    for index, stage in enumerate(result.plan.stages):
        row = lines[header + 1 + index]
        assert re.match(rf"{index} +{stage.device} +{stage.first_layer}-{stage.last_layer} ", row)
        assert re.search(r"\d MB / 4\.3 GB", row)
        assert PROFILE.layers[stage.first_layer].name in row


def test_it_says_who_is_left_out_and_what_leaves_whom():
    text = solve(PartitionProblem(profile=PROFILE, crowd=CROWD)).explain(note="one more thing")
    assert re.search(r"left out: device-2 \(best plan found with it: [\d.]+ ", text)
    assert re.search(r"data: device-\d sees the inputs, device-\d the targets", text)
    assert "optimum proven" in text
    assert text.splitlines()[-1] == "one more thing"


def test_a_plan_of_no_solver_is_explained_too():
    plan = PipelinePlan.even(12, ["device-1", "device-0"], microbatches=8, schedule="gpipe")
    text = explain(plan, PROFILE, CROWD)
    assert "left out: device-2" in text
    assert "solver:" not in text


def test_a_single_stage_keeps_its_data():
    plan = PipelinePlan.even(12, ["device-0"], microbatches=8)
    assert "nothing leaves it" in explain(plan, PROFILE, CROWD)


def test_it_says_what_the_best_device_would_take_alone():
    result = solve(PartitionProblem(profile=PROFILE, crowd=CROWD))
    alone = predict(PROFILE, CROWD, PipelinePlan.even(12, ["device-0"], microbatches=8)).step_s
    ratio = alone / result.predicted.step_s
    line = f"alone: device-0 would take {format_seconds(alone)} a step, {ratio:.2f} times this plan"
    assert line in result.explain().splitlines()
    plan = PipelinePlan.even(12, ["device-0"], microbatches=8)
    assert "alone:" not in explain(plan, PROFILE, CROWD)


def test_it_says_when_no_device_can_hold_the_model_alone():
    small = Crowd.local((1.0, 1.0), memory_bytes=1000)
    plan = PipelinePlan.even(12, ["device-0", "device-1"], microbatches=8)
    assert "alone: no device can hold the whole model" in explain(plan, PROFILE, small)


def test_a_slow_link_is_named_as_the_bound():
    slow = Crowd.local((1.0, 1.0), bandwidth_bytes_per_s=2e5)
    plan = PipelinePlan.even(12, ["device-0", "device-1"], microbatches=8, schedule="eager")
    assert "bound by the link device-0 - device-1" in explain(plan, PROFILE, slow).splitlines()[0]


@pytest.mark.parametrize(
    ("size", "text"),
    [(5, "5 B"), (2_000, "2 kB"), (9_900_000, "9.9 MB"), (412e6, "412 MB"), (4.29e9, "4.3 GB")],
)
def test_bytes_read_well(size, text):
    assert format_bytes(size) == text


def test_used_and_limit_share_a_unit():
    assert format_bytes_of(212e6, 900e6) == "212 / 900 MB"
    assert format_bytes_of(15e6, 4.3e9) == "15.0 MB / 4.3 GB"


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.24, "1.24 s"), (0.088, "88 ms"), (0.0031, "3.1 ms"), (4.5e-5, "45 us")]
)
def test_seconds_read_well(seconds, text):
    assert format_seconds(seconds) == text


def test_devices_left_out_for_one_reason_share_a_line():
    crowd = Crowd.local((1.0,) + (0.001,) * 8)
    found = solve(PartitionProblem(profile=chain_profile(3), crowd=crowd), solver="single_best")
    line = next(ln for ln in found.explain().splitlines() if ln.startswith("left out:"))
    assert line.startswith("left out: device-1, device-2, device-3, device-4 and 4 more")
    assert "device-5" not in line
