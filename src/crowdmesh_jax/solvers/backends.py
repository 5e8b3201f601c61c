"""Mixed-integer programs through PuLP: which backend runs them, and what came back.

The one place that imports PuLP, of any version from 2.8 to 4, and the one place where its errors
become ours. It knows nothing of layers or devices.

- "highs": HiGHS through `highspy`, a dependency of this package, so always there.
- "cbc": the program that PuLP before version 4 carries, or any CBC that PuLP finds installed.
- Any PuLP solver object, used as it is; its own limits and messages apply.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import MissingExtraError, SolverError

LOG_TAIL_LINES = 12
TOLERANCE = 1e-9
"""Feasibility tolerance asked of the backends; programs are scaled to values around 1."""


@dataclass(slots=True)
class Mip:
    """Minimise `cost . x` subject to rows and bounds. Columns are numbered as they are added."""

    costs: list[float] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)
    binary: list[bool] = field(default_factory=list)
    rows: list[tuple[list[tuple[int, float]], Literal["<=", "=="], float]] = field(
        default_factory=list
    )

    def column(
        self, cost: float = 0.0, low: float = 0.0, high: float = 1.0, *, binary: bool = False
    ) -> int:
        """Adds a variable; returns its number."""
        self.costs.append(cost)
        self.bounds.append((low, high))
        self.binary.append(binary)
        return len(self.costs) - 1

    def row(self, terms: list[tuple[int, float]], sense: Literal["<=", "=="], bound: float) -> None:
        """Adds `sum of factor * column  sense  bound`."""
        self.rows.append((terms, sense, bound))


@dataclass(frozen=True, slots=True, kw_only=True)
class MipOutcome:
    """What a backend said."""

    status: Literal["optimal", "feasible", "infeasible", "limit"]
    """"feasible": a solution, stopped before it was proven; "limit": stopped with none."""
    values: tuple[float, ...] = ()
    """One per column, where there is a solution."""


def _pulp() -> Any:
    try:
        return importlib.import_module("pulp")
    except ImportError as exc:
        raise MissingExtraError(
            "the partition ILP needs PuLP, which is not installed\n"
            "  try      pip install pulp highspy, or a solver that needs none: 'even'"
        ) from exc


def _cbc_path(pulp: Any) -> str | None:
    """The CBC program that PuLP carries or finds; None where there is none."""
    carried = getattr(pulp, "PULP_CBC_CMD", None)
    paths = [getattr(carried, "pulp_cbc_path", None), None]
    for path in paths if carried is not None else paths[1:]:
        solver = pulp.COIN_CMD(path=path, msg=False)
        if solver.available():
            return solver.path
    return None


def available_backends() -> tuple[str, ...]:
    """Names of the backends that would run here, the preferred one first."""
    pulp = _pulp()
    found = []
    if pulp.HiGHS(msg=False).available():
        found.append("highs")
    if _cbc_path(pulp):
        found.append("cbc")
    return tuple(found)


def _make(pulp: Any, backend: str, time_limit_s: float | None, log: Path) -> Any:
    if backend == "highs":
        if not pulp.HiGHS(msg=False).available():
            raise MissingExtraError(
                "backend 'highs' needs highspy, which is not installed\n"
                "  try      pip install highspy"
            )
        _swallow_highs_banner()
        # Not `threads=1`: HiGHS refuses it where the process has used more threads before.
        return pulp.HiGHS(
            msg=False,
            timeLimit=time_limit_s,
            gapRel=0.0,
            gapAbs=TOLERANCE,
            parallel="off",
            primal_feasibility_tolerance=TOLERANCE,
            mip_feasibility_tolerance=TOLERANCE,
            log_to_console=False,
            output_flag=True,  # into the file alone
            log_file=str(log),
        )
    if backend == "cbc":
        path = _cbc_path(pulp)
        if path is None:
            raise MissingExtraError(
                f"backend 'cbc' needs a CBC program, and PuLP {pulp.__version__} carries none\n"
                "  try      backend 'highs', or pip install 'pulp[cbc]'"
            )
        # COIN_CMD, since PuLP's own PULP_CBC_CMD warns that it will go.
        return pulp.COIN_CMD(
            path=path,
            msg=False,
            timeLimit=None if time_limit_s is None else max(1, math.ceil(time_limit_s)),
            gapRel=0.0,
            gapAbs=TOLERANCE,
            options=[f"primalT {TOLERANCE}", f"integerT {TOLERANCE}"],
            logPath=str(log),
        )
    known = ", ".join(repr(name) for name in ("highs", "cbc"))
    raise SolverError(f"unknown backend {backend!r}; known: {known}, or any PuLP solver object")


@functools.cache
def _swallow_highs_banner() -> None:
    """Makes the first `Highs` of this process, without its banner on standard output.

    HiGHS (seen in 1.16) greets once per process from its constructor, whatever its options, and
    would spoil a JSON answer. Standard output is held back meanwhile; what others wrote follows.
    """
    highspy = importlib.import_module("highspy")
    try:
        libc = ctypes.CDLL(None)
        sys.stdout.flush()
        libc.fflush(None)
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError, TypeError):
        return  # no such C library or no standard output: let it greet
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 1)
            try:
                highspy.Highs()
                libc.fflush(None)
            finally:
                os.dup2(kept, 1)
            held.seek(0)
            for line in held.readlines():
                if not line.startswith((b"Running HiGHS", b"Includes third-party", b"Copyright")):
                    os.write(1, line)
    finally:
        os.close(kept)


def backend_name(backend: object) -> str:
    """How results and errors call a backend."""
    return backend if isinstance(backend, str) else getattr(backend, "name", type(backend).__name__)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.strip()][-LOG_TAIL_LINES:]
    return "\n".join(f"  log      {line.rstrip()}" for line in kept) or "  log      (empty)"


def solve_mip(
    mip: Mip, *, backend: str | object = "highs", time_limit_s: float | None = None
) -> MipOutcome:
    """Solves a program to proven optimality, or as far as the limit lets it.

    Args:
        backend: "highs", "cbc", or a PuLP solver object (which keeps its own limits).
        time_limit_s: Wall seconds; CBC rounds up to whole ones.

    Raises:
        SolverError: The backend failed or answered nonsense; carries the end of its log.
        MissingExtraError: The backend is not installed.
    """
    pulp = _pulp()
    with tempfile.TemporaryDirectory(prefix="crowdmesh-mip-") as folder:
        log = Path(folder) / "log.txt"
        solver = _make(pulp, backend, time_limit_s, log) if isinstance(backend, str) else backend
        problem, variables = _build(pulp, mip)
        started_s = time.monotonic()
        try:
            answer = problem.solve(solver)
        except Exception as exc:  # PuLP lets through whatever its backends raise
            raise SolverError(
                f"backend {backend_name(backend)!r} failed on {len(mip.costs)} variables,"
                f" {len(mip.rows)} rows: {exc}\n{_tail(log)}\n"
                "  try      another backend: IlpSolver(backend='highs' or 'cbc')"
            ) from exc
        elapsed_s = time.monotonic() - started_s
        status = _status(pulp, problem, answer)
        if status == "unknown":
            own_limit = None if isinstance(backend, str) else getattr(backend, "timeLimit", None)
            limit_s = time_limit_s if isinstance(backend, str) else own_limit
            if limit_s is not None and elapsed_s >= 0.8 * limit_s:
                return MipOutcome(status="limit")
            raise SolverError(
                f"backend {backend_name(backend)!r} stopped without an answer on"
                f" {len(mip.costs)} variables, {len(mip.rows)} rows\n{_tail(log)}\n"
                "  try      another backend: IlpSolver(backend='highs' or 'cbc')"
            )
        if status == "infeasible":
            return MipOutcome(status="infeasible")
        values = tuple(
            low if variable.value() is None else float(variable.value())
            for variable, (low, _) in zip(variables, mip.bounds, strict=True)
        )
        _check(mip, values, backend, log)
        return MipOutcome(status=status, values=values)


def _build(pulp: Any, mip: Mip) -> tuple[Any, list[Any]]:
    problem = pulp.LpProblem("partition", pulp.LpMinimize)
    # PuLP 4 makes variables by the problem, PuLP before 3.3 cannot.
    make = getattr(problem, "add_variable", pulp.LpVariable)
    variables = [
        make(f"x{index:06d}", low, high, pulp.LpInteger if binary else pulp.LpContinuous)
        for index, ((low, high), binary) in enumerate(zip(mip.bounds, mip.binary, strict=True))
    ]
    make_sum = getattr(pulp.LpAffineExpression, "from_list", pulp.LpAffineExpression)
    costs = [(variables[i], cost) for i, cost in enumerate(mip.costs)]
    problem += make_sum(costs)
    for terms, sense, bound in mip.rows:
        total = make_sum([(variables[index], factor) for index, factor in terms])
        problem += (total <= bound) if sense == "<=" else (total == bound)
    return problem, variables


def _status(
    pulp: Any, problem: Any, answer: Any
) -> Literal["optimal", "feasible", "infeasible", "unknown"]:
    stats = getattr(pulp, "LpSolveStats", None)
    if stats is not None and isinstance(answer, stats):  # PuLP 4
        if answer.has_solution:
            return "optimal" if answer.status == 1 else "feasible"
        if answer.status == -3:  # undefined: our programs are bounded, so the model may tell more
            ask = getattr(getattr(problem, "solverModel", None), "getModelStatus", None)
            said = str(ask()) if ask is not None else ""
            return "infeasible" if said.endswith("kUnboundedOrInfeasible") else "unknown"
        return "infeasible" if answer.status == -1 else "unknown"
    constants = pulp.constants
    if problem.sol_status == constants.LpSolutionOptimal:
        return "optimal"
    if problem.sol_status == constants.LpSolutionIntegerFeasible:
        return "feasible"
    return "infeasible" if problem.status == constants.LpStatusInfeasible else "unknown"


def _check(mip: Mip, values: Sequence[float], backend: str | object, log: Path) -> None:
    """Refuses a solution that breaks the program: solvers have bugs too."""
    slack = 1e-5
    for terms, sense, bound in mip.rows:
        total = math.fsum(factor * values[index] for index, factor in terms)
        size = slack * max(1.0, abs(bound), *(abs(factor) for _, factor in terms))
        if total > bound + size or (sense == "==" and total < bound - size):
            raise SolverError(
                f"backend {backend_name(backend)!r} returned a solution that breaks its own"
                f" program: {total:.9g} {sense} {bound:.9g} does not hold\n{_tail(log)}\n"
                "  try      another backend: IlpSolver(backend='highs' or 'cbc')"
            )
