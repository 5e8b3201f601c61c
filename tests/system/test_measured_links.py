"""Real processes: what links carry of copies is measured, and a hand-over begins by that."""

from __future__ import annotations

import time
from dataclasses import replace

import flax.linen as nn
import numpy as np
import optax
import pytest
from support.equality import assert_bit_equal

import crowdmesh_jax as cm
from crowdmesh_jax.record import read_journal

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("system")]
WIDTH = 384
LEAVES_IN_S = 8.0
WAIT_S = 120.0
"""For what takes seconds on a quiet machine."""


def wide_job() -> tuple[cm.TrainingJob, cm.ArraySource]:
    """Four layers, 1.8 MB of state each: a copy of two is several pieces."""
    model = cm.StagedModel.from_linen([nn.Dense(WIDTH) for _ in range(4)], list("abcd"))
    job = cm.TrainingJob(
        model, lambda outputs, targets: (outputs - targets) ** 2, optax.adam(1e-3), 8, 4
    )
    rows = np.random.default_rng(0).standard_normal((64, WIDTH), np.float32)
    return job, cm.ArraySource(rows, rows, 8)


def test_a_link_that_carries_more_than_the_crowd_says_lets_a_stage_stay_longer(tmp_path):
    job, data = wide_job()
    plan = cm.PipelinePlan.even(4, ["device-0", "device-1"], microbatches=4)
    # By the crowd a stage takes 70 s to the only spare: it would have to leave at once.
    slow = cm.Link(source="device-1", target="device-2", bandwidth_bytes_per_s=5e4)
    crowd = replace(cm.Crowd.local((1.0,) * 3), links=(slow,))
    told: list[int] = []
    until_s = time.monotonic() + WAIT_S

    def leave(event, control):
        if isinstance(event, cm.RecoveryEvent):
            control.stop("it has moved")
        if isinstance(event, cm.StepEvent):
            assert time.monotonic() < until_s, "nothing was measured, or nothing has moved"
            time.sleep(0.005)
            if not told and event.step >= 20:
                log = (tmp_path / "x" / "policy.jsonl").read_text()
                if log.count("ProgramCompiled") >= 2 and "LinkMeasured" in log:
                    told.append(event.step)
                    control.depart("device-1", in_s=LEAVES_IN_S)

    with cm.launch(crowd) as crew:
        result = cm.train(
            job, crew, data, steps=100_000, plan=plan, runs_dir=tmp_path, name="x",
            callbacks=[leave], recovery=cm.Recovery(replan=False), measure=False,
        )  # fmt: skip
    (change,) = result.recoveries
    (taken,) = change.take_overs
    assert (taken.before, taken.device, change.lost) == ("device-1", "device-2", ())
    lines = [line for line in read_journal(result.run_dir / "policy.jsonl") if "event" in line]
    running = next(line["event"] for line in lines if line["event"]["kind"] == "Running")
    assert running["link_bytes_per_s"]["device-1"]["device-2"] == 5e4
    measured = [line["event"] for line in lines if line["event"]["kind"] == "LinkMeasured"]
    assert {(m["sender"], m["receiver"]) for m in measured} >= {("device-1", "device-2")}
    assert all(1e5 < m["bytes_per_s"] < 1e12 for m in measured)
    (said_s,) = [line["now_s"] for line in lines if line["event"]["kind"] == "Departing"]
    (asked_s,) = [
        line["now_s"] for line in lines if any(a["kind"] == "AskChange" for a in line["actions"])
    ]
    assert 1.0 < asked_s - said_s < LEAVES_IN_S, "neither at once, nor too late"
    assert_bit_equal(result, cm.reference(job, data, steps=len(result.losses), plan=plan))
