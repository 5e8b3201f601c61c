"""The coordinator's small promises, one message at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from crowdmesh_jax.core.times import StageTimes
from crowdmesh_jax.protocol import Fault, Verdict, coordinator, member, messages
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me

from .test_run import make_plan
from .virtual import HUB, World

TIMES = [StageTimes(forward_s=0.1, backward_s=0.2)] * 3
EARLY = messages.Heartbeat(run="r1", epoch=2, phase="run", version=2, completed_ops=0)


def committed(count: int, **start: Any) -> World:
    """A run of three stages, at the moment when its coordinator knows of `count` steps."""
    world = World(make_plan(3, 2, "1f1b"), steps=9, stages=TIMES, **start)
    world.run(until=lambda: world.hub.state.committed == count)
    return world


def tell(world: World, sender: str, message: Any) -> tuple[Any, Any]:
    event = me.MessageReceived(sender=sender, message=message)
    return coordinator.handle(world.hub.state, event, world.now_s)


def test_a_step_is_done_once_whoever_says_it_again():
    world = committed(3)
    done = messages.Done(run="r1", epoch=1, step=1, verdict=Verdict())
    state, actions = tell(world, "d0", done)
    assert (state.committed, state.shown) == (3, world.hub.state.shown)
    assert actions == ()


def test_a_message_of_an_epoch_not_yet_opened_halts():
    state, _ = tell(committed(2), "d1", EARLY)
    assert state.phase.value == "halted"


def test_an_agent_that_starts_anew_in_the_middle_is_a_lost_one():
    _, actions = tell(committed(2), "d1", messages.Hello())
    (halt,) = (action for action in actions if isinstance(action, ce.HaltRun))
    assert halt.fault.text.startswith("d1 was lost: it started anew")
    state, actions = tell(committed(2), "newcomer", messages.Hello())
    assert state.phase.value == "running"
    assert "newcomer" in state.members


def test_a_shard_that_comes_twice_is_kept_once():
    world = committed(2)
    shard = messages.StageState(run="r1", epoch=1, version=2, first_layer=2, last_layer=3)
    world.hub.state, actions = tell(world, "d1", shard)
    assert [type(action) for action in actions] == [me.Keep]
    state, actions = tell(world, "d1", shard)
    assert state.shards == world.hub.state.shards
    assert actions == ()


def test_no_second_wave_is_asked_for_while_one_is_open():
    world = World(make_plan(3, 2, "1f1b"), steps=9, stages=TIMES, snapshot_every=1)
    hub_on, asked = world.hub.on, []
    world.hub.on = lambda event, *arrays: (  # a disk that never answers
        None if isinstance(event, ce.CheckpointWritten) else hub_on(event, *arrays)
    )
    send = world.send
    world.send = lambda sender, to, message, *rest: (
        asked.append(message) if isinstance(message, messages.AskMarks) else None,
        send(sender, to, message, *rest),
    )
    world.run(until=lambda: world.hub.state.committed == 8)
    assert len(asked) == 1


def test_the_first_accuser_of_a_device_sets_the_moment_of_grace():
    world = committed(2)
    for accuser, now_s in (("d0", 100.0), ("d2", 101.0)):
        suspect = messages.Suspect(run="r1", epoch=1, device="d1", reason="reset")
        event = me.MessageReceived(sender=accuser, message=suspect)
        world.hub.state, _ = coordinator.handle(world.hub.state, event, now_s)
    (suspicion,) = world.hub.state.suspicions
    assert (suspicion.since_s, suspicion.reason[:2]) == (100.0, "d0")


def test_a_device_that_was_never_here_may_still_come_until_the_deadline():
    world = World(make_plan(2, 2, "1f1b"), steps=1)
    world.members["d1"].is_dead = True
    world.run(until=lambda: world.hub.state.start is not None)
    lost = ce.MemberLost(device="d1", reason="refused")
    state, actions = coordinator.handle(world.hub.state, lost, world.now_s)
    assert state.phase.value == "gathering"
    assert actions == ()
    lost = ce.MemberLost(device="d0", reason="killed")
    world.run(until=lambda: "d0" in world.hub.state.members)
    state, _ = coordinator.handle(world.hub.state, lost, world.now_s)
    assert state.phase.value == "halted"


def test_an_interrupt_close_to_the_end_lets_the_end_come():
    world = World(make_plan(3, 2, "1f1b"), steps=2, stages=TIMES)
    world.run(until=lambda: world.hub.state.phase.value == "finishing")
    state, actions = coordinator.handle(world.hub.state, ce.Interrupt(), world.now_s)
    assert state == replace(world.hub.state, interrupts=1)
    assert actions == ()
    state, _ = coordinator.handle(state, ce.Interrupt(), world.now_s)
    assert state.phase.value == "halted"


def test_a_journal_record_stands_before_what_it_promises():
    """I11, on each turn's own list: nothing is sent or said before its record."""
    world = World(make_plan(2, 2, "1f1b"), steps=3, seed=2, snapshot_every=1)
    due = {
        messages.Install: "Decision",
        messages.Resume: "Resumed",
        messages.Release: "Finish",
        messages.Halt: "Halted",
        ce.StepShown: "StepCommitted",
        ce.CheckpointKept: "Wave",
        ce.Complete: "Finish",
        ce.HaltRun: "Halted",
    }
    seen = set()
    handle = coordinator.handle

    def watched(state: Any, event: Any, now_s: float) -> Any:
        state, actions = handle(state, event, now_s)
        written = set()
        for action in actions:
            if isinstance(action, ce.Journal):
                written.add(type(action.record).__name__)
            else:
                what = getattr(action, "message", None) or getattr(action, "news", None) or action
                if type(what) in due:
                    assert due[type(what)] in written
                    seen.add(type(what))
        return state, actions

    coordinator.handle = watched
    try:
        world.run()
        broken = World(make_plan(2, 2, "1f1b"), steps=3, seed=2)
        broken.run(until=lambda: broken.hub.state.committed == 1)
        broken.hub.on(ce.BodyFailed(fault=Fault(kind="RecordError", text="disk full")))
    finally:
        coordinator.handle = handle
    assert seen == set(due)


def test_a_member_at_work_refuses_another_runs_install_and_lower_terms():
    world = committed(2)
    body = world.members["d1"]
    start = world.hub.state.started
    install = messages.Install(
        run="r2", epoch=1, term=1, base=0, plan=start.plan, stage=1, ops=start.schedule.ops[1]
    )
    event = me.MessageReceived(sender=HUB, message=install)
    state, (action,) = member.handle(body.state, event, 0.0)
    assert state == body.state
    assert isinstance(action.message, messages.Error)
    assert (action.message.run, action.message.epoch) == ("r2", 1)
    assert "Release or Halt of that run comes first" in action.message.fault.text
    for stale in (
        replace(install, run="r1", epoch=1),
        replace(install, run="r1", epoch=5, term=0),
    ):
        event = me.MessageReceived(sender=HUB, message=stale)
        state, (action,) = member.handle(body.state, event, 0.0)
        assert state == replace(body.state, dropped=body.state.dropped + 1)
        assert isinstance(action.message, messages.StaleEpoch)
