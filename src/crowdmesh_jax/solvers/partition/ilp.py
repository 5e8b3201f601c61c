"""The partition ILP: cuts a chain of layers over unequal devices for the shortest step.

Variables: `z[d,i,j]`, device `d` runs layers `i .. j-1`, and `w[d,e,j]`, it hands over to `e` at cut
`j`. Flow conservation at each (device, cut) makes a path; each device is used at most once and may
be left out. For a bound `T` on the steady period, R_0 (all compute and round trips of the path) is
minimised under the window condition in its recursive form

    E_s >= C_s - T,    E_s >= C_s - T + 2 c_s + E_{s+1},    E_s <= 0

whose `E` travel over the used links as flow variables, so no big-M is needed. Lowering `T` below
each answer's own period walks the Pareto front of (R_0, T); the best R_0 + (M - 1) T is on it. The
walk ends when no remaining T could pay, which proves the optimum.

Memory depends on how many stages follow; that number travels over the links the same way. Before
each program, segments and links that are slower than `T`, or whose cheapest completion costs more
than the best chain known, are left out; that makes programs of tens of layers small.

It knows programs and bounds; costs are in `tables`, the first chain comes from `search`.

Source: design, section 7; 1F1B (PipeDream, Narayanan et al., SOSP 2019).
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field

from ...errors import InfeasibleError, InvalidValueError, SolverError
from ..backends import Mip, backend_name, solve_mip
from ..problem import PartitionProblem, PartitionResult
from .finish import finish
from .infeasible import infeasible
from .search import good_chains, single_chains
from .tables import Chain, Segment, Tables

logger = logging.getLogger(__name__)

_STEP_BELOW = 1e-7
"""Relative step below a found period; backends hold bounds to 1e-9 of about 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IlpSolver:
    """The ILP as a `PartitionSolver`."""

    backend: str | object = "highs"
    """"highs", "cbc", or a PuLP solver object (one made for this solver; it keeps its limits)."""
    time_limit_s: float = 10.0
    """For all programs together; then the best plan so far, `optimal=False` and a gap."""
    rerank_slack: float = 0.03
    """Chains whose closed form is this share above the best are compared by `evaluate`, too."""

    def __post_init__(self) -> None:
        if not self.time_limit_s > 0:
            raise InvalidValueError(f"time_limit_s must be > 0, got {self.time_limit_s}")
        if not 0 <= self.rerank_slack < 1:
            raise InvalidValueError(f"rerank_slack must lie in [0, 1), got {self.rerank_slack}")

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """See `solve_ilp`."""
        return _Walk(self, problem).run()


def solve_ilp(
    problem: PartitionProblem, *, backend: str | object = "highs", time_limit_s: float = 10.0
) -> PartitionResult:
    """Cuts a chain of layers over unequal devices for the shortest step.

    A device that would slow everyone down gets no layer.

    Args:
        problem: `L` layers, `D` devices; seconds per microbatch, bytes.
        backend: See `IlpSolver`.
        time_limit_s: For all programs together; then the best plan so far, `optimal=False`.

    Returns:
        The plan, its predicted times and the proven gap. Interchangeable devices: lower id first.

    Raises:
        InfeasibleError: No assignment fits; names the layer and the largest device.
        SolverError: The backend failed, or found nothing in time; carries the end of its log.
    """
    return IlpSolver(backend=backend, time_limit_s=time_limit_s).solve(problem)


@dataclass(slots=True)
class _Walk:
    """One walk down the Pareto front."""

    solver: IlpSolver
    problem: PartitionProblem
    chains: list[Chain] = field(default_factory=list)
    best_s: float = math.inf

    def run(self) -> PartitionResult:
        started_s = time.monotonic()
        deadline_s = started_s + self.solver.time_limit_s
        tables = Tables(self.problem)
        if tables.max_stages >= max(1, tables.min_stages):
            for _, chain in good_chains(tables):
                self._keep(tables, chain)
            for chain in single_chains(tables):
                self._keep(tables, chain)
        optimal, lower_s = self._walk(tables, deadline_s)
        if not self.chains:
            if not optimal:
                raise SolverError(
                    f"no plan found within {self.solver.time_limit_s:g} s"
                    f" ({backend_name(self.solver.backend)}, {tables.num_layers} layers,"
                    f" {len(tables.devices)} devices)\n"
                    "  try      a longer time_limit_s, or solver 'even'"
                )
            raise infeasible(self.problem, self._is_feasible)
        gap = 0.0 if optimal else max(0.0, (self.best_s - lower_s) / self.best_s)
        return finish(
            tables,
            self.chains,
            optimal=optimal,
            gap=gap,
            solver=f"ilp/{backend_name(self.solver.backend)}",
            started_s=started_s,
        )

    def _keep(self, tables: Tables, chain: Chain) -> None:
        self.chains.append(chain)
        self.best_s = min(self.best_s, tables.cost_s(chain))

    def _is_feasible(self, tables: Tables) -> bool:
        outcome, _ = _probe(tables, math.inf, math.inf, self.solver, 5.0)
        return outcome in ("optimal", "feasible")

    def _walk(self, tables: Tables, deadline_s: float) -> tuple[bool, float]:
        """Returns whether the optimum is proven, and a lower bound on the closed form."""
        rest = tables.microbatches - 1
        least_period_s = _least_period_s(tables)
        lower_first_s = _Bounds(tables, math.inf).least_s
        if lower_first_s == math.inf:
            return True, math.inf  # not even with devices used twice
        slack = self.solver.rerank_slack if self.problem.objective == "evaluate" else 0.0
        period_s = math.inf
        while True:
            cap_s = self.best_s * (1.0 + slack)
            if rest and cap_s < math.inf:
                period_s = min(period_s, (cap_s - lower_first_s) / rest)
            if period_s < least_period_s:
                return True, self.best_s
            lower_s = lower_first_s + rest * least_period_s
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False, lower_s
            status, chain = _probe(
                tables, period_s, cap_s - rest * least_period_s, self.solver, left_s
            )
            if status == "infeasible":
                return True, self.best_s
            if chain is not None:
                self._keep(tables, chain)
            if status != "optimal" or chain is None:
                return False, lower_s
            lower_first_s = max(lower_first_s, tables.first_microbatch_s(chain) * (1 - 1e-9))
            if not rest:
                return True, self.best_s
            period_s = min(period_s, tables.period_s(chain)) * (1.0 - _STEP_BELOW)


def _least_period_s(tables: Tables) -> float:
    """No plan has a shorter period.

    Each stage's compute is at most T, so for any weights p of sum 1 (here each device's share of
    the total speed), T >= sum over devices of p_d C_d >= sum over layers of min_d p_d c_{d,l}.
    """
    rows = []
    for device in tables.devices:
        seconds = tables.problem.profile.layer_seconds(tables.problem.crowd, device)
        rows.append([row.forward_s + row.backward_s for row in seconds])
    if not rows:
        return 0.0
    slowest_layer_s = max(min(row[layer] for row in rows) for layer in range(tables.num_layers))
    totals = [math.fsum(row) for row in rows]
    if min(totals) <= 0 or tables.schedule == "gpipe":
        return slowest_layer_s * (1 - 1e-9)
    speed = math.fsum(1.0 / total for total in totals)
    weights = [1.0 / total / speed for total in totals]
    spread_s = math.fsum(
        min(weight * row[layer] for weight, row in zip(weights, rows, strict=True))
        for layer in range(tables.num_layers)
    )
    return max(slowest_layer_s, spread_s) * (1 - 1e-9)


class _Bounds:
    """Cheapest R_0 before and after each (cut, device), devices free to return.

    Only segments and links that are no slower than a period count.
    """

    def __init__(self, tables: Tables, period_s: float) -> None:
        limit_s = period_s * (1 + 1e-9)
        self.segments = [s for s in tables.segments if s.compute_s <= limit_s]
        layers, count = tables.num_layers, len(tables.devices)
        by_end: dict[int, list[Segment]] = defaultdict(list)
        by_first: dict[int, list[Segment]] = defaultdict(list)
        for segment in self.segments:
            by_end[segment.end].append(segment)
            by_first[segment.first].append(segment)
        devices = range(count)
        # before[j][d]: layers 0..j-1 done, device d about to start at j (its link included).
        self.before = [[math.inf] * count for _ in range(layers + 1)]
        self.before[0] = [0.0] * count
        self.after = [[math.inf] * count for _ in range(layers + 1)]
        self.after[layers] = [0.0] * count
        self.links: dict[tuple[int, int, int], float] = {}
        at_layer: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
        for layer in range(1, layers):
            done = [math.inf] * count
            for segment in by_end[layer]:
                at = self.before[segment.first][segment.device] + segment.compute_s
                done[segment.device] = min(done[segment.device], at)
            for source in devices:
                for target in devices:
                    cut = tables.cut(source, target, layer)
                    if cut is None or cut.busiest_s > limit_s:
                        continue
                    self.links[source, target, layer] = cut.round_trip_s
                    at_layer[layer].append((source, target, cut.round_trip_s))
                    at = done[source] + cut.round_trip_s
                    self.before[layer][target] = min(self.before[layer][target], at)
        for layer in reversed(range(1, layers)):
            todo = [math.inf] * count
            for segment in by_first[layer]:
                at = segment.compute_s + self.after[segment.end][segment.device]
                todo[segment.device] = min(todo[segment.device], at)
            for source, target, round_trip_s in at_layer[layer]:
                at = round_trip_s + todo[target]
                self.after[layer][source] = min(self.after[layer][source], at)
        self.least_s = min(
            (s.compute_s + self.after[s.end][s.device] for s in by_first[0]), default=math.inf
        )

    def through_s(self, segment: Segment) -> float:
        """Least R_0 of a chain with this segment."""
        return (
            self.before[segment.first][segment.device]
            + segment.compute_s
            + self.after[segment.end][segment.device]
        )


def _probe(
    tables: Tables, period_s: float, first_cap_s: float, solver: IlpSolver, left_s: float
) -> tuple[str, Chain | None]:
    """Least R_0 of a chain with a period of at most `period_s` and R_0 of at most `first_cap_s`."""
    bounds = _Bounds(tables, period_s)
    rest = tables.microbatches - 1
    cap_s = first_cap_s * (1 + 1e-9)
    segments = [s for s in bounds.segments if bounds.through_s(s) <= cap_s]
    if bounds.least_s > cap_s or not segments:
        return "infeasible", None
    starts = {(s.device, s.first) for s in segments}
    ends = {(s.device, s.end) for s in segments}
    # A window of two stages: its shortest compute and the round trip must fit, too.
    shortest_end: dict[tuple[int, int], float] = {}
    shortest_start: dict[tuple[int, int], float] = {}
    for s in segments:
        key = (s.device, s.end)
        shortest_end[key] = min(shortest_end.get(key, math.inf), s.compute_s)
        key = (s.device, s.first)
        shortest_start[key] = min(shortest_start.get(key, math.inf), s.compute_s)
    pair_limit_s = {"1f1b": 2.0, "eager": 3.0}.get(tables.schedule, math.inf) * period_s
    links = {
        (source, target, layer): round_trip_s
        for (source, target, layer), round_trip_s in bounds.links.items()
        if (source, layer) in ends
        and (target, layer) in starts
        and shortest_end[source, layer] + round_trip_s + shortest_start[target, layer]
        <= pair_limit_s * (1 + 1e-9)
    }
    model = _Model(tables, segments, links, period_s if rest else math.inf, bounds.least_s)
    outcome = solve_mip(model.mip, backend=solver.backend, time_limit_s=left_s)
    logger.debug(
        "probe T <= %.6g s: %d segments, %d links, %s",
        period_s, len(segments), len(links), outcome.status,
    )  # fmt: skip
    if not outcome.values:
        return outcome.status, None
    return outcome.status, model.chain(outcome.values)


class _Model:
    """The program for one bound on the period; seconds are divided by `unit_s`."""

    def __init__(
        self,
        tables: Tables,
        segments: list[Segment],
        links: dict[tuple[int, int, int], float],
        period_s: float,
        unit_s: float,
    ) -> None:
        self.tables = tables
        self.segments = segments
        self.mip = mip = Mip()
        unit_s = unit_s if unit_s > 0 else 1.0
        count = len(tables.devices)
        devices = range(count)
        self.z = [mip.column(s.compute_s / unit_s, binary=True) for s in segments]
        w = {key: mip.column(cost_s / unit_s, binary=True) for key, cost_s in links.items()}
        of = [[(z, s) for z, s in zip(self.z, segments, strict=True) if s.device == d]
              for d in devices]  # fmt: skip
        pairs: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        for (source, target, _), column in w.items():
            pairs[source, target].append((column, 1.0))

        mip.row([(z, 1.0) for z, s in zip(self.z, segments, strict=True) if s.first == 0], "==", 1)
        balance_out: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        balance_in: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
        for (source, target, layer), column in w.items():
            balance_out[source, layer].append((column, -1.0))
            balance_in[target, layer].append((column, -1.0))
        for z, s in zip(self.z, segments, strict=True):
            if s.end < tables.num_layers:
                balance_out[s.device, s.end].append((z, 1.0))
            if s.first > 0:
                balance_in[s.device, s.first].append((z, 1.0))
        for terms in [*balance_out.values(), *balance_in.values()]:
            mip.row(terms, "==", 0.0)
        for device in devices:
            used = [(z, 1.0) for z, _ in of[device]]
            if device in tables.required:
                mip.row(used, "==", 1.0)
            elif used:
                mip.row(used, "<=", 1.0)
        everything = [(z, 1.0) for z in self.z]
        if tables.max_stages < count:
            mip.row(everything, "<=", tables.max_stages)
        if tables.min_stages > 1:
            mip.row([(z, -1.0) for z in self.z], "<=", -tables.min_stages)
        if period_s < math.inf:
            if tables.schedule == "gpipe":
                self._flow_lines(of, links, w, period_s / unit_s, unit_s)
            else:
                self._windows(of, links, w, pairs, period_s / unit_s, unit_s)
        self._depths(of, pairs)
        self._symmetry(of)

    def _windows(self, of, links, w, pairs, period: float, unit_s: float) -> None:
        mip = self.mip
        carried = {}
        for (source, target), terms in pairs.items():
            # E of the stage on `target`, seen from `source`; 0 where the link is not used.
            column = mip.column(0.0, -period, 0.0)
            carried[source, target] = column
            mip.row([(column, -1.0), *((w_, -period) for w_, _ in terms)], "<=", 0.0)
        # Between two stages the window grows by the round trip; under `eager` its divisor does too.
        grows = period if self.tables.schedule == "eager" else 0.0
        for device in range(len(self.tables.devices)):
            own = [(z, s.compute_s / unit_s - period) for z, s in of[device]]
            incoming = [(c, -1.0) for (_, target), c in carried.items() if target == device]
            outgoing = [(c, 1.0) for (source, _), c in carried.items() if source == device]
            hops = [
                (w[key], cost_s / unit_s - grows)
                for key, cost_s in links.items()
                if key[0] == device
            ]
            if not own:
                continue
            if incoming:
                mip.row([*own, *incoming], "<=", 0.0)
            if outgoing:
                mip.row([*own, *hops, *outgoing, *incoming], "<=", 0.0)

    def _flow_lines(self, of, links, w, period: float, unit_s: float) -> None:
        """GPipe: T is the slowest forward plus the slowest backward, links among both."""
        mip = self.mip
        down, back = mip.column(0.0, 0.0, period), mip.column(0.0, 0.0, period)
        mip.row([(down, 1.0), (back, 1.0)], "<=", period)
        for device in range(len(self.tables.devices)):
            forward = [(z, s.forward_s / unit_s) for z, s in of[device]]
            backward = [(z, s.backward_s / unit_s) for z, s in of[device]]
            if forward:
                mip.row([*forward, (down, -1.0)], "<=", 0.0)
                mip.row([*backward, (back, -1.0)], "<=", 0.0)
            sent, returned = [], []
            for source, target, layer in links:
                cut = self.tables.cut(source, target, layer)
                if source == device and cut is not None:
                    sent.append((w[source, target, layer], cut.down_s / unit_s))
                    returned.append((w[source, target, layer], cut.back_s / unit_s))
            if sent:
                mip.row([*sent, (down, -1.0)], "<=", 0.0)
                mip.row([*returned, (back, -1.0)], "<=", 0.0)

    def _depths(self, of, pairs) -> None:
        """Memory by position: stages to the end, counted over the links, within what fits."""
        deepest = self.tables.max_stages
        if all(segment.max_depth >= deepest for segment in self.segments):
            return
        mip = self.mip
        counted = {}
        for pair, terms in pairs.items():
            column = mip.column(0.0, 0.0, max(0, deepest - 1))
            counted[pair] = column
            mip.row([(column, 1.0), *((w_, -(deepest - 1.0)) for w_, _ in terms)], "<=", 0.0)
        for device in range(len(self.tables.devices)):
            below = [(c, 1.0) for (source, _), c in counted.items() if source == device]
            above = [(c, -1.0) for (_, target), c in counted.items() if target == device]
            limits = [(z, 1.0 - min(s.max_depth, deepest)) for z, s in of[device]]
            if limits:
                mip.row([*limits, *below], "<=", 0.0)
            # A stage with a predecessor tells it its own depth.
            told = [(z, 0.0 if s.first else -float(deepest)) for z, s in of[device]]
            depth = [(z, 1.0 + shift) for (z, _), (_, shift) in zip(of[device], told, strict=True)]
            if depth:
                mip.row([*depth, *below, *above], "<=", 0.0)

    def _symmetry(self, of) -> None:
        """Devices that could change places do so by id: the lower one is used first."""
        layers = self.tables.num_layers
        for left, right in interchangeable(self.tables):
            used = [*((z, -1.0) for z, _ in of[left]), *((z, 1.0) for z, _ in of[right])]
            if not used:
                continue
            self.mip.row(used, "<=", 0.0)
            # start of left <= start of right, where right is used at all
            order = [(z, float(s.first)) for z, s in of[left] if s.first]
            order += [(z, float(layers - s.first)) for z, s in of[right]]
            self.mip.row(order, "<=", layers)

    def chain(self, values: tuple[float, ...]) -> Chain:
        """The chain that a solution stands for, its rounding undone."""
        chosen = [s for z, s in zip(self.z, self.segments, strict=True) if values[z] > 0.5]
        chosen.sort(key=lambda segment: segment.first)
        made = self.tables.chain([(segment.device, segment.end) for segment in chosen])
        if made is None:
            raise SolverError(
                "the backend's solution is no plan: "
                + "; ".join(
                    f"{self.tables.devices[s.device]} {s.first}-{s.end - 1}" for s in chosen
                )
                + "\n  try      another backend: IlpSolver(backend='highs' or 'cbc')"
            )
        return made


def interchangeable(tables: Tables) -> list[tuple[int, int]]:
    """Neighbouring pairs of devices (in id order) that could change places without a difference."""
    problem, crowd = tables.problem, tables.problem.crowd

    def own(index: int):
        device = tables.devices[index]
        return (
            crowd.device(device).memory_bytes,
            problem.profile.layer_seconds(crowd, device),
            [problem.allows(device, layer) for layer in range(tables.num_layers)],
            index in tables.required,
        )

    def wire(source: str, target: str) -> tuple[float, float] | None:
        link = crowd.link(source, target)
        return link and (link.bandwidth_bytes_per_s, link.latency_s)

    def alike(left: int, right: int) -> bool:
        a, b = tables.devices[left], tables.devices[right]
        if own(left) != own(right) or wire(a, b) != wire(b, a):
            return False
        others = [device for device in tables.devices if device not in (a, b)]
        return all(wire(a, c) == wire(b, c) and wire(c, a) == wire(c, b) for c in others)

    found, taken = [], set()
    for left in range(len(tables.devices)):
        for right in range(left + 1, len(tables.devices)):
            if right not in taken and alike(left, right):
                found.append((left, right))
                taken.add(right)
                break
    return found


__all__ = ["IlpSolver", "InfeasibleError", "interchangeable", "solve_ilp"]
