"""The game on one crowd: each coalition's cost, worked out once, and a bound that comes first.

    phi(K) = (n_K / n) [tau_K (1 + kappa delta_K^2) / tau_0]^p,     Phi = sum of phi(K)

`tau_0` is the round that the whole crowd would take if all its speed were one machine. Coalitions
are bit masks of device indices (`value.py`). It knows no moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np

from ...core import CoalitionStructure
from ...errors import InfeasibleError
from .problem import CoalitionProblem, CoalitionValue, Cost
from .value import ClosedForm, Facts, PartitionValue, Rated, Value, make_value, members_of

T = TypeVar("T", float, np.ndarray)

NOTHING = Cost(0.0, 0.0)
"""What no coalition costs."""


def raised(wait: T, power: float) -> T:
    """wait^power; small whole powers, which are the usual ones, by products: ten times as fast."""
    if power > 64 or power != int(power):
        return cast(T, wait**power)
    found, bits = wait, bin(int(power))[3:]
    for bit in bits:
        found = found * found
        if bit == "1":
            found = found * wait
    return found


@dataclass(frozen=True, slots=True)
class Entry:
    """A coalition with all that is known of it."""

    cost: Cost
    wait: Cost
    """What a member lives with: 1 + missing memory if the model does not fit, and
    tau (1 + kappa delta^2) / tau_0."""
    round_s: float
    rated: Rated


class Game:
    """Costs of coalitions, memoised by member set.

    Args:
        value: In place of the problem's own; tests count calls with it.
    """

    def __init__(self, problem: CoalitionProblem, value: Value | None = None) -> None:
        self.problem = problem
        self.facts = Facts(problem)
        self.value: Value = make_value(self.facts) if value is None else value
        facts = self.facts
        self.count = len(facts.ids)
        speed = float(facts.speed[facts.able].sum())
        if speed <= 0:
            raise InfeasibleError(self._nobody())
        steps = facts.total_rows / facts.step_rows
        microbatches = problem.profile.microbatches
        self.reference_s = steps * microbatches * facts.reference_s / speed
        """tau_0."""
        self.evaluations = 0
        self._known: dict[int, Entry] = {}
        self._bounds: dict[int, float] = {}
        self._shape: dict[int, tuple[float, float]] = {}

    def _nobody(self) -> str:
        problem = self.problem
        largest = max(self.facts.devices, key=lambda device: (device.memory_bytes, device.id))
        return (
            "no device of the crowd can hold any layer while training\n"
            f"  largest  {largest.memory_bytes / 1e6:.0f} MB   device {largest.id!r}\n"
            f"  compile  {problem.compile_peak_bytes / 1e6:.0f} MB on each device\n"
            "  try      recompute='auto', fewer rows per microbatch, or check memory_bytes"
        )

    def rows_and_imbalance(self, masks: Sequence[int]) -> list[tuple[float, float]]:
        """(rows, delta) of each coalition."""
        new = [mask for mask in dict.fromkeys(masks) if mask not in self._shape]
        if new:
            groups = [members_of(mask) for mask in new]
            flat = np.array([device for group in groups for device in group], int)
            starts = np.cumsum([0, *(len(group) for group in groups)])[:-1]
            rows = np.add.reduceat(self.facts.rows[flat], starts)
            if self.problem.kappa > 0 or self.facts.whole.any():
                labels = np.add.reduceat(self.facts.labels[flat], starts, axis=0)
                delta = self.facts.imbalance(labels)
            else:
                delta = np.zeros(len(new))
            for mask, row, distance in zip(new, rows.tolist(), delta.tolist(), strict=True):
                self._shape[mask] = (row, distance)
        return [self._shape[mask] for mask in masks]

    def round_s(self, rows: T, step_s: T, hazard_per_s: T) -> T:
        """tau of a coalition, or of an array of them."""
        work_s = rows / self.facts.step_rows * step_s
        return work_s * (1.0 + self.problem.stall_s * hazard_per_s) + self.problem.sync_s

    def weighed(self, rows: T, delta: T, round_s: T) -> tuple[T, T]:
        """(wait, phi) of a coalition, or of an array of them, with that round."""
        wait = round_s * (1.0 + self.problem.kappa * delta * delta) / self.reference_s
        return wait, rows / self.facts.total_rows * raised(wait, self.problem.power)

    def rate(self, masks: Iterable[int]) -> None:
        """Works out coalitions in one batch; those known already cost nothing."""
        new = [mask for mask in dict.fromkeys(masks) if mask and mask not in self._known]
        if not new:
            return
        shapes = self.rows_and_imbalance(new)
        self.evaluations += len(new)
        for mask, rated, (rows, delta) in zip(new, self.value.rate(new), shapes, strict=True):
            round_s = self.round_s(rows, rated.step_s, rated.hazard_per_s)
            wait, phi = self.weighed(rows, delta, round_s)
            lack = mask.bit_count() + rated.missing if rated.missing > 0 else 0.0
            waiting = Cost(1.0 + rated.missing if rated.missing > 0 else 0.0, wait)
            self._known[mask] = Entry(Cost(lack, phi), waiting, round_s, rated)

    def entry(self, mask: int) -> Entry:
        """All that is known of a coalition."""
        if mask not in self._known:
            self.rate([mask])
        return self._known[mask]

    def cost(self, mask: int) -> Cost:
        """Its part of the potential; the empty coalition costs nothing."""
        return self.entry(mask).cost if mask else NOTHING

    def is_known(self, mask: int) -> bool:
        """Whether its cost costs nothing more."""
        return not mask or mask in self._known

    def bounds(self, masks: Sequence[int]) -> list[Cost]:
        """What each costs at least: its cost where it is known, else by the value's bound."""
        new = [
            m for m in dict.fromkeys(masks) if m and m not in self._known and m not in self._bounds
        ]
        if new:
            for mask, (rows, delta) in zip(new, self.rows_and_imbalance(new), strict=True):
                step_s = self.value.step_bound_s(mask)
                self._bounds[mask] = self.weighed(rows, delta, self.round_s(rows, step_s, 0.0))[1]
        return [
            self._known[mask].cost
            if mask in self._known
            else Cost(0.0, self._bounds[mask])
            if mask
            else NOTHING
            for mask in masks
        ]

    def potential(self, masks: Iterable[int]) -> Cost:
        """Phi of a structure."""
        costs = [self.cost(mask) for mask in masks]
        return Cost(math.fsum(c.lack for c in costs), math.fsum(c.phi for c in costs))

    def measures(self, masks: Sequence[int]) -> tuple[float, float]:
        """(slowest round, mean round weighted by rows), seconds."""
        entries = [self.entry(mask) for mask in masks]
        rows = [self._shape[mask][0] for mask in masks]
        mean = math.fsum(e.round_s * r for e, r in zip(entries, rows, strict=True))
        return max(e.round_s for e in entries), mean / self.facts.total_rows

    def structure(self, masks: Iterable[int]) -> CoalitionStructure:
        """Masks as a value with ids."""
        ids = self.facts.ids
        return CoalitionStructure.of([[ids[d] for d in members_of(mask)] for mask in masks])

    def masks(self, structure: CoalitionStructure) -> list[int]:
        """A structure's coalitions as masks, in its order."""
        index = self.facts.index
        return [sum(1 << index[device] for device in group) for group in structure.coalitions]

    def valued(self, mask: int) -> CoalitionValue:
        """A coalition as a value with ids."""
        entry, (rows, delta) = self.entry(mask), self.rows_and_imbalance([mask])[0]
        return CoalitionValue(
            members=tuple(self.facts.ids[device] for device in members_of(mask)),
            holds_model=entry.rated.missing == 0,
            step_s=entry.rated.step_s,
            steps=rows / self.facts.step_rows,
            round_s=entry.round_s,
            imbalance=delta,
            share=rows / self.facts.total_rows,
            cost=entry.cost,
            stages=entry.rated.stages,
        )

    def holds_with(self, masks: Sequence[int]) -> bool:
        """Whether any of the coalitions can hold the model."""
        self.rate(masks)
        return any(self.entry(mask).rated.missing == 0 for mask in masks)

    @property
    def is_by_sums(self) -> bool:
        """Whether values are closed forms of sums over members."""
        return isinstance(self.value, ClosedForm)

    @property
    def is_by_plans(self) -> bool:
        """Whether values come from a partition solver."""
        return isinstance(self.value, PartitionValue)
