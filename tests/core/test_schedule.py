"""Schedules are complete, in order, free of deadlock and within their memory bound."""

from __future__ import annotations

import pytest
from core_strategies import schedules
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.core import (
    Op,
    OpKind,
    PipelinePlan,
    Schedule,
    Stage,
    check_schedule,
    make_schedule,
    schedule_for,
    warmup_depths,
)
from crowdmesh_jax.errors import ScheduleError

F, B = OpKind.FORWARD, OpKind.BACKWARD


def ops(text: str) -> tuple[Op, ...]:
    return tuple(Op(OpKind(word[0]), int(word[1:])) for word in text.split())


def replay(schedule: Schedule, choose) -> list[int]:
    """Runs the ops one at a time in an order that `choose` picks; returns high-water marks.

    Independent of `check_schedule`: it moves messages between stages, one event at a time.
    """
    count, microbatches = schedule.num_stages, schedule.num_microbatches
    inbox = [set() for _ in range(count)]
    inbox[0] = {Op(F, m) for m in range(microbatches)}
    todo = [list(stage_ops) for stage_ops in schedule.ops]
    held: list[set[int]] = [set() for _ in range(count)]
    most = [0] * count
    while any(todo):
        able = [s for s in range(count) if todo[s] and todo[s][0] in inbox[s]]
        assert able, f"deadlock with {todo}"
        stage = choose(able)
        op = todo[stage].pop(0)
        inbox[stage].remove(op)  # each message serves one op
        if op.kind is F:
            held[stage].add(op.microbatch)
            most[stage] = max(most[stage], len(held[stage]))
            if stage == count - 1:
                inbox[stage].add(Op(B, op.microbatch))
            else:
                inbox[stage + 1].add(op)
        else:
            held[stage].remove(op.microbatch)  # KeyError: backward without a stash
            if stage:
                inbox[stage - 1].add(op)
    assert not any(held)
    assert not any(inbox)
    return most


@given(schedules(), st.randoms(use_true_random=False))
def test_a_replay_in_any_order_of_events_ends_within_the_memory_bound(schedule, random):
    check_schedule(schedule)
    most = replay(schedule, random.choice)
    assert most == [schedule.max_in_flight(stage) for stage in range(schedule.num_stages)]
    stages, microbatches = schedule.num_stages, schedule.num_microbatches
    if schedule.name == "1f1b":
        assert most == [min(stages - stage, microbatches) for stage in range(stages)]
    if schedule.name == "gpipe":
        assert most == [microbatches] * stages


@given(schedules())
def test_each_stage_runs_each_microbatch_once_each_way_in_order(schedule):
    expected = list(range(schedule.num_microbatches))
    for stage_ops in schedule.ops:
        assert [op.microbatch for op in stage_ops if op.kind is F] == expected
        assert [op.microbatch for op in stage_ops if op.kind is B] == expected


@given(st.integers(1, 7), st.integers(1, 12), st.data())
def test_eager_keeps_exactly_the_warmup_depths_it_was_given(num_stages, microbatches, data):
    depths = st.lists(st.integers(1, 15), min_size=num_stages, max_size=num_stages)
    warmups = sorted(data.draw(depths), reverse=True)
    schedule = make_schedule("eager", num_stages, microbatches, warmups)
    found = [schedule.max_in_flight(stage) for stage in range(num_stages)]
    assert found == [min(depth, microbatches) for depth in warmups]


@given(st.integers(2, 6), st.integers(1, 8), st.data())
def test_eager_refuses_exactly_the_warmups_that_would_deadlock(num_stages, microbatches, data):
    depth = st.none() | st.integers(1, 10)
    warmups = data.draw(st.lists(depth, min_size=num_stages, max_size=num_stages))
    filled, before = [], microbatches
    for stage, given_depth in enumerate(warmups):
        rule = min(2 * (num_stages - stage) - 1, before)
        before = min(rule if given_depth is None else given_depth, microbatches)
        filled.append(before)
    naive = Schedule(
        name="naive",
        ops=tuple(
            ops(
                " ".join(
                    [f"F{m}" for m in range(d)]
                    + [
                        word
                        for m in range(microbatches)
                        for word in ([f"B{m}"] + ([f"F{m + d}"] if m + d < microbatches else []))
                    ]
                )
            )
            for d in filled
        ),
    )
    try:
        check_schedule(naive)
    except ScheduleError:
        with pytest.raises(ScheduleError, match="deadlock"):
            make_schedule("eager", num_stages, microbatches, warmups)
    else:
        assert make_schedule("eager", num_stages, microbatches, warmups).ops == naive.ops


def test_1f1b_of_two_stages_and_three_microbatches_is_the_textbook_one():
    schedule = make_schedule("1f1b", 2, 3)
    assert schedule.ops == (ops("F0 F1 B0 F2 B1 B2"), ops("F0 B0 F1 B1 F2 B2"))


def test_eager_fills_the_round_trip_by_default():
    assert warmup_depths("eager", 4, 64) == (7, 5, 3, 1)
    assert warmup_depths("eager", 4, 4) == (4, 4, 3, 1)
    assert warmup_depths("eager", 4, 64, [2, None, None, None]) == (2, 2, 2, 1)


@pytest.mark.parametrize(
    ("stage_ops", "complaint"),
    [
        ((), "no stages"),
        (("",), "no forward"),
        (("F0 B0 F1",), "stage 0: B1 is missing"),
        (("F0 F1 B0 B1", "F0 B0 B1"), "stage 1: B1 stands before its forward"),
        (("F0 F0 B0",), "stage 0: F0 stands twice"),
        (("F0 B0 B0",), "stage 0: B0 stands twice"),
        (("B0 F0",), "B0 stands before its forward"),
        (("F0 F1 B1 B0",), "B1 stands where B0 is due"),
        (("F0 B0", "F1 B1"), "F1 is outside microbatches 0..0"),
        (("F0 B0 F1 B1", "F0 F1 B0 B1"), "deadlocks: stage 0 at B0, stage 1 at F1"),
        (("F0 F1 B0 B1", "F1 F0 B0 B1"), None),
    ],
)
def test_a_schedule_that_cannot_run_is_refused_by_stage_and_op(stage_ops, complaint):
    schedule = Schedule(name="mine", ops=tuple(ops(text) for text in stage_ops))
    if complaint is None:
        check_schedule(schedule)
        return
    with pytest.raises(ScheduleError, match="CM-210") as caught:
        check_schedule(schedule)
    assert complaint in str(caught.value)
    assert "'mine'" in str(caught.value)


def test_an_unknown_schedule_names_those_known():
    with pytest.raises(ScheduleError, match="known: 1f1b, eager, gpipe, mine"):
        make_schedule("zigzag", 2, 2, builders={"mine": make_schedule})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("1f1b", 0, 2), "num_stages must be >= 1, got 0"),
        (("1f1b", 2, 0), "microbatches must be >= 1, got 0"),
        (("eager", 2, 2, [1]), "1 warm-ups for 2 stages"),
        (("eager", 2, 2, [0, 1]), "stage 0: warm-up must be >= 1, got 0"),
        (("1f1b", 2, 2, [None, 1]), "takes no warm-ups, but stage 1 asks for 1"),
        (("eager", 2, 8, [1, 2]), "give stage 1 at most 1"),
    ],
)
def test_sizes_that_fit_no_schedule_are_refused_with_the_value(arguments, complaint):
    with pytest.raises(ScheduleError, match=complaint):
        make_schedule(*arguments)


def test_a_schedule_of_ones_own_is_built_by_name_and_checked():
    def one_at_a_time(num_stages, microbatches, warmups):
        line = ops(" ".join(f"F{m} B{m}" for m in range(microbatches)))
        return Schedule(name="serial", ops=(line,) * num_stages)

    def broken(num_stages, microbatches, warmups):
        return Schedule(name="broken", ops=(ops("F0 B0 F1 B1"), ops("F0 F1 B0 B1")))

    plan = PipelinePlan(
        stages=(
            Stage(device="a", first_layer=0, last_layer=0),
            Stage(device="b", first_layer=1, last_layer=1),
        ),
        num_layers=2,
        microbatches=2,
        schedule="serial",
    )
    schedule = schedule_for(plan, builders={"serial": one_at_a_time})
    assert schedule.max_in_flight(0) == 1
    with pytest.raises(ScheduleError, match="deadlocks"):
        make_schedule("broken", 2, 2, builders={"broken": broken})
    with pytest.raises(ScheduleError, match="asked for 2 x 3"):
        make_schedule("broken", 2, 3, builders={"broken": broken})
    with pytest.raises(ScheduleError, match="unknown schedule 'serial'"):
        schedule_for(plan)
