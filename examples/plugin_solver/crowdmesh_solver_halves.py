"""The model in two halves by flops, on the two fastest devices that can hold them.

What a solver of your own needs: a `PartitionProblem` in, a `PartitionResult` out. What is
returned is checked against the problem by the caller, so a bug here cannot become a run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import accumulate

from crowdmesh_jax.core import DeviceId, PipelinePlan, Stage, predict
from crowdmesh_jax.errors import InfeasibleError
from crowdmesh_jax.solvers import PartitionProblem, PartitionResult, plan_faults


@dataclass(frozen=True, slots=True, kw_only=True)
class HalvesSolver:
    """Two stages; the cut is where `share` of the flops is done."""

    share: float = 0.5

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: The two halves do not fit the two fastest devices, in either order.
        """
        started_s = time.monotonic()
        sums = list(accumulate(layer.forward_flops for layer in problem.profile.layers))
        cut = 1 + next(i for i, done in enumerate(sums) if done >= self.share * sums[-1])
        cut = min(cut, problem.num_layers - 1)
        speed = {d.id: d.flops_per_s for d in problem.crowd.devices}
        fastest = sorted(problem.allowed_devices, key=lambda device: -speed[DeviceId(device)])[:2]
        faults: tuple[str, ...] = ("it needs two devices and two layers",)
        for order in (fastest, fastest[::-1]):
            if len(order) < 2 or cut < 1:
                break
            ends = ((0, cut - 1), (cut, problem.num_layers - 1))
            plan = PipelinePlan(
                stages=tuple(
                    Stage(device=DeviceId(device), first_layer=first, last_layer=last)
                    for device, (first, last) in zip(order, ends, strict=True)
                ),
                num_layers=problem.num_layers,
                microbatches=problem.microbatches,
                schedule=problem.schedule,
            )
            faults = plan_faults(problem, plan)
            if not faults:
                return PartitionResult(
                    plan=plan,
                    predicted=predict(problem.profile, problem.crowd, plan),
                    problem=problem,
                    optimal=False,
                    gap=None,
                    solve_s=time.monotonic() - started_s,
                    solver="halves",
                )
        raise InfeasibleError("two halves do not fit: " + "; ".join(faults))
