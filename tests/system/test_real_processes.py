"""What a user meets on real processes: results, deaths, Ctrl-C, bad losses, nothing left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.equality import assert_bit_equal
from support.families import family

import crowdmesh_jax as cm
from crowdmesh_jax.data import ArraySource

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("system")]


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    crowd = cm.Crowd.local((1.0, 0.5))
    with cm.launch(crowd, cache_dir=tmp_path_factory.mktemp("compiled")) as crew:
        yield crew


def small_job(**fields) -> tuple[cm.TrainingJob, ArraySource]:
    """A tiny net on random rows that ship with the install."""
    made = family("mlp")
    inputs, targets = made.batch(64)
    optimizer = fields.pop("optimizer", optax.adam(1e-2))
    return made.job(optimizer, batch_size=8, **fields), ArraySource(inputs, targets, 8)


def plan_for(job: cm.TrainingJob, crew: cm.Crew, stages: int = 2) -> cm.PipelinePlan:
    devices = [device.id for device in crew.crowd.devices[:stages]]
    return cm.PipelinePlan.even(len(job.model.layers), devices, microbatches=job.microbatches)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def test_a_run_leaves_a_complete_folder(crew, tmp_path):
    job, data = small_job()
    seen = []
    result = cm.train(
        job, crew, data, steps=6, plan=plan_for(job, crew), runs_dir=tmp_path, name="first",
        checkpoint_every=2, on_event=seen.append,
    )  # fmt: skip
    folder = tmp_path / "first"
    assert result.run_dir == folder
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.toml", "plan.json", "events.jsonl", "metrics.jsonl", "trace.json", "checkpoint",
        "memory.json",
    } <= names  # fmt: skip
    memory = json.loads((folder / "memory.json").read_text())
    assert list(memory) == [device.id for device in crew.crowd.devices]
    for held in memory.values():
        above = held["peak_bytes"] - held["idle_bytes"]
        assert 20e6 < above < 400e6, "a tiny net: what JAX itself takes once it runs"
        assert held["idle_bytes"] < held["loading_peak_bytes"] < held["idle_bytes"] + 1e9
        assert 20e6 < held["predicted_bytes"] < 200e6
    assert cm.RunFolder.open(folder).read_plan() == result.plan
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert np.allclose([line["loss"] for line in lines], result.losses)
    assert [event.step for event in seen if isinstance(event, cm.StepEvent)] == list(range(6))
    versions = [event.version for event in seen if isinstance(event, cm.CheckpointEvent)]
    assert versions[-1] == 6
    assert versions == sorted(set(versions))
    assert len(versions) > 1, "checkpoint_every=2 keeps versions on the way"
    kept = cm.load_checkpoint(folder / "checkpoint")
    assert kept.version == 6
    stored = {array.tobytes() for key, array in kept.arrays.items() if key[0] == "param"}
    assert {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result.params)} == stored


def test_the_trace_shows_measured_next_to_predicted_for_each_device(crew, tmp_path):
    job, data = small_job()
    result = cm.train(job, crew, data, steps=5, plan=plan_for(job, crew), runs_dir=tmp_path)
    trace = json.loads((result.run_dir / "trace.json").read_text())["traceEvents"]
    rows = {e["args"]["name"] for e in trace if e["ph"] == "M" and e["name"] == "thread_name"}
    for device in ("device-0", "device-1"):
        assert {device, f"{device} predicted", f"{device} send", f"{device} receive"} <= rows
    kinds = {e["name"].split()[0] for e in trace if e["ph"] == "X"}
    assert {"forward", "backward", "update", "send", "receive"} <= kinds
    assert any(e["ph"] == "s" for e in trace), "arrows from sends to receives"


@pytest.mark.parametrize("transport", ["memory", "grpc"])
def test_each_hop_is_timed_before_the_run_over_the_link_as_it_is_emulated(transport, tmp_path):
    job, data = small_job()
    slow = cm.Link(source="device-1", target="device-0", bandwidth_bytes_per_s=1e6, latency_s=0.05)
    crowd = cm.Crowd.local((1.0, 1.0, 1.0))
    crowd = dataclasses.replace(crowd, links=(*crowd.links, slow))
    seen = []
    with cm.launch(crowd, transport=transport) as agents:
        plan = plan_for(job, agents, stages=3)
        cm.train(job, agents, data, steps=1, plan=plan, runs_dir=tmp_path, on_event=seen.append)
    (measured,) = (event for event in seen if isinstance(event, cm.MeasuredEvent))
    hops = {device: found.get("round_trip") for device, found in measured.programs_s.items()}
    assert hops["device-2"] is None, "it has no neighbour below"
    assert 0.05 < hops["device-0"] < 0.5, "back over the slow link"
    assert 0 < hops["device-1"] < 0.05
    # Each microbatch of a step waits for the slow link once; a step pays it at least once.
    assert measured.prediction_s > 0.05
    assert not asyncio.all_tasks(agents._loop), "emulated links end with their agents"


def test_timing_the_stages_before_a_run_changes_nothing_of_it(crew, tmp_path):
    made = family("lenet")  # statistics, dropout, accumulators that measuring overwrites
    job = made.job(optax.adam(1e-2))
    fields = {"steps": 3, "plan": plan_for(job, crew), "runs_dir": tmp_path}
    timed = cm.train(job, crew, made.source(), measure=True, **fields)
    plain = cm.train(job, crew, made.source(), measure=False, **fields)
    assert timed.predicted_step_s > 0
    assert_bit_equal(timed, plain)


def test_agents_serve_one_run_after_another_and_a_source_that_stays_at_home(crew, tmp_path):
    made = family("mlp")
    job = made.job(optax.sgd(0.1))
    first, second = (
        cm.train(
            job, crew, made.source(), steps=3, plan=plan_for(job, crew), runs_dir=tmp_path,
            measure=False,
        )
        for _ in range(2)
    )  # fmt: skip
    assert first.losses.tolist() == second.losses.tolist()


def test_a_source_that_raises_ends_the_run_and_is_named(crew, tmp_path):
    made = family("mlp")
    job = made.job(optax.sgd(0.1))

    class Broken:
        def batch(self, step):
            if step == 2:
                raise OSError("disk on fire")
            return made.batch(8, step=step)

    with pytest.raises(cm.CrowdMeshError, match=r"step 2.*disk on fire"):
        cm.train(
            job, crew, Broken(), steps=5, plan=plan_for(job, crew), runs_dir=tmp_path, measure=False
        )
    # The agents are free again.
    cm.train(
        job, crew, made.source(), steps=1, plan=plan_for(job, crew), runs_dir=tmp_path,
        measure=False,
    )  # fmt: skip


def test_a_loss_that_is_not_finite_halts_with_the_step_and_keeps_the_state(crew, tmp_path):
    job, data = small_job(optimizer=optax.sgd(1e20))
    with pytest.raises(cm.errors.NonFiniteLossError, match=r"CM-510.*step \d"):
        cm.train(
            job, crew, data, steps=30, plan=plan_for(job, crew), runs_dir=tmp_path, name="bad",
            measure=False,
        )  # fmt: skip
    kept = cm.load_checkpoint(tmp_path / "bad" / "checkpoint")
    assert kept.version > 0


def test_a_killed_agent_ends_the_run_within_seconds_and_is_named(tmp_path):
    job, data = small_job()
    crowd = cm.Crowd.local((1.0, 0.5))
    killed_s = None

    def kill(event):
        nonlocal killed_s
        if isinstance(event, cm.StepEvent) and event.step == 3:
            os.kill(agents.pids["device-1"], signal.SIGKILL)
            killed_s = time.monotonic()

    with cm.launch(crowd) as agents:
        pids = list(agents.pids.values())
        with pytest.raises(cm.errors.AgentLostError, match=r"device-1.*signal 9") as caught:
            cm.train(
                job, agents, data, steps=100_000, plan=plan_for(job, agents), runs_dir=tmp_path,
                name="killed", on_event=kill,
            )  # fmt: skip
        assert killed_s is not None
        assert time.monotonic() - killed_s < 10
        assert "layers" in str(caught.value), "says what it held"
        with pytest.raises(cm.errors.AgentLostError, match="launch"):
            cm.train(job, agents, data, steps=1, plan=plan_for(job, agents), runs_dir=tmp_path)
    assert not any(map(is_alive, pids))
    folder = tmp_path / "killed"
    assert cm.load_checkpoint(folder / "checkpoint").version == 0
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 4


def test_a_program_that_cannot_be_exported_leaves_no_folder_and_no_agent(tmp_path, monkeypatch):
    def loud(outputs, targets):
        jax.debug.print("{}", outputs[0, 0])
        return jnp.sum(outputs), 1.0

    job, data = small_job(metrics={"loud": loud})
    crowd = cm.Crowd.local((1.0, 1.0))
    devices = [device.id for device in crowd.devices]
    plan = cm.PipelinePlan.even(len(job.model.layers), devices, microbatches=job.microbatches)
    started = []
    popen = subprocess.Popen

    def noted(*args, **fields):
        started.append(popen(*args, **fields))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    with pytest.raises(cm.errors.UnsupportedLayerError, match="metric"):
        cm.train(job, crowd, data, steps=1, plan=plan, runs_dir=tmp_path)
    assert len(started) == 2, "agents come up while programs are exported"
    assert all(process.poll() is not None for process in started)
    assert not list(tmp_path.iterdir())


def test_agents_without_a_cache_folder_keep_nothing_whatever_the_environment_says(
    tmp_path, monkeypatch
):
    kept = tmp_path / "kept"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(kept))
    job, data = small_job()
    with cm.launch(cm.Crowd.local((1.0,)), cache_dir=None) as agents:
        cm.train(job, agents, data, steps=1, plan=plan_for(job, agents, 1), runs_dir=tmp_path)
    assert not kept.exists()


SCRIPT = """
import sys
import optax
import crowdmesh_jax as cm
from crowdmesh_jax.data import ArraySource
from support.families import family

if __name__ == "__main__":
    made = family("mlp")
    inputs, targets = made.batch(64)
    job = made.job(optax.adam(1e-2), batch_size=8)
    data = ArraySource(inputs, targets, 8)
    crowd = cm.Crowd.local((1.0, 0.5))
    plan = cm.PipelinePlan.even(4, ["device-0", "device-1"], microbatches=4)
    with cm.launch(crowd) as agents:
        def show(event):
            if isinstance(event, cm.StepEvent) and event.step == 2:
                print("pids", *agents.pids.values(), flush=True)
        try:
            cm.train(job, agents, data, steps=100000, plan=plan, runs_dir=sys.argv[1], name="run",
                     measure=False, on_event=show)
        except cm.errors.InterruptedRunError as error:
            print("stopped:", error, flush=True)
"""


def start_script(tmp_path) -> tuple[subprocess.Popen[str], list[int]]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root / "tests")},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("pids"), line
    return process, [int(pid) for pid in line.split()[1:]]


def wait_until_gone(pids: list[int], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_ctrl_c_stops_cleanly_and_keeps_the_last_version(tmp_path):
    process, pids = start_script(tmp_path)
    process.send_signal(signal.SIGINT)
    try:
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "stopped: [CM-512]" in out
    assert process.returncode == 0
    assert wait_until_gone(pids)
    assert cm.load_checkpoint(tmp_path / "run" / "checkpoint").version >= 2


def test_agents_die_with_a_parent_that_is_killed(tmp_path):
    process, pids = start_script(tmp_path)
    assert all(map(is_alive, pids))
    process.kill()
    process.communicate(timeout=10)
    assert wait_until_gone(pids)


def test_an_agent_has_neither_flax_optax_pulp_nor_the_users_module():
    code = (
        "import sys, crowdmesh_jax.agent.serving, crowdmesh_jax.agent.__main__\n"
        "bad = {'flax', 'optax', 'pulp', 'tests', 'crowdmesh_jax.model', 'crowdmesh_jax.export'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
