"""Laws of an undisturbed run, under any order of events that the channels allow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.core import schedule_for
from crowdmesh_jax.core.plan import PipelinePlan
from crowdmesh_jax.core.timeline import evaluate
from crowdmesh_jax.core.times import CutTimes, StageTimes
from crowdmesh_jax.protocol import NonFinitePolicy, Tie, member, messages, records
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me

from .virtual import World


def make_plan(stages: int, microbatches: int, schedule: str, layers: int = 6) -> PipelinePlan:
    devices = [f"d{i}" for i in range(stages)]
    return PipelinePlan.even(layers, devices, microbatches=microbatches, schedule=schedule)


plans = st.builds(
    make_plan, st.integers(1, 4), st.integers(1, 6), st.sampled_from(["gpipe", "1f1b", "eager"])
)


@st.composite
def ties(draw: Any) -> tuple[Tie, ...]:
    owners = draw(st.lists(st.integers(0, 4), unique=True, max_size=3))
    return tuple(
        Tie(
            owner_layer=owner,
            borrower_layers=tuple(
                draw(st.lists(st.integers(owner + 1, 5), min_size=1, max_size=2, unique=True))
            ),
        )
        for owner in owners
    )


@settings(max_examples=150, deadline=None)
@given(plans, st.integers(1, 5), st.integers(0, 2**32), ties())
def test_every_run_completes_with_each_update_applied_once_in_order(plan, steps, seed, tied):
    world = World(plan, steps=steps, seed=seed, ties=tied)
    world.run()
    assert world.hub.fault is None
    assert world.hub.completed == steps
    once = [(t, tuple((t, m) for m in range(plan.microbatches))) for t in range(steps)]
    for body in world.members.values():
        assert body.history == once
        # The last Tied may come after Release: nobody computes with it any more.
        assert set(body.borrowed.values()) <= {steps - 1, steps}
        assert body.state.phase.value == "idle"
        assert not body.rejects
    assert world.hub.checkpoints == {steps: [tuple(once)] * len(plan.stages)}
    assert [news.step for news in world.hub.shown] == list(range(steps))
    assert [news.values["loss"] for news in world.hub.shown] == [float(t) for t in range(steps)]


seconds = st.floats(0.001, 2.0)
stage_times = st.builds(StageTimes, forward_s=seconds, backward_s=seconds, update_s=seconds)
cut_times = st.builds(
    CutTimes,
    forward_latency_s=seconds,
    forward_transfer_s=seconds,
    backward_latency_s=seconds,
    backward_transfer_s=seconds,
)


@settings(max_examples=60, deadline=None)
@given(plans, st.data())
def test_a_run_in_virtual_time_takes_exactly_as_long_as_evaluate_says(plan, data):
    count = len(plan.stages)
    stages = data.draw(st.lists(stage_times, min_size=count, max_size=count))
    cuts = data.draw(st.lists(cut_times, min_size=count - 1, max_size=count - 1))
    limits = ce.Deadlines(step_floor_s=1e4, first_step_s=1e4)
    world = World(plan, steps=4, stages=stages, cuts=cuts, deadlines=limits)
    world.run()
    timeline = evaluate(schedule_for(plan), stages, cuts)
    done_s = world.hub.done_s
    steps_s = [later - sooner for sooner, later in itertools.pairwise(done_s)]
    assert steps_s == pytest.approx([timeline.step_s] * 3, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(2, 9), st.integers(1, 3), st.integers(0, 2**32))
def test_every_checkpoint_holds_one_version_of_all_stages(plan, steps, every, seed):
    world = World(plan, steps=steps, seed=seed, snapshot_every=every)
    world.run()
    assert world.hub.completed == steps
    for version, shards in world.hub.checkpoints.items():
        assert [len(history) for history in shards] == [version] * len(plan.stages)
        assert len(set(shards)) == 1
    waves = [r.version for r in world.hub.journal if isinstance(r, records.Wave)]
    assert waves == sorted(world.hub.checkpoints)
    assert waves[-1] == steps


def test_periodic_checkpoints_come_at_the_asked_interval_when_messages_are_quick():
    times = [StageTimes(forward_s=0.1, backward_s=0.2)] * 2
    world = World(make_plan(2, 4, "1f1b"), steps=10, stages=times, snapshot_every=3)
    world.run()
    assert sorted(world.hub.checkpoints) == [3, 6, 9, 10]


def test_members_are_measured_one_at_a_time_before_anyone_runs():
    world = World(make_plan(3, 2, "1f1b"), steps=1, seed=3, measure_repeats=7)
    world.run()  # the virtual body checks that no one computes meanwhile
    told = [news for news in world.hub.news if isinstance(news, ce.StageTimes)]
    assert [news.seconds for news in told] == [{f"d{i}": {"forward": 7.0} for i in range(3)}]
    kinds = [type(record).__name__ for record in world.hub.journal]
    assert kinds.index("MembersMeasured") < kinds.index("Resumed")


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(0, 3), st.sampled_from(["nan", "inf"]), st.integers(0, 2**32))
def test_a_non_finite_step_halts_with_the_state_from_before_it(plan, bad, how, seed):
    world = World(plan, steps=4, seed=seed, bad_steps={bad: how})
    world.run()
    assert world.hub.fault is not None
    assert world.hub.fault.kind == "NonFiniteLossError"
    assert f"step {bad}" in world.hub.fault.text
    assert list(world.hub.checkpoints) == [bad + 1]
    for history in world.hub.checkpoints[bad + 1]:
        assert [step for step, _ in history] == list(range(bad + 1))
        assert history[bad] == (bad, ())  # counted, not applied
    assert all(body.state.phase.value == "idle" for body in world.members.values())


def test_a_non_finite_step_goes_to_the_optimizer_where_the_job_says_continue():
    policy = NonFinitePolicy.CONTINUE
    world = World(make_plan(2, 2, "1f1b"), steps=3, bad_steps={1: "nan"}, on_nonfinite=policy)
    world.run()
    assert world.hub.completed == 3
    assert [news.verdict.is_finite for news in world.hub.shown] == [True, False, True]
    assert all(len(update) == 2 for body in world.members.values() for _, update in body.history)


def test_a_step_without_any_loss_weight_is_counted_and_skipped():
    world = World(make_plan(3, 2, "gpipe"), steps=3, bad_steps={1: "weightless"})
    world.run()
    assert world.hub.completed == 3
    for body in world.members.values():
        assert [len(update) for _, update in body.history] == [2, 0, 2]


def test_frames_that_overtake_resume_wait_for_it():
    """Stage 0's Resume may come first; its frames then reach a stage that has none yet."""
    seen = set()

    def watch(world, device, event, actions):
        message = getattr(event, "message", None)
        if type(message).__name__ == "Forward":
            seen.add(world.members[device].state.phase.value)

    for seed in range(40):
        world = World(make_plan(3, 3, "eager"), steps=2, seed=seed)
        world.watch = watch
        world.run()
        assert world.hub.completed == 2
    assert seen == {"installed", "run"}


def test_a_borrower_starts_a_step_only_with_the_owners_new_value():
    """Channels keep Tied before the next F; should one not, the borrower still waits."""
    tie = Tie(owner_layer=0, borrower_layers=(3, 5))
    world = World(make_plan(3, 2, "1f1b"), steps=9, seed=3, ties=(tie,))
    body = world.members["d1"]
    world.run(until=lambda: body.state.step == 2 and body.state.tied_due != ())
    forward = messages.Forward(run="r1", epoch=1, step=2, microbatch=0, cut=2)
    event = me.MessageReceived(sender="d0", message=forward)
    state, actions = member.handle(body.state, event, world.now_s)
    assert [type(action) for action in actions] == [me.Keep]
    tied = messages.Tied(run="r1", epoch=1, step=1, layer=0)
    event = me.MessageReceived(sender="d0", message=tied)
    state, actions = member.handle(state, event, world.now_s)
    kinds = [type(action) for action in actions]
    assert kinds == [me.Keep, me.SendMessage, me.Adopt, me.Compute]  # passed on first
    assert state.tied_due == ()


def test_ops_are_issued_ahead_of_the_compute_queue():
    """Apply(t), F(t+1) and what follows stand in the queue before Apply is done."""
    world = World(make_plan(1, 3, "gpipe"), steps=3, seed=1)
    queued = []
    world.watch = lambda world, device, event, actions: queued.append(actions)
    body = world.members["d0"]
    world.run(until=lambda: body.state.step == 1)
    kinds = [type(action) for action in queued[-1]]
    first = kinds.index(me.Apply)
    data_was_there = 1 in body.state.data_ready
    assert body.state.version == 0
    assert (me.Compute in kinds[first:]) == data_was_there
    assert data_was_there, "choose a seed where the batch came in time"
    assert kinds.count(me.Compute) == 6
    assert kinds[-2:] == [me.FinishStep, me.Reduce]
