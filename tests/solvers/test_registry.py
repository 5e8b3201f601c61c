"""Solvers by name: ours, those of other packages, and what goes wrong with either."""

from __future__ import annotations

import subprocess
import sys

import pytest
from partition_problems import chain_profile

from crowdmesh_jax.core import Crowd, PipelinePlan
from crowdmesh_jax.errors import (
    InvalidCrowdError,
    InvalidValueError,
    MissingExtraError,
    ScheduleError,
    SolverError,
    UnknownSolverError,
)
from crowdmesh_jax.solvers import (
    EvenSolver,
    IlpSolver,
    PartitionProblem,
    PartitionSolver,
    make_solver,
    partition,
    solve,
    solvers,
)

CROWD = Crowd.local((1.0, 0.5))
PROFILE = chain_profile(6)


def install(tmp_path, monkeypatch, *, value: str, source: str) -> None:
    """A real distribution on the path that brings a solver called "theirs"."""
    (tmp_path / "their_solver.py").write_text(source)
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[crowdmesh_jax.partition_solvers]\ntheirs = {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_solver", raising=False)


def test_built_in_solvers_are_listed_with_a_line_each():
    assert {"ilp", "even", "exhaustive", "single_best"} <= set(solvers())
    assert all(solvers().values())


@pytest.mark.parametrize("name", ["ilp", "even", "exhaustive", "single_best"])
def test_every_built_in_solver_answers(name):
    assert isinstance(make_solver(name), PartitionSolver)
    assert isinstance(partition(PROFILE, CROWD, solver=name), PipelinePlan)


def test_an_unknown_solver_is_told_with_the_known_ones_and_the_nearest():
    with pytest.raises(UnknownSolverError, match=r"CM-202.*'iilp'.*mean 'ilp'(.|\n)*exhaustive"):
        partition(PROFILE, CROWD, solver="iilp")


def test_another_package_brings_a_solver(tmp_path, monkeypatch):
    source = (
        "from crowdmesh_jax.solvers import EvenSolver\n"
        "class Theirs:\n"
        "    def solve(self, problem):\n"
        "        return EvenSolver().solve(problem)\n"
    )
    install(tmp_path, monkeypatch, value="their_solver:Theirs", source=source)
    assert "their-package" in solvers()["theirs"]
    assert partition(PROFILE, CROWD, solver="theirs") == partition(PROFILE, CROWD, solver="even")


def test_a_solver_whose_library_is_missing_names_its_package(tmp_path, monkeypatch):
    source = "import a_library_that_is_not_installed\n"
    install(tmp_path, monkeypatch, value="their_solver:Theirs", source=source)
    with pytest.raises(MissingExtraError, match=r"CM-601.*'theirs'(.|\n)*pip install their-pack"):
        make_solver("theirs")


def test_something_without_solve_is_no_solver(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, value="their_solver:dict", source="dict = dict\n")
    with pytest.raises(SolverError, match=r"CM-204.*no solve"):
        make_solver("theirs")


def test_a_solver_object_is_used_as_it_is():
    mine = EvenSolver()
    assert make_solver(mine) is mine
    assert solve(PartitionProblem(profile=PROFILE, crowd=CROWD), solver=mine).solver == "even"


def test_options_go_to_the_problem_or_to_the_solver():
    plan = partition(PROFILE, CROWD, max_stages=1, time_limit_s=5.0, backend="highs")
    assert len(plan.stages) == 1
    with pytest.raises(InvalidValueError, match=r"CM-101.*'even'.*colour"):
        partition(PROFILE, CROWD, solver="even", colour="red")
    with pytest.raises(InvalidValueError, match=r"CM-101.*time_limit_s"):
        partition(PROFILE, CROWD, solver=IlpSolver(), time_limit_s=5.0)


class Careless:
    """Answers every problem with the plan of another one."""

    def solve(self, problem):
        return EvenSolver().solve(PartitionProblem(profile=PROFILE, crowd=CROWD))


def test_a_plan_that_breaks_the_problem_does_not_leave():
    problem = PartitionProblem(profile=PROFILE, crowd=CROWD, bans=["device-1"])
    with pytest.raises(SolverError, match=r"CM-204.*'Careless'.*may not be used"):
        solve(problem, solver=Careless())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pins": {"block9": "device-0"}}, InvalidValueError, "no layer 'block9'.*block0"),
        ({"pins": {6: "device-0"}}, InvalidValueError, r"layer 6 is outside 0\.\.5"),
        ({"pins": {0: "pi-9"}}, InvalidCrowdError, "no device 'pi-9'"),
        ({"pins": {0: "device-0", "block0": "device-1"}}, InvalidValueError, "pinned to"),
        ({"bans": ["pi-9"]}, InvalidCrowdError, "no device 'pi-9'"),
        ({"devices": []}, InvalidValueError, "at least one device"),
        ({"devices": ["device-0", "device-0"]}, InvalidValueError, "must differ"),
        ({"recompute": "sometimes"}, InvalidValueError, "recompute"),
        ({"objective": "looks"}, InvalidValueError, "objective"),
        ({"schedule": "zigzag"}, ScheduleError, "zigzag"),
        ({"min_stages": 0}, InvalidValueError, "min_stages"),
        ({"min_stages": 2, "max_stages": 1}, InvalidValueError, "max_stages 1"),
    ],
)
def test_a_problem_refuses_what_it_cannot_mean(options, error, words):
    with pytest.raises(error, match=words):
        PartitionProblem(profile=PROFILE, crowd=CROWD, **options)


def test_importing_solvers_loads_no_pulp_and_no_jax():
    code = (
        "import sys, crowdmesh_jax.solvers\n"
        "bad = {'pulp', 'highspy', 'jax', 'flax', 'optax', 'grpc'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
