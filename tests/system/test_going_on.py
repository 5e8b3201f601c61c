"""Runs that end by a signal go on from their folder, over real processes, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("system")]

SCRIPT = """
import json
import sys
import numpy as np
import optax
import crowdmesh_jax as cm
from support.training import even_plan, small_job

if __name__ == "__main__":
    folder, name, steps, cache, *resume = sys.argv[1:]
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.05, warmup_steps=3, decay_steps=2000)
    job, data = small_job(optax.adamw(rate))
    fields = {"resume": f"{folder}/{name}"} if resume else {"name": name, "runs_dir": folder}
    def show(event):
        if isinstance(event, cm.StepEvent):
            print("step", event.step, flush=True)
        if isinstance(event, cm.CheckpointEvent):
            print("checkpoint", event.version, flush=True)
    with cm.launch(cm.Crowd.local((1.0, 0.5)), cache_dir=cache) as agents:
        try:
            result = cm.train(
                job, agents, data, steps=int(steps), plan=even_plan(job), measure=False,
                checkpoint_every=10, on_event=show, evaluate=cm.Evaluation(data, every=7), **fields,
            )
        except cm.errors.InterruptedRunError as error:
            print("interrupted", error, flush=True)
        else:
            digest = [np.asarray(leaf).tobytes().hex() for leaf in result.params["head"].values()]
            print("result", json.dumps(digest), flush=True)
"""


class Script:
    """A training process and what it says."""

    def __init__(self, tmp_path: Path, name: str, steps: int, *resume: str) -> None:
        path = tmp_path / "script.py"
        path.write_text(SCRIPT)
        root = Path(__file__).parents[2]
        paths = os.pathsep.join([str(root / "src"), str(root / "tests")])
        arguments = [str(tmp_path), name, str(steps), str(tmp_path / "cache"), *resume]
        self.process = subprocess.Popen(
            [sys.executable, str(path), *arguments], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = self.process.stdout

    def until(self, start: str) -> str:
        for line in self.lines:
            if line.startswith(start):
                return line.strip()
        raise AssertionError(f"it ended without saying {start!r}")

    def end(self, number: int) -> str:
        """Sends a signal and reads to the end."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=60)
        return out

    def result(self) -> str:
        """What it ends with; it ends well."""
        line = self.until("result")
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return line


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_runs_go_on_bit_for_bit_after_ctrl_c_and_after_a_killed_coordinator(tmp_path):
    broken = Script(tmp_path, "run", 100_000)
    broken.until("step 12")
    assert "interrupted [CM-512]" in broken.end(signal.SIGINT)
    first = checkpoint_version(tmp_path / "run")
    assert first >= 13

    # The next one is killed some steps after a checkpoint of its own: these are made again.
    killed = Script(tmp_path, "run", 100_000, "resume")
    version = int(killed.until("checkpoint").split()[1])
    assert version > first
    killed.until(f"step {version + 2}")
    killed.end(signal.SIGKILL)
    second = checkpoint_version(tmp_path / "run")
    assert second >= version

    steps = second + 15
    last = Script(tmp_path, "run", steps, "resume")
    result = last.result()
    whole = Script(tmp_path, "whole", steps)
    assert whole.result() == result

    rows, wanted = rows_of(tmp_path / "run"), rows_of(tmp_path / "whole")
    losses = {row["step"]: row["loss"] for row in rows if "step" in row}
    assert [row["step"] for row in rows if "step" in row] == list(range(steps))
    assert losses == {row["step"]: row["loss"] for row in wanted if "step" in row}
    values = {row["version"]: row["eval"] for row in rows if "eval" in row}
    whole_values = {row["version"]: row["eval"] for row in wanted if "eval" in row}
    # One that fell on the very commit of the Ctrl-C was left out.
    assert set(whole_values) - set(values) <= {first}
    assert all(whole_values[version] == values[version] for version in values)


def checkpoint_version(folder: Path) -> int:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            return json.loads((folder / "checkpoint" / "manifest.json").read_text())["version"]
        except FileNotFoundError:
            time.sleep(0.05)
    raise AssertionError("no checkpoint")
