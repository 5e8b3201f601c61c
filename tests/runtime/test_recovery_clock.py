"""What a recovery's figures come to, on real processes."""

import os
import signal

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
            job, crew, data, steps=60, plan=plan, recovery=True, on_event=kill, runs_dir=tmp_path
        )
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
