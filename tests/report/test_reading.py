"""Runs in every state: whole, going on, killed, halted, damaged, of a newer release, none."""

import json
import math
import os
import subprocess
import sys

import pytest
from report.run_folders import DEVICES, PLAN, PREDICTION, TIMELINE, make_run

from crowdmesh_jax.errors import RecordError
from crowdmesh_jax.record import Journal
from crowdmesh_jax.report import read_run
from crowdmesh_jax.report.story import tell


def test_a_finished_run_is_read_whole(tmp_path):
    view = read_run(make_run(tmp_path, evaluate_every=4, has_memory=True).path)
    assert view.status.state == "finished"
    assert view.problems == ()
    assert (view.plan, view.prediction, view.timeline) == (PLAN, PREDICTION, TIMELINE)
    assert view.committed == view.steps_planned == len(view.rows) == 12
    assert view.measured_step_s == pytest.approx(1.25 * TIMELINE.step_s)
    assert view.predicted_step_s == TIMELINE.step_s
    assert [(e.step, sorted(e.values)) for e in view.evals] == [
        (3, ["accuracy", "loss"]), (7, ["accuracy", "loss"]), (11, ["accuracy", "loss"]),
    ]  # fmt: skip
    assert view.rows[3].metrics == {"accuracy": 0.53}
    assert view.memory["slow"].measured_bytes == 10_000_000
    assert view.memory["slow"].predicted_bytes == 9_000_000
    assert {event.device for event in view.events} == set(DEVICES)


def test_a_halted_run_tells_its_error_and_code(tmp_path):
    status = read_run(make_run(tmp_path, end="halt").path).status
    assert (status.state, status.code) == ("halted", "CM-511")
    assert "slow died" in status.text


def test_a_run_without_an_end_was_killed_unless_somebody_writes_it(tmp_path):
    folder = make_run(tmp_path, end=None, has_trace=False)
    view = read_run(folder.path)
    assert view.status.state == "killed"
    assert view.status.at_s == pytest.approx(view.records[-1]["at_s"])
    assert view.events == ()
    assert view.problems == ()  # a killed run has no trace: that is told once, as its state
    code = (
        "import sys; from crowdmesh_jax.record import Journal\n"
        "journal = Journal(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, folder.events_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        status = read_run(folder.path).status
        assert (status.state, status.writer_pid) == ("running", child.pid)
        child.kill()
    assert read_run(folder.path).status.state == "killed"


def test_a_run_that_was_taken_up_again_is_not_over(tmp_path):
    folder = make_run(tmp_path, end="halt")
    with folder.events() as events:
        events.append({"kind": "Term", "run": "mine", "term": 2})
    assert read_run(folder.path).status.state == "killed"


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
def test_a_torn_last_line_loses_that_line_and_nothing_else(tmp_path, name):
    folder = make_run(tmp_path, end=None)
    path = folder.path / name
    path.write_bytes(path.read_bytes()[:-9])
    view = read_run(folder.path)
    assert view.problems == ()
    assert view.committed == 12
    assert len(view.rows) == (11 if name == "metrics.jsonl" else 12)


def _spoil(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("trace.json", lambda p: p.write_text("{"), "trace.json: damaged"),
        ("trace.json", lambda p: p.write_text('{"traceEvents":[1]}'), "trace.json: damaged"),
        ("trace.json", lambda p: p.write_bytes(b"\xff"), "trace.json: damaged"),
        ("events.jsonl", lambda p: _spoil(p, b'"step":7', b'"step":8'), "record 12 at byte"),
        ("metrics.jsonl", lambda p: _spoil(p, b'"step":7', b'"step":8'), "record 7 at byte"),
        ("plan.json", lambda p: p.write_text("{}"), "plan.json: missing field"),
        ("prediction.json", lambda p: p.write_text("{}"), "prediction.json: damaged"),
        ("prediction.json", lambda p: _spoil(p, b": 1\n", b": 9\n"), "version 9 is newer than 1"),
        ("config.toml", lambda p: p.write_text("[["), "config.toml: damaged"),
        ("config.toml", lambda p: _spoil(p, b"speed = 0.5", b"speed = -1"), "speed must be"),
        ("memory.json", lambda p: p.write_text("[1]"), "memory.json: damaged"),
        ("metrics.jsonl", lambda p: p.unlink(), "metrics.jsonl: missing"),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_is_shown(tmp_path, name, spoil, told):
    folder = make_run(tmp_path)
    spoil(folder.path / name)
    view = read_run(folder.path)
    assert len(view.problems) == 1
    assert told in view.problems[0]
    assert view.plan == PLAN  # the journal holds it, too
    whole = make_run(tmp_path, "whole")
    kept = {
        "rows": len(view.rows) == 12,
        "events": len(view.events) == len(read_run(whole.path).events),
        "prediction": view.prediction == PREDICTION,
    }
    assert [part for part, is_kept in kept.items() if not is_kept] == {
        "metrics.jsonl": ["rows"], "trace.json": ["events"], "prediction.json": ["prediction"],
    }.get(name, [])  # fmt: skip


def test_a_prediction_of_another_plan_is_told(tmp_path):
    folder = make_run(tmp_path)
    plain = json.loads(folder.prediction_path.read_text())
    folder.prediction_path.write_text(json.dumps({**plain, "cuts": []}))
    (problem,) = read_run(folder.path).problems
    assert "prediction.json does not fit the plan" in problem


def test_a_run_of_a_newer_release_is_refused(tmp_path):
    folder = make_run(tmp_path)
    _spoil(folder.config_path, b"format_version = 1", b"format_version = 2")
    with pytest.raises(RecordError, match=r"newer than 1.*upgrade crowdmesh-jax"):
        read_run(folder.path)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match="no such run folder"):
        read_run(tmp_path / "none")
    with pytest.raises(RecordError, match="no run's folder"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text("[[")
    with pytest.raises(RecordError, match=r"nothing of this run can be read:\n.*config\.toml"):
        read_run(tmp_path)


def test_lines_of_later_releases_are_read_as_far_as_they_are_understood(tmp_path):
    folder = make_run(tmp_path)
    with folder.metrics() as metrics:
        metrics.append({"step": 12, "loss": "nan", "step_s": 0.1, "note": "x", "eval": {"loss": 1}})
        metrics.append({"step": 11, "eval": {"loss": 2.0}})
        metrics.append({"step": 0, "loss": 9.0, "step_s": None})  # made again after a resume
        metrics.append({"something": "else"})
    with folder.events() as events:
        events.append({"kind": "Novelty", "reason": "y"})
    view = read_run(folder.path)
    assert math.isnan(view.rows[-1].loss)
    assert view.rows[-1].metrics == {}
    assert view.rows[0].loss == 9.0
    assert [(e.step, e.values["loss"]) for e in view.evals] == [(11, 2.0), (12, 1.0)]
    assert view.problems == ("metrics.jsonl: 1 lines without a step and a loss are left out",)
    assert tell(view.records)[-1].title == "Novelty"


def test_step_times_with_an_evaluation_in_them_do_not_count(tmp_path):
    folder = make_run(tmp_path, steps=3)
    with folder.metrics() as metrics:
        metrics.append({"step": 3, "loss": 1.0, "step_s": 99.0, "has_evaluated": True})
    view = read_run(folder.path)
    assert view.rows[3].step_s is None
    assert view.rows[3].metrics == {}
    assert view.problems == ()
    assert view.measured_step_s == pytest.approx(1.25 * TIMELINE.step_s)


def test_a_run_that_has_only_begun_is_no_error(tmp_path):
    view = read_run(make_run(tmp_path, steps=0, end=None, has_trace=False).path)
    assert view.committed == 0
    assert view.measured_step_s is None
    (tmp_path / "empty").mkdir()
    Journal(tmp_path / "empty" / "events.jsonl").close()
    (tmp_path / "empty" / "config.toml").write_text("format_version = 1")
    assert read_run(tmp_path / "empty").status.state == "killed"


def test_the_story_joins_commits_and_keeps_the_rest_in_order(tmp_path):
    entries = tell(read_run(make_run(tmp_path).path).records)
    titles = [entry.title for entry in entries]
    assert titles == [
        "Coordinator started", "Epoch 1 opened", "Plan decided",
        "Programs installed, each stage timed alone", "Training began",
        "Steps 0 to 11 committed", "Checkpoint of version 12", "Finished at version 12",
    ]  # fmt: skip
    assert entries[5].text == "loss 2 to 0.1667"
    assert entries[5].at_s == pytest.approx(12 * 1.25 * TIMELINE.step_s)
    assert entries[2].text == "fast \N{RIGHTWARDS ARROW} slow, up to step 12"
    assert tell([]) == ()
    evaluated = [
        {"kind": "Evaluation", "version": 4, "values": {"loss": 0.5, "accuracy": 0.25}},
        {"kind": "Best", "version": 4, "metric": "loss", "value": 0.5},
        {"kind": "Finish", "version": 4, "reason": "loss has not improved"},
    ]
    assert [(entry.title, entry.text) for entry in tell(evaluated)] == [
        ("Evaluated version 4", "loss 0.5, accuracy 0.25"),
        ("Best version so far: 4", "loss 0.5"),
        ("Finished at version 4", "loss has not improved"),
    ]
    assert [entry.tone for entry in tell([{"kind": "Halted"}, {}])] == ["bad", "plain"]
