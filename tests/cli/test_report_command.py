"""`crowdmesh report`: the outcome first, then where the page is; the same values as JSON."""

import json
import sys

import pytest
from report.run_folders import make_run

from crowdmesh_jax.cli import main


def test_it_tells_the_outcome_and_where_the_page_is(capsys, tmp_path):
    folder = make_run(tmp_path)
    assert main(["report", str(folder.path)]) == 0
    text = capsys.readouterr().out
    assert "mine: finished, 12 steps, loss 0.1667, step 180 ms (predicted 144 ms, +25.0 %)" in text
    assert f"report {folder.path / 'report.html'}" in text


def test_json_holds_the_same_and_the_shares(capsys, tmp_path):
    folder = make_run(tmp_path)
    assert main(["report", str(folder.path), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["event"] == "report"
    assert told["html"] == str(tmp_path / "out" / "report.html")
    (run,) = told["runs"]
    assert run["state"] == "finished"
    assert run["measured_step_s"] == pytest.approx(1.25 * run["predicted_step_s"])
    assert [share["device"] for share in run["measured_shares"]] == ["fast", "slow"]


def test_what_is_damaged_is_a_warning_and_a_killed_run_is_called_killed(capsys, tmp_path):
    folder = make_run(tmp_path, end=None)
    folder.trace_path.write_text("{")
    assert main(["report", str(folder.path)]) == 0
    told = capsys.readouterr()
    assert "mine: killed, 12 steps" in told.out
    assert "warning: mine: " in told.err
    assert "trace.json: damaged" in told.err


def test_two_runs_and_what_is_none(capsys, tmp_path):
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two", learning_rate=0.3)
    assert main(["report", str(one.path), str(two.path)]) == 0
    assert "1 differences in configuration and plan" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "RecordError [CM-520]" in capsys.readouterr().err
    assert main(["report", str(one.path), "--step", "77"]) == 2
    assert "it holds 0, 1, 2" in capsys.readouterr().err


def test_png_without_matplotlib_names_the_extra_and_writes_nothing(capsys, tmp_path, monkeypatch):
    folder = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["report", str(folder.path), "--png"]) == 2
    assert "crowdmesh-jax[plot]" in capsys.readouterr().err
    assert not (folder.path / "report.html").exists()
