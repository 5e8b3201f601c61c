"""The checker, rule by rule: each broken alone, on a plan that is sound otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crowdmesh_jax.core import (
    Crowd,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    Link,
    ModelProfile,
    PipelinePlan,
    Share,
    Stage,
    schedule_for,
    stage_memory,
)
from crowdmesh_jax.solvers import PartitionProblem, plan_faults

NAMES = ("d0", "d1", "d2")
PROFILE = ModelProfile(
    layers=tuple(
        LayerProfile(
            name=f"layer{index}", forward_flops=1.0, backward_flops=2.0, parameter_bytes=100,
            optimizer_bytes=200, output_bytes=40, gradient_bytes=40, residual_bytes=80,
        )
        for index in range(4)
    ),
    microbatches=4,
    microbatch_size=8,
    input_bytes=16,
    target_bytes=8,
    seconds={name: (LayerSeconds(forward_s=1.0, backward_s=2.0),) * 4 for name in NAMES},
)  # fmt: skip


def crowd_of(memory_bytes: int = 10**6, *, without: tuple[str, str] | None = None) -> Crowd:
    """Three devices, all linked both ways but for one way."""
    local = Crowd.local((1.0, 1.0, 1.0), memory_bytes=memory_bytes)
    devices = tuple(
        replace(device, id=DeviceId(name))
        for device, name in zip(local.devices, NAMES, strict=True)
    )
    links = tuple(
        Link(source=DeviceId(a), target=DeviceId(b), bandwidth_bytes_per_s=1e6)
        for a in NAMES
        for b in NAMES
        if a != b and (a, b) != without
    )
    return Crowd(devices=devices, links=links)


def problem_of(crowd: Crowd | None = None, **changes) -> PartitionProblem:
    options = {"profile": PROFILE, "compile_peak_bytes": 0, **changes}
    return PartitionProblem(crowd=crowd or crowd_of(), **options)


def shared(*rows: int) -> PipelinePlan:
    """Two layers on d0, and two that d1 and d2 share."""
    shares = tuple(
        Share(device=DeviceId(name), rows=own) for name, own in zip(NAMES[1:], rows, strict=True)
    )
    return PipelinePlan(
        stages=(
            Stage(device=DeviceId("d0"), first_layer=0, last_layer=1),
            Stage(device=DeviceId("d1"), first_layer=2, last_layer=3, shares=shares),
        ),
        num_layers=4,
        microbatches=4,
    )


TWO = PipelinePlan.even(4, ["d0", "d1"], microbatches=4)


def limit_of(problem: PartitionProblem, plan: PipelinePlan, index: int, share: float = 1.0) -> int:
    """What a device of a stage must hold, by the memory formula itself."""
    schedule = schedule_for(plan)
    return stage_memory(
        problem.profile,
        plan.stages[index],
        stage_index=index,
        num_stages=len(plan.stages),
        in_flight=schedule.max_in_flight(index),
        awaiting_weight=schedule.max_awaiting_weight(index),
        snapshots=problem.snapshots,
        log_steps=problem.log_steps,
        compile_peak_bytes=problem.compile_peak_bytes,
        rows_share=share,
    ).total_bytes


def with_memory(problem: PartitionProblem, **bytes_of: int) -> PartitionProblem:
    devices = tuple(
        replace(device, memory_bytes=bytes_of.get(device.id, device.memory_bytes))
        for device in problem.crowd.devices
    )
    return replace(problem, crowd=replace(problem.crowd, devices=devices))


def test_sound_plans_have_no_faults():
    assert plan_faults(problem_of(), TWO) == ()
    assert plan_faults(problem_of(share=True), shared(5, 3)) == ()


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ({"devices": ["d0", "d2"]}, "stage 1 (d1): the device may not be used"),
        ({"bans": ["d1"]}, "stage 1 (d1): the device may not be used"),
        ({"bans": [(2, "d1")]}, "stage 1 (d1): layer 2 'layer2' may not run there"),
        ({"pins": {1: "d2"}}, "stage 0 (d0): layer 1 'layer1' may not run there"),
        ({"requires": ["d2"]}, "device 'd2' must have a stage and has none"),
        ({"min_stages": 3}, "2 stages, at least 3 asked for"),
        ({"max_stages": 1}, "2 stages, at most 1 asked for"),
        ({"schedule": "gpipe"}, "its schedule is '1f1b', asked for 'gpipe'"),
        ({"profile": replace(PROFILE, microbatches=8)}, "it is for 4 microbatches"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_rule_is_told_by_itself(rules, fault):
    assert any(told.startswith(fault) for told in plan_faults(problem_of(**rules), TWO))


@pytest.mark.parametrize("lost", [("d0", "d1"), ("d1", "d0")])
def test_a_cut_needs_both_ways(lost):
    told = plan_faults(problem_of(crowd_of(without=lost)), TWO)
    assert told == (f"no link {lost[0]!r} -> {lost[1]!r}",)


@pytest.mark.parametrize("lost", [("d1", "d2"), ("d2", "d1"), ("d0", "d2"), ("d2", "d0")])
def test_a_shared_stage_needs_links_within_and_from_each_of_its_devices(lost):
    told = plan_faults(problem_of(crowd_of(without=lost), share=True), shared(5, 3))
    assert told == (f"no link {lost[0]!r} -> {lost[1]!r}",)


def test_a_shared_stage_must_be_asked_for_and_cover_the_rows_and_mix_none():
    assert plan_faults(problem_of(), shared(5, 3)) == (
        "stage 1 (d1): is shared, which was not asked for",
    )
    for rows in ((5, 2), (5, 4)):
        (told,) = plan_faults(problem_of(share=True), shared(*rows))
        assert told == f"stage 1 (d1): shares {sum(rows)} rows, a microbatch has 8"
    layers = (*PROFILE.layers[:3], replace(PROFILE.layers[3], state_bytes=4))
    mixing = problem_of(share=True, profile=replace(PROFILE, layers=layers))
    (told,) = plan_faults(mixing, shared(5, 3))
    assert told.startswith("stage 1 (d1): layer 'layer3' has state over all rows")


def test_rules_hold_for_every_device_of_a_shared_stage():
    for rules in ({"devices": ["d0", "d1"]}, {"bans": ["d2"]}, {"bans": [(3, "d2")]}):
        told = plan_faults(problem_of(share=True, **rules), shared(5, 3))
        assert told
        assert all(fault.startswith("stage 1 (d1), shared by d2: ") for fault in told)


@pytest.mark.parametrize("schedule", ["1f1b", "eager", "gpipe", "zb-h1"])
@pytest.mark.parametrize(
    "kept", [{}, {"snapshots": 2}, {"log_steps": 3}, {"compile_peak_bytes": 100_000}],
    ids=lambda kept: "-".join(kept) or "plain",
)  # fmt: skip
def test_memory_may_be_used_to_the_last_byte_and_no_further(schedule, kept):
    plan = replace(TWO, schedule=schedule)
    roomy = problem_of(schedule=schedule, **kept)
    for index, device in enumerate(plan.devices):
        need = limit_of(roomy, plan, index)
        assert plan_faults(with_memory(roomy, **{device: need}), plan) == ()
        (told,) = plan_faults(with_memory(roomy, **{device: need - 1}), plan)
        assert told.startswith(f"stage {index} ({device}): needs ")


def test_a_device_of_a_shared_stage_holds_its_rows_and_all_parameters():
    roomy, plan = problem_of(share=True), shared(5, 3)
    for device, rows in (("d1", 5), ("d2", 3)):
        need = limit_of(roomy, plan, 1, rows / 8)
        assert need < limit_of(roomy, plan, 1)
        assert plan_faults(with_memory(roomy, **{device: need}), plan) == ()
        (told,) = plan_faults(with_memory(roomy, **{device: need - 1}), plan)
        assert device in told
        assert "needs" in told


def test_recomputation_must_be_allowed():
    plan = PipelinePlan.even(4, ["d0", "d1"], microbatches=4, recompute=True)
    told = plan_faults(problem_of(), plan)
    assert told
    assert all("recomputes, which is not allowed" in fault for fault in told)
    assert plan_faults(problem_of(recompute="auto"), plan) == ()
