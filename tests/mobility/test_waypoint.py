"""Random waypoint against what is known of its stationary state, at time 0 and later."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from movement_statistics import ALLOWED, ks, ks_two

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import Area, Movement, RandomWaypoint

WALK = RandomWaypoint(
    area=Area.square(150.0), speed_min_m_per_s=0.2, speed_max_m_per_s=1.2, pause_max_s=120.0
)
COUNT = 40_000


def speeds(shot):
    return np.hypot(*shot.velocities_m_per_s.T)


def inverse_cdf(speed):
    """Of a density ~ 1/v between 0.2 and 1.2."""
    return np.log(np.clip(speed, 0.2, 1.2) / 0.2) / math.log(6)


@pytest.mark.parametrize("steps", [0, 50, 400])
def test_speeds_under_way_have_the_density_one_over_v_from_the_first_moment_on(steps):
    movement = Movement(WALK, COUNT // 4, seed=5, dt_s=2.0)
    movement.advance(steps)
    moving = speeds(movement.snapshot())
    moving = moving[moving > 0]
    assert ks(moving, inverse_cdf) < ALLOWED
    assert moving.mean() == pytest.approx((1.2 - 0.2) / math.log(1.2 / 0.2), rel=0.02)
    assert WALK.moving_speed_m_per_s() == pytest.approx((1.2 - 0.2) / math.log(1.2 / 0.2))


@pytest.mark.parametrize("steps", [0, 50, 400])
def test_the_share_of_devices_that_pause_is_the_share_of_time(steps):
    movement = Movement(WALK, COUNT // 4, seed=6, dt_s=2.0)
    movement.advance(steps)
    leg_s = 0.521405 * 150 * math.log(6)  # E[length] E[1/v]
    told = 60 / (60 + leg_s)
    share = (speeds(movement.snapshot()) == 0).mean()
    assert share == pytest.approx(told, abs=4 * math.sqrt(told * (1 - told) / (COUNT // 4)))
    assert WALK.pause_share() == pytest.approx(told, rel=1e-5)
    assert WALK.mean_speed_m_per_s() == pytest.approx((1 - told) / math.log(6), rel=1e-5)


@pytest.mark.parametrize("steps", [0, 30])
def test_on_a_line_places_have_the_density_6_x_1_minus_x(steps):
    """The known closed form, on a strip so thin that it is a line (Bettstetter et al. 2003)."""
    model = RandomWaypoint(
        area=Area(width_m=100.0, height_m=1e-6), speed_min_m_per_s=1.0, speed_max_m_per_s=3.0
    )
    movement = Movement(model, COUNT, seed=7, dt_s=5.0)
    movement.advance(steps)
    x = movement.snapshot().positions_m[:, 0] / 100
    assert ks(x, lambda t: 3 * t**2 - 2 * t**3) < ALLOWED


def test_devices_gather_in_the_middle_and_stay_inside():
    model = dataclasses.replace(WALK, pause_max_s=0.0)
    movement = Movement(model, COUNT, seed=8)
    movement.advance(20)
    places = movement.snapshot().positions_m / 150
    assert places.min() >= 0
    assert places.max() <= 1
    near = np.abs(places - 0.5).max(axis=1) < 0.1
    edge = (np.abs(places - 0.5) > 0.4).any(axis=1)
    assert 1.8 < near.mean() / 0.04 < 2.3  # the exact density in the middle is 2.07 (uniform: 1)
    assert edge.mean() / 0.36 < 0.5


@pytest.mark.parametrize("pause", [(0.0, 120.0), (60.0, 60.0), (0.0, 0.0), (200.0, 300.0)])
def test_the_start_is_as_any_later_moment(pause):
    """Stationary: places, distances to the middle and speeds at 0 s and 600 s are alike."""
    model = dataclasses.replace(WALK, pause_min_s=pause[0], pause_max_s=pause[1])
    movement = Movement(model, 6000, seed=9, dt_s=5.0)
    before = movement.snapshot()
    movement.advance(120)
    after = movement.snapshot()
    for value in (
        lambda s: np.hypot(*(s.positions_m - 75).T),
        lambda s: s.positions_m[:, 0],
        lambda s: speeds(s) + 1e-9 * np.arange(6000),
    ):
        assert ks_two(value(before), value(after)) < ALLOWED


def test_pauses_under_way_are_what_is_left_of_pauses_found_by_their_length():
    """The next departures: with pauses of exactly 100 s they are uniform over 100 s."""
    model = dataclasses.replace(WALK, pause_min_s=100.0, pause_max_s=100.0)
    movement = Movement(model, 4000, seed=10, dt_s=10.0)
    start = movement.snapshot()
    resting = speeds(start) == 0
    left = [resting.sum()]
    for _ in range(10):
        movement.advance()
        resting &= (movement.snapshot().positions_m == start.positions_m).all(axis=1)
        left.append(resting.sum())
    assert left[-1] == 0
    assert left[5] == pytest.approx(left[0] / 2, abs=4 * math.sqrt(left[0]) / 2)


def test_pauses_of_unequal_length_are_found_by_their_length():
    """Uniform from 0 to P: what is left exceeds s in the share (1 - s / P)^2 of devices."""
    movement = Movement(WALK, COUNT, seed=14, dt_s=12.0)
    start = movement.snapshot()
    resting = speeds(start) == 0
    count = resting.sum()
    for step in range(1, 10):
        movement.advance()
        resting &= (movement.snapshot().positions_m == start.positions_m).all(axis=1)
        assert resting.sum() / count == pytest.approx((1 - step / 10) ** 2, abs=0.02)


def test_devices_move_at_their_speed_in_straight_lines():
    model = RandomWaypoint(
        area=Area.square(1e6), speed_min_m_per_s=1.0, speed_max_m_per_s=2.0, pause_max_s=0.0
    )
    movement = Movement(model, 500, seed=11, dt_s=0.5)
    before = movement.snapshot()
    movement.advance(8)
    after = movement.snapshot()
    straight = (before.velocities_m_per_s == after.velocities_m_per_s).all(axis=1)
    assert straight.mean() > 0.95
    moved = after.positions_m - before.positions_m
    assert np.allclose(moved[straight], 4 * before.velocities_m_per_s[straight], atol=1e-6)


def test_a_leg_may_end_inside_a_step_and_no_distance_is_lost():
    """One speed, no pauses: however long the step, the path is as long as time says at most, and
    short steps agree with long ones in distribution."""
    model = RandomWaypoint(
        area=Area.square(10.0), speed_min_m_per_s=1.0, speed_max_m_per_s=1.0, pause_max_s=0.0
    )
    for dt_s in (0.25, 50.0):  # a leg takes 5 s
        movement = Movement(model, 4000, seed=12, dt_s=dt_s)
        movement.advance(4)
        shot = movement.snapshot()
        assert np.allclose(speeds(shot), 1.0)
        start = Movement(model, 4000, seed=13).snapshot()
        assert ks_two(shot.positions_m[:, 1], start.positions_m[:, 1]) < ALLOWED


@given(
    st.floats(0.1, 1e4), st.floats(0.1, 1e4),
)  # fmt: skip
def test_the_mean_distance_of_two_places_is_that_of_the_formula(width, height):
    area = Area(width_m=width, height_m=height)
    generator = np.random.default_rng(3)
    a, b = area.draw(4000, generator), area.draw(4000, generator)
    length = np.hypot(*(a - b).T)
    error = length.std() / math.sqrt(4000)
    assert abs(length.mean() - area.mean_distance_m()) < 5 * error
    # A strip's is a third of its length, exactly (hence no cancellation at 1 : 10,000).
    strip = Area(width_m=width, height_m=width * 1e-4)
    assert strip.mean_distance_m() == pytest.approx(width / 3, rel=1e-3)


def test_equal_speeds_are_no_special_case():
    same = RandomWaypoint(area=Area.square(10), speed_min_m_per_s=2.0, speed_max_m_per_s=2.0)
    assert same.moving_speed_m_per_s() == 2.0
    nearly = dataclasses.replace(same, speed_max_m_per_s=2.0 * (1 + 1e-13))
    assert nearly.moving_speed_m_per_s() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("speed_min_m_per_s", 0.0, "> 0, got 0.0"),
        ("speed_min_m_per_s", math.nan, "got nan"),
        ("speed_max_m_per_s", 0.1, ">= 0.2"),
        ("pause_min_s", -1.0, ">= 0, got -1.0"),
        ("pause_max_s", math.inf, "got inf"),
    ],
)
def test_values_out_of_range_are_refused(field, value, told):
    with pytest.raises(InvalidValueError, match="CM-101") as caught:
        dataclasses.replace(WALK, **{field: value})
    assert field in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize("side", [0.0, -1.0, math.nan, math.inf, "wide", True])
def test_an_area_needs_real_sides(side):
    with pytest.raises(InvalidValueError, match="width_m"):
        Area(width_m=side, height_m=1.0)
