"""A good plan within a budget: rivals compete, limits strike, nothing infeasible gets out."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from partition_problems import chain_profile, problems, random_crowd, random_profile

from crowdmesh_jax.core import Crowd
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError, UnknownSolverError
from crowdmesh_jax.solvers import PartitionProblem, plan_faults, solve, solve_exhaustive
from crowdmesh_jax.solvers.partition import auto as auto_module
from crowdmesh_jax.solvers.partition.auto import AutoSolver
from crowdmesh_jax.solvers.partition.finish import finish

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


def stand_in(monkeypatch, **parts):
    for name, part in parts.items():
        monkeypatch.setattr(auto_module, name, part)


TWO = PartitionProblem(
    profile=chain_profile(6), crowd=Crowd.local((1.0, 0.9)), objective="closed_form"
)


def test_a_rival_with_the_shorter_step_wins(monkeypatch):
    poor = solve(replace(TWO, max_stages=1, devices=["device-1"]), solver="single_best")
    stand_in(monkeypatch, solve_without_sharing=lambda problem, budget_s: poor)
    assert solve(TWO, solver="auto").plan == poor.plan
    won = solve(TWO, solver="auto", also=("single_best", "even"))
    assert won.solver.startswith("auto/")
    assert won.predicted.step_s == min(
        solve(TWO, solver=name).predicted.step_s for name in ("single_best", "even")
    )


def test_rivals_answer_where_the_search_finds_nothing_and_may_refuse(monkeypatch):
    def nothing(problem, budget_s):
        raise InfeasibleError("none")

    # Solver "eager" refuses the schedule; that is no reason to fail.
    assert solve(TWO, solver="auto", also=("eager",)).solver == "auto"
    stand_in(monkeypatch, solve_without_sharing=nothing)
    assert solve(TWO, solver="auto", also=("eager", "even")).solver == "auto/even"
    with pytest.raises(InfeasibleError, match="none"):
        solve(TWO, solver="auto", also=("eager",))


@pytest.mark.parametrize("schedule", ["1f1b", "eager"])
def test_the_budget_is_split_between_the_search_and_the_rest(schedule, monkeypatch):
    asked = []

    def keep(problem, until_s, end_s):
        asked.append((until_s, end_s))

    stand_in(monkeypatch, solve_by_depths=keep, _solve_by_chains=keep)
    before_s = time.monotonic()
    auto_module.solve_without_sharing(replace(TWO, schedule=schedule), 100.0)
    after_s = time.monotonic()
    ((until_s, end_s),) = asked
    assert before_s + 75.0 <= until_s <= after_s + 75.0
    assert before_s + 100.0 <= end_s <= after_s + 100.0


def test_tables_that_are_too_large_are_left_alone_unless_nothing_else_is_found(monkeypatch):
    stand_in(monkeypatch, _TABLE_WORK=0.0)
    found = solve(TWO, solver="auto", budget_s=60.0)
    assert not found.optimal
    assert found.gap is None
    stand_in(monkeypatch, good_chains=lambda tables: [], single_chains=lambda tables: [])
    found = solve(TWO, solver="auto", budget_s=60.0)
    assert found.optimal
    assert len(found.plan.stages) == 2


def test_a_crowd_too_large_for_the_tables_is_searched_in_part(monkeypatch):
    poor = [solve(replace(TWO, max_stages=1), solver="single_best")]
    stand_in(monkeypatch, MOST_DEVICES=1, good_chains=lambda tables: [])
    found = solve(TWO, solver="auto", budget_s=60.0)
    assert found.predicted.step_s < poor[0].predicted.step_s * 0.9
    assert not found.optimal


def test_runners_up_of_the_closed_form_are_ranked_by_the_timeline(monkeypatch):
    ranked = []

    def keep(tables, chains, **options):
        ranked.append(len(chains))
        return finish(tables, chains, **options)

    stand_in(monkeypatch, finish=keep)
    crowd = Crowd.local((1.0, 0.9, 0.8))
    for objective in ("closed_form", "evaluate"):
        problem = PartitionProblem(profile=chain_profile(8), crowd=crowd, objective=objective)
        solve(problem, solver="auto", budget_s=60.0)
    assert ranked[1] > ranked[0]
