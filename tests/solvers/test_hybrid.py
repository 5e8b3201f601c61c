"""Stages shared by several devices: where that helps, by hand; rules and limits kept."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from partition_problems import chain_profile, problems

from crowdmesh_jax.core import (
    Crowd,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    Link,
    ModelProfile,
    PipelinePlan,
    Stage,
    predict,
)
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError
from crowdmesh_jax.solvers import PartitionProblem, plan_faults, solve
from crowdmesh_jax.solvers.partition.hybrid import HybridSolver, _Groups

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


FOUR = Crowd.local((1.0, 0.5, 0.5, 0.25), bandwidth_bytes_per_s=1e8, latency_s=0.001)


def search_of(crowd: Crowd = FOUR, *, num_layers: int = 6, until_s: float = math.inf, **more):
    options = {"profile": chain_profile(num_layers), "compile_peak_bytes": 0, **more}
    return _Groups(PartitionProblem(crowd=crowd, share=True, **options), until_s)


def names(text: str) -> tuple[str, ...]:
    return tuple(f"device-{digit}" for digit in text)


def test_moves_join_split_leave_pass_on_merge_and_shift():
    start = ((names("01"), 2), (names("2"), 6))
    found = set(search_of()._moves(start))
    assert found == {
        # device-3 joins, or takes a stage of its own before or after
        ((names("013"), 2), (names("2"), 6)),
        ((names("01"), 2), (names("23"), 6)),
        ((names("3"), 1), (names("01"), 2), (names("2"), 6)),
        ((names("01"), 1), (names("3"), 2), (names("2"), 6)),
        ((names("01"), 2), (names("3"), 4), (names("2"), 6)),
        ((names("01"), 2), (names("2"), 4), (names("3"), 6)),
        # one leaves its group, or moves to the neighbour's
        ((names("0"), 2), (names("2"), 6)),
        ((names("1"), 2), (names("2"), 6)),
        ((names("0"), 2), (names("21"), 6)),
        ((names("1"), 2), (names("20"), 6)),
        # the two become one, or the cut shifts
        ((names("012"), 6),),
        ((names("01"), 1), (names("2"), 6)),
        ((names("01"), 3), (names("2"), 6)),
        ((names("01"), 4), (names("2"), 6)),
        ((names("01"), 5), (names("2"), 6)),
    }
    lower = ((names("2"), 2), (names("01"), 6))
    assert ((names("21"), 2), (names("0"), 6)) in set(search_of()._moves(lower))


def test_a_change_of_groups_is_tried_with_the_cuts_as_they_are_and_with_new_ones():
    search = search_of()
    start = ((names("0"), 1), (names("1"), 6))
    tried = list(search._tried(start))
    assert set(search._moves(start)) <= set(tried)
    cut = search._cut([names("02"), names("1")])
    assert cut is not None
    assert cut in tried


def test_cuts_of_groups_are_min_max_over_joint_speeds_and_links():
    bound_by_links = 0
    for bandwidth in (1e8, 3e5):
        crowd = Crowd.local((1.0, 0.5, 0.5, 0.25), bandwidth_bytes_per_s=bandwidth)
        search = search_of(crowd)
        seconds = search._seconds

        def slowest_s(groups, search=search, seconds=seconds):
            took, first = [], 0
            for devices, end in groups:
                speed = sum(1 / (seconds[d][end] - seconds[d][first]) for d in devices)
                took.append(1 / speed)
                first = end
            compute_s = max(took)
            links = [search._links(a, b)[end] for ((a, end), (b, _)) in itertools.pairwise(groups)]
            return max(compute_s, *links), compute_s

        order = [names("03"), names("1"), names("2")]
        cut = search._cut(order)
        assert cut is not None
        choices = [
            slowest_s(tuple(zip(order, (*ends, 6), strict=True)))
            for ends in itertools.combinations(range(1, 6), 2)
        ]
        assert slowest_s(cut)[0] == pytest.approx(min(choices)[0])
        bound_by_links += slowest_s(cut)[0] > slowest_s(cut)[1]
    assert bound_by_links == 1


def test_between_groups_the_slowest_link_of_each_way_counts():
    def wire(a: int, b: int, rate: float) -> Link:
        ends = (DeviceId(f"device-{a}"), DeviceId(f"device-{b}"))
        return Link(source=ends[0], target=ends[1], bandwidth_bytes_per_s=rate)

    links = (wire(0, 2, 1e6), wire(0, 3, 4e6), wire(2, 0, 8e6), wire(3, 0, 5e5))
    crowd = Crowd(devices=FOUR.devices, links=links)
    search = search_of(crowd)
    down, back = search.problem.profile.cut_bytes(3)
    found = search._links(names("0"), names("23"))
    assert found[3] == pytest.approx(max(down / 1e6, back / 5e5))
    assert found[3] == pytest.approx(search._links(names("0"), names("32"))[3])
    turned = search._links(names("23"), names("0"))
    assert turned[3] == pytest.approx(max(down / 5e5, back / 1e6))
    assert math.isinf(search._links(names("0"), names("1"))[3])
    one_way = search_of(Crowd(devices=FOUR.devices, links=links[:3]))
    assert math.isinf(one_way._links(names("0"), names("23"))[3])


def test_a_group_runs_at_the_sum_of_its_speeds_and_never_over_mixed_rows():
    layers = list(chain_profile(6).layers)
    layers[4] = replace(layers[4], state_bytes=4)
    search = search_of(profile=replace(chain_profile(6), layers=tuple(layers)))
    alone, group = search._segments(names("0")), search._segments(names("012"))
    assert group[0, 3] == pytest.approx(alone[0, 3] / 2)
    assert math.isinf(group[3, 5])
    assert math.isinf(group[0, 6])
    assert math.isfinite(alone[0, 6])
    assert search._shares(names("01"), 0, 4) is not None
    assert search._shares(names("01"), 3, 6) is None


def test_rows_follow_speed_by_largest_remainders():
    found = search_of()._shares(names("0123"), 0, 6)
    assert found is not None
    # 8 rows at speeds 4 : 2 : 2 : 1 are 3.6, 1.8, 1.8 and 0.9.
    assert [(share.device[-1], share.rows) for share in found] == [
        ("0", 3), ("1", 2), ("2", 2), ("3", 1),
    ]  # fmt: skip
    slow = Crowd.local((1.0, 0.01))
    assert search_of(slow)._shares(names("01"), 0, 6) is None, "not a row for device-1"


@pytest.mark.parametrize("extra", [{}, {"snapshots": 1}, {"log_steps": 1}])
def test_as_many_are_in_flight_as_each_device_of_a_group_holds(extra):
    capped = 0
    for memory in range(8, 40, 3):
        crowd = Crowd.local((1.0, 0.5, 0.5), memory_bytes=memory * 1_000_000)
        search = search_of(crowd, schedule="eager", **extra)
        shares = search._shares(names("01"), 0, 3)
        assert shares is not None
        stages = (
            Stage(device=shares[0].device, first_layer=0, last_layer=2, shares=shares),
            Stage(device=DeviceId("device-2"), first_layer=3, last_layer=5),
        )

        def faults(depth, search=search, stages=stages):
            own = (replace(stages[0], warmup=depth), replace(stages[1], warmup=1))
            plan = PipelinePlan(stages=own, num_layers=6, microbatches=8, schedule="eager")
            return [fault for fault in plan_faults(search.problem, plan) if "stage 0" in fault]

        plan = PipelinePlan(stages=stages, num_layers=6, microbatches=8, schedule="eager")
        fitting = [depth for depth in range(1, 9) if not faults(depth)]
        assert max(0, search._cap(plan, 0)) == max(fitting, default=0)
        capped += 0 < len(fitting) < 8
    assert capped > 1


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "eager"])
def test_groups_that_break_a_rule_or_memory_have_no_step(schedule):
    groups = ((names("01"), 3), (names("2"), 6))
    for rules in (
        {},
        {"bans": [(1, "device-1")]},
        {"max_stages": 1},
        {"requires": ["device-3"]},
        {"pins": {5: "device-0"}},
        {"compile_peak_bytes": 10**12},
    ):
        step_s, plan = search_of(schedule=schedule, **rules)._best(groups)
        assert math.isfinite(step_s) == (plan is not None) == (not rules)
    tiny = Crowd.local((1.0, 0.5, 0.5), memory_bytes=5_000_000)
    assert search_of(tiny, schedule=schedule)._best(groups) == (math.inf, None)


def test_without_time_a_start_stays_as_it_is_and_nothing_is_grouped():
    late = search_of(until_s=-math.inf)
    start = ((names("0"), 3), (names("1"), 6))
    assert late._climb(start) == start
    assert late._grouped() == []
    in_time = search_of()
    assert in_time._climb(start) != start
    steps = [in_time._best(groups)[0] for groups in in_time._grouped()]
    assert steps
    assert steps == sorted(steps)


def test_the_plan_without_sharing_is_kept_where_no_move_is_better():
    base = solve(PartitionProblem(profile=chain_profile(6), crowd=FOUR), solver="auto")
    late = search_of(until_s=-math.inf, compile_peak_bytes=base.problem.compile_peak_bytes)
    kept = late.run([base.plan])
    assert kept is not None
    took_s = predict(late.problem.profile, late.problem.crowd, kept).step_s
    assert took_s <= base.predicted.step_s
    alone = late.run([])
    assert alone is not None
    assert len(alone.stages) == 1


def test_groupings_of_the_fastest_are_starts_too(monkeypatch):
    monkeypatch.setattr(_Groups, "_climb", lambda self, groups: groups)
    search = search_of(Crowd.local((1.0,) * 4, bandwidth_bytes_per_s=1e9), num_layers=1)
    best_s = search._best(search._grouped()[0])[0]
    alone_s = search._best(((names("0"), 1),))[0]
    assert best_s < alone_s * 0.9
    plan = search.run([])
    assert plan is not None
    took_s = predict(search.problem.profile, search.problem.crowd, plan).step_s
    assert took_s == pytest.approx(best_s)
