"""From chains to a result: what is ranked, what is checked, what is said of those left out."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from partition_problems import chain_profile, random_crowd, random_profile

from crowdmesh_jax.core import Crowd, PipelinePlan
from crowdmesh_jax.errors import InfeasibleError, InvalidPlanError
from crowdmesh_jax.solvers import PartitionProblem, PartitionResult
from crowdmesh_jax.solvers.partition.finish import finish, left_out, lower_ids
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Chain, Tables
from crowdmesh_jax.solvers.units import format_seconds

DEVICES = ["d0", "d1", "d2"]


def problem_of(seed: int, **more) -> PartitionProblem:
    rng = random.Random(seed)
    return PartitionProblem(
        profile=random_profile(rng, DEVICES, 5),
        crowd=random_crowd(rng, DEVICES, 5),
        compile_peak_bytes=0,
        **more,
    )


def finished(tables: Tables, chains: list[Chain], **more) -> PartitionResult:
    options = {"optimal": True, "gap": 0.0, "solver": "mine", "started_s": 0.0, **more}
    return finish(tables, chains, **options)


def split(seed: int) -> tuple[Tables, list[Chain], Chain, Chain] | None:
    """Tables whose best chain by the closed form is not the one by the timeline."""
    tables = Tables(problem_of(seed))
    chains = list(all_chains(tables))
    if not chains:
        return None
    closed = min(chains, key=lambda chain: (tables.cost_s(chain), tables.rank(chain)))
    exact = min(chains, key=lambda chain: (tables.evaluate_s(chain), tables.rank(chain)))
    if tables.evaluate_s(closed) < tables.evaluate_s(exact) * (1 + 1e-6):
        return None
    return tables, chains, closed, exact


SPLITS = [made for made in map(split, range(60)) if made is not None][:8]


def test_the_timeline_ranks_as_many_as_asked_for_while_there_is_time():
    assert len(SPLITS) == 8
    for tables, chains, closed, exact in SPLITS:
        fixed = {"polish": False, "keep_order": True}

        def step_s(chains=chains, tables=tables, fixed=fixed, **more):
            return finished(tables, chains, **fixed, **more).predicted.step_s

        exact_s, closed_s = tables.evaluate_s(exact), tables.evaluate_s(closed)
        assert step_s(most=10_000) == pytest.approx(exact_s)
        assert step_s(most=1) == pytest.approx(closed_s)
        assert step_s(most=10_000, end_s=-math.inf) == pytest.approx(closed_s)
        by_form = Tables(replace(tables.problem, objective="closed_form"))
        found = finished(by_form, chains, **fixed)
        assert found.predicted.step_s == pytest.approx(closed_s)


def test_small_moves_polish_the_winner_while_there_is_time():
    gained = 0
    for tables, _, closed, exact in SPLITS:
        rough = finished(tables, [closed], polish=False, keep_order=True).predicted.step_s
        late = finished(tables, [closed], end_s=-math.inf, keep_order=True).predicted.step_s
        done = finished(tables, [closed], keep_order=True).predicted.step_s
        assert rough == late == pytest.approx(tables.evaluate_s(closed))
        assert tables.evaluate_s(exact) * (1 - 1e-9) <= done <= rough
        gained += done < rough * (1 - 1e-9)
    assert gained > 2


@pytest.mark.parametrize("objective", ["closed_form", "evaluate"])
def test_equal_devices_go_by_id_unless_the_order_is_kept(objective):
    crowd = Crowd.local((1.0, 1.0, 1.0))
    problem = PartitionProblem(profile=chain_profile(6), crowd=crowd, objective=objective)
    tables = Tables(problem)
    chain = tables.chain([(2, 2), (0, 6)])
    assert chain is not None
    assert tables.rank(lower_ids(tables, chain)) == (("device-0", 2), ("device-1", 6))
    options = {"polish": False}
    assert finished(tables, [chain], **options).plan.devices == ("device-0", "device-1")
    kept = finished(tables, [chain], keep_order=True, **options)
    assert kept.plan.devices == ("device-2", "device-0")


def test_lower_ids_never_cost_more():
    moved = 0
    for seed in range(12):
        tables = Tables(problem_of(seed))
        for chain in all_chains(tables):
            made = lower_ids(tables, chain)
            assert tables.cost_s(made) <= tables.cost_s(chain) * (1 + 1e-8)
            assert tables.rank(made) <= tables.rank(chain)
            moved += made != chain
    assert moved > 0


def test_a_plan_that_breaks_the_problem_never_gets_out(monkeypatch):
    crowd = Crowd.local((1.0, 1.0))
    tables = Tables(PartitionProblem(profile=chain_profile(6), crowd=crowd, max_stages=1))
    chain = tables.chain([(0, 6)])
    assert chain is not None
    wrong = PipelinePlan.even(6, ["device-0", "device-1"], microbatches=8)
    monkeypatch.setattr(Tables, "plan", lambda self, chain: wrong)
    with pytest.raises(InvalidPlanError, match="at most 1 asked for"):
        finished(tables, [chain])


def test_where_memory_holds_no_candidate_under_the_schedule_asked_for_one_device_may(monkeypatch):
    crowd = Crowd.local((1.0, 1.0))
    problem = PartitionProblem(profile=chain_profile(6), crowd=crowd, schedule="zb-h1")
    tables = Tables(problem)
    two = tables.chain([(0, 3), (1, 6)])
    assert two is not None
    # As if neither device held so much.
    held = Tables.evaluate_s

    def evaluate_s(self, chain):
        return math.inf if len(chain) > 1 else held(self, chain)

    monkeypatch.setattr(Tables, "evaluate_s", evaluate_s)
    found = finished(tables, [two], polish=False)
    assert found.plan.devices == ("device-0",)
    assert (found.optimal, found.gap) == (False, None)
    monkeypatch.setattr(Tables, "evaluate_s", lambda self, chain: math.inf)
    with pytest.raises(InfeasibleError, match=r"'zb-h1' keeps more in flight .* 'mine' found"):
        finished(tables, [two])


def test_a_proof_is_passed_on_as_it_came():
    tables, chains, *_ = SPLITS[0]
    assert finished(tables, chains).optimal
    unproven = finished(tables, chains, optimal=False, gap=0.25)
    assert (unproven.optimal, unproven.gap) == (False, 0.25)


def test_each_device_that_is_left_out_has_its_reason():
    crowd = Crowd.local((1.0, 0.4, 1.0, 1.0))
    small = replace(crowd.devices[3], memory_bytes=1_000)
    problem = PartitionProblem(
        profile=chain_profile(2),
        crowd=replace(crowd, devices=(*crowd.devices[:3], small)),
        compile_peak_bytes=0,
        bans=["device-2"],
    )
    tables = Tables(problem)
    chain = tables.chain([(0, 2)])
    assert chain is not None
    # With device-1: the cheapest by the closed form, told by the timeline.
    with_it = [made for made in all_chains(tables) if any(s.device == 1 for s in made)]
    best = min(with_it, key=lambda made: (tables.cost_s(made), tables.rank(made)))
    assert tables.evaluate_s(best) != pytest.approx(tables.cost_s(best), rel=1e-3)
    assert left_out(tables, chain) == {
        "device-1": f"best plan found with it: {format_seconds(tables.evaluate_s(best))}",
        "device-2": "not allowed",
        "device-3": "cannot hold any layer that it may run",
    }
    late = left_out(tables, chain, -math.inf)
    assert late["device-1"] == "no time was left to look for plans with it"
    pinned = Tables(replace(problem, pins={0: "device-0", 1: "device-0"}))
    own = pinned.chain([(0, 2)])
    assert own is not None
    assert left_out(pinned, own)["device-1"] == "cannot hold any layer that it may run"
