"""Callbacks: what they hear, what they may ask for, what becomes of their errors."""

from __future__ import annotations

import math

import pytest
from support.training import even_plan, identical, small_job

import crowdmesh_jax as cm
from crowdmesh_jax import errors
from crowdmesh_jax.record import read_journal
from crowdmesh_jax.runtime import session
from crowdmesh_jax.runtime.callbacks import Control, EarlyStopping

CROWD = cm.Crowd.local((1.0, 0.5))


def train(crew, tmp_path, *callbacks, steps=30, **fields):
    job, data = small_job()
    return cm.train(
        job, crew, data, steps=steps, plan=even_plan(job), runs_dir=tmp_path, measure=False,
        callbacks=callbacks, **fields,
    )  # fmt: skip


def test_all_callbacks_hear_every_event_in_order(crew, tmp_path):
    first, second, third = [], [], []
    train(
        crew, tmp_path, lambda event, control: first.append(event),
        lambda event, control: second.append(event), steps=3, on_event=third.append,
    )  # fmt: skip
    assert first == second == third
    assert [event.step for event in first if isinstance(event, cm.StepEvent)] == [0, 1, 2]


def test_a_stop_ends_after_a_commit_with_the_state_of_that_version(crew, tmp_path):
    def stop(event, control):
        if isinstance(event, cm.StepEvent) and event.step >= 2:
            control.stop("enough")
            control.stop("more than enough")

    result = train(crew, tmp_path, stop, steps=100_000)
    made = len(result.losses)
    assert 3 <= made < 100_000
    assert result.stopped == "enough"
    assert cm.load_checkpoint(result.run_dir / "checkpoint").version == made
    assert read_journal(result.run_dir / "events.jsonl")[-1]["reason"] == "enough"
    undisturbed = train(crew, tmp_path, steps=made)
    assert undisturbed.stopped is None
    assert identical(undisturbed.params, result.params)


def test_a_stop_before_the_run_has_begun_leaves_one_step(crew, tmp_path):
    result = train(crew, tmp_path, lambda event, control: control.stop("no"), steps=100_000)
    assert result.stopped == "no"
    assert 1 <= len(result.losses) < 1000


def test_a_checkpoint_can_be_asked_for(crew, tmp_path):
    versions = []

    def ask(event, control):
        if isinstance(event, cm.StepEvent) and event.step == 1:
            control.checkpoint()
        if isinstance(event, cm.CheckpointEvent):
            versions.append(event.version)
            control.stop("it is there")

    result = train(crew, tmp_path, ask, steps=100_000)
    assert versions[0] >= 2
    assert versions[0] <= len(result.losses)


def test_what_a_callback_raises_ends_the_run_and_frees_the_agents(crew, tmp_path):
    def broken(event, control):
        if isinstance(event, cm.StepEvent):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        train(crew, tmp_path, broken, steps=100_000, name="broken")
    assert read_journal(tmp_path / "broken" / "events.jsonl")[-1]["kind"] == "Halted"
    train(crew, tmp_path, steps=1)


def test_a_run_that_is_slow_to_end_does_not_hide_what_a_callback_raised(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(session, "ABORT_S", 0.0)
    monkeypatch.setattr(session.Run, "interrupt", lambda self: None)  # so slow is it

    def fail(event, control):
        if isinstance(event, cm.StepEvent):
            raise ZeroDivisionError("mine")

    with (
        cm.launch(CROWD, transport="memory") as crew,
        pytest.raises(ZeroDivisionError, match="mine"),
    ):
        train(crew, tmp_path, fail)
    assert "did not end within 0 s" in caplog.text


def test_early_stopping_stops_a_run_that_no_longer_improves(crew, tmp_path):
    _, data = small_job()
    stopping = EarlyStopping("accuracy", patience=2, min_delta=2.0)  # no accuracy gains 2
    result = train(crew, tmp_path, stopping, steps=100_000, evaluate=cm.Evaluation(data, every=1))
    assert result.stopped is not None
    assert "accuracy has not improved for 2 evaluations" in result.stopped
    assert 3 <= len(result.losses) < 1000
    assert stopping.best_version == 1


def hear(stopping: EarlyStopping, values: list[float]) -> str | None:
    """The reason for which it stops, if it does."""
    control, reasons = Control(("loss", "score")), []
    control.bind(lambda asked: reasons.append(asked.reason), [])
    for version, value in enumerate(values, start=1):
        values_of = {"loss": value, "score": value}
        stopping(cm.EvaluationEvent(version=version, values=values_of, rows=1), control)
    return reasons[0] if reasons else None


@pytest.mark.parametrize(
    ("fields", "values", "stops"),
    [
        ({"patience": 2}, [3, 2, 1, 0], False),
        ({"patience": 2}, [3, 2, 2.5, 1, 2, 0.5], False),
        ({"patience": 2}, [3, 2, 2, 2], True),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.6], True),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.4], False),
        ({"patience": 2, "metric": "score", "mode": "max"}, [3, 2, 1], True),
        ({"patience": 2}, [math.nan, math.nan], True),
        ({"patience": 2}, [1, math.nan, 0.5, math.nan, 0.4], False),
    ],
)
def test_early_stopping_waits_as_long_as_it_says(fields, values, stops):
    assert (hear(EarlyStopping(**fields), values) is not None) == stops


def test_early_stopping_on_what_is_not_evaluated_is_refused_before_anything_starts(tmp_path):
    job, data = small_job()
    with pytest.raises(errors.JobError, match="no metric 'loss'; evaluations give nothing"):
        cm.train(
            job, CROWD, data, steps=2, plan=even_plan(job), runs_dir=tmp_path,
            callbacks=[EarlyStopping(patience=1)],
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
    for fields in ({"metric": "f1", "patience": 1}, {"patience": 0}):
        with pytest.raises(errors.InvalidValueError):
            EarlyStopping(**fields)


def test_only_devices_of_the_crowd_can_depart():
    told = []
    control = Control()
    control.bind(told.append, ["pi-1", "pi-2"])
    control.depart("pi-1", in_s=3.0)
    assert [(ask.device, ask.leaves_in_s) for ask in told] == [("pi-1", 3.0)]
    for device, in_s, words in (("pi-3", 3.0, "has pi-1, pi-2"), ("pi-1", -1.0, "must be >= 0")):
        with pytest.raises(errors.InvalidValueError, match=words):
            control.depart(device, in_s=in_s)
