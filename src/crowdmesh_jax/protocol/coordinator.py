"""The coordinator machine: who is in, what is installed, when to go, what was reached, when to end.

`handle(state, event, now_s) -> (state, actions)` is pure. It never touches the data path: stages
commit among themselves, the coordinator installs, resumes, asks for marks, keeps what it is told,
and watches the clock. Journal before message (I11); every wait has a deadline (I13). A lost member
ends the run, with its state as it was, unless Start says how it recovers (`coordinator_recovery`).

    gathering --all said Hello--> installing --all Ready--> [measuring] --> running
    running --Done(finish)--> finishing --result written--> done
    running --Done(stop)--> stopping --its checkpoint written--> halted
    any --loss, error, deadline, second Interrupt--> halted
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..core.crowd import DeviceId
from ..errors import (
    InterruptedRunError,
    ProtocolError,
)
from . import coordinator_events as ev
from . import messages as msg
from . import records
from .common import Fault, Mark, Slot
from .coordinator_evaluation import (
    hold_while_undecided,
    holds,
    note_evaluate_mark,
    on_best_written,
    on_evaluated,
)
from .coordinator_install import send_installs
from .coordinator_recovery import (
    decide_when_heard,
    lose,
    on_owners_chosen,
    on_report,
    on_verdict_made,
    open_epoch,
    resume,
)
from .coordinator_restart import (
    on_attached,
    on_hello_attaching,
    on_lost_attaching,
    on_message_attaching,
    on_restart,
)
from .coordinator_state import (
    WINDOW,
    CoordinatorState,
    MemberInfo,
    Phase,
    Shard,
    Suspicion,
    Wait,
    closing_deadline_s,
    describe_progress,
    describe_stage,
    step_wait,
)
from .coordinator_steps import file_step
from .coordinator_turn import (
    RunTurn,
    await_closing,
    end_when_safe,
    halt,
    halt_lost,
    has_shard,
    is_closing,
    is_through,
)
from .coordinator_watch import on_tick
from .coordinator_waves import ask_wave_when_due, note_wave_mark, on_stored
from .evidence import Base

__all__ = ["CoordinatorState", "DeviceId", "Result", "handle"]

Result = tuple[CoordinatorState, tuple[ev.CoordinatorAction, ...]]


def handle(state: CoordinatorState, event: ev.CoordinatorEvent, now_s: float) -> Result:
    """What `event` does to a run, and what the body must do now.

    Never raises for what a member does wrong: that halts the run with a ProtocolError fault.

    Args:
        now_s: Monotonic seconds; deadlines are counted by it.

    Raises:
        ProtocolError: A second Start.
    """
    turn = RunTurn(state, now_s)
    if isinstance(event, ev.Start):
        _on_start(turn, event)
    elif isinstance(event, ev.Restart):
        on_restart(turn, event)
    else:
        try:
            _HANDLERS[type(event)](turn, event)
        except ProtocolError as exc:
            turn = RunTurn(state, now_s)
            halt(turn, Fault.of(exc))
    return turn.state, tuple(turn.actions)


# Start, gather, install -------------------------------------------------------------------------


def _on_start(turn: RunTurn, start: ev.Start) -> None:
    state = turn.state
    if state.start is not None or state.is_over:
        raise ProtocolError(f"run {state.run!r} was started before")
    turn.set(
        start=start,
        base=start.base,
        committed=start.base,
        shown=start.base,
        checkpoint=start.base,
        wave_version=start.base,
        wave_from=start.base,
        durable=start.base,
        best=start.best,
    )
    term = records.Term(run=state.run, term=state.term, config_sha256=start.config_sha256)
    turn.journal(term)
    turn.enter(Phase.GATHERING, _gather_wait(turn))
    _install_when_gathered(turn)


def _gather_wait(turn: RunTurn) -> Wait:
    missing = tuple(d for d in turn.state.devices if d not in turn.state.members)
    deadline_s = turn.state.started.deadlines.gather_s
    return turn.wait_for("Hello", missing, deadline_s, "time for agents to start")


def _on_hello(turn: RunTurn, sender: str, hello: msg.Hello) -> None:
    state = turn.state
    begun = state.phase is not Phase.GATHERING and not state.is_over
    if state.phase is Phase.ATTACHING:
        on_hello_attaching(turn, sender, hello)
        return
    if begun and state.recovery is not None:
        _on_hello_midway(turn, sender, hello)
        return
    if begun and sender in state.devices:
        halt_lost(turn, sender, "it started anew in the middle of the run")
        return
    members = {**state.members, sender: MemberInfo(hello=hello, heard_s=turn.now_s)}
    turn.set(members=members)
    if state.start is not None and state.phase is Phase.GATHERING:
        if state.wait is not None:
            left = tuple(device for device in state.wait.devices if device != sender)
            turn.set(wait=replace(state.wait, devices=left))
        _install_when_gathered(turn)


def _on_hello_midway(turn: RunTurn, sender: str, hello: msg.Hello) -> None:
    """A newcomer is a member from the next epoch on (R8). One that has a part in this epoch and
    says Hello started anew: what it had is gone."""
    state = turn.state
    had_part = sender in state.members and sender in state.party
    info = MemberInfo(hello=hello, heard_s=turn.now_s, is_newcomer=True)
    members = {**state.members, sender: info}
    turn.set(members=members)
    if state.phase is Phase.WAITING:
        open_epoch(turn, (), f"{sender} came while the run waited: {state.why_waiting}")
    elif had_part:
        open_epoch(turn, (), f"{sender} started anew in the middle of the run")


def _install_when_gathered(turn: RunTurn) -> None:
    state = turn.state
    if any(device not in state.members for device in state.devices):
        return
    start = state.started
    epoch = state.epoch + 1
    turn.set(epoch=epoch)
    turn.journal(records.Epoch(epoch=epoch))
    if state.recovery is not None:
        # Whoever is here by now is a member: with a stage, as a holder, or as a spare (R9).
        turn.set(
            crew=tuple(DeviceId(device) for device in sorted(state.members)),
            bases=(*state.bases, Base(epoch=epoch, base=state.base)),
        )
    decision = records.Decision(
        epoch=epoch,
        base=state.base,
        plan=start.plan,
        steps=start.steps,
        crew=turn.state.crew,
        holders=state.holders,
    )
    turn.journal(decision)
    send_installs(turn)


def _on_ready(turn: RunTurn, sender: str, message: msg.Ready) -> None:
    state = turn.state
    _expect_phase(state, sender, message, Phase.INSTALLING)
    turn.set_member(sender, is_ready=True)
    if state.wait is not None:
        left = tuple(device for device in state.wait.devices if device != sender)
        turn.set(wait=replace(state.wait, devices=left))
    if all(turn.state.members[device].is_ready for device in state.party):
        if state.started.measure_repeats and state.decided is None:
            _measure_next(turn)
        else:
            _resume(turn)


def _measure_next(turn: RunTurn) -> None:
    """One member at a time: on a shared machine they would slow each other down."""
    state = turn.state
    start = state.started
    for device in state.devices:
        if state.members[device].seconds is None:
            why = "set for timing the stage programs"
            wait = turn.wait_for("Measured", (device,), start.deadlines.measure_s, why)
            turn.enter(Phase.MEASURING, wait)
            turn.send(device, msg.Measure(**turn.of_epoch, repeats=start.measure_repeats))
            return
    seconds: dict[str, Mapping[str, float]] = {
        device: state.members[device].seconds or {} for device in state.devices
    }
    turn.journal(records.MembersMeasured(seconds=seconds), sync=False)
    turn.do(ev.Announce(news=ev.StageTimes(seconds=seconds)))
    _resume(turn)


def _on_measured(turn: RunTurn, sender: str, message: msg.Measured) -> None:
    state = turn.state
    _expect_phase(state, sender, message, Phase.MEASURING)
    if state.wait is None or sender not in state.wait.devices:
        raise ProtocolError(f"Measured from {sender}, which was not asked")
    turn.set_member(sender, seconds=message.seconds)
    _measure_next(turn)


def _resume(turn: RunTurn) -> None:
    resume(turn)
    state = turn.state
    if state.stop_reason is not None and state.phase is Phase.RUNNING:
        _ask_stop(turn)


# Running ----------------------------------------------------------------------------------------


def _on_done(turn: RunTurn, sender: str, message: msg.Done) -> None:
    state = turn.state
    if sender != state.devices[0]:
        raise ProtocolError(f"Done from {sender}; stage 0 is {state.devices[0]}")
    if message.step < state.committed:
        return  # a step is Done once, whoever says it again
    _expect_phase(state, sender, message, Phase.RUNNING)
    if message.step > state.committed:
        raise ProtocolError(f"Done of step {message.step} while {state.committed} is at work")
    step_s = None if state.done_s is None else turn.now_s - state.done_s
    times, has_evaluated = state.step_times, state.last_evaluated == message.step
    if step_s is not None and not has_evaluated:
        times = (*times, step_s)[-WINDOW:]
    turn.set(committed=message.step + 1, done_s=turn.now_s, step_times=times)
    of_step = {"verdict": message.verdict, "step_s": step_s, "has_evaluated": has_evaluated}
    file_step(turn, message.step, **of_step)
    note_evaluate_mark(turn, message)
    note_wave_mark(turn, message)
    turn.set(wait=step_wait(turn.state, turn.now_s))
    if Mark.SNAPSHOT in message.marks:
        turn.set(wave_open=True, wave_version=message.step + 1)
    limit_s, why = closing_deadline_s(turn.state), "set for the last wave"
    if Mark.FINISH in message.marks:
        wait = turn.wait_for("the result", state.devices, limit_s, why)
        turn.enter(Phase.FINISHING, wait)
    elif Mark.STOP in message.marks:
        wait = turn.wait_for("the state at the stop", state.devices, limit_s, why)
        turn.enter(Phase.STOPPING, wait)
    else:
        _ask_snapshot_when_due(turn)
        ask_wave_when_due(turn)
    end_when_safe(turn)


def _on_loss(turn: RunTurn, sender: str, message: msg.Loss) -> None:
    state = turn.state
    if sender != state.devices[-1]:
        raise ProtocolError(f"Loss from {sender}; the last stage is {state.devices[-1]}")
    file_step(turn, message.step, values=message.values)
    end_when_safe(turn)


def _ask_snapshot_when_due(turn: RunTurn) -> None:
    state = turn.state
    every = state.started.snapshot_every
    is_ending = state.ending is not None or state.stop_reason is not None
    if every is None or state.wave_open or is_ending:
        return
    # Asked one step early: the mark rides in the next Commit, if it gets there in time (R4).
    due = state.committed + 1 - state.wave_version >= every
    if due and state.committed + 1 < state.started.steps:
        turn.set(wave_open=True, wave_version=state.committed + 1)
        turn.send(state.devices[0], msg.AskMarks(**turn.of_epoch, marks=(Mark.SNAPSHOT,)))


def _on_stage_state(turn: RunTurn, sender: str, message: msg.StageState) -> None:
    state = turn.state
    _expect_phase(state, sender, message, Phase.RUNNING, Phase.STOPPING, Phase.FINISHING)
    stage = state.plan.stage_of(sender)
    layers = None if stage is None else state.plan.stages[stage]
    if state.recovery is not None and message.version == state.checkpoint:
        return  # safe before the loss that made it come again
    if (
        stage is None
        or layers is None
        or (message.first_layer, message.last_layer) != (layers.first_layer, layers.last_layer)
        or not state.checkpoint < message.version <= state.started.steps
        or (message.is_final and message.version != state.started.steps)
    ):
        raise ProtocolError(f"{sender} sent a state that is not its own or not awaited: {message}")
    if has_shard(state, message.version, stage):
        return
    shard = Shard(version=message.version, stage=stage, is_final=message.is_final)
    turn.set(shards=(*state.shards, shard))
    slot = Slot(kind="state", step=message.version, layer=message.first_layer)
    turn.do(ev.Keep(slots=(slot,)))
    await_closing(turn)
    _write_next(turn)


def _write_next(turn: RunTurn) -> None:
    """One checkpoint at a time, oldest first: what is durable never goes back (I7)."""
    state = turn.state
    if state.writing is not None:
        return
    for version in sorted({shard.version for shard in state.shards}):
        here = [shard for shard in state.shards if shard.version == version]
        if len(here) == len(state.devices):
            turn.set(writing=version, writing_tag=state.epoch)
            is_final = all(shard.is_final for shard in here)
            hold = holds(state, version)
            turn.do(ev.WriteCheckpoint(version=version, is_final=is_final, hold=hold))
            return


def _on_checkpoint_written(turn: RunTurn, event: ev.CheckpointWritten) -> None:
    state = turn.state
    if state.is_over:
        return
    if event.version != state.writing:
        raise ProtocolError(f"the body wrote version {event.version}, asked: {state.writing}")
    turn.journal(records.Wave(epoch=state.writing_tag, version=event.version))
    turn.set(
        checkpoint=event.version,
        checkpoint_tag=state.writing_tag,
        durable=max(event.version, state.durable),
        wave_open=False,
        writing=None,
        shards=tuple(shard for shard in state.shards if shard.version > event.version),
    )
    turn.do(ev.Announce(news=ev.CheckpointKept(version=event.version)))
    hold_while_undecided(turn, event.version)
    _write_next(turn)
    if state.phase is Phase.RUNNING:
        _ask_snapshot_when_due(turn)
    elif state.phase is Phase.FENCING:
        decide_when_heard(turn)
    end_when_safe(turn)


# Losses and interrupts ---------------------------------------------------------------------------


def _on_member_lost(turn: RunTurn, event: ev.MemberLost) -> None:
    state = turn.state
    is_here = event.device in state.members
    if state.is_over or state.start is None or event.device not in state.party:
        turn.forget_member(event.device)
        return
    if state.phase in (Phase.GATHERING, Phase.ATTACHING) and not is_here:
        return  # not yet here: it has until the deadline
    if state.phase is Phase.ATTACHING:
        on_lost_attaching(turn, event.device)
        return
    stage = state.plan.stage_of(event.device)
    if is_closing(state) and is_through(state, stage):
        turn.forget_member(event.device)
        return  # its part of the last wave is here
    if state.recovery is not None and not is_here:
        return  # lost before, for another reason
    turn.forget_member(event.device)
    lose(turn, event.device, event.reason)


def _on_suspect(turn: RunTurn, sender: str, message: msg.Suspect) -> None:
    """Waits a moment: who is accused may have said why it goes, on its own channel."""
    state = turn.state
    if message.device not in state.party:
        raise ProtocolError(f"{sender} suspects {message.device}, which is not in the plan")
    if any(entry.device == message.device for entry in state.suspicions):
        return
    reason = f"{sender} lost its channel to it: {message.reason}"
    suspicion = Suspicion(device=message.device, reason=reason, since_s=turn.now_s)
    turn.set(suspicions=(*state.suspicions, suspicion))


def _on_error(turn: RunTurn, sender: str, message: msg.Error) -> None:
    where = f"{sender} ({describe_stage(turn.state, sender)})"
    halt(turn, message.fault.within(where))


def _on_body_failed(turn: RunTurn, event: ev.BodyFailed) -> None:
    halt(turn, event.fault)


def _on_interrupt(turn: RunTurn, event: ev.Interrupt) -> None:
    state = turn.state
    turn.set(interrupts=state.interrupts + 1)
    if state.is_over:
        return
    fault = Fault.of(InterruptedRunError("stopped by the user"))
    first = state.interrupts == 0
    if first and state.phase is Phase.RUNNING:
        turn.set(ending=fault)
        marks = (Mark.SNAPSHOT, Mark.STOP)
        turn.send(state.devices[0], msg.AskMarks(**turn.of_epoch, marks=marks))
    elif first and is_closing(state):
        return  # the end is near, and worth having
    else:
        where = describe_progress(state) if state.start else "nothing was begun"
        halt(turn, Fault(kind=fault.kind, text=f"{fault.text}; {where}"))


def _on_stop_asked(turn: RunTurn, event: ev.StopAsked) -> None:
    """No error: the run completes with the version of the next commit."""
    state = turn.state
    if state.is_over or is_closing(state) or state.stop_reason is not None:
        return
    turn.set(stop_reason=event.reason)
    if state.phase is Phase.RUNNING and state.ending is None:
        _ask_stop(turn)


def _ask_stop(turn: RunTurn) -> None:
    marks = (Mark.SNAPSHOT, Mark.STOP)
    turn.send(turn.state.devices[0], msg.AskMarks(**turn.of_epoch, marks=marks))


def _on_checkpoint_asked(turn: RunTurn, event: ev.CheckpointAsked) -> None:
    state = turn.state
    if state.phase is not Phase.RUNNING or state.wave_open or state.ending is not None:
        return  # one is on its way, or the end is, which keeps the state anyway
    turn.set(wave_open=True, wave_version=state.committed + 1)
    turn.send(state.devices[0], msg.AskMarks(**turn.of_epoch, marks=(Mark.SNAPSHOT,)))


# Messages ---------------------------------------------------------------------------------------


def _on_message(turn: RunTurn, event: ev.MessageReceived) -> None:
    message, sender, state = event.message, event.sender, turn.state
    if isinstance(message, msg.Hello):
        _on_hello(turn, sender, message)
        return
    if isinstance(message, msg.StaleEpoch):
        return  # of a run that is over there; a member that matters will miss a deadline
    if state.is_over or state.start is None:
        return
    if message.run != state.run and sender not in state.party:
        return  # left over from a run before, of a device that this plan leaves out
    if isinstance(message, msg.Attached):
        on_attached(turn, sender, message)
        return
    handler = _ON_MESSAGE.get(type(message))
    is_member = sender in state.party and sender in state.members
    if not is_member and state.recovery is not None and message.run == state.run:
        # R8: lost, whatever it says; it stops, and joins as a newcomer.
        reply = msg.StaleEpoch(run=message.run, epoch=message.epoch, active=state.epoch)
        turn.send(sender, reply)
        return
    if handler is None or not is_member:
        text = f"{type(message).__name__} from {sender}, which may not send it"
        fault = Fault(kind="ProtocolError", text=text)
        is_stranger = sender not in state.party
        turn.do(ev.Reject(sender=sender, fault=fault, is_stranger=is_stranger))
        return
    if message.run != state.run or message.epoch < state.epoch:  # R7
        reply = msg.StaleEpoch(run=message.run, epoch=message.epoch, active=state.epoch)
        turn.send(sender, reply)
        return
    if message.epoch > state.epoch:
        what = type(message).__name__
        raise ProtocolError(f"{what} from {sender} of epoch {message.epoch}, not yet opened")
    _hear(turn, sender)
    if state.phase is Phase.ATTACHING:
        on_message_attaching(turn, sender, message)
        return
    handler(turn, sender, message)


def _hear(turn: RunTurn, sender: str) -> None:
    member = turn.state.members[sender]
    gaps = (*member.gaps, turn.now_s - member.heard_s)[-16:]
    turn.set_member(sender, heard_s=turn.now_s, gaps=gaps)


def _on_heartbeat(turn: RunTurn, sender: str, message: msg.Heartbeat) -> None:
    turn.set_member(sender, heartbeat=message)


def _expect_phase(
    state: CoordinatorState, sender: str, message: msg.Message, *phases: Phase
) -> None:
    if state.phase not in phases:
        what = type(message).__name__
        raise ProtocolError(f"{what} from {sender} while {state.phase.value}")


_ON_MESSAGE: dict[type, Callable[[RunTurn, str, Any], None]] = {
    msg.Ready: _on_ready,
    msg.Measured: _on_measured,
    msg.Done: _on_done,
    msg.Loss: _on_loss,
    msg.Evaluated: on_evaluated,
    msg.StageState: _on_stage_state,
    msg.Heartbeat: _on_heartbeat,
    msg.Suspect: _on_suspect,
    msg.Error: _on_error,
    msg.Report: on_report,
    msg.VerdictMade: on_verdict_made,
    msg.Stored: on_stored,
}
_HANDLERS: dict[type, Callable[[RunTurn, Any], None]] = {
    ev.MessageReceived: _on_message,
    ev.MemberLost: _on_member_lost,
    ev.CheckpointWritten: _on_checkpoint_written,
    ev.BestWritten: on_best_written,
    ev.StopAsked: _on_stop_asked,
    ev.CheckpointAsked: _on_checkpoint_asked,
    ev.BodyFailed: _on_body_failed,
    ev.Interrupt: _on_interrupt,
    ev.Tick: on_tick,
    ev.OwnersChosen: on_owners_chosen,
}
