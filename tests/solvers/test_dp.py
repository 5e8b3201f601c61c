"""The dynamic program against every plan there is, and against the ILP where that is too many."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from partition_problems import chain_profile, problems, random_crowd, random_profile

from crowdmesh_jax.core import Crowd, DeviceId, Link, PipelinePlan
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError
from crowdmesh_jax.solvers import (
    PartitionProblem,
    PartitionResult,
    plan_faults,
    solve,
    solve_exhaustive,
    solve_ilp,
)
from crowdmesh_jax.solvers.partition import dp
from crowdmesh_jax.solvers.partition.arrays import Costs
from crowdmesh_jax.solvers.partition.bounds import MOST_DEVICES, handed_over
from crowdmesh_jax.solvers.partition.dp import DpSolver, Labels, _dominated, _Label
from crowdmesh_jax.solvers.partition.search import single_chains
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Tables


def cost_s(result: PartitionResult) -> float:
    """R_0 + (M - 1) T of a plan, by the tables."""
    tables = Tables(result.problem)
    chain = tables.chain(
        [(tables.devices.index(s.device), s.last_layer + 1) for s in result.plan.stages]
    )
    assert chain is not None
    return tables.cost_s(chain)


@given(problems(max_layers=6, max_devices=4))
@settings(max_examples=150)
def test_it_finds_the_optimum_or_proves_there_is_none(problem):
    try:
        best = solve_exhaustive(problem)
    except InfeasibleError:
        event("infeasible")
        with pytest.raises(InfeasibleError, match=r"CM-203"):
            solve(problem, solver="dp")
        return
    event(f"{len(best.plan.stages)} stages, {problem.schedule}")
    found = solve(problem, solver="dp")
    assert (found.optimal, found.gap) == (True, 0.0)
    assert cost_s(found) == pytest.approx(cost_s(best), rel=1e-6)
    assert plan_faults(problem, found.plan) == ()


@pytest.mark.parametrize("schedule", ["1f1b", "eager", "gpipe"])
def test_it_agrees_with_the_ilp_where_there_are_too_many_plans_to_try(schedule):
    for seed in range(4):
        rng = random.Random(seed)
        devices = [f"d{index}" for index in range(5)]
        problem = PartitionProblem(
            profile=random_profile(rng, devices, 12),
            crowd=random_crowd(rng, devices, 12),
            schedule=schedule,
            objective="closed_form",
            compile_peak_bytes=0,
        )
        try:
            ilp = solve_ilp(problem, time_limit_s=300.0)  # a busy machine proves it, too
        except InfeasibleError:
            with pytest.raises(InfeasibleError):
                solve(problem, solver="dp")
            continue
        assert cost_s(solve(problem, solver="dp")) == pytest.approx(cost_s(ilp), rel=1e-6)


@given(problems(max_layers=5, max_devices=3, rules=False))
@settings(max_examples=60)
def test_what_comes_before_a_stage_is_never_cheaper_than_its_bound(problem):
    tables = Tables(problem)
    costs = Costs(tables)
    unlimited = handed_over(costs, float("inf"))
    everyone = (1 << len(tables.devices)) - 1
    for chain in all_chains(tables):
        own = handed_over(costs, tables.period_s(chain))
        others = everyone
        for position in range(len(chain) - 1, 0, -1):
            others ^= 1 << chain[position].device
            ahead = tables.first_microbatch_s(chain) - sum(s.compute_s for s in chain[position:])
            for left, right in zip(chain[position:], chain[position + 1 :], strict=False):
                cut = tables.cut(left.device, right.device, right.first)
                assert cut is not None
                ahead -= cut.round_trip_s
            at = (others, chain[position].first, chain[position].device)
            assert unlimited[at] <= own[at] <= ahead + 1e-9


def test_devices_that_are_alike_are_one_another_s_twins():
    crowd = Crowd.local((1.0, 1.0, 0.5, 1.0))
    tables = Tables(PartitionProblem(profile=chain_profile(6), crowd=crowd))
    assert tables.twins == ((), (0,), (), (0, 1))
    pinned = Tables(PartitionProblem(profile=chain_profile(6), crowd=crowd, pins={0: "device-1"}))
    assert pinned.twins == ((), (), (), (0,))


def test_a_crowd_of_equals_is_solved_as_one_order():
    crowd = Crowd.local((1.0,) * 8)
    result = solve(PartitionProblem(profile=chain_profile(16), crowd=crowd), solver="dp")
    assert result.optimal
    assert result.plan.devices == tuple(f"device-{i}" for i in range(len(result.plan.stages)))


def test_more_devices_than_it_supports_are_refused_with_what_to_use():
    crowd = Crowd.local((1.0,) * (MOST_DEVICES + 1))
    problem = PartitionProblem(profile=chain_profile(20), crowd=crowd)
    with pytest.raises(InvalidValueError, match=rf"up to {MOST_DEVICES} devices, got .* 'ilp'"):
        solve(problem, solver="dp")
    named = replace(problem, devices=[f"device-{i}" for i in range(4)])
    assert solve(named, solver="dp").optimal


def test_a_limit_too_short_for_a_proof_leaves_a_plan_and_its_gap():
    rng = random.Random(1)
    devices = [f"d{index}" for index in range(7)]
    problem = PartitionProblem(
        profile=random_profile(rng, devices, 40),
        crowd=random_crowd(rng, devices, 40),
        compile_peak_bytes=0,
    )
    result = solve(problem, solver="dp", time_limit_s=1e-6)
    assert isinstance(result.plan, PipelinePlan)
    assert not result.optimal
    assert result.gap is not None
    assert 0 < result.gap < 1
    with pytest.raises(InvalidValueError, match="time_limit_s must be > 0"):
        DpSolver(time_limit_s=0.0)


def test_what_is_dearer_by_rounding_alone_takes_no_proof_away():
    proven = 0
    for seed in range(16):
        rng = random.Random(seed)
        rate, latency_s = rng.uniform(1e6, 1e8), rng.uniform(0, 0.01)
        crowd = Crowd.local([1.0] * 4, bandwidth_bytes_per_s=rate, latency_s=latency_s)
        # No two are alike, so that orders which cost the same are all looked at.
        devices = tuple(
            replace(device, memory_bytes=device.memory_bytes + index)
            for index, device in enumerate(crowd.devices)
        )
        profile = chain_profile(5, microbatches=rng.randint(2, 9))
        crowd = replace(crowd, devices=devices)
        tables = Tables(PartitionProblem(profile=profile, crowd=crowd, compile_peak_bytes=0))
        search = Labels(tables, math.inf, [])
        proven += search.run() == search.best_s
    assert proven == 16


def apart(problem: PartitionProblem) -> PartitionProblem:
    """No two devices alike."""
    devices = tuple(
        replace(device, memory_bytes=device.memory_bytes + index)
        for index, device in enumerate(problem.crowd.devices)
    )
    return replace(problem, crowd=replace(problem.crowd, devices=devices))


def random_tables(seed: int, *, slower: float = 1.0, **more) -> Tables:
    """Any tables without twins; links `slower` times slower than usual."""
    rng = random.Random(seed)
    devices = ["d0", "d1", "d2"]
    profile, crowd = random_profile(rng, devices, 5), random_crowd(rng, devices, 5)

    def slow(link):
        return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / slower)

    default = crowd.default_link and slow(crowd.default_link)
    crowd = replace(crowd, links=tuple(map(slow, crowd.links)), default_link=default)
    return Tables(
        apart(
            PartitionProblem(
                profile=profile,
                crowd=crowd,
                schedule=rng.choice(["1f1b", "eager", "gpipe"]),
                compile_peak_bytes=0,
                **more,
            )
        )
    )


def test_with_slack_it_also_finds_what_is_nearly_as_good():
    looked = 0
    for seed in range(24):
        tables = random_tables(seed)
        first = Labels(tables, math.inf, [])
        first.run()
        if not first.chains:
            continue
        more = Labels(tables, math.inf, list(first.chains), slack=0.3)
        more.run()
        cap_s = first.best_s * 1.3
        found = [(tables.cost_s(chain), chain) for chain in more.chains[len(first.chains) :]]
        assert all(cost_s <= cap_s * (1 + 1e-9) for cost_s, _ in found)
        # Of chains over the same devices with the same one in front, the best is kept.
        for chain in all_chains(tables):
            if tables.cost_s(chain) < cap_s * (1 - 1e-6):
                used = {segment.device for segment in chain}
                assert any(
                    cost_s <= tables.cost_s(chain) * (1 + 1e-9)
                    for cost_s, other in found
                    if other[0].device == chain[0].device
                    and {segment.device for segment in other} == used
                )
                looked += tables.cost_s(chain) > first.best_s * 1.01
    assert looked > 20


def test_it_stops_at_the_most_chains_asked_for_and_claims_no_more_than_it_knows():
    stopped = 0
    for seed in range(12):
        tables = random_tables(seed)
        best_s = min(map(tables.cost_s, all_chains(tables)), default=math.inf)
        search = Labels(tables, math.inf, [], slack=5.0, most=2)
        assert search.run() <= best_s
        assert len(search.chains) <= 2
        stopped += len(search.chains) == 2
        late = Labels(tables, -math.inf, [])
        assert late.run() <= best_s
        assert late.chains == []
    assert stopped > 6


def test_devices_that_differ_in_anything_are_no_twins():
    crowd = Crowd.local((1.0, 1.0, 1.0))
    plain = PartitionProblem(profile=chain_profile(4), crowd=crowd)
    assert Tables(plain).twins == ((), (0,), (0, 1))
    assert Tables(apart(plain)).twins == ((), (), ())
    one_way = Link(
        source=DeviceId("device-0"), target=DeviceId("device-1"), bandwidth_bytes_per_s=1e6
    )
    # 0 and 1 differ in the wires between them, and each of them from 2.
    assert Tables(replace(plain, crowd=replace(crowd, links=(one_way,)))).twins == ((), (), ())
    must = replace(plain, requires=["device-2"])
    assert Tables(must).twins == ((), (0,), ())


def test_a_complete_label_costs_what_its_chain_costs():
    complete = 0
    for seed in range(20):
        tables = random_tables(seed, slower=1.0 if seed % 2 else 30.0)
        costs, search = Costs(tables), Labels(tables, math.inf, [])
        bands = search._bands(costs)
        if not tables.segments:
            continue
        assert bands is not None
        open_ = list(search._last_stages(costs, bands))
        seen = set()
        while open_:
            least_s, label = open_.pop()
            if label.first:
                for more_s, grown in search._grow(costs, bands, label):
                    assert more_s >= least_s * (1 - 1e-9), "a bound never falls on the way"
                    open_.append((more_s, grown))
                continue
            chain = tables.chain(label.cuts)
            assert chain is not None
            assert least_s == pytest.approx(tables.cost_s(chain))
            seen.add(label.cuts)
        assert seen == {tuple((s.device, s.end) for s in chain) for chain in all_chains(tables)}
        complete += len(seen)
    assert complete > 200


def test_a_label_is_dropped_only_for_one_of_its_state_that_is_no_worse_in_anything():
    def label(*values: float, first: int = 2) -> _Label:
        return _Label(used=3, first=first, device=1, values=values, cuts=())

    known: dict = {}
    assert not _dominated(known, label(5.0, 2.0, 1.0))
    assert _dominated(known, label(5.0, 2.0, 1.0))
    assert _dominated(known, label(6.0, 2.0, 1.5))
    assert not _dominated(known, label(6.0, 2.0, 0.5)), "its window is shorter"
    assert not _dominated(known, label(4.0, 3.0, 1.0))
    assert not _dominated(known, label(6.0, 2.0, 1.5, first=3)), "another state"
    assert not _dominated(known, label(4.0, 1.0, 0.5))


@pytest.mark.parametrize("schedule", ["1f1b", "eager", "gpipe"])
def test_from_nothing_it_finds_the_best_chain_of_equals_and_of_others(schedule):
    for speeds in ((1.0,) * 4, (1.0, 0.5, 0.5, 1.0), (1.0, 0.9, 0.8)):
        crowd = Crowd.local(speeds, bandwidth_bytes_per_s=1e7, latency_s=0.002)
        tables = Tables(PartitionProblem(profile=chain_profile(6), crowd=crowd, schedule=schedule))
        search = Labels(tables, math.inf, [])
        search.run()
        best_s = min(map(tables.cost_s, all_chains(tables)))
        assert search.best_s == pytest.approx(best_s)
        assert len(search.chains[-1]) > 1


def test_from_any_worse_chain_it_finds_the_best():
    started = 0
    for seed in range(15):
        tables = random_tables(seed, slower=1.0 if seed % 2 else 10.0)
        ranked = sorted(all_chains(tables), key=tables.cost_s)
        best_s = tables.cost_s(ranked[0]) if ranked else math.inf
        worse = [chain for chain in ranked if tables.cost_s(chain) > best_s * (1 + 1e-6)]
        for start in [*worse[:2], *worse[-1:]]:
            search = Labels(tables, math.inf, [start])
            assert search.run() == pytest.approx(best_s)
            assert search.best_s == pytest.approx(best_s)
            started += 1
    assert started > 20


def test_tables_of_bands_are_not_halved_beyond_the_time(monkeypatch):
    asked = PartitionProblem(profile=chain_profile(12), crowd=Crowd.local((1.0, 0.9, 0.8, 0.7)))
    tables = Tables(asked)
    chains = single_chains(tables)
    made = []

    def counted(*arguments):
        made.append(1)
        return handed_over(*arguments)

    monkeypatch.setattr(dp, "handed_over", counted)
    Labels(tables, math.inf, list(chains)).run()
    unhurried = len(made)
    made.clear()
    Labels(tables, 0.0, list(chains)).run()
    assert len(made) == 2 < unhurried
