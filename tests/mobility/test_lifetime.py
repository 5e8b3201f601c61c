"""Link lifetimes against stepping, and the laws that hold for them."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import link_lifetime_s, pairwise_lifetime_s, relative_lifetime_s

coordinates = st.floats(-100, 100).map(lambda x: round(x, 3))
pairs = st.tuples(coordinates, coordinates).map(np.array)


def stepped(apart, relative, range_m, dt_s=0.01, most_s=400.0):
    """When the distance first exceeds the range, by going there."""
    times = np.arange(0, most_s, dt_s)
    distance = np.hypot(*(apart[:, None] + relative[:, None] * times))
    out = np.flatnonzero(distance > range_m)
    return times[out[0]] if len(out) else math.inf


@given(pairs, st.tuples(st.floats(-3, 3), st.floats(-3, 3)).map(np.array), st.floats(1, 150))
def test_the_closed_form_is_what_stepping_finds(apart, relative, range_m):
    assume(abs(np.hypot(*apart) - range_m) > 1e-6)
    assume(np.hypot(*relative) == 0 or np.hypot(*relative) > 1e-2)
    told = float(relative_lifetime_s(apart, relative, range_m))
    found = stepped(apart, relative, range_m)
    if math.isinf(found):
        assert told > 399
    else:
        assert told == pytest.approx(found, abs=0.011)


@given(pairs, pairs, pairs, pairs, st.floats(0.1, 300))
def test_both_ends_see_the_same_lifetime(pa, va, pb, vb, range_m):
    there = link_lifetime_s(pa, va, pb, vb, range_m)
    back = link_lifetime_s(pb, vb, pa, va, range_m)
    assert there == back


@given(pairs, pairs, pairs, pairs, pairs, pairs, st.floats(10, 300))
def test_it_does_not_matter_where_the_two_are_nor_how_they_move_together(
    pa, va, pb, vb, shift, drift, range_m
):
    assume(abs(np.hypot(*(pb - pa)) - range_m) > 1e-3)
    plain = link_lifetime_s(pa, va, pb, vb, range_m)
    moved = link_lifetime_s(pa + shift, va + drift, pb + shift, vb + drift, range_m)
    slow = np.hypot(*(vb - va)) < 1e-2
    assert moved == pytest.approx(plain, rel=1e-6) or slow


@given(pairs, pairs, st.floats(10, 300), st.sampled_from([1e-150, 1e-9, 2.0, 1e12, 1e150]))
def test_lengths_and_times_scale(apart, relative, range_m, factor):
    assume(abs(np.hypot(*apart) - range_m) > 1e-3)
    plain = float(relative_lifetime_s(apart, relative, range_m))
    larger = float(relative_lifetime_s(apart * factor, relative * factor, range_m * factor))
    assert larger == pytest.approx(plain, rel=1e-9)
    quicker = float(relative_lifetime_s(apart, relative * 4, range_m))
    assert quicker == pytest.approx(plain / 4, rel=1e-9)


@given(pairs, pairs, st.floats(10, 300), st.floats(0, 2 * math.pi))
def test_turning_the_world_changes_nothing(apart, relative, range_m, angle):
    assume(abs(np.hypot(*apart) - range_m) > 1e-3)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    plain = float(relative_lifetime_s(apart, relative, range_m))
    turned = float(relative_lifetime_s(turn @ apart, turn @ relative, range_m))
    assert turned == pytest.approx(plain, rel=1e-6, abs=1e-9)


@given(pairs, pairs, st.floats(1, 300), st.floats(1, 300))
def test_a_longer_range_never_shortens_a_lifetime(apart, relative, one, other):
    low, high = sorted((one, other))
    shorter = relative_lifetime_s(apart, relative, low)
    assert shorter <= relative_lifetime_s(apart, relative, high) * (1 + 1e-12)


@given(
    hnp.arrays(np.float64, (7, 2), elements=st.floats(-1e150, 1e150)),
    hnp.arrays(np.float64, (7, 2), elements=st.floats(-1e150, 1e150)),
    st.floats(1e-150, 1e150),
)
def test_whatever_is_asked_the_answer_is_a_number(apart, relative, range_m):
    told = relative_lifetime_s(apart, relative, range_m)
    assert not np.isnan(told).any()
    assert (told >= 0).all()


def test_equal_velocities_last_for_ever_in_range_and_not_at_all_outside():
    east = [1.5, 0.0]
    assert link_lifetime_s([0, 0], east, [10, 0], east, 20.0) == math.inf
    assert link_lifetime_s([0, 0], east, [0, 0], east, 20.0) == math.inf
    assert link_lifetime_s([0, 0], east, [20, 0], east, 20.0) == math.inf
    assert link_lifetime_s([0, 0], east, [21, 0], east, 20.0) == 0
    still = np.zeros((3, 2))
    assert (relative_lifetime_s(still, still, 1.0) == math.inf).all()


def test_at_the_border_it_depends_on_the_way():
    assert relative_lifetime_s([20.0, 0.0], [1.0, 0.0], 20.0) == 0
    assert relative_lifetime_s([20.0, 0.0], [-1.0, 0.0], 20.0) == pytest.approx(40)
    assert relative_lifetime_s([20.0, 0.0], [0.0, 1.0], 20.0) == 0
    # Approaching from outside is no link yet.
    assert relative_lifetime_s([21.0, 0.0], [-1.0, 0.0], 20.0) == 0


def test_close_to_the_border_no_digits_are_lost():
    """A millionth of a millionth before the border: naively all digits cancel."""
    told = float(relative_lifetime_s([1.0 - 2.0**-40, 0.0], [1.0, 0.0], 1.0))
    assert told == pytest.approx(2.0**-40, rel=1e-12)


def test_shapes_are_broadcast():
    generator = np.random.default_rng(1)
    places, velocities = generator.random((2, 5, 2))
    told = link_lifetime_s(places[:, None], velocities[:, None], places[None], velocities[None], 1)
    assert told.shape == (5, 5)
    assert (np.diag(told) == math.inf).all()
    assert (told == told.T).all()
    one = link_lifetime_s(places[1], velocities[1], places[3], velocities[3], 1)
    assert one == told[1, 3]


def test_pairs_that_are_asked_about():
    generator = np.random.default_rng(2)
    places, velocities = 10 * generator.random((6, 2)), generator.random((6, 2)) - 0.5
    members = np.array([[1, 2], [0, -1], [5, 4], [3, 0], [-1, -1], [2, 3]])
    told = pairwise_lifetime_s(places, velocities, members, 8.0)
    for device, row in enumerate(members):
        for column, other in enumerate(row):
            if other < 0:
                assert told[device, column] == 0
            else:
                assert told[device, column] == link_lifetime_s(
                    places[device], velocities[device], places[other], velocities[other], 8.0
                )


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: relative_lifetime_s([0, math.nan], [0, 0], 1.0), "offset_m must be finite"),
        (lambda: relative_lifetime_s([0, 0], [0, math.inf], 1.0), "must be finite"),
        (lambda: relative_lifetime_s([0, 0], [0, 0], 0.0), "range_m"),
        (lambda: relative_lifetime_s([0, 0], [0, 0], -1.0), "range_m"),
        (lambda: relative_lifetime_s([0, 0], [0, 0], math.nan), "range_m"),
        (lambda: relative_lifetime_s([0, 0, 0], [0, 0], 1.0), "2 as its last axis"),
        (lambda: relative_lifetime_s(np.ones((3, 2)), np.ones((4, 2)), 1.0), "do not fit"),
        (lambda: link_lifetime_s(np.ones((3, 2)), [0, 0], np.ones((4, 2)), [0, 0], 1), "not fit"),
        (lambda: pairwise_lifetime_s([[0, 0]], [[0, 0]], [[1]], 1.0), "device numbers below 1"),
        (lambda: pairwise_lifetime_s([[0, 0]], [[0, 0]], [[-2]], 1.0), "device numbers"),
        (lambda: pairwise_lifetime_s([[0, 0]], [[0, 0]], [[0.5]], 1.0), "integers"),
    ],
)
def test_what_is_no_question_is_refused(call, told):
    with pytest.raises(InvalidValueError, match="CM-101") as caught:
        call()
    assert told in str(caught.value)
