"""Real processes whose devices move by a script: who walks away hands its stage over first."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from support.equality import assert_bit_equal
from support.training import Slow, even_plan, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.mobility import Sightings

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("system")]
RANGE_M, PACE_M_PER_S = 80.0, 3.0


class Walk:
    """device-1 walks away from the others and is out of range after `gone_s`."""

    def __init__(self, gone_s: float) -> None:
        self.gone_s = gone_s
        self.began_s: float | None = None

    def __call__(self) -> Sightings:
        now_s = time.monotonic()
        self.began_s = self.began_s or now_s
        x_m = RANGE_M - PACE_M_PER_S * (self.gone_s - (now_s - self.began_s))
        return Sightings(
            now_s=now_s,
            seen_s=np.full(3, now_s),
            positions_m=np.array([[0.0, 0.0], [x_m, 0.0], [0.0, 10.0]]),
            velocities_m_per_s=np.array([[0.0, 0.0], [PACE_M_PER_S, 0.0], [0.0, 0.0]]),
            velocity_sd_m_per_s=np.full(3, 0.02),
            occupants=np.arange(3),
        )


@pytest.mark.parametrize("policy", ["mobility", "neighbour"])
def test_who_walks_away_hands_over_first_under_the_policy_that_looks(tmp_path, policy):
    job, data = small_job()
    plan = even_plan(job, 2)
    walk = Walk(gone_s=9.0)
    with cm.launch(cm.Crowd.local((1.0,) * 3)) as crew:
        gone = False

        def leave(event):
            nonlocal gone
            if not isinstance(event, cm.StepEvent):
                return
            if walk.began_s and not gone and time.monotonic() - walk.began_s > walk.gone_s:
                gone = True
                os.kill(crew.pids["device-1"], signal.SIGKILL)

        result = cm.train(
            job, crew, Slow(data, 0.03), steps=500, plan=plan, runs_dir=tmp_path, on_event=leave,
            measure=False,
            recovery=cm.Recovery(policy=policy, watch=walk, range_m=RANGE_M, replan=False),
        )  # fmt: skip
    assert gone
    first = result.recoveries[0]
    if policy == "mobility":
        assert first.lost == ()
        assert "hands stage 1 over to device-2" in first.reason
        assert (first.replayed_steps, first.redone_steps) == (0, 0)
    else:
        assert first.lost == ("device-1",), "its rule does not look"
    assert result.recoveries[-1].plan is not None
    assert "device-1" not in result.recoveries[-1].plan.devices
    assert_bit_equal(result, cm.reference(job, data, steps=500, plan=plan))
