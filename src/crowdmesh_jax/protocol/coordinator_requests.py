"""What ends or interrupts a run, in the coordinator machine: losses, errors, the user."""

from __future__ import annotations

from ..errors import InterruptedRunError, ProtocolError
from . import coordinator_events as ev
from . import messages as msg
from .common import Fault, Mark
from .coordinator_recovery import fill_gaps, lose
from .coordinator_restart import on_lost_attaching
from .coordinator_state import Phase, Suspicion, describe_progress, describe_stage
from .coordinator_turn import RunTurn, end_when_safe, halt, is_closing, is_through


def on_member_lost(turn: RunTurn, event: ev.MemberLost) -> None:
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
        if stage == len(state.devices) - 1:
            # Its part of the last wave is here; what it said of its last losses may have died.
            fill_gaps(turn, state.committed)
            end_when_safe(turn)
        return
    if state.recovery is not None and not is_here:
        return  # lost before, for another reason
    turn.forget_member(event.device)
    lose(turn, event.device, event.reason)


def on_suspect(turn: RunTurn, sender: str, message: msg.Suspect) -> None:
    """Waits a moment: who is accused may have said why it goes, on its own channel."""
    state = turn.state
    if message.device not in state.party:
        raise ProtocolError(f"{sender} suspects {message.device}, which is not in the plan")
    if any(entry.device == message.device for entry in state.suspicions):
        return
    reason = f"{sender} lost its channel to it: {message.reason}"
    suspicion = Suspicion(device=message.device, reason=reason, since_s=turn.now_s)
    turn.set(suspicions=(*state.suspicions, suspicion))


def on_error(turn: RunTurn, sender: str, message: msg.Error) -> None:
    where = f"{sender} ({describe_stage(turn.state, sender)})"
    halt(turn, message.fault.within(where))


def on_body_failed(turn: RunTurn, event: ev.BodyFailed) -> None:
    halt(turn, event.fault)


def on_interrupt(turn: RunTurn, event: ev.Interrupt) -> None:
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
    elif first and state.phase is Phase.PAUSING:
        turn.set(ending=fault)  # the epoch that is about to be opened stops at once
    elif first and is_closing(state):
        return  # the end is near, and worth having
    else:
        where = describe_progress(state) if state.start else "nothing was begun"
        halt(turn, Fault(kind=fault.kind, text=f"{fault.text}; {where}"))


def on_stop_asked(turn: RunTurn, event: ev.StopAsked) -> None:
    """No error: the run completes with the version of the next commit."""
    state = turn.state
    if state.is_over or is_closing(state) or state.stop_reason is not None:
        return
    turn.set(stop_reason=event.reason)
    if state.phase is Phase.RUNNING and state.ending is None:
        ask_stop(turn)


def ask_stop(turn: RunTurn) -> None:
    marks = (Mark.SNAPSHOT, Mark.STOP)
    turn.send(turn.state.devices[0], msg.AskMarks(**turn.of_epoch, marks=marks))


def on_checkpoint_asked(turn: RunTurn, event: ev.CheckpointAsked) -> None:
    state = turn.state
    if state.phase is not Phase.RUNNING or state.wave_open or state.ending is not None:
        return  # one is on its way, or the end is, which keeps the state anyway
    turn.set(wave_open=True, wave_version=state.committed + 1)
    turn.send(state.devices[0], msg.AskMarks(**turn.of_epoch, marks=(Mark.SNAPSHOT,)))
