"""Solvers without a backend: an even split, the best single device, and the check on them all.

- `even`: equal layer counts over the devices in the order given. What people do by hand.
- `single_best`: the one device that trains the whole model fastest. No pipeline at all.
- `exhaustive`: every chain there is, for a handful of devices and layers; proves the others right.

Each answers the same `PartitionProblem` and passes the same checks as the ILP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...core import PipelinePlan
from ...errors import InfeasibleError, InvalidValueError
from ..check import plan_faults
from ..problem import PartitionProblem, PartitionResult
from .finish import finish
from .infeasible import infeasible
from .search import better, single_chains
from .tables import Chain, Tables


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenSolver:
    """Equal layer counts, in the order of `problem.devices` (or of the crowd).

    All allowed devices get a stage, at most one per layer and at most `max_stages`: the first ones
    then. It does not move cuts to make things fit; what does not fit is infeasible.
    """

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: The even split breaks a limit or a rule; says which.
        """
        started_s = time.monotonic()
        devices = problem.allowed_devices
        count = min(len(devices), problem.num_layers, problem.max_stages or len(devices))
        if count < max(1, problem.min_stages):
            raise infeasible(problem)
        plan = PipelinePlan.even(
            problem.num_layers,
            list(devices[:count]),
            microbatches=problem.microbatches,
            schedule=problem.schedule,
            recompute=problem.recompute == "always",
        )
        tables = Tables(problem)
        chain = tables.chain(
            [(tables.devices.index(stage.device), stage.last_layer + 1) for stage in plan.stages]
        )
        if chain is None:
            faults = plan_faults(problem, _most_frugal(problem, plan))
            raise InfeasibleError(
                f"the even split over {count} devices does not fit\n"
                + "".join(f"  stage    {fault}\n" for fault in faults)
                + '  try      solver "ilp", which moves cuts to where they fit'
            )
        return finish(
            tables,
            [chain],
            optimal=False,
            gap=None,
            solver="even",
            started_s=started_s,
            polish=False,
            keep_order=True,
        )


def _most_frugal(problem: PartitionProblem, plan: PipelinePlan) -> PipelinePlan:
    if problem.recompute != "auto":
        return plan
    return replace(plan, stages=tuple(replace(stage, recompute=True) for stage in plan.stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleBestSolver:
    """The whole model on the device that trains it fastest."""

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: No single device can hold the model.
        """
        started_s = time.monotonic()
        if problem.min_stages > 1:
            raise infeasible(problem)
        alone = replace(problem, max_stages=1)
        tables = Tables(alone)
        chains = single_chains(tables)
        if not chains:
            raise infeasible(alone, lambda relaxed: bool(single_chains(relaxed)))
        return finish(
            tables,
            chains,
            optimal=False,
            gap=None,
            solver="single_best",
            started_s=started_s,
            polish=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExhaustiveSolver:
    """Every chain there is, under the problem's objective. Ties go to the lower device ids."""

    max_chains: int = 300_000
    """Larger problems are refused, before anything is tried."""

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InvalidValueError: More than `max_chains` chains.
            InfeasibleError: No chain fits; says why.
        """
        started_s = time.monotonic()
        tables = Tables(problem)
        total = sum(
            math.comb(tables.num_layers - 1, count - 1) * math.perm(len(tables.devices), count)
            for count in range(1, tables.max_stages + 1)
        )
        if total > self.max_chains:
            raise InvalidValueError(
                f"{tables.num_layers} layers on {len(tables.devices)} devices make {total} chains,"
                f" more than max_chains {self.max_chains}; use solver 'ilp'"
            )
        by_evaluate = problem.objective == "evaluate"
        best: Chain | None = None
        best_s = math.inf
        for chain in all_chains(tables):
            cost_s = tables.evaluate_s(chain) if by_evaluate else tables.cost_s(chain)
            if better(tables, cost_s, chain, best_s, best):
                best, best_s = chain, cost_s
        if best is None:
            raise infeasible(problem, lambda relaxed: next(all_chains(relaxed), None) is not None)
        return finish(
            tables,
            [best],
            optimal=True,
            gap=0.0,
            solver="exhaustive",
            started_s=started_s,
            polish=False,
            keep_order=True,
        )


def all_chains(tables: Tables) -> Iterator[Chain]:
    """Every chain that keeps all rules and limits, in the order of device ids and cuts."""

    def extend(cuts: list[tuple[int, int]], first: int) -> Iterator[Chain]:
        if first == tables.num_layers:
            chain = tables.chain(cuts)
            if chain is not None:
                yield chain
            return
        if len(cuts) == tables.max_stages:
            return
        taken = {device for device, _ in cuts}
        for device in range(len(tables.devices)):
            if device not in taken:
                for end in range(first + 1, tables.num_layers + 1):
                    yield from extend([*cuts, (device, end)], end)

    yield from extend([], 0)


def solve_exhaustive(problem: PartitionProblem) -> PartitionResult:
    """`ExhaustiveSolver` as a function."""
    return ExhaustiveSolver().solve(problem)
