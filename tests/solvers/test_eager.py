"""Cut, order and depth chosen together, against every choice there is on small problems."""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from partition_problems import chain_profile, problems, random_crowd, random_profile

from crowdmesh_jax.core import Crowd, CutTimes, StageTimes
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError
from crowdmesh_jax.solvers import PartitionProblem, plan_faults, solve, solve_exhaustive
from crowdmesh_jax.solvers.partition.eager import (
    EagerSolver,
    ShallowTables,
    depths_for,
    filling_depths,
    step_s,
)
from crowdmesh_jax.solvers.partition.simple import all_chains

ROOM = [99, 99]


def least_s(problem: PartitionProblem) -> float:
    """The shortest step over all chains and all depths that memory holds."""
    tables, best = ShallowTables(problem), float("inf")
    for chain in all_chains(tables):
        stages, cuts = tables.times(chain)
        caps = [min(problem.microbatches, tables.most_in_flight(s)) for s in chain]
        for depths in itertools.product(*(range(1, cap + 1) for cap in caps)):
            if all(a >= b for a, b in itertools.pairwise(depths)):
                best = min(best, step_s(stages, cuts, depths, problem.microbatches))
    return best


def test_on_small_problems_it_is_within_a_hair_of_every_choice_there_is():
    ratios = []
    for seed in range(40):
        rng = random.Random(seed)
        devices = ["d0", "d1", "d2"]
        problem = PartitionProblem(
            profile=replace(random_profile(rng, devices, 6), microbatches=4),
            crowd=random_crowd(rng, devices, 6),
            schedule="eager",
            compile_peak_bytes=0,
        )
        try:
            found = solve(problem, solver="eager")
        except InfeasibleError:
            assert least_s(problem) == float("inf")
            continue
        ratios.append(found.predicted.step_s / least_s(problem))
    assert len(ratios) > 25
    assert min(ratios) > 1 - 1e-9, "nothing is better than the best"
    assert max(ratios) < 1.05
    assert statistics.fmean(ratios) < 1.005


@given(problems(max_layers=7, max_devices=4, schedules=("eager",)))
@settings(max_examples=60)
def test_its_plans_keep_all_rules_and_it_finds_one_where_the_fixed_depths_do(problem):
    try:
        fixed = solve_exhaustive(problem)
    except InfeasibleError:
        fixed = None  # shallower depths may still fit
    try:
        found = solve(problem, solver="eager")
    except InfeasibleError:
        assert fixed is None
        return
    assert plan_faults(problem, found.plan) == ()


def test_it_is_rarely_worse_than_the_best_plan_with_fixed_depths():
    ratios = []
    for seed in range(60):
        rng = random.Random(1000 + seed)
        devices = ["d0", "d1", "d2", "d3"]
        problem = PartitionProblem(
            profile=random_profile(rng, devices, 6),
            crowd=random_crowd(rng, devices, 6),
            schedule="eager",
            recompute=rng.choice(["never", "auto"]),
            compile_peak_bytes=0,
        )
        try:
            fixed = solve_exhaustive(problem)
        except InfeasibleError:
            continue
        found = solve(problem, solver="eager")
        ratios.append(found.predicted.step_s / fixed.predicted.step_s)
    assert len(ratios) > 40
    assert statistics.median(ratios) <= 1.0
    assert sum(ratio > 1.01 for ratio in ratios) <= len(ratios) // 10


def test_a_round_trip_of_many_cycles_is_hidden_by_as_many_in_flight():
    stages = [StageTimes(forward_s=1.0, backward_s=2.0)] * 2
    cuts = [CutTimes(forward_latency_s=15.0, backward_latency_s=15.0)]
    # From stage 0 down and back: 3 + 30 + 3 seconds, 12 cycles of 3: 12 in flight.
    assert depths_for(stages, cuts, ROOM, 1.0) == (12, 1)
    steady = (step_s(stages, cuts, (12, 1), 60) - step_s(stages, cuts, (12, 1), 50)) / 10
    assert steady == pytest.approx(3.0)
    shallow = (step_s(stages, cuts, (3, 1), 60) - step_s(stages, cuts, (3, 1), 30)) / 30
    assert shallow == pytest.approx(36 / 3)


def test_forwards_last_until_the_first_gradient_is_back():
    stages = [StageTimes(forward_s=1.0, backward_s=2.0)] * 2
    # It is back after 1 s of the link each way and 3 s below: 5 more forwards.
    cuts = [CutTimes(forward_latency_s=1.0, backward_latency_s=1.0)]
    assert filling_depths(stages, cuts, ROOM) == (6, 1)


def test_memory_caps_depths_and_those_of_all_stages_after():
    stages = [StageTimes(forward_s=1.0, backward_s=2.0)] * 3
    cuts = [CutTimes(forward_latency_s=9.0, backward_latency_s=9.0)] * 2
    assert depths_for(stages, cuts, [2, 9, 9], 1.0) == (2, 2, 1)


def test_devices_too_small_for_the_fixed_depths_get_shallower_ones():
    profile = chain_profile(6, microbatches=8)
    crowd = Crowd.local((1.0, 1.0, 1.0), memory_bytes=13_000_000)
    problem = PartitionProblem(
        profile=profile, crowd=crowd, schedule="eager", compile_peak_bytes=0, min_stages=3
    )
    with pytest.raises(InfeasibleError):
        solve(problem, solver="ilp")
    found = solve(problem, solver="eager")
    assert plan_faults(problem, found.plan) == ()
    assert [stage.warmup for stage in found.plan.stages] == [3, 2, 1], "the rule wants 5, 3, 1"


def test_a_plan_does_not_depend_on_the_order_of_the_crowd():
    rng = random.Random(5)
    devices = [f"d{index}" for index in range(6)]
    crowd = random_crowd(rng, devices, 12)
    problem = PartitionProblem(
        profile=random_profile(rng, devices, 12), crowd=crowd, schedule="eager",
        compile_peak_bytes=0,
    )  # fmt: skip
    turned = replace(
        problem, crowd=replace(crowd, devices=crowd.devices[::-1], links=crowd.links[::-1])
    )
    assert solve(problem, solver="eager").plan == solve(turned, solver="eager").plan


def test_another_schedule_is_refused_with_what_to_use():
    problem = PartitionProblem(profile=chain_profile(4), crowd=Crowd.local())
    with pytest.raises(InvalidValueError, match=r"schedule='eager', or use solver 'ilp'"):
        solve(problem, solver="eager")
    with pytest.raises(InvalidValueError, match="time_limit_s must be > 0"):
        EagerSolver(time_limit_s=-1.0)
