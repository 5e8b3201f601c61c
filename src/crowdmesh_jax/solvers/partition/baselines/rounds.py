"""The round latency of synchronous pipelines, as DAPPLE and Asteroid count it.

`P` stages make `2 P - 1` steps: stages and the transfers between them. Step `s` takes `F_s` and
`B_s` per microbatch and `A_s` for its all-reduce (0 for a transfer). The dominant (pivot) step `d`
paces the round:

    latency = max over s of  T_w + T_e + A_s
    T_w = sum of F_i for i < s
    T_e = M (F_d + B_d) + sum of (F_i + B_i) for s <= i < d     if s <= d
          M (F_d + B_d) - sum of (F_i + B_i) for d <= i < s     if s > d
    d   = argmax over c of  M (F_c + B_c) + sum of (F_i + B_i) for i < c

With sums from the front this is `max_c [M E_c + sum_{i<c} E_i] + max_s [A_s - sum_{i<s} B_i]`,
`E = F + B`: two numbers that grow step by step, from either end, which is what both planners'
programs keep.

Asteroid (arXiv 2408.08015) Eqs. 4-6 by two re-implementations, Eq. 11 by one; DAPPLE (PPoPP 2021)
is the same up to how its pivot is found (general knowledge, not checked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...problem import PartitionProblem


@dataclass(frozen=True, slots=True)
class Step:
    """A stage or a transfer of the round."""

    forward_s: float
    backward_s: float
    reduce_s: float = 0.0


def dominant_step(steps: Sequence[Step], microbatches: int) -> int:
    """The step that paces the round; the first of equals."""
    before_s, best = 0.0, (-1.0, 0)
    for index, step in enumerate(steps):
        both_s = step.forward_s + step.backward_s
        if microbatches * both_s + before_s > best[0]:
            best = microbatches * both_s + before_s, index
        before_s += both_s
    return best[1]


def round_latency_s(steps: Sequence[Step], microbatches: int) -> float:
    """Seconds of a round of M microbatches over these steps (see the module)."""
    dominant = dominant_step(steps, microbatches)
    both = [step.forward_s + step.backward_s for step in steps]
    worst = 0.0
    for index, step in enumerate(steps):
        wait = sum(other.forward_s for other in steps[:index])
        run = microbatches * both[dominant]
        run += sum(both[index:dominant]) if index <= dominant else -sum(both[dominant:index])
        worst = max(worst, wait + run + step.reduce_s)
    return worst


def between(
    problem: PartitionProblem, left: Sequence[str], right: Sequence[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Seconds down and back per cut `0 .. L` between two groups, over their slowest pair of links.

    None where a pair has no link.
    """
    crowd = problem.crowd
    down = [crowd.link(a, b) for a in left for b in right]
    back = [crowd.link(b, a) for a in left for b in right]
    if any(link is None for link in (*down, *back)):
        return None
    cuts = [(0, 0), *(problem.profile.cut_bytes(cut) for cut in range(1, problem.num_layers))]
    sizes = np.array([*cuts, (0, 0)], dtype=float)
    found = []
    for links, size in ((down, sizes[:, 0]), (back, sizes[:, 1])):
        known = [link for link in links if link is not None]
        rate = min(link.bandwidth_bytes_per_s for link in known)
        found.append(max(link.latency_s for link in known) + size / rate)
    return found[0], found[1]


def ring_s(problem: PartitionProblem, devices: Sequence[str]) -> np.ndarray | None:
    """Over (first, end): seconds of the all-reduce in a group; None where a pair has no link."""
    sizes = np.array([0, *np.cumsum([layer.parameter_bytes for layer in problem.profile.layers])])
    held = sizes[None, :] - sizes[:-1, None].astype(float)
    count = len(devices)
    if count == 1:
        return np.zeros_like(held)
    links = [problem.crowd.link(a, b) for a in devices for b in devices if a != b]
    known = [link for link in links if link is not None]
    if len(known) < len(links):
        return None
    return 2 * (count - 1) / count * held / min(link.bandwidth_bytes_per_s for link in known)
