"""Real processes: two with a stage die at once, one idle device is left, and all was made ready."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training import even_plan, small_job

import crowdmesh_jax as cm

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("system")]
VICTIMS = ("device-0", "device-1")


def entries(runs_dir: Path) -> list[dict[str, Any]]:
    lines = [
        line for log in runs_dir.glob("*/policy.jsonl") for line in log.read_text().split("\n")
    ]
    return [json.loads(line) for line in lines if line.endswith("}")]


def is_ready(policy: list[dict[str, Any]]) -> bool:
    """Whether a plan for both losses was made, and its devices have its programs."""
    events = [entry["event"] for entry in policy]
    made = [e for e in events if e["kind"] == "PlanSolved" and not {*VICTIMS} & {*e["devices"]}]
    has = {(e["device"], e["key"]) for e in events if e["kind"] == "ProgramCompiled"}
    needed = {
        (stage["device"], key)
        for e in made
        for stage, key in zip(e["plan"]["stages"], e["keys"], strict=True)
    }
    return bool(needed) and needed <= has


def test_two_lost_at_once_are_replaced_without_solving_or_compiling(tmp_path):
    job, data = small_job()
    plan = even_plan(job, 3)
    killed: list[str] = []
    with cm.launch(cm.Crowd.local((1.0,) * 4), cache_dir=tmp_path / "compiled") as crew:

        def kill(event: Any) -> None:
            if not isinstance(event, cm.StepEvent):
                return
            time.sleep(0.02)
            if not killed and event.step % 20 == 0 and is_ready(entries(tmp_path / "runs")):
                killed.extend(VICTIMS)
                for victim in VICTIMS:
                    os.kill(crew.pids[victim], signal.SIGKILL)

        result = cm.train(
            job, crew, data, steps=800, plan=plan, runs_dir=tmp_path / "runs", on_event=kill,
            recovery=cm.Recovery(copies=2, replan=False), measure=False,
        )  # fmt: skip
    assert killed, "the plan for both losses was made and compiled ahead"
    losses = [event for event in result.recoveries if event.lost]
    assert {device for event in losses for device in event.lost} == {*VICTIMS}
    for event in losses:
        assert event.planned_s < 0.2, "nothing is solved on the hot path"
        assert all(taken.compiled_s < 0.05 for taken in event.take_overs), "nor compiled"
        assert all(taken.source != "coordinator" for taken in event.take_overs)
    last = losses[-1].plan
    assert last is not None
    assert {*last.devices} <= {"device-2", "device-3"}
    solves = [a for entry in entries(tmp_path / "runs") for a in entry["actions"]]
    assert not any(a["kind"] == "Solve" and a["urgent"] for a in solves)
    reference = cm.reference(job, data, steps=800)
    told = np.isfinite(result.losses)
    assert np.allclose(
        result.losses[told], np.asarray(reference.losses)[told], rtol=2e-3, atol=1e-5
    )
