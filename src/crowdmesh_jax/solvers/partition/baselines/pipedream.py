"""PipeDream's planner: a min-max program over equal workers, stages replicated where that helps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...problem import PartitionProblem, PartitionResult
from .layout import (
    Limits,
    Unit,
    apart,
    mode_seconds,
    order_for_pins,
    pin_note,
    repair,
    repaired_chain,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeDreamSolver:
    """Cuts as if all workers were the mean device and all links the mean link.

    Problem: the least slowest stage or transfer over cuts and replicas. Variables: where each stage
    ends and how many workers it has.

        A(j, m) = min over i, m' of max(A(i, m - m'), transfer(i), T(i+1..j, m'))
        T(i+1..j, m') = max(compute, sync) / m'

    Complexity: O(L^2 D^2 S) with replicas (`S` counts stages, so that stage limits hold), O(L^2 D)
    without.

    Source: PipeDream (Narayanan et al., SOSP 2019), its partitioning algorithm; general knowledge,
    not checked against the text.

    It takes workers for equal and looks at no memory. Left open, and fixed here:
    - unequal workers: the mean over the devices of each layer's seconds, and the mean bandwidth
      over all linked pairs; devices then take the stages in the order given;
    - transfer(i): bytes down plus bytes back (there twice the activation), no latency;
    - training: flushed each step ("sync flush", as the problem's schedule), no stashed weights. So
      sync is one ring all-reduce a step, 2 (m' - 1) / m' of the stage's parameter bytes over the
      mean bandwidth, of which each of the M microbatches carries a part;
    - replicas split each microbatch's rows evenly (there they take minibatches in turn); no more
      than rows, and none where a layer has state over rows; only with `problem.share`;
    - how many workers: as many as bring the least slowest stage; ties go to fewer workers, then to
      fewer stages, then to earlier cuts;
    - no topology of several levels: one level of links;
    - parts without links between them, and repair: as `by_params`, replicated stages moved as one;
      if that fails, without replicas.
    """

    def solve(self, problem: PartitionProblem) -> PartitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: No repair of the plan fits.
        """
        started_s = time.monotonic()
        given = problem.allowed_devices
        order = order_for_pins(problem, given)
        limits = Limits(problem)

        def on(part: Sequence[str]) -> PartitionResult:
            notes = [pin_note(given, order)]
            units = _units(problem, limits, part)
            grouped = any(len(unit.devices) > 1 for unit in units)
            if grouped and repair(limits, units) is None:
                notes.append("repaired: its replicated stages fit nowhere, so none is replicated")
                units = _units(replace(problem, share=False), limits, part)
            return repaired_chain(
                limits, units, solver="pipedream", started_s=started_s, notes=notes
            )

        return apart(limits, order, "pipedream", on)


def _units(problem: PartitionProblem, limits: Limits, order: Sequence[str]) -> list[Unit]:
    layers, workers = problem.num_layers, len(order)
    if not workers:
        return []
    stages = min(workers, layers, problem.max_stages or workers)
    replicas = min(workers, problem.profile.microbatch_size) if problem.share else 1
    slowest_s = _stage_seconds(problem, limits, order, replicas)
    transfer_s = _transfers(problem, order)
    # best[s][m][j]: least slowest for layers before j in s stages on m workers.
    best = np.full((stages + 1, workers + 1, layers + 1), np.inf)
    choice = np.zeros((stages + 1, workers + 1, layers + 1, 2), dtype=int)
    best[0, 0, 0] = 0.0
    for stage in range(1, stages + 1):
        for used in range(stage, workers + 1):
            for more in range(1, min(replicas, used - stage + 1) + 1):
                before = best[stage - 1, used - more]
                if stage > 1:
                    before = np.maximum(before, transfer_s)
                value = np.maximum(before[:layers, None], slowest_s[more])
                first = np.argmin(value, axis=0)
                least = value[first, np.arange(layers + 1)]
                nearer = least < best[stage, used]
                best[stage, used] = np.where(nearer, least, best[stage, used])
                choice[stage, used, nearer, 0] = first[nearer]
                choice[stage, used, nearer, 1] = more
    least = min(problem.min_stages, stages)
    _, used, stage = min(
        (best[stage, used, layers], used, stage)
        for stage in range(least, stages + 1)
        for used in range(stage, workers + 1)
    )
    spare = order[used:]
    end, cuts = layers, []
    while stage:
        first, more = (int(value) for value in choice[stage, used, end])
        cuts.append((used - more, used, end))
        used, end, stage = used - more, first, stage - 1
    units = [
        Unit(tuple(order[a:b]), end, even_rows(problem, b - a)) for a, b, end in reversed(cuts)
    ]
    return units + [Unit((device,), layers, wanted=False) for device in spare]


def even_rows(problem: PartitionProblem, count: int) -> tuple[int, ...]:
    """A microbatch's rows split evenly, the first devices taking the remainder."""
    size, extra = divmod(problem.profile.microbatch_size, count)
    return tuple(size + (index < extra) for index in range(count)) if count > 1 else ()


def _mean_bandwidth(problem: PartitionProblem, order: Sequence[str]) -> float:
    links = [problem.crowd.link(a, b) for a in order for b in order if a != b]
    rates = [link.bandwidth_bytes_per_s for link in links if link is not None]
    return sum(rates) / len(rates) if rates else np.inf


def _transfers(problem: PartitionProblem, order: Sequence[str]) -> np.ndarray:
    rate = _mean_bandwidth(problem, order)
    cuts = [0.0] + [sum(problem.profile.cut_bytes(cut)) for cut in range(1, problem.num_layers)]
    return np.array([*cuts, 0.0]) / rate


def _stage_seconds(
    problem: PartitionProblem, limits: Limits, order: Sequence[str], replicas: int
) -> list[np.ndarray]:
    """Per number of replicas, over (first, end): T."""
    seconds = np.mean([np.add(*mode_seconds(problem, device)) for device in order], axis=0)
    compute = np.array([0.0, *np.cumsum(seconds)])
    sizes = [layer.parameter_bytes for layer in problem.profile.layers]
    weights = np.array([0.0, *np.cumsum(sizes)])
    span = compute[None, :] - compute[:-1, None]
    held = weights[None, :] - weights[:-1, None]
    empty = ~np.triu(np.ones(span.shape, dtype=bool), 1)
    rate, found = _mean_bandwidth(problem, order), [span]
    for count in range(1, replicas + 1):
        sync = 2 * (count - 1) / count * held / rate / problem.microbatches
        slowest = np.maximum(span, sync) / count
        slowest[empty] = np.inf
        if count > 1:
            slowest[limits.mixing] = np.inf
        found.append(slowest)
    return found
