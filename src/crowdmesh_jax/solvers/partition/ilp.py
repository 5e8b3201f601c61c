"""The partition solver "ilp": cuts a chain of layers over unequal devices for the shortest step.

Four steps, each on the closed form R_0 + (M - 1) T:

1. `search`: a good chain within milliseconds.
2. `bounds`: the range of periods that could still pay is halved again and again; in each band a
   dynamic program bounds R_0 from below and yields a further good chain. Bands that cannot beat the
   best chain are dropped, and with them all segments and links that only they would use.
3. `program`: a mixed-integer program over what is left either finds the best chain or proves that
   there is none better than the one at hand.
4. `finish`: the good chains met on the way, which spread along the Pareto front of (R_0, T), are
   compared by the exact timeline.

What steps 1 and 2 found goes into step 3 as a cutoff, a row that allows only cheaper plans, and
not as a starting solution: what no cheaper plan would use is not in the program at all, so that
plan would be no solution of it, and "infeasible" is the proof. Nor could a start be handed over in
memory: PuLP (to 3.3) gives one to the HiGHS and CBC programs through files, and none to `highspy`.

It knows the order of steps and the clock.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field

from ...errors import InvalidValueError, SolverError
from ..backends import backend_name, solve_mip
from ..problem import PartitionProblem, PartitionResult
from .arrays import Costs
from .bounds import Bounds, bounds_at, surviving
from .finish import finish
from .infeasible import infeasible
from .program import Program
from .search import good_chains, improve, single_chains
from .tables import Chain, Tables

logger = logging.getLogger(__name__)

_BETTER = 1e-7
"""Relative gain below which a chain is not looked for; backends hold rows to 1e-9 of about 1."""
_MOST_BANDS = 40
_NARROW = 1e-3
"""Relative width below which a band of periods is not halved again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IlpSolver:
    """The ILP as a `PartitionSolver`."""

    backend: str | object = "highs"
    """"highs", "cbc", or a PuLP solver object (which keeps limits of its own)."""
    time_limit_s: float = 10.0
    """Wall seconds for everything; then the best plan so far, `optimal=False` and a gap."""
    presolve: bool = True
    """Steps 1 and 2; without them the program is the whole problem, for small ones and tests."""

    def __post_init__(self) -> None:
        if not self.time_limit_s > 0:
            raise InvalidValueError(f"time_limit_s must be > 0, got {self.time_limit_s}")

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """See `solve_ilp`."""
        return _Attempt(self, problem, Tables(problem), time.monotonic()).run()


def solve_ilp(
    problem: PartitionProblem, *, backend: str | object = "highs", time_limit_s: float = 10.0
) -> PartitionResult:
    """Cuts a chain of layers over unequal devices for the shortest step.

    A device that would slow everyone down gets no layer.

    Args:
        problem: `L` layers, `D` devices; seconds per microbatch, bytes.
        backend: See `IlpSolver`.
        time_limit_s: For everything; then the best plan so far, `optimal=False`.

    Returns:
        The plan, its predicted times and the proven gap. Interchangeable devices: lower id first.

    Raises:
        InfeasibleError: No assignment fits; names the layer and the largest device.
        SolverError: The backend failed, or found nothing in time; carries the end of its log.
    """
    return IlpSolver(backend=backend, time_limit_s=time_limit_s).solve(problem)


@dataclass(slots=True)
class _Attempt:
    """The state of one solve."""

    solver: IlpSolver
    problem: PartitionProblem
    tables: Tables
    started_s: float
    chains: list[Chain] = field(default_factory=list)
    best_s: float = math.inf

    @property
    def left_s(self) -> float:
        return self.started_s + self.solver.time_limit_s - time.monotonic()

    @property
    def rest(self) -> int:
        return self.tables.microbatches - 1

    @property
    def cap_s(self) -> float:
        """Only cheaper chains are of interest."""
        return self.best_s * (1.0 - _BETTER)

    def run(self) -> PartitionResult:
        if self.solver.presolve:
            for _, chain in good_chains(self.tables):
                self._keep(chain)
            for chain in single_chains(self.tables):
                self._keep(chain)
        optimal, lower_s = self._prove()
        name = f"ilp/{backend_name(self.solver.backend)}"
        if not self.chains:
            if not optimal:
                raise SolverError(
                    f"{name} found no plan within {self.solver.time_limit_s:g} s for"
                    f" {self.tables.num_layers} layers on {len(self.tables.devices)} devices\n"
                    "  try      a longer time_limit_s, or solver 'even'"
                )
            raise infeasible(self.problem, self._is_feasible)
        return finish(
            self.tables,
            self.chains,
            optimal=optimal,
            gap=0.0 if optimal else max(0.0, (self.best_s - lower_s) / self.best_s),
            solver=name,
            started_s=self.started_s,
        )

    def _keep(self, chain: Chain) -> None:
        self.chains.append(chain)
        self.best_s = min(self.best_s, self.tables.cost_s(chain))

    def _is_feasible(self, tables: Tables) -> bool:
        if tables.max_stages < max(1, tables.min_stages):
            return False
        program = _whole_program(tables)
        if not program.segments:
            return False
        outcome = solve_mip(program.mip, backend=self.solver.backend, time_limit_s=10.0)
        return bool(outcome.values)

    def _prove(self) -> tuple[bool, float]:
        """Finds the best chain; returns whether it is proven, and a lower bound on any cost."""
        tables = self.tables
        if tables.max_stages < max(1, tables.min_stages) or not tables.segments:
            return True, self.best_s
        lower_s = 0.0
        if self.solver.presolve:
            costs = Costs(tables)
            bands = self._bands(costs)
            lower_s = min((self._lower_s(band) for band in bands), default=math.inf)
            if not bands or lower_s > self.cap_s:
                return True, self.best_s
            segments, links = surviving(costs, [(band[0], band[2]) for band in bands], self.cap_s)
            period_s = (min(band[0] for band in bands), max(band[1] for band in bands))
            if period_s[1] == math.inf:
                period_s = (period_s[0], _largest_period_s(tables))
            program = Program(tables, segments, links, period_s, self.cap_s)
        else:
            program = _whole_program(tables)
        logger.debug(
            "program: %d segments, %d columns, %d rows",
            len(program.segments), len(program.mip.costs), len(program.mip.rows),
        )  # fmt: skip
        if not program.segments:
            return True, self.best_s
        if self.left_s <= 0:
            return False, lower_s
        outcome = solve_mip(
            program.mip, backend=self.solver.backend, time_limit_s=max(0.1, self.left_s)
        )
        if outcome.values:
            self._keep(program.chain(outcome.values))
        proven = outcome.status in ("optimal", "infeasible")
        return proven, self.best_s if proven else min(lower_s, self.best_s)

    def _bands(self, costs: Costs) -> list[tuple[float, float, Bounds]]:
        """Bands of periods (least, largest, bounds at the largest) that may hold a better chain."""
        tables = self.tables
        whole = bounds_at(costs, math.inf)
        self._improve(whole)
        if whole.least_s == math.inf:
            return []
        least_s = least_period_s(tables)
        if not self.rest or self.best_s == math.inf:
            return [(least_s, math.inf, whole)]
        most_s = (self.cap_s - whole.least_s) / self.rest
        if most_s < least_s:
            return []
        at_most = bounds_at(costs, most_s)
        self._improve(at_most)
        bands, done = [(least_s, most_s, at_most)], []
        for _ in range(_MOST_BANDS):
            bands = [band for band in bands if self._lower_s(band) <= self.cap_s]
            if not bands or self.left_s < 0.5 * self.solver.time_limit_s:
                break
            bands.sort(key=self._lower_s, reverse=True)
            least_s, most_s, bounds = bands.pop()
            if most_s - least_s <= _NARROW * most_s:
                done.append((least_s, most_s, bounds))
                continue
            middle_s = (least_s + most_s) / 2
            lower = bounds_at(costs, middle_s)
            self._improve(lower)
            bands += [(least_s, middle_s, lower), (middle_s, most_s, bounds)]
        return [band for band in [*bands, *done] if self._lower_s(band) <= self.cap_s]

    def _lower_s(self, band: tuple[float, float, Bounds]) -> float:
        return band[2].least_s + self.rest * band[0]

    def _improve(self, bounds: Bounds) -> None:
        if bounds.chain is not None:
            self._keep(bounds.chain)
            self._keep(improve(self.tables, bounds.chain, self.tables.cost_s)[0])


def least_period_s(tables: Tables) -> float:
    """No plan has a shorter period.

    Each stage's compute is at most T, so for any weights p of sum 1 (here each device's share of
    the total speed), T >= sum over devices of p_d C_d >= sum over layers of min_d p_d c_{d,l}.
    """
    rows = []
    for device in tables.devices:
        seconds = tables.problem.profile.layer_seconds(tables.problem.crowd, device)
        rows.append([row.forward_s + row.backward_s for row in seconds])
    layers = range(tables.num_layers)
    slowest_layer_s = max(min(row[layer] for row in rows) for layer in layers)
    totals = [math.fsum(row) for row in rows]
    if min(totals) <= 0:
        return slowest_layer_s * (1 - 1e-9)
    speed = math.fsum(1.0 / total for total in totals)
    weights = [1.0 / total / speed for total in totals]
    spread_s = math.fsum(
        min(weight * row[layer] for weight, row in zip(weights, rows, strict=True))
        for layer in layers
    )
    return max(slowest_layer_s, spread_s) * (1 - 1e-9)


def _largest_period_s(tables: Tables) -> float:
    """No plan has a longer period: the mean over a window is at most its largest terms."""
    layers = range(1, tables.num_layers)
    devices = range(len(tables.devices))
    cuts = [tables.cut(a, b, layer) for a in devices for b in devices for layer in layers]
    slowest_s = max((segment.compute_s for segment in tables.segments), default=0.0)
    return 2.0 * slowest_s + max((cut.round_trip_s for cut in cuts if cut is not None), default=0.0)


def _whole_program(tables: Tables) -> Program:
    devices = range(len(tables.devices))
    links = {}
    for layer in range(1, tables.num_layers):
        for source in devices:
            for target in devices:
                cut = tables.cut(source, target, layer)
                if cut is not None:
                    links[source, target, layer] = cut.round_trip_s
    period_s = (0.0, _largest_period_s(tables))
    return Program(tables, list(tables.segments), links, period_s, math.inf)
