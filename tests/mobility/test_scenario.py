"""The frozen scenarios, as their README has them."""

import dataclasses
import hashlib
import math
from importlib import resources

import numpy as np
import pytest

from crowdmesh_jax.core import to_toml
from crowdmesh_jax.errors import CrowdMeshError, FormatError, InvalidValueError
from crowdmesh_jax.mobility import (
    REPORTING_SEED,
    DiscRadio,
    GaussMarkov,
    RandomWaypoint,
    Scenario,
    Seats,
    draw_crashes,
    scenario,
    scenarios,
)

FILES = resources.files("crowdmesh_jax.mobility") / "scenarios"
FROZEN = {
    "calm": "4809a4bbc5cd8213",
    "gauss_markov": "f19612e7b720fa57",
    "sumo": "28367e8d30aa686d",
    "waypoint": "d27fdc148008b983",
}
"""First digits of the files' SHA-256: a frozen file that changes is another scenario."""


def test_the_files_are_the_frozen_ones():
    assert sorted(FROZEN) == list(scenarios())
    for name, digest in FROZEN.items():
        content = (FILES / f"{name}.toml").read_bytes()
        assert hashlib.sha256(content).hexdigest()[:16] == digest, name


@pytest.mark.parametrize("name", scenarios())
def test_all_have_the_readme_s_common_values(name):
    frozen = scenario(name)
    assert (frozen.devices, frozen.stages) == (24, 4)
    assert frozen.state_bytes_per_stage == 60e6
    assert frozen.changed_share == 0.3
    assert frozen.d2d_bytes_per_s == 6e6
    assert frozen.uplink_bytes_per_s == 1.5e6
    assert frozen.work_s == 3600
    assert frozen.crash_per_s == pytest.approx(1 / 7200, rel=1e-5)
    assert frozen.velocity_noise_m_per_s == 0.15
    assert frozen.speed_spread == 0.3
    assert (frozen.detect_s, frozen.restart_s) == (3, 2)
    assert frozen.radio() == DiscRadio(range_m=80.0, in_range_bytes_per_s=6e6)
    assert REPORTING_SEED == 1000


def test_each_specifies_its_movement():
    calm, walk = scenario("calm").model(), scenario("waypoint").model()
    assert isinstance(calm, RandomWaypoint)
    assert calm.area.width_m == calm.area.height_m == 150
    assert (calm.speed_min_m_per_s, calm.speed_max_m_per_s) == (0.1, 0.5)
    assert (calm.pause_min_s, calm.pause_max_s) == (0, 600)
    assert walk == dataclasses.replace(
        calm, speed_min_m_per_s=0.2, speed_max_m_per_s=1.2, pause_max_s=120.0
    )
    markov = scenario("gauss_markov").model()
    assert isinstance(markov, GaussMarkov)
    assert markov.alpha == 0.92
    assert markov.bounded
    assert markov.area.width_m == 150
    assert markov.mean_m_per_s == (0, 0)
    mean_speed = math.sqrt(math.pi / 2)
    assert mean_speed * markov.sigma_m_per_s == pytest.approx(0.2)
    assert mean_speed * markov.sigma_max_m_per_s == pytest.approx(1.2)
    sumo = scenario("sumo").model()
    assert isinstance(sumo, Seats)
    assert sumo.trace is scenario("sumo").model().trace  # read once


@pytest.mark.parametrize("name", scenarios())
def test_a_seed_fixes_everything_and_each_topic_is_apart(name):
    frozen = scenario(name)
    one, two = frozen.start(1000), frozen.start(1000)
    one.advance(20)
    two.advance(20)
    assert np.array_equal(one.snapshot().positions_m, two.snapshot().positions_m)
    assert not np.array_equal(frozen.start(1001).snapshot().positions_m, one.snapshot().positions_m)
    assert np.array_equal(frozen.speeds(3), frozen.speeds(3))
    quicker = dataclasses.replace(frozen, crash_per_s=2 * frozen.crash_per_s)
    assert np.array_equal(quicker.speeds(3), frozen.speeds(3))


def test_devices_compute_within_thirty_percent():
    speeds = np.concatenate([scenario("calm").speeds(seed) for seed in range(200)])
    assert speeds.min() >= 0.7
    assert speeds.max() <= 1.3
    assert speeds.mean() == pytest.approx(1.0, abs=0.01)
    assert speeds.std() == pytest.approx(0.6 / math.sqrt(12), rel=0.03)


def test_crashes_come_at_their_rate():
    frozen = scenario("calm")
    drawn = [frozen.crashes(seed, 3600.0) for seed in range(400)]
    counts = [len(each) for each in drawn]
    assert np.mean(counts) == pytest.approx(24 * 3600 / 7200, rel=0.05)
    assert np.var(counts) == pytest.approx(12, rel=0.25)
    devices = np.concatenate([each.devices for each in drawn])
    assert set(devices.tolist()) == set(range(24))
    for each in drawn:
        assert (np.diff(each.times_s) >= 0).all()
        assert ((each.times_s >= 0) & (each.times_s <= 3600)).all()
    gaps = np.concatenate([np.diff(np.append(0, each.times_s)) for each in drawn])
    assert gaps.mean() < 1.05 * 7200 / 24
    assert len(draw_crashes(0.0, 5, 100.0, np.random.default_rng(1))) == 0


def test_a_user_s_own_scenario_is_read_with_its_trace_beside_it(tmp_path):
    (tmp_path / "walk.csv").write_text("t_s,node,x_m,y_m\n0,a,0,0\n5,a,5,0\n0,b,1,0\n9,b,1,0\n")
    frozen = dataclasses.replace(scenario("sumo"), trace="walk.csv", devices=2, stages=2, folder="")
    text = to_toml(frozen).replace('folder = ""\n', "")
    path = tmp_path / "own.toml"
    path.write_text(text)
    read = Scenario.load(path)
    assert read == dataclasses.replace(frozen, folder=str(tmp_path))
    assert read.start(1).snapshot().present.all()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("devices = 24", "devices = 3", "4 stages need as many devices, got 3"),
        ("alpha = 0.92", "", "movement 'gauss_markov' needs alpha"),
        ("alpha = 0.92", "alpha = 1.5", "alpha must be <= 1"),
        ("alpha = 0.92", "alpha = 0.9\npause_max_s = 5.0", "takes no pause_max_s"),
        ("alpha = 0.92", "alpha = 0.9\ncolour = 5", "unknown field 'colour'"),
        ('"gauss_markov"', '"teleport"', "'random_waypoint' or 'gauss_markov' or 'trace'"),
        ("range_m = 80.0", "range_m = nan", "range_m must be a finite number > 0, got nan"),
        ("crash_per_s = 0.000138889", "crash_per_s = -1.0", "crash_per_s"),
        ("changed_share = 0.3", "changed_share = 1.3", "changed_share must be <= 1"),
        ("side_m = 150.0", 'side_m = 150.0\nfolder = "/"', "does not name its own folder"),
        ("detect_s = 3.0", "", "missing field 'detect_s'"),
        ("work_s = 3600.0", "work_s = ", "not TOML"),
    ],
)
def test_a_file_that_is_none_is_one_clear_error(tmp_path, old, new, told):
    text = (FILES / "gauss_markov.toml").read_text()
    assert old in text
    path = tmp_path / "broken.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(CrowdMeshError) as caught:
        Scenario.load(path)
    assert told in str(caught.value)
    assert isinstance(caught.value, (FormatError, InvalidValueError))


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(InvalidValueError, match="did you mean 'waypoint'"):
        scenario("waypoints")
