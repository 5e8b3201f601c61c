"""The dynamic program over the most promising devices of a crowd that is too large for all."""

from __future__ import annotations

import math
import random
import time

from partition_problems import random_crowd, random_profile

from crowdmesh_jax.solvers import PartitionProblem
from crowdmesh_jax.solvers.partition import few as few_module
from crowdmesh_jax.solvers.partition.arrays import table_work
from crowdmesh_jax.solvers.partition.auto import _TABLE_WORK
from crowdmesh_jax.solvers.partition.dp import Labels
from crowdmesh_jax.solvers.partition.few import chains_of_few, promising
from crowdmesh_jax.solvers.partition.search import single_chains
from crowdmesh_jax.solvers.partition.tables import Tables

DEVICES = [f"d{index}" for index in range(6)]


def problem(seed: int, **more) -> PartitionProblem:
    rng = random.Random(seed)
    return PartitionProblem(
        profile=random_profile(rng, DEVICES, 7),
        crowd=random_crowd(rng, DEVICES, 7),
        compile_peak_bytes=0,
        **more,
    )


def found(tables: Tables, work: float, until_s: float = math.inf) -> float:
    singles = single_chains(tables)
    chains = chains_of_few(tables, singles, until_s, work=work)
    return min(map(tables.cost_s, [*singles, *chains]), default=math.inf)


def test_with_room_for_all_it_finds_the_best_chain():
    compared = 0
    for seed in range(20):
        tables = Tables(problem(seed))
        if single_chains(tables):
            labels = Labels(tables, math.inf, [])
            labels.run()
            assert found(tables, math.inf) == labels.best_s
            compared += 1
    assert compared > 10


def test_with_room_for_few_its_chains_are_chains_of_the_whole_problem():
    better = 0
    for seed in range(20):
        tables = Tables(problem(seed))
        singles = single_chains(tables)
        for chain in chains_of_few(tables, singles, math.inf, work=table_work(tables, 3)):
            cuts = [(segment.device, segment.end) for segment in chain]
            assert tables.chain(cuts) == chain
            assert len({device for device, _ in cuts}) <= 3
            better += tables.cost_s(chain) < min(map(tables.cost_s, singles))
    assert better > 5


def test_devices_that_must_be_and_those_of_good_chains_come_first():
    asked = problem(3, requires=("d5",), pins={0: "d4"})
    tables = Tables(asked)
    assert {4, 5} <= set(promising(tables, [], 2))
    free = Tables(problem(3))
    best = min(single_chains(free), key=free.cost_s)
    assert best[0].device in promising(free, [best], 1)


def test_no_time_means_no_search():
    assert chains_of_few(Tables(problem(1)), [], time.monotonic() - 1, work=1e9) == []


def test_memory_lines_are_those_of_the_tables_they_are_taken_from():
    one = Tables(problem(2))
    other = Tables(problem(2), like=one)
    assert other.segments == one.segments


def test_the_fastest_devices_are_the_promising_ones_and_what_must_be_is_never_dropped():
    tables = Tables(problem(3))
    rows = [
        tables.problem.profile.layer_seconds(tables.problem.crowd, device)
        for device in tables.devices
    ]
    took_s = [sum(row.forward_s + row.backward_s for row in own) for own in rows]
    order = sorted(range(len(rows)), key=lambda device: (took_s[device], device))
    for count in range(1, len(rows) + 1):
        assert promising(tables, [], count) == sorted(order[:count])
    slow = Tables(problem(3, requires=(tables.devices[order[-1]], tables.devices[order[-2]])))
    assert promising(slow, [], 1) == sorted(order[-2:])


class Seen:
    """Stands for the search: keeps what it was asked, finds nothing."""

    asked: tuple = ()

    def __init__(self, tables, until_s, chains, **options):
        Seen.asked = (tables, until_s, options)
        self.chains = chains

    def run(self):
        return math.inf


def test_the_search_gets_no_larger_tables_than_asked_for_and_all_its_options(monkeypatch):
    monkeypatch.setattr(few_module, "Labels", Seen)
    tables = Tables(problem(1))
    for devices in range(2, len(DEVICES) + 1):
        work = table_work(tables, devices)
        chains_of_few(tables, [], math.inf, work=work, slack=0.25, most=7)
        own, until_s, options = Seen.asked
        assert len(own.devices) == devices
        assert until_s == math.inf
        assert options == {"slack": 0.25, "most": 7}


def test_nothing_is_searched_without_time_or_where_too_many_devices_must_be(monkeypatch):
    monkeypatch.setattr(few_module, "Labels", Seen)
    Seen.asked = ()
    tables = Tables(problem(1))
    assert chains_of_few(tables, [], time.monotonic() - 1, work=1e9) == []
    assert chains_of_few(tables, [], math.inf, work=table_work(tables, 1)) == []
    must = Tables(problem(1, requires=("d1", "d3", "d5")))
    assert chains_of_few(must, [], math.inf, work=table_work(must, 2)) == []
    assert Seen.asked == ()


def test_many_devices_on_few_layers_are_work_by_their_sets_alone():
    """Each set and device is a call of numpy, however few layers it looks at."""
    tables = Tables(problem(1))
    assert table_work(tables, 12) > _TABLE_WORK > table_work(tables, 10)
