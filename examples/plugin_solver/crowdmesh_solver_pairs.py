"""A coalition solver of your own: the fastest device with the slowest, the next with the next.

What it needs: a `CoalitionProblem` in, a `CoalitionResult` out. `rate_structure` makes the second
of the groups that you chose: it rates them as all others are rated, and certifies them.
"""

from __future__ import annotations

from dataclasses import dataclass

from crowdmesh_jax.solvers import CoalitionProblem, CoalitionResult, rate_structure


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsSolver:
    """Pairs by speed; an odd one out is alone."""

    seed: int = 0
    """Taken because the command line gives one to every solver; nothing here is random."""

    def form(self, problem: CoalitionProblem) -> CoalitionResult:
        """Answers a problem."""
        speed = {device.id: device.flops_per_s for device in problem.crowd.devices}
        ranked = sorted(speed, key=lambda device: (-speed[device], device))
        half = len(ranked) // 2
        pairs = list(zip(ranked[:half], reversed(ranked[-half:]), strict=True)) if half else []
        groups = [*pairs, (ranked[half],)] if len(ranked) % 2 else pairs
        return rate_structure(problem, groups, solver="pairs")
