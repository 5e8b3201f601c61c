"""The tables that solvers search in against `core` and against the checker."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from partition_problems import chain_profile, problems, random_crowd, random_profile

from crowdmesh_jax.core import Crowd, DeviceId, Link, PipelinePlan, Stage, predict
from crowdmesh_jax.solvers import PartitionProblem, plan_faults
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Tables, segment_memory


def all_plans(problem):
    """Every plan over any of the crowd's devices, with or without recomputation everywhere."""
    devices = [device.id for device in problem.crowd.devices]
    layers = problem.num_layers
    for count in range(1, min(len(devices), layers) + 1):
        for cuts in combinations(range(1, layers), count - 1):
            edges = [0, *cuts, layers]
            for order in permutations(devices, count):
                yield PipelinePlan(
                    stages=tuple(
                        Stage(
                            device=device,
                            first_layer=edges[index],
                            last_layer=edges[index + 1] - 1,
                            recompute=problem.recompute == "always",
                        )
                        for index, device in enumerate(order)
                    ),
                    num_layers=layers,
                    microbatches=problem.microbatches,
                    schedule=problem.schedule,
                )


@given(problems(max_layers=5, updates=True, rules=False))
@settings(max_examples=60)
def test_costs_are_those_of_core(problem):
    tables = Tables(problem)
    for chain in all_chains(tables):
        predicted = predict(problem.profile, problem.crowd, tables.plan(chain))
        assert tables.evaluate_s(chain) == pytest.approx(predicted.step_s, rel=1e-12)
        assert tables.first_microbatch_s(chain) == pytest.approx(
            predicted.first_microbatch_s, rel=1e-12
        )
        assert tables.period_s(chain) == pytest.approx(predicted.period_s, rel=1e-12)
        steady_s = (problem.microbatches - 1) * predicted.period_s
        assert tables.cost_s(chain) == pytest.approx(
            predicted.first_microbatch_s + steady_s, rel=1e-12
        )


@given(problems(max_layers=5))
@settings(max_examples=100)
def test_chains_are_exactly_the_plans_that_the_checker_passes(problem):
    assume(problem.recompute != "auto")
    passed = {plan.digest() for plan in all_plans(problem) if not plan_faults(problem, plan)}
    made = {Tables(problem).plan(chain).digest() for chain in all_chains(Tables(problem))}
    assert made == passed


@given(problems(max_layers=5))
@settings(max_examples=60)
def test_recompute_auto_fits_wherever_either_fits(problem):
    def cuts(mode):
        tables = Tables(replace(problem, recompute=mode))
        return {tables.rank(chain) for chain in all_chains(tables)}

    auto = cuts("auto")
    assert cuts("never") <= auto
    assert cuts("always") <= auto


@given(problems(max_layers=5), st.sampled_from(["ignore_memory", "ignore_links", "ignore_rules"]))
@settings(max_examples=60)
def test_a_relaxation_never_loses_a_chain(problem, relaxed):
    def ranks(tables):
        return {tables.rank(chain) for chain in all_chains(tables)}

    assert ranks(Tables(problem)) <= ranks(Tables(problem, **{relaxed: True}))


@pytest.mark.parametrize("one_way", [False, True])
def test_a_cut_needs_links_both_ways(one_way):
    there = Link(
        source=DeviceId("device-0"), target=DeviceId("device-1"), bandwidth_bytes_per_s=1e6
    )
    back = Link(source=DeviceId("device-1"), target=DeviceId("device-0"), bandwidth_bytes_per_s=2e6)
    crowd = Crowd(
        devices=Crowd.local((1.0, 0.5)).devices, links=(there,) if one_way else (there, back)
    )
    tables = Tables(PartitionProblem(profile=chain_profile(4), crowd=crowd))
    cut, other = tables.cut(0, 1, 2), tables.cut(1, 0, 2)
    if one_way:
        assert cut is None
        assert other is None
        return
    assert cut is not None
    assert other is not None
    down, up = tables.problem.profile.cut_bytes(2)
    assert (cut.down_s, cut.back_s) == pytest.approx((down / 1e6, up / 2e6))
    assert (other.down_s, other.back_s) == pytest.approx((down / 2e6, up / 1e6))


@pytest.mark.parametrize("schedule", ["1f1b", "eager"])
def test_what_is_recomputed_costs_its_forward_again_but_for_the_last_stage(schedule):
    problem = PartitionProblem(
        profile=chain_profile(4), crowd=Crowd.local((1.0, 0.5)), schedule=schedule
    )
    plain, always = Tables(problem), Tables(replace(problem, recompute="always"))
    for first, end in ((0, 2), (2, 4), (0, 4)):
        one, again = plain.at(1, first, end), always.at(1, first, end)
        assert one is not None
        assert again is not None
        assert again.recompute
        made = plain.recomputed(one)
        if end == 4:
            assert made == one
            assert again.compute_s == pytest.approx(one.compute_s)
        else:
            assert made.recompute
            assert made.compute_s == pytest.approx(one.compute_s + one.forward_s)
            assert again.compute_s == pytest.approx(made.compute_s)
            assert plain.recomputed(made) == made


@given(problems(max_layers=4, rules=False))
@settings(max_examples=40)
def test_as_many_are_in_flight_as_memory_holds_and_no_more(problem):
    tables = Tables(problem)
    for segment in tables.segments:
        most = tables.most_in_flight(segment)
        limit = problem.crowd.device(tables.devices[segment.device]).memory_bytes

        def need(count, segment=segment):
            own = (segment.first, segment.end, segment.recompute)
            return segment_memory(problem, *own, count)

        assert need(most) <= limit
        assert need(most + 1) > limit or need(2) == need(1)


def test_tables_of_some_devices_know_the_cuts_of_all():
    rng = random.Random(4)
    names = ["d0", "d1", "d2", "d3"]
    problem = PartitionProblem(
        profile=random_profile(rng, names, 4), crowd=random_crowd(rng, names, 4),
        compile_peak_bytes=0,
    )  # fmt: skip
    few = replace(problem, devices=("d1", "d3"))
    alone, taken = Tables(few), Tables(few, like=Tables(problem))
    assert taken.segments == alone.segments
    for layer in (1, 2, 3):
        for pair in ((0, 1), (1, 0)):
            assert taken.cut(*pair, layer) == alone.cut(*pair, layer)
    for chain in all_chains(alone):
        assert taken.times(chain) == alone.times(chain)


def test_a_compile_peak_above_memory_leaves_no_segment():
    crowd = Crowd.local((1.0, 1.0), memory_bytes=500_000_000)
    crowd = replace(
        crowd, devices=(crowd.devices[0], replace(crowd.devices[1], memory_bytes=10**8))
    )
    problem = PartitionProblem(profile=chain_profile(4), crowd=crowd)
    assert {segment.device for segment in Tables(problem).segments} == {0}
    assert {s.device for s in Tables(problem, ignore_memory=True).segments} == {0, 1}


def test_auto_recomputes_only_where_more_stages_to_the_end_ask_for_it():
    profile = chain_profile(6)
    plain = PartitionProblem(profile=profile, crowd=Crowd.local((1.0,) * 4), compile_peak_bytes=0)
    need = [segment_memory(plain, 0, 2, again, depth) for again, depth in ((False, 2), (True, 4))]
    crowd = Crowd.local((1.0,) * 4, memory_bytes=max(need))
    problem = replace(plain, crowd=crowd, recompute="auto")
    assert segment_memory(plain, 0, 2, False, 4) > max(need)
    tables = Tables(problem)
    near, far = tables.at(0, 0, 2, 2), tables.at(0, 0, 2, 4)
    assert near is not None
    assert far is not None
    assert (near.recompute, far.recompute) == (False, True)
    never = Tables(replace(problem, recompute="never"))
    assert never.at(0, 0, 2, 4) is None


def test_under_a_schedule_with_weight_parts_chains_take_what_core_says():
    crowd = Crowd.local((1.0, 0.6, 0.5), bandwidth_bytes_per_s=1e7)
    problem = PartitionProblem(profile=chain_profile(5), crowd=crowd, schedule="zb-h1")
    tables = Tables(problem)
    faster = 0
    whole = Tables(replace(problem, schedule="1f1b"))
    for chain in all_chains(tables):
        step_s = predict(problem.profile, crowd, tables.plan(chain)).step_s
        assert tables.evaluate_s(chain) == pytest.approx(step_s, rel=1e-12)
        faster += step_s < whole.evaluate_s(chain) * (1 - 1e-9)
    assert faster > 10
