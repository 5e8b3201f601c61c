"""Casts and counts of microbatches, chosen with the plan."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_problems import chain_profile, problems, random_crowd, random_profile

import crowdmesh_jax as cm
from crowdmesh_jax.core import (
    Crowd,
    DefaultLink,
    Device,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    ModelProfile,
    PipelinePlan,
    Stage,
    cut_times,
    from_json,
    predict,
    to_json,
)
from crowdmesh_jax.errors import InfeasibleError, InvalidPlanError, InvalidValueError
from crowdmesh_jax.solvers import PartitionProblem, check_plan, explain, plan, plan_faults, solve
from crowdmesh_jax.solvers.problem import WIRE_GAIN
from crowdmesh_jax.solvers.wire import decide_wire, with_wire


def profile(*sizes: int, **changes) -> ModelProfile:
    """A layer per size, each sends so many bytes down and back; 1 s forward, 2 s backward."""
    layers = tuple(
        LayerProfile(
            name=f"l{i}",
            forward_flops=1.0,
            backward_flops=2.0,
            output_bytes=size,
            gradient_bytes=size,
            residual_bytes=8,
            parameter_bytes=8,
        )
        for i, size in enumerate(sizes)
    )
    fields = {"layers": layers, "microbatches": 4, "microbatch_size": 6, "input_bytes": 24}
    return ModelProfile(**(fields | changes))


def line(count: int, bandwidth_bytes_per_s: float) -> Crowd:
    return Crowd(
        devices=tuple(Device(id=DeviceId(f"d{i}"), flops_per_s=1.0) for i in range(count)),
        default_link=DefaultLink(bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=0.0),
    )


# Casts --------------------------------------------------------------------------------------------


def test_a_cast_halves_what_a_cut_sends_and_only_the_float32_part_of_it():
    whole = profile(1000, 10)
    assert whole.cut_bytes(1) == (1000, 1000)
    assert whole.cut_bytes(1, "bfloat16") == (500, 500)
    layer = dataclasses.replace(whole.layers[0], output_float32_bytes=600, gradient_float32_bytes=0)
    mixed = dataclasses.replace(whole, layers=(layer, whole.layers[1]))
    assert mixed.cut_bytes(1, "bfloat16") == (700, 1000)
    with pytest.raises(
        InvalidValueError, match="output_float32_bytes 1001 is a part of output_bytes, 1000"
    ):
        dataclasses.replace(layer, output_float32_bytes=1001)


def test_a_plan_names_its_casts_and_its_digest_is_as_it_was_without():
    plain = PipelinePlan.even(3, ["d0", "d1", "d2"], microbatches=4)
    lossy = with_wire(plain, frozenset({1}), "bfloat16")
    assert '"wire_dtype":"bfloat16"' in to_json(lossy)
    assert "wire_dtype" not in to_json(plain)
    assert from_json(PipelinePlan, to_json(lossy)) == lossy
    assert lossy.digest() != plain.digest()
    whole, cast = (cut_times(profile(100, 100, 4), line(3, 10.0), p) for p in (plain, lossy))
    assert cast[0] == whole[0]
    assert cast[1].forward_transfer_s == whole[1].forward_transfer_s / 2
    assert cast[1].backward_transfer_s == whole[1].backward_transfer_s / 2
    told = explain(lossy, profile(100, 100, 4), line(3, 10.0))
    assert "l1 (sends bfloat16)" in told
    assert "d1 -> d2 50 B of activations, 50 B of gradients back" in told
    with pytest.raises(InvalidPlanError, match="there is none after the last"):
        PipelinePlan(
            stages=(
                Stage(device=DeviceId("d0"), first_layer=0, last_layer=2, wire_dtype="bfloat16"),
            ),
            num_layers=3,
            microbatches=4,
        )


def test_a_cast_that_nobody_asked_for_is_a_fault():
    problem = PartitionProblem(profile=profile(4, 4), crowd=line(2, 1.0))
    lossy = with_wire(
        PipelinePlan.even(2, ["d0", "d1"], microbatches=4), frozenset({0}), "bfloat16"
    )
    assert any(
        "casts to bfloat16, which was not asked for" in f for f in plan_faults(problem, lossy)
    )
    check_plan(dataclasses.replace(problem, wire_dtype="auto"), lossy)


def test_auto_casts_the_slow_cut_alone_and_says_what_that_gives():
    """The first cut carries 100 bytes at 10 B/s, the second 1: only the first is worth bits."""
    crowd, costs = line(3, 10.0), profile(100, 1, 4)
    problem = PartitionProblem(
        profile=costs, crowd=crowd, wire_dtype="auto", min_stages=3, compile_peak_bytes=0
    )
    found = solve(problem, solver="even")
    assert [stage.wire_dtype for stage in found.plan.stages] == ["bfloat16", None, None]
    assert found.predicted.step_s == predict(costs, crowd, found.plan).step_s
    plain = with_wire(found.plan, frozenset(), "bfloat16")
    plain_s = predict(costs, crowd, plain).step_s
    assert found.predicted.step_s < (1 - WIRE_GAIN) * plain_s
    assert "bfloat16 on the wire of d0 - d1" in found.explain()
    fast = dataclasses.replace(problem, crowd=line(3, 1e6))
    assert not any(stage.wire_dtype for stage in solve(fast, solver="even").plan.stages)
    every = dataclasses.replace(problem, wire_dtype="bfloat16")
    casts = [stage.wire_dtype for stage in solve(every, solver="even").plan.stages]
    assert casts == ["bfloat16", "bfloat16", None]


@settings(max_examples=60, deadline=None)
@given(problems(max_layers=6, max_devices=4, objective="evaluate"))
def test_auto_stays_within_the_margin_of_all_casts_and_needs_each_that_it_takes(problem):
    try:
        found = solve(problem, solver="auto", budget_s=0.3)
    except InfeasibleError:
        return
    lossy = dataclasses.replace(problem, wire_dtype="auto")
    decided = decide_wire(lossy, dataclasses.replace(found, problem=lossy))
    profiled, crowd = problem.profile, problem.crowd
    count = len(found.plan.stages)

    def step_s(cuts) -> float:
        return predict(profiled, crowd, with_wire(found.plan, frozenset(cuts), "bfloat16")).step_s

    casts = {i for i, stage in enumerate(decided.plan.stages) if stage.wire_dtype}
    plain_s, all_s = step_s(()), step_s(range(count - 1))
    ours_s, slack_s = decided.predicted.step_s, WIRE_GAIN * plain_s
    assert ours_s == step_s(casts) <= plain_s
    if casts:
        assert ours_s < all_s + slack_s
        assert not decided.optimal
        for cut in casts:
            assert step_s(casts - {cut}) >= all_s + slack_s
    else:
        assert plain_s - all_s < slack_s or count == 1 or plain_s == 0


@pytest.mark.parametrize("solver", ["ilp", "dp", "auto", "exhaustive"])
def test_solvers_search_with_the_bytes_of_casts_where_all_cuts_have_them(solver):
    rng = random.Random(5)
    devices = ["d0", "d1", "d2"]
    problem = PartitionProblem(
        profile=random_profile(rng, devices, 6),
        crowd=random_crowd(rng, devices, 6),
        wire_dtype="bfloat16",
        compile_peak_bytes=0,
        objective="closed_form",
        min_stages=2,
    )
    costs = problem.profile
    halved = dataclasses.replace(
        costs,
        layers=tuple(
            dataclasses.replace(
                layer,
                output_bytes=costs.cut_bytes(i + 1, "bfloat16")[0] if i < 5 else 0,
                gradient_bytes=costs.cut_bytes(i + 1, "bfloat16")[1] if i < 5 else 0,
            )
            for i, layer in enumerate(costs.layers)
        ),
    )
    found = solve(problem, solver=solver)
    assert all(stage.wire_dtype == "bfloat16" for stage in found.plan.stages[:-1])
    # Memory knows nothing of casts, so a device with room for all is needed to compare.
    roomy = tuple(
        dataclasses.replace(device, memory_bytes=10**9) for device in problem.crowd.devices
    )
    crowd = dataclasses.replace(problem.crowd, devices=roomy)
    ours = solve(dataclasses.replace(problem, crowd=crowd), solver=solver)
    theirs = solve(
        dataclasses.replace(problem, crowd=crowd, profile=halved, wire_dtype=None), solver=solver
    )
    assert ours.predicted.step_s == pytest.approx(theirs.predicted.step_s)


# Counts -------------------------------------------------------------------------------------------


def test_another_count_scales_what_belongs_to_a_microbatch():
    rows = (LayerSeconds(forward_s=1.0, backward_s=2.0, update_s=0.5, weight_s=0.25),) * 2
    costs = profile(90, 31, seconds={"d0": rows}, target_bytes=12)
    layer = dataclasses.replace(
        costs.layers[0], temp_bytes=100, output_float32_bytes=60, optimizer_bytes=3
    )
    costs = dataclasses.replace(costs, layers=(layer, costs.layers[1]))
    fewer = costs.with_microbatches(2)
    assert (fewer.microbatches, fewer.microbatch_size) == (2, 12)
    assert (fewer.input_bytes, fewer.target_bytes) == (48, 24)
    assert fewer.layers[0].output_bytes == 180
    assert fewer.layers[0].output_float32_bytes == 120
    assert fewer.layers[0].residual_bytes == 16
    assert fewer.layers[0].temp_bytes == 200
    assert (fewer.layers[0].parameter_bytes, fewer.layers[0].optimizer_bytes) == (8, 3)
    assert fewer.layers[0].forward_flops == 2.0
    assert fewer.seconds["d0"][0] == LayerSeconds(
        forward_s=2.0, backward_s=4.0, update_s=0.5, weight_s=0.5
    )
    more = costs.with_microbatches(8)
    assert more.microbatch_size == 3
    assert more.layers[1].output_bytes == 16  # 15.5, rounded up
    assert more.layers[0].temp_bytes == 100  # a part of it belongs to parameters
    assert costs.with_microbatches(4) is costs
    with pytest.raises(InvalidValueError, match=r"24 rows .* into 5 equal .* 1, 2, 3, 4, 6, 8, 12"):
        costs.with_microbatches(5)


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), st.sampled_from([1, 2, 4, 8]))
def test_scaling_there_and_back_changes_no_second(count, again):
    rows = (LayerSeconds(forward_s=1.0, backward_s=2.0),) * 2
    costs = profile(96, 24, seconds={"d0": rows})
    there = costs.with_microbatches(count)
    assert there.microbatches * there.microbatch_size == 24
    total = there.microbatches * there.seconds["d0"][0].forward_s
    assert total == pytest.approx(4.0)
    back = there.with_microbatches(again)
    assert back.seconds["d0"][0].forward_s == pytest.approx(4.0 / again)


def test_the_best_combination_wins_and_each_says_what_it_would_have_given():
    crowd = Crowd.local((1.0, 0.7, 0.5), bandwidth_bytes_per_s=2e6, latency_s=0.01)
    costs = dataclasses.replace(chain_profile(8), microbatch_size=8)
    found = cm.plan(
        costs,
        crowd,
        microbatches=(4, 8, 16),
        schedule=("1f1b", "eager"),
        recompute="auto",
        wire_dtype="auto",
        compile_peak_bytes=0,
        budget_s=0.3,
    )
    assert isinstance(found, cm.PlanChoice)
    pairs = [(c.microbatches, c.schedule) for c in found.choices]
    assert pairs == [(m, s) for m in (4, 8, 16) for s in ("1f1b", "eager")]
    steps = [c.step_s for c in found.choices]
    assert None not in steps
    assert found.predicted.step_s == min(s for s in steps if s is not None)
    assert found.microbatches == found.plan.microbatches == found.result.problem.microbatches
    for choice in found.choices:
        assert choice.step_s is not None
        assert choice.plain_step_s is not None
        assert choice.step_s <= choice.plain_step_s
        assert (choice.casts == 0) == (choice.step_s == choice.plain_step_s)
    scaled = costs.with_microbatches(found.microbatches)
    assert predict(scaled, crowd, found.plan).step_s == found.predicted.step_s
    told = found.explain()
    assert told.count("\n  * ") == 1
    assert f"  * {found.microbatches} microbatches, {found.plan.schedule}: " in told
    if found.microbatches != 8:
        assert f"for a job with microbatches={found.microbatches}" in told


def test_a_single_combination_is_the_partition_problem_itself():
    crowd, costs = Crowd.local((1.0, 0.5)), chain_profile(6)
    found = plan(costs, crowd, solver="exhaustive")
    same = solve(PartitionProblem(profile=costs, crowd=crowd), solver="exhaustive")
    assert found.plan == same.plan
    assert len(found.choices) == 1


def test_combinations_that_do_not_fit_are_told_and_the_others_compete():
    """With few large microbatches the stash does not fit, with many small ones it does."""
    costs = profile(40, 40, 40, microbatches=2, microbatch_size=8)
    layers = tuple(dataclasses.replace(layer, residual_bytes=800) for layer in costs.layers)
    costs = dataclasses.replace(costs, layers=layers)
    devices = tuple(
        dataclasses.replace(device, memory_bytes=1500) for device in line(3, 1e3).devices
    )
    crowd = dataclasses.replace(line(3, 1e3), devices=devices)
    found = plan(costs, crowd, microbatches=(1, 8), solver="exhaustive", compile_peak_bytes=0)
    assert found.microbatches == 8
    assert found.choices[0].step_s is None
    assert found.choices[0].why_not
    assert f"1 microbatches, 1f1b: {found.choices[0].why_not}" in found.explain()
    with pytest.raises(InfeasibleError, match=r"no plan fits under any (.|\n)*1 +microb"):
        plan(costs, crowd, microbatches=1, solver="exhaustive", compile_peak_bytes=0)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"microbatches": (8, 5)}, "into 5 equal microbatches"),
        ({"microbatches": ()}, "microbatches: give at least one, each once"),
        ({"schedule": ("1f1b", "1f1b")}, "schedule: give at least one, each once"),
        ({"wire_dtype": "int4"}, "wire_dtype must be one of"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_solved(asked, complaint):
    class Never:
        def solve(self, problem):
            pytest.fail("it was solved")

    with pytest.raises(InvalidValueError, match=complaint):
        plan(profile(8, 8), line(2, 1.0), solver=Never(), **asked)
