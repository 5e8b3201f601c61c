"""Models by name and from other packages; crowds at a moment; summaries and pictures."""

import itertools
import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from crowdmesh_jax.core import Crowd
from crowdmesh_jax.crowds import campus
from crowdmesh_jax.errors import InvalidCrowdError, InvalidValueError
from crowdmesh_jax.mobility import (
    Area,
    DiscRadio,
    GaussMarkov,
    LogDistanceRadio,
    Movement,
    Snapshot,
    Static,
    crowd_at,
    make_movement_model,
    movement_models,
    paths_svg,
    scenario,
    watch,
)


class Circles:
    """A model as another package would bring it: one file, no import of ours."""

    def __init__(self, radius_m=10.0, area=None):
        self.radius_m = radius_m

    def start(self, devices, generator):
        return CirclesWalk(self.radius_m, 2 * math.pi * generator.random(devices))


class CirclesWalk:
    def __init__(self, radius_m, angles):
        self.radius_m, self.angles = radius_m, angles
        self.present, self.occupants = np.ones(len(angles), bool), np.arange(len(angles))
        self.step(0.0)

    def step(self, dt_s):
        self.angles = self.angles + dt_s / self.radius_m
        around = np.stack([np.cos(self.angles), np.sin(self.angles)], axis=1)
        self.positions_m = self.radius_m * around
        self.velocities_m_per_s = np.stack([-around[:, 1], around[:, 0]], axis=1)


@pytest.fixture
def installed(monkeypatch):
    """An installed package's entry point, as importlib.metadata tells of it."""
    point = metadata.EntryPoint(
        name="circles", value=f"{__name__}:Circles", group="crowdmesh_jax.mobility_models"
    )
    monkeypatch.setattr(
        metadata, "entry_points", lambda *, group: [point] if group == point.group else []
    )


def test_every_name_makes_a_model_that_moves():
    assert list(movement_models()) == ["random_waypoint", "gauss_markov", "group", "static"]
    for name, line in movement_models().items():
        assert line
        movement = Movement(make_movement_model(name, area=Area.square(60.0)), 10, seed=1)
        movement.advance(3)
        assert np.isfinite(movement.snapshot().positions_m).all()


def test_a_model_of_another_package_is_found_by_its_entry_point(installed):
    assert f"({__name__}:Circles)" in movement_models()["circles"]
    movement = Movement(make_movement_model("circles", radius_m=5.0), 7, seed=1)
    movement.advance(100)
    assert np.allclose(np.hypot(*movement.snapshot().positions_m.T), 5)


@pytest.mark.system
def test_an_installed_package_s_model_is_moved_by_the_command_line(tmp_path):
    """The files that an installer leaves, found by importlib.metadata itself."""
    told = tmp_path / "crowdmesh_circles-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: crowdmesh-circles\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(
        "[crowdmesh_jax.mobility_models]\nrounds = rounds:Circles\n"
    )
    source = Path(__file__).read_text()
    classes = source[source.index("class Circles:") : source.index("@pytest.fixture")]
    (tmp_path / "rounds.py").write_text(f"import math\nimport numpy as np\n\n{classes}")
    paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "crowdmesh_jax.cli", "mobility", "rounds", "--json",
               "--seconds", "5", "--option", "radius_m=3"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["summary"]["mean_speed_m_per_s"] == pytest.approx(1.0)


def test_names_and_options_that_are_none_are_refused(installed):
    with pytest.raises(InvalidValueError, match="did you mean 'gauss_markov'") as caught:
        make_movement_model("gaus_markov")
    assert "random_waypoint, gauss_markov, group, static, circles" in str(caught.value)
    with pytest.raises(InvalidValueError, match="does not take these options"):
        make_movement_model("static", speed=5)
    with pytest.raises(InvalidValueError, match="an object is made with its own"):
        make_movement_model(Circles(), radius_m=2.0)
    with pytest.raises(InvalidValueError, match="no start"):
        make_movement_model(object())  # pyright: ignore[reportArgumentType]
    model = Circles()
    assert make_movement_model(model) is model


def test_devices_in_range_get_links_where_the_radio_is_faster():
    crowd = campus(6, seed=3)
    places = np.array([[0, 0], [10, 0], [0, 10], [500, 500], [505, 500], [900, 0]], float)
    radio = DiscRadio(range_m=50.0, in_range_bytes_per_s=1e9)
    now = crowd_at(crowd, places, radio, latency_s=0.001)
    ids = [device.id for device in crowd.devices]
    joined = {(link.source, link.target) for link in now.links}
    near = [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert joined == {(ids[a], ids[b]) for a, b in near} | {(ids[b], ids[a]) for a, b in near}
    assert now.link(ids[0], ids[1]).bandwidth_bytes_per_s == 1e9
    assert now.link(ids[0], ids[1]).latency_s == 0.001
    assert now.link(ids[0], ids[5]) == crowd.link(ids[0], ids[5])  # through their access
    assert [device.position_m for device in now.devices] == [tuple(p) for p in places.tolist()]
    slow = crowd_at(crowd, places, DiscRadio(range_m=50.0, in_range_bytes_per_s=1.0))
    assert slow.links == ()


def test_without_access_devices_out_of_range_cannot_talk():
    crowd = Crowd(devices=Crowd.local((1.0, 1.0, 0.5)).devices)
    radio = LogDistanceRadio()
    places = [[0, 0], [20, 0], [200, 0]]
    now = crowd_at(crowd, places, radio, leave_hazard_per_s=[0.1, 0.2, 0.3])
    ids = [device.id for device in crowd.devices]
    assert now.link(ids[0], ids[1]).bandwidth_bytes_per_s == radio.rate_bytes_per_s(20.0)
    assert now.link(ids[0], ids[2]) is None
    assert [device.leave_hazard_per_s for device in now.devices] == [0.1, 0.2, 0.3]


def test_who_is_away_is_left_out():
    crowd = campus(3, seed=3)
    radio = DiscRadio(range_m=50.0, in_range_bytes_per_s=1e9)
    now = crowd_at(crowd, np.zeros((3, 2)), radio, present=[True, False, True])
    assert [d.id for d in now.devices] == [crowd.devices[0].id, crowd.devices[2].id]
    assert len(now.links) == 2
    with pytest.raises(InvalidCrowdError, match="nobody is present"):
        crowd_at(crowd, np.zeros((3, 2)), radio, present=[False] * 3)
    with pytest.raises(InvalidValueError, match=r"a crowd of 3 devices needs positions \(3, 2\)"):
        crowd_at(crowd, np.zeros((2, 2)), radio)
    with pytest.raises(InvalidValueError, match="leave_hazard_per_s must be >= 0"):
        crowd_at(crowd, np.zeros((3, 2)), radio, leave_hazard_per_s=[0, 0, -1])


def test_a_summary_of_devices_that_pass_each_other():
    """Two walk past a third: in range (10 m) while within 10 m, seen in steps of a second."""

    class Line:
        def start(self, devices, generator):
            walk = Static(positions_m=((0.0, 0.0), (-20.5, 0.0), (100.0, 0.0))).start(3, generator)
            walk.velocities_m_per_s = np.array([[0.0, 0], [1, 0], [0, 0]])

            def step(dt_s):
                walk.positions_m = walk.positions_m + walk.velocities_m_per_s * dt_s

            walk.step = step
            return walk

    summary, shots = watch(Movement(Line(), 3, seed=1), 40, 10.0)
    assert len(shots) == 41
    assert summary.seconds == 40
    assert summary.mean_present == 3
    assert summary.mean_speed_m_per_s == pytest.approx(1 / 3)
    assert summary.standing_share == pytest.approx(2 / 3)
    assert summary.mean_link_s == 20  # from -10 to 10 m, at -9.5, -8.5, ..., 9.5
    assert summary.links_ended_per_s == 1 / 40
    assert summary.mean_neighbours == pytest.approx(2 * 20 / 120)
    assert summary.alone_share == pytest.approx((120 - 40) / 120)
    assert math.isnan(summary.median_predicted_s)
    assert summary.newcomers == 0
    last = watch(Movement(Line(), 3, seed=1), 25, 10.0, keep=False)
    assert len(last[1]) == 1
    assert last[0].median_predicted_s == pytest.approx(5.5)


def test_the_closed_form_foretells_how_long_links_last():
    """Straight ways (memory 1, no border): every lifetime told at the start comes true."""
    model = GaussMarkov(area=Area.square(50.0), alpha=1.0, sigma_m_per_s=1.0, bounded=False)
    movement = Movement(model, 40, seed=1, dt_s=0.1)
    summary, shots = watch(movement, 400, 20.0)
    from crowdmesh_jax.mobility import pairs_in_range, relative_lifetime_s

    first, second = pairs_in_range(shots[0].positions_m, 20.0)
    way = shots[0].positions_m[second] - shots[0].positions_m[first]
    drift = shots[0].velocities_m_per_s[second] - shots[0].velocities_m_per_s[first]
    told = relative_lifetime_s(way, drift, 20.0)
    far = np.stack([np.hypot(*(s.positions_m[second] - s.positions_m[first]).T) for s in shots])
    ended = (far > 20).argmax(axis=0) * 0.1
    gone = (far > 20).any(axis=0)
    assert gone.sum() > 50
    assert np.abs(told[gone] - ended[gone]).max() <= 0.1 + 1e-9
    assert summary.links_ended_per_s > 0


def test_newcomers_are_counted():
    summary, shots = watch(scenario("sumo").start(1000), 300, 80.0)
    changes = sum(
        int((a.occupants != b.occupants)[b.present].sum()) for a, b in itertools.pairwise(shots)
    )
    assert summary.newcomers >= changes > 0


def test_a_picture_has_a_path_for_each_device_and_a_line_for_each_link():
    movement = Movement(scenario("waypoint").model(), 5, seed=1)
    _, shots = watch(movement, 900, 80.0)
    text = paths_svg(shots, 80.0, title="a < b & c")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    lines = [p for p in root.findall(f"{space}path") if p.get("stroke") == "#bbbbbb"]
    paths = [p for p in root.findall(f"{space}path") if p.get("fill") == "none"]
    far = np.hypot(
        *(shots[-1].positions_m[:, None] - shots[-1].positions_m[None]).transpose(2, 0, 1)
    )
    assert len(circles) == len(paths) == 5
    assert len(lines) == (far <= 80).sum() / 2 - 2.5
    assert root.findall(f"{space}text")[0].text == "range 80 m · a < b & c"
    assert len(text) < 100_000  # long paths are thinned


def test_a_path_is_lifted_where_a_device_is_away_or_another():
    def shot(t, x, present, occupant):
        return Snapshot(
            time_s=t, positions_m=np.array([[x, 0.0], [0.0, 9.0]]),
            velocities_m_per_s=np.zeros((2, 2)), present=np.array([present, True]),
            occupants=np.array([occupant, 1]),
        )  # fmt: skip

    shots = [shot(0, 0, True, 0), shot(1, 1, True, 0), shot(2, 1, False, 0), shot(3, 3, True, 0),
             shot(4, 4, True, 2)]  # fmt: skip
    path = next(line for line in paths_svg(shots, 1.0).splitlines() if 'fill="none"' in line)
    assert "".join(c for c in path.split('"')[1] if c in "ML") == "MLMM"


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InvalidValueError, match="no snapshots"):
        paths_svg([], 1.0)
    many = Movement(Static(area=Area.square(10)), 501, seed=1).snapshot()
    with pytest.raises(InvalidValueError, match="501 paths in one picture"):
        paths_svg([many], 1.0)
    with pytest.raises(InvalidValueError, match="steps must be an integer >= 1"):
        watch(Movement(Static(area=Area.square(10)), 5, seed=1), 0, 1.0)
