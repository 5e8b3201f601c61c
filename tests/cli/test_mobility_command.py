"""`crowdmesh mobility`: a summary, a trace that reads back, a picture; refusals."""

import json

import numpy as np
import pytest

from crowdmesh_jax.cli import main
from crowdmesh_jax.mobility import read_csv_trace, scenario


def told(capsys, *argv):
    assert main(["mobility", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv):
    assert main(["mobility", *argv]) == 2
    return capsys.readouterr().err


def test_a_model_is_moved_and_summed_up(capsys):
    answer = told(capsys, "gauss_markov", "--devices", "30", "--seconds", "20", "--seed", "3",
                  "--option", "sigma_m_per_s=2", "--option", "alpha=0.5")  # fmt: skip
    assert answer["what"] == "gauss_markov"
    assert answer["summary"]["devices"] == 30
    assert answer["summary"]["seconds"] == 20
    assert answer["summary"]["mean_speed_m_per_s"] == pytest.approx(2 * 1.2533, rel=0.1)
    assert main(["mobility", "--seconds", "5"]) == 0
    text = capsys.readouterr().out
    assert "random_waypoint, seed 0: 24 devices for 5 s" in text
    assert "devices within 80 m" in text


def test_a_trace_is_written_that_reads_back(capsys, tmp_path):
    path = tmp_path / "paths.csv"
    answer = told(capsys, "--scenario", "waypoint", "--seed", "1000", "--seconds", "9",
                  "-o", str(path), "--svg", str(tmp_path / "paths.svg"))  # fmt: skip
    assert answer["range_m"] == 80
    movement = scenario("waypoint").start(1000)
    movement.advance(7)
    trace = read_csv_trace(path)
    assert trace.nodes == tuple(map(str, range(24)))
    places, _, present = trace.at(7.0)
    assert present.all()
    assert np.abs(places - movement.snapshot().positions_m).max() <= 0.0005
    assert (tmp_path / "paths.svg").read_text().startswith("<svg")
    again = told(capsys, "--trace", str(path), "--seconds", "9")
    assert again["summary"]["devices"] == 24
    assert again["what"] == "paths.csv"


def test_the_same_seed_writes_the_same_file(capsys, tmp_path):
    for name in ("a.csv", "b.csv"):
        told(capsys, "group", "--side", "200", "--seconds", "5", "-o", str(tmp_path / name))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["teleport"], "no movement model 'teleport'"),
        (["static", "--scenario", "calm"], "exclude each other"),
        (["--scenario", "calm", "--devices", "5"], "--devices is for models; calm has its own"),
        (["--scenario", "clam"], "did you mean 'calm'"),
        (["--trace", "none.csv"], "expected a trace file, found nothing"),
        (["--option", "alpha"], "--option must be NAME=NUMBER"),
        (["--option", "alpha=high"], "--option must be NAME=NUMBER"),
        (["--option", "alpha=0.5"], "does not take these options"),
        (["--seconds", "0"], "--seconds must be finite and at least --dt"),
        (["--seconds", "nan"], "--seconds must be finite"),
        (["--dt", "0"], "--dt"),
        (["--devices", "0"], "devices must be an integer >= 1"),
        (["--range", "-5"], "range_m must be a finite number > 0"),
        (["-o", "paths.txt"], "--output must end in .csv"),
        (["--devices", "100000", "-o", "paths.csv"], "more than 20000000 rows"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(capsys, argv, message):
    text = refused(capsys, *argv)
    assert message in text
    assert "Traceback" not in text
