"""Crowds, profiles and plans check themselves: errors name the field and the value."""

from __future__ import annotations

import dataclasses
import math
import types

import pytest
from core_strategies import crowds, plans
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.core import (
    Access,
    Backhaul,
    Crowd,
    DefaultLink,
    Device,
    DeviceId,
    LayerProfile,
    LayerSeconds,
    Link,
    ModelProfile,
    PipelinePlan,
    Stage,
    from_json,
    to_json,
    to_toml,
)
from crowdmesh_jax.errors import FormatError, InvalidCrowdError, InvalidPlanError, InvalidValueError

A, B, C = DeviceId("a"), DeviceId("b"), DeviceId("c")
not_positive = st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf])


@given(st.sampled_from(["flops_per_s", "memory_bytes", "speed"]), not_positive)
def test_a_device_names_the_figure_that_is_out_of_range(field, bad):
    with pytest.raises(InvalidCrowdError) as caught:
        Device(id=A, **{field: bad})
    assert f"device 'a': {field} must be finite and > 0, got {bad}" in str(caught.value)


@pytest.mark.parametrize("bad", ["", "x" * 65, "line\nbreak"])
def test_a_device_id_must_be_short_and_printable(bad):
    with pytest.raises(InvalidCrowdError, match="1-64 printable characters"):
        Device(id=DeviceId(bad))


def test_devices_with_access_reach_each_other_up_from_one_and_down_to_the_other():
    fast = Access(uplink_bytes_per_s=3e6, downlink_bytes_per_s=9e6, latency_s=0.002, cell="w")
    slow = Access(uplink_bytes_per_s=1e6, downlink_bytes_per_s=2e6, latency_s=0.02)
    own = Link(source=A, target=C, bandwidth_bytes_per_s=7.0)
    crowd = Crowd(
        devices=(Device(id=A, access=fast), Device(id=B, access=slow), Device(id=C, access=slow)),
        links=(own,),
    )
    there, back = crowd.link("a", "b"), crowd.link("b", "a")
    assert there is not None
    assert back is not None
    assert (there.bandwidth_bytes_per_s, there.latency_s) == (2e6, pytest.approx(0.022))
    assert (back.bandwidth_bytes_per_s, back.latency_s) == (1e6, pytest.approx(0.022))
    assert crowd.link("a", "c") is own, "a link of its own comes first"
    assert crowd.link("a", "a") is None
    alone = Crowd(devices=(Device(id=A, access=fast), Device(id=B)))
    assert alone.link("a", "b") is None, "one end without access, and no default"


def test_between_cells_the_backhaul_caps_the_rate_and_adds_its_latency():
    def access(cell: str) -> Access:
        return Access(uplink_bytes_per_s=8e6, downlink_bytes_per_s=9e6, latency_s=0.002, cell=cell)

    devices = tuple(
        Device(id=DeviceId(f"{cell}{i}"), access=access(cell)) for cell in "xy" for i in range(2)
    )
    crowd = Crowd(devices=devices, backhaul=Backhaul(bandwidth_bytes_per_s=1e6, latency_s=0.03))
    rates = {pair: crowd.link(*pair) for pair in (("x0", "x1"), ("x0", "y0"), ("y1", "x1"))}
    told = {
        pair: (link.bandwidth_bytes_per_s, pytest.approx(link.latency_s))
        for pair, link in rates.items()
        if link is not None
    }
    assert told == {
        ("x0", "x1"): (8e6, 0.004), ("x0", "y0"): (1e6, 0.034), ("y1", "x1"): (1e6, 0.034),
    }  # fmt: skip
    wide = dataclasses.replace(crowd, backhaul=Backhaul(bandwidth_bytes_per_s=1e9))
    link = wide.link("x0", "y0")
    assert link is not None
    assert link.bandwidth_bytes_per_s == 8e6, "it can only slow a pair down"
    assert from_json(Crowd, to_json(crowd)) == crowd


@given(not_positive)
def test_a_backhaul_out_of_range_is_named(bad):
    with pytest.raises(InvalidCrowdError, match="backhaul: bandwidth_bytes_per_s"):
        Backhaul(bandwidth_bytes_per_s=bad)


def test_a_devices_data_and_place_survive_a_file():
    device = Device(
        id=A, label_counts=(3, 0, 4), leave_hazard_per_s=0.01, position_m=(1.5, -2.0),
        access=Access(uplink_bytes_per_s=1.0, downlink_bytes_per_s=2.0),
    )  # fmt: skip
    crowd = Crowd(devices=(device,))
    assert device.rows == 7
    assert from_json(Crowd, to_json(crowd)) == crowd


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label_counts": (1, -1)}, "label_counts must be >= 0"),
        ({"leave_hazard_per_s": -1.0}, "leave_hazard_per_s must be finite and >= 0"),
        ({"position_m": (0.0, math.nan)}, "position_m must be finite"),
    ],
)
def test_data_and_place_out_of_range_are_named(fields, says):
    with pytest.raises(InvalidCrowdError, match=says):
        Device(id=A, **fields)


@given(not_positive)
def test_access_out_of_range_is_named(bad):
    for field in ("uplink_bytes_per_s", "downlink_bytes_per_s"):
        with pytest.raises(InvalidCrowdError, match=f"access: {field}"):
            Access(**{"uplink_bytes_per_s": 1.0, "downlink_bytes_per_s": 1.0, field: bad})


@given(not_positive)
def test_links_name_the_figure_that_is_out_of_range(bad):
    with pytest.raises(InvalidCrowdError, match="'a' -> 'b': bandwidth_bytes_per_s"):
        Link(source=A, target=B, bandwidth_bytes_per_s=bad)
    with pytest.raises(InvalidCrowdError, match="default_link: bandwidth_bytes_per_s"):
        DefaultLink(bandwidth_bytes_per_s=bad)
    if bad == 0:
        return
    with pytest.raises(InvalidCrowdError, match="latency_s must be finite and >= 0"):
        Link(source=A, target=B, bandwidth_bytes_per_s=1.0, latency_s=bad)
    with pytest.raises(InvalidCrowdError, match="default_link: latency_s"):
        DefaultLink(latency_s=bad)


def test_a_crowd_refuses_what_is_none():
    a, b = Device(id=A), Device(id=B)
    link = Link(source=A, target=B, bandwidth_bytes_per_s=1.0)
    for changes, complaint in (
        ({"devices": ()}, "at least one device"),
        ({"devices": (a, b, a)}, "'a' stands twice"),
        ({"devices": (a,), "links": (link,)}, "'a' -> 'b': no device 'b'; known: a"),
        ({"devices": (a, b), "links": (link, link)}, "link 'a' -> 'b' stands twice"),
    ):
        with pytest.raises(InvalidCrowdError, match=complaint):
            Crowd(**changes)
    with pytest.raises(InvalidCrowdError, match="needs no link to itself"):
        Link(source=A, target=A, bandwidth_bytes_per_s=1.0)


@given(crowds())
def test_a_link_is_the_named_one_else_the_default_else_none(crowd):
    named = {(link.source, link.target): link for link in crowd.links}
    for source in crowd.devices:
        assert crowd.device(source.id) is source
        for target in crowd.devices:
            found = crowd.link(source.id, target.id)
            if (source.id, target.id) in named:
                assert found is named[source.id, target.id]
            elif crowd.default_link is None or source is target:
                assert found is None
            else:
                assert found is not None
                assert found.bandwidth_bytes_per_s == crowd.default_link.bandwidth_bytes_per_s
                assert found.latency_s == crowd.default_link.latency_s
    with pytest.raises(InvalidCrowdError, match="no device 'no such one'"):
        crowd.link(crowd.devices[0].id, "no such one")


def test_a_transfer_takes_latency_and_bytes_over_bandwidth():
    link = Link(source=A, target=B, bandwidth_bytes_per_s=10.0, latency_s=0.5)
    assert link.transfer_s(20) == 2.5


def test_a_local_crowd_scales_flops_by_speed():
    crowd = Crowd.local((1.0, 0.25), flops_per_s=8.0)
    assert [d.flops_per_s for d in crowd.devices] == [8.0, 2.0]
    assert [d.speed for d in crowd.devices] == [1.0, 0.25]
    assert crowd.link("device-0", "device-1") is not None


def test_a_crowd_file_is_read_and_a_bad_one_told_by_path(tmp_path):
    crowd = Crowd.local((1.0, 0.5))
    path = tmp_path / "crowd.toml"
    path.write_text(to_toml(crowd))
    assert Crowd.load(path) == crowd
    path.write_text(to_toml(crowd).replace('id = "device-1"', "id = 1"))
    with pytest.raises(FormatError, match=r"crowd\.toml\.devices\[1\]\.id: expected a string"):
        Crowd.load(path)


LAYER = LayerProfile(name="dense", forward_flops=1.0, backward_flops=2.0)
NUMBERS = [f.name for f in dataclasses.fields(LayerProfile) if f.name not in ("name", "borrows")]


@given(st.sampled_from(NUMBERS), st.sampled_from([-1, math.nan, math.inf]))
def test_a_layer_profile_names_the_layer_and_the_figure(field, bad):
    with pytest.raises(InvalidValueError, match=f"layer 'dense': {field} must be finite and >= 0"):
        dataclasses.replace(LAYER, **{field: bad})


@given(st.sampled_from([-1, math.nan, math.inf]))
def test_a_layer_profile_names_whom_it_borrows_from_for_bytes_that_are_none(bad):
    with pytest.raises(InvalidValueError, match=r"layer 'dense': bytes borrowed of 'embed' must"):
        dataclasses.replace(LAYER, borrows=(("embed", bad),))


def test_a_model_profile_refuses_what_is_none():
    good = {"layers": (LAYER,), "microbatches": 1, "microbatch_size": 1, "input_bytes": 0}
    row = LayerSeconds(forward_s=1.0, backward_s=1.0)
    profile = ModelProfile(**good)
    for changes, complaint in (
        ({"layers": ()}, "at least one layer"),
        ({"microbatches": 0}, "microbatches must be >= 1, got 0"),
        ({"microbatch_size": 0}, "microbatch_size must be >= 1, got 0"),
        ({"seconds": {"a": (row, row)}}, "seconds of device 'a': 2 entries for 1 layers"),
    ):
        with pytest.raises(InvalidValueError, match=complaint):
            ModelProfile(**{**good, **changes})
    with pytest.raises(InvalidValueError, match="update_s must be finite and >= 0, got nan"):
        LayerSeconds(forward_s=1.0, backward_s=1.0, update_s=math.nan)
    with pytest.raises(InvalidValueError, match="cut must lie in"):
        profile.cut_bytes(1)


@given(plans())
def test_a_plan_gives_each_layer_to_one_stage_and_its_digest_to_equal_plans_only(plan):
    layers = [layer for stage in plan.stages for layer in stage.layers]
    assert layers == list(range(plan.num_layers))
    assert [plan.stage_of(device) for device in plan.devices] == list(range(len(plan.stages)))
    assert plan.stage_of("no such device") is None
    assert from_json(PipelinePlan, to_json(plan)).digest() == plan.digest()
    other = dataclasses.replace(plan, microbatches=plan.microbatches + 1)
    assert other.digest() != plan.digest()


@given(st.integers(1, 12), st.integers(1, 12))
def test_an_even_plan_differs_by_one_layer_at_most(num_layers, count):
    devices = [f"d{i}" for i in range(count)]
    if count > num_layers:
        with pytest.raises(InvalidPlanError, match=f"{count} stages for {num_layers} layers"):
            PipelinePlan.even(num_layers, devices, microbatches=2)
        return
    plan = PipelinePlan.even(num_layers, devices, microbatches=2)
    sizes = [len(stage.layers) for stage in plan.stages]
    assert sum(sizes) == num_layers
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def stage(device: str, first: int, last: int, **extra) -> Stage:
    return Stage(device=DeviceId(device), first_layer=first, last_layer=last, **extra)


@pytest.mark.parametrize(
    ("stages", "num_layers", "complaint"),
    [
        ((), 1, "at least one stage"),
        ((stage("a", 0, 0), stage("b", 1, 1)), 1, "2 stages for 1 layers"),
        ((stage("a", 1, 1),), 2, r"stage 0 \(a\): layers 1-1, expected to start at layer 0"),
        (
            (stage("a", 0, 0), stage("b", 2, 2)),
            3,
            r"stage 1 \(b\): layers 2-2, expected .* layer 1",
        ),
        ((stage("a", 0, 0), stage("b", 1, 0)), 3, r"stage 1 \(b\): layers 1-0"),
        ((stage("a", 0, 0),), 2, "stages end at layer 0 of 1"),
        ((stage("a", 0, 0), stage("a", 1, 1)), 2, "device 'a' has two stages"),
        ((stage("a", 0, 0, warmup=0),), 1, "warmup must be >= 1, got 0"),
    ],
)
def test_a_plan_that_is_no_partition_names_the_stage(stages, num_layers, complaint):
    with pytest.raises(InvalidPlanError, match=complaint):
        PipelinePlan(stages=stages, num_layers=num_layers, microbatches=2)
    with pytest.raises(InvalidPlanError, match="microbatches must be >= 1, got 0"):
        PipelinePlan(stages=(stage("a", 0, 0),), num_layers=1, microbatches=0)


def test_what_a_package_exports_is_sorted_complete_and_documented():
    import crowdmesh_jax.core as core

    # Constants, classes, functions, as the linter sorts them.
    kinds = {name: (not name.isupper(), not name[0].isupper(), name) for name in core.__all__}
    assert core.__all__ == sorted(core.__all__, key=kinds.__getitem__)
    for name in core.__all__:
        value = getattr(core, name)
        if isinstance(value, type | types.FunctionType):
            assert value.__doc__, name
