"""Asteroid's planner: hybrid pipelines over groups of unequal devices, in full."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...problem import PartitionProblem, PartitionResult
from .layout import (
    Layout,
    Limits,
    Unit,
    islands,
    mode_seconds,
    nothing_fits,
    order_for_pins,
    pin_note,
    repair,
    result,
)
from .rounds import between, ring_s


@dataclass(frozen=True, slots=True, kw_only=True)
class AsteroidSolver:
    """Cuts, groups and shares of rows for the least round latency, devices sorted by memory.

    Problem: cut the layers into `P` stages and the devices, sorted by memory with the roomiest
    first, into `P` consecutive groups, one per stage; a group splits each microbatch's rows. A
    round of M microbatches takes what `rounds` counts over `2 P - 1` steps (stages and transfers).
    Variables: `P`, where stages end, where groups end, rows per device.

    Program over suffixes (Alg. 2): Q(l, n, p) is the best round of the last `l` layers on the last
    `n` devices in `p` stages; each way to put a head stage before a smaller Q is tried, and its
    dominant step found anew. Rows within a stage (Alg. 1): in proportion to speed over the stage's
    layers, capped by memory, what is over given to the uncapped; then blocks of one row go from
    the slowest to the fastest with room while the slowest gets faster. A stage holds
    K_p = 2 (P - p) - 1 microbatches (p from 0), which memory counts and schedule "eager" runs.

    Complexity: O(L^2 D^2 P) head stages, as arrays over (first, end) for each run of devices;
    Alg. 1 once per run of devices and depth.

    Source: Asteroid (MobiCom 2024, arXiv 2408.08015): K_p (paper's section 3.2) and the steps by
    two re-implementations, and it follows from them; Eqs. 3-6 and Algs. 1 and 2 by two; the
    dominant step (Eq. 11) by one; the sort by memory quoted by a fourth. The paper's text could
    not be read.

    Left open, and fixed here:
    - groups have one device where `problem.share` is not set, and over layers that have state over
      rows; with it, rows are whole and the rest after rounding down goes, row by row, where it
      ends soonest;
    - a device whose share rounds to no row is left out of its stage (there: not said);
    - all devices (as published: `all_devices=True`) or any run of the sorted ones, whichever is
      better: slow devices with little memory need not slow a pipeline down;
    - ties of memory: the lower id; ties of latency: fewer stages, then earlier devices and cuts;
    - a transfer: bytes down and back over the slowest link of each direction between the groups,
      plus latency (there one bandwidth, no latency);
    - memory: ours, with everything a stage needs, at K_p in flight (there weights, optimizer and
      activations); the number of microbatches and rows is the problem's;
    - under another schedule than "eager" memory counts that schedule's depth, and the plan runs it;
    - recomputation "auto" (not in the paper): where a stage does not fit otherwise;
    - several crowds that are not linked with each other: each is planned alone, the best is taken;
    - what the rule does not know (pins, required devices, links that are missing, stage limits) it
      is given as limits of a stage. Devices pinned to layers stand where those are. If nothing is
      found, the repair: one device a stage, as even a cut as fits, in the sorted order, the fewest
      devices left out.
    """

    all_devices: bool = False
    """Use every allowed device, as published, even where fewer are better."""

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: Neither the rule nor its repair finds a plan.
        """
        started_s = time.monotonic()
        limits, notes = Limits(problem), []
        given = sorted(
            problem.allowed_devices,
            key=lambda device: (-problem.crowd.device(device).memory_bytes, device),
        )
        order = order_for_pins(problem, given)
        notes.append(pin_note(given, order))
        if problem.schedule != "eager":
            notes.append(
                f"asteroid's depth 2 (P - p) - 1 needs schedule 'eager'; this is"
                f" {problem.schedule!r} with its own"
            )
        best: tuple[float, Layout] | None = None
        for island in islands(limits, order):
            if not set(problem.requires) <= set(island):
                continue
            found = _Planner(limits, island, whole=self.all_devices).best()
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        if best is None:
            layers, count = problem.num_layers, min(len(order), problem.num_layers)
            units = [
                Unit((device,), layers * min(place + 1, count) // count, wanted=place < count)
                for place, device in enumerate(order)
            ]
            repaired = repair(limits, units)
            if repaired is None:
                raise nothing_fits(
                    problem, "asteroid", f"its program, and every chain in the order {order}"
                )
            best = 0.0, repaired[0]
            notes.append("repaired: its own program finds no plan; one device a stage, evenly cut")
        layout = best[1]
        warmups = None
        if problem.schedule == "eager":
            most = problem.microbatches
            warmups = [min(2 * (len(layout) - p) - 1, most) for p in range(len(layout))]
        return result(
            limits,
            limits.plan(layout, warmups),
            solver="asteroid",
            started_s=started_s,
            notes=notes,
        )


@dataclass(frozen=True, slots=True)
class _Stage:
    """One run of devices as a stage, over (first, end): rows per device, and times."""

    rows: np.ndarray
    """(devices, first, end)."""
    forward_s: np.ndarray
    """inf where it does not fit."""
    backward_s: np.ndarray


class _Planner:
    """Alg. 2 over one order of devices."""

    def __init__(self, limits: Limits, order: Sequence[str], *, whole: bool) -> None:
        self.limits, self.order, self.whole = limits, tuple(order), whole
        self.problem = limits.problem
        self.layers, self.count = limits.num_layers, len(order)
        self._forward, self._backward = [], []
        for device in order:
            forward, backward = (
                np.array([0.0, *np.cumsum(row)]) for row in mode_seconds(self.problem, device)
            )
            self._forward.append(forward[None, :] - forward[:-1, None])
            self._backward.append(backward[None, :] - backward[:-1, None])
        self._empty = ~np.triu(np.ones((self.layers, self.layers + 1), dtype=bool), 1)
        self._stages: dict[tuple[int, int, int], _Stage | None] = {}
        self._rings: dict[tuple[int, int], np.ndarray | None] = {}
        self._wires: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray] | None] = {}

    def stage(self, start: int, stop: int, depth: int) -> _Stage | None:
        """Devices `start .. stop - 1` as a stage with `depth` stages to the end."""
        key = start, stop, self.limits.in_flight(depth)
        if key not in self._stages:
            self._stages[key] = self._stage(start, stop, depth)
        return self._stages[key]

    def _stage(self, start: int, stop: int, depth: int) -> _Stage | None:
        if stop - start > 1 and not self.problem.share:
            return None
        if self.ring(start, stop) is None:
            return None
        found = self._in_mode(start, stop, depth, self.limits.modes[0])
        for recompute in self.limits.modes[1:]:
            other = self._in_mode(start, stop, depth, recompute)
            worse = np.isinf(found.forward_s)
            found = _Stage(
                np.where(worse, other.rows, found.rows),
                np.where(worse, other.forward_s, found.forward_s),
                np.where(worse, other.backward_s, found.backward_s),
            )
        return found if np.isfinite(found.forward_s).any() else None

    def _in_mode(self, start: int, stop: int, depth: int, recompute: bool) -> _Stage:
        members = range(start, stop)
        forward = np.stack([self._forward[d] for d in members])
        backward = np.stack([self._backward[d] for d in members])
        if recompute and self.problem.recompute == "auto":
            backward = backward + forward
        caps = np.stack([self.limits.caps(self.order[d], recompute, depth) for d in members])
        rows = share_rows(forward + backward, caps, self.limits.rows)
        part = rows / self.limits.rows
        fits = (rows.sum(axis=0) == self.limits.rows) & ~self._empty
        for place, device in enumerate(members):
            if self.order[device] in self.problem.requires:
                fits &= rows[place] > 0
        if stop - start > 1:
            fits &= ~self.limits.mixing
        return _Stage(
            rows,
            np.where(fits, (part * forward).max(axis=0), np.inf),
            np.where(fits, (part * backward).max(axis=0), np.inf),
        )

    def ring(self, start: int, stop: int) -> np.ndarray | None:
        """All-reduce of the group over (first, end); None where a pair has no link."""
        if (start, stop) not in self._rings:
            self._rings[start, stop] = ring_s(self.problem, self.order[start:stop])
        return self._rings[start, stop]

    def wires(self, start: int, stop: int, after: int):
        """Seconds down and back per cut between two neighbouring groups."""
        key = start, stop, after
        if key not in self._wires:
            self._wires[key] = between(self.problem, self.order[start:stop], self.order[stop:after])
        return self._wires[key]

    def best(self) -> tuple[float, Layout] | None:
        """The least round latency and its layout; None where nothing fits."""
        problem, layers, count = self.problem, self.layers, self.count
        most = min(count, layers, problem.max_stages or count)
        microbatches = problem.microbatches
        must = [i for i, device in enumerate(self.order) if device in problem.requires]
        first_must, last_must = (must[0], must[-1]) if must else (count, -1)
        if self.whole:
            first_must, last_must = 0, count - 1
        shape = (most + 1, count + 1, layers + 1)
        # A state is (stages, first device, first layer): the two terms of `rounds`, and the choice.
        paced = np.full(shape, np.inf)
        late = np.full(shape, np.inf)
        ends = np.zeros(shape, dtype=int)
        stops = np.zeros(shape, dtype=int)
        at = np.arange(layers)
        for depth in range(1, most + 1):
            for start in reversed(range(count)):
                for stop in range(start + 1, count + 1):
                    head = self.stage(start, stop, depth)
                    ring = self.ring(start, stop)
                    if head is None or ring is None:
                        continue
                    both = head.forward_s + head.backward_s
                    if depth == 1:
                        if stop <= last_must:
                            continue
                        pace = microbatches * both[:, layers]
                        delay = ring[:, layers]
                        chosen = np.full(layers, layers)
                    else:
                        if stop >= count:
                            continue
                        found = self._prepend(
                            head, ring, start, stop,
                            paced[depth - 1, stop], late[depth - 1, stop], stops[depth - 1, stop],
                        )  # fmt: skip
                        chosen = np.argmin(found[0] + found[1], axis=1)
                        pace, delay = found[0][at, chosen], found[1][at, chosen]
                    now = paced[depth, start, :layers] + late[depth, start, :layers]
                    nearer = np.flatnonzero(pace + delay < now)
                    paced[depth, start, nearer] = pace[nearer]
                    late[depth, start, nearer] = delay[nearer]
                    ends[depth, start, nearer] = chosen[nearer]
                    stops[depth, start, nearer] = stop
        least, start_at = np.inf, (0, 0)
        for depth in range(max(1, problem.min_stages), most + 1):
            for start in range(min(first_must + 1, count)):
                total = paced[depth, start, 0] + late[depth, start, 0]
                if total < least:
                    least, start_at = total, (depth, start)
        if np.isinf(least):
            return None
        return float(least), self._layout(*start_at, ends, stops)

    def _prepend(
        self, head: _Stage, ring: np.ndarray, start: int, stop: int,
        paced: np.ndarray, late: np.ndarray, stops: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Both terms over (first, end) with a head stage before the best rest from `end` on."""
        down, back = np.full_like(paced, np.inf), np.full_like(paced, np.inf)
        for after in np.unique(stops[np.isfinite(paced)]):
            wires = self.wires(start, stop, int(after))
            if wires is not None:
                here = stops == after
                down[here], back[here] = wires[0][here], wires[1][here]
        microbatches = self.problem.microbatches
        both, link = head.forward_s + head.backward_s, down + back
        with np.errstate(invalid="ignore"):  # inf - inf where nothing fits anyway
            pace = np.maximum(microbatches * both, both + microbatches * link)
            pace = np.maximum(pace, both + link + paced)
            delay = np.maximum(ring, -head.backward_s)
            delay = np.maximum(delay, late - back - head.backward_s)
        bad = ~np.isfinite(pace) | ~np.isfinite(delay)
        return np.where(bad, np.inf, pace), np.where(bad, np.inf, delay)

    def _layout(self, depth: int, start: int, ends: np.ndarray, stops: np.ndarray) -> Layout:
        found, first = [], 0
        while depth:
            end, stop = int(ends[depth, start, first]), int(stops[depth, start, first])
            stage = self.stage(start, stop, depth)
            assert stage is not None, "chosen stages exist"
            rows = [int(value) for value in stage.rows[:, first, end]]
            members = [(d, r) for d, r in zip(self.order[start:stop], rows, strict=True) if r]
            shares = tuple(r for _, r in members) if len(members) > 1 else ()
            found.append((Unit(tuple(d for d, _ in members), end, shares), end))
            first, start, depth = end, stop, depth - 1
        return tuple(found)


def share_rows(seconds: np.ndarray, caps: np.ndarray, total: int) -> np.ndarray:
    """Asteroid's Alg. 1 for many stages at once: whole rows per device.

    Args:
        seconds: (devices, ...): forward and backward of all `total` rows on each device.
        caps: (devices, ...): rows that memory lets it have.
        total: Rows to give.

    Returns:
        (devices, ...): rows; they add up to less than `total` where memory has no room for all.
    """
    count, shape = len(seconds), seconds.shape
    seconds = np.maximum(seconds.reshape(count, -1).T, 1e-12)  # free layers: as good as alike
    caps = caps.reshape(count, -1).T
    speed = 1.0 / seconds
    given = np.zeros(seconds.shape)
    free = caps > 0
    for _ in range(count):
        left = total - given.sum(axis=1, where=~free)
        weight = np.where(free, speed, 0.0)
        want = left[:, None] * weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
        over = free & (want >= caps)
        given = np.where(over, caps, np.where(free, want, given))
        if not over.any():
            break
        free &= ~over
    rows = np.minimum(np.floor(given + 1e-9), caps).astype(np.int64)
    lines = np.arange(len(rows))
    while True:  # what rounding down left: one row at a time to where it ends soonest
        left = total - rows.sum(axis=1)
        after = np.where(rows < caps, (rows + 1) * seconds, np.inf)
        soonest = np.argmin(after, axis=1)
        give = (left > 0) & np.isfinite(after[lines, soonest])
        if not give.any():
            break
        rows[lines[give], soonest[give]] += 1
    while True:  # blocks of one row from the slowest to the fastest with room
        busy = rows * seconds
        slowest = np.argmax(busy, axis=1)
        after = np.where(rows < caps, (rows + 1) * seconds, np.inf)
        after[lines, slowest] = np.inf
        fastest = np.argmin(after, axis=1)
        moved = rows.copy()
        moved[lines, slowest] -= 1
        moved[lines, fastest] += 1
        falls = np.isfinite(after[lines, fastest]) & (rows[lines, slowest] > 0)
        falls &= (moved * seconds).max(axis=1) < busy.max(axis=1) * (1 - 1e-12)
        if not falls.any():
            break
        rows = np.where(falls[:, None], moved, rows)
    return rows.T.reshape(shape)


__all__ = ["AsteroidSolver", "share_rows"]
