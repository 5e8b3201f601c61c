"""Predictions from a machine's rates, on paper."""

import optax
import pytest
from support.families import family

from crowdmesh_jax.core import Crowd, LayerProfile, LayerSeconds, ModelProfile
from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.profiling import (
    Calibration,
    calibrate_machine,
    compare_layers,
    predict_layers,
    profile,
    why,
    worst_layers,
)
from crowdmesh_jax.profiling.roofline import moved_bytes

MACHINE = Calibration(flops_per_s=1e9, bytes_per_s=1e8, call_s=1e-4)


def layer(name, flops, parameter_bytes, output_bytes):
    return LayerProfile(
        name=name,
        forward_flops=flops,
        backward_flops=2 * flops,
        parameter_bytes=parameter_bytes,
        optimizer_bytes=2 * parameter_bytes,
        output_bytes=output_bytes,
        gradient_bytes=output_bytes,
        residual_bytes=output_bytes,
    )


MODEL = ModelProfile(
    layers=(
        layer("busy", 1e8, 1000, 1000),
        layer("wide", 1e3, 10**7, 1000),
        layer("tiny", 10, 10, 10),
    ),
    microbatches=1,
    microbatch_size=1,
    input_bytes=500,
)


def test_a_layer_takes_the_longer_of_arithmetic_and_memory_and_its_call():
    busy, wide, tiny = predict_layers(MODEL, MACHINE)
    assert busy.forward_s == pytest.approx(0.1 + 1e-4)
    assert busy.backward_s == pytest.approx(0.2 + 1e-4)
    assert wide.forward_s == pytest.approx(10**7 / 1e8 + 1e-4, rel=1e-3)
    assert wide.backward_s == pytest.approx(2 * 10**7 / 1e8 + 1e-4, rel=1e-3)
    assert wide.update_s == pytest.approx((3 + 4) * 10**7 / 1e8)
    assert tiny.forward_s == pytest.approx(1e-4, rel=0.2)


def test_what_a_layer_moves_is_what_it_reads_and_writes():
    assert moved_bytes(MODEL, 0) == (1000 + 500 + 1000 + 1000, 2000 + 1000 + 500 + 1000)
    forward, backward = moved_bytes(MODEL, 2)
    assert forward == 10 + 1000 + 10 + 10
    assert backward == 20 + 10 + 1000 + 10 + 1000


def test_the_worst_layers_are_those_that_cost_the_most_seconds_and_say_why():
    measured = (
        LayerSeconds(forward_s=0.1, backward_s=0.2),  # as predicted
        LayerSeconds(forward_s=0.5, backward_s=0.5),  # 3.3 times
        LayerSeconds(forward_s=0.001, backward_s=0.001),  # 10 times, of next to nothing
    )
    rows = compare_layers(MODEL, measured, MACHINE)
    assert [row.bound for row in rows] == ["arithmetic", "memory", "call"]
    assert rows[0].ratio == pytest.approx(1.0, rel=0.01)
    assert [row.name for row in worst_layers(rows)] == ["wide", "tiny"]
    assert "bound by memory" in why(rows[1])
    assert "little work" in why(rows[2])


def test_a_layer_without_backward_pays_no_call_for_it():
    first = LayerProfile(name="prepare", forward_flops=10, backward_flops=0)
    model = ModelProfile(layers=(first,), microbatches=1, microbatch_size=1, input_bytes=4)
    assert predict_layers(model, MACHINE)[0].backward_s == 0.0


def test_this_machine_has_rates_that_a_processor_can_have():
    found = calibrate_machine(seconds=0.05)
    assert 1e7 < found.flops_per_s < 1e13
    assert 1e7 < found.bytes_per_s < 1e13
    assert 1e-7 < found.call_s < 0.1
    with pytest.raises(InvalidValueError, match="bytes_per_s"):
        Calibration(flops_per_s=1.0, bytes_per_s=float("nan"), call_s=1.0)


def test_a_calibrated_profile_is_the_roofline_of_this_machine(monkeypatch):
    kind = family("mlp")
    job = kind.job(optax.adam(1e-3))
    monkeypatch.setattr("crowdmesh_jax.profiling.measure.calibrate_machine", lambda: MACHINE)
    made = profile(job, Crowd.local((1.0, 0.25)), kind.batch(), calibrate=True, cache_dir=None)
    assert made.seconds["device-0"] == predict_layers(made, MACHINE)
    slow = made.seconds["device-1"]
    assert slow[0].forward_s == pytest.approx(4 * made.seconds["device-0"][0].forward_s)
