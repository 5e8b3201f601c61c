"""The partition ILP against every plan there is, with both backends."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from partition_problems import chain_profile, problems, random_crowd, random_profile

from crowdmesh_jax.core import Crowd, DefaultLink
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError, SolverError
from crowdmesh_jax.solvers import (
    IlpSolver,
    PartitionProblem,
    available_backends,
    plan_faults,
    solve,
    solve_exhaustive,
    solve_ilp,
)
from crowdmesh_jax.solvers.backends import solve_mip
from crowdmesh_jax.solvers.partition.arrays import Costs
from crowdmesh_jax.solvers.partition.bounds import bounds_at
from crowdmesh_jax.solvers.partition.ilp import (
    _largest_period_s,
    _whole_program,
    least_period_s,
)
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Tables

HAS_CBC = "cbc" in available_backends()
needs_cbc = pytest.mark.skipif(not HAS_CBC, reason="this PuLP brings no CBC")


def cost_s(result) -> float:
    """R_0 + (M - 1) T of a plan, from the prediction."""
    predicted = result.predicted
    return predicted.first_microbatch_s + (result.problem.microbatches - 1) * Tables(
        result.problem
    ).period_s(_chain(result))


def _chain(result):
    tables = Tables(result.problem)
    chain = tables.chain(
        [(tables.devices.index(s.device), s.last_layer + 1) for s in result.plan.stages]
    )
    assert chain is not None
    return chain


def all_different(problem: PartitionProblem) -> PartitionProblem:
    """No two devices alike, so that no order among alike ones rules a chain out."""
    devices = tuple(
        replace(device, memory_bytes=device.memory_bytes + index)
        for index, device in enumerate(problem.crowd.devices)
    )
    return replace(problem, crowd=replace(problem.crowd, devices=devices))


def price_s(problem: PartitionProblem, chain) -> float:
    """What the program says that a chain costs: its optimum with nothing else allowed."""
    program = _whole_program(Tables(problem))
    for column, segment in zip(program.z, program.segments, strict=True):
        program.mip.row([(column, 1.0)], "==", float(segment in chain))
    outcome = solve_mip(program.mip)
    assert outcome.status == "optimal"
    terms = zip(program.mip.costs, outcome.values, strict=True)
    return sum(cost * value for cost, value in terms) * program.unit_s


def agree(problem: PartitionProblem, solver: IlpSolver) -> None:
    try:
        best = solve_exhaustive(problem)
    except InfeasibleError:
        event("infeasible")
        with pytest.raises(InfeasibleError, match=r"CM-203"):
            solver.solve(problem)
        return
    event(f"{len(best.plan.stages)} stages")
    found = solver.solve(problem)
    assert found.optimal
    assert found.gap == 0
    assert cost_s(found) == pytest.approx(cost_s(best), rel=1e-6)
    assert plan_faults(problem, found.plan) == ()


@given(problems())
@settings(max_examples=60)
def test_the_program_alone_finds_the_optimum_or_proves_there_is_none(problem):
    agree(problem, IlpSolver(backend="highs", presolve=False))


@needs_cbc
@given(problems())
@settings(max_examples=50)
def test_cbc_finds_the_optimum_or_proves_there_is_none(problem):
    agree(problem, IlpSolver(backend="cbc", presolve=False))


@given(problems(max_layers=6, max_devices=4, rules=False), st.randoms(use_true_random=True))
@settings(max_examples=80)
def test_the_program_prices_every_chain_as_the_tables_do(problem, rng):
    chains = sorted(all_chains(Tables(all_different(problem))), key=len)
    assume(chains)
    longest = [chain for chain in chains if len(chain) == len(chains[-1])]
    chain = rng.choice(rng.choice([chains, longest]))
    event(f"{len(chain)} stages")
    assert price_s(all_different(problem), chain) == pytest.approx(
        Tables(problem).cost_s(chain), rel=1e-6
    )


@pytest.mark.parametrize("schedule", ["1f1b", "eager", "gpipe"])
def test_the_program_and_the_bounds_know_what_slow_links_cost(schedule):
    rng = random.Random(0)
    devices = ["d0", "d1", "d2", "d3"]
    for _ in range(20):
        profile = random_profile(rng, devices, 4)
        crowd = random_crowd(rng, devices, 4)
        slow = replace(
            crowd,
            devices=tuple(replace(device, memory_bytes=10_000) for device in crowd.devices),
            links=tuple(
                replace(link, bandwidth_bytes_per_s=rng.choice([0.2, 1.0])) for link in crowd.links
            ),
            default_link=DefaultLink(bandwidth_bytes_per_s=0.5, latency_s=2.0),
        )
        problem = all_different(
            PartitionProblem(
                profile=profile, crowd=slow, schedule=schedule, compile_peak_bytes=0, min_stages=3
            )
        )
        tables = Tables(problem)
        chain = rng.choice(list(all_chains(tables)))
        assert price_s(problem, chain) == pytest.approx(tables.cost_s(chain), rel=1e-6)
        bounds = bounds_at(Costs(tables), tables.period_s(chain))
        assert bounds.least_s <= tables.first_microbatch_s(chain) * (1 + 1e-9)
        for segment in chain:
            least_s = bounds.segment_s[segment.device, segment.first, segment.end]
            assert least_s <= tables.first_microbatch_s(chain) * (1 + 1e-9)


@given(problems(max_layers=6, max_devices=4))
@settings(max_examples=60)
def test_presolve_keeps_the_optimum(problem):
    agree(problem, IlpSolver())


@needs_cbc
@given(problems())
@settings(max_examples=30)
def test_presolve_keeps_the_optimum_with_cbc(problem):
    agree(problem, IlpSolver(backend="cbc"))


@given(problems(max_layers=5, objective="evaluate", updates=True))
@settings(max_examples=40)
def test_ranking_by_evaluate_beats_the_closed_form_optimum_and_not_the_exhaustive_one(problem):
    try:
        best = solve_exhaustive(problem)
    except InfeasibleError:
        assume(False)
    closed = solve_exhaustive(replace(problem, objective="closed_form"))
    step_s = solve_ilp(problem).predicted.step_s
    assert best.predicted.step_s * (1 - 1e-9) <= step_s
    assert step_s <= closed.predicted.step_s * (1 + 1e-9)


def test_ranking_by_evaluate_gains_where_the_closed_form_is_loose():
    gains, lost = 0, 0
    for seed in range(60):
        rng = random.Random(seed)
        devices = ["d0", "d1", "d2"]
        problem = PartitionProblem(
            profile=random_profile(rng, devices, 5),
            crowd=random_crowd(rng, devices, 5),
            compile_peak_bytes=0,
        )
        try:
            best_s = solve_exhaustive(problem).predicted.step_s * (1 + 1e-9)
        except InfeasibleError:
            continue
        closed = solve_exhaustive(replace(problem, objective="closed_form"))
        gains += closed.predicted.step_s > best_s
        lost += solve_ilp(problem).predicted.step_s > best_s
    assert gains >= 5
    assert lost <= gains // 4


@given(problems(max_layers=5, max_devices=4, rules=False), st.data())
@settings(max_examples=30)
def test_the_order_of_the_crowd_changes_nothing(problem, data):
    crowd = problem.crowd
    shuffled = replace(
        crowd,
        devices=tuple(data.draw(st.permutations(crowd.devices))),
        links=tuple(data.draw(st.permutations(crowd.links))),
    )
    try:
        plan = solve_ilp(problem).plan
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            solve_ilp(replace(problem, crowd=shuffled))
        return
    assert solve_ilp(replace(problem, crowd=shuffled)).plan == plan


@given(problems(max_layers=5, rules=False), st.floats(0.1, 1.5))
@settings(max_examples=60)
def test_bounds_are_below_every_chain_within_the_period(problem, share):
    tables = Tables(problem)
    chains = list(all_chains(tables))
    assume(chains)
    periods = [tables.period_s(chain) for chain in chains]
    assert least_period_s(tables) <= min(periods)
    assert max(periods) <= _largest_period_s(tables)
    period_s = share * max(periods)
    bounds = bounds_at(Costs(tables), period_s)
    for chain, own_s in zip(chains, periods, strict=True):
        if own_s > period_s:
            continue
        first_s = tables.first_microbatch_s(chain) * (1 + 1e-9)
        assert bounds.least_s <= first_s
        for segment in chain:
            assert bounds.segment_s[segment.device, segment.first, segment.end] <= first_s
        for left, right in pairwise(chain):
            assert bounds.link_s[left.device, right.device, right.first] <= first_s


@given(problems(max_layers=5, rules=False))
@settings(max_examples=30)
def test_bounds_without_device_sets_are_weaker_but_hold(problem):
    from crowdmesh_jax.solvers.partition import bounds as module

    tables = Tables(problem)
    costs = Costs(tables)
    strong = bounds_at(costs, math.inf)
    weak = module._with_returns(costs, math.inf, costs.compute, costs.round_trip)
    assert weak.least_s <= strong.least_s * (1 + 1e-9)
    assert (weak.segment_s <= strong.segment_s * (1 + 1e-9)).all()
    assert (weak.link_s <= strong.link_s * (1 + 1e-9)).all()


def test_alike_devices_are_used_by_id():
    crowd = Crowd.local((1.0, 0.5, 0.5, 0.5))
    plan = solve_ilp(PartitionProblem(profile=chain_profile(), crowd=crowd, max_stages=3)).plan
    alike = [device for device in plan.devices if device != "device-0"]
    assert alike == ["device-1", "device-2"]


def test_a_device_that_would_slow_everyone_down_gets_no_layer():
    crowd = Crowd.local((1.0, 0.9, 0.001))
    result = solve_ilp(PartitionProblem(profile=chain_profile(), crowd=crowd))
    assert set(result.plan.devices) == {"device-0", "device-1"}
    assert "best plan found with it" in result.left_out["device-2"]


def test_pins_bans_and_required_devices_are_obeyed():
    crowd = Crowd.local((1.0, 1.0, 1.0, 0.05))
    problem = PartitionProblem(
        profile=chain_profile(),
        crowd=crowd,
        pins={"block0": "device-2", 11: "device-1"},
        bans=["device-0"],
        requires=["device-3"],
    )
    plan = solve_ilp(problem).plan
    assert plan.devices[0] == "device-2"
    assert plan.devices[-1] == "device-1"
    assert "device-0" not in plan.devices
    assert "device-3" in plan.devices


def test_the_time_limit_leaves_a_plan_and_an_honest_gap():
    profile = chain_profile(20)
    crowd = Crowd.local((1.0, 0.9, 0.8, 0.7), bandwidth_bytes_per_s=1e6)
    problem = PartitionProblem(profile=profile, crowd=crowd, objective="closed_form")
    hasty = IlpSolver(time_limit_s=0.001).solve(problem)
    best = IlpSolver(time_limit_s=100.0).solve(problem)
    assert not hasty.optimal
    assert hasty.gap is not None
    assert best.optimal
    assert cost_s(hasty) * (1 - hasty.gap) <= cost_s(best) * (1 + 1e-9)


def test_the_demo_size_takes_seconds_at_most():
    started_s = time.process_time()
    result = solve(
        PartitionProblem(profile=chain_profile(20), crowd=Crowd.local((1.0, 0.5, 0.5, 0.25)))
    )
    assert result.optimal
    assert time.process_time() - started_s < 3.0


@pytest.mark.parametrize("time_limit_s", [0.0, -1.0, math.nan])
def test_a_time_limit_must_be_positive(time_limit_s):
    with pytest.raises(InvalidValueError, match=r"CM-101.*time_limit_s"):
        IlpSolver(time_limit_s=time_limit_s)


def test_a_solution_that_is_no_plan_is_refused():
    problem = PartitionProblem(profile=chain_profile(4), crowd=Crowd.local((1.0, 1.0)))
    program = _whole_program(Tables(problem))
    with pytest.raises(SolverError, match=r"CM-204.*no plan"):
        program.chain((0.0,) * len(program.mip.costs))
