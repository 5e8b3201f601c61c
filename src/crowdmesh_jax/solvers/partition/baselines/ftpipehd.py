"""FTPipeHD's partition: a min-max program over measured capacities, in the order of arrival."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...problem import PartitionProblem, PartitionResult
from .by_params import in_order
from .layout import Limits, apart, mode_seconds, order_for_pins, pin_note, repaired_chain


@dataclass(frozen=True, slots=True, kw_only=True)
class FTPipeHDSolver:
    """Cuts for the least slowest stage or transfer, one number of capacity per device.

    Problem: a fixed order of workers, the central node first; find the cuts that minimise the
    slowest of all stages and transfers. Variables: where each stage ends.

        D[j][s] = min over i of max(D[i][s-1], transfer(i, s), T_central(i+1..j) C_s)

    `T_central` are the central node's measured seconds, `C_s` how many times longer worker `s`
    takes (central: 1), `transfer` an activation and its gradient over the link to stage `s`.

    Complexity: O(L^2 S).

    Source: FTPipeHD (arXiv 2110.02781, TMC 2023), dynamic partition; the recurrence is known from
    the authors' code as Confidant's repository inherited it, not from the paper's text.

    It looks at no memory and no later microbatches, and cannot leave a worker out. Left open, and
    fixed here:
    - the order of workers (there: of arrival): the order of `problem.devices` or of the crowd;
      central is the first;
    - how many: all, at most one per layer and `max_stages`, the first ones;
    - C_s: seconds of all layers on the worker over those on central. There they are measured on the
      layers that the worker has, after a first partition with C = 1: ours starts converged;
    - a transfer: bytes down and bytes back, each over its own direction's bandwidth and latency
      (there twice the activation over one bandwidth, without latency);
    - a pair without a link: takes for ever; if nothing else is left, the repair decides;
    - training is synchronous as the problem's schedule says, not asynchronous with stashed weights;
    - ties: the earlier cut;
    - parts without links between them, and repair: as `by_params`.
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

        def on(part: Sequence[str]) -> PartitionResult:
            count = min(len(part), problem.num_layers, problem.max_stages or len(part))
            return repaired_chain(
                limits,
                in_order(problem, part, _ends(problem, part[:count])),
                solver="ftpipehd",
                started_s=started_s,
                notes=[pin_note(given, order)],
            )

        return apart(limits, order, "ftpipehd", on)


def _ends(problem: PartitionProblem, order: Sequence[str]) -> list[int]:
    if not order:
        return []
    layers, count = problem.num_layers, len(order)
    per_device = [
        [f + b for f, b in zip(*mode_seconds(problem, device), strict=True)] for device in order
    ]
    central = [0.0, *accumulate(per_device[0])]
    totals = [math.fsum(row) for row in per_device]
    # Where central takes no time at all, ratios say nothing: every worker counts as it.
    capacity = [total / totals[0] if totals[0] else 1.0 for total in totals]
    best = [(t * capacity[0], 0) for t in central]
    best[0] = (math.inf, 0)
    choices: list[list[int]] = []
    for stage in range(1, count):
        now: list[tuple[float, int]] = [(math.inf, 0)] * (layers + 1)
        for end in range(stage + 1, layers + 1):
            # Without any finite choice (no link) each stage still ends somewhere.
            now[end] = min(
                (
                    max(
                        best[first][0],
                        _transfer_s(problem, order[stage - 1], order[stage], first),
                        (central[end] - central[first]) * capacity[stage],
                    ),
                    first,
                )
                for first in range(stage, end)
            )
        choices.append([first for _, first in now])
        best = now
    ends = [layers]
    for row in reversed(choices):
        ends.append(row[ends[-1]])
    return ends[::-1]


def _transfer_s(problem: PartitionProblem, source: str, target: str, cut: int) -> float:
    down, back = problem.crowd.link(source, target), problem.crowd.link(target, source)
    if down is None or back is None:
        return math.inf
    forward_bytes, backward_bytes = problem.profile.cut_bytes(cut)
    return down.transfer_s(forward_bytes) + back.transfer_s(backward_bytes)
