"""Real processes: plans that change though nobody was lost, and a coordinator that dies itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.equality import assert_bit_equal
from support.survival import journal
from support.training import Slow, even_plan, identical, small_job

import crowdmesh_jax as cm
from crowdmesh_jax import control
from crowdmesh_jax.record import read_journal

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("system")]
SAME_CUTS = cm.Recovery(replan=False)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def replayed(run_dir: Path) -> list[tuple[str, list[str]]]:
    """Kinds of the policy's events and wishes; told again, the machine wants the same."""
    told = list(control.replay(read_journal(run_dir / "policy.jsonl")))
    assert all(then == now for _, then, now in told)
    return [(type(event).__name__, [type(a).__name__ for a in then]) for event, then, _ in told]


def prepared(run_dir: Path, device: str) -> int:
    """Stages whose programs a device said it has."""
    lines = (run_dir / "policy.jsonl").read_text().splitlines()
    return sum("ProgramCompiled" in line and f'"{device}"' in line for line in lines)


def test_a_stage_is_handed_over_before_its_device_leaves(tmp_path, cache_dir):
    job, data = small_job()
    plan = even_plan(job, 2)
    with cm.launch(cm.Crowd.local((1.0,) * 3), cache_dir=cache_dir) as crew:
        told: list[int] = []
        until_s = time.monotonic() + 120.0  # on a quiet machine it takes seconds

        def leave(event, control):
            if isinstance(event, cm.RecoveryEvent):
                control.stop("it has moved")
            if not isinstance(event, cm.StepEvent):
                return
            assert time.monotonic() < until_s, "nothing was prepared, or nothing has moved"
            time.sleep(0.005)
            if not told and event.step >= 20 and prepared(tmp_path / "x", "device-2") == 2:
                told.append(event.step)
                control.depart("device-1", in_s=3.0)

        result = cm.train(
            job, crew, data, steps=100_000, plan=plan, runs_dir=tmp_path, name="x",
            callbacks=[leave], recovery=SAME_CUTS, measure=False,
        )  # fmt: skip
    (change,) = result.recoveries
    assert change.lost == ()
    assert (change.redone_steps, change.replayed_steps) == (0, 0), "no work is lost"
    (taken,) = change.take_overs
    assert (taken.before, taken.device, taken.source) == ("device-1", "device-2", "device-1")
    assert taken.compiled_s < 0.3, "its programs were ready"
    steps = len(result.losses)
    assert change.base < steps <= change.base + 50, "training went on until it was stopped"
    assert_bit_equal(result, cm.reference(job, data, steps=steps, plan=plan))
    assert "AskChange" in [action for _, actions in replayed(result.run_dir) for action in actions]


def test_a_loss_beside_the_device_that_has_handed_over_is_still_made_good(tmp_path, cache_dir):
    """The leaver is idle until it goes; what it held would go with it."""
    job, data = small_job()
    plan = even_plan(job, 2)
    with cm.launch(cm.Crowd.local((1.0,) * 4), cache_dir=cache_dir) as crew:
        moved: list[int] = []
        killed: list[str] = []

        def leave(event, control):
            if isinstance(event, cm.RecoveryEvent) and not event.lost and event.take_overs:
                moved.append(event.epoch)
            if not isinstance(event, cm.StepEvent):
                return
            if event.step == 20:
                control.depart("device-1", in_s=4.0)
            waves = [r for r in journal(tmp_path / "x") if r["kind"] == "Wave"] if moved else []
            if not killed and any(wave["epoch"] == moved[0] for wave in waves):
                killed.extend(("device-1", "device-0"))
                for device in killed:
                    os.kill(crew.pids[device], signal.SIGKILL)

        result = cm.train(
            job, crew, Slow(data, 0.02), steps=300, plan=plan, runs_dir=tmp_path, name="x",
            callbacks=[leave],
            recovery=cm.Recovery(replan=False, return_s=5.0), measure=False,
        )  # fmt: skip
    assert killed
    taken = [over for event in result.recoveries for over in event.take_overs if event.lost]
    assert [over.before for over in taken] == ["device-0"]
    assert all(over.source != "coordinator" for over in taken)
    assert all(event.how != "rollback" for event in result.recoveries)
    reference = cm.reference(job, data, steps=300, plan=plan)
    assert identical(result.params, reference.params)


def test_without_spares_the_layers_are_cut_anew_from_a_plan_made_ahead(tmp_path, cache_dir):
    job, data = small_job()
    plan = even_plan(job, 3)
    with cm.launch(cm.Crowd.local((1.0,) * 3), cache_dir=cache_dir) as crew:
        killed_s = [0.0]

        def kill(event):
            if isinstance(event, cm.StepEvent):
                time.sleep(0.02)
            log = list(Path(tmp_path).glob("*/policy.jsonl"))
            if killed_s[0] or not log or not isinstance(event, cm.StepEvent):
                return
            if log[0].read_text().count('"kind":"PlanSolved"') >= 3 and event.step % 10 == 0:
                time.sleep(2.0)  # what was planned is compiled meanwhile
                killed_s[0] = time.monotonic()
                os.kill(crew.pids["device-1"], signal.SIGKILL)

        result = cm.train(
            job, crew, data, steps=600, plan=plan, runs_dir=tmp_path, on_event=kill,
            recovery=True, measure=False,
        )  # fmt: skip
    assert killed_s[0], "plans for all three losses were made ahead"
    kinds = {event for event, actions in replayed(result.run_dir) if actions}
    assert {"Tick", "WaveKept", "OwnersNeeded"} <= kinds, "what depends on times comes out, too"
    (loss,) = [event for event in result.recoveries if event.lost]
    assert loss.lost == ("device-1",)
    assert loss.how == "rollback"
    assert loss.planned_s < 0.2, "nothing is solved on the hot path"
    assert all(taken.source != "coordinator" for taken in loss.take_overs)
    reference = cm.reference(job, data, steps=600)
    assert np.allclose(result.losses, reference.losses, rtol=2e-3, atol=1e-5)


def test_a_device_that_joins_becomes_a_member_and_takes_over_later(tmp_path, cache_dir):
    job, data = small_job()
    plan = even_plan(job, 2)
    with cm.launch(cm.Crowd.local((1.0,) * 3), cache_dir=cache_dir) as crew:
        done: list[str] = []

        def story(event):
            if isinstance(event, cm.RecoveryEvent):
                done.append(event.reason)
            if not isinstance(event, cm.StepEvent):
                return
            time.sleep(0.01)
            if event.step == 10:
                os.kill(crew.pids["device-2"], signal.SIGKILL)  # the spare
            elif event.step == 40:
                crew.relaunch("device-2")
            elif any("joined" in reason for reason in done) and "killed" not in done:
                done.append("killed")
                os.kill(crew.pids["device-0"], signal.SIGKILL)

        result = cm.train(
            job, crew, data, steps=800, plan=plan, runs_dir=tmp_path, on_event=story,
            recovery=SAME_CUTS, measure=False,
        )  # fmt: skip
    assert "killed" in done
    last = result.recoveries[-1]
    assert last.plan is not None
    assert last.plan.devices == ("device-2", "device-1"), "the device that came back"
    assert_bit_equal(result, cm.reference(job, data, steps=800, plan=plan))


COORDINATOR = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
import jax
import crowdmesh_jax as cm
from support.training import even_plan, small_job

if __name__ == "__main__":
    _, _, folder, listen, die_at = sys.argv[:5]
    job, data = small_job()
    begun = os.path.exists(folder + "/x/events.jsonl")
    where = {"resume": folder + "/x"} if begun else {"runs_dir": folder, "name": "x"}

    def watch(event):
        if isinstance(event, cm.StepEvent):
            time.sleep(0.01)
            if event.step == int(die_at):
                os.kill(os.getpid(), signal.SIGKILL)

    with cm.connect(cm.Crowd.local((1.0,) * 3), listen=listen) as crew:
        result = cm.train(
            job, crew, data, steps=300, plan=even_plan(job, 2), recovery=cm.Recovery(replan=False),
            measure=False, checkpoint_every=40, on_event=watch, **where,
        )
    leaves = jax.tree.leaves((result.params, result.state, result.opt_state))
    np.savez(folder + "/result.npz", *map(np.asarray, leaves))
    print("first step", result.first_step, "recoveries", len(result.recoveries))
"""


@pytest.mark.parametrize("victims", [(), ("device-1",)], ids=["alone", "and a device"])
def test_a_coordinator_that_is_killed_takes_its_run_up_again(tmp_path, victims):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "CROWDMESH_TOKEN": "secret", "JAX_PLATFORMS": "cpu", "NPROC": "1"}
    agents = {
        f"device-{i}": subprocess.Popen(
            [sys.executable, "-m", "crowdmesh_jax.agent", "--device", f"device-{i}",
             "--coordinator", listen],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for i in range(3)
    }  # fmt: skip

    def coordinate(die_at: int) -> subprocess.CompletedProcess[str]:
        tests = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", COORDINATOR, tests, str(tmp_path), listen, str(die_at)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    try:
        assert coordinate(60).returncode == -signal.SIGKILL
        for name in victims:
            agents[name].kill()
        again = coordinate(-1)
        assert again.returncode == 0, again.stderr[-2000:]
    finally:
        for agent in agents.values():
            agent.kill()
            agent.wait()
    told = again.stdout.split()
    assert int(told[2]) == 61, "the user sees each step once"
    assert int(told[4]) == len(victims), "without a loss nobody even stops"
    job, data = small_job()
    reference = cm.reference(job, data, steps=300, plan=even_plan(job, 2))
    with np.load(tmp_path / "result.npz") as kept:
        ours = [kept[name] for name in kept.files]
    assert identical(ours, [*_leaves(reference)])


def _leaves(result):
    import jax

    return jax.tree.leaves((result.params, result.state, result.opt_state))
