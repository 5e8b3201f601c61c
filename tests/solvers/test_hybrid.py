"""Stages shared by several devices: where that helps, by hand; rules and limits kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from partition_problems import chain_profile, problems

from crowdmesh_jax.core import Crowd, LayerProfile, LayerSeconds, ModelProfile
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError
from crowdmesh_jax.solvers import PartitionProblem, plan_faults, solve
from crowdmesh_jax.solvers.partition.hybrid import HybridSolver

HEAVY = LayerProfile(name="heavy", forward_flops=1.0, backward_flops=2.0, parameter_bytes=1_000)
CROWD = Crowd.local((1.0, 1.0), bandwidth_bytes_per_s=1e4, latency_s=0.01)


def one_layer(rows: int = 8, **layer) -> ModelProfile:
    """A chain that cannot be cut: 1 s forward and 2 s backward, half of that on device-0."""
    slow = (LayerSeconds(forward_s=1.0, backward_s=2.0),)
    return ModelProfile(
        layers=(replace(HEAVY, **layer),), microbatches=4, microbatch_size=rows, input_bytes=8,
        seconds={"device-0": (LayerSeconds(forward_s=0.5, backward_s=1.0),), "device-1": slow},
    )  # fmt: skip


@pytest.mark.parametrize("schedule", ["1f1b", "eager", "gpipe"])
def test_a_layer_that_cannot_be_cut_is_shared_by_rows(schedule):
    problem = PartitionProblem(
        profile=one_layer(), crowd=CROWD, schedule=schedule, share=True, compile_peak_bytes=0
    )
    found = solve(problem, solver="hybrid")
    (stage,) = found.plan.stages
    # 8 rows at speeds 2 : 1 are 5 and 3, so 5/8 of 1.5 s and 3/8 of 3 s; then a ring of two.
    assert [(share.device, share.rows) for share in stage.shares] == [
        ("device-0", 5),
        ("device-1", 3),
    ]
    ring_s = 2 * (500 / 1e4 + 0.01)
    assert found.predicted.step_s == pytest.approx(4 * max(5 / 8 * 1.5, 3 / 8 * 3.0) + ring_s)
    alone = solve(problem, solver="auto")
    assert alone.predicted.step_s == pytest.approx(4 * 1.5)


def test_layers_whose_state_mixes_rows_stay_whole():
    problem = PartitionProblem(
        profile=one_layer(state_bytes=4), crowd=CROWD, share=True, compile_peak_bytes=0
    )
    assert solve(problem, solver="hybrid").plan.stages[0].shares == ()


def test_a_row_cannot_be_split():
    problem = PartitionProblem(
        profile=one_layer(rows=1), crowd=CROWD, share=True, compile_peak_bytes=0
    )
    assert solve(problem, solver="hybrid").plan.stages[0].shares == ()


def test_sharing_that_was_not_asked_for_is_refused():
    problem = PartitionProblem(profile=chain_profile(4), crowd=CROWD)
    with pytest.raises(InvalidValueError, match=r"share=True, or use solver 'auto'"):
        solve(problem, solver="hybrid")
    with pytest.raises(InvalidValueError, match="time_limit_s must be > 0"):
        HybridSolver(time_limit_s=0.0)


@given(problems(max_layers=6, max_devices=4))
@settings(max_examples=60)
def test_its_plans_keep_all_rules_and_are_no_worse_than_without_sharing(problem):
    shared = replace(problem, share=True, profile=replace(problem.profile, microbatch_size=8))
    try:
        whole = solve(shared, solver="auto")
    except InfeasibleError:
        whole = None
    try:
        found = solve(shared, solver="hybrid")
    except InfeasibleError:
        assert whole is None
        return
    assert plan_faults(shared, found.plan) == ()
    event(f"shared: {any(stage.shares for stage in found.plan.stages)}")
    if whole is not None:
        assert found.predicted.step_s <= whole.predicted.step_s * (1 + 1e-9)
