"""Cuts by equal parameter bytes: what frameworks call a balanced split by parameters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...problem import PartitionProblem, PartitionResult
from .layout import Limits, Unit, apart, order_for_pins, pin_note, repaired_chain


@dataclass(frozen=True, slots=True, kw_only=True)
class ByParamsSolver:
    """Equal parameter bytes per device, in the order of `problem.devices` (or of the crowd).

    Problem: cut `L` layers for `S` devices so that each holds about as many parameters. The end of
    stage `s` is the boundary at which the bytes before it are nearest to `s / S` of all.

    Complexity: O(L + S).

    Source: folklore; DeepSpeed's pipeline module has it as `partition_method="parameters"`, by its
    documentation (general knowledge; there the largest part is minimised, which differs from
    the nearest boundary by at most a layer's parameters).

    It knows nothing of speeds, links or memory. Left open, and fixed here:
    - how many devices: the first ones, at most one per layer and `max_stages`;
    - ties: the earlier boundary; each stage has at least one layer;
    - no parameters at all: equal layer counts;
    - parts of a crowd that no link joins: each is planned alone, the fastest plan is kept;
    - repair: devices that pins name stand where the pinned layers are; then the fewest devices
      leave, others join in their place where they can, and cuts move by the fewest layers; the
      order is kept.
    """

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: No repair of the cut fits.
        """
        started_s = time.monotonic()
        given = problem.allowed_devices
        order = order_for_pins(problem, given)
        limits = Limits(problem)
        sizes = [layer.parameter_bytes for layer in problem.profile.layers]

        def on(part: Sequence[str]) -> PartitionResult:
            count = min(len(part), problem.num_layers, problem.max_stages or len(part))
            return repaired_chain(
                limits,
                in_order(problem, part, parameter_ends(sizes, count)),
                solver="by_params",
                started_s=started_s,
                notes=[pin_note(given, order)],
            )

        return apart(limits, order, "by_params", on)


def parameter_ends(sizes: Sequence[int], count: int) -> list[int]:
    """Where each of `count` stages ends so that each has about the same bytes."""
    total = sum(sizes)
    sizes = sizes if total else [1] * len(sizes)
    total = sum(sizes)
    ends: list[int] = []
    for stage in range(1, count):
        least = (ends[-1] if ends else 0) + 1
        most = len(sizes) - (count - stage)
        ends.append(
            min(
                range(least, most + 1),
                key=lambda end: (abs(count * sum(sizes[:end]) - stage * total), end),
            )
        )
    return [*ends, len(sizes)] if count else []


def in_order(problem: PartitionProblem, order: Sequence[str], ends: Sequence[int]) -> list[Unit]:
    """The first devices with these ends; the others stand by for a repair."""
    units = [Unit((d,), end) for d, end in zip(order, ends, strict=False)]
    rest = order[len(units) :]
    return units + [Unit((d,), problem.num_layers, wanted=False) for d in rest]
