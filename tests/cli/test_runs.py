"""The commands that train: what they print, what they leave, and Ctrl-C."""

import contextlib
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
from crowdmesh_jax.record import load_checkpoint, read_journal


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
def test_the_demo_ends_with_the_accuracy_on_its_last_line(folder):
    done = subprocess.run(
        [sys.executable, "-m", "crowdmesh_jax.cli", "demo", "--steps", "40"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    accuracy = re.fullmatch(r"test accuracy (\d+\.\d) %", done.stdout.splitlines()[-1])
    assert accuracy is not None
    assert float(accuracy[1]) > 85
    assert "bound by" in done.stdout
    assert re.search(r"step time  measured .*predicted ", done.stdout)
    assert "run folder " in done.stdout
