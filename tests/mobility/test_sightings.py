"""What is known: past, noisy, late; and nothing of the future."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import (
    Area,
    Movement,
    Observer,
    RandomWaypoint,
    Sightings,
    Smoother,
    Snapshot,
    scenario,
)

WALK = RandomWaypoint(area=Area.square(100.0), pause_max_s=5.0)
FIELDS = [field.name for field in dataclasses.fields(Sightings)]


def straight(time_s, *, devices=2000, present=None, occupants=None, speed=(1.0, -2.0)):
    """Devices that all move alike, so that errors can be told from movement."""
    velocities = np.tile(np.array(speed), (devices, 1))
    return Snapshot(
        time_s=time_s,
        positions_m=velocities * time_s,
        velocities_m_per_s=velocities,
        present=np.ones(devices, bool) if present is None else np.asarray(present),
        occupants=np.arange(devices) if occupants is None else np.asarray(occupants),
    )


def told(movement, steps, **options):
    """Sightings of a movement, one for each step."""
    observer = Observer(movement.devices, np.random.default_rng(5), **options)
    found = [observer.observe(movement.snapshot())]
    for _ in range(steps):
        movement.advance()
        found.append(observer.observe(movement.snapshot()))
    return found


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@pytest.mark.parametrize("delay_s", [0.0, 3.0])
@pytest.mark.parametrize("noise", [None, 0.15])
def test_another_future_changes_nothing_of_what_is_known(delay_s, noise):
    """Two worlds that part at 20 s; with a delay they may even part that much earlier."""
    options = {"position_noise_m": 1.0, "velocity_noise_m_per_s": noise, "delay_s": delay_s}
    worlds = [Movement(WALK, 30, seed=3) for _ in range(2)]
    part = 20 - int(delay_s)
    for world in worlds:
        world.advance(part)
    worlds[1]._walk._targets_m[:] = 50.0  # all turn to the middle
    worlds[1]._walk._arrived[:] = False
    worlds[1]._walk._head(np.ones(30, bool))
    looks = []
    for later in worlds:
        past = Movement(WALK, 30, seed=3)
        observer = Observer(30, np.random.default_rng(5), **options)
        found = []
        for step in range(25):
            if step == part:
                # The velocity at the parting belongs to the new future.
                past = later
            found.append(observer.observe(past.snapshot()))
            past.advance()
        looks.append(found)
    last = 20 if delay_s else part
    assert all(equal(a, b) for a, b in zip(*(look[:last] for look in looks), strict=True))
    assert not equal(looks[0][-1], looks[1][-1])


def test_sightings_hold_no_way_to_the_truth():
    """Arrays and numbers, copies of their own: nothing leads to a movement or a generator."""
    movement = Movement(WALK, 5, seed=1)
    shot = movement.snapshot()
    look = Observer(5, np.random.default_rng(1)).observe(shot)
    assert look.straight_s is None
    smooth = Smoother(5).smooth(look)
    for seen, name in itertools.product((look, smooth), FIELDS):
        value = getattr(seen, name)
        if value is None and seen is look:
            continue
        assert isinstance(value, (float, np.ndarray)), name
        if isinstance(value, np.ndarray):
            assert not np.shares_memory(value, shot.positions_m)
            with pytest.raises(ValueError, match="read-only"):
                value[0] = 0


def test_earlier_sightings_stay_as_they_were():
    found = told(Movement(WALK, 5, seed=1), 0)
    kept = found[0].positions_m.copy()
    movement = Movement(WALK, 5, seed=1)
    observer = Observer(5, np.random.default_rng(5))
    first = observer.observe(movement.snapshot())
    movement.advance(5)
    observer.observe(movement.snapshot())
    assert np.array_equal(first.positions_m, kept)


def test_noise_has_the_deviation_that_was_asked_for():
    observer = Observer(
        20_000, np.random.default_rng(1), position_noise_m=2.0, velocity_noise_m_per_s=0.15
    )
    look = observer.observe(straight(10.0, devices=20_000))
    assert (look.positions_m - [10.0, -20.0]).std(axis=0) == pytest.approx([2, 2], rel=0.03)
    assert look.velocities_m_per_s.mean(axis=0) == pytest.approx([1, -2], abs=0.005)
    assert look.velocities_m_per_s.std(axis=0) == pytest.approx([0.15, 0.15], rel=0.03)
    assert (look.velocity_sd_m_per_s == 0.15).all()


def test_the_noise_is_seeded_and_changes_no_path():
    runs = [told(Movement(WALK, 10, seed=3), 5, position_noise_m=1.0) for _ in range(2)]
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))
    seen, unseen = Movement(WALK, 10, seed=3), Movement(WALK, 10, seed=3)
    told(seen, 5, position_noise_m=1.0)
    unseen.advance(5)
    assert np.array_equal(seen.snapshot().positions_m, unseen.snapshot().positions_m)


def test_a_fitted_velocity_is_right_on_average_and_as_uncertain_as_it_says():
    observer = Observer(20_000, np.random.default_rng(1), position_noise_m=1.0, window=5)
    looks = [observer.observe(straight(t, devices=20_000)) for t in (0.0, 1.0, 2.5, 3.0, 4.0, 6.0)]
    assert (looks[0].velocity_sd_m_per_s == math.inf).all()
    assert not looks[0].velocities_m_per_s.any()
    for look in looks[1:]:
        assert look.velocities_m_per_s.mean(axis=0) == pytest.approx([1, -2], abs=0.03)
        assert look.velocities_m_per_s.std(axis=0) == pytest.approx(
            look.velocity_sd_m_per_s[:2], rel=0.03
        )
    # Of the last five: 1, 2.5, 3, 4, 6 s; the sum of squares about their mean is 13.8.
    assert looks[-1].velocity_sd_m_per_s[0] == pytest.approx(1 / math.sqrt(13.8))


def test_without_noise_a_straight_way_is_found_exactly():
    observer = Observer(5, np.random.default_rng(1))
    for t in (0.0, 1.0, 2.0):
        look = observer.observe(straight(t, devices=5))
    assert np.allclose(look.velocities_m_per_s, [1, -2])
    assert (look.velocity_sd_m_per_s == 0).all()
    assert np.allclose(look.positions_at(10.0), [10, -20])


def test_what_was_seen_is_known_after_the_delay():
    observer = Observer(3, np.random.default_rng(1), delay_s=2.0, window=3)
    known = []
    for t in (0.0, 1.0, 2.0, 3.0, 3.5, 7.0):
        look = observer.observe(straight(t, devices=3))
        known.append(look.seen_s[0])
        assert (look.known == np.isfinite(look.seen_s)).all()
        if look.known.any():
            assert look.positions_m[0].tolist() == [look.seen_s[0], -2 * look.seen_s[0]]
            assert look.age_s[0] == t - look.seen_s[0]
    assert known == [-math.inf, -math.inf, 0.0, 1.0, 1.0, 3.5]
    assert look.velocities_m_per_s[0] == pytest.approx([1, -2])
    assert len(observer._seen) <= 4


def test_who_was_not_seen_stays_where_it_was_last():
    observer = Observer(2, np.random.default_rng(1))
    observer.observe(straight(0.0, devices=2))
    observer.observe(straight(1.0, devices=2))
    look = observer.observe(straight(5.0, devices=2, present=[True, False]))
    assert look.seen_s.tolist() == [5.0, 1.0]
    assert look.positions_m.tolist() == [[5.0, -10.0], [1.0, -2.0]]
    assert np.allclose(look.positions_at(5.0), [[5, -10], [5, -10]])


def test_a_newcomer_under_an_old_number_has_no_past():
    observer = Observer(1, np.random.default_rng(1))
    for t in (0.0, 1.0):
        observer.observe(straight(t, devices=1))
    look = observer.observe(straight(2.0, devices=1, occupants=[7], speed=(100.0, 0.0)))
    assert look.occupants.tolist() == [7]
    assert look.velocity_sd_m_per_s[0] == math.inf
    assert not look.velocities_m_per_s.any()


def test_sightings_are_missed_as_often_as_asked():
    observer = Observer(10_000, np.random.default_rng(1), missed_share=0.3)
    look = observer.observe(straight(0.0, devices=10_000))
    assert look.known.mean() == pytest.approx(0.7, abs=0.02)
    assert not look.positions_at(3.0)[~look.known].any()


def test_a_scenario_s_velocities_have_its_noise():
    frozen = scenario("gauss_markov")
    movement, observer = frozen.start(1), frozen.observer(1)
    errors = []
    for _ in range(200):
        shot = movement.snapshot()
        look = observer.observe(shot)
        assert np.array_equal(look.positions_m, shot.positions_m)
        errors.append(look.velocities_m_per_s - shot.velocities_m_per_s)
        movement.advance()
    assert np.std(errors) == pytest.approx(0.15, rel=0.03)


def test_what_cannot_be_is_refused():
    observer = Observer(2, np.random.default_rng(1))
    observer.observe(straight(1.0, devices=2))
    with pytest.raises(InvalidValueError, match="time must go on"):
        observer.observe(straight(1.0, devices=2))
    with pytest.raises(InvalidValueError, match="an observer of 2 devices was shown 3"):
        observer.observe(straight(2.0, devices=3))
    for options in (
        {"position_noise_m": -1.0}, {"velocity_noise_m_per_s": math.nan}, {"delay_s": -1.0},
        {"window": 1}, {"missed_share": 1.5},
    ):  # fmt: skip
        with pytest.raises(InvalidValueError, match=next(iter(options))):
            Observer(2, np.random.default_rng(1), **options)
