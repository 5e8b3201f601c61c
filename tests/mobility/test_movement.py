"""Seeds, steps and time: the same for all models."""

import copy

import numpy as np
import pytest

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import (
    Area,
    GaussMarkov,
    GroupMovement,
    Movement,
    RandomWaypoint,
    Recorded,
    Seats,
    Static,
    Trace,
)

AREA = Area.square(60.0)


def a_trace():
    generator = np.random.default_rng(0)
    rows = [
        (node, t, *generator.random(2))
        for node in range(12)
        for t in range(5 * node, 5 * node + 60)
    ]
    node, t, x, y = map(np.array, zip(*rows, strict=True))
    return Trace(tuple(map(str, range(12))), node, t, np.stack([x, y], axis=1))


MODELS = {
    "waypoint": (RandomWaypoint(area=AREA, pause_max_s=5.0), 50),
    "gauss_markov": (GaussMarkov(area=AREA), 50),
    "group": (GroupMovement(area=AREA), 50),
    "static": (Static(area=AREA), 50),
    "recorded": (Recorded(trace=a_trace()), 12),
    "seats": (Seats(trace=a_trace()), 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_the_same_path_bit_for_bit_however_it_is_asked_for(name):
    model, devices = MODELS[name]
    one, two = (Movement(model, devices, seed=7, dt_s=0.5) for _ in range(2))
    one.advance(60)
    for steps in (1, 2, 0, 27):
        two.advance(steps)
        two.snapshot()
    two.advance_to(30.0)
    a, b = one.snapshot(), two.snapshot()
    assert a.time_s == b.time_s == 30.0
    for field in ("positions_m", "velocities_m_per_s", "present", "occupants"):
        assert np.array_equal(getattr(a, field), getattr(b, field)), field


@pytest.mark.parametrize("name", ["waypoint", "gauss_markov", "group", "seats"])
def test_another_seed_gives_another_path(name):
    model, devices = MODELS[name]
    shots = [Movement(model, devices, seed=seed).snapshot().positions_m for seed in (1, 2)]
    assert not np.array_equal(*shots)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_goes_the_same_way_by_itself(name):
    model, devices = MODELS[name]
    one = Movement(model, devices, seed=7)
    one.advance(3)
    two = copy.deepcopy(one)
    before = two.snapshot().positions_m
    one.advance(10)
    assert np.array_equal(two.snapshot().positions_m, before)
    two.advance(10)
    assert np.array_equal(one.snapshot().positions_m, two.snapshot().positions_m)


def test_a_snapshot_is_a_copy_that_nobody_can_write_to():
    movement = Movement(MODELS["gauss_markov"][0], 3, seed=1)
    shot = movement.snapshot()
    kept = shot.positions_m.copy()
    movement.advance(5)
    assert np.array_equal(shot.positions_m, kept)
    for field in ("positions_m", "velocities_m_per_s", "present", "occupants"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(shot, field)[0] = 1


def test_time_is_whole_steps_and_does_not_go_back():
    movement = Movement(MODELS["static"][0], 2, seed=1, dt_s=0.1)
    movement.advance_to(0.3)
    assert movement.steps == 3  # 0.3 / 0.1 is 2.9999999999999996
    movement.advance_to(0.39)
    assert movement.steps == 3
    with pytest.raises(InvalidValueError, match=r"cannot go back to 0\.1 s"):
        movement.advance_to(0.1)
    with pytest.raises(InvalidValueError, match="steps"):
        movement.advance(-1)


@pytest.mark.parametrize(
    ("devices", "options", "told"),
    [
        (0, {}, "devices must be an integer >= 1"),
        (2.5, {}, "devices"),
        (10**9, {}, "<= 10000000"),
        (2, {"seed": -1}, "seed must be an integer >= 0"),
        (2, {"seed": True}, "seed"),
        (2, {"dt_s": 0.0}, "dt_s must be a finite number > 0"),
        (2, {"dt_s": float("nan")}, "got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(devices, options, told):
    with pytest.raises(InvalidValueError, match="CM-101") as caught:
        Movement(MODELS["static"][0], devices, **{"seed": 1, **options})
    assert told in str(caught.value)


def test_a_plug_in_that_gives_other_shapes_is_told():
    class Lazy:
        def start(self, devices, generator):
            return Static(area=AREA).start(devices + 1, generator)

    with pytest.raises(InvalidValueError, match="Lazy was asked for 2 devices and gave"):
        Movement(Lazy(), 2, seed=1)
