"""Solvers: who runs which layers. PuLP is imported when a program is first solved, not before."""

from .backends import available_backends
from .check import check_plan, plan_faults
from .coalition import (
    CoalitionProblem,
    CoalitionResult,
    HedonicSolver,
    StabilityPrice,
    StabilityPrices,
    coalition_solvers,
    form_coalitions,
    rate_structure,
    stability_prices,
)
from .compare import Compared, compare_solvers
from .explain import explain
from .joint import Choice, PlanChoice, plan
from .partition import (
    EvenSolver,
    ExhaustiveSolver,
    IlpSolver,
    SingleBestSolver,
    solve_exhaustive,
    solve_ilp,
)
from .problem import PartitionProblem, PartitionResult, PartitionSolver
from .registry import make_solver, partition, solve, solvers

__all__ = [
    "Choice",
    "CoalitionProblem",
    "CoalitionResult",
    "Compared",
    "EvenSolver",
    "ExhaustiveSolver",
    "HedonicSolver",
    "IlpSolver",
    "PartitionProblem",
    "PartitionResult",
    "PartitionSolver",
    "PlanChoice",
    "SingleBestSolver",
    "StabilityPrice",
    "StabilityPrices",
    "available_backends",
    "check_plan",
    "coalition_solvers",
    "compare_solvers",
    "explain",
    "form_coalitions",
    "make_solver",
    "partition",
    "plan",
    "plan_faults",
    "rate_structure",
    "solve",
    "solve_exhaustive",
    "solve_ilp",
    "solvers",
    "stability_prices",
]
