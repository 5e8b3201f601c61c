"""From chains to a result: ranks candidates, checks the winner, says why devices are left out.

The same for every solver. It knows no search but the small one behind "best plan found with it".
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from ...core import predict
from ...errors import InfeasibleError
from ..check import check_plan
from ..problem import PartitionResult
from ..units import format_seconds
from .search import better, improve, neighbours, single_chains
from .tables import SLACK, Chain, Tables


def lower_ids(tables: Tables, chain: Chain) -> Chain:
    """Lets devices change places while that costs nothing and brings lower ids forward."""
    best, best_cost = chain, tables.cost_s(chain)
    improved = True
    while improved:
        improved = False
        cuts = [(segment.device, segment.end) for segment in best]
        used = {device for device, _ in cuts}
        for index, (device, end) in enumerate(cuts):
            for other in range(device):
                swapped = list(cuts)
                swapped[index] = (other, end)
                if other in used:
                    place = next(i for i, (d, _) in enumerate(cuts) if d == other)
                    if place < index:
                        continue
                    swapped[place] = (device, cuts[place][1])
                made = tables.chain(swapped)
                if made is None:
                    continue
                cost = tables.cost_s(made)
                if cost <= best_cost * (1 + SLACK) and tables.rank(made) < tables.rank(best):
                    best, best_cost, improved = made, min(cost, best_cost), True
                    break
            if improved:
                break
    return best


def finish(
    tables: Tables,
    chains: Sequence[Chain],
    *,
    optimal: bool,
    gap: float | None,
    solver: str,
    started_s: float,
    most: int = 24,
    polish: bool = True,
    keep_order: bool = False,
    end_s: float = math.inf,
) -> PartitionResult:
    """Picks the best chain by the problem's objective and makes it a result.

    Where the closed form is that of another schedule, the exact timeline ranks whatever the
    objective, and nothing is claimed to be proven; nor is it where cuts share the air of a cell,
    which the solvers' bounds do not see.

    Args:
        chains: Candidates, at least one.
        started_s: `time.monotonic()` when the solver began.
        most: How many of the cheapest by closed form are compared by `evaluate`.
        polish: Under "evaluate", whether small moves may improve the winner.
        keep_order: Whether equal devices stay where the solver put them.
        end_s: `time.monotonic()` after which candidates are no longer compared.

    Raises:
        InvalidPlanError: The winner breaks the problem: a bug of the solver.
        InfeasibleError: The problem's schedule keeps more in flight than memory holds, on every
            candidate.
    """
    problem = tables.problem
    # Swaps keep the closed form but may change the timeline, so both stay in the running.
    swapped = [] if keep_order else [lower_ids(tables, chain) for chain in chains]
    distinct = {tables.rank(chain): chain for chain in [*chains, *swapped]}
    ranked = sorted(distinct.values(), key=lambda c: (tables.cost_s(c), tables.rank(c)))
    winner = ranked[0]
    # Nearly equal costs are equal: the lower device ids win.
    for chain in ranked[1:]:
        if better(tables, tables.cost_s(chain), chain, tables.cost_s(winner), winner):
            winner = chain
    if problem.objective == "evaluate" or tables.stands_in:
        best_s = tables.evaluate_s(winner)
        for chain in ranked[:most]:
            if time.monotonic() > end_s:
                break
            step_s = tables.evaluate_s(chain)
            if better(tables, step_s, chain, best_s, winner):
                winner, best_s = chain, step_s
        if polish and time.monotonic() <= end_s:
            winner, best_s = improve(tables, winner, tables.evaluate_s, moves=4)
        if best_s == math.inf:
            singles = [(tables.evaluate_s(chain), chain) for chain in single_chains(tables)]
            best_s, winner = min(singles, key=lambda pair: pair[0], default=(math.inf, winner))
        if best_s == math.inf:
            raise InfeasibleError(
                f"schedule {problem.schedule!r} keeps more in flight than memory holds, on each"
                f" plan that {solver!r} found for {tables.schedule!r}\n"
                f"  try      schedule={tables.schedule!r}, recompute='auto', or fewer stages"
            )
    if tables.stands_in or tables.shares_air:
        optimal, gap = False, None
    plan = tables.plan(winner)
    check_plan(problem, plan)
    return PartitionResult(
        plan=plan,
        predicted=predict(
            problem.profile, problem.crowd, plan, compile_peak_bytes=problem.compile_peak_bytes
        ),
        problem=problem,
        optimal=optimal,
        gap=gap,
        solver=solver,
        left_out=left_out(tables, winner, end_s),
        solve_s=time.monotonic() - started_s,
    )


def left_out(tables: Tables, chain: Chain, end_s: float = math.inf) -> dict[str, str]:
    """Why each device of the crowd that has no layers has none.

    Args:
        end_s: `time.monotonic()` after which plans with it are no longer looked for.
    """
    problem, reasons = tables.problem, {}
    used = {tables.devices[segment.device] for segment in chain}
    for device in sorted(device.id for device in problem.crowd.devices):
        if device in used:
            continue
        if device not in tables.devices:
            reasons[device] = "not allowed"
            continue
        index = tables.devices.index(device)
        if not any(segment.device == index for segment in tables.segments):
            reasons[device] = "cannot hold any layer that it may run"
            continue
        if time.monotonic() > end_s:
            reasons[device] = "no time was left to look for plans with it"
            continue
        step_s = _best_with(tables, chain, index)
        reasons[device] = (
            "no plan found with it"
            if step_s == math.inf
            else f"best plan found with it: {format_seconds(step_s)}"
        )
    return reasons


def _best_with(tables: Tables, chain: Chain, device: int) -> float:
    """Step time of the best plan that small moves find with the device in it."""

    def cost(candidate: Chain) -> float:
        if all(segment.device != device for segment in candidate):
            return math.inf
        return tables.cost_s(candidate)

    starts = sorted(
        (c for c in neighbours(tables, chain) if cost(c) < math.inf),
        key=lambda c: (cost(c), tables.rank(c)),
    )
    if not starts:
        return math.inf
    best, _ = improve(tables, starts[0], cost, moves=20)
    return tables.evaluate_s(best)
