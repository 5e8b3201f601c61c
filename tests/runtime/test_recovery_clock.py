"""What a recovery's figures come to, on real processes."""

import os
import signal
import time

import pytest
from support.equality import assert_bit_equal
from support.training import even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.record import read_journal


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


def test_a_part_that_never_came_takes_no_time():
    from types import SimpleNamespace

    from crowdmesh_jax.protocol import coordinator_events as ev
    from crowdmesh_jax.protocol.decision import Decision, StageAction
    from crowdmesh_jax.runtime.recovery import RecoveryClock

    plan = cm.PipelinePlan.even(2, ["device-0", "device-1"], microbatches=2)
    stay = [
        StageAction(stage=i, device=device, act="keep", version=3)
        for i, device in enumerate(plan.devices)
    ]
    decided = Decision(epoch=2, base=3, plan=plan, actions=tuple(stay))
    state = SimpleNamespace(crew=(), plan=plan, decided=decided)
    clock = RecoveryClock()
    opened = ev.EpochOpened(epoch=2, lost=(), reason="device-9 is back")
    for news in (opened, ev.Recovered(epoch=2, base=3, redone=0, reason="")):
        clock.saw(ev.Announce(news=news), state)
        time.sleep(0.01)
    event = clock.stepped()
    assert event is not None
    assert (event.how, event.fenced_s >= 0, event.planned_s) == ("keep", True, 0.0)
    assert event.installed_s == 0.0
    assert event.total_s > 0.005
