"""Pairs in range against all pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import pairs_in_range


def by_hand(places, range_m, present=None):
    there = np.ones(len(places), bool) if present is None else present
    return [
        (a, b)
        for a in range(len(places))
        for b in range(a + 1, len(places))
        if there[a] and there[b] and np.hypot(*(places[a] - places[b])) <= range_m
    ]


@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(0, 30), st.just(2)), elements=st.integers(-40, 40)
    ),
    st.sampled_from([0.5, 1.0, 5.0, 7.5, 200.0]),
    st.integers(0, 2**32),
)
def test_every_pair_in_range_is_found_once_in_order(places, range_m, seed):
    present = np.random.default_rng(seed).random(len(places)) < 0.8
    for there in (None, present):
        first, second = pairs_in_range(places, range_m, present=there)
        assert list(zip(first.tolist(), second.tolist(), strict=True)) == by_hand(
            places, range_m, there
        )


def test_places_far_from_the_origin_and_a_range_far_below_the_area():
    places = np.array([[1e9, -1e9], [1e9 + 1, -1e9], [-1e9, 1e9]])
    assert [p.tolist() for p in pairs_in_range(places, 1000.0)] == [[0], [1]]
    with pytest.raises(InvalidValueError, match="too small for an area"):
        pairs_in_range(places, 1e-3)


def test_a_crowd_in_one_spot_is_refused_before_the_memory_is_taken():
    with pytest.raises(InvalidValueError, match="more than 1000 pairs of 100 devices"):
        pairs_in_range(np.zeros((100, 2)), 1.0, max_pairs=1000)


@pytest.mark.parametrize(
    ("places", "range_m", "told"),
    [
        ([[0.0, float("nan")]], 1.0, "finite"),
        ([0.0, 1.0], 1.0, r"\[n, 2\]"),
        ([[0.0, 1.0]], 0.0, "range_m"),
    ],
)
def test_what_is_no_question_is_refused(places, range_m, told):
    with pytest.raises(InvalidValueError, match=told):
        pairs_in_range(places, range_m)
