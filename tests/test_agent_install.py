"""requirements-agent.txt is enough: agents of a bare environment train a Flax model."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import optax
import pytest

import crowdmesh_jax as cm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def agent_python(tmp_path_factory) -> str:
    """Python of an environment made as the file's comment says, with this source."""
    folder = tmp_path_factory.mktemp("agent")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "-r", str(ROOT / "requirements-agent.txt")], check=True)
    # The wheel's build tool comes from its own, isolated environment.
    subprocess.run([*pip, str(ROOT)], check=True)
    return python


@pytest.mark.long
def test_the_environment_holds_only_what_agents_need(agent_python):
    listed = subprocess.run(
        [agent_python, "-m", "pip", "list", "--format", "json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "crowdmesh-jax" in names
    assert not names & {"flax", "optax", "pulp", "highspy", "rich", "tomli-w"}
    code = "import crowdmesh_jax as cm\ntry: cm.zoo\nexcept cm.CrowdMeshError as exc: print(exc)"
    told = subprocess.run([agent_python, "-c", code], capture_output=True, text=True, check=True)
    assert "[CM-601]" in told.stdout
    assert "pip install crowdmesh-jax" in told.stdout


@pytest.mark.long
def test_its_agents_train_a_flax_model(agent_python, tmp_path, monkeypatch):
    images, labels = cm.digits()
    data = cm.ArraySource(images, labels, batch_size=16)
    job = cm.TrainingJob(
        cm.zoo.lenet(), cm.losses.softmax_cross_entropy, optax.adam(1e-3), 16, microbatches=4
    )
    crowd = cm.Crowd.local((1.0, 1.0))
    plan = cm.PipelinePlan.even(7, ["device-0", "device-1"], microbatches=4)
    expected = cm.reference(job, data, steps=3, plan=plan)
    monkeypatch.setattr(sys, "executable", agent_python)  # what the launcher starts agents with
    run = cm.train(job, crowd, data, plan=plan, steps=3, runs_dir=tmp_path, measure=False)
    np.testing.assert_array_equal(run.losses, np.asarray(expected.losses, np.float32))
