"""Solvers under half-duplex links and shared air: what they count, and what they do not claim."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_problems import problems, random_profile

from crowdmesh_jax.core import (
    Access,
    Crowd,
    Device,
    DeviceId,
    closed_form,
    cut_times,
    occupied_s,
    predict,
    stage_times,
)
from crowdmesh_jax.errors import InfeasibleError
from crowdmesh_jax.solvers import PartitionProblem, explain, plan_faults, solve
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Tables


def in_cells(seed: int, medium: str, num_layers: int = 5, devices: int = 4, **changes):
    """Devices of two cells, the second one slow; a few may have none."""
    rng = random.Random(seed)
    names = [f"d{index}" for index in range(devices)]
    crowd = Crowd(
        devices=tuple(
            Device(
                id=DeviceId(name),
                memory_bytes=10**9,
                access=Access(
                    uplink_bytes_per_s=rng.choice([2.0, 8.0]),
                    downlink_bytes_per_s=rng.choice([4.0, 16.0]),
                    latency_s=rng.choice([0.0, 0.25]),
                    cell=rng.choice(["x", "x", "y", ""]),
                ),
            )
            for name in names
        ),
        medium=medium,  # type: ignore[arg-type]
    )
    return PartitionProblem(
        profile=random_profile(rng, names, num_layers),
        crowd=crowd,
        compile_peak_bytes=0,
        **changes,
    )


def objective_s(result) -> float:
    predicted = result.predicted
    steady_s = (result.problem.microbatches - 1) * predicted.period_s
    return predicted.first_microbatch_s + steady_s


@settings(max_examples=25, deadline=None)
@given(problems(max_layers=5, max_devices=3, schedules=("1f1b", "eager", "gpipe")))
def test_under_half_duplex_the_proofs_hold_with_both_ways_added(problem):
    problem = dataclasses.replace(
        problem, crowd=dataclasses.replace(problem.crowd, medium="half_duplex")
    )
    try:
        best = solve(problem, solver="exhaustive")
    except InfeasibleError:
        return
    for name in ("ilp", "dp"):
        found = solve(problem, solver=name)
        assert found.optimal
        assert objective_s(found) == pytest.approx(objective_s(best), rel=1e-6)
    cuts = cut_times(problem.profile, problem.crowd, best.plan)
    for cut in cuts:
        both_s = cut.forward_transfer_s + cut.backward_transfer_s
        assert best.predicted.period_s >= both_s * (1 - 1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["half_duplex", "shared_cell"]))
def test_costs_are_those_of_core_under_every_medium(seed, medium):
    problem = in_cells(seed, medium, 4, 3)
    tables = Tables(problem)
    for chain in all_chains(tables):
        plan = tables.plan(chain)
        predicted = predict(problem.profile, problem.crowd, plan)
        assert tables.evaluate_s(chain) == pytest.approx(predicted.step_s, rel=1e-12)
        assert tables.period_s(chain) == pytest.approx(predicted.period_s, rel=1e-12)
        times = (stage_times(problem.profile, problem.crowd, plan),)
        cuts = cut_times(problem.profile, problem.crowd, plan)
        shared = occupied_s(cuts)
        _, period_s = closed_form("1f1b", problem.microbatches, *times, cuts)
        assert period_s >= max(shared.values(), default=0.0)
        for left, right in pairwise(chain):
            cut = tables.cut(left.device, right.device, right.first)
            assert cut is not None
            assert cut.busiest_s <= period_s * (1 + 1e-12)
            if medium == "half_duplex":  # what the programs' bound on T is made of
                assert cut.busiest_s == cut.down_s + cut.back_s


@pytest.mark.parametrize("solver", ["ilp", "dp", "auto", "exhaustive"])
def test_nothing_is_proven_where_cuts_share_a_cells_air(solver):
    for seed in (1, 2, 3):
        shared, half = in_cells(seed, "shared_cell"), in_cells(seed, "half_duplex")
        found = solve(shared, solver=solver)
        assert not found.optimal
        assert found.gap is None
        assert "nothing proven" in found.explain()
        assert plan_faults(shared, found.plan) == ()
        assert solve(half, solver=solver).optimal


def test_the_air_is_in_what_ranks_the_finished_plans():
    """Two orders alike but for who shares a cell: the one that meets less in the air wins."""
    base = in_cells(1, "shared_cell", 4, 4)
    rows = base.profile.seconds["d0"]
    layers = tuple(
        dataclasses.replace(layer, output_bytes=400, gradient_bytes=400, residual_bytes=0)
        for layer in base.profile.layers
    )
    profile = dataclasses.replace(
        base.profile,
        layers=layers,
        seconds=dict.fromkeys(("d0", "d1", "d2", "d3"), rows),
        microbatches=8,
    )
    devices = tuple(
        dataclasses.replace(
            device,
            access=Access(uplink_bytes_per_s=100.0, downlink_bytes_per_s=100.0, cell=cell),
        )
        for device, cell in zip(base.crowd.devices, ("x", "x", "", ""), strict=True)
    )
    crowd = dataclasses.replace(base.crowd, devices=devices)
    problem = dataclasses.replace(base, profile=profile, crowd=crowd, min_stages=2, max_stages=2)
    problem = dataclasses.replace(problem, schedule="eager")
    found = solve(problem, solver="exhaustive")
    assert found.plan.devices == ("d2", "d3")  # nobody hears them; lower ids would go first


def test_explain_says_whose_air_it_is_and_how_full():
    problem = in_cells(1, "shared_cell", 4, 4)
    layers = tuple(
        dataclasses.replace(layer, output_bytes=400, gradient_bytes=400)
        for layer in problem.profile.layers
    )
    profile = dataclasses.replace(problem.profile, layers=layers)
    devices = tuple(
        dataclasses.replace(d, access=dataclasses.replace(d.access, cell="hall"))
        for d in problem.crowd.devices
        if d.access is not None
    )
    crowd = dataclasses.replace(problem.crowd, devices=devices)
    slow = dataclasses.replace(problem, profile=profile, crowd=crowd, min_stages=2)
    found = solve(slow, solver="auto")
    told = explain(found.plan, profile, crowd, result=found)
    assert "bound by the air of cell hall" in told
    assert "medium: shared cell, of the step busy: cell hall " in told
    half = dataclasses.replace(slow, crowd=dataclasses.replace(crowd, medium="half_duplex"))
    told = solve(half, solver="auto").explain()
    assert ", both ways" in told
    wired = dataclasses.replace(slow, crowd=dataclasses.replace(crowd, medium="full_duplex"))
    assert "medium" not in solve(wired, solver="auto").explain()
