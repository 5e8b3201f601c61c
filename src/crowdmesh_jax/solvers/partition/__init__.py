"""Partition solvers: who runs which layers of one model."""

from .ilp import IlpSolver, solve_ilp
from .simple import EvenSolver, ExhaustiveSolver, SingleBestSolver, solve_exhaustive

__all__ = [
    "EvenSolver",
    "ExhaustiveSolver",
    "IlpSolver",
    "SingleBestSolver",
    "solve_exhaustive",
    "solve_ilp",
]
