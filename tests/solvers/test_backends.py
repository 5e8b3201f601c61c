"""Backends: chosen by name, any PuLP solver object, and what their failures look like."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pulp
import pytest
from partition_problems import chain_profile

from crowdmesh_jax.core import Crowd
from crowdmesh_jax.errors import MissingExtraError, SolverError
from crowdmesh_jax.solvers import IlpSolver, PartitionProblem, available_backends, solve_ilp
from crowdmesh_jax.solvers.backends import Mip, solve_mip

HAS_CBC = "cbc" in available_backends()


def knapsack(seed: int, count: int = 12) -> tuple[Mip, float]:
    """A random program, and its optimum by trying everything."""
    rng = random.Random(seed)
    weights = [rng.randint(1, 9) for _ in range(count)]
    values = [rng.randint(1, 9) for _ in range(count)]
    limit = sum(weights) // 2
    mip = Mip()
    columns = [mip.column(-float(value), binary=True) for value in values]
    mip.row([(c, float(w)) for c, w in zip(columns, weights, strict=True)], "<=", float(limit))
    mip.row([(columns[0], 1.0), (columns[1], 1.0)], "==", 1.0)
    best = 0.0
    for chosen in range(1 << count):
        taken = [index for index in range(count) if chosen >> index & 1]
        if sum(weights[i] for i in taken) <= limit and ((0 in taken) + (1 in taken)) == 1:
            best = min(best, -float(sum(values[i] for i in taken)))
    return mip, best


backends = pytest.mark.parametrize(
    "backend",
    [
        "highs",
        pytest.param(
            "cbc", marks=pytest.mark.skipif(not HAS_CBC, reason="this PuLP brings no CBC")
        ),
        pulp.HiGHS(msg=False),
    ],
)


@backends
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_backend_finds_the_optimum(backend, seed):
    mip, best = knapsack(seed)
    outcome = solve_mip(mip, backend=backend)
    assert outcome.status == "optimal"
    cost = sum(c * v for c, v in zip(mip.costs, outcome.values, strict=True))
    assert cost == pytest.approx(best)


@backends
def test_a_backend_says_infeasible(backend):
    mip = Mip()
    columns = [mip.column(1.0, binary=True) for _ in range(3)]
    mip.row([(column, 1.0) for column in columns], "==", 1.5)
    assert solve_mip(mip, backend=backend).status == "infeasible"


def test_highs_is_always_there():
    assert available_backends()[0] == "highs"


def test_any_pulp_solver_object_solves_a_problem():
    problem = PartitionProblem(profile=chain_profile(6), crowd=Crowd.local((1.0, 0.5)))
    mine = IlpSolver(backend=pulp.HiGHS(msg=False, timeLimit=30)).solve(problem)
    assert mine.plan == solve_ilp(problem).plan
    assert mine.solver == "ilp/HiGHS"


def test_an_unknown_backend_is_told_with_the_known_ones():
    with pytest.raises(SolverError, match=r"CM-204.*'cplex'.*'highs', 'cbc'"):
        solve_mip(knapsack(0)[0], backend="cplex")


def test_a_missing_cbc_names_the_extra(monkeypatch):
    from crowdmesh_jax.solvers import backends as module

    monkeypatch.setattr(module, "_cbc_path", lambda pulp: None)
    with pytest.raises(MissingExtraError, match=r"CM-601(.|\n)*pip install"):
        solve_mip(knapsack(0)[0], backend="cbc")


def test_a_crashing_program_becomes_our_error_with_the_end_of_its_log(tmp_path):
    crash = tmp_path / "cbc"
    crash.write_text("#!/bin/sh\nexit 3\n")
    crash.chmod(0o755)
    broken = pulp.COIN_CMD(path=str(crash), msg=False)
    with pytest.raises(SolverError, match=r"CM-204(.|\n)*failed(.|\n)*log") as caught:
        solve_mip(knapsack(0)[0], backend=broken)
    assert isinstance(caught.value.__cause__, pulp.PulpSolverError)


class Liar(pulp.HiGHS):
    """Claims an optimum that breaks the rows."""

    def actualSolve(self, lp, **kwargs):
        answer = super().actualSolve(lp, **kwargs)
        for variable in lp.variables():
            variable.varValue = 1.0
        return answer


def test_a_solution_that_breaks_the_program_is_refused():
    with pytest.raises(SolverError, match=r"CM-204.*breaks its own"):
        solve_mip(knapsack(0)[0], backend=Liar(msg=False))


class Mute(pulp.LpSolver):
    """Stops at once without an answer and without a limit."""

    def available(self):
        return True

    def actualSolve(self, lp, **kwargs):
        if hasattr(pulp, "LpSolveStats"):  # PuLP 4
            return pulp.LpSolveStats()
        lp.assignStatus(pulp.LpStatusNotSolved)
        return pulp.LpStatusNotSolved


def test_stopping_without_an_answer_is_an_error():
    with pytest.raises(SolverError, match=r"CM-204.*without an answer"):
        solve_mip(knapsack(0)[0], backend=Mute(msg=False))


def test_solving_prints_nothing():
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1])\n"
        "from partition_problems import chain_profile\n"
        "from crowdmesh_jax.core import Crowd\n"
        "from crowdmesh_jax.solvers import partition\n"
        "plan = partition(chain_profile(6), Crowd.local((1.0, 0.5)))\n"
        "print(json.dumps(list(plan.devices)))\n"
    )
    folder = __file__.rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, timeout=60
    )
    # the whole output is the answer
    assert json.loads(done.stdout) in (["device-0", "device-1"], ["device-1", "device-0"])
    assert done.stderr == ""
