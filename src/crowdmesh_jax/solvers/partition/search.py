"""Good chains fast, without a backend: the solvers' first answer and upper bound.

A min-max dynamic program cuts a few fixed device orders; local moves (shift a cut, swap, replace,
insert or drop a device) improve the result until none helps. It proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from .arrays import Costs
from .tables import SLACK, Chain, Segment, Tables

Cost = Callable[[Chain], float]


def better(tables: Tables, cost: float, chain: Chain, best_cost: float, best: Chain | None) -> bool:
    """Whether a chain replaces the best so far: cheaper, or as cheap with lower device ids."""
    if best is None or math.inf in (cost, best_cost):
        return cost < best_cost or (best is None and cost < math.inf)
    if abs(cost - best_cost) <= SLACK * max(cost, best_cost):
        return tables.rank(chain) < tables.rank(best)
    return cost < best_cost


def orders(tables: Tables) -> list[tuple[int, ...]]:
    """A few device orders worth cutting: by speed both ways, by id, and each device alone."""
    speed = {
        device: math.fsum(
            row.forward_s + row.backward_s
            for row in tables.problem.profile.layer_seconds(
                tables.problem.crowd, tables.devices[device]
            )
        )
        for device in range(len(tables.devices))
    }
    ids = list(range(len(tables.devices)))
    by_speed = sorted(ids, key=lambda device: (speed[device], device))
    found = [tuple(by_speed), tuple(reversed(by_speed)), tuple(ids), tuple(reversed(ids))]
    for count in range(2, len(by_speed)):
        found += [tuple(by_speed[:count]), tuple(reversed(by_speed[:count]))]
    found += [(device,) for device in by_speed]
    return list(dict.fromkeys(found))


def cut_order(costs: Costs, order: tuple[int, ...]) -> Chain | None:
    """Cuts a device order for the least slowest stage or link; every device gets layers."""
    tables, count = costs.tables, len(order)
    if not tables.min_stages <= count <= tables.max_stages:
        return None
    # best[first]: the slowest of layers first.. on the devices from a position on.
    best = np.full(tables.num_layers + 1, np.inf)
    best[-1] = 0.0
    ends = []
    for position in reversed(range(count)):
        slowest = np.maximum(costs.by_depth[count - position, order[position]], best[None, :])
        ends.append(slowest.argmin(axis=1))
        best = slowest.min(axis=1)
        if position:
            best = np.maximum(best, costs.busiest[order[position - 1], order[position]])
    if not math.isfinite(best[0]):
        return None
    cuts, first = [], 0
    for device, end in zip(order, reversed(ends), strict=True):
        first = int(end[first])
        cuts.append((device, first))
    return tables.chain(cuts)


def neighbours(tables: Tables, chain: Chain) -> Iterator[Chain]:
    """Chains one move away."""
    cuts = [(segment.device, segment.end) for segment in chain]
    used = {device for device, _ in cuts}
    spare = [device for device in range(len(tables.devices)) if device not in used]
    moved: list[list[tuple[int, int]]] = []
    for index, (device, end) in enumerate(cuts):
        if index + 1 < len(cuts):
            for shift in (-3, -2, -1, 1, 2, 3):
                moved.append([*cuts[:index], (device, end + shift), *cuts[index + 1 :]])
            moved.append([*cuts[:index], *cuts[index + 1 :]])  # the right one takes its layers
            moved.append([*cuts[:index], (device, cuts[index + 1][1]), *cuts[index + 2 :]])
            for other in range(index + 1, len(cuts)):
                swapped = list(cuts)
                swapped[index] = (cuts[other][0], end)
                swapped[other] = (device, cuts[other][1])
                moved.append(swapped)
        for new in spare:
            moved.append([*cuts[:index], (new, end), *cuts[index + 1 :]])
            first = chain[index].first
            for middle in {first + 1, (first + end) // 2, end - 1}:
                if first < middle < end:
                    moved.append([*cuts[:index], (new, middle), *cuts[index:]])
                    moved.append([*cuts[:index], (device, middle), (new, end), *cuts[index + 1 :]])
    for candidate in moved:
        made = tables.chain(candidate)
        if made is not None:
            yield made


def improve(tables: Tables, chain: Chain, cost: Cost, *, moves: int = 60) -> tuple[Chain, float]:
    """Takes the best neighbour until none is better, at most `moves` times."""
    best, best_cost = chain, cost(chain)
    for _ in range(moves):
        start = best
        for candidate in neighbours(tables, start):
            candidate_cost = cost(candidate)
            if better(tables, candidate_cost, candidate, best_cost, best):
                best, best_cost = candidate, candidate_cost
        if best is start:
            break
    return best, best_cost


def good_chains(tables: Tables) -> list[tuple[float, Chain]]:
    """Local optima of the closed form, the best first; empty where the moves find none."""
    starts: dict[tuple[tuple[str, int], ...], Chain] = {}
    costs = Costs(tables)
    for order in orders(tables):
        chain = cut_order(costs, order)
        if chain is not None:
            starts[tables.rank(chain)] = chain
    ranked = sorted(starts.values(), key=lambda chain: (tables.cost_s(chain), tables.rank(chain)))
    found: dict[tuple[tuple[str, int], ...], tuple[float, Chain]] = {}
    for chain in ranked[:6]:
        best, cost = improve(tables, chain, tables.cost_s)
        found[tables.rank(best)] = (cost, best)
    return sorted(found.values(), key=lambda pair: (pair[0], tables.rank(pair[1])))


def single_chains(tables: Tables) -> list[Chain]:
    """All layers on one device, for each that can."""
    found = []
    for device in range(len(tables.devices)):
        chain = tables.chain([(device, tables.num_layers)])
        if chain is not None:
            found.append(chain)
    return found


__all__ = [
    "Segment", "better", "cut_order", "good_chains", "improve", "neighbours", "orders",
    "single_chains",
]  # fmt: skip
