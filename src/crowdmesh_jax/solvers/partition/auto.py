"""The partition solver "auto": a good plan within a stated time, whatever the size.

- Schedule "eager": the search of solver `eager`, stopped in time.
- Others: local optima and single devices, then the dynamic program of solver `dp` where its tables
  are small enough; if it ends in time, the plan is proven. Else it runs over the most promising
  devices (`few`). The exact timeline ranks what was found.
- `also`: further solvers by name, baselines say; the best plan of all is returned, so none of them
  is better. They take the time that they take.

Problem, variables and sources: see those solvers. Work: bounded by `budget_s`; tables (O(D L^2))
and one pass of local moves are made in any case.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import InfeasibleError, InvalidValueError
from ..problem import PartitionProblem, PartitionResult
from .arrays import table_work
from .bounds import MOST_DEVICES
from .dp import Labels
from .eager import solve_by_depths
from .few import chains_of_few
from .finish import finish
from .infeasible import infeasible
from .search import good_chains, single_chains
from .tables import Tables

_SEARCH_SHARE = 0.75
"""Of the budget; the rest is for ranking, checks and who is left out."""
_SLACK, _CHAINS = 0.15, 48
"""Runners-up by the closed form that the exact timeline ranks: so much dearer, so many."""
_TABLE_WORK = 3e7
"""Steps of the dynamic program's tables that fit into a second or so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSolver:
    """Picks by size and schedule, as a `PartitionSolver`."""

    budget_s: float = 2.0
    """Wall seconds for everything but `also`."""
    also: Sequence[str] = ()
    """Solvers whose plans compete; one that finds no plan, or refuses the problem, is left out."""

    def __post_init__(self) -> None:
        if not self.budget_s > 0:
            raise InvalidValueError(f"budget_s must be > 0, got {self.budget_s}")
        if "auto" in self.also:
            raise InvalidValueError("also must not name 'auto' itself")

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            UnknownSolverError: `also` names one that is not there.
            InfeasibleError: No plan fits; says why.
        """
        from ..registry import make_solver

        started_s = time.monotonic()
        others = [make_solver(name) for name in self.also]
        failed: InfeasibleError | None = None
        found: list[PartitionResult] = []
        try:
            found.append(solve_without_sharing(problem, self.budget_s))
        except InfeasibleError as exc:
            failed = exc
        for other in others:
            try:
                found.append(other.solve(problem))
            except (InfeasibleError, InvalidValueError):
                continue
        if not found:
            assert failed is not None
            raise failed
        best = min(found, key=lambda result: result.predicted.step_s)
        name = "auto" if best is found[0] and failed is None else f"auto/{best.solver}"
        return replace(best, solver=name, solve_s=time.monotonic() - started_s)


def solve_without_sharing(problem: PartitionProblem, budget_s: float) -> PartitionResult:
    """The best plan found within a budget, one device a stage.

    Raises:
        InfeasibleError: No plan fits; says why.
    """
    now_s = time.monotonic()
    solve = solve_by_depths if problem.schedule == "eager" else _solve_by_chains
    return solve(problem, now_s + _SEARCH_SHARE * budget_s, now_s + budget_s)


def _solve_by_chains(problem: PartitionProblem, until_s: float, end_s: float) -> PartitionResult:
    started_s = time.monotonic()
    tables = Tables(problem)
    chains = [chain for _, chain in good_chains(tables)] + single_chains(tables)
    optimal, gap = False, None
    if len(tables.devices) <= MOST_DEVICES and (not chains or table_work(tables) <= _TABLE_WORK):
        search = Labels(tables, until_s if chains else end_s, chains)
        least_s = search.run()
        chains = search.chains
        if chains:
            gap = max(0.0, (search.best_s - least_s) / search.best_s) if search.best_s else 0.0
            optimal = gap == 0.0
        if optimal and problem.objective == "evaluate" and time.monotonic() < until_s:
            # The closed form is off by up to a fifth at few microbatches: its runners-up, too.
            more = Labels(tables, until_s, list(chains), slack=_SLACK, most=_CHAINS)
            more.run()
            chains = more.chains
    elif chains:
        chains = chains + chains_of_few(tables, chains, until_s, work=_TABLE_WORK)
    if not chains:
        raise infeasible(problem, lambda relaxed: bool(good_chains(relaxed)))
    return finish(
        tables,
        chains,
        optimal=optimal,
        gap=gap,
        solver="auto",
        started_s=started_s,
        end_s=end_s,
        most=_CHAINS,
    )
