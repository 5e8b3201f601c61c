"""Real processes: a holder that cannot keep its copy is passed over, and copies are whole again."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from support.mortal import Mortals, Order
from support.training import even_plan, small_job

import crowdmesh_jax as cm

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("system")]


def test_after_a_copy_came_damaged_twice_another_device_keeps_it(tmp_path):
    job, data = small_job()
    plan = even_plan(job, 2)
    mortals = Mortals(tmp_path / "orders")
    for name in ("flip 0", "flip 1"):  # as it is sent, and as it is sent again
        mortals.order(Order(name=name, kind="send-Chunk", step=8, device="device-1", do="corrupt"))

    def slowly(event: Any) -> None:
        if isinstance(event, cm.StepEvent):
            time.sleep(0.01)

    with cm.launch(cm.Crowd.local((1.0,) * 4), agent_command=mortals.command) as crew:
        result = cm.train(
            job, crew, data, steps=60, plan=plan, runs_dir=tmp_path, name="x", on_event=slowly,
            recovery=cm.Recovery(wave_every=4, replan=False), measure=False,
        )  # fmt: skip
    assert sorted(mortals.fired()) == ["flip 0", "flip 1"]
    assert result.recoveries == ()
    log = (tmp_path / "x" / "policy.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    (failed,) = [line for line in lines if line["event"]["kind"] == "TransferFailed"]
    assert failed["event"]["device"] == "device-3", "the ring's holder of stage 1"
    assert failed["actions"][0]["kind"] == "AskHolders"
    stored = [e for e in (line["event"] for line in lines) if e["kind"] == "CopyStored"]
    assert {e["device"] for e in stored} >= {"device-0", "device-1", "device-2"}
    report = cm.read_replicas(tmp_path / "x")
    holders = {row.owner: [copy.device for copy in row.copies] for row in report.rows}
    assert holders == {"device-0": ["device-2"], "device-1": ["device-2"]}
    assert report.durable_version is not None
    assert report.durable_version > 12, "waves are complete again"
