"""The closed-form game once more, in plain loops from the formulas of docs/coalitions.md.

A second opinion for tests: it shares no code with the package but the crowd and the profile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from crowdmesh_jax.solvers import CoalitionProblem

UNIT = 2.0**-20

Pair = tuple[float, float]
"""(lack, phi)."""


class ByHand:
    """Costs of coalitions of ids."""

    def __init__(self, problem: CoalitionProblem) -> None:
        self.problem, self.devices = problem, {d.id: d for d in problem.crowd.devices}
        profile = problem.profile
        self.step_rows = profile.microbatches * profile.microbatch_size
        self.flops = sum(la.forward_flops + la.backward_flops for la in profile.layers)
        self.total = sum(self.rows(name) for name in self.devices)
        classes = len(next(iter(self.devices.values())).label_counts)
        counts = [
            sum(d.label_counts[label] for d in self.devices.values()) for label in range(classes)
        ]
        self.whole = [count / sum(counts) for count in counts]
        speed = sum(self.speed(name) for name in self.devices)
        self.reference_s = self.total / self.step_rows * profile.microbatches / speed
        self.needed = sum(
            2 * la.parameter_bytes + la.optimizer_bytes + 2 * la.state_bytes + la.residual_bytes
            for la in profile.layers
        )
        sizes = sorted(sum(profile.cut_bytes(cut)) for cut in range(1, len(profile.layers)))
        self.size = sizes[len(sizes) // 4]

    def rows(self, name: str) -> float:
        if self.problem.amounts == "equal":
            return self.step_rows
        return sum(self.devices[name].label_counts)

    def is_able(self, name: str) -> bool:
        return self.devices[name].memory_bytes >= self.problem.compile_peak_bytes

    def speed(self, name: str) -> float:
        return self.devices[name].flops_per_s / self.flops if self.is_able(name) else 0.0

    def trip_s(self, name: str) -> float:
        way = self.devices[name].access
        assert way is not None
        per_byte = (1 / way.uplink_bytes_per_s + 1 / way.downlink_bytes_per_s) / 2
        return 4 * way.latency_s + self.size * per_byte

    def delta(self, group: Iterable[str]) -> float:
        labels = [0.0] * len(self.whole)
        for name in group:
            for label, count in enumerate(self.devices[name].label_counts):
                labels[label] += count
        share = [count / sum(labels) for count in labels]
        if self.problem.imbalance == "emd":
            return sum(abs(p - q) for p, q in zip(share, self.whole, strict=True))
        divergence = 0.0
        for p, q in zip(share, self.whole, strict=True):
            middle = (p + q) / 2
            divergence += 0.5 * p * math.log2(p / middle) if p > 0 else 0.0
            divergence += 0.5 * q * math.log2(q / middle) if q > 0 else 0.0
        return math.sqrt(max(divergence, 0.0))

    def cost(self, group: frozenset[str]) -> Pair:
        problem, microbatches = self.problem, self.problem.profile.microbatches
        if not group:
            return 0.0, 0.0
        speeds = [self.speed(name) for name in group]
        whole, step_s = sum(speeds), 0.0
        if whole > 0:
            stages = max(1.0, whole**2 / sum(speed**2 for speed in speeds))
            cut_s = sum(self.speed(name) * self.trip_s(name) for name in group) / whole
            step_s = (microbatches - 1 + stages) / whole
            step_s += (stages - 1) * (1 + (microbatches - 1) / stages) * cut_s
        memory = sum(self.devices[name].memory_bytes for name in group if self.is_able(name))
        missing = min(1.0, max(0.0, math.ceil((1 - memory / self.needed) / UNIT) * UNIT))
        if whole == 0:
            missing = 1.0
        rows = sum(self.rows(name) for name in group)
        hazard = sum(self.devices[name].leave_hazard_per_s for name in group)
        round_s = rows / self.step_rows * step_s * (1 + problem.stall_s * hazard) + problem.sync_s
        wait = round_s * (1 + problem.kappa * self.delta(group) ** 2) / self.reference_s
        lack = len(group) + missing if missing > 0 else 0.0
        return lack, rows / self.total * wait**problem.power

    def potential(self, groups: Iterable[Iterable[str]]) -> Pair:
        costs = [self.cost(frozenset(group)) for group in groups]
        return sum(lack for lack, _ in costs), math.fsum(phi for _, phi in costs)

    def best_gains(self, groups: Iterable[Iterable[str]]) -> dict[str, Pair | None]:
        """Each device's best gain by one switch; None where it can go nowhere."""
        homes = [frozenset(group) for group in groups]
        costs = {group: self.cost(group) for group in homes}
        costs[frozenset()] = (0.0, 0.0)
        best: dict[str, Pair | None] = {}
        for home in homes:
            for name in home:
                gains = []
                rest = self.cost(home - {name})
                for target in [*homes, frozenset()]:
                    if target == home or len(target) >= self.problem.size_limit:
                        continue
                    if not target and len(home) == 1:
                        continue
                    joined = self.cost(target | {name})
                    lack, phi = (
                        costs[home][part] + costs[target][part] - rest[part] - joined[part]
                        for part in (0, 1)
                    )
                    gains.append((lack, phi))
                best[name] = max(gains, default=None)
        return best
