"""The partition solver "dp": the best chain by dynamic programming over device sets, proven.

Problem: as the ILP's, R_0 + (M - 1) T over chains of segments on distinct devices.

A chain is built from its last stage to its first, so that how many stages follow, and with it what
fits in memory, is known. A state is (devices used, first layer so far, device of that stage). Two
ways to reach a state are told apart by R_0 so far, the period so far, and the windows that start at
its first stage, since each of these may still grow into the period; a way that is no better in any
of them is dropped. So labels are kept per state, and the cheapest is extended first (A*): what the
layers before will add to R_0 is bounded by a table per band of periods (`bounds.handed_over`). The
first complete chain to be the cheapest label is the optimum.

Work: at most 2^D D L states of D L extensions, each with its labels; bounds leave a small part.
Devices that are alike in everything are used in their own order. For up to `MOST_DEVICES` devices.

Source: label setting with dominance (Martins 1984, K); windows of 1F1B: `core.cost`. It shares
tables and bounds with the ILP, and nothing of its proof.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from ...errors import InvalidValueError
from ..problem import PartitionProblem, PartitionResult
from .arrays import Costs
from .bounds import MOST_DEVICES, handed_over
from .finish import finish
from .ilp import least_period_s
from .infeasible import infeasible
from .search import good_chains, single_chains
from .tables import Chain, Tables

_BANDS = 12
_TABLE_BYTES = 250e6
"""For the tables of all bands together."""
_NARROW = 1e-3
"""Relative width below which bands are not halved again."""
_BETTER = 1e-9
"""Relative gain below which a chain is no better than the one at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DpSolver:
    """Exact over subsets of devices, as a `PartitionSolver`."""

    time_limit_s: float = 30.0
    """Wall seconds for everything; then the best plan so far, `optimal=False` and a gap."""

    def __post_init__(self) -> None:
        if not self.time_limit_s > 0:
            raise InvalidValueError(f"time_limit_s must be > 0, got {self.time_limit_s}")

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InvalidValueError: More devices than it supports.
            InfeasibleError: No chain fits; says why.
        """
        started_s = time.monotonic()
        devices = len(problem.allowed_devices)
        if devices > MOST_DEVICES:
            raise InvalidValueError(
                f"solver 'dp' supports up to {MOST_DEVICES} devices, got {devices};"
                " use solver 'ilp' or 'eager', or name fewer devices"
            )
        tables = Tables(problem)
        chains = [chain for _, chain in good_chains(tables)] + single_chains(tables)
        search = Labels(tables, started_s + self.time_limit_s, chains)
        least_s = search.run()
        if not search.chains:
            raise infeasible(problem, lambda relaxed: bool(Labels(relaxed, math.inf, []).any()))
        gap = max(0.0, (search.best_s - least_s) / search.best_s) if search.best_s else 0.0
        return finish(
            tables,
            search.chains,
            optimal=gap == 0.0,
            gap=gap,
            solver="dp",
            started_s=started_s,
        )


@dataclass(frozen=True, slots=True)
class _Bands:
    """Bands of periods, and what the layers before a stage add to R_0 at least in each."""

    low_s: np.ndarray
    high_s: np.ndarray
    """Both as columns."""
    before: np.ndarray
    """By (band, set, cut, device), see `handed_over`."""

    @classmethod
    def of(cls, bands: Sequence[tuple[float, float, np.ndarray]]) -> _Bands:
        return cls(
            np.array([[low_s] for low_s, _, _ in bands]),
            np.array([[high_s * (1 + 1e-9)] for _, high_s, _ in bands]),
            np.stack([before for _, _, before in bands]),
        )


@dataclass(frozen=True, slots=True)
class _Label:
    """A chain's end: layers `first..` with `device` in front."""

    used: int
    first: int
    device: int
    values: tuple[float, ...]
    """R_0, T, then the windows from the first stage on, where they count; under gpipe R_0, slowest
    F, slowest B."""
    cuts: tuple[tuple[int, int], ...]
    """(device, end layer), front to back."""


@dataclass(slots=True)
class Labels:
    """The search. `chains` holds complete ones, the best last."""

    tables: Tables
    until_s: float
    """`time.monotonic()` at which it stops."""
    chains: list[Chain]
    """May hold some to start with."""
    slack: float = 0.0
    """Chains dearer by at most this share of the best are of interest, too."""
    most: int = 10_000
    """Complete chains after which it stops."""
    best_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.best_s = min(map(self.tables.cost_s, self.chains), default=math.inf)

    def any(self) -> bool:
        """Whether any chain fits."""
        self.run(first_only=True)
        return bool(self.chains)

    def run(self, *, first_only: bool = False) -> float:
        """Searches; returns what every chain costs at least (at most the best one's cost)."""
        tables = self.tables
        if tables.max_stages < max(1, tables.min_stages) or not tables.segments:
            return self.best_s
        costs = Costs(tables)
        bands = self._bands(costs)
        if bands is None:
            return self.best_s
        begun = len(self.chains)
        heap: list[tuple[float, int, _Label]] = []
        order = count()
        known: dict[tuple[int, int, int], list[tuple[float, ...]]] = {}
        for least_s, label in self._last_stages(costs, bands):
            heapq.heappush(heap, (least_s, next(order), label))
        while heap:
            least_s, _, label = heapq.heappop(heap)
            if least_s > self._cap_s or len(self.chains) - begun >= self.most:
                # Sums of another order differ in their last bit: that is no better chain.
                return self.best_s if least_s > self.best_s * (1 - _BETTER) else least_s
            if time.monotonic() > self.until_s:
                return least_s
            if label.first == 0:
                chain = tables.chain(label.cuts)
                if chain is not None:  # else it misses a device or a stage that must be
                    self._keep(chain)
                    if first_only:
                        return self.best_s
                continue
            if _dominated(known, label):
                continue
            for least_s, grown in self._grow(costs, bands, label):
                heapq.heappush(heap, (least_s, next(order), grown))
        return self.best_s

    @property
    def _cap_s(self) -> float:
        """Only cheaper chains are of interest."""
        return self.best_s * (1 + self.slack) * (1 - _BETTER)

    def _keep(self, chain: Chain) -> None:
        self.chains.append(chain)
        self.best_s = min(self.best_s, self.tables.cost_s(chain))

    def _bands(self, costs: Costs) -> _Bands | None:
        """Bands of periods that may hold a better chain, halved a few times."""
        rest = self.tables.microbatches - 1
        before = handed_over(costs, math.inf)
        if not rest or self.best_s == math.inf:
            return _Bands.of([(0.0, math.inf, before)])
        everyone = before.shape[0] - 1
        first_s = min(
            float(
                (costs.by_depth[1, device, :, -1] + before[everyone ^ 1 << device, :, device]).min()
            )
            for device in range(len(self.tables.devices))
        )
        low_s, high_s = (
            least_period_s(self.tables),
            (self.best_s * (1 + self.slack) - first_s) / rest,
        )
        if not low_s < high_s:
            return None
        found = [(low_s, high_s, handed_over(costs, high_s))]
        most = max(2, min(_BANDS, int(_TABLE_BYTES / before.nbytes)))
        while len(found) < most and time.monotonic() < self.until_s:
            halves = []
            for low_s, high_s, before in found:
                middle_s = math.sqrt(low_s * high_s) if low_s > 0 else high_s / 2
                halves.append((low_s, middle_s, handed_over(costs, middle_s)))
                halves.append((middle_s, high_s, before))
            found = [
                half for half in halves if next(self._last_stages(costs, _Bands.of([half])), None)
            ]
            if not found:
                return None
            if found[-1][1] / max(found[0][0], 1e-300) < 1 + _NARROW:
                break
        return _Bands.of(found)

    def _last_stages(self, costs: Costs, bands: _Bands) -> Iterator[tuple[float, _Label]]:
        layers = self.tables.num_layers
        for device in range(len(self.tables.devices)):
            if self._has_free_twin(device, 0):
                continue
            seconds = costs.by_depth[1, device, :, layers]
            starts = np.flatnonzero(np.isfinite(seconds))
            if not len(starts):
                continue
            own = seconds[starts]
            if self.tables.schedule == "gpipe":
                forward, backward = self._directions(device, starts, layers)
                values = np.stack([own, forward, backward], axis=1)
            else:
                values = np.stack([own] * (3 if self.tables.has_windows else 2), axis=1)
            yield from self._labels(bands, 1 << device, device, starts, values, ((device, layers),))

    def _grow(self, costs: Costs, bands: _Bands, label: _Label) -> Iterator[tuple[float, _Label]]:
        tables = self.tables
        size = label.used.bit_count() + 1
        if size > tables.max_stages:
            return
        for device in range(len(tables.devices)):
            bit = 1 << device
            if label.used & bit or self._has_free_twin(device, label.used):
                continue
            cut = tables.cut(device, label.device, label.first)
            if cut is None:
                continue
            seconds = costs.by_depth[size, device, : label.first, label.first]
            starts = np.flatnonzero(np.isfinite(seconds))
            if not len(starts):
                continue
            own = seconds[starts]
            total = own + cut.round_trip_s + label.values[0]
            if tables.schedule == "gpipe":
                forward, backward = self._directions(device, starts, label.first)
                forward = np.maximum(forward, max(label.values[1], cut.down_s))
                backward = np.maximum(backward, max(label.values[2], cut.back_s))
                values = np.stack([total, forward, backward], axis=1)
            elif not tables.has_windows:
                period = np.maximum(own, max(label.values[1], cut.busiest_s))
                values = np.stack([total, period], axis=1)
            else:
                windows = own[:, None] + cut.round_trip_s + np.array(label.values[2:])[None, :]
                windows = np.concatenate([own[:, None], windows], axis=1)
                step = 2 if tables.schedule == "eager" else 1
                shares = 1 + step * np.arange(windows.shape[1])
                period = np.maximum((windows / shares).max(axis=1), label.values[1])
                period = np.maximum(period, cut.busiest_s)
                values = np.concatenate([total[:, None], period[:, None], windows], axis=1)
            cuts = ((device, label.first), *label.cuts)
            yield from self._labels(bands, label.used | bit, device, starts, values, cuts)

    def _labels(
        self,
        bands: _Bands,
        used: int,
        device: int,
        starts: np.ndarray,
        values: np.ndarray,
        cuts: tuple[tuple[int, int], ...],
    ) -> Iterator[tuple[float, _Label]]:
        """Labels that may still beat the best chain, with what any chain of theirs costs."""
        rest = self.tables.microbatches - 1
        others = (1 << len(self.tables.devices)) - 1 - used
        is_gpipe = self.tables.schedule == "gpipe"
        period = values[:, 1] + values[:, 2] if is_gpipe else values[:, 1]
        cost = bands.before[:, others, starts, device]  # a copy
        cost += rest * np.maximum(period, bands.low_s)
        cost[period > bands.high_s] = np.inf
        least = values[:, 0] + cost.min(axis=0)
        for index in np.flatnonzero(least <= self._cap_s):
            own = tuple(map(float, values[index]))
            yield float(least[index]), _Label(used, int(starts[index]), device, own, cuts)

    def _directions(
        self, device: int, starts: np.ndarray, end: int
    ) -> tuple[np.ndarray, np.ndarray]:
        # Under gpipe every stage holds all microbatches, so the depth does not matter.
        segments = [self.tables.at(device, int(first), end) for first in starts]
        return (
            np.array([segment.forward_s for segment in segments if segment is not None]),
            np.array([segment.backward_s for segment in segments if segment is not None]),
        )

    def _has_free_twin(self, device: int, used: int) -> bool:
        """Whether a device alike with a lower number is still free: that one goes first."""
        return any(not used >> twin & 1 for twin in self.tables.twins[device])


def _dominated(known: dict[tuple[int, int, int], list[tuple[float, ...]]], label: _Label) -> bool:
    """Whether a label is no better than one of its state, which is then no longer needed."""
    at = known.setdefault((label.used, label.first, label.device), [])
    for other in at:
        if all(theirs <= own for theirs, own in zip(other, label.values, strict=True)):
            return True
    at.append(label.values)
    return False
