"""The coordinator machine: who is in, what is installed, when to go, what was reached, when to end.

`handle(state, event, now_s) -> (state, actions)` is pure. It never touches the data path: stages
commit among themselves, the coordinator installs, resumes, asks for marks, keeps what it is told,
and watches the clock. Journal before message (I11); every wait has a deadline (I13). A lost member
ends the run, with its state as it was, unless Start says how it recovers (`coordinator_recovery`).

    gathering --all said Hello--> installing --all Ready--> [measuring] --> running
    running --Done(finish)--> finishing --result written--> done
    running --Done(stop)--> stopping --its checkpoint written--> halted
    any --loss, return--> fencing --> deciding --> installing      (where the run recovers)
    running --ChangeAsked, Done(stop)--> pausing --all stand still--> fencing
    any --error, deadline, second Interrupt, a loss without recovery--> halted
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.crowd import DeviceId
from ..errors import (
    ProtocolError,
)
from . import coordinator_events as ev
from . import messages as msg
from .common import Fault, Mark
from .coordinator_begin import on_hello, on_measured, on_ready, on_start
from .coordinator_change import (
    is_change,
    on_change_asked,
    open_when_still,
    pause,
)
from .coordinator_checkpoints import (
    ask_snapshot_when_due,
    on_checkpoint_failed,
    on_checkpoint_written,
    on_stage_state,
)
from .coordinator_evaluation import (
    note_evaluate_mark,
    on_best_written,
    on_evaluated,
)
from .coordinator_recovery import (
    on_copy_lost,
    on_owners_chosen,
    on_report,
    on_verdict_made,
)
from .coordinator_requests import (
    on_body_failed,
    on_checkpoint_asked,
    on_error,
    on_interrupt,
    on_member_lost,
    on_stop_asked,
    on_suspect,
)
from .coordinator_restart import (
    on_attached,
    on_message_attaching,
    on_restart,
)
from .coordinator_state import (
    WINDOW,
    CoordinatorState,
    Phase,
    closing_deadline_s,
    step_wait,
)
from .coordinator_steps import file_step
from .coordinator_turn import (
    RunTurn,
    end_when_safe,
    expect_phase,
    halt,
)
from .coordinator_watch import on_tick
from .coordinator_waves import (
    ask_wave_when_due,
    note_wave_mark,
    on_holders_asked,
    on_interval_asked,
    on_stored,
)

__all__ = ["CoordinatorState", "DeviceId", "Result", "handle"]

Result = tuple[CoordinatorState, tuple[ev.CoordinatorAction, ...]]


def handle(state: CoordinatorState, event: ev.CoordinatorEvent, now_s: float) -> Result:
    """What `event` does to a run, and what the body must do now.

    Never raises for what a member does wrong: that halts the run with a ProtocolError fault.

    Args:
        now_s: Monotonic seconds; deadlines are counted by it.

    Raises:
        ProtocolError: A second Start; a Restart of a run that is over or never began.
    """
    turn = RunTurn(state, now_s)
    if isinstance(event, ev.Start):
        on_start(turn, event)
    elif isinstance(event, ev.Restart):
        on_restart(turn, event)
    else:
        try:
            _HANDLERS[type(event)](turn, event)
        except ProtocolError as exc:
            turn = RunTurn(state, now_s)
            halt(turn, Fault.of(exc))
    return turn.state, tuple(turn.actions)


# Running ----------------------------------------------------------------------------------------


def _on_done(turn: RunTurn, sender: str, message: msg.Done) -> None:
    state = turn.state
    if sender != state.devices[0]:
        raise ProtocolError(f"Done from {sender}; stage 0 is {state.devices[0]}")
    if message.step < state.committed:
        return  # a step is Done once, whoever says it again
    expect_phase(state, sender, message, Phase.RUNNING)
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
        # Its shards may have overtaken this word of it, and be written by now.
        version = message.step + 1
        is_open = version > max(state.checkpoint, state.missed)
        turn.set(wave_open=is_open, wave_version=version)
    limit_s, why = closing_deadline_s(turn.state), "set for the last wave"
    if Mark.FINISH in message.marks:
        wait = turn.wait_for("the result", state.devices, limit_s, why)
        turn.enter(Phase.FINISHING, wait)
    elif is_change(state, message):
        pause(turn)
    elif Mark.STOP in message.marks:
        wait = turn.wait_for("the state at the stop", state.devices, limit_s, why)
        turn.enter(Phase.STOPPING, wait)
    else:
        ask_snapshot_when_due(turn)
        ask_wave_when_due(turn)
    end_when_safe(turn)


def _on_loss(turn: RunTurn, sender: str, message: msg.Loss) -> None:
    state = turn.state
    if sender != state.devices[-1]:
        raise ProtocolError(f"Loss from {sender}; the last stage is {state.devices[-1]}")
    file_step(turn, message.step, values=message.values)
    end_when_safe(turn)


# Messages ---------------------------------------------------------------------------------------


def _on_message(turn: RunTurn, event: ev.MessageReceived) -> None:
    message, sender, state = event.message, event.sender, turn.state
    if isinstance(message, msg.Hello):
        on_hello(turn, sender, message)
        return
    if isinstance(message, msg.Attach):
        text = f"Attach from {sender}, which is no coordinator"
        turn.do(ev.Reject(sender=sender, fault=Fault(kind="ProtocolError", text=text)))
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
    _hear(turn, sender, message)
    if state.phase is Phase.ATTACHING:
        on_message_attaching(turn, sender, message)
        return
    handler(turn, sender, message)


def _hear(turn: RunTurn, sender: str, message: msg.Message) -> None:
    """It lives; a heartbeat also says what it does."""
    member = turn.state.members[sender]
    gaps = (*member.gaps, turn.now_s - member.heard_s)[-WINDOW:]
    beat = message if isinstance(message, msg.Heartbeat) else member.heartbeat
    turn.set_member(sender, heard_s=turn.now_s, gaps=gaps, heartbeat=beat)


def _on_heartbeat(turn: RunTurn, sender: str, message: msg.Heartbeat) -> None:
    open_when_still(turn)


_ON_MESSAGE: dict[type, Callable[[RunTurn, str, Any], None]] = {
    msg.Ready: on_ready,
    msg.Measured: on_measured,
    msg.Done: _on_done,
    msg.Loss: _on_loss,
    msg.Evaluated: on_evaluated,
    msg.StageState: on_stage_state,
    msg.Heartbeat: _on_heartbeat,
    msg.Suspect: on_suspect,
    msg.Error: on_error,
    msg.Report: on_report,
    msg.VerdictMade: on_verdict_made,
    msg.Stored: on_stored,
    msg.CopyLost: on_copy_lost,
}
_HANDLERS: dict[type, Callable[[RunTurn, Any], None]] = {
    ev.MessageReceived: _on_message,
    ev.MemberLost: on_member_lost,
    ev.CheckpointWritten: on_checkpoint_written,
    ev.CheckpointFailed: on_checkpoint_failed,
    ev.BestWritten: on_best_written,
    ev.StopAsked: on_stop_asked,
    ev.CheckpointAsked: on_checkpoint_asked,
    ev.BodyFailed: on_body_failed,
    ev.Interrupt: on_interrupt,
    ev.Tick: on_tick,
    ev.OwnersChosen: on_owners_chosen,
    ev.ChangeAsked: on_change_asked,
    ev.HoldersAsked: on_holders_asked,
    ev.IntervalAsked: on_interval_asked,
}
