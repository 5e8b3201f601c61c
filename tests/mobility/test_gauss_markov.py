"""Gauss-Markov against its known mean, variance and autocorrelation; borders."""

import math

import numpy as np
import pytest
from movement_statistics import ALLOWED, ks_two

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import Area, GaussMarkov, Movement

AREA = Area.square(100.0)


def velocities(model, devices, steps, *, dt_s=1.0, seed=3):
    movement = Movement(model, devices, seed=seed, dt_s=dt_s)
    found = [movement.snapshot().velocities_m_per_s]
    for _ in range(steps):
        movement.advance()
        found.append(movement.snapshot().velocities_m_per_s)
    return np.stack(found)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.92, 1.0])
@pytest.mark.parametrize("dt_s", [0.5, 1.0, 2.0])
def test_velocities_have_the_mean_the_variance_and_the_memory_of_the_formula(alpha, dt_s):
    model = GaussMarkov(
        area=AREA, alpha=alpha, sigma_m_per_s=0.8, mean_m_per_s=(0.5, -0.25), bounded=False
    )
    devices = 10_000
    found = velocities(model, devices, 6, dt_s=dt_s)
    error = 0.8 / math.sqrt(devices)
    for k in (0, 3, 6):
        at_k = found[k]
        assert np.abs(at_k.mean(axis=0) - [0.5, -0.25]).max() < 4.5 * error
        assert at_k.std(axis=0) == pytest.approx([0.8, 0.8], rel=0.03)
        together = ((found[0] - [0.5, -0.25]) * (at_k - [0.5, -0.25])).mean() / 0.64
        assert together == pytest.approx(alpha ** (k * dt_s), abs=0.035)


def test_both_components_are_independent():
    found = velocities(GaussMarkov(area=AREA, bounded=False), 20_000, 3)[-1]
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.03


def test_positions_are_the_sum_of_velocities():
    model = GaussMarkov(area=AREA, bounded=False)
    movement = Movement(model, 50, seed=1, dt_s=0.5)
    place = movement.snapshot().positions_m
    for _ in range(20):
        place = place + 0.5 * movement.snapshot().velocities_m_per_s
        movement.advance()
    assert np.allclose(movement.snapshot().positions_m, place)


def test_borders_reflect_and_leave_speeds_and_places_as_they_were():
    model = GaussMarkov(area=Area(width_m=20.0, height_m=10.0), alpha=0.9, sigma_m_per_s=1.0)
    movement = Movement(model, 10_000, seed=2)
    start = movement.snapshot()
    movement.advance(100)
    shot = movement.snapshot()
    assert (shot.positions_m >= 0).all()
    assert (shot.positions_m <= [20, 10]).all()
    assert shot.velocities_m_per_s.std(axis=0) == pytest.approx([1, 1], rel=0.03)
    for axis in (0, 1):
        assert ks_two(shot.positions_m[:, axis], start.positions_m[:, axis]) < ALLOWED
        assert ks_two(shot.velocities_m_per_s[:, axis], start.velocities_m_per_s[:, axis]) < ALLOWED


def test_a_border_turns_the_velocity_and_its_mean():
    """Without noise a device goes to and fro for ever: 0 to 10 m and back, 3 m a step."""
    model = GaussMarkov(
        area=Area.square(10.0), alpha=0.5, sigma_m_per_s=0.0, mean_m_per_s=(3.0, 0.0)
    )
    movement = Movement(model, 1, seed=1)
    start = float(movement.snapshot().positions_m[0, 0])
    for step in range(1, 30):
        movement.advance()
        shot = movement.snapshot()
        unfolded = (start + 3 * step) % 20
        assert shot.positions_m[0, 0] == pytest.approx(min(unfolded, 20 - unfolded))
        assert shot.velocities_m_per_s[0, 0] == (3 if unfolded <= 10 else -3)
        assert shot.positions_m[0, 1] == pytest.approx(float(movement.snapshot().positions_m[0, 1]))


def test_a_device_may_cross_the_area_many_times_in_a_step():
    model = GaussMarkov(area=Area.square(1.0), alpha=0.9, sigma_m_per_s=100.0)
    movement = Movement(model, 1000, seed=1)
    movement.advance(5)
    places = movement.snapshot().positions_m
    assert ((places >= 0) & (places <= 1)).all()


def test_devices_have_mean_speeds_of_their_own():
    model = GaussMarkov.of_speeds(AREA, alpha=0.5, speed_min_m_per_s=0.2, speed_max_m_per_s=1.2)
    found = velocities(model, 400, 400)
    means = np.hypot(found[..., 0], found[..., 1]).mean(axis=0)
    assert means.mean() == pytest.approx(0.7, rel=0.05)
    assert means.min() == pytest.approx(0.2, rel=0.2)
    assert means.max() == pytest.approx(1.2, rel=0.2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alpha": 1.1}, "<= 1, got 1.1"),
        ({"alpha": -0.1}, ">= 0, got -0.1"),
        ({"alpha": math.nan}, "got nan"),
        ({"sigma_m_per_s": -1.0}, "sigma_m_per_s"),
        ({"sigma_max_m_per_s": 0.1}, ">= 0.5"),
        ({"mean_m_per_s": (math.inf, 0.0)}, "mean_m_per_s must be finite"),
        ({"mean_m_per_s": (0.0, 0.0, 0.0)}, "mean_m_per_s"),
    ],
)
def test_values_out_of_range_are_refused(options, told):
    with pytest.raises(InvalidValueError, match="CM-101") as caught:
        GaussMarkov(area=AREA, **options)
    assert told in str(caught.value)
