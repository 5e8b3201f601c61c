"""Group movement keeps its members together; static devices stay."""

import numpy as np
import pytest

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import Area, GaussMarkov, GroupMovement, Movement, Static

GROUPS = GroupMovement(area=Area.square(200.0), group_size=4, spread_m=8.0, stray_m=3.0)


def test_members_stay_near_their_centre_and_inside_the_area():
    movement = Movement(GROUPS, 403, seed=1)
    walk = movement._walk
    farthest = []
    for _ in range(120):
        movement.advance()
        shot = movement.snapshot()
        way = shot.positions_m - walk.centres_m
        farthest.append(np.hypot(*way.T).max())
        assert (shot.positions_m >= 0).all()
        assert (shot.positions_m <= 200).all()
    assert max(farthest) <= 11 + 1e-9
    assert max(farthest) > 9  # the bound is used, not only kept


def test_members_stray_from_their_reference_point_by_no_more_than_stray_m():
    movement = Movement(GROUPS, 400, seed=2)
    walk = movement._walk
    for _ in range(60):
        movement.advance()
        away = movement.snapshot().positions_m - walk.centres_m - walk._references_m
        assert np.hypot(*away.T).max() <= 3 + 1e-9


def test_a_group_is_nearer_to_itself_than_to_others_and_moves_together():
    movement = Movement(GROUPS, 400, seed=3)
    start = movement.snapshot().positions_m
    movement.advance(100)
    end = movement.snapshot().positions_m
    groups = np.arange(400) // 4
    moved = end - start
    within = np.hypot(*(moved[::4] - moved[1::4]).T)
    across = np.hypot(*(moved - np.roll(moved, 4, axis=0)).T)
    assert within.max() <= 12 + 1e-9  # strays differ by at most 2 x 6 m; references do not change
    assert np.median(across) > 3 * np.median(within)
    assert (movement._walk.groups == groups).all()


def test_velocities_are_those_of_the_path():
    movement = Movement(GROUPS, 200, seed=4, dt_s=0.1)
    agree = []
    for _ in range(30):
        before = movement.snapshot()
        movement.advance()
        after = movement.snapshot()
        told = 0.1 * before.velocities_m_per_s
        agree.append(np.isclose(after.positions_m - before.positions_m, told).all(axis=1))
    # All but those that turn within the step (members every 10 s, centres at waypoints).
    assert np.mean(agree) > 0.95


def test_members_do_not_jump_when_they_turn():
    model = GroupMovement(
        area=Area.square(200.0), spread_m=8.0, stray_m=3.0, stray_period_s=10.0,
        speed_min_m_per_s=1.0, speed_max_m_per_s=1.0,
    )  # fmt: skip
    movement = Movement(model, 300, seed=5, dt_s=0.5)
    for _ in range(60):
        before = movement.snapshot().positions_m
        movement.advance()
        step = np.hypot(*(movement.snapshot().positions_m - before).T)
        assert step.max() <= 0.5 * (1.0 + 6.0 / 10.0) + 1e-9


def test_centres_may_move_by_another_model():
    inner = GaussMarkov(area=Area.square(50.0), sigma_m_per_s=1.0)
    model = GroupMovement(area=Area.square(200.0), spread_m=1.0, stray_m=0.0, centres=inner)
    movement = Movement(model, 40, seed=6)
    movement.advance(50)
    assert movement.snapshot().positions_m.max() <= 51
    assert np.ptp(movement.snapshot().positions_m, axis=0).min() > 20


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"spread_m": 99.0}, "do not fit into an area of 200 x 200 m"),
        ({"group_size": 0}, "group_size"),
        ({"stray_period_s": 0.0}, "stray_period_s"),
        ({"spread_m": -1.0}, "spread_m"),
        ({"speed_min_m_per_s": 0.0}, "speed_min_m_per_s"),
    ],
)
def test_groups_out_of_range_are_refused(options, told):
    with pytest.raises(InvalidValueError, match=told):
        GroupMovement(area=Area.square(200.0), **options)


def test_static_devices_stay_where_they_were_put():
    movement = Movement(Static(positions_m=((1.0, 2.0), (3.0, 4.0))), 2, seed=1)
    movement.advance(10)
    assert movement.snapshot().positions_m.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert not movement.snapshot().velocities_m_per_s.any()
    drawn = Movement(Static(area=Area(width_m=10, height_m=1)), 10_000, seed=1).snapshot()
    assert drawn.positions_m.mean(axis=0) == pytest.approx([5, 0.5], rel=0.02)


def test_static_takes_an_area_or_a_place_for_each():
    with pytest.raises(InvalidValueError, match="not both"):
        Static()
    with pytest.raises(InvalidValueError, match="not both"):
        Static(area=Area.square(1), positions_m=((0.0, 0.0),))
    with pytest.raises(InvalidValueError, match="2 places for 3 devices"):
        Movement(Static(positions_m=((1.0, 2.0), (3.0, 4.0))), 3, seed=1)
    with pytest.raises(InvalidValueError, match="finite"):
        Static(positions_m=((float("nan"), 0.0),))
