"""What the partition ILP claims: of its backend, of its bounds, and from a poor start."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from partition_problems import chain_profile, random_crowd, random_profile

from crowdmesh_jax.core import Crowd, DeviceId, LayerSeconds, Link
from crowdmesh_jax.errors import SolverError
from crowdmesh_jax.solvers import IlpSolver, PartitionProblem, PartitionResult, solve_ilp
from crowdmesh_jax.solvers.backends import MipOutcome
from crowdmesh_jax.solvers.partition import ilp as ilp_module
from crowdmesh_jax.solvers.partition.arrays import Costs
from crowdmesh_jax.solvers.partition.bounds import bounds_at, surviving
from crowdmesh_jax.solvers.partition.ilp import _largest_period_s, least_period_s
from crowdmesh_jax.solvers.partition.program import interchangeable
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Tables


def cost_s(result: PartitionResult) -> float:
    """R_0 + (M - 1) T of a plan, by the tables."""
    tables = Tables(result.problem)
    chain = tables.chain(
        [(tables.devices.index(s.device), s.last_layer + 1) for s in result.plan.stages]
    )
    assert chain is not None
    return tables.cost_s(chain)


HARD = PartitionProblem(
    profile=chain_profile(20),
    crowd=Crowd.local((1.0, 0.9, 0.8, 0.7), bandwidth_bytes_per_s=1e6),
    objective="closed_form",
)


def backend_that_says(monkeypatch, outcome: MipOutcome) -> list[float]:
    """Stands for every backend; returns the limits that it is given."""
    limits = []

    def say(mip, *, backend, time_limit_s):
        limits.append(time_limit_s)
        return outcome

    monkeypatch.setattr(ilp_module, "solve_mip", say)
    return limits


def test_a_backend_that_ran_out_of_time_proves_nothing(monkeypatch):
    best = IlpSolver(time_limit_s=100.0).solve(HARD)
    limits = backend_that_says(monkeypatch, MipOutcome(status="limit"))
    monkeypatch.setattr(ilp_module, "_MOST_BANDS", 2)  # leaves work to the program
    found = IlpSolver(time_limit_s=100.0).solve(HARD)
    assert not found.optimal
    assert found.gap is not None
    assert 0 < found.gap < 1
    assert cost_s(found) * (1 - found.gap) <= cost_s(best) * (1 + 1e-9)
    assert len(limits) == 1
    assert 0 < limits[0] <= 100.0
    backend_that_says(monkeypatch, MipOutcome(status="infeasible"))
    found = IlpSolver(time_limit_s=100.0).solve(HARD)
    assert (found.optimal, found.gap) == (True, 0.0), "nothing is cheaper than what is known"


def test_a_backend_that_finds_nothing_in_time_is_an_error_and_no_proof(monkeypatch):
    backend_that_says(monkeypatch, MipOutcome(status="limit"))
    with pytest.raises(SolverError, match=r"found no plan within 5 s for 20 layers on 4 devices"):
        IlpSolver(time_limit_s=5.0, presolve=False).solve(HARD)


def test_the_program_keeps_counts_and_required_devices():
    crowd = Crowd.local((1.0, 1.0, 0.9, 0.01), bandwidth_bytes_per_s=1e8)
    plain = PartitionProblem(profile=chain_profile(6), crowd=crowd, objective="closed_form")
    alone = IlpSolver(presolve=False)
    free = len(alone.solve(plain).plan.stages)
    assert free == 3
    assert len(alone.solve(replace(plain, max_stages=2)).plan.stages) == 2
    assert len(alone.solve(replace(plain, min_stages=4)).plan.stages) == 4
    assert "device-3" in alone.solve(replace(plain, requires=["device-3"])).plan.devices


def test_pairs_that_differ_in_wires_memory_or_rules_do_not_change_places():
    crowd = Crowd.local((1.0, 1.0, 1.0, 0.5))
    plain = PartitionProblem(profile=chain_profile(4), crowd=crowd)
    assert interchangeable(Tables(plain)) == [(0, 1), (1, 2)]
    devices = tuple(
        replace(device, memory_bytes=device.memory_bytes + index)
        for index, device in enumerate(crowd.devices)
    )
    apart = replace(plain, crowd=replace(crowd, devices=devices))
    assert interchangeable(Tables(apart)) == []
    assert interchangeable(Tables(replace(plain, requires=["device-1"]))) == [(0, 2)]
    assert interchangeable(Tables(replace(plain, bans=[(0, "device-2")]))) == [(0, 1)]
    ends = (DeviceId("device-0"), DeviceId("device-1"))
    one_way = Link(source=ends[0], target=ends[1], bandwidth_bytes_per_s=1e6)
    assert interchangeable(Tables(replace(plain, crowd=replace(crowd, links=(one_way,))))) == []


def test_what_survives_is_what_a_chain_below_the_cap_may_use():
    dropped = 0
    for seed in range(12):
        rng = random.Random(seed)
        devices = ["d0", "d1", "d2"]
        tables = Tables(
            PartitionProblem(
                profile=random_profile(rng, devices, 5),
                crowd=random_crowd(rng, devices, 5),
                schedule=rng.choice(["1f1b", "eager", "gpipe"]),
                compile_peak_bytes=0,
            )
        )
        chains = list(all_chains(tables))
        if not chains:
            continue
        costs = Costs(tables)
        cap_s = sorted(map(tables.cost_s, chains))[len(chains) // 4]
        low_s, high_s = least_period_s(tables), max(map(tables.period_s, chains))
        middle_s = (low_s + high_s) / 2
        bands = [(low_s, bounds_at(costs, middle_s)), (middle_s, bounds_at(costs, high_s))]
        segments, links = surviving(costs, bands, cap_s)
        for chain in chains:
            if tables.cost_s(chain) <= cap_s:
                assert set(chain) <= set(segments)
                for left, right in pairwise(chain):
                    assert (left.device, right.device, right.first) in links
        dropped += len(segments) < len(tables.segments)
    assert dropped > 3


def test_from_the_runner_up_it_finds_the_best_without_help_from_the_heuristics(monkeypatch):
    monkeypatch.setattr(ilp_module._Attempt, "_improve", lambda self, bounds: None)
    monkeypatch.setattr(ilp_module, "single_chains", lambda tables: [])
    started = near = 0
    for seed in range(24):
        rng = random.Random(seed)
        devices = ["d0", "d1", "d2"]
        problem = PartitionProblem(
            profile=random_profile(rng, devices, 5),
            crowd=random_crowd(rng, devices, 5),
            schedule=rng.choice(["1f1b", "eager", "gpipe"]),
            objective="closed_form",
            compile_peak_bytes=0,
        )
        tables = Tables(problem)
        ranked = sorted(all_chains(tables), key=tables.cost_s)
        best_s = tables.cost_s(ranked[0]) if ranked else math.inf
        worse = [chain for chain in ranked if tables.cost_s(chain) > best_s * (1 + 1e-6)]
        for start in worse[:1]:
            start_s = tables.cost_s(start)
            monkeypatch.setattr(ilp_module, "good_chains", lambda _, c=start, s=start_s: [(s, c)])
            found = solve_ilp(problem)
            assert found.optimal
            assert cost_s(found) == pytest.approx(best_s, rel=1e-6)
            started += 1
            near += start_s < best_s * 1.03
    assert started > 12
    assert near > 5


def test_no_period_is_longer_than_the_longest_under_gpipe():
    pairs = ((8.0, 0.1), (0.1, 8.0), (0.1, 0.1))
    rows = tuple(LayerSeconds(forward_s=forward, backward_s=back) for forward, back in pairs)
    profile = chain_profile(3, **{f"device-{index}": rows for index in range(3)})
    crowd = Crowd.local((1.0, 1.0, 1.0))
    pins = {index: f"device-{index}" for index in range(3)}  # no longer segment outdoes the sum
    problem = PartitionProblem(profile=profile, crowd=crowd, schedule="gpipe", pins=pins)
    tables = Tables(problem)
    apart = tables.chain([(0, 1), (1, 2), (2, 3)])
    assert apart is not None
    assert tables.period_s(apart) == pytest.approx(16.0)
    assert _largest_period_s(tables) >= 16.0
