"""Coalition solvers by name: the built-in ones and those that other packages bring.

A package adds one through the entry point group `crowdmesh_jax.coalition_solvers`: a name and a
class (or function) that returns an object with `form(problem)`. It knows no problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from ...core import Crowd, ModelProfile
from ...core.plugins import PlugIns
from ...errors import SolverError, UnknownSolverError
from . import baselines
from .hedonic import HedonicSolver
from .problem import CoalitionProblem, CoalitionResult, CoalitionSolver

SOLVERS = PlugIns(
    group="crowdmesh_jax.coalition_solvers",
    kind="coalition solver",
    built_in=MappingProxyType(
        {
            "hedonic": (
                HedonicSolver,
                "devices switch while that lowers the potential; Nash-stable",
            ),
            "grand": (
                baselines.GrandSolver,
                "all together, or as few coalitions as max_size allows",
            ),
            "singletons": (
                baselines.SingletonsSolver,
                "each device alone, joined where it must be",
            ),
            "random": (baselines.RandomSolver, "the best of several random structures"),
            "kmeans": (baselines.KMeansSolver, "near in place and speed"),
            "greedy": (
                baselines.GreedySolver,
                "fastest first, each where the potential rises least",
            ),
            "data_only": (baselines.DataOnlySolver, "labels as even as can be, nothing else"),
            "latency_and_data": (
                baselines.LatencyAndDataSolver,
                "near in latency, then even in labels (after Eco-FL)",
            ),
            "exhaustive": (baselines.ExhaustiveCoalitions, "every structure; ten devices at most"),
        }
    ),
    method="form(problem)",
    unknown=UnknownSolverError,
    unfit=SolverError,
)


def coalition_solvers() -> Mapping[str, str]:
    """Name -> one line on it, built-in solvers first, then those of other packages."""
    return SOLVERS.listed()


def make_coalition_solver(solver: str | CoalitionSolver, **options: Any) -> CoalitionSolver:
    """The solver of that name, or the object itself.

    Raises:
        UnknownSolverError: No solver of that name; names those known.
        InvalidValueError: An option that the solver does not take.
        MissingExtraError: The package that brings it cannot be imported.
        SolverError: It has no `form`.
    """
    return cast(CoalitionSolver, SOLVERS.make(solver, **options))


def form_coalitions(
    profile: ModelProfile,
    crowd: Crowd,
    *,
    solver: str | CoalitionSolver = "hedonic",
    **options: Any,
) -> CoalitionResult:
    """Groups devices into coalitions, each of which trains one copy of the model.

    Args:
        profile: The model's costs for one job.
        crowd: Devices with their data (`label_counts`), links and hazards of leaving.
        solver: A name of `coalition_solvers()`, or an object with `form(problem)`.
        options: Fields of `CoalitionProblem` (kappa, power, max_size, value, ...); the others go
            to the solver (preference, starts, seed, ...).

    Returns:
        The structure with each coalition's rating, and a certificate of stability.

    Raises:
        InvalidCrowdError: No device holds data, and amounts count by rows.
        InfeasibleError: No coalition can hold the model.
        UnknownSolverError: No solver of that name.
    """
    names = {item.name for item in dataclasses.fields(CoalitionProblem)} - {"profile", "crowd"}
    asked = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    made = make_coalition_solver(solver, **others)
    result = made.form(CoalitionProblem(profile=profile, crowd=crowd, **asked))
    result.structure.check(crowd)
    return result
