"""One problem, every solver: what each makes of it, side by side. Knows no search."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import CrowdMeshError
from .problem import PartitionProblem, PartitionResult
from .registry import solve, solvers


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One solver's answer."""

    solver: str
    schedule: str
    """The problem's; solver "eager" answers for schedule "eager" alone."""
    solve_s: float
    result: PartitionResult | None
    """None where it found no plan, or refused the problem."""
    refusal: str = ""
    """Then: the first line of what it said."""

    @property
    def step_s(self) -> float:
        """By the exact timeline; infinite without a plan."""
        return float("inf") if self.result is None else self.result.predicted.step_s


def compare_solvers(
    problem: PartitionProblem, names: Sequence[str] | None = None
) -> Iterator[Compared]:
    """Asks each solver in turn, with its own defaults; yields as they answer.

    All get the same profile, crowd and rules. "hybrid" may share stages between devices, which is
    what it is for; others do only where the problem says so.

    Args:
        names: None: all of `solvers()`.

    Raises:
        UnknownSolverError: No solver of one of the names.
    """
    for name in solvers() if names is None else names:
        asked = problem
        if name == "eager":
            asked = replace(asked, schedule="eager")
        if name == "hybrid":
            asked = replace(asked, share=True)
        started_s = time.monotonic()
        result, refusal = None, ""
        try:
            result = solve(asked, solver=name)
        except CrowdMeshError as exc:
            if name not in solvers():
                raise
            refusal = exc.message.splitlines()[0]
        yield Compared(
            solver=name,
            schedule=asked.schedule,
            solve_s=time.monotonic() - started_s,
            result=result,
            refusal=refusal,
        )


__all__ = ["Compared", "compare_solvers"]
