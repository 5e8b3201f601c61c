"""Hazards of leaving: geometry against stepping, learning against known laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.errors import DataError, InvalidValueError
from crowdmesh_jax.mobility import (
    Area,
    GammaPrior,
    HeartbeatLog,
    Sessions,
    combined_hazard_per_s,
    crossing_hazard_per_s,
    exponential_hazard_per_s,
    leave_probability,
    movement_hazard_per_s,
    time_to_leave_area_s,
    time_to_leave_disc_s,
    weibull_hazard_per_s,
    weibull_shape,
)

AREA = Area(width_m=30.0, height_m=10.0)


@given(
    st.tuples(st.floats(0.1, 29.9), st.floats(0.1, 9.9)),
    st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
)
def test_the_time_until_a_rectangle_is_left_is_what_stepping_finds(place, velocity):
    told = float(time_to_leave_area_s(place, velocity, AREA))
    times = np.arange(0, 500, 0.01)
    path = np.array(place) + np.array(velocity) * times[:, None]
    out = np.flatnonzero(((path < 0) | (path > [30, 10])).any(axis=1))
    if len(out):
        assert told == pytest.approx(times[out[0]], abs=0.011)
    else:
        assert told > 499


def test_the_time_until_a_disc_is_left():
    told = time_to_leave_disc_s(
        [[5.0, 5.0], [5.0, 5.0], [50.0, 5.0], [8.0, 5.0]],
        [[2.0, 0.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]],
        centre_m=[5.0, 5.0],
        radius_m=10.0,
    )
    assert told.tolist() == [5.0, math.inf, 0.0, 13.0]


def test_who_is_outside_or_stands_still():
    told = time_to_leave_area_s(
        [[31.0, 5], [5, 5], [0, 5], [0, 5]], [[-1, 0], [0, 0], [1, 0], [-1, 0]], AREA
    )
    assert told.tolist() == [0.0, math.inf, 30.0, 0.0]


def test_a_time_becomes_a_rate():
    assert movement_hazard_per_s([10.0, math.inf, 0.0, 0.5]).tolist() == [0.1, 0.0, 1.0, 1.0]
    assert movement_hazard_per_s(0.5, least_s=0.1) == 2.0
    for wrong in (math.nan, -1.0):
        with pytest.raises(InvalidValueError, match="time_to_leave_s"):
            movement_hazard_per_s([1.0, wrong])


def test_the_rate_of_crossing_a_disc_is_that_of_straight_ways_through_it():
    """Entered anywhere, in the directions of a uniform flow: mean chord pi R / 2."""
    generator = np.random.default_rng(1)
    offset = 20 * (2 * generator.random(20_000) - 1)  # how far from the middle a way passes
    start = np.stack([-np.sqrt(20**2 - offset**2) * (1 - 1e-9), offset], axis=1)
    times = time_to_leave_disc_s(start, [[1.5, 0.0]], centre_m=[0.0, 0.0], radius_m=20.0)
    assert 1 / times.mean() == pytest.approx(float(crossing_hazard_per_s(1.5, 20.0)), rel=0.01)


def test_causes_add_up_and_survival_is_exponential():
    total = combined_hazard_per_s([0.1, 0.0], 0.05, np.array([0.0, 0.2]))
    assert total == pytest.approx([0.15, 0.25])
    assert leave_probability(total, 10.0) == pytest.approx([1 - math.exp(-1.5), 1 - math.exp(-2.5)])
    assert leave_probability(1e-20, 1.0) == pytest.approx(1e-20)  # no digits lost
    with pytest.raises(InvalidValueError, match="at least one"):
        combined_hazard_per_s()
    with pytest.raises(InvalidValueError, match=r"hazard 1 must be >= 0, got -0\.1"):
        combined_hazard_per_s(0.1, [0.2, -0.1])
    with pytest.raises(InvalidValueError, match="do not fit"):
        combined_hazard_per_s([0.1, 0.1], [0.1, 0.1, 0.1])


def test_a_rate_is_learned_by_the_formula():
    sessions = Sessions.of([0, 0, 1, 2], [100, 50, 30, 400], [True, True, False, False], devices=4)
    told = exponential_hazard_per_s(sessions, GammaPrior(mean_s=200.0, weight=2.0))
    # (weight + ends) / (weight x mean + seconds)
    assert told == pytest.approx([4 / 550, 2 / 430, 2 / 800, 2 / 400])
    each = GammaPrior(mean_s=np.array([100.0, 200.0, 300.0, 400.0]))
    assert exponential_hazard_per_s(sessions, each)[3] == pytest.approx(1 / 400)


@pytest.mark.parametrize("watched_s", [100.0, 400.0])
def test_sessions_that_go_on_are_counted_so_that_the_rate_is_not_biased(watched_s):
    """Stays of mean 200 s, watched for less or more; ended ones alone would tell far more."""
    generator = np.random.default_rng(2)
    stays = generator.exponential(200.0, 50_000)
    ended = stays < watched_s
    sessions = Sessions.of(np.zeros(50_000, int), np.minimum(stays, watched_s), ended, devices=1)
    told = exponential_hazard_per_s(sessions, GammaPrior(mean_s=1000.0))
    assert told[0] == pytest.approx(1 / 200, rel=0.02)
    assert 1 / stays[ended].mean() > 1.3 / 200
    assert weibull_shape(sessions) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.5])
def test_a_weibull_shape_and_rate_are_found_again(shape):
    generator = np.random.default_rng(3)
    stays = 300 * generator.weibull(shape, 20_000)
    watched = generator.uniform(0, 800, 20_000)
    sessions = Sessions.of(
        np.zeros(20_000, int), np.minimum(stays, watched), stays < watched, devices=1
    )
    found = weibull_shape(sessions)
    assert found == pytest.approx(shape, rel=0.04)
    for age_s in (30.0, 200.0):
        told = weibull_hazard_per_s(sessions, [age_s], GammaPrior(mean_s=500.0), shape=shape)
        true = shape / 300 * (age_s / 300) ** (shape - 1)
        assert told[0] == pytest.approx(true, rel=0.05)


def test_the_shape_is_where_the_likelihood_is_largest():
    sessions = Sessions.of([0] * 5, [5.0, 9.0, 30.0, 7.0, 60.0], [1, 1, 1, 0, 0], devices=1)

    def log_likelihood(shape):
        """With the best scale for it."""
        exposure = (sessions.duration_s**shape).sum()
        ends = sessions.ended.sum()
        return (
            ends * math.log(ends * shape / exposure)
            + (shape - 1) * np.log(sessions.duration_s[sessions.ended]).sum()
        )

    best = weibull_shape(sessions)
    assert all(log_likelihood(best) >= log_likelihood(best * f) for f in (0.9, 0.999, 1.001, 1.1))


def test_without_sessions_the_prior_stands():
    nothing = Sessions.of([], [], [], devices=2)
    prior = GammaPrior(mean_s=400.0, weight=3.0)
    assert exponential_hazard_per_s(nothing, prior) == pytest.approx([1 / 400] * 2)
    # Shape 1 is the exponential, at any age; another shape keeps the mean stay.
    assert weibull_hazard_per_s(nothing, [5.0, 50.0], prior, shape=1.0) == pytest.approx(
        [1 / 400] * 2
    )
    ages = np.linspace(0.05, 4000, 400_000)
    many = Sessions.of([], [], [], devices=400_000)
    hazard = weibull_hazard_per_s(many, ages, prior, shape=2.0)
    survival = np.exp(-np.cumsum(hazard) * (ages[1] - ages[0]))
    assert survival.sum() * (ages[1] - ages[0]) == pytest.approx(400.0, rel=0.01)


def test_a_hazard_at_age_0_is_finite_whatever_the_shape():
    nothing = Sessions.of([], [], [], devices=1)
    told = weibull_hazard_per_s(nothing, [0.0], GammaPrior(mean_s=100.0), shape=0.4)
    assert 0 < told[0] < 10


def test_the_movement_may_be_the_prior_of_what_is_learned():
    leaving = movement_hazard_per_s([20.0, 2000.0])
    nothing = Sessions.of([], [], [], devices=2)
    told = exponential_hazard_per_s(nothing, GammaPrior(mean_s=1 / leaving))
    assert told == pytest.approx(leaving)


def test_heartbeats_become_sessions():
    log = HeartbeatLog(2, period_s=1.0, timeout_s=3.0)
    for t in range(11):  # device 0: 0 to 4 s, then from 9 s on; device 1: all the time
        log.hear(float(t), [t <= 4 or t >= 9, True])
        if t == 7:
            assert log.present.tolist() == [True, True]  # silent for 3 s: not yet
        if t == 8:
            assert log.present.tolist() == [False, True]
    sessions = log.sessions()
    assert sessions.device.tolist() == [0, 0, 1]
    assert sessions.duration_s.tolist() == [4.5, 1.0, 10.0]  # half a period after the last beat
    assert sessions.ended.tolist() == [True, False, False]
    assert log.age_s.tolist() == [1.0, 10.0]
    assert sessions.ends.tolist() == [1, 0]
    assert sessions.exposure().tolist() == [5.5, 10.0]


def test_a_newcomer_ends_the_session_of_the_one_before():
    log = HeartbeatLog(1, period_s=1.0, timeout_s=3.0)
    for t, who in ((0, 5), (1, 5), (2, 9), (3, 9)):
        log.hear(float(t), [True], [who])
    assert log.sessions().duration_s.tolist() == [1.5, 1.0]
    assert log.sessions().ended.tolist() == [True, False]


def test_devices_that_never_came_count_for_nothing_and_memory_is_bounded():
    log = HeartbeatLog(3, timeout_s=1.0, keep=10)
    assert len(log.sessions().device) == 0
    for t in range(0, 200, 2):
        log.hear(float(t), [True, False, False])  # each beat a session of its own
    sessions = log.sessions()
    assert len(sessions.device) <= 11
    assert set(sessions.device.tolist()) == {0}
    assert log.present.tolist() == [True, False, False]


def test_learned_through_heartbeats_the_rate_is_that_of_the_world():
    """Devices leave at 1/50 a second and come back; the log sees beats alone."""
    generator = np.random.default_rng(4)
    there, away = np.ones(2000, bool), np.zeros(2000)
    log = HeartbeatLog(2000, period_s=1.0, timeout_s=2.0)
    for t in range(400):
        log.hear(float(t), there)
        stays = generator.random(2000) >= 1 - math.exp(-1 / 50)
        returns = (away > 5) & (generator.random(2000) < 0.1)  # shorter absences are not seen
        there = np.where(there, stays, returns)
        away = np.where(there, 0, away + 1)
    told = exponential_hazard_per_s(log.sessions(), GammaPrior(mean_s=50.0, weight=0.01))
    crowd = log.sessions().ends.sum() / log.sessions().exposure().sum()
    assert crowd == pytest.approx(1 / 50, rel=0.03)
    assert told.mean() == pytest.approx(1 / 50, rel=0.1)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: Sessions.of([0], [-1.0], [True], devices=1), "duration_s must be >= 0"),
        (lambda: Sessions.of([0], [math.nan], [True], devices=1), "finite"),
        (lambda: Sessions.of([1], [1.0], [True], devices=1), r"must lie in 0\.\.0"),
        (lambda: Sessions.of([0], [1.0, 2.0], [True], devices=1), "as many devices"),
        (lambda: GammaPrior(mean_s=0.0), "mean_s must be > 0"),
        (lambda: GammaPrior(mean_s=1.0, weight=0.0), "weight"),
        (lambda: HeartbeatLog(1, period_s=2.0, timeout_s=1.0), "timeout_s"),
        (lambda: HeartbeatLog(2).hear(0.0, [True]), r"\[2\] booleans"),
        (lambda: crossing_hazard_per_s(-1.0, 5.0), "speed_m_per_s"),
        (lambda: crossing_hazard_per_s(1.0, 0.0), "radius_m"),
    ],
)
def test_what_cannot_be_is_refused(call, told):
    with pytest.raises(InvalidValueError, match=told):
        call()


def test_time_does_not_go_back_and_a_shape_needs_ends():
    log = HeartbeatLog(1)
    log.hear(5.0, [True])
    with pytest.raises(InvalidValueError, match="heard at 4 s after 5 s"):
        log.hear(4.0, [True])
    with pytest.raises(DataError, match="1 ended sessions"):
        weibull_shape(Sessions.of([0, 0], [5.0, 6.0], [True, False], devices=1))
    sessions = Sessions.of([], [], [], devices=3)
    with pytest.raises(InvalidValueError, match=r"one number or \[3\]"):
        exponential_hazard_per_s(sessions, GammaPrior(mean_s=np.ones(2) * 5, weight=1.0))
