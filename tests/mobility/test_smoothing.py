"""Averaged velocities: less noise while a device goes straight, a new start when it turns."""

from dataclasses import replace

import numpy as np
import pytest

from crowdmesh_jax.mobility import Movement, Observer, Smoother, Static


def seen(shots: int, *, turn_at: int | None = None, seed: int = 1):
    """Sightings of 200 devices that go east at 1 m/s, and north from `turn_at` on."""
    movement = Movement(Static(positions_m=((0.0, 0.0),) * 200), 200, seed=0)
    observer = Observer(200, np.random.default_rng(seed), velocity_noise_m_per_s=0.15)
    smoother = Smoother(200, window=8)
    made = []
    for second in range(shots):
        turned = turn_at is not None and second >= turn_at
        true = np.tile([0.0, 1.0] if turned else [1.0, 0.0], (200, 1))
        shot = replace(movement.snapshot(), velocities_m_per_s=true)
        sighting = observer.observe(shot)
        made.append((true, sighting, smoother.smooth(sighting)))
        movement.advance()
    return made


def test_noise_falls_with_the_root_of_the_count_and_is_told():
    *_, (true, raw, smooth) = seen(8)
    noise = np.std(smooth.velocities_m_per_s - true)
    assert np.std(raw.velocities_m_per_s - true) == pytest.approx(0.15, rel=0.1)
    assert noise == pytest.approx(0.15 / np.sqrt(8), rel=0.2)
    assert np.median(smooth.velocity_sd_m_per_s) == pytest.approx(0.15 / np.sqrt(8))


def test_a_turn_begins_a_new_mean_at_once():
    made = seen(12, turn_at=10)
    true, _, smooth = made[10]
    assert np.abs(smooth.velocities_m_per_s - true).max() < 0.8
    assert np.median(np.abs(smooth.velocities_m_per_s - true)) < 0.15
    assert np.median(smooth.velocity_sd_m_per_s) == 0.15


def test_it_tells_for_how_long_devices_went_straight():
    made = seen(24, turn_at=20)
    before, after = made[19][2], made[23][2]
    assert before.straight_s is not None
    assert after.straight_s is not None
    # A measurement far off by chance looks like a turn, now and then.
    assert np.median(before.straight_s) == 19
    assert np.median(after.straight_s) == 3
    assert made[0][1].straight_s is None


def test_a_newcomer_under_an_old_number_has_no_past():
    made = seen(6)
    smoother = Smoother(200)
    for _, raw, _ in made[:5]:
        smoother.smooth(raw)
    raw = made[5][1]
    other = replace(raw, occupants=raw.occupants + 200)
    got = smoother.smooth(other)
    assert np.array_equal(got.velocities_m_per_s, raw.velocities_m_per_s)
    again = smoother.smooth(other)  # no news
    assert np.array_equal(again.velocities_m_per_s, got.velocities_m_per_s)
