"""DAPPLE's latency, planner and warm-up policies, by hand."""

from __future__ import annotations

import pytest
from hand_problems import by_hand, lengths

from crowdmesh_jax.errors import InvalidValueError
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
