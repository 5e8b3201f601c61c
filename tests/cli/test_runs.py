"""The commands that train: what they print, what they leave, and Ctrl-C."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crowdmesh_jax.cli import main
from crowdmesh_jax.core import PipelinePlan, to_json
from crowdmesh_jax.record import load_checkpoint, read_journal, trace_events


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a plan that cuts the mlp over two devices."""
    monkeypatch.chdir(tmp_path)
    plan = PipelinePlan.even(4, ["device-0", "device-1"], microbatches=8)
    (tmp_path / "plan.json").write_text(to_json(plan))
    return tmp_path


TRAIN = ["train", "mlp", "--plan", "plan.json", "--speeds", "1,0.5", "--name", "mine"]


def test_train_tells_steps_step_time_and_folder(capsys, folder):
    assert main([*TRAIN, "--steps", "4", "--transport", "memory"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"step 4/4  loss \d", text)
    assert "installing: device-0, device-1 (loading and compiling their programs" in text
    assert re.search(r"step time  measured [\d.]+ \w+, predicted ", text)
    assert f"run folder {folder}/runs/mine" in text
    run = folder / "runs" / "mine"
    assert len(read_journal(run / "metrics.jsonl")) == 4
    assert load_checkpoint(run / "checkpoint").version == 4
    assert main([*TRAIN, "--steps", "4", "--transport", "memory"]) == 2
    assert "a run of that name is there" in capsys.readouterr().err


def test_json_tells_events_and_the_result(capsys, folder):
    assert main([*TRAIN, "--steps", "3", "--transport", "memory", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [event for event in told if event["event"] == "step"]
    assert [event["step"] for event in steps] == [0, 1, 2]
    result = told[-1]
    assert result["event"] == "result"
    assert result["loss"] == pytest.approx(steps[-1]["loss"])
    assert result["run_dir"] == str(folder / "runs" / "mine")
    assert {"phase", "device", "measured", "checkpoint"} <= {event["event"] for event in told}


def test_a_run_is_evaluated_and_goes_on_with_the_options_that_its_folder_remembers(capsys, folder):
    options = ["--evaluate-every", "2", "--keep-best", "loss", "--batch-size", "32"]
    assert main([*TRAIN, "--steps", "3", "--transport", "memory", *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"evaluated at step 2  loss \d\.\d+  accuracy \d\.\d+  \(360 rows\)", text)
    assert re.search(r"best so far: step 2  loss \d", text)
    run = folder / "runs" / "mine"
    assert f"kept in {run}/best" in text
    resume = ["train", "--resume", "runs/mine", "--transport", "memory"]
    assert main(resume) == 2
    assert "nothing to do" in capsys.readouterr().err
    assert main([*resume, "--steps", "4", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["step"] for event in told if event["event"] == "step"] == [3]
    assert [event["version"] for event in told if event["event"] == "evaluation"] == [4]
    assert told[-1]["steps"] == 4
    assert not [event for event in told if event["event"] == "plan"], "its own plan fits"
    assert main([*resume, "--steps", "9", "--seed", "3"]) == 2
    assert "seed: 0 in the checkpoint, 3 in this job" in capsys.readouterr().err


def test_options_that_ask_for_nothing_sensible_are_told(capsys, folder):
    for arguments, text in [
        (["train"], "which model?"),
        (["train", "--resume", "nowhere"], "no such run folder"),
        ([*TRAIN, "--evaluate-every", "0"], "--evaluate-every must be >= 1"),
        ([*TRAIN, "--keep-best", "f1:max"], "no metric 'f1'"),
    ]:
        assert main([*arguments, "--transport", "memory"]) == 2
        assert text in capsys.readouterr().err


def test_the_live_view_has_a_row_per_device():
    from rich.console import Console

    from crowdmesh_jax.cli.live import LiveView
    from crowdmesh_jax.core import Crowd
    from crowdmesh_jax.runtime import (
        BestEvent,
        CheckpointEvent,
        DeviceEvent,
        EvaluationEvent,
        MeasuredEvent,
        StepEvent,
    )

    plan = PipelinePlan.even(4, ["device-0", "device-1"], microbatches=8)
    view = LiveView(plan, Crowd.local((1.0, 0.5)))
    view(MeasuredEvent(prediction_s=0.05, programs_s={}))
    view(StepEvent(step=6, steps=10, loss=0.5, step_s=0.06, metrics={"accuracy": 0.9}))
    view(
        DeviceEvent(
            device="device-1", stage=1, step=6, forward_s=0.01, backward_s=0.02, update_s=0.001,
            idle_share=0.25,
        )
    )  # fmt: skip
    view(EvaluationEvent(version=6, values={"loss": 0.4, "accuracy": 0.875}, rows=352))
    view(BestEvent(version=4, metric="accuracy", value=0.88, path=Path("best")))
    view(CheckpointEvent(version=5, path=Path("checkpoint")))
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(view._render())
    text = console.export_text()
    (row,) = [line for line in text.splitlines() if "device-1" in line]
    assert re.search(r"device-1 +2-3 +0\.5 +10 ms +20 ms +1 ms +75%", row)
    assert "device-0" in text
    assert (
        "step 7/10  loss 0.5000  accuracy 0.900  60 ms a step (predicted 50 ms)  180 ms left"
        in text
    )
    assert "evaluated at step 6  loss 0.4000  accuracy 0.8750  (352 rows)" in text
    assert "best so far: step 4  accuracy 0.8800" in text
    assert "newest checkpoint: step 5" in text


@pytest.mark.system
@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_keeps_the_last_step(folder):
    child = subprocess.Popen(
        [sys.executable, "-m", "crowdmesh_jax.cli", *TRAIN, "--steps", "1000000", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if json.loads(line)["event"] == "step":
                break
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 130, errors
        assert "Traceback" not in errors
        told = json.loads(errors.splitlines()[-1])["error"]
        assert told["code"] == "CM-512"
        assert load_checkpoint(folder / "runs" / "mine" / "checkpoint").version >= 1
        assert json.loads((folder / "runs" / "mine" / "trace.json").read_text())["traceEvents"]
        deadline = time.monotonic() + 10  # agents notice their parent's end on their own
        while _group_lives(child.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _group_lives(child.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.system
@pytest.mark.slow
def test_the_demo_kills_a_process_and_ends_where_an_undisturbed_run_does(folder):
    done = subprocess.run(
        [sys.executable, "-m", "crowdmesh_jax.cli", "demo", "--steps", "40", "--name", "mine"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    killed = re.search(
        r"KILLED +(device-\d) \(SIGKILL to process \d+\) after step (\d+)", done.stdout
    )
    assert killed is not None
    assert 40 // 3 <= int(killed[2]) <= 2 * 40 // 3
    assert re.search(
        rf"RECOVERED +lost {killed[1]}: device-4 took layers [\d-]+"
        r" \(a spare that had the copy.*\); it replayed \d steps?, nobody else redid any\n"
        r" +[\d.]+ s to the next step: noticed in .*compiling .* MB moved",
        done.stdout,
    ), done.stdout
    assert re.search(r"bit-equal    40 losses and 495,871 numbers .*\nlast loss", done.stdout)
    (line,) = read_journal(folder / "runs" / "mine" / "recoveries.jsonl")
    assert line["lost"] == [killed[1]]
    trace = json.loads((folder / "runs" / "mine" / "trace.json").read_text())
    events = trace_events(trace)
    assert {e.device for e in events if e.kind.startswith("replayed_")} == {"device-4"}
    assert [e.kind for e in events if e.device == "recovery"] == [
        "noticed", "fenced", "planned", "installed", "first_step",
    ]  # fmt: skip
    assert [over["before"] for over in line["take_overs"]] == [killed[1]]
    devices = [stage["device"] for stage in line["plan"]["stages"]]
    assert "device-4" in devices
    assert killed[1] not in devices
    accuracy = re.fullmatch(r"test accuracy (\d+\.\d) %", done.stdout.splitlines()[-1])
    assert accuracy is not None
    assert float(accuracy[1]) > 85
    assert "bound by" in done.stdout
    assert re.search(r"step time  measured .*predicted ", done.stdout)
    assert "run folder " in done.stdout


def test_the_demo_kills_by_its_seed_alone():
    from crowdmesh_jax.cli.demo import victim

    plan = PipelinePlan.even(4, ["a", "b", "c", "d"], microbatches=4)
    drawn = [victim(seed, 120, plan) for seed in range(40)]
    assert drawn == [victim(seed, 120, plan) for seed in range(40)]
    assert {device for device, _ in drawn} == set(plan.devices)
    assert all(40 <= step < 80 for _, step in drawn)


def test_a_demo_too_short_for_a_death_is_refused(capsys, folder):
    assert main(["demo", "--steps", "9"]) == 2
    assert "--steps must be >= 10 where a device is killed" in capsys.readouterr().err


def test_one_bit_makes_the_demos_comparison_fail(tmp_path):
    import jax
    import numpy as np
    from support.training import even_plan, small_job

    import crowdmesh_jax as cm
    from crowdmesh_jax.cli.demo import compare

    job, data = small_job()
    plan = even_plan(job, 2)
    result = cm.train(
        job, cm.Crowd.local((1.0, 1.0)), data, steps=3, plan=plan, transport="memory",
        runs_dir=tmp_path, measure=False,
    )  # fmt: skip
    same = compare(job, data, result)
    assert (same.unequal, same.losses) == ((), 3)
    assert same.numbers > 100
    same.conclude()
    assert "bit-equal    3 losses" in same.text()
    leaves, tree = jax.tree.flatten(result.params)
    leaves[1] = np.nextafter(leaves[1], np.float32(np.inf))
    other = dataclasses.replace(result, params=jax.tree.unflatten(tree, leaves))
    differs = compare(job, data, other)
    assert len(differs.unequal) == 1
    assert "NOT EQUAL    of 3 losses" in differs.text()
    with pytest.raises(SystemExit) as ended:
        differs.conclude()
    assert ended.value.code == 1


def _recovery(**fields):
    from crowdmesh_jax.record import RecoveryEvent, TakeOver

    over = TakeOver(
        stage=1, layers=(2, 3), device="device-2", before="device-1", was_spare=True,
        from_version=8, source="device-2", compiled_s=0.0, loaded_s=0.1, moved_bytes=0,
    )  # fmt: skip
    usual = {
        "epoch": 2, "at_s": 1.7e9, "opened_s": 100.0, "lost": ("device-1",), "reason": "",
        "choice": "", "how": "replay", "base": 11, "silent_s": 0.04, "fenced_s": 0.01,
        "planned_s": 0.0, "installed_s": 0.12, "first_step_s": 0.03, "replayed_steps": 3,
        "redone_steps": 0, "take_overs": (over,),
    }  # fmt: skip
    return RecoveryEvent(**{**usual, **fields})


def test_the_live_view_follows_a_stage_that_changes_hands():
    from rich.console import Console

    from crowdmesh_jax.cli.live import KillEvent, LiveView
    from crowdmesh_jax.core import Crowd
    from crowdmesh_jax.runtime import PhaseEvent, StepEvent

    plan = PipelinePlan.even(4, ["device-0", "device-1"], microbatches=8)
    after = PipelinePlan.even(4, ["device-0", "device-2"], microbatches=8)
    console = Console(width=170, record=True, file=open(os.devnull, "w"))  # noqa: SIM115

    def shown(view):
        console.print(view._render())
        return console.export_text()

    with console.file:
        view = LiveView(plan, Crowd.local((1.0, 0.5, 0.25)), ("device-2",), console)
        assert re.search(r"device-2 +spare +0\.25", shown(view))
        view(StepEvent(step=10, steps=40, loss=0.5, step_s=0.06))
        view(KillEvent(device="device-1", pid=77, step=11))
        view(PhaseEvent(phase="fencing", detail="device-0, device-2"))
        text = shown(view)
        assert "KILLED     device-1 (SIGKILL to process 77) after step 11" in text
        assert re.search(r"device-1 +2-3 ", text)
        assert "step 11/40  fencing: device-0, device-2 (all stop, and tell what they have)" in text
        view(_recovery(plan=after))
        view(PhaseEvent(phase="running", detail=""))
        text = shown(view)
    assert re.search(r"device-2 +2-3 +0\.25", text)
    assert re.search(r"device-1 +killed after step 11", text)
    assert not re.search(r"device-\d +spare", text)
    assert (
        "lost device-1: device-2 took layers 2-3 (a spare that had the copy and the programs); it"
        " replayed 3 steps, nobody else redid any" in text
    )
    assert "0.20 s to the next step: noticed in 0.04, all stopped in 0.01, planned in 0.00" in text
    assert "step 11/40  loss" in text


def test_how_a_recovery_is_told():
    assert _recovery().line().startswith("lost device-1: device-2 took layers 2-3 (a spare")
    back = _recovery(how="rollback", base=8, replayed_steps=0, redone_steps=3)
    assert "all went back to step 8: 3 steps redone" in back.line()
    nothing = _recovery(how="keep", lost=(), take_overs=(), replayed_steps=0, reason="it is back")
    assert nothing.line().startswith("it is back: no step was redone")
    (over,) = _recovery().take_overs
    for fields, why in [
        ({}, "a spare that had the copy and the programs"),
        ({"compiled_s": 0.2}, "a spare that had the copy"),
        ({"source": "device-0"}, "a spare that had the programs"),
        ({"source": "device-0", "compiled_s": 0.2, "was_spare": False}, "a survivor"),
    ]:
        assert dataclasses.replace(over, **fields).why == why
    anew = dataclasses.replace(over, before="", layers=(0, 3))
    told = _recovery(take_overs=(anew,), how="rollback", redone_steps=1).line()
    assert "the layers were cut anew: device-2 has layers 0-3; all went back" in told
    assert "1 step redone" in told


def test_train_recovers_where_devices_are_spare_unless_told_otherwise():
    from crowdmesh_jax.cli import build_parser
    from crowdmesh_jax.cli.train import read_recovery
    from crowdmesh_jax.core import Crowd

    plan = PipelinePlan.even(4, ["device-0", "device-1"], microbatches=8)
    two, three = Crowd.local((1.0, 0.5)), Crowd.local((1.0, 0.5, 0.5))

    def terms(crowd, *options):
        arguments = build_parser().parse_args(["train", "mlp", *options])
        for name in ("copies", "wave_every", "replan"):  # as `complete` does
            if getattr(arguments, name) is None:
                setattr(arguments, name, arguments.usual[name])
        return read_recovery(arguments, plan, crowd)

    assert terms(two) is None
    assert terms(three) is not None
    assert terms(three, "--no-recover") is None
    assert terms(three, "--transport", "memory") is None
    told = terms(two, "--recover", "--copies", "2", "--wave-every", "5")
    assert told is not None
    assert (told.copies, told.wave_every, told.replan) == (2, 5, True)
    told = terms(three, "--no-replan")
    assert told is not None
    assert (told.copies, told.wave_every, told.replan) == (1, None, False)
