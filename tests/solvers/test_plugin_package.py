"""A solver in a package of its own is found by its entry point, once it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "examples" / "plugin_solver"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
CLI = [sys.executable, "-m", "crowdmesh_jax.cli"]


def run(*command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *([before] if before else [])])
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.system
@pytest.mark.slow
def test_an_installed_solver_is_listed_and_plans(tmp_path):
    site = tmp_path / "site"
    installed = run(*PIP, "--no-deps", "--target", str(site), str(PACKAGE))
    assert installed.returncode == 0, installed.stderr[-2000:]
    assert "halves" not in json.loads(run(*CLI, "solvers", "--json").stdout)["solvers"]
    listed = json.loads(run(*CLI, "solvers", "--json", path=site).stdout)["solvers"]
    assert listed["halves"].startswith("from crowdmesh-solver-halves")
    command = [*CLI, "plan", "--speeds", "1,0.8,0.2", "--json", "--solver"]
    planned = run(*command, "halves", path=site)
    assert planned.returncode == 0, planned.stderr[-2000:]
    answer = json.loads(planned.stdout)
    assert [stage["device"] for stage in answer["plan"]["stages"]] == ["device-0", "device-1"]
    assert answer["solver"] == "halves"
    grouped = run(
        *CLI, "coalitions", "--solver", "pairs", "--speeds", "1,0.5,0.25,0.2,0.1", "--json",
        path=site,
    )  # fmt: skip
    assert grouped.returncode == 0, grouped.stderr[-2000:]
    assert sorted(json.loads(grouped.stdout)["structure"]["coalitions"]) == [
        ["device-0", "device-4"], ["device-1", "device-3"], ["device-2"],
    ]  # fmt: skip
    without = run(*CLI, "coalitions", "--solver", "pairs")
    assert "no coalition solver 'pairs'" in without.stderr
    without = run(*command, "halves")
    assert without.returncode != 0
    assert "no solver 'halves'" in without.stderr
