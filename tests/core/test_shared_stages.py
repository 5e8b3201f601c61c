"""Stages that several devices share: checked, timed by hand, held in memory by rows."""

import dataclasses

import pytest

from crowdmesh_jax.core import (
    Crowd,
    Device,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    Link,
    ModelProfile,
    PipelinePlan,
    Share,
    Stage,
    cut_times,
    from_json,
    predict,
    stage_times,
    to_json,
)
from crowdmesh_jax.errors import InvalidPlanError
from crowdmesh_jax.solvers import PartitionProblem
from crowdmesh_jax.solvers.check import plan_faults

A, B, C = (DeviceId(name) for name in "abc")
LAYER = LayerProfile(
    name="one", forward_flops=1.0, backward_flops=2.0, parameter_bytes=3_000,
    output_bytes=1_000, gradient_bytes=500, residual_bytes=8_000,
)  # fmt: skip
PROFILE = ModelProfile(
    layers=(LAYER, dataclasses.replace(LAYER, name="two")),
    microbatches=4,
    microbatch_size=10,
    input_bytes=100,
    seconds={
        "a": (LayerSeconds(forward_s=1.0, backward_s=2.0, update_s=0.1),) * 2,
        "b": (LayerSeconds(forward_s=4.0, backward_s=8.0, update_s=0.2),) * 2,
        "c": (LayerSeconds(forward_s=2.0, backward_s=3.0),) * 2,
    },
)
PAIRS = [(a, b) for a in (A, B, C) for b in (A, B, C) if a != b]
CROWD = Crowd(
    devices=(Device(id=A), Device(id=B), Device(id=C)),
    links=tuple(
        Link(
            source=a, target=b, latency_s=0.5 if B in (a, b) else 0.25,
            bandwidth_bytes_per_s=500.0 if (a, b) == (B, C) else 1_000.0,
        )
        for a, b in PAIRS
    ),
)  # fmt: skip


def shared(*shares: Share, **fields) -> PipelinePlan:
    first = Stage(device=A, first_layer=0, last_layer=0, shares=shares, **fields)
    return PipelinePlan(
        stages=(first, Stage(device=C, first_layer=1, last_layer=1)), num_layers=2, microbatches=4
    )


PLAN = shared(Share(device=A, rows=8), Share(device=B, rows=2))


def test_a_shared_stage_takes_as_long_as_its_slowest_device_with_its_rows():
    first, last = stage_times(PROFILE, CROWD, PLAN)
    assert first.forward_s == pytest.approx(max(0.8 * 1.0, 0.2 * 4.0))
    assert first.backward_s == pytest.approx(max(0.8 * 2.0, 0.2 * 8.0))
    assert first.update_s == 0.2
    assert last.reduce_s == 0.0


def test_its_devices_sum_gradients_in_a_ring_over_their_slowest_link():
    first, _ = stage_times(PROFILE, CROWD, PLAN)
    # Two devices: two turns of half the 3,000 bytes at 1,000 bytes/s, half a second of latency.
    assert first.reduce_s == pytest.approx(2 * (1_500 / 1_000 + 0.5))


def test_a_cut_is_as_slow_as_the_slowest_link_of_any_pair():
    (cut,) = cut_times(PROFILE, CROWD, PLAN)
    assert cut.forward_transfer_s == pytest.approx(1_000 / 500)
    assert cut.backward_transfer_s == pytest.approx(500 / 1_000)
    assert (cut.forward_latency_s, cut.backward_latency_s) == (0.5, 0.5)


def test_memory_counts_the_rows_and_names_who_has_too_little():
    alone = shared()
    whole, part = (predict(PROFILE, CROWD, plan).stages[0].memory for plan in (alone, PLAN))
    assert part.stash_bytes == pytest.approx(0.8 * whole.stash_bytes, abs=1)
    assert part.parameter_bytes == whole.parameter_bytes
    small = dataclasses.replace(
        CROWD, devices=(Device(id=A), Device(id=B, memory_bytes=2_000), Device(id=C))
    )
    problem = PartitionProblem(profile=PROFILE, crowd=small, share=True, compile_peak_bytes=0)
    (fault,) = plan_faults(problem, PLAN)
    assert "shared by b: needs" in fault


def test_a_shared_plan_is_refused_where_it_was_not_asked_for_or_mixes_rows():
    problem = PartitionProblem(profile=PROFILE, crowd=CROWD)
    assert any("not asked for" in fault for fault in plan_faults(problem, PLAN))
    asked = dataclasses.replace(problem, share=True)
    assert plan_faults(asked, PLAN) == ()
    normed = dataclasses.replace(
        PROFILE, layers=(dataclasses.replace(LAYER, state_bytes=4), PROFILE.layers[1])
    )
    (fault,) = plan_faults(dataclasses.replace(asked, profile=normed), PLAN)
    assert "'one' has state over all rows" in fault
    wrong = shared(Share(device=A, rows=8), Share(device=B, rows=1))
    assert any("shares 9 rows" in fault for fault in plan_faults(asked, wrong))
    with pytest.raises(InvalidPlanError, match="shares 9 rows"):
        stage_times(PROFILE, CROWD, wrong)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ((Share(device=A, rows=1),), "at least one other"),
        ((Share(device=B, rows=1), Share(device=A, rows=1)), "own device first"),
        ((Share(device=A, rows=0), Share(device=B, rows=1)), "a has 0 rows"),
        ((Share(device=A, rows=1), Share(device=C, rows=1)), "'c' has two stages"),
    ],
)
def test_shares_that_are_none_are_refused(shares, says):
    with pytest.raises(InvalidPlanError, match=says):
        shared(*shares)


def test_a_shared_plan_survives_json():
    assert from_json(PipelinePlan, to_json(PLAN)) == PLAN
    assert PLAN.all_devices == (A, B, C)
    assert PLAN.devices == (A, C)
