"""Partition solvers by name: the built-in ones and those that other packages bring.

A package adds a solver through the entry point group `crowdmesh_jax.partition_solvers`: a name and
a class (or function) that returns an object with `solve(problem)`. Nothing is loaded before it is
asked for. It knows no problem.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from ..core import Crowd, ModelProfile, PipelinePlan
from ..core.plugins import PlugIns
from ..errors import SolverError, UnknownSolverError
from .check import plan_faults
from .problem import PartitionProblem, PartitionResult, PartitionSolver
from .wire import decide_wire


def _ilp(**options: Any) -> PartitionSolver:
    from .partition.ilp import IlpSolver

    return IlpSolver(**options)


def _auto(**options: Any) -> PartitionSolver:
    from .partition.auto import AutoSolver

    return AutoSolver(**options)


def _dp(**options: Any) -> PartitionSolver:
    from .partition.dp import DpSolver

    return DpSolver(**options)


def _eager(**options: Any) -> PartitionSolver:
    from .partition.eager import EagerSolver

    return EagerSolver(**options)


def _hybrid(**options: Any) -> PartitionSolver:
    from .partition.hybrid import HybridSolver

    return HybridSolver(**options)


def _even(**options: Any) -> PartitionSolver:
    from .partition.simple import EvenSolver

    return EvenSolver(**options)


def _exhaustive(**options: Any) -> PartitionSolver:
    from .partition.simple import ExhaustiveSolver

    return ExhaustiveSolver(**options)


def _single_best(**options: Any) -> PartitionSolver:
    from .partition.simple import SingleBestSolver

    return SingleBestSolver(**options)


def _by_params(**options: Any) -> PartitionSolver:
    from .partition.baselines.by_params import ByParamsSolver

    return ByParamsSolver(**options)


def _cloud_device(**options: Any) -> PartitionSolver:
    from .partition.baselines.cloud_device import CloudDeviceSolver

    return CloudDeviceSolver(**options)


def _pipedream(**options: Any) -> PartitionSolver:
    from .partition.baselines.pipedream import PipeDreamSolver

    return PipeDreamSolver(**options)


def _ftpipehd(**options: Any) -> PartitionSolver:
    from .partition.baselines.ftpipehd import FTPipeHDSolver

    return FTPipeHDSolver(**options)


def _dapple(**options: Any) -> PartitionSolver:
    from .partition.baselines.dapple import DappleSolver

    return DappleSolver(**options)


def _asteroid(**options: Any) -> PartitionSolver:
    from .partition.baselines.asteroid import AsteroidSolver

    return AsteroidSolver(**options)


SOLVERS = PlugIns(
    group="crowdmesh_jax.partition_solvers",
    kind="solver",
    built_in=MappingProxyType(
        {
            "auto": (_auto, "the best plan found in budget_s (2 s); options budget_s, also"),
            "ilp": (
                _ilp,
                "shortest step time by integer programming; options backend, time_limit_s",
            ),
            "dp": (_dp, "the same optimum by labels over device sets; up to 12 devices"),
            "eager": (_eager, "cut, device order and microbatches in flight together; no proof"),
            "hybrid": (_hybrid, "as auto, and devices may share a stage (share=True); not run yet"),
            "even": (_even, "equal layer counts over the devices in the order given"),
            "exhaustive": (_exhaustive, "tries every plan; a few layers and devices only"),
            "single_best": (_single_best, "the whole model on the device that trains it fastest"),
            "by_params": (
                _by_params,
                "baseline: equal parameter bytes over the devices in the order given",
            ),
            "cloud_device": (
                _cloud_device,
                "baseline: front on a device, rest on the fastest; options device, cloud",
            ),
            "pipedream": (
                _pipedream,
                "baseline: PipeDream's planner, as if all were the mean device",
            ),
            "ftpipehd": (
                _ftpipehd,
                "baseline: FTPipeHD's planner, one measured capacity per device",
            ),
            "dapple": (
                _dapple,
                "baseline: DAPPLE's planner, latency around a pivot; option policy",
            ),
            "asteroid": (
                _asteroid,
                "baseline: Asteroid's planner, groups by memory; option all_devices",
            ),
        }
    ),
    method="solve(problem)",
    unknown=UnknownSolverError,
    unfit=SolverError,
)


def solvers() -> Mapping[str, str]:
    """Name -> one line on it, built-in solvers first, then those of other packages."""
    return SOLVERS.listed()


def make_solver(solver: str | PartitionSolver, **options: Any) -> PartitionSolver:
    """The solver of that name, or the object itself.

    Args:
        solver: A name of `solvers()`, or an object with `solve(problem)`.
        options: For the solver's constructor; only with a name.

    Raises:
        UnknownSolverError: No solver of that name; names those known.
        InvalidValueError: An option that the solver does not take.
        MissingExtraError: The package that brings it cannot be imported.
        SolverError: It has no `solve`.
    """
    return cast(PartitionSolver, SOLVERS.make(solver, **options))


def solve(
    problem: PartitionProblem, *, solver: str | PartitionSolver = "ilp", **options: Any
) -> PartitionResult:
    """Answers a partition problem.

    Args:
        solver: A name of `solvers()`, or an object with `solve(problem)`.
        options: For the solver, "ilp" say: `backend="cbc"`, `time_limit_s=2.0`.

    Returns:
        The plan, its prediction and what is proven. The plan is checked against the problem,
        whoever made it.

    Raises:
        UnknownSolverError: No solver of that name.
        InfeasibleError: No plan fits; says why.
        SolverError: The solver failed, or its plan breaks the problem.
    """
    started_s = time.monotonic()
    made = make_solver(solver, **options)
    result = decide_wire(problem, made.solve(problem))
    faults = plan_faults(problem, result.plan)
    if faults:
        name = solver if isinstance(solver, str) else type(solver).__name__
        raise SolverError(
            f"solver {name!r} returned a plan that breaks the problem after"
            f" {time.monotonic() - started_s:.2f} s: {'; '.join(faults)}"
        )
    return result


def partition(
    profile: ModelProfile,
    crowd: Crowd,
    *,
    solver: str | PartitionSolver = "ilp",
    **options: Any,
) -> PipelinePlan:
    """Chooses who runs which layers.

    Args:
        profile: The model's costs for one job.
        crowd: Devices and links.
        solver: A name of `solvers()`, or an object with `solve(problem)`.
        options: Fields of `PartitionProblem` (schedule, pins, bans, devices, max_stages,
            recompute, ...); the others go to the solver (backend, time_limit_s).

    Returns:
        The plan. `solve` also returns what is predicted and proven.

    Raises:
        As `solve`.
    """
    names = {item.name for item in dataclasses.fields(PartitionProblem)} - {"profile", "crowd"}
    asked = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    problem = PartitionProblem(profile=profile, crowd=crowd, **asked)
    return solve(problem, solver=solver, **others).plan
