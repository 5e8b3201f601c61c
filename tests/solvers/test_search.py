"""Good chains fast: what a move is, what a climb takes, and that cuts of an order are min-max."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
from partition_problems import random_crowd, random_profile

from crowdmesh_jax.solvers import PartitionProblem
from crowdmesh_jax.solvers.partition.arrays import Costs
from crowdmesh_jax.solvers.partition.search import (
    better,
    cut_order,
    good_chains,
    improve,
    neighbours,
    orders,
)
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Chain, Tables

DEVICES = ["d0", "d1", "d2", "d3"]


def tables_of(seed: int, *, slower: float = 1.0) -> Tables:
    """Any tables; links `slower` times slower than usual."""
    rng = random.Random(seed)
    profile, crowd = random_profile(rng, DEVICES, 6), random_crowd(rng, DEVICES, 6)

    def slow(link):
        rate = link.bandwidth_bytes_per_s / slower
        return dataclasses.replace(link, bandwidth_bytes_per_s=rate)

    crowd = dataclasses.replace(
        crowd,
        links=tuple(map(slow, crowd.links)),
        default_link=crowd.default_link and slow(crowd.default_link),
    )
    return Tables(PartitionProblem(profile=profile, crowd=crowd, compile_peak_bytes=0))


def cuts_of(chain: Chain) -> list[tuple[int, int]]:
    return [(segment.device, segment.end) for segment in chain]


def roomy() -> Tables:
    """Tables in which every chain of every device fits."""
    return next(
        tables
        for tables in map(tables_of, range(100))
        if sum(1 for _ in all_chains(tables)) == 4 + 12 * 5 + 24 * 10 + 24 * 10
    )


def test_moves_shift_swap_replace_insert_and_drop():
    tables = roomy()
    chain = tables.chain([(0, 3), (1, 6)])
    assert chain is not None
    found = {tuple(cuts_of(made)) for made in neighbours(tables, chain)}
    shifts = {((0, end), (1, 6)) for end in (1, 2, 4, 5)}
    drops = {((1, 6),), ((0, 6),)}
    swaps = {((1, 3), (0, 6))}
    replaced = {((new, 3), (1, 6)) for new in (2, 3)} | {((0, 3), (new, 6)) for new in (2, 3)}
    inserted = set()
    for new in (2, 3):
        for middle in (1, 2):
            inserted |= {((new, middle), (0, 3), (1, 6)), ((0, middle), (new, 3), (1, 6))}
        for middle in (4, 5):
            inserted |= {((0, 3), (new, middle), (1, 6)), ((0, 3), (1, middle), (new, 6))}
    assert found == shifts | drops | swaps | replaced | inserted


def test_a_climb_takes_the_best_move_and_stops_where_none_helps():
    climbed = 0
    for seed in range(12):
        tables = tables_of(seed)
        for chain in itertools.islice(all_chains(tables), 0, 60, 20):
            around = [tables.cost_s(made) for made in neighbours(tables, chain)]
            least_s = min(around, default=math.inf)
            once, once_s = improve(tables, chain, tables.cost_s, moves=1)
            assert once_s == pytest.approx(min(least_s, tables.cost_s(chain)))
            assert once_s == tables.cost_s(once)
            climbed += least_s < tables.cost_s(chain) * (1 - 1e-9)
            top, top_s = improve(tables, once, tables.cost_s)
            ends = [tables.cost_s(made) for made in neighbours(tables, top)]
            assert top_s <= min(ends, default=math.inf) * (1 + 1e-9)
    assert climbed > 5


def test_of_chains_that_cost_the_same_the_lower_ids_win():
    tables = roomy()
    low, high = tables.chain([(0, 6)]), tables.chain([(1, 6)])
    assert low is not None
    assert high is not None
    assert better(tables, 1.0, low, 1.0 - 1e-12, high)
    assert not better(tables, 1.0 - 1e-12, high, 1.0, low)
    assert better(tables, 0.5, high, 1.0, low)
    assert better(tables, 1.0, high, math.inf, low)
    assert not better(tables, math.inf, low, math.inf, high)
    assert better(tables, 1.0, high, math.inf, None)
    assert not better(tables, math.inf, high, math.inf, None)


def test_an_order_is_cut_for_the_least_slowest_stage_or_link():
    compared = bound_by_links = 0
    for seed in range(20):
        tables = tables_of(seed, slower=20.0)
        costs = Costs(tables)
        chains = list(all_chains(tables))
        for order in [(0, 1), (2, 1, 0), (3, 0, 1, 2)]:
            slowest = []
            for chain in chains:
                if tuple(segment.device for segment in chain) == order:
                    links = [
                        costs.busiest[left.device, right.device, right.first]
                        for left, right in itertools.pairwise(chain)
                    ]
                    own_s = max(segment.compute_s for segment in chain)
                    slowest.append((max(own_s, *links), own_s))
            made = cut_order(costs, order)
            if not slowest:
                assert made is None
                continue
            assert made is not None
            links = [
                costs.busiest[left.device, right.device, right.first]
                for left, right in itertools.pairwise(made)
            ]
            own_s = max(max(segment.compute_s for segment in made), *links)
            assert own_s == pytest.approx(min(slowest)[0])
            bound_by_links += min(own for _, own in slowest) < own_s
            compared += 1
    assert compared > 15
    assert bound_by_links > 3


def test_orders_are_the_fastest_and_the_slowest_first_and_each_alone():
    tables = tables_of(3)
    rows = [
        tables.problem.profile.layer_seconds(tables.problem.crowd, device)
        for device in tables.devices
    ]
    took_s = [sum(row.forward_s + row.backward_s for row in own) for own in rows]
    fastest = tuple(sorted(range(4), key=lambda device: (took_s[device], device)))
    found = orders(tables)
    assert found[0] == fastest
    for count in range(1, 5):
        assert fastest[:count] in found
        assert fastest[:count][::-1] in found
    assert {(device,) for device in range(4)} <= set(found)
    assert {(0, 1, 2, 3), (3, 2, 1, 0)} <= set(found)
    assert len(set(found)) == len(found)


def test_good_chains_are_several_local_optima_the_best_first():
    several = 0
    for seed in range(12):
        tables = tables_of(seed)
        found = good_chains(tables)
        several += len(found) > 1
        assert [cost for cost, _ in found] == sorted(cost for cost, _ in found)
        for cost, chain in found:
            assert cost == tables.cost_s(chain)
            around = [tables.cost_s(made) for made in neighbours(tables, chain)]
            assert cost <= min(around, default=math.inf) * (1 + 1e-9)
    assert several > 3
