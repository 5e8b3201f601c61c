"""A partition problem as tables: which segments fit where, and what each takes.

A segment is (device, first layer, end layer); a chain of segments that covers all layers on
distinct linked devices is a plan. Devices stand in the order of their ids, so that the order of a
crowd changes nothing. The closed form of a chain's step time is here too, in the shape that the
solvers optimise: R_0 + (M - 1) T (`core.cost` has sharper forms, which no program could hold).

Where the problem's schedule is not one that the closed form knows (`zb-h1`, plug-ins), `schedule`
is the one that stands for it, and `evaluate_s` and `plan` speak of the problem's own.

It knows costs and limits, no search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from ...core import (
    CutTimes,
    DeviceId,
    PipelinePlan,
    Stage,
    StageTimes,
    WireDtype,
    evaluate_step_s,
    make_schedule,
    occupied_s,
    pair_times,
    search_schedule,
    stage_memory,
    warmup_depths,
)
from ..problem import PartitionProblem
from .stand_in import OwnSchedule

SLACK = 1e-9
"""Relative difference below which two times count as equal."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers `first .. end - 1` on one device."""

    device: int
    """Index into `Tables.devices`."""
    first: int
    end: int
    recompute: bool
    forward_s: float
    backward_s: float
    max_depth: int
    """It fits in memory while at most this many stages, itself included, remain to the end."""

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True)
class Cut:
    """What one microbatch costs between two devices at one cut."""

    round_trip_s: float
    down_s: float
    """Seconds that it occupies the link downstream, without latency."""
    back_s: float
    busiest_s: float
    """Seconds that its busier direction is occupied; both, where they share a channel."""


Chain = tuple[Segment, ...]


class Tables:
    """Costs and limits of one problem.

    Args:
        ignore_memory, ignore_links, ignore_rules: Relaxations, by which an infeasible problem is
            explained: every device holds anything, every pair is linked, no pins, bans or counts.
        like: Tables of the same problem but for its devices (some of them) or schedule. What they
            know of memory and links holds here, too.
    """

    has_windows = True
    """Whether windows of several stages bound the period, see `period_s`."""

    def __init__(
        self,
        problem: PartitionProblem,
        *,
        ignore_memory: bool = False,
        ignore_links: bool = False,
        ignore_rules: bool = False,
        like: Tables | None = None,
    ) -> None:
        self.problem = problem
        self.num_layers = problem.num_layers
        self.microbatches = problem.microbatches
        self.schedule = search_schedule(problem.schedule)
        self.stands_in = self.schedule != problem.schedule
        """Whether the closed form is that of another schedule: it ranks, and proves nothing."""
        self._own = OwnSchedule(problem.schedule, problem.microbatches, self._holds)
        self.shares_air = problem.crowd.medium == "shared_cell"
        """Whether T depends on which cuts share a cell, which solvers see in whole chains alone."""
        self.wire_dtype: WireDtype | None = (
            problem.wire_dtype if problem.wire_dtype == "bfloat16" else None
        )
        """What every cut casts to; "auto" is decided on the finished plan."""
        count = len(problem.crowd.devices)
        self.min_stages, most, required = 1, count, ()
        if ignore_rules:
            self.devices = tuple(sorted(device.id for device in problem.crowd.devices))
        else:
            self.devices = tuple(sorted(problem.allowed_devices))
            self.min_stages, required = problem.min_stages, problem.requires
            most = count if problem.max_stages is None else problem.max_stages
            if not set(required) <= set(self.devices):
                most = 0  # no chain has a stage on each of them
        self.max_stages = min(len(self.devices), self.num_layers, most)
        self.required = frozenset(
            self.devices.index(device) for device in required if device in self.devices
        )
        self._ignore_memory = ignore_memory
        self._ignore_links = ignore_links
        self._ignore_rules = ignore_rules
        self._like = like
        self._like_index = [] if like is None else [like.devices.index(d) for d in self.devices]
        self._memory = self._memory_lines() if like is None else like._memory
        self._updates: list[list[float]] = []
        """Per device, update seconds of the layers before each layer."""
        self._weights: list[list[float]] = []
        """The same of the weight parts of backwards."""
        self._segments = self._build_segments()
        self._cuts: dict[tuple[int, int, int], Cut | None] = {}
        self._wired: dict[tuple[int, int, int], CutTimes] = {}
        self._needs: dict[tuple[int, int, bool, int, int], int] = {}

    # Memory is linear in the microbatches in flight, so two points give the line.
    def _memory_lines(self) -> dict[tuple[int, int, bool], tuple[int, int]]:
        lines = {}
        modes = {"never": (False,), "always": (True,), "auto": (False, True)}
        for first in range(self.num_layers):
            for end in range(first + 1, self.num_layers + 1):
                for recompute in modes[self.problem.recompute]:
                    # On the last stage recomputing changes nothing.
                    if recompute and end == self.num_layers and self.problem.recompute == "auto":
                        continue
                    one, two = (
                        segment_memory(self.problem, first, end, recompute, in_flight)
                        for in_flight in (1, 2)
                    )
                    lines[first, end, recompute] = (one, two - one)
        return lines

    def in_flight(self, depth: int) -> int:
        """Microbatches in flight on a stage after which `depth - 1` more come."""
        return warmup_depths(self.schedule, depth, self.microbatches)[0]

    def _build_segments(self) -> dict[tuple[int, int, int], tuple[Segment, ...]]:
        problem, found = self.problem, {}
        in_flight = [0] + [self.in_flight(depth) for depth in range(1, self.max_stages + 1)]
        for index, device in enumerate(self.devices):
            limit = problem.crowd.device(device).memory_bytes
            rows = problem.profile.layer_seconds(problem.crowd, device)
            self._updates.append([0.0, *accumulate(row.update_s for row in rows)])
            self._weights.append([0.0, *accumulate(problem.profile.weight_seconds(rows))])
            if not self._ignore_memory and problem.compile_peak_bytes > limit:
                continue
            forward = [0.0, *accumulate(row.forward_s for row in rows)]
            backward = [0.0, *accumulate(row.backward_s for row in rows)]
            allowed = [
                self._ignore_rules or problem.allows(device, layer)
                for layer in range(self.num_layers)
            ]
            for first in range(self.num_layers):
                for end in range(first + 1, self.num_layers + 1):
                    if not allowed[end - 1]:
                        break
                    options: list[Segment] = []
                    for recompute in (False, True):
                        line = self._memory.get((first, end, recompute))
                        if line is None:
                            continue
                        depth = self._fitting_depth(line, limit, in_flight)
                        if depth <= (options[0].max_depth if options else 0):
                            continue  # no room, or no more of it than where nothing is recomputed
                        forward_s = forward[end] - forward[first]
                        backward_s = backward[end] - backward[first]
                        if end == self.num_layers:
                            forward_s, backward_s = 0.0, forward_s + backward_s
                        elif recompute:
                            backward_s += forward_s
                        options.append(
                            Segment(index, first, end, recompute, forward_s, backward_s, depth)
                        )
                    if options:
                        found[index, first, end] = tuple(options)
        return found

    def _fitting_depth(self, line: tuple[int, int], limit: int, in_flight: Sequence[int]) -> int:
        if self._ignore_memory:
            return self.max_stages
        base, more = line
        depth = 0
        while depth < self.max_stages and base + (in_flight[depth + 1] - 1) * more <= limit:
            depth += 1
        return depth

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All that fit somewhere in a chain."""
        return tuple(segment for options in self._segments.values() for segment in options)

    @cached_property
    def twins(self) -> tuple[tuple[int, ...], ...]:
        """Per device, those of a lower number that are alike in all that a plan could tell."""
        problem, count = self.problem, len(self.devices)
        crowd = problem.crowd

        def own(device: int) -> object:
            name = self.devices[device]
            return (
                problem.profile.layer_seconds(crowd, name),
                crowd.device(name).memory_bytes,
                device in self.required,
                self.shares_air and crowd.channels(name, name),
                [problem.allows(name, layer) for layer in range(self.num_layers)],
            )

        def wire(source: int, target: int) -> object:
            link = crowd.link(self.devices[source], self.devices[target])
            return None if link is None else (link.bandwidth_bytes_per_s, link.latency_s)

        def alike(one: int, two: int) -> bool:
            others = [device for device in range(count) if device not in (one, two)]
            return wire(one, two) == wire(two, one) and all(
                wire(one, other) == wire(two, other) and wire(other, one) == wire(other, two)
                for other in others
            )

        owns = [own(device) for device in range(count)]
        return tuple(
            tuple(b for b in range(a) if owns[a] == owns[b] and alike(a, b)) for a in range(count)
        )

    def at(self, device: int, first: int, end: int, depth: int = 1) -> Segment | None:
        """The fastest way to run these layers there with `depth` stages to the end, if any."""
        for segment in self._segments.get((device, first, end), ()):
            if segment.max_depth >= depth:
                return segment
        return None

    def cut(self, source: int, target: int, layer: int) -> Cut | None:
        """The cut before `layer` between two devices; None where they cannot talk both ways."""
        key = (source, target, layer)
        if key not in self._cuts:
            if self._like is None:
                self._cuts[key] = self._cut(source, target, layer)
            else:
                known = self._like_index
                self._cuts[key] = self._like.cut(known[source], known[target], layer)
        return self._cuts[key]

    def _cut(self, source: int, target: int, layer: int) -> Cut | None:
        if source == target:
            return None
        crowd = self.problem.crowd
        down = crowd.link(self.devices[source], self.devices[target])
        back = crowd.link(self.devices[target], self.devices[source])
        if down is None or back is None:
            return Cut(0.0, 0.0, 0.0, 0.0) if self._ignore_links else None
        forward_bytes, backward_bytes = self.problem.profile.cut_bytes(layer, self.wire_dtype)
        return Cut(
            down.transfer_s(forward_bytes) + back.transfer_s(backward_bytes),
            forward_bytes / down.bandwidth_bytes_per_s,
            backward_bytes / back.bandwidth_bytes_per_s,
            self._cut_times(source, target, layer).busiest_s,
        )

    def chain(self, cuts: Sequence[tuple[int, int]]) -> Chain | None:
        """The chain of (device, end layer) pairs, or None where it breaks a rule or a limit."""
        count = len(cuts)
        devices = [device for device, _ in cuts]
        if not self.min_stages <= count <= self.max_stages or len(set(devices)) != count:
            return None
        if not self.required.issubset(devices):
            return None
        first, found = 0, []
        for position, (device, end) in enumerate(cuts):
            segment = self.at(device, first, end, count - position) if end > first else None
            if segment is None:
                return None
            if position and self.cut(devices[position - 1], device, first) is None:
                return None
            found.append(segment)
            first = end
        return tuple(found) if first == self.num_layers else None

    def period_s(self, chain: Chain) -> float:
        """T of a chain under the problem's schedule, as `core.cost` defines it.

        With the occupation of cells that several cuts share, which the programs' own T has not.
        """
        own_s = self._own_period_s(chain)
        if not self.shares_air or own_s == math.inf:
            return own_s
        return max([own_s, *occupied_s(self.times(chain)[1]).values()])

    def _own_period_s(self, chain: Chain) -> float:
        cuts = [self.cut(left.device, right.device, right.first) for left, right in pairwise(chain)]
        if any(cut is None for cut in cuts):
            return math.inf
        known = [cut for cut in cuts if cut is not None]
        if self.schedule == "gpipe":
            down = max([s.forward_s for s in chain] + [cut.down_s for cut in known])
            back = max([s.backward_s for s in chain] + [cut.back_s for cut in known])
            return down + back
        slowest = max((cut.busiest_s for cut in known), default=0.0)
        if not self.has_windows:
            return max(slowest, *(segment.compute_s for segment in chain))
        step = 2 if self.schedule == "eager" else 1
        for first in range(len(chain)):
            window_s = 0.0
            for last in range(first, len(chain)):
                window_s += chain[last].compute_s
                if last > first:
                    window_s += known[last - 1].round_trip_s
                slowest = max(slowest, window_s / (step * (last - first) + 1))
        return slowest

    def first_microbatch_s(self, chain: Chain) -> float:
        """R_0 of a chain: one microbatch down and back."""
        total = math.fsum(segment.compute_s for segment in chain)
        for left, right in pairwise(chain):
            cut = self.cut(left.device, right.device, right.first)
            total += math.inf if cut is None else cut.round_trip_s
        return total

    def evaluate_s(self, chain: Chain) -> float:
        """Step time of a chain by the exact timeline, updates included.

        Infinity where the problem's schedule keeps more in flight than memory holds, which the one
        that stands for it may not.
        """
        stages, cuts = self.times(chain)
        if self.stands_in:
            return self._own.best(chain, stages, cuts)[0]
        schedule = make_schedule(self.schedule, len(chain), self.microbatches)
        return evaluate_step_s(schedule, stages, cuts)

    def _holds(self, segment: Segment, in_flight: int, awaiting_weight: int) -> bool:
        if self._ignore_memory:
            return True
        key = (segment.first, segment.end, segment.recompute, in_flight, awaiting_weight)
        if key not in self._needs:
            self._needs[key] = segment_memory(self.problem, *key)
        limit = self.problem.crowd.device(self.devices[segment.device]).memory_bytes
        return self._needs[key] <= limit

    def times(self, chain: Chain) -> tuple[list[StageTimes], list[CutTimes]]:
        """What the exact timeline wants to know of a chain."""
        stages = []
        for segment in chain:
            updates, weights = self._updates[segment.device], self._weights[segment.device]
            weight_s = weights[segment.end] - weights[segment.first]
            stages.append(
                StageTimes(
                    forward_s=segment.forward_s,
                    backward_s=segment.backward_s,
                    update_s=updates[segment.end] - updates[segment.first],
                    weight_s=min(max(weight_s, 0.0), segment.backward_s),
                )
            )
        cuts = [
            self._cut_times(left.device, right.device, right.first)
            for left, right in pairwise(chain)
        ]
        return stages, cuts

    def recomputed(self, segment: Segment) -> Segment:
        """The segment with its forward recomputed; itself where that changes nothing."""
        if segment.recompute or segment.end == self.num_layers:
            return segment
        backward_s = segment.backward_s + segment.forward_s
        return replace(segment, recompute=True, backward_s=backward_s)

    def most_in_flight(self, segment: Segment) -> int:
        """Microbatches in flight that the segment's device has memory for."""
        if self._ignore_memory:
            return self.microbatches
        base, more = self._memory[segment.first, segment.end, segment.recompute]
        limit = self.problem.crowd.device(self.devices[segment.device]).memory_bytes
        if base > limit:
            return 0
        return self.microbatches if more <= 0 else 1 + (limit - base) // more

    def _cut_times(self, source: int, target: int, layer: int) -> CutTimes:
        key = (source, target, layer)
        if key not in self._wired and self._like is not None:
            known = self._like_index
            self._wired[key] = self._like._cut_times(known[source], known[target], layer)
        if key not in self._wired:
            problem = self.problem
            self._wired[key] = pair_times(
                problem.crowd,
                [(self.devices[source], self.devices[target])],
                *problem.profile.cut_bytes(layer, self.wire_dtype),
            )
        return self._wired[key]

    def cost_s(self, chain: Chain) -> float:
        """The objective: R_0 + (M - 1) T."""
        return self.first_microbatch_s(chain) + (self.microbatches - 1) * self.period_s(chain)

    def rank(self, chain: Chain) -> tuple[tuple[str, int], ...]:
        """Orders chains of equal cost: lower device ids first, stage by stage."""
        return tuple((self.devices[segment.device], segment.end) for segment in chain)

    def plan(self, chain: Chain) -> PipelinePlan:
        """The chain as a plan."""
        warmups: Sequence[int | None] = (None,) * len(chain)
        if self.stands_in:
            warmups = self._own.best(chain, *self.times(chain))[1]
        return PipelinePlan(
            stages=tuple(
                Stage(
                    device=DeviceId(self.devices[segment.device]),
                    first_layer=segment.first,
                    last_layer=segment.end - 1,
                    recompute=segment.recompute,
                    warmup=warmup,
                    wire_dtype=self.wire_dtype if segment.end < self.num_layers else None,
                )
                for segment, warmup in zip(chain, warmups, strict=True)
            ),
            num_layers=self.num_layers,
            microbatches=self.microbatches,
            schedule=self.problem.schedule,
        )


def segment_memory(
    problem: PartitionProblem,
    first: int,
    end: int,
    recompute: bool,
    in_flight: int,
    awaiting_weight: int = 0,
) -> int:
    """Bytes that layers `first .. end - 1` take while training, without the compile peak."""
    position = (0 if first == 0 else 1) if end < problem.num_layers else 2
    index, count = {0: (0, 3), 1: (1, 3), 2: (0, 1) if first == 0 else (2, 3)}[position]
    return stage_memory(
        problem.profile,
        Stage(device=DeviceId("any"), first_layer=first, last_layer=end - 1, recompute=recompute),
        stage_index=index,
        num_stages=count,
        in_flight=in_flight,
        awaiting_weight=awaiting_weight,
        snapshots=problem.snapshots,
        log_steps=problem.log_steps,
        compile_peak_bytes=0,
    ).total_bytes
