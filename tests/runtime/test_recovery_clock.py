"""What a recovery's figures come to, on real processes."""

import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.equality import assert_bit_equal
from support.training import even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.core.crowd import DeviceId
from crowdmesh_jax.protocol import coordinator_events as ev
from crowdmesh_jax.protocol.decision import Decision, StageAction
from crowdmesh_jax.record import RunFolder, read_journal
from crowdmesh_jax.runtime.recovery import RecoveryClock


@pytest.mark.system
@pytest.mark.slow
def test_losing_a_spare_and_then_a_stage_gives_two_events_whose_parts_add_up(tmp_path):
    job, data = small_job()
    plan = even_plan(job, 2)
    blows = [(12, "device-3"), (30, "device-1")]
    with cm.launch(cm.Crowd.local((1.0,) * 4), log_dir=tmp_path / "logs") as crew:

        def kill(event):
            if isinstance(event, cm.StepEvent) and blows and event.step >= blows[0][0]:
                os.kill(crew.pids[blows.pop(0)[1]], signal.SIGKILL)

        run = cm.train(
            job, crew, data, steps=60, plan=plan, recovery=cm.Recovery(replan=False),
            on_event=kill, runs_dir=tmp_path,
        )  # fmt: skip
    assert_bit_equal(run, cm.reference(job, data, steps=60, plan=plan))
    spare, stage = run.recoveries
    assert (spare.lost, spare.how, spare.take_overs) == (("device-3",), "keep", ())
    assert "no step was redone" in spare.line()
    assert (stage.lost, stage.how) == (("device-1",), "replay")
    assert [(o.device, o.before, o.was_spare) for o in stage.take_overs] == [
        ("device-2", "device-1", True)
    ]
    assert f"it replayed {stage.replayed_steps} step" in stage.line()
    for event in run.recoveries:
        parts = [end_s - start_s for _, start_s, end_s in event.spans]
        assert min(parts) >= 0, event
        assert sum(parts) == pytest.approx(event.total_s)
        assert 0 < event.total_s < 30
    lines = read_journal(run.run_dir / "recoveries.jsonl")
    assert [line["lost"] for line in lines] == [["device-3"], ["device-1"]]
    assert run.plan == plan, "the plan that it began with"
    assert stage.devices == ("device-0", "device-2")
    held = RunFolder.open(run.run_dir).read_memory()
    assert list(held) == ["device-0", "device-1", "device-2"], "who lost a stage, and who took it"


PLAN = cm.PipelinePlan.even(2, ["device-0", "device-1"], microbatches=2)
AFTER = cm.PipelinePlan.even(2, ["device-0", "device-2"], microbatches=2)


def keeping(base: int, plan: cm.PipelinePlan = PLAN) -> Decision:
    stay = [
        StageAction(stage=i, device=device, act="keep", version=base)
        for i, device in enumerate(plan.devices)
    ]
    return Decision(epoch=2, base=base, plan=plan, actions=tuple(stay))


def taking_over(base: int, version: int, **others: bool) -> Decision:
    actions = (
        StageAction(stage=0, device=DeviceId("device-0"), act="keep", version=base),
        StageAction(stage=1, device=DeviceId("device-2"), act="restore", version=version),
    )
    return Decision(epoch=3, base=base, plan=AFTER, actions=actions, **others)


class Story:
    """A clock and what it is told."""

    def __init__(self) -> None:
        self.clock = RecoveryClock()
        self.state = SimpleNamespace(crew=(), plan=PLAN, decided=None)

    def opened(self, *lost: str, reason: str = "") -> None:
        self._say(ev.EpochOpened(epoch=2, lost=tuple(map(DeviceId, lost)), reason=reason))

    def recovered(self, decided: Decision, redone: int = 0) -> None:
        self.state.decided, self.state.plan = decided, decided.plan
        self._say(ev.Recovered(epoch=2, base=decided.base, redone=redone, reason=""))

    def stepped(self) -> cm.RecoveryEvent:
        event = self.clock.stepped()
        assert event is not None
        assert self.clock.stepped() is None, "once"
        return event

    def _say(self, news: object) -> None:
        self.clock.saw(ev.Announce(news=news), self.state)
        time.sleep(0.01)


def test_a_part_that_never_came_takes_no_time():
    story = Story()
    story.opened(reason="device-9 is back")
    story.recovered(keeping(3))
    event = story.stepped()
    assert (event.how, event.reason) == ("keep", "device-9 is back")
    assert (event.fenced_s >= 0, event.planned_s, event.installed_s) == (True, 0.0, 0.0)
    assert event.total_s > 0.005


def test_steps_shown_after_the_next_loss_end_the_recovery_before_it():
    story = Story()
    story.opened(reason="device-9 is back")
    story.recovered(keeping(3))
    story.opened("device-1", reason="device-1 was lost")
    time.sleep(0.1)
    first = story.stepped()  # step 3 had been committed: its word came with a report
    story.recovered(taking_over(4, version=2))
    second = story.stepped()
    assert (first.lost, first.how, first.reason) == ((), "keep", "device-9 is back")
    assert 0.005 < first.first_step_s < 0.1, "until the next loss, not until its word came"
    assert (second.lost, second.how, second.replayed_steps) == (("device-1",), "replay", 2)
    assert second.opened_s >= first.spans[-1][2]


def test_a_recovery_without_a_step_is_told_with_the_next():
    story = Story()
    story.opened("device-1", reason="device-1 was lost")
    story.recovered(taking_over(4, version=4, is_rollback=True), redone=2)
    story.opened("device-9", reason="device-9 was lost")
    story.recovered(keeping(3, AFTER), redone=1)
    event = story.stepped()
    assert (event.lost, event.how) == (("device-1", "device-9"), "rollback")
    assert (event.base, event.redone_steps) == (3, 3)
    assert [over.device for over in event.take_overs] == ["device-2"], "it has it still"
    assert event.fenced_s >= 0.02, "from the first loss"
    assert event.total_s >= 0.03


def test_of_two_who_took_a_stage_over_the_last_is_told():
    story = Story()
    story.opened("device-1")
    story.recovered(taking_over(4, version=1))
    story.opened("device-2")
    third = cm.PipelinePlan.even(2, ["device-0", "device-3"], microbatches=2)
    actions = taking_over(4, version=2).actions
    again = (actions[0], replace(actions[1], device=DeviceId("device-3")))
    story.recovered(Decision(epoch=4, base=4, plan=third, actions=again))
    event = story.stepped()
    assert [(o.device, o.before) for o in event.take_overs] == [("device-3", "device-2")]
    assert (event.how, event.replayed_steps) == ("replay", 3)


def test_who_is_given_the_same_stage_twice_is_told_once():
    story = Story()
    story.opened("device-1")
    story.recovered(taking_over(4, version=1))
    story.opened("device-9")
    story.recovered(taking_over(3, version=3, is_rollback=True))
    event = story.stepped()
    assert [(o.device, o.from_version) for o in event.take_overs] == [("device-2", 3)]


def test_a_take_over_that_other_cuts_undid_is_not_told():
    story = Story()
    story.opened("device-1")
    story.recovered(taking_over(4, version=1))
    story.opened("device-2")
    alone = cm.PipelinePlan.even(2, ["device-0"], microbatches=2)
    restore = StageAction(stage=0, device=DeviceId("device-0"), act="restore", version=3)
    story.recovered(
        Decision(epoch=4, base=3, plan=alone, actions=(restore,), is_rollback=True), redone=1
    )
    event = story.stepped()
    assert [(o.device, o.layers) for o in event.take_overs] == [("device-0", (0, 1))]
    assert (event.how, event.lost) == ("rollback", ("device-1", "device-2"))
