"""Coalitions: who trains one copy of the model together, by a hedonic game and by baselines."""

from .hedonic import HedonicSolver
from .problem import (
    Certificate,
    CoalitionProblem,
    CoalitionResult,
    CoalitionSolver,
    CoalitionValue,
    Deviation,
)
from .registry import coalition_solvers, form_coalitions, make_coalition_solver

__all__ = [
    "Certificate",
    "CoalitionProblem",
    "CoalitionResult",
    "CoalitionSolver",
    "CoalitionValue",
    "Deviation",
    "HedonicSolver",
    "coalition_solvers",
    "form_coalitions",
    "make_coalition_solver",
]
