"""The commands that train: what they print, what they leave, and Ctrl-C."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

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


def test_the_live_view_has_a_row_per_device():
    from rich.console import Console

    from crowdmesh_jax.cli.live import LiveView
    from crowdmesh_jax.core import Crowd
    from crowdmesh_jax.runtime import DeviceEvent, MeasuredEvent, StepEvent

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
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(view._render())
    text = console.export_text()
    (row,) = [line for line in text.splitlines() if "device-1" in line]
    assert re.search(r"device-1 +2-3 +0\.5 +10 ms +20 ms +1 ms +75%", row)
    assert "device-0" in text
    assert "step 7/10  loss 0.5000  accuracy 0.900  60 ms a step (predicted 50 ms)" in text


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
