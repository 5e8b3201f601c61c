"""A good plan within a budget: rivals compete, limits strike, nothing infeasible gets out."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from partition_problems import chain_profile, problems, random_crowd, random_profile

from crowdmesh_jax.core import Crowd
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError, UnknownSolverError
from crowdmesh_jax.solvers import PartitionProblem, plan_faults, solve, solve_exhaustive
from crowdmesh_jax.solvers.partition.auto import AutoSolver

CROWD = Crowd.local((1.0, 0.5, 0.001))


@given(problems(max_layers=6, max_devices=4))
@settings(max_examples=80)
def test_it_answers_every_small_problem_that_has_an_answer(problem):
    problem = replace(problem, objective="evaluate")
    try:
        best = solve_exhaustive(problem)
    except InfeasibleError:
        best = None
    try:
        found = solve(problem, solver="auto")
    except InfeasibleError:
        assert best is None
        return
    assert plan_faults(problem, found.plan) == ()
    if best is None:
        assert problem.schedule == "eager", "only shallower depths can fit where no chain does"


@pytest.mark.parametrize("schedule", ["1f1b", "eager", "gpipe"])
def test_on_small_problems_it_is_nearly_as_good_as_every_plan_there_is(schedule):
    ratios = []
    for seed in range(40):
        rng = random.Random(2000 + seed)
        devices = ["d0", "d1", "d2", "d3"]
        problem = PartitionProblem(
            profile=random_profile(rng, devices, 6),
            crowd=random_crowd(rng, devices, 6),
            schedule=schedule,
            compile_peak_bytes=0,
        )
        try:
            best = solve_exhaustive(problem)
        except InfeasibleError:
            continue
        found = solve(problem, solver="auto")
        ratios.append(found.predicted.step_s / best.predicted.step_s)
    assert len(ratios) > 25
    assert sum(ratio > 1.01 for ratio in ratios) <= len(ratios) // 10
    assert statistics.fmean(ratios) < 1.005


def test_a_plan_that_was_searched_to_the_end_is_proven():
    result = solve(PartitionProblem(profile=chain_profile(12), crowd=CROWD), solver="auto")
    assert (result.optimal, result.gap, result.solver) == (True, 0.0, "auto")


@pytest.mark.parametrize("schedule", ["1f1b", "eager"])
def test_no_time_at_all_still_leaves_a_plan(schedule):
    rng = random.Random(3)
    devices = [f"d{index}" for index in range(8)]
    problem = PartitionProblem(
        profile=random_profile(rng, devices, 30),
        crowd=random_crowd(rng, devices, 30),
        schedule=schedule,
        compile_peak_bytes=0,
    )
    result = solve(problem, solver="auto", budget_s=1e-6)
    assert not result.optimal
    assert plan_faults(problem, result.plan) == ()
    assert set(result.left_out.values()) <= {
        "no time was left to look for plans with it",
        "cannot hold any layer that it may run",
    }


def test_rivals_compete_and_the_winner_is_named():
    problem = PartitionProblem(profile=chain_profile(12), crowd=CROWD)
    own = solve(problem, solver="auto")
    both = solve(problem, solver="auto", also=("even", "single_best"))
    assert both.predicted.step_s <= own.predicted.step_s
    alone = replace(problem, profile=chain_profile(12), max_stages=1)
    assert solve(alone, solver="auto", also=("even",)).plan.devices == ("device-0",)


def test_wrong_options_are_told_at_once():
    problem = PartitionProblem(profile=chain_profile(4), crowd=CROWD)
    with pytest.raises(UnknownSolverError, match="did you mean 'even'"):
        solve(problem, solver="auto", also=("evn",))
    with pytest.raises(InvalidValueError, match="budget_s must be > 0"):
        AutoSolver(budget_s=0)
    with pytest.raises(InvalidValueError, match="'auto' itself"):
        AutoSolver(also=("auto",))


def test_a_problem_without_an_answer_says_why():
    tiny = Crowd.local((1.0, 1.0), memory_bytes=1000)
    for schedule in ("1f1b", "eager"):
        problem = PartitionProblem(profile=chain_profile(4), crowd=tiny, schedule=schedule)
        with pytest.raises(InfeasibleError, match="CM-203"):
            solve(problem, solver="auto", also=("even",))
