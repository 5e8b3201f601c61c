"""A partition solver quick enough to rate thousands of coalitions: a batched dynamic program.

**Problem.** For each of many device sets, cut the chain of layers over some of the set for the
least closed form `R_0 + (M - 1) T` of `core.cost`, under the memory and link limits of the crowd.

**Variables.** Devices stand in a fixed order (slowest first, and fastest first). `best[d][i]` is
the cheapest way found to run layers `i..` with device `d` first and any later devices of the order
after it, so devices may be left out. Each state keeps its R_0, period, number of stages (which
sets the microbatches in flight, hence memory) and first stage (for windows of two stages). States
are ranked by `R + (M - 1) max(T, target)` for two targets: no suffix is rewarded for a period
shorter than the whole can have. The chain that comes out is priced exactly, all windows included.

**Complexity.** O(D L^2 + D^2 L) array elements per set and order, all sets of a batch at once. Cuts
are limited to `max_cuts` places (the ones with few bytes at balanced distances) and sets to their
`max_devices` fastest devices that can hold anything.

It is a heuristic: the plan is feasible and its price is exact, the optimum may be lower. Measured
against the ILP in docs/coalitions.md. Source: the dynamic program over (layer, device) of PipeDream
(Narayanan et al., SOSP 2019; known to us in outline), with communication windows of
docs/architecture.md, subsets and memory by depth added here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ...core import (
    COMPILE_PEAK_BYTES,
    Crowd,
    DeviceId,
    ModelProfile,
    PipelinePlan,
    Stage,
    period_s,
    predict,
    stage_memory,
    warmup_depths,
)
from ...errors import InfeasibleError, InvalidValueError
from ..problem import PartitionProblem, PartitionResult, Recompute

NEVER = 1e30
"""Seconds of what cannot be: infinity would make NaN of 0 bytes over no link."""

Chain = tuple[tuple[int, int, int], ...]
"""(device index, first layer, end layer) per stage."""


@dataclass(frozen=True, slots=True)
class QuickPlan:
    """What the quick solver found for one set of devices."""

    step_s: float
    """R_0 + (M - 1) T."""
    chain: Chain


def choose_cuts(profile: ModelProfile, work_s: Sequence[float], most: int) -> list[int]:
    """At most `most` cuts: drops, one by one, the dearest cut beside the lightest blocks."""
    cuts = list(range(1, len(profile.layers)))
    total_s = sum(work_s) or 1.0
    sizes = [sum(profile.cut_bytes(cut)) for cut in cuts]
    largest = max(sizes, default=0) or 1
    size = {cut: bytes_ / largest for cut, bytes_ in zip(cuts, sizes, strict=True)}
    before = [0.0, *accumulate(work_s)]
    while len(cuts) > most:
        edges = [0, *cuts, len(profile.layers)]

        def price(place: int, edges: list[int] = edges) -> tuple[float, int]:
            around = (before[edges[place + 2]] - before[edges[place]]) / total_s
            return (around * most - size[edges[place + 1]], place)

        del cuts[min(range(len(cuts)), key=price)]
    return cuts


class QuickTables:
    """Costs and limits of all devices of a crowd, as arrays; device `N` is a dummy that fits none.

    Args:
        ids: Device ids in the order that indices mean.
    """

    def __init__(
        self,
        profile: ModelProfile,
        crowd: Crowd,
        ids: Sequence[str],
        *,
        schedule: str = "1f1b",
        recompute: Recompute = "never",
        compile_peak_bytes: int = COMPILE_PEAK_BYTES,
        max_cuts: int = 15,
        max_devices: int = 12,
        memory: dict[str, int] | None = None,
    ) -> None:
        self.profile, self.schedule, self.recompute = profile, schedule, recompute
        self.microbatches = profile.microbatches
        self.max_devices = max_devices
        self._ids = tuple(ids)
        count = len(self._ids)
        seconds = [profile.layer_seconds(crowd, device) for device in self._ids]
        forward = np.array([[row.forward_s for row in rows] for rows in seconds])
        backward = np.array([[row.backward_s for row in rows] for rows in seconds])
        typical = (forward + backward).mean(axis=0)
        self.work_s = (forward + backward).sum(axis=1)
        cuts = choose_cuts(profile, typical.tolist(), max_cuts)
        self.places = [0, *cuts, len(profile.layers)]
        places = np.array(self.places)
        size = len(places) - 1
        fsum = np.concatenate([np.zeros((count, 1)), forward.cumsum(axis=1)], axis=1)[:, places]
        bsum = np.concatenate([np.zeros((count, 1)), backward.cumsum(axis=1)], axis=1)[:, places]
        self._fsum, self._bsum = fsum, bsum
        ahead = np.arange(size + 1)[None, :] > np.arange(size)[:, None]
        seg_f = np.where(ahead, fsum[:, None, :] - fsum[:, :-1, None], 0.0)
        seg = np.where(ahead, seg_f + bsum[:, None, :] - bsum[:, :-1, None], NEVER)
        again = seg + np.where(np.arange(size + 1) < size, seg_f, 0.0)
        deepest = min(max_devices, size)
        limits = np.array([(memory or {}).get(d, crowd.device(d).memory_bytes) for d in self._ids])
        kept = (
            self._depths(limits, deepest, False, compile_peak_bytes)
            if recompute != "always"
            else None
        )
        redone = (
            self._depths(limits, deepest, True, compile_peak_bytes)
            if recompute != "never"
            else None
        )
        dummy = np.full((1, size, size + 1), NEVER)
        nowhere = np.zeros((1, size, size + 1), np.int16)

        def with_dummy(array: np.ndarray, row: np.ndarray) -> np.ndarray:
            return np.concatenate([array, row], axis=0)

        self._modes: list[tuple[np.ndarray, np.ndarray, bool]] = []
        if kept is not None:
            self._modes.append((with_dummy(seg, dummy), with_dummy(kept, nowhere), False))
        if redone is not None:
            self._modes.append((with_dummy(again, dummy), with_dummy(redone, nowhere), True))
        self.usable = np.zeros(count + 1, bool)
        for _, depth, _ in self._modes:
            self.usable |= (depth > 0).any(axis=(1, 2))
        self.limits = limits
        sizes = [profile.cut_bytes(cut) for cut in cuts]
        self._down_bytes = np.array([0.0, *(down for down, _ in sizes), 0.0])
        self._back_bytes = np.array([0.0, *(back for _, back in sizes), 0.0])
        self._latency, self._per_byte = _links(crowd, self._ids)
        self._in_flight = [0] + [
            warmup_depths(schedule, depth, self.microbatches)[0] for depth in range(1, deepest + 1)
        ]

    def _depths(
        self, limits: np.ndarray, deepest: int, recompute: bool, compile_peak_bytes: int
    ) -> np.ndarray:
        """[device, first, end]: with how many stages to the end, itself included, it still fits."""
        places, size = self.places, len(self.places) - 1
        need = np.full((size, size + 1, deepest), np.inf)
        flights = [
            warmup_depths(self.schedule, depth, self.microbatches)[0]
            for depth in range(1, deepest + 1)
        ]
        for first in range(size):
            for end in range(first + 1, size + 1):
                last = end == size
                index, stages = (0, 1 if last else 3) if first == 0 else (2 if last else 1, 3)
                stage = Stage(
                    device=DeviceId("any"),
                    first_layer=places[first],
                    last_layer=places[end] - 1,
                    recompute=recompute,
                )
                # Not linear where an update's working memory hides behind the stash: all depths.
                for depth, in_flight in enumerate(flights, start=1):
                    if last and depth > 1:
                        break
                    need[first, end, depth - 1] = stage_memory(
                        self.profile,
                        stage,
                        stage_index=index,
                        num_stages=stages,
                        in_flight=in_flight,
                        compile_peak_bytes=compile_peak_bytes,
                    ).total_bytes
        need = np.maximum.accumulate(need, axis=2)
        self.least_bytes = float(need[0, size, 0])
        found = np.zeros((len(limits), size, size + 1), np.int16)
        for depth in range(deepest):
            found += limits[:, None, None] >= need[None, :, :, depth]
        return found

    def shortlist(self, members: Sequence[int]) -> list[int]:
        """The fastest members that can hold anything, the fastest first."""
        able = [d for d in members if self.usable[d]]
        return sorted(able, key=lambda d: (self.work_s[d], d))[: self.max_devices]

    def solve(self, sets: Sequence[Sequence[int]]) -> list[QuickPlan | None]:
        """The best plan found for each set of device indices; None where none was found."""
        found: list[QuickPlan | None] = [None] * len(sets)
        by_size: dict[int, list[int]] = {}
        lists = [self.shortlist(members) for members in sets]
        for place, devices in enumerate(lists):
            if devices:
                by_size.setdefault((len(devices) + 1) // 2 * 2, []).append(place)
        for width, all_places in sorted(by_size.items()):
            for start in range(0, len(all_places), 64):
                places = all_places[start : start + 64]
                rows = [lists[place] for place in places]
                for plan, place in zip(self._batch(rows, width), places, strict=True):
                    found[place] = plan
        return self._retry_by_memory(sets, lists, found)

    def _retry_by_memory(
        self,
        sets: Sequence[Sequence[int]],
        lists: list[list[int]],
        found: list[QuickPlan | None],
    ) -> list[QuickPlan | None]:
        """The fastest few may be short of memory where others are not."""
        for place, members in enumerate(sets):
            if found[place] is None and len(members) > self.max_devices:
                able = [d for d in members if self.usable[d]]
                rows = sorted(able, key=lambda d: (-self.limits[d], d))[: self.max_devices]
                if sorted(rows) != sorted(lists[place]) and rows:
                    rows.sort(key=lambda d: (self.work_s[d], d))
                    found[place] = self._batch([rows], len(rows))[0]
        return found

    def _batch(self, rows: list[list[int]], width: int) -> list[QuickPlan | None]:
        dummy = len(self._ids)
        fastest_first = np.array([row + [dummy] * (width - len(row)) for row in rows])
        rates = np.array(
            [
                [1.0 / max(self.work_s[d], 1e-30) for d in row] + [0.0] * (width - len(row))
                for row in rows
            ]
        )
        target = 1.0 / rates.sum(axis=1)
        best: list[QuickPlan | None] = [None] * len(rows)
        prices: dict[Chain, tuple[QuickPlan, float]] = {}
        for order in (fastest_first[:, ::-1], fastest_first):
            aim = target
            for _ in range(2):
                chains = self._descend(np.ascontiguousarray(order), aim)
                periods = np.array(aim)
                for place, chain in enumerate(chains):
                    if chain is None:
                        continue
                    if chain not in prices:
                        prices[chain] = self._priced(chain)
                    plan, period = prices[chain]
                    periods[place] = period
                    held = best[place]
                    if held is None or plan.step_s < held.step_s * (1 - 1e-12):
                        best[place] = plan
                aim = 0.5 * (target + periods)
        return best

    def _descend(self, order: np.ndarray, target: np.ndarray) -> list[Chain | None]:
        """The program itself, for a batch: `order` [sets, places], `target` period per set."""
        sets, width = order.shape
        size = len(self.places) - 1
        more = self.microbatches - 1
        batch = np.arange(sets)
        inner = np.arange(size)
        aim = target[:, None]
        shape = (sets, width, size + 1)
        period, first_s = np.full(shape, NEVER), np.full(shape, NEVER)
        head_s, depth = np.zeros(shape), np.zeros(shape, np.int16)
        to_place, to_device = np.full(shape, -1, np.int16), np.full(shape, -1, np.int16)
        pair = {"1f1b": 2.0, "eager": 3.0}.get(self.schedule)
        for place in range(width - 1, -1, -1):
            device = order[:, place]
            # The rest of the layers on this device alone.
            end_s = np.full((sets, size), NEVER)
            for seconds, fits, _ in reversed(self._modes):
                end_s = np.where(fits[device, :, size] >= 1, seconds[device, :, size], end_s)
            now_t, now_r, now_h = end_s, end_s, end_s
            now_d = np.ones((sets, size), np.int16)
            now_j, now_e = np.full((sets, size), size), np.full((sets, size), -1)
            if place < width - 1 and size > 1:
                later = order[:, place + 1 :]
                down, back = (
                    self._per_byte[device[:, None], later],
                    self._per_byte[later, device[:, None]],
                )
                wait = self._latency[device[:, None], later] + self._latency[later, device[:, None]]
                down_s = down[:, :, None] * self._down_bytes[None, None, :size]
                back_s = back[:, :, None] * self._back_bytes[None, None, :size]
                trip_s = wait[:, :, None] + down_s + back_s
                rest_t = np.maximum(np.maximum(period[:, place + 1 :, :size], down_s), back_s)
                rest_r = first_s[:, place + 1 :, :size] + trip_s
                rank = rest_r + more * np.maximum(rest_t, aim[:, :, None])
                which = rank.argmin(axis=1)
                at = (batch[:, None], which, inner[None, :])
                rest_t, rest_r, trip = rest_t[at], rest_r[at], trip_s[at]
                after = (batch[:, None], which + place + 1, inner[None, :])
                rest_d, rest_h = depth[after], head_s[after]
                seg_s = np.full((sets, size, size), NEVER)
                for seconds, fits, _ in reversed(self._modes):
                    fit = fits[device][:, :, :size] >= rest_d[:, None, :] + 1
                    seg_s = np.where(fit, seconds[device][:, :, :size], seg_s)
                whole_t = np.maximum(seg_s, rest_t[:, None, :])
                if pair is not None:
                    window = (seg_s + (rest_h + trip)[:, None, :]) / pair
                    whole_t = np.maximum(whole_t, window)
                whole_r = seg_s + rest_r[:, None, :]
                score = whole_r + more * np.maximum(whole_t, aim[:, :, None])
                chosen = score.argmin(axis=2)
                where = (batch[:, None], inner[None, :], chosen)
                split_t, split_r, split_h = whole_t[where], whole_r[where], seg_s[where]
                alone = end_s + more * np.maximum(end_s, aim)
                use = score[where] < alone
                now_t, now_r = np.where(use, split_t, now_t), np.where(use, split_r, now_r)
                now_h = np.where(use, split_h, now_h)
                pick = (batch[:, None], chosen)
                now_d = np.where(use, rest_d[pick] + 1, now_d)
                now_j = np.where(use, chosen, now_j)
                now_e = np.where(use, which[pick] + place + 1, now_e)
            period[:, place, :size], first_s[:, place, :size] = now_t, now_r
            head_s[:, place, :size], depth[:, place, :size] = now_h, now_d
            to_place[:, place, :size], to_device[:, place, :size] = now_j, now_e
        total = first_s[:, :, 0] + more * period[:, :, 0]
        start = total.argmin(axis=1)
        found: list[Chain | None] = []
        for row in range(sets):
            if total[row, start[row]] >= NEVER:
                found.append(None)
                continue
            chain, at_device, at_place = [], int(start[row]), 0
            while at_place < size:
                end = int(to_place[row, at_device, at_place])
                chain.append((int(order[row, at_device]), at_place, end))
                at_device, at_place = int(to_device[row, at_device, at_place]), end
            found.append(tuple(chain))
        return found

    def _stage_s(self, device: int, first: int, end: int, depth: int) -> tuple[float, float, bool]:
        forward = self._fsum[device, end] - self._fsum[device, first]
        backward = self._bsum[device, end] - self._bsum[device, first]
        redo = False
        for _, fits, recompute in self._modes:
            if fits[device, first, end] >= depth:
                redo = recompute
                break
        if end == len(self.places) - 1:
            return 0.0, float(forward + backward), redo
        return float(forward), float(backward + (forward if redo else 0.0)), redo

    def _priced(self, chain: Chain) -> tuple[QuickPlan, float]:
        """A chain of places as a plan of layers, with R_0 + (M - 1) T and T."""
        count = len(chain)
        stages = [self._stage_s(d, i, j, count - s) for s, (d, i, j) in enumerate(chain)]
        compute = [forward + backward for forward, backward, _ in stages]
        trips, downs, backs = [], [], []
        for (left, _, cut), (right, _, _) in pairwise(chain):
            down = float(self._per_byte[left, right] * self._down_bytes[cut])
            back = float(self._per_byte[right, left] * self._back_bytes[cut])
            trips.append(
                float(self._latency[left, right] + self._latency[right, left]) + down + back
            )
            downs.append(down)
            backs.append(back)
        if self.schedule == "gpipe":
            steady = max([f for f, _, _ in stages] + downs) + max([b for _, b, _ in stages] + backs)
        else:
            factor = 2 if self.schedule == "eager" else 1
            depths = [factor * (count - s) - (factor - 1) for s in range(count)]
            busiest = [max(pair) for pair in zip(downs, backs, strict=True)]
            steady = period_s(compute, trips, depths, busiest)
        step = sum(compute) + sum(trips) + (self.microbatches - 1) * steady
        layers = tuple((d, self.places[i], self.places[j]) for d, i, j in chain)
        return QuickPlan(step, layers), steady

    def plan(self, chain: Chain) -> PipelinePlan:
        """A chain as a plan."""
        place = {layer: index for index, layer in enumerate(self.places)}
        return PipelinePlan(
            stages=tuple(
                Stage(
                    device=DeviceId(self._ids[device]),
                    first_layer=first,
                    last_layer=end - 1,
                    recompute=self._stage_s(device, place[first], place[end], len(chain) - s)[2],
                )
                for s, (device, first, end) in enumerate(chain)
            ),
            num_layers=len(self.profile.layers),
            microbatches=self.microbatches,
            schedule=self.schedule,
        )

    def round_trips(self) -> np.ndarray:
        """[device, device]: the least seconds that a microbatch can pay for a cut between them."""
        if len(self.places) < 3:
            return np.full(self._latency.shape, NEVER)
        wait = self._latency + self._latency.T
        down, back = self._down_bytes[1:-1], self._back_bytes[1:-1]
        best = np.full(wait.shape, NEVER)
        for down_bytes, back_bytes in {
            (float(a), float(b)) for a, b in zip(down, back, strict=True)
        }:
            best = np.minimum(best, self._per_byte * down_bytes + self._per_byte.T * back_bytes)
        return wait + best


def _links(crowd: Crowd, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Latency and seconds per byte of every ordered pair, with a dummy device at the end.

    As `Crowd.link` says, but for all pairs at once.
    """
    count = len(ids)
    latency = np.full((count + 1, count + 1), NEVER)
    per_byte = np.full((count + 1, count + 1), NEVER)
    if crowd.default_link is not None:
        latency[:count, :count] = crowd.default_link.latency_s
        per_byte[:count, :count] = 1.0 / crowd.default_link.bandwidth_bytes_per_s
    access = [crowd.device(device).access for device in ids]
    having = np.array([index for index, way in enumerate(access) if way is not None], int)
    if len(having):
        ways = [way for way in access if way is not None]
        up = np.array([way.uplink_bytes_per_s for way in ways])
        down = np.array([way.downlink_bytes_per_s for way in ways])
        wait = np.array([way.latency_s for way in ways])
        at = np.ix_(having, having)
        per_byte[at] = 1.0 / np.minimum(up[:, None], down[None, :])
        latency[at] = wait[:, None] + wait[None, :]
        if crowd.medium == "shared_cell":  # within a cell both ways take turns, see `Crowd`
            cells = np.array([way.cell for way in ways])
            same = (cells[:, None] == cells[None, :]) & (cells != "")[:, None]
            per_byte[at] = np.where(same, 1.0 / up[:, None] + 1.0 / down[None, :], per_byte[at])
        if crowd.backhaul is not None:
            cells = np.array([way.cell for way in ways])
            apart = cells[:, None] != cells[None, :]
            slow = 1.0 / crowd.backhaul.bandwidth_bytes_per_s
            per_byte[at] = np.where(apart, np.maximum(per_byte[at], slow), per_byte[at])
            latency[at] += np.where(apart, crowd.backhaul.latency_s, 0.0)
    index = {device: place for place, device in enumerate(ids)}
    for link in crowd.links:
        if link.source in index and link.target in index:
            at = (index[link.source], index[link.target])
            latency[at], per_byte[at] = link.latency_s, 1.0 / link.bandwidth_bytes_per_s
    np.fill_diagonal(latency, NEVER)
    np.fill_diagonal(per_byte, NEVER)
    return latency, per_byte


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickSolver:
    """The module's dynamic program as a partition solver, for one problem at a time."""

    max_cuts: int = 15
    max_devices: int = 12

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem without pins, bans on layers or required devices.

        Raises:
            InvalidValueError: The problem has rules that the program does not know.
            InfeasibleError: It found no plan, which is no proof that there is none.
        """
        started_s = time.monotonic()
        if (
            problem.pins or problem.requires or problem.min_stages > 1
            or any(not isinstance(ban, str) for ban in problem.bans)
            or problem.snapshots or problem.log_steps
        ):  # fmt: skip
            raise InvalidValueError(
                "the quick solver knows no pins, layer bans, required devices, snapshots or logs;"
                " use solver 'ilp'"
            )
        ids = sorted(problem.allowed_devices)
        most = min(self.max_devices, problem.max_stages or self.max_devices)
        tables = QuickTables(
            problem.profile,
            problem.crowd,
            ids,
            schedule=problem.schedule,
            recompute=problem.recompute,
            compile_peak_bytes=problem.compile_peak_bytes,
            max_cuts=self.max_cuts,
            max_devices=most,
        )
        best = tables.solve([range(len(ids))])[0] if ids else None
        if best is None:
            raise InfeasibleError(
                f"the quick solver found no plan over {len(ids)} devices\n"
                '  try      solver "ilp", which proves it and says what is short'
            )
        plan = tables.plan(best.chain)
        predicted: Any = predict(
            problem.profile, problem.crowd, plan, compile_peak_bytes=problem.compile_peak_bytes
        )
        return PartitionResult(
            plan=plan,
            predicted=predicted,
            problem=problem,
            optimal=False,
            gap=None,
            solve_s=time.monotonic() - started_s,
            solver="quick",
        )
