"""What is measured on this machine, and how it reaches the planner."""

import dataclasses

import optax
import pytest
from support.families import family

from crowdmesh_jax.core.crowd import Backhaul, Crowd, Device, DeviceId, Link
from crowdmesh_jax.profiling import calibrate, crowd_with_calibration, measure_layers, profile

HOME, SLOW, AWAY = DeviceId("home"), DeviceId("slow"), DeviceId("away")
CROWD = Crowd(
    devices=(
        Device(id=HOME),
        Device(id=SLOW, speed=0.25),
        Device(id=AWAY, flops_per_s=7e8, address="10.0.0.1:5000"),
    ),
    links=(Link(source=HOME, target=SLOW, bandwidth_bytes_per_s=1e6),),
    backhaul=Backhaul(bandwidth_bytes_per_s=2e6),
)


def test_calibration_gives_a_rate_that_a_processor_can_have():
    assert 1e7 < calibrate(seconds=0.02) < 1e13


def test_a_calibrated_crowd_differs_in_the_speed_of_this_machines_devices_only():
    made = crowd_with_calibration(CROWD, 4e9)
    assert [device.flops_per_s for device in made.devices] == [4e9, 1e9, 7e8]
    back = [
        dataclasses.replace(new, flops_per_s=old.flops_per_s)
        for new, old in zip(made.devices, CROWD.devices, strict=True)
    ]
    assert tuple(back) == CROWD.devices
    assert dataclasses.replace(made, devices=CROWD.devices) == CROWD, "links and backhaul stay"


def test_a_calibrated_profile_predicts_by_the_measured_rate_and_the_devices_speed():
    kind = family("mlp")
    plain = profile(kind.job(optax.adam(1e-3)), CROWD, kind.batch())
    made = profile(kind.job(optax.adam(1e-3)), CROWD, kind.batch(), calibrate=True)
    assert made.layers == plain.layers
    assert set(made.seconds) == {HOME, SLOW}
    home, slow = made.seconds[HOME], made.seconds[SLOW]
    assert all(0 < row.forward_s < 1 for row in home)
    for fast_row, slow_row in zip(home, slow, strict=True):
        assert slow_row.backward_s == pytest.approx(4 * fast_row.backward_s)
        assert slow_row.update_s == pytest.approx(4 * fast_row.update_s)
    assert made.layer_seconds(CROWD, AWAY) == plain.layer_seconds(CROWD, AWAY)


def test_each_layer_is_measured_forward_backward_and_in_its_update():
    kind = family("unet_skip")
    job = kind.job(optax.adam(1e-3))
    rows = measure_layers(job, kind.batch(), seconds_per_layer=0.002).seconds
    assert len(rows) == len(job.model.layers)
    assert all(0 < row.forward_s < 1 for row in rows)
    assert all(0 < row.backward_s < 1 for row in rows)
    assert all(row.update_s > 0 for row in rows)


def test_a_measured_profile_says_so_and_borrowed_parameters_are_lent():
    kind = family("gpt2")
    job = kind.job(optax.sgd(0.1), batch_size=4)
    made = profile(job, CROWD, kind.batch(4), measure=True, cache_dir=None)
    assert made.source == "measured"
    assert set(made.seconds) == {HOME, SLOW}
    assert made.seconds[HOME][-1].update_s == 0  # the head's table is the embedding's
    assert made.seconds[SLOW][0].forward_s == 4 * made.seconds[HOME][0].forward_s
