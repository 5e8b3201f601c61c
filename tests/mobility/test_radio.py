"""Radio: path loss, rates, losses and ranges by their formulas."""

import dataclasses
import math

import numpy as np
import pytest

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import (
    WIFI_N_20MHZ,
    DiscRadio,
    LogDistanceRadio,
    RateTable,
    TruncatedShannon,
)

WIFI = LogDistanceRadio()
LTE = LogDistanceRadio(rates=TruncatedShannon(bandwidth_hz=10e6))


def test_power_falls_by_ten_exponent_decibels_a_decade():
    power = WIFI.received_dbm([1.0, 10.0, 100.0])
    assert power == pytest.approx([16 - 46.68, 16 - 46.68 - 30, 16 - 46.68 - 60])
    # ns-3's LogDistancePropagationLossModel at its defaults, 0.050357 W sent: the powers that its
    # validation test lists for 10, 20, 40 and 80 m (with the reference loss of 2.4 GHz, 40.046 dB).
    ns3 = LogDistanceRadio(tx_power_dbm=10 * math.log10(50.357), reference_loss_db=40.045997)
    watts = 10 ** ((ns3.received_dbm([10, 20, 40, 80]) - 30) / 10)
    assert watts == pytest.approx([4.98265e-9, 6.22831e-10, 7.78539e-11, 9.73173e-12], rel=1e-3)


def test_within_a_metre_power_stays_and_shadows_are_taken_off():
    assert WIFI.received_dbm(0.0) == WIFI.received_dbm(1.0)
    assert WIFI.received_dbm(10.0, 5.0) == WIFI.received_dbm(10.0) - 5


def test_wifi_rates_are_those_of_the_table():
    mbit_s = 8e-6 * WIFI.rates.rate_bytes_per_s(np.array([-83, -82, -81.9, -77, -70.01, -64, 0]))
    assert mbit_s == pytest.approx(np.array([0, 6.5, 6.5, 19.5, 26, 65, 65]) * 0.65)


def test_the_truncated_bound_is_shannons_between_its_ends():
    curve = TruncatedShannon(bandwidth_hz=10e6, noise_figure_db=9.0)
    assert curve.noise_dbm == pytest.approx(-95.0)
    power = curve.noise_dbm + np.array([-10.001, -10.0, 0.0, 10.0, 60.0])
    told = curve.rate_bytes_per_s(power) * 8 / 10e6
    shannon = 0.6 * np.log2(1 + 10 ** np.array([-1.0, 0.0, 1.0]))
    assert told == pytest.approx([0, *shannon, 4.4])


@pytest.mark.parametrize("radio", [WIFI, LTE, dataclasses.replace(WIFI, shadowing_db=0.0)])
def test_up_to_the_range_there_is_a_rate_and_beyond_there_is_none(radio):
    near, far = radio.range_m * (1 - 1e-9), radio.range_m * (1 + 1e-9)
    assert radio.rate_bytes_per_s(near) > 0
    assert radio.rate_bytes_per_s(far) == 0
    assert radio.loss(far) == 1
    told = radio.loss(near)
    assert told == (pytest.approx(0.5, abs=1e-6) if radio.shadowing_db else 0)


def test_the_range_of_wifi_is_that_of_the_formula():
    assert WIFI.range_m == pytest.approx(10 ** ((16 - 46.68 + 82) / 30))  # 51.4 m


@pytest.mark.parametrize("radio", [WIFI, LTE])
def test_farther_is_never_better(radio):
    distance = np.linspace(0, 1.2 * radio.range_m, 2000)
    assert (np.diff(radio.rate_bytes_per_s(distance)) <= 0).all()
    assert (np.diff(radio.loss(distance)) >= 0).all()


@pytest.mark.parametrize("distance_m", [20.0, 35.0, 50.0])
def test_the_loss_is_the_share_of_shadows_that_leave_no_rate(distance_m):
    shadows = WIFI.draw_shadows_db(200_000, np.random.default_rng(1))
    assert shadows.std() == pytest.approx(6.0, rel=0.01)
    down = (WIFI.rate_bytes_per_s(distance_m, shadows) == 0).mean()
    assert down == pytest.approx(float(WIFI.loss(distance_m)), abs=0.004)


def test_shadows_change_with_the_way_moved():
    generator = np.random.default_rng(2)
    before = WIFI.draw_shadows_db(200_000, generator)
    for moved_m, kept in ((0.0, 1.0), (20.0, math.exp(-1)), (1e4, 0.0)):
        after = WIFI.move_shadows_db(before, np.full(200_000, moved_m), generator)
        assert after.std() == pytest.approx(6.0, rel=0.02)
        assert np.corrcoef(before, after)[0, 1] == pytest.approx(kept, abs=0.01)


def test_a_disc_has_one_rate():
    radio = DiscRadio(range_m=80.0, in_range_bytes_per_s=6e6, in_range_loss=0.01)
    assert radio.rate_bytes_per_s([0.0, 80.0, 80.1]).tolist() == [6e6, 6e6, 0.0]
    assert radio.loss([0.0, 80.0, 80.1]).tolist() == [0.01, 0.01, 1.0]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: DiscRadio(range_m=0.0, in_range_bytes_per_s=1.0), "range_m"),
        (lambda: DiscRadio(range_m=1.0, in_range_bytes_per_s=math.nan), "in_range_bytes_per_s"),
        (lambda: DiscRadio(range_m=1.0, in_range_bytes_per_s=1.0, in_range_loss=1.5), "<= 1"),
        (lambda: WIFI.rate_bytes_per_s(-1.0), "distance_m must be >= 0"),
        (lambda: WIFI.loss(math.nan), "distance_m must be finite"),
        (lambda: LogDistanceRadio(exponent=0.0), "exponent"),
        (lambda: LogDistanceRadio(shadowing_db=-1.0), "shadowing_db"),
        (lambda: RateTable(steps=()), "at least one step"),
        (lambda: RateTable(steps=((-80.0, 2.0), (-70.0, 1.0))), "must increase"),
        (lambda: RateTable(steps=((-80.0, 2.0), (-90.0, 3.0))), "must increase"),
        (lambda: TruncatedShannon(bandwidth_hz=0.0), "bandwidth_hz"),
    ],
)
def test_values_out_of_range_are_refused(call, told):
    with pytest.raises(InvalidValueError, match=told):
        call()
    assert WIFI_N_20MHZ.least_dbm == -82
