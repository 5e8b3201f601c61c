"""What ends a run: losses, errors, silence, Ctrl-C; and frames that break a rule."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax import errors
from crowdmesh_jax.core.schedule import Op, OpKind
from crowdmesh_jax.core.times import StageTimes
from crowdmesh_jax.protocol import Fault, Mark, Parts, Verdict, member, messages, records
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.coordinator_state import heartbeat_deadline_s

from .test_run import make_plan, plans
from .virtual import HUB, Member, World

QUICK = ce.Deadlines(
    gather_s=5, ready_s=5, first_step_s=90, step_floor_s=6, heartbeat_floor_s=3, finish_s=9
)


def at_step(world: World, step: int) -> World:
    """Runs until stage 0 works on `step`."""
    first = world.members[world.plan.devices[0]]
    world.run(until=lambda: first.state.step >= step)
    return world


@settings(max_examples=80, deadline=None)
@given(plans, st.data(), st.integers(0, 2**32))
def test_a_killed_member_ends_the_run_naming_it_its_layers_and_the_checkpoint(plan, data, seed):
    world = World(plan, steps=50, seed=seed, deadlines=QUICK)
    victim = data.draw(st.sampled_from(plan.devices))
    at_step(world, data.draw(st.integers(0, 3)))
    world.run(until=lambda: world.hub.state.phase.value == "running")
    killed_s = world.now_s
    world.kill(victim)
    world.run(until=lambda: world.hub.state.is_over)
    assert world.now_s - killed_s <= 1  # as soon as the coordinator's own channel breaks
    world.run()
    fault = world.hub.fault
    assert fault is not None
    assert fault.kind == "AgentLostError"
    stage = plan.stages[plan.stage_of(victim)]
    assert fault.text.startswith(f"{victim} was lost: killed")
    assert f"layers {stage.first_layer}-{stage.last_layer}" in fault.text
    assert f"{world.hub.state.committed} of 50 steps committed" in fault.text
    assert "newest checkpoint: version 0" in fault.text
    assert isinstance(world.hub.journal[-1], records.Halted)
    left = [body for body in world.members.values() if not body.is_dead]
    assert all(body.state.phase.value == "idle" for body in left)


def test_a_frozen_member_is_found_by_its_silence_and_named():
    world = World(make_plan(3, 4, "1f1b"), steps=99, seed=1, deadlines=QUICK)
    at_step(world, 2)
    world.members["d1"].is_dead = True  # no reset, no farewell: only silence
    frozen_s = world.now_s
    world.run(until=lambda: world.hub.state.is_over)
    assert world.hub.fault is not None
    assert world.hub.fault.kind == "AgentLostError"
    assert world.hub.fault.text.startswith("d1 was lost: silent for")
    assert 3 < world.now_s - frozen_s < 15


def test_a_step_that_hangs_blames_the_member_on_whom_all_wait():
    limits = replace(QUICK, heartbeat_floor_s=1000)
    times = [StageTimes(forward_s=0.01, backward_s=0.02)] * 3
    world = World(make_plan(3, 4, "1f1b"), steps=99, stages=times, deadlines=limits)
    at_step(world, 5)
    world.members["d1"].free_s = world.now_s + 1e6  # its compute thread hangs, its loop beats on
    hung_s = world.now_s
    world.run(until=lambda: world.hub.state.is_over)
    text = world.hub.fault.text
    assert text.startswith("d1 was lost: waited 6."), text
    assert "deadline 6 s" in text
    assert "p99" in text
    assert world.now_s - hung_s < 8


def test_agents_that_never_come_are_named_in_time():
    world = World(make_plan(2, 2, "1f1b"), steps=2, seed=5, deadlines=QUICK)
    world.members["d1"].is_dead = True
    world.run()
    assert world.hub.fault.kind == "LaunchError"
    assert "no agent came up for d1: waited 5." in world.hub.fault.text


def test_a_members_error_ends_the_run_with_its_kind_and_place():
    world = World(make_plan(3, 2, "1f1b"), steps=9, seed=2)
    at_step(world, 1)
    fault = Fault.of(errors.BundleError("program 'update' is damaged"))
    world.members["d2"].on(me.BodyFailed(fault=fault))
    world.run()
    assert world.hub.fault.kind == "BundleError"
    assert "d2 (stage 2, layers 4-5)" in world.hub.fault.text
    with pytest.raises(errors.BundleError, match="damaged"):
        raise world.hub.fault.error()


def test_who_is_accused_may_still_say_why_it_went():
    """A neighbour's complaint comes first; the cause, a moment later, is what the user sees."""
    world = World(make_plan(2, 2, "1f1b"), steps=99, seed=4)
    at_step(world, 1)
    world.hub.on(
        me.MessageReceived(
            sender="d0", message=messages.Suspect(run="r1", epoch=1, device="d1", reason="reset")
        )
    )
    assert world.hub.fault is None
    fault = Fault.of(errors.DataError("row 7 is missing"))
    error = messages.Error(run="r1", epoch=1, fault=fault)
    world.hub.on(me.MessageReceived(sender="d1", message=error))
    assert world.hub.fault.kind == "DataError"


def test_a_one_way_cut_ends_the_run_after_a_moment_of_grace():
    world = World(make_plan(2, 2, "1f1b"), steps=9999, seed=4)
    at_step(world, 1)
    world.members["d0"].on(me.PeerLost(device="d1", reason="reset"))
    world.run()
    assert world.hub.fault.text.startswith("d1 was lost: d0 lost its channel to it: reset")


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 6), st.integers(0, 2**32))
def test_an_interrupt_ends_after_a_commit_with_the_state_kept(plan, step, seed):
    world = World(plan, steps=8, seed=seed)
    at_step(world, step)
    world.run(until=lambda: world.hub.state.phase.value in ("running", "finishing"))
    world.hub.on(ce.Interrupt())
    world.run()
    version = world.hub.state.committed
    assert version >= step
    if world.hub.completed is None:
        assert world.hub.fault.kind == "InterruptedRunError"
        assert f"newest checkpoint: version {version}" in world.hub.fault.text
    else:
        assert version == 8  # the last step was committed already
    assert [len(history) for history in world.hub.checkpoints[version]] == [version] * len(
        plan.stages
    )


def test_a_second_interrupt_and_one_before_the_run_end_it_at_once():
    world = World(make_plan(2, 2, "1f1b"), steps=99, seed=6)
    at_step(world, 2)
    world.hub.on(ce.Interrupt())
    assert world.hub.fault is None
    world.hub.on(ce.Interrupt())
    assert world.hub.fault.kind == "InterruptedRunError"
    early = World(make_plan(2, 2, "1f1b"), steps=99, seed=6)
    early.hub.on(ce.Interrupt())
    assert early.hub.fault.kind == "InterruptedRunError"


def test_a_coordinator_that_slept_itself_blames_nobody():
    world = World(make_plan(2, 2, "1f1b"), steps=9999, seed=7, deadlines=QUICK)
    at_step(world, 1)
    world.heap = [(s + 500, n, call) for s, n, call in world.heap]  # all of us slept
    for channel in world.channels.values():
        channel.last_s += 500
        channel.free_s += 500
    for body in world.members.values():
        body.free_s += 500
    at_step(world, 20)
    assert world.hub.fault is None


# Frames that break a rule -----------------------------------------------------------------------


def running(stage: int = 1) -> tuple[World, Member]:
    """A run in step 3, and the body of a stage that has applied step 2."""
    world = World(make_plan(3, 2, "1f1b"), steps=9, seed=8)
    at_step(world, 3)
    body = world.members[f"d{stage}"]
    world.run(until=lambda: body.state.version == body.state.step == 3)
    return world, body


def frame(kind: str, **changes):
    base = {"run": "r1", "epoch": 1, "step": 3}
    make = {
        "F": lambda: messages.Forward(**{**base, "microbatch": 0, "cut": 2, **changes}),
        "B": lambda: messages.Backward(**{**base, "microbatch": 0, "cut": 4, **changes}),
        "C": lambda: messages.Commit(**{**base, "verdict": Verdict(), **changes}),
        "T": lambda: messages.Tied(**{**base, "step": 2, "layer": 0, **changes}),
    }
    return make[kind]()


BROKEN = [
    ("d0", frame("F", step=4), "at version 3"),
    ("d0", frame("F", step=2), "at version 3"),
    ("d0", frame("F", microbatch=2), "microbatches are 0-1"),
    ("d0", frame("F", microbatch=-1), "microbatches are 0-1"),
    ("d0", frame("F", cut=3), "at cut 3, its is 2"),
    ("d0", frame("F", epoch=2), "is of epoch 2"),
    ("d0", frame("C"), "not full"),
    ("d0", frame("C", step=2), "Commit of step 2"),
    ("d0", frame("T"), "expects no Tied"),
    ("d2", frame("B", step=4), "at version 3"),
    ("d2", frame("B", microbatch=1, parts=Parts()), "before its Forward was sent"),
    (HUB, messages.Resume(run="r1", epoch=1, steps=9), "got Resume while run"),
    (HUB, messages.AskMarks(run="r1", epoch=1, marks=(Mark.STOP,)), "is for stage 0"),
    (HUB, messages.Measure(run="r1", epoch=1, repeats=1), "got Measure while run"),
]


@pytest.mark.parametrize(("sender", "message", "text"), BROKEN)
def test_a_neighbour_that_breaks_a_rule_ends_the_run_with_a_protocol_error(sender, message, text):
    world, body = running()
    before = body.state
    body.on(me.MessageReceived(sender=sender, message=message), ("array", "parts"))
    assert body.fault is not None
    assert body.fault.kind == "ProtocolError"
    assert text in body.fault.text
    assert replace(body.state, phase=before.phase) == before  # nothing else was touched
    history = list(body.history)
    world.run()
    assert body.history == history
    assert world.hub.fault.kind == "ProtocolError"
    assert "d1 (stage 1" in world.hub.fault.text


@pytest.mark.parametrize("kind", ["Forward", "Backward"])
def test_a_frame_that_comes_twice_is_a_protocol_error(kind):
    world, body = running()
    seen = []

    def watch(world, device, event, actions):
        if device == "d1" and type(getattr(event, "message", None)).__name__ == kind:
            seen.append(event)

    world.watch = watch
    world.run(until=lambda: bool(seen))
    state, _ = member.handle(body.state, seen[0], world.now_s)
    assert body.fault is None
    assert state.phase.value == "failed"


@pytest.mark.parametrize(
    ("microbatch", "parts", "text"),
    [(0, Parts(), "must not have parts"), (1, None, "lacks parts")],
)
def test_parts_ride_on_the_last_backward_of_a_step_only(microbatch, parts, text):
    world, body = running()
    world.run(until=lambda: body.state.completed == 2 and not body.state.arrived_dy)
    message = frame("B", step=body.state.step, microbatch=microbatch, parts=parts)
    body.on(me.MessageReceived(sender="d2", message=message), ("array", "parts"))
    assert text in body.fault.text


@pytest.mark.parametrize(
    "event",
    [
        me.OpDone(kind=OpKind.BACKWARD, step=3, microbatch=1),
        me.StepFinished(step=3),
        me.Reduced(step=3),
        me.Applied(step=3),
        me.Snapshotted(version=7),
        me.DataReady(step=3),
    ],
)
def test_a_body_that_answers_what_was_not_asked_ends_the_run_with_a_protocol_error(event):
    world, body = running()
    body.on(event)
    assert body.fault is not None
    assert body.fault.kind == "ProtocolError"
    assert "the body answered" in body.fault.text
    world.run()
    assert world.hub.fault.kind == "ProtocolError"


@pytest.mark.parametrize("kind", ["F", "B", "C", "T"])
@pytest.mark.parametrize("sender", ["d1", "stranger", HUB])
def test_who_is_no_neighbour_is_refused_and_the_run_goes_on(kind, sender):
    world, body = running(stage=0 if kind == "B" else 1)
    if kind == "B":
        sender = "d2" if sender == "d1" else sender  # stage 0's downstream is d1
    message = frame(kind)
    body.on(me.MessageReceived(sender=sender, message=message), ("array",))
    assert [reject.fault.kind for reject in body.rejects] == ["ProtocolError"]
    assert sender in body.rejects[0].fault.text
    # The run lives by the channels of its members and its coordinator: only others are closed.
    assert body.rejects[0].is_stranger == (sender == "stranger")
    world.run()
    assert world.hub.completed == 9


@pytest.mark.parametrize(
    "message",
    [
        messages.Halt(run="r1", epoch=1, fault=Fault(kind="RunError", text="x")),
        messages.Resume(run="r1", epoch=1, steps=9),
        messages.Release(run="r1", epoch=1),
    ],
)
def test_only_the_coordinator_commands(message):
    world, body = running()
    body.on(me.MessageReceived(sender="d0", message=message))
    assert len(body.rejects) == 1
    world.run()
    assert world.hub.completed == 9


@pytest.mark.parametrize("old", [{"run": "r0"}, {"epoch": 0}])
@pytest.mark.parametrize("kind", ["F", "B", "C", "T"])
def test_frames_of_an_old_epoch_are_dropped_and_their_sender_told(kind, old):
    _, body = running()
    before = body.state
    state, actions = member.handle(
        body.state, me.MessageReceived(sender="d0", message=frame(kind, **old)), 0.0
    )
    assert state == replace(before, dropped=before.dropped + 1)
    (sent,) = actions
    assert sent.to == "d0"
    assert isinstance(sent.message, messages.StaleEpoch)
    assert sent.message.active == 1


def test_a_member_told_that_its_epoch_is_over_stops():
    _, body = running()
    stale = messages.StaleEpoch(run="r1", epoch=1, active=2)
    body.on(me.MessageReceived(sender="d0", message=stale))
    assert body.fault.kind == "StaleEpochError"


def test_late_frames_of_an_ended_run_disturb_nobody():
    world, body = running()
    halt = messages.Halt(run="r1", epoch=1, fault=Fault(kind="RunError", text="over"))
    body.on(me.MessageReceived(sender=HUB, message=halt))
    dropped = body.state.dropped
    body.on(me.MessageReceived(sender="d0", message=frame("F")), ("array",))
    assert body.state.dropped == dropped + 1
    assert not body.rejects
    assert body.fault is None
    install = replace(member_install(world), run="r2", epoch=1)
    body.on(me.MessageReceived(sender=HUB, message=install))
    assert body.state.phase.value == "installing"
    assert body.state.run == "r2"


def member_install(world: World) -> messages.Install:
    start = world.hub.state.start
    return messages.Install(
        run="r1",
        epoch=1,
        term=1,
        base=0,
        plan=start.plan,
        stage=1,
        ops=start.schedule.ops[1],
    )


def test_an_install_that_contradicts_itself_is_refused_with_an_error():
    world = World(make_plan(3, 2, "1f1b"), steps=9)
    world.run(until=lambda: world.hub.state.start is not None)
    good = member_install(world)
    for bad in (
        replace(good, stage=0),
        replace(good, stage=7),
        replace(good, base=-1),
        replace(good, ops=good.ops[:-1]),
        replace(good, ops=good.ops[::-1]),
        replace(good, ops=(Op(OpKind.BACKWARD, 0), *(op for op in good.ops if str(op) != "B0"))),
    ):
        fresh = member.MemberState(device="d1", coordinator=HUB)
        state, actions = member.handle(fresh, me.MessageReceived(sender=HUB, message=bad), 0.0)
        assert state == fresh
        (sent,) = actions
        assert isinstance(sent.message, messages.Error)
        assert sent.message.fault.kind == "ProtocolError"


@pytest.mark.parametrize(
    ("sender", "message", "text"),
    [
        ("d1", messages.Done(run="r1", epoch=1, step=3, verdict=Verdict()), "stage 0 is d0"),
        ("d0", messages.Done(run="r1", epoch=1, step=7, verdict=Verdict()), "step 7"),
        ("d0", messages.Loss(run="r1", epoch=1, step=3, values={}), "last stage is d2"),
        ("d1", messages.Ready(run="r1", epoch=1), "while running"),
        ("d1", messages.Measured(run="r1", epoch=1, seconds={}), "while running"),
        (
            "d1",
            messages.StageState(run="r1", epoch=1, version=4, first_layer=0, last_layer=1),
            "not its own",
        ),
    ],
)
def test_the_coordinator_halts_on_what_no_member_may_say_now(sender, message, text):
    world, _ = running()
    world.hub.on(me.MessageReceived(sender=sender, message=message), ("array",))
    assert world.hub.fault.kind == "ProtocolError"
    assert text in world.hub.fault.text


def test_the_coordinator_refuses_strangers_and_tells_the_stale():
    world, _ = running()
    done = messages.Done(run="r1", epoch=1, step=3, verdict=Verdict())
    world.hub.on(me.MessageReceived(sender="stranger", message=done))
    (reject,) = world.hub.rejects
    assert reject.is_stranger
    assert "stranger" in reject.fault.text
    world.hub.on(me.MessageReceived(sender="spare", message=replace(done, run="r0")))
    assert len(world.hub.rejects) == 1, "late words of a run before, from a device left out of this"
    old = replace(done, epoch=0)
    committed = world.hub.state.committed
    world.hub.on(me.MessageReceived(sender="d0", message=old))
    assert world.hub.state.committed == committed
    world.run()
    assert world.hub.completed == 9


def test_heartbeats_come_at_their_interval_and_say_whom_a_member_waits_for():
    times = [StageTimes(forward_s=1.0, backward_s=2.0)] * 3
    world = World(make_plan(3, 4, "1f1b"), steps=9, stages=times, heartbeat_s=1.0)
    beats = []

    def watch(world, device, event, actions):
        for action in actions:
            if isinstance(getattr(action, "message", None), messages.Heartbeat):
                beats.append((device, world.now_s, action.message))

    world.watch = watch
    at_step(world, 2)
    for device in world.plan.devices:
        at_s = [now_s for who, now_s, _ in beats if who == device]
        gaps = [later - sooner for sooner, later in itertools.pairwise(at_s)]
        assert set(gaps) == {1.0}
    waits = {(d, beat.waiting.device, beat.waiting.what) for d, _, beat in beats if beat.waiting}
    assert ("d2", "d1", "Forward 0 of step 0") in waits
    assert ("d0", "d1", "Backward 0 of step 0") in waits
    assert any(what.startswith("Commit of step") for _, _, what in waits)
    assert any(beat.waiting is None for _, _, beat in beats)


def test_a_checkpoint_that_takes_too_long_is_said_to_be_the_disks_fault():
    world = World(make_plan(2, 2, "1f1b"), steps=2, seed=1, deadlines=QUICK)
    hub_on = world.hub.on
    world.hub.on = lambda event, *arrays: (
        None if isinstance(event, ce.CheckpointWritten) else hub_on(event, *arrays)
    )
    world.run()
    assert world.hub.fault.kind == "RecordError"
    assert "writing the checkpoint of version 2 took too long: waited 9." in world.hub.fault.text


def test_a_member_lost_after_its_part_of_the_result_came_does_not_spoil_it():
    times = [StageTimes(forward_s=0.1, backward_s=0.2)] * 2
    world = World(make_plan(2, 2, "1f1b"), steps=2, stages=times)
    world.run(until=lambda: len(world.hub.state.shards) == 1)
    (shard,) = world.hub.state.shards
    assert world.hub.state.phase.value == "finishing"
    device = world.plan.devices[shard.stage]
    world.hub.on(ce.MemberLost(device=device, reason="gone home early"))
    world.run()
    assert world.hub.completed == 2


@pytest.mark.parametrize("slow", [True, False])
def test_the_deadline_of_a_step_is_learned_from_those_before(slow):
    """8 x p99 of steps of some 24 s outlasts a hang of 60 s; 8 x 0.24 s (floor 6 s) does not."""
    unit_s = 1.0 if slow else 0.01
    times = [StageTimes(forward_s=unit_s, backward_s=2 * unit_s)] * 3
    limits = replace(QUICK, heartbeat_floor_s=1000)
    world = World(make_plan(3, 6, "1f1b"), steps=6, stages=times, deadlines=limits)
    at_step(world, 3)
    world.members["d2"].free_s = world.now_s + 60
    world.run()
    assert (world.hub.fault is None) == slow


def test_the_deadline_of_silence_is_learned_from_usual_gaps():
    times = [StageTimes(forward_s=0.5, backward_s=0.5)] * 2
    world = World(
        make_plan(2, 2, "1f1b"), steps=99, stages=times, deadlines=QUICK, heartbeat_s=60.0
    )
    info = next(iter(at_step(world, 5).hub.state.members.values()))
    assert info.gaps
    even = replace(info, gaps=(2.0, 2.2, 1.8) * 20)
    learned_s = heartbeat_deadline_s(world.hub.state, even)
    # Gaps of 2.0 +- 0.16, of which a quarter of the mean is the least that is believed: 5.6 sigma.
    assert learned_s == pytest.approx(2 + 5.612 * 0.5, abs=0.01)
    tail = replace(info, gaps=(0.1,) * 60 + (4.0,))
    assert heartbeat_deadline_s(world.hub.state, tail) == pytest.approx(8.0), "twice the longest"
    quick = replace(info, gaps=(0.1,) * 60)
    assert heartbeat_deadline_s(world.hub.state, quick) == 3, "the floor"
