"""A disk that takes nothing for a while: devices train on, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("system")]

SCRIPT = """
import os, resource, signal, sys, time
sys.path.insert(0, sys.argv[1])
import jax
import numpy as np
import crowdmesh_jax as cm
from support.equality import assert_bit_equal
from support.training import even_plan, small_job

if __name__ == "__main__":
    folder, kill = sys.argv[2], sys.argv[3] == "kill"
    job, data = small_job()
    plan = even_plan(job, 2)
    full_s = []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def story(event):
        if not isinstance(event, cm.StepEvent):
            return
        time.sleep(0.01)
        if event.step == 30:
            # No file may grow from here on, as on a full disk.
            size = os.path.getsize(folder + "/x/events.jsonl")
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
            full_s.append(time.monotonic())
            if kill:
                os.kill(crew.pids["device-1"], signal.SIGKILL)
            import threading
            def free():
                time.sleep(3.0)
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            threading.Thread(target=free).start()

    with cm.launch(cm.Crowd.local((1.0,) * 3)) as crew:
        result = cm.train(
            job, crew, data, steps=200, plan=plan, runs_dir=folder, name="x", measure=False,
            # A busy machine's silence is no loss here.
            recovery=cm.Recovery(replan=False, wave_every=4, silence_s=15.0),
            checkpoint_every=8, on_event=story,
        )
    assert len(result.losses) == 200
    reference = cm.reference(job, data, steps=200, plan=plan)
    for part in ("params", "state", "opt_state"):
        ours, theirs = getattr(result, part), getattr(reference, part)
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    print("equal", len(result.recoveries))
"""


@pytest.mark.parametrize("fault", ["none", "kill"])
def test_a_full_disk_stops_nobody(tmp_path, fault):
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tests, str(tmp_path), fault],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal", str(int(fault == "kill"))]
    assert "the devices train on" in done.stderr, "it is said"
    records = [json.loads(line) for line in (tmp_path / "x/events.jsonl").read_text().splitlines()]
    assert [record["seq"] for record in records] == list(range(len(records)))
    steps = [record["step"] for record in records if record["kind"] == "StepCommitted"]
    assert sorted(set(steps)) == list(range(200))
