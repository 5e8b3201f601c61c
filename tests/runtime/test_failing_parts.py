"""What becomes of a run when a part of it fails that it can do without: a replication policy, a
solver that plans ahead, a compiler."""

from __future__ import annotations

import pytest
from support.training import Slow, even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.agent.prepared import PreparedStages
from crowdmesh_jax.errors import ExportError
from crowdmesh_jax.propagation import make_replication_policy
from crowdmesh_jax.record import read_journal

pytestmark = pytest.mark.system


class Failing:
    """Answers like `next_stage`, but not always."""

    name = "failing"

    def __init__(self, good: int) -> None:
        self.good, self.asked = good, 0
        self._rule = make_replication_policy("next_stage")

    def decide(self, view):
        self.asked += 1
        if self.asked > self.good:
            raise ZeroDivisionError("mine")
        return self._rule.decide(view)


def train(policy, folder, devices=3, **more):
    job, data = small_job()
    with cm.launch(cm.Crowd.local((1.0,) * devices), transport="memory") as crew:
        return cm.train(
            job, crew, Slow(data, 0.05), steps=70, plan=even_plan(job, 2), runs_dir=folder,
            recovery=cm.Recovery(policy=policy, replan=False), measure=False, **more,
        )  # fmt: skip


def events(result, kind):
    """What the policy machine was told of this kind."""
    lines = read_journal(result.run_dir / "policy.jsonl")
    told = [line["event"] for line in lines if "event" in line]
    return [event for event in told if event["kind"] == kind]


def test_a_policy_that_fails_later_is_told_once_and_ends_nothing(tmp_path, caplog):
    policy = Failing(good=1)
    result = train(policy, tmp_path)
    assert len(result.losses) == 70
    assert policy.asked > 2, "it is asked again all the same"
    told = [r for r in caplog.records if "policy 'failing' failed" in r.getMessage()]
    assert len(told) == 1
    assert told[0].exc_info, "with where it was"


@pytest.mark.parametrize("kind", [ExportError, RuntimeError])
def test_a_device_that_cannot_make_a_stage_ready_ends_nothing(tmp_path, monkeypatch, caplog, kind):
    def no_room(*args):
        raise kind("no room for programs")

    monkeypatch.setattr(PreparedStages, "_compile", no_room)
    result = train(None, tmp_path)
    assert len(result.losses) == 70
    failed = events(result, "CompileFailed")
    assert {event["device"] for event in failed} == {"device-2"}
    assert len({event["key"] for event in failed}) == 2, "of both stages"
    assert "no room for programs" in failed[0]["reason"]
    assert "device-2 cannot make a stage ready ahead" in caplog.text


def test_a_policy_that_never_answered_ends_the_run_with_its_own_error(tmp_path):
    with pytest.raises(ZeroDivisionError, match="mine"):
        train(Failing(good=0), tmp_path)


def test_a_solver_that_fails_ahead_ends_nothing(tmp_path, caplog):
    class Broken:
        def solve(self, problem):
            raise ZeroDivisionError("mine")

    result = train(None, tmp_path, solver=Broken(), devices=2)
    assert len(result.losses) == 70
    told = events(result, "PlanSolved")
    assert [event["devices"] for event in told] == [["device-1"], ["device-0"]], "each loss, once"
    assert {event["reason"] for event in told} == {"ZeroDivisionError: mine"}
    assert "planning for device-1 failed" in caplog.text
