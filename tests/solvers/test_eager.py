"""Cut, order and depth chosen together, against every choice there is on small problems."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from partition_problems import chain_profile, problems, random_crowd, random_profile

from crowdmesh_jax.core import Crowd, CutTimes, StageTimes
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError
from crowdmesh_jax.solvers import PartitionProblem, plan_faults, solve, solve_exhaustive
from crowdmesh_jax.solvers.partition import eager as eager_module
from crowdmesh_jax.solvers.partition.eager import (
    DepthSearch,
    EagerSolver,
    ShallowTables,
    depths_for,
    depths_to_try,
    filling_depths,
    step_s,
)
from crowdmesh_jax.solvers.partition.search import neighbours
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Tables

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


def search_of(seed: int, **more) -> DepthSearch:
    rng = random.Random(seed)
    devices = ["d0", "d1", "d2"]
    problem = PartitionProblem(
        profile=replace(random_profile(rng, devices, 5), microbatches=4),
        crowd=random_crowd(rng, devices, 5),
        schedule="eager",
        compile_peak_bytes=0,
        **more,
    )
    return DepthSearch(problem, math.inf)


def test_the_bound_of_a_chain_is_below_each_of_its_steps():
    near = 0
    for seed in range(10):
        search = search_of(seed)
        for chain in all_chains(search.tables):
            bound_s, took_s = search._bound_s(chain), search.step_s(chain)
            assert bound_s <= took_s * (1 + 1e-9)
            near += bound_s > took_s * (1 - 1e-9)
    assert near > 10


def test_the_best_of_all_depths_tried_is_taken_within_memory():
    shallow = 0
    for seed in range(30):
        search = search_of(seed)
        for chain in itertools.islice(all_chains(search.tables), 0, 90, 9):
            stages, cuts = search.tables.times(chain)
            caps = [min(4, search.tables.most_in_flight(segment)) for segment in chain]
            took_s, depths, made = search._depths(chain)
            assert made == chain
            assert all(1 <= depth <= cap for depth, cap in zip(depths, caps, strict=True))
            tried = depths_to_try(stages, cuts, caps)
            assert took_s == min(step_s(stages, cuts, depths, 4) for depths in tried)
            assert took_s <= search._quick_s(chain)
            shallow += min(caps) < 4
    assert shallow > 3


def test_the_fixed_rule_and_all_that_memory_holds_are_among_the_depths_tried():
    stages = [StageTimes(forward_s=1.0, backward_s=2.0)] * 3
    cuts = [CutTimes(forward_latency_s=0.5, backward_latency_s=0.5)] * 2
    tried = depths_to_try(stages, cuts, [9, 8, 8])
    assert {(9, 8, 8), depths_for(stages, cuts, [9, 8, 8], 1.1)} <= tried
    # Neither the cycle (3, 2, 1) nor the start (7, 4, 1) asks for these without a link's delay.
    assert (5, 3, 1) in depths_to_try(stages, [CutTimes()] * 2, [9, 8, 8])
    assert (4, 3, 1) in depths_to_try(stages, [CutTimes()] * 2, [4, 8, 8])


def test_a_few_more_or_less_in_flight_are_tried_in_the_end():
    gained = 0
    for seed in range(20):
        search = search_of(seed)
        for chain in itertools.islice(all_chains(search.tables), 0, 60, 12):
            stages, cuts = search.tables.times(chain)
            caps = [min(4, search.tables.most_in_flight(segment)) for segment in chain]
            start = (1,) * len(chain)
            depths = search._polished(chain, start)
            assert all(1 <= depth <= cap for depth, cap in zip(depths, caps, strict=True))
            assert all(a >= b for a, b in itertools.pairwise(depths))
            before_s, after_s = (step_s(stages, cuts, each, 4) for each in (start, depths))
            assert after_s <= before_s
            gained += after_s < before_s * (1 - 1e-9)
    assert gained > 10


def test_stages_that_memory_holds_back_are_tried_recomputed_one_by_one_and_together():
    crowd = Crowd.local((1.0, 1.0, 1.0), memory_bytes=13_000_000)
    problem = PartitionProblem(
        profile=chain_profile(6), crowd=crowd, schedule="eager", compile_peak_bytes=0
    )
    tried = {}
    for mode in ("never", "auto"):
        search = DepthSearch(replace(problem, recompute=mode), math.inf)
        chain = search.tables.chain([(0, 2), (1, 4), (2, 6)])
        assert chain is not None
        assert all(cap < 8 for cap in search._caps(chain)[:2])
        tried[mode] = [
            [segment.recompute for segment in each] for each in search._recomputed(chain)
        ]
    assert tried["never"] == [[False] * 3]
    for which in ((False, False), (True, False), (False, True), (True, True)):
        assert [*which, False] in tried["auto"]


def test_without_time_a_start_stays_as_it_is():
    late = search_of(3)
    late.until_s = -math.inf
    for chain in itertools.islice(all_chains(late.tables), 0, 50, 10):
        assert late._climb(chain) is chain


def test_a_climb_ends_where_no_move_helps():
    moved = 0
    for seed in range(6):
        search = search_of(seed)
        for chain in itertools.islice(all_chains(search.tables), 0, 40, 20):
            top = search._climb(chain)
            moved += top != chain
            around = [search.step_s(near) for near in neighbours(search.tables, top)]
            assert search.step_s(top) <= min(around, default=math.inf) * 1.03
    assert moved > 5


def test_of_chains_that_take_as_long_the_lower_ids_win():
    crowd = Crowd.local((1.0, 1.0))
    problem = PartitionProblem(profile=chain_profile(4), crowd=crowd, schedule="eager")
    search = DepthSearch(problem, math.inf)
    low, high = search.tables.chain([(0, 4)]), search.tables.chain([(1, 4)])
    assert low is not None
    assert high is not None
    assert search._is_better(low, high)
    assert not search._is_better(high, low)
    assert solve(replace(problem, max_stages=1), solver="eager").plan.devices == ("device-0",)


def test_a_slow_link_in_front_makes_forwards_last_longer():
    stages = [StageTimes(forward_s=1.0, backward_s=2.0)] * 3
    cuts = [CutTimes(forward_transfer_s=4.0), CutTimes(backward_latency_s=8.0)]
    # At stage 1 the gradient is back after 3 + 8 s; a forward arrives every 4 s, so 3 more.
    # At stage 0 it is after 3 + 8 + 3 + 4 s, and a forward takes 1 s.
    assert filling_depths(stages, cuts, [99] * 3) == (19, 4, 1)
    # The link is the slowest of all: a cycle takes 4 s. 10 s there and back are 3 of them.
    assert depths_for(stages[:2], cuts[:1], ROOM, 1.0) == (3, 1)


def test_chains_of_both_closed_forms_are_starts(monkeypatch):
    crowd = Crowd.local((1.0, 0.5, 0.25), bandwidth_bytes_per_s=1e6)
    problem = PartitionProblem(profile=chain_profile(6), crowd=crowd, schedule="eager")
    odd = {ShallowTables: [(2, 1), (1, 2), (0, 6)], Tables: [(2, 2), (1, 3), (0, 6)]}
    plain = {tuple((s.device, s.end) for s in c) for c in DepthSearch(problem, 0.0)._starts(())}
    assert not any(tuple(cuts) in plain for cuts in odd.values())

    def planted(which, known, until_s, **options):
        return [which.chain(odd[type(which)])]

    monkeypatch.setattr(eager_module, "chains_of_few", planted)
    starts = DepthSearch(problem, math.inf)._starts(())
    found = {tuple((s.device, s.end) for s in chain) for chain in starts}
    assert {tuple(cuts) for cuts in odd.values()} <= found
