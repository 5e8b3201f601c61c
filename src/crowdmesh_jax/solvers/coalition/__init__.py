"""Coalitions: who trains one copy of the model together, by a hedonic game and by baselines."""

from .hedonic import HedonicSolver
from .prices import StabilityPrice, StabilityPrices, stability_prices
from .problem import (
    Certificate,
    CoalitionProblem,
    CoalitionResult,
    CoalitionSolver,
    CoalitionValue,
    Deviation,
)
from .rating import rate_structure
from .registry import coalition_solvers, form_coalitions, make_coalition_solver

__all__ = [
    "Certificate",
    "CoalitionProblem",
    "CoalitionResult",
    "CoalitionSolver",
    "CoalitionValue",
    "Deviation",
    "HedonicSolver",
    "StabilityPrice",
    "StabilityPrices",
    "coalition_solvers",
    "form_coalitions",
    "make_coalition_solver",
    "rate_structure",
    "stability_prices",
]
