"""The front of the model on one device, the rest on a fast one: device/cloud model parallelism."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ....core import PipelinePlan, predict
from ....errors import InvalidValueError
from ...problem import PartitionProblem, PartitionResult
from .layout import Layout, Limits, Unit, nothing_fits, result


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudDeviceSolver:
    """The best single cut between a device and the "cloud", or all layers on one of the two.

    Problem: layers `0 .. k - 1` on the device that holds the data, `k .. L - 1` on the cloud. Every
    `k` from 0 (all on the cloud) to `L` (all on the device) is judged by the exact timeline, so no
    split of this shape is better. Ties go to the smaller `k`.

    Complexity: O(L) timelines of two stages.

    Source: the "cloud and device model-parallel baselines" of CrowdMesh (IoT-J 12(24); abstract
    only, its rule is not published); the single cut goes back to Neurosurgeon (ASPLOS 2017) for
    inference (general knowledge, not checked).

    Left open, and fixed here:
    - the device: `device`, else the one that layer 0 is pinned to, else the first that may be used;
    - the cloud: `cloud`, else the fastest other one by the whole model's seconds (ties: lower id);
      it is a member of the crowd with that member's link and memory, not a server of its own;
    - by what a cut is judged: our exact timeline, updates included, which no paper had;
    - training alternates as the problem's schedule says, M microbatches a step;
    - nothing to repair: cuts that break a limit or a rule are not tried.
    """

    device: str | None = None
    cloud: str | None = None

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InvalidValueError: `device` and `cloud` are the same.
            InvalidCrowdError: One of them is not in the crowd.
            InfeasibleError: No cut between the two fits.
        """
        started_s = time.monotonic()
        limits = Limits(problem)
        device, cloud = self._ends(problem)
        allowed = problem.allowed_devices
        best: tuple[float, PipelinePlan] | None = None
        for cut in range(problem.num_layers + 1):
            layout: Layout = tuple(
                (Unit((who,), end), end)
                for who, end, size in (
                    (device, cut, cut),
                    (cloud, problem.num_layers, problem.num_layers - cut),
                )
                if who is not None and size
            )
            used = [unit.devices[0] for unit, _ in layout]
            if (
                not layout
                or layout[-1][1] < problem.num_layers
                or not set(problem.requires) <= set(used)
                or not set(used) <= set(allowed)
                or not limits.linked(used, used)
                or not problem.min_stages <= len(used) <= (problem.max_stages or 2)
            ):
                continue
            first, fine = 0, True
            for position, (unit, end) in enumerate(layout):
                fine &= bool(limits.fits(unit, len(layout) - position)[first, end])
                first = end
            if fine:
                plan = limits.plan(layout)
                step_s = predict(problem.profile, problem.crowd, plan).step_s
                if best is None or step_s < best[0] * (1 - 1e-9):
                    best = step_s, plan
        if best is None:
            raise nothing_fits(
                problem, "cloud_device", f"every cut between {device!r} and {cloud!r}"
            )
        return result(
            limits,
            best[1],
            solver="cloud_device",
            started_s=started_s,
            notes=[f"device {device!r}, cloud {cloud!r}"],
        )

    def _ends(self, problem: PartitionProblem) -> tuple[str | None, str | None]:
        for name in (self.device, self.cloud):
            if name is not None:
                problem.crowd.device(name)  # raises, naming those known
        if self.device is not None and self.device == self.cloud:
            raise InvalidValueError(f"device and cloud must differ, both are {self.device!r}")
        allowed = problem.allowed_devices
        first = next((d for d in allowed if d != self.cloud), None)
        device = self.device or problem.layer_pins.get(0) or first
        if device == self.cloud:  # the pin of layer 0 names the cloud
            device = first

        def whole_s(who: str) -> float:
            rows = problem.profile.layer_seconds(problem.crowd, who)
            return math.fsum(row.forward_s + row.backward_s for row in rows)

        others = sorted((d for d in allowed if d != device), key=lambda d: (whole_s(d), d))
        return device, self.cloud or (others[0] if others else None)
