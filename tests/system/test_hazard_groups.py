"""Real processes: no copy lies behind its owner's hazard, before a loss and after it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from support.equality import assert_bit_equal
from support.training import even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.cli import main

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("system")]


def test_copies_are_apart_from_their_owners_and_stay_so_after_a_loss(tmp_path, capsys):
    """By the ring alone device-2 and device-3 would hold what is behind their own hazards."""
    job, data = small_job()
    plan = even_plan(job, 2)
    groups = {"van": ("device-0", "device-2"), "bike": ("device-1", "device-3")}
    reports: list[Any] = []
    with cm.launch(cm.Crowd.local((1.0,) * 4)) as crew:

        def watch(event: Any) -> None:
            if not isinstance(event, cm.StepEvent):
                return
            time.sleep(0.01)
            if event.step in (40, 100):
                reports.append(cm.read_replicas(tmp_path / "x"))
            if event.step == 40:
                os.kill(crew.pids["device-1"], signal.SIGKILL)

        result = cm.train(
            job, crew, data, steps=110, plan=plan, runs_dir=tmp_path, name="x", on_event=watch,
            recovery=cm.Recovery(groups=groups, wave_every=4, replan=False), measure=False,
        )  # fmt: skip
    before, after = (
        {row.owner: [c.device for c in row.copies] for row in report.rows} for report in reports
    )
    assert before == {"device-0": ["device-3"], "device-1": ["device-2"]}
    assert after == {"device-0": ["device-3"], "device-2": ["device-3"]}
    assert all(row.shared_hazards == () for report in reports for row in report.rows)
    assert main(["replicas", str(tmp_path / "x")]) == 0
    assert "if van went now" in capsys.readouterr().out
    (loss,) = result.recoveries
    assert loss.plan is not None
    assert loss.plan.devices == ("device-0", "device-2"), "who held the copy"
    assert_bit_equal(result, cm.reference(job, data, steps=110, plan=plan))
