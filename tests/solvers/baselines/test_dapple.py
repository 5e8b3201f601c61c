"""DAPPLE's latency, planner and warm-up policies, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hand_problems import any_problem, by_hand, lengths

from crowdmesh_jax.errors import InfeasibleError, InvalidValueError
from crowdmesh_jax.solvers.partition.baselines.dapple import DappleSolver
from crowdmesh_jax.solvers.partition.baselines.rounds import (
    Step,
    dominant_step,
    round_latency_s,
)


def test_the_latency_of_a_round_by_hand():
    # Stage (1, 2), transfer (0.5, 0.5), stage (2, 4); M = 4, so E = 3, 1, 6.
    # M E + all before: 12, 4 + 3, 24 + 4: the last step paces the round.
    steps = [Step(1, 2), Step(0.5, 0.5), Step(2, 4)]
    assert dominant_step(steps, 4) == 2
    # s = 0: 24 + 3 + 1 = 28.  s = 1: 1 + 24 + 1 = 26.  s = 2: 1.5 + 24 = 25.5.
    assert round_latency_s(steps, 4) == pytest.approx(28)
    # An all-reduce of 5 s on the last stage: 30.5, later than stage 0's last backward.
    assert round_latency_s([*steps[:2], Step(2, 4, 5)], 4) == pytest.approx(30.5)


def test_the_dominant_step_may_stand_before_others():
    # E = 6, 1, 3; M = 4: 24, 4 + 6, 12 + 7. Step 0 paces; s = 2: 2.5 + 24 - 7 + reduce.
    steps = [Step(2, 4), Step(0.5, 0.5), Step(1, 2, 10)]
    assert dominant_step(steps, 4) == 0
    assert round_latency_s(steps, 4) == pytest.approx(2.5 + 24 - 7 + 10)
    # The dominant step is not the slowest one: 5 comes late enough to outweigh 5.1.
    assert dominant_step([Step(2.5, 2.6), Step(2.5, 2.5)], 4) == 1


def test_two_stages_where_transfers_are_cheap_and_one_where_they_are_dear():
    # E = 2 a layer, M = 4. Alone: 16. Two stages: 2 + 4 x 2 = 10 and the transfers' E.
    crowd = {"a": [(1, 1)] * 2, "b": [(1, 1)] * 2}
    assert lengths(DappleSolver().solve(by_hand(crowd, cuts=[5])).plan) == [1, 1]  # E 1: 11
    # 20 bytes each way: E = 4 paces the round, 4 x 4 + 2 = 18 > 16.
    assert lengths(DappleSolver().solve(by_hand(crowd, cuts=[20])).plan) == [2]


def test_the_pivot_weighs_stages_by_their_place():
    # Layers of 2, 2, 4 s (E), M = 2, no transfers. Cut 1: E 2, 6: 2 + 12 = 14. Cut 2: E 4, 4:
    # 4 + 8 = 12. Alone 16. So cut 2.
    row = [(1, 1), (1, 1), (2, 2)]
    assert lengths(DappleSolver().solve(by_hand({"a": row, "b": row}, microbatches=2)).plan) == [
        2,
        1,
    ]


def test_a_group_shares_rows_evenly_where_its_ring_is_cheap():
    # One layer of E 4, M = 4: 16 alone; 8 + ring shared. Ring: 2 x 1/2 x params / 10.
    crowd = {"a": [(2, 2)], "b": [(2, 2)]}
    cheap = by_hand(crowd, rows=4, params=[70], share=True)
    assert [s.rows for s in DappleSolver().solve(cheap).plan.stages[0].shares] == [2, 2]
    dear = by_hand(crowd, rows=4, params=[90], share=True)  # 8 + 9 > 16
    assert DappleSolver().solve(dear).plan.stages[0].shares == ()


ROW = [(1, 1)] * 3
THREE = {"a": ROW, "b": ROW, "c": ROW}


def warmups(policy: str, memory: int = 10**9, **options) -> list[int | None]:
    problem = by_hand(
        THREE, microbatches=8, residuals=100, memory=memory, schedule="eager", **options
    )
    plan = DappleSolver(policy=policy).solve(problem).plan
    assert lengths(plan) == [1, 1, 1]
    return [stage.warmup for stage in plan.stages]


def test_the_two_warm_up_policies():
    assert warmups("PA") == [3, 2, 1]
    assert warmups("PB") == [5, 3, 1]


def test_memory_bounds_the_warm_up():
    # 100 bytes a microbatch in flight: 250 bytes hold two.
    assert warmups("PB", memory=250) == [2, 2, 1]


def test_the_better_policy_is_kept_and_named():
    problem = by_hand(THREE, microbatches=8, cuts=[5, 5], schedule="eager")
    steps = {}
    for policy in ("PA", "PB"):
        steps[policy] = DappleSolver(policy=policy).solve(problem).predicted.step_s
    best = DappleSolver().solve(problem)
    # Transfers of 1 s there and back beside stages of 2 s: one in flight per stage is too few.
    assert steps["PB"] < steps["PA"]
    assert best.predicted.step_s == steps["PB"]
    assert "warm-up policy PB" in best.notes


def test_other_schedules_keep_their_own_depths():
    result = DappleSolver(policy="PB").solve(by_hand(THREE, schedule="1f1b"))
    assert [stage.warmup for stage in result.plan.stages] == [None] * 3
    assert any("'1f1b'" in note for note in result.notes)


def test_an_unknown_policy_is_refused():
    with pytest.raises(InvalidValueError, match=r"CM-101.*policy.*'PC'"):
        DappleSolver(policy="PC")  # type: ignore[arg-type]


def latency_s(problem, ends: list[int]) -> float:
    """The round of stages that end there, one on each of the first devices."""
    steps, first = [], 0
    for place, end in enumerate(ends):
        device = problem.allowed_devices[place]
        seconds = problem.profile.layer_seconds(problem.crowd, device)[first:end]
        steps.append(Step(sum(s.forward_s for s in seconds), sum(s.backward_s for s in seconds)))
        if end < ends[-1]:
            other = problem.allowed_devices[place + 1]
            there, home = problem.crowd.link(device, other), problem.crowd.link(other, device)
            if there is None or home is None:
                return math.inf
            down, back = problem.profile.cut_bytes(end)
            steps.append(Step(there.transfer_s(down), home.transfer_s(back)))
        first = end
    return round_latency_s(steps, problem.microbatches)


def planned_s(problem) -> float:
    """DAPPLE's program written out: a prefix is kept by its round with the rest as last stage."""
    layers, best = problem.num_layers, math.inf
    kept: dict[int, list[int]] = {0: []}
    most = min(len(problem.allowed_devices), layers, problem.max_stages or layers)
    for stage in range(1, most + 1):
        following: dict[int, tuple[float, list[int]]] = {}
        for first, ends in sorted(kept.items()):
            if stage >= problem.min_stages:
                best = min(best, latency_s(problem, [*ends, layers]))
            for end in range(first + 1, layers):
                if stage == most:
                    break
                value = latency_s(problem, [*ends, end, layers])
                if value < following.get(end, (math.inf, []))[0]:
                    following[end] = value, [*ends, end]
        kept = {end: ends for end, (_, ends) in following.items()}
    return best


def test_the_program_finds_the_rounds_that_it_would_find_written_out():
    compared = longer = 0
    for seed in range(250):
        problem = any_problem(seed, max_layers=8, max_devices=5)
        problem = replace(problem, share=False, recompute="never", pins={}, bans=())
        try:
            result = DappleSolver().solve(problem)
        except InfeasibleError:
            continue
        if any("repaired" in note or "parts" in note for note in result.notes):
            continue
        expected = planned_s(problem)
        found = latency_s(problem, [stage.last_layer + 1 for stage in result.plan.stages])
        assert found == pytest.approx(expected), seed
        compared += 1
        longer += len(result.plan.stages) > 2
    assert compared > 60
    assert longer > 10
