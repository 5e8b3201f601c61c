"""Laws of evaluation during training, under any order of events that the channels allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax import errors
from crowdmesh_jax.core.times import CutTimes, StageTimes
from crowdmesh_jax.protocol import BestRule, EvaluationPlan, Mark, member, messages, records
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.member_evaluation import EVAL_AHEAD

from .test_faults import QUICK, at_step
from .test_run import make_plan, plans, ties
from .virtual import World

evaluations = st.builds(
    EvaluationPlan, microbatches=st.integers(1, 9), every=st.none() | st.integers(1, 4)
)
LOWEST = BestRule(metric="loss", mode="min")


def due(plan: EvaluationPlan, steps: int) -> list[int]:
    return [version for version in range(1, steps + 1) if plan.is_due(version, steps)]


def run(plan, steps, **fields) -> World:
    world = World(plan, steps=steps, **fields)
    world.run()
    return world


@settings(max_examples=50, deadline=None)
@given(plans, st.integers(1, 5), st.integers(0, 2**32), ties(), evaluations, st.booleans())
def test_every_due_version_is_evaluated_and_training_is_as_without(
    plan, steps, seed, tied, evaluation, keeps
):
    """The body checks versions, order and bounds of each evaluation op."""
    fields = {"seed": seed, "ties": tied}
    if keeps:
        evaluation = replace(evaluation, keeps_state=True)
        fields["keep_best"] = LOWEST
    world = run(plan, steps, evaluation=evaluation, **fields)
    without = run(plan, steps, seed=seed, ties=tied)
    assert world.hub.fault is None
    assert world.hub.completed == steps
    assert world.hub.evaluations == {v: {"loss": float(v)} for v in due(evaluation, steps)}
    for device, body in world.members.items():
        assert body.history == without.members[device].history
        assert not body.rejects
        assert body.state.phase.value == "idle"
        wanted = [(v, m) for v in due(evaluation, steps) for m in range(evaluation.microbatches)]
        assert body.evaluated == wanted
    assert world.hub.checkpoints[steps] == without.hub.checkpoints[steps]
    journalled = [r.version for r in world.hub.journal if isinstance(r, records.Evaluation)]
    assert journalled == due(evaluation, steps)


@settings(max_examples=40, deadline=None)
@given(
    plans, st.integers(1, 6), st.integers(0, 2**32), st.lists(st.integers(0, 3), min_size=6),
    st.sampled_from(["min", "max"]), st.integers(1, 2), st.none() | st.integers(0, 3),
)  # fmt: skip
def test_the_best_version_is_kept_whole_and_only_improvements_are_written(
    plan, steps, seed, scores, mode, every, earlier
):
    rule = BestRule(metric="loss", mode=mode)
    evaluation = EvaluationPlan(microbatches=2, every=every, keeps_state=True)
    values = [float("nan") if score == 3 else float(score) for score in scores]
    world = run(
        plan, steps, seed=seed, evaluation=evaluation, keep_best=rule, best=earlier,
        scores=lambda version: values[version - 1],
    )  # fmt: skip
    assert world.hub.completed == steps
    best, wanted = earlier, []
    for version in due(evaluation, steps):
        if rule.is_better(values[version - 1], best):
            best = values[version - 1]
            wanted.append(version)
    assert list(world.hub.best) == wanted
    for version, shards in world.hub.best.items():
        assert [len(history) for history in shards] == [version] * len(plan.stages)
        assert shards == world.hub.checkpoints[version]
    assert not world.hub.held, "memory of all others is free again"
    kept = [record for record in world.hub.journal if isinstance(record, records.Best)]
    assert [record.version for record in kept] == wanted
    waves = [r for r in world.hub.journal if isinstance(r, records.Wave | records.Best)]
    for version in wanted:  # the newest checkpoint is never older than the best version
        order = [type(r) for r in waves if r.version == version]
        assert order == [records.Wave, records.Best]


@settings(max_examples=25, deadline=None)
@given(plans, st.data(), st.integers(0, 2**32))
def test_a_member_lost_while_evaluating_ends_the_run_and_is_named(plan, data, seed):
    evaluation = EvaluationPlan(microbatches=6, every=1)
    world = World(plan, steps=30, seed=seed, evaluation=evaluation, deadlines=QUICK)
    victim = data.draw(st.sampled_from(plan.devices))
    body = world.members[victim]
    done = data.draw(st.integers(0, 5))
    world.run(until=lambda: (body.state.eval_version or 0) >= 2 and body.state.eval_done >= done)
    world.kill(victim)
    world.run()
    assert world.hub.fault.kind == "AgentLostError"
    assert victim in world.hub.fault.text
    assert all(b.state.phase.value == "idle" for b in world.members.values() if not b.is_dead)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.data(), st.integers(0, 2**32))
def test_a_member_lost_in_the_last_evaluation_ends_the_run_with_the_result_safe(count, data, seed):
    """Its shard is here, but the evaluation still needs it: nobody waits for a deadline."""
    plan = make_plan(count, 2, "1f1b")
    evaluation = EvaluationPlan(microbatches=40)
    world = World(plan, steps=2, seed=seed, evaluation=evaluation)
    world.run(until=lambda: world.hub.state.checkpoint == 2)
    if world.hub.state.is_over or not world.hub.state.awaited:
        return
    world.kill(data.draw(st.sampled_from(plan.devices)))
    killed_s = world.now_s
    world.run(until=lambda: world.hub.state.is_over)
    if world.hub.completed is None:
        assert world.hub.fault.kind == "AgentLostError"
        assert "newest checkpoint: version 2" in world.hub.fault.text
        assert world.now_s - killed_s < 2


@settings(max_examples=25, deadline=None)
@given(plans, st.integers(0, 5), st.integers(0, 2**32), st.booleans())
def test_an_interrupt_among_evaluations_keeps_the_last_version(plan, step, seed, keeps):
    evaluation = EvaluationPlan(microbatches=3, every=1, keeps_state=keeps)
    keep_best = LOWEST if keeps else None
    world = World(plan, steps=9, seed=seed, evaluation=evaluation, keep_best=keep_best)
    at_step(world, step)
    world.run(until=lambda: world.hub.state.phase.value == "running")
    world.hub.on(ce.Interrupt())
    world.run()
    version = world.hub.state.committed
    assert world.hub.fault is not None
    assert world.hub.fault.kind == "InterruptedRunError"
    assert [len(h) for h in world.hub.checkpoints[version]] == [version] * len(plan.stages)
    # The version at the stop is not evaluated: who presses Ctrl-C does not want to wait.
    assert list(world.hub.evaluations) == list(range(1, version))
    assert not world.hub.state.awaited


@settings(max_examples=25, deadline=None)
@given(plans, st.integers(0, 5), st.integers(0, 2**32))
def test_a_stop_asked_by_the_users_code_completes_the_run_as_it_is(plan, step, seed):
    world = World(plan, steps=9, seed=seed, evaluation=EvaluationPlan(microbatches=2, every=2))
    if step:
        at_step(world, step)
    world.run(until=lambda: world.hub.state.phase.value != "gathering")
    world.hub.on(ce.StopAsked(reason="enough"))
    world.hub.on(ce.StopAsked(reason="twice"))
    world.run()
    assert world.hub.fault is None
    version = world.hub.completed
    assert version == world.hub.state.committed
    assert step < version < 9
    assert world.hub.reason == "enough"
    assert [len(h) for h in world.hub.checkpoints[version]] == [version] * len(plan.stages)
    assert [news.step for news in world.hub.shown] == list(range(version))
    assert world.hub.journal[-1] == records.Finish(version=version, reason="enough")
    assert all(body.state.phase.value == "idle" for body in world.members.values())


def test_a_bad_step_in_a_run_that_is_to_stop_is_still_an_error():
    world = World(make_plan(2, 2, "1f1b"), steps=9, seed=2, bad_steps={2: "nan"})
    at_step(world, 2)
    world.hub.on(ce.StopAsked(reason="enough"))
    world.run()
    fault = world.hub.fault
    assert (fault is None) == (world.hub.completed is not None)
    if world.hub.state.committed == 3:
        assert fault.kind == "NonFiniteLossError"


def test_a_checkpoint_asked_by_the_users_code_is_of_one_version_and_soon():
    times = [StageTimes(forward_s=0.1, backward_s=0.2)] * 2
    world = World(make_plan(2, 4, "1f1b"), steps=10, stages=times)
    at_step(world, 3)
    world.hub.on(ce.CheckpointAsked())
    world.hub.on(ce.CheckpointAsked())  # one is on its way
    world.run()
    assert sorted(world.hub.checkpoints) == [4, 10]


@settings(max_examples=20, deadline=None)
@given(plans, st.integers(0, 3), st.integers(0, 2**32))
def test_a_non_finite_step_is_not_evaluated(plan, bad, seed):
    evaluation = EvaluationPlan(microbatches=3, every=1)
    world = run(plan, 5, seed=seed, evaluation=evaluation, bad_steps={bad: "nan"})
    assert world.hub.fault.kind == "NonFiniteLossError"
    assert list(world.hub.evaluations) == list(range(1, bad + 1))


def test_training_goes_on_right_behind_an_evaluation():
    """Stage 0 trains again while the last stage still evaluates: no barrier."""
    plan = make_plan(3, 6, "1f1b")
    times = [StageTimes(forward_s=0.1, backward_s=0.1)] * 3
    seen = set()

    def watch(world, device, event, actions):
        first, last = world.members["d0"].state, world.members["d2"].state
        if first.step == 2 and first.completed and last.eval_version == 2:
            seen.add(last.eval_done < 8)

    world = World(plan, steps=4, stages=times, evaluation=EvaluationPlan(microbatches=8, every=2))
    world.watch = watch
    world.run()
    assert True in seen


def test_a_slow_device_is_not_buried_under_activations():
    times = [StageTimes(forward_s=s, backward_s=s) for s in (0.001, 1.0)]
    cuts = [CutTimes()]
    world = World(
        make_plan(2, 2, "1f1b"), steps=1, stages=times, cuts=cuts,
        evaluation=EvaluationPlan(microbatches=50), deadlines=ce.Deadlines(first_step_s=1e4),
    )  # fmt: skip
    most = 0

    def watch(world, device, event, actions):
        nonlocal most
        state = world.members["d1"].state
        most = max(most, state.eval_arrived - state.eval_done)

    world.watch = watch
    world.run()
    assert world.hub.completed == 1
    assert most == EVAL_AHEAD


def test_a_step_behind_a_long_evaluation_gets_a_longer_deadline():
    """500 microbatches stand before the step: more than the 6 s that a step gets."""
    times = [StageTimes(forward_s=0.05, backward_s=0.1)] * 2
    world = World(
        make_plan(2, 4, "1f1b"), steps=6, stages=times, deadlines=QUICK,
        evaluation=EvaluationPlan(microbatches=500, every=2),
    )  # fmt: skip
    world.run()
    assert world.hub.completed == 6
    slow = [news.step for news in world.hub.shown if news.has_evaluated]
    assert slow == [2, 4]
    assert max(world.hub.state.step_times) < 5, "deadlines are learned from ordinary steps"


def evaluating(**fields) -> World:
    """A run whose middle stage is in an evaluation."""
    world = World(
        make_plan(3, 2, "1f1b"), steps=9, seed=3, evaluation=EvaluationPlan(microbatches=9, every=1)
    )
    body = world.members["d1"]
    world.run(until=lambda: body.state.eval_version == 1 and 1 < body.state.eval_done < 9)
    return world


@pytest.mark.parametrize(
    ("sender", "kind", "change", "text"),
    [
        ("d0", messages.EvalForward, {"version": 2}, "evaluates version 1"),
        ("d0", messages.EvalForward, {"cut": 4}, "at cut 4"),
        ("d0", messages.EvalForward, {"microbatch": 0}, "got EvalForward 0"),
        ("d2", messages.EvalTaken, {"version": 3}, "EvalTaken"),
        ("d2", messages.EvalTaken, {"microbatch": 8}, "got EvalTaken 8"),
    ],
)
def test_an_evaluation_frame_that_fits_nothing_is_a_protocol_error(sender, kind, change, text):
    body = evaluating().members["d1"]
    state = body.state
    fields = {"version": 1, "microbatch": state.eval_arrived, "cut": 2}
    if kind is messages.EvalTaken:
        fields = {"version": 1, "microbatch": state.eval_taken, "cut": 4}
    message = kind(run="r1", epoch=1, **{**fields, **change})
    after, actions = member.handle(state, me.MessageReceived(sender=sender, message=message), 0.0)
    assert after.phase.value == "failed"
    (fault,) = [action.fault for action in actions if isinstance(action, me.Fail)]
    assert fault.kind == "ProtocolError"
    assert text in fault.text


def test_too_many_frames_at_once_break_a_rule():
    state = evaluating().members["d1"].state
    state = replace(state, eval_arrived=state.eval_done + EVAL_AHEAD)
    message = messages.EvalForward(
        run="r1", epoch=1, version=1, microbatch=state.eval_arrived, cut=2
    )
    after, _ = member.handle(state, me.MessageReceived(sender="d0", message=message), 0.0)
    assert after.phase.value == "failed"


def test_marks_for_an_evaluation_that_was_not_installed_are_refused():
    world = at_step(World(make_plan(2, 2, "1f1b"), steps=9, seed=1), 1)
    ask = messages.AskMarks(run="r1", epoch=1, marks=(Mark.EVALUATE,))
    state = world.members["d0"].state
    after, _ = member.handle(state, me.MessageReceived(sender="hub", message=ask), 0.0)
    assert after.phase.value == "failed"


def test_values_of_no_evaluation_end_the_run():
    for message, sender in [
        (messages.Evaluated(run="r1", epoch=1, version=99, values={"loss": 1.0}), "d1"),
        (messages.Evaluated(run="r1", epoch=1, version=1, values={"loss": 1.0}), "d0"),
    ]:
        world = World(
            make_plan(2, 2, "1f1b"), steps=9, seed=1, evaluation=EvaluationPlan(microbatches=1)
        )
        at_step(world, 2)
        world.hub.on(me.MessageReceived(sender=sender, message=message))
        assert world.hub.fault.kind == "ProtocolError"
    world = World(
        make_plan(2, 2, "1f1b"), steps=9, seed=1, evaluation=EvaluationPlan(microbatches=1)
    )
    at_step(world, 2)
    early = messages.Evaluated(
        run="r1", epoch=1, version=world.hub.state.committed + 1, values={"loss": 1.0}
    )
    world.hub.on(me.MessageReceived(sender="d1", message=early))
    world.run()
    assert "has no evaluate mark" in world.hub.fault.text


def test_a_wait_names_whom_the_last_evaluation_waits_for():
    world = World(
        make_plan(2, 2, "1f1b"), steps=1, seed=1, evaluation=EvaluationPlan(microbatches=30)
    )
    world.run(until=lambda: world.hub.state.checkpoint == 1 and world.hub.state.awaited)
    assert world.hub.state.wait.devices == ("d1",)


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(errors.InvalidValueError, match="at least one microbatch"):
        EvaluationPlan(microbatches=0)
    with pytest.raises(errors.InvalidValueError, match="every"):
        EvaluationPlan(microbatches=1, every=0)
    with pytest.raises(errors.InvalidValueError, match="go together"):
        World(make_plan(1, 1, "1f1b"), steps=1, keep_best=LOWEST)
