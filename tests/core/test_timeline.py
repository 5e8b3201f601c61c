"""`evaluate` against a simulation with a clock, written from the rules and nothing else."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque

import pytest
from core_strategies import split_schedules, times
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.core import (
    CutTimes,
    Op,
    OpKind,
    Schedule,
    StageTimes,
    evaluate,
    evaluate_step_s,
    make_schedule,
)
from crowdmesh_jax.errors import InvalidValueError, ScheduleError

F, B, W = OpKind.FORWARD, OpKind.BACKWARD, OpKind.WEIGHT


class Simulation:
    """Stages and links as machines that react to events; a heap is the clock."""

    def __init__(self, schedule, stages, cuts, num_steps):
        self.schedule, self.stages, self.cuts = schedule, stages, cuts
        self.now, self.events, self.serial = 0.0, [], itertools.count()
        count = schedule.num_stages
        self.step, self.position = [0] * count, [0] * count
        self.busy = [False] * count
        self.here = [set() for _ in range(count)]
        self.scalars = [set() for _ in range(count)]  # steps whose scalars are complete here
        self.reduced = [set() for _ in range(count)]
        self.queues = {(e, k): deque() for e in range(count - 1) for k in (F, B)}
        self.sending = dict.fromkeys(self.queues, False)
        self.num_steps = num_steps
        self.log, self.sent, self.commits = [], [], []
        for stage in range(count):
            self.wake(stage)
        while self.events:
            self.now, _, act = heapq.heappop(self.events)
            act()

    def after(self, delay, act):
        heapq.heappush(self.events, (self.now + delay, next(self.serial), act))

    def wake(self, stage):
        if self.busy[stage] or self.step[stage] == self.num_steps:
            return
        ops = self.schedule.ops[stage]
        if self.position[stage] == len(ops):
            return
        op = ops[self.position[stage]]
        needs_message = op.kind is not W and not (stage == 0 and op.kind is F)
        if needs_message and (self.step[stage], op) not in self.here[stage]:
            return
        self.busy[stage] = True
        self.position[stage] += 1
        start = self.now
        its = self.stages[stage]
        is_split = any(other.kind is W for other in ops)
        whole = its.backward_s - its.weight_s if is_split else its.backward_s
        seconds = {F: its.forward_s, B: whole, W: its.weight_s}[op.kind]
        self.after(seconds, lambda: self.done(stage, op, start))

    def done(self, stage, op, start):
        step = self.step[stage]
        self.busy[stage] = False
        self.log.append((step, stage, op, start, self.now))
        last = self.schedule.num_stages - 1
        if op.kind is F and stage == last:
            self.here[stage].add((step, Op(B, op.microbatch)))
        elif op.kind is F:
            self.queues[stage, F].append((step, op))
            self.serve(stage, F)
        elif op.kind is B and stage:
            self.queues[stage - 1, B].append((step, op))
            self.serve(stage - 1, B)
        if self.position[stage] == len(self.schedule.ops[stage]):
            self.busy[stage] = True  # until it has applied
            self.after(self.stages[stage].reduce_s, lambda: self.reduce(stage, step))
        self.wake(stage)

    def serve(self, cut, kind):
        if self.sending[cut, kind] or not self.queues[cut, kind]:
            return
        self.sending[cut, kind] = True
        step, op = self.queues[cut, kind].popleft()
        times, start = self.cuts[cut], self.now
        transfer = times.forward_transfer_s if kind is F else times.backward_transfer_s
        latency = times.forward_latency_s if kind is F else times.backward_latency_s
        target = cut + 1 if kind is F else cut

        def arrived():
            self.sent.append((step, cut, op, start, self.now))
            self.here[target].add((step, op))
            self.wake(target)

        def freed():
            self.sending[cut, kind] = False
            self.after(latency, arrived)
            self.serve(cut, kind)

        self.after(transfer, freed)

    def reduce(self, stage, step):
        self.reduced[stage].add(step)
        self.ride_up(stage, step)

    def ride_up(self, stage, step):
        last = self.schedule.num_stages - 1
        if step not in self.reduced[stage]:
            return
        if stage != last and step not in self.scalars[stage]:
            return
        if stage == 0:
            self.commits.append(self.now)
            self.commit(0, step)
            return

        def arrived():
            self.scalars[stage - 1].add(step)
            self.ride_up(stage - 1, step)

        self.after(self.cuts[stage - 1].backward_latency_s, arrived)

    def commit(self, stage, step):
        if stage < self.schedule.num_stages - 1:
            self.after(self.cuts[stage].forward_latency_s, lambda: self.commit(stage + 1, step))
        self.after(self.stages[stage].update_s, lambda: self.applied(stage))

    def applied(self, stage):
        self.step[stage] += 1
        self.position[stage] = 0
        self.busy[stage] = False
        self.wake(stage)


@st.composite
def cases(draw):
    schedule = draw(split_schedules(5, 7))
    return (schedule, *draw(times(schedule.num_stages)))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_time_equals_that_of_a_simulation_with_a_clock(case):
    schedule, stages, cuts = case
    timeline = evaluate(schedule, stages, cuts)
    world = Simulation(schedule, stages, cuts, num_steps=4)
    assert len(world.commits) == 4
    assert timeline.commit_s == world.commits[0]
    steps = [later - earlier for earlier, later in itertools.pairwise(world.commits)]
    assert steps == [timeline.step_s] * 3  # steady from the second step on
    assert evaluate_step_s(schedule, stages, cuts) == timeline.step_s
    ops = {(op.stage, Op(op.kind, op.microbatch), op.start_s, op.end_s) for op in timeline.ops}
    assert ops == {entry[1:] for entry in world.log if entry[0] == 0}
    assert len(timeline.ops) == len(ops)
    kinds = {"forward": F, "backward": B}
    transfers = {
        (t.cut, Op(kinds[t.direction], t.microbatch), t.start_s, t.end_s)
        for t in timeline.transfers
    }
    assert transfers == {entry[1:] for entry in world.sent if entry[0] == 0}
    assert len(timeline.transfers) == len(transfers)


@given(cases())
def test_shares_account_for_all_work_of_a_step(case):
    schedule, stages, cuts = case
    timeline = evaluate(schedule, stages, cuts)
    count = schedule.num_microbatches
    for bubble, t in zip(timeline.bubble_share, stages, strict=True):
        busy_s = count * (t.forward_s + t.backward_s) + t.update_s + t.reduce_s
        if timeline.step_s:
            assert (1 - bubble) * timeline.step_s == pytest.approx(busy_s)
    for (down, back), cut in zip(timeline.link_busy_share, cuts, strict=True):
        assert down * timeline.step_s == pytest.approx(count * cut.forward_transfer_s)
        assert back * timeline.step_s == pytest.approx(count * cut.backward_transfer_s)
        assert 0 <= down <= 1
        assert 0 <= back <= 1


@given(cases(), st.data())
def test_nothing_gets_earlier_when_something_gets_slower(case, data):
    schedule, stages, cuts = case
    stage = data.draw(st.integers(0, len(stages) - 1))
    field = data.draw(st.sampled_from(["forward_s", "backward_s", "update_s", "reduce_s"]))
    # Slower as a whole: a longer weight part alone would make the other part shorter.
    values = {name: getattr(stages[stage], name) for name in StageTimes.__dataclass_fields__}
    values[field] += 0.5
    slower = (*stages[:stage], StageTimes(**values), *stages[stage + 1 :])
    assert evaluate_step_s(schedule, slower, cuts) >= evaluate_step_s(schedule, stages, cuts)


def test_a_later_stage_delays_the_next_step_only_by_what_the_first_microbatch_does_not_hide():
    schedule = make_schedule("1f1b", 2, 2)
    cuts = [CutTimes(forward_latency_s=1.0, backward_latency_s=1.0)]

    def step_s(update_s):
        late = StageTimes(forward_s=0.0, backward_s=3.0, update_s=update_s)
        return evaluate(schedule, [StageTimes(forward_s=1.0, backward_s=2.0), late], cuts).step_s

    # Commit and the first microbatch both pay the cut's latency; the forward of 1 s hides 1 s.
    assert step_s(1.0) == step_s(0.0)
    assert step_s(1.5) == step_s(0.0) + 0.5


def test_two_unequal_stages_give_the_times_worked_out_by_hand():
    stages = [StageTimes(forward_s=1.0, backward_s=2.0), StageTimes(forward_s=0.0, backward_s=2.0)]
    cuts = [CutTimes(forward_latency_s=0.5, forward_transfer_s=2.0, backward_transfer_s=1.0)]
    timeline = evaluate(make_schedule("1f1b", 2, 2), stages, cuts)
    shown = [(f"{op.kind.value}{op.microbatch}", op.start_s, op.end_s) for op in timeline.ops]
    assert shown == [
        ("F0", 0.0, 1.0),
        ("F1", 1.0, 2.0),
        ("B0", 6.5, 8.5),
        ("B1", 8.5, 10.5),
        ("F0", 3.5, 3.5),
        ("B0", 3.5, 5.5),
        ("F1", 5.5, 5.5),  # sent at 3 when the link is free, not at 2
        ("B1", 5.5, 7.5),
    ]
    assert [(t.direction, t.start_s, t.end_s) for t in timeline.transfers] == [
        ("forward", 1.0, 3.5),
        ("forward", 3.0, 5.5),
        ("backward", 5.5, 6.5),
        ("backward", 7.5, 8.5),
    ]
    assert timeline.commit_s == timeline.step_s == 10.5
    assert len(timeline.stage_ops(1)) == 4


def test_lengths_that_do_not_match_are_told():
    schedule = make_schedule("1f1b", 3, 2)
    with pytest.raises(ScheduleError, match=r"3 stages, given are times of 2 stages and 1 cuts"):
        evaluate(schedule, [StageTimes(forward_s=1, backward_s=1)] * 2, [CutTimes()])


def test_a_deadlock_is_told_and_not_waited_for():
    line = tuple(Op(kind, m) for m in (0, 1) for kind in (F, B))
    wrong = (Op(F, 0), Op(F, 1), Op(B, 0), Op(B, 1))
    schedule = Schedule(name="mine", ops=(line, wrong))
    with pytest.raises(ScheduleError, match="stage 0 at B0, stage 1 at F1"):
        evaluate(schedule, [StageTimes(forward_s=1, backward_s=1)] * 2, [CutTimes()])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_seconds_must_be_finite_and_not_negative(bad):
    with pytest.raises(InvalidValueError, match="backward_s must be finite"):
        StageTimes(forward_s=0.0, backward_s=bad)
    with pytest.raises(InvalidValueError, match="forward_latency_s must be finite"):
        CutTimes(forward_latency_s=bad)


def test_evaluating_eight_stages_and_32_microbatches_takes_milliseconds():
    schedule = make_schedule("1f1b", 8, 32)
    stages = [StageTimes(forward_s=1.0, backward_s=2.0, update_s=9.0)] * 8
    cuts = [CutTimes(forward_transfer_s=0.5, backward_transfer_s=0.5)] * 7

    def best_s(call):
        def once():
            start = time.thread_time()
            call(schedule, stages, cuts)
            return time.thread_time() - start

        return min(once() for _ in range(20))

    assert best_s(evaluate_step_s) < 0.002
    assert best_s(evaluate) < 0.008
