"""The member machine: what one stage does on which message, and what it must never do.

`handle(state, event, now_s) -> (state, actions)` is pure: no clock, no sockets, no arrays. Rules
(R1-R7, T1-T3) and invariants (I1-I13) are numbered as in the protocol's description. What each
action demands of the body is said in `member_events`. Fencing and recovery will add messages and
phases to this machine; run, epoch, term, fence and versions are already carried and checked.

    idle --Install--> installing --Installed--> installed --Resume--> run --Commit(stop)--> stopped
                                                                        --Commit(finish)--> finished
    any --a broken rule, BodyFailed--> failed        any --Release, Halt--> idle

The commit point: stage 0's last backward of step t needs every later stage's last backward of t,
and that frame carries all that must ride up. So when stage 0 is done with t, every stage is
Full(t), and nobody still works on t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.crowd import DeviceId
from ..core.schedule import OpKind
from ..errors import ProtocolError, StaleEpochError
from . import member_events as ev
from . import messages as msg
from .common import Fault, Mark, Slot
from .member_state import MemberState, Phase, waiting_for
from .member_step import STEP_HANDLERS, advance, on_pipeline, request_data
from .member_turn import FRESH_STEP, NO_EVALUATION, MemberTurn, expect_phase, reject

__all__ = ["DeviceId", "MemberState", "Result", "handle"]

Result = tuple[MemberState, tuple[ev.MemberAction, ...]]


def handle(state: MemberState, event: ev.MemberEvent, now_s: float) -> Result:
    """What `event` does to a member, and what its body must do now.

    Never raises for what a peer or body did wrong: a neighbour or body that breaks a rule makes
    the member `Fail` (after telling the coordinator), a stranger is `Reject`ed, old epochs are
    dropped. After Fail the member stands still until Halt or Release.

    Args:
        now_s: Monotonic seconds of this device; only heartbeats depend on it.
    """
    turn = MemberTurn(state, now_s)
    try:
        _HANDLERS[type(event)](turn, event)
    except ProtocolError as exc:
        # The turn's own changes are dropped with it: state and actions start from what was.
        turn = MemberTurn(state, now_s)
        turn.fail(Fault.of(exc))
    return turn.state, tuple(turn.actions)


# Messages ---------------------------------------------------------------------------------------


def _on_message(turn: MemberTurn, event: ev.MessageReceived) -> None:
    message, sender = event.message, event.sender
    if isinstance(message, msg.StaleEpoch):
        _on_told_stale(turn, message)
        return
    if isinstance(message, msg.PipelineMessage):
        if _is_current(turn, sender, message):
            on_pipeline(turn, sender, message)
        return
    if sender != turn.state.coordinator:
        reject(turn, sender, message, f"only the coordinator ({turn.state.coordinator}) may")
        return
    if isinstance(message, msg.Install):
        _on_install(turn, message)
        return
    handler = _FROM_COORDINATOR.get(type(message))
    if handler is None:
        reject(turn, sender, message, "no member takes that")
    elif _is_current(turn, sender, message):
        handler(turn, message)


def _is_current(turn: MemberTurn, sender: str, message: Any) -> bool:
    """R7: the epoch is checked when the frame is processed. Old: dropped, and the sender told."""
    state = turn.state
    if state.phase in (Phase.IDLE, Phase.FAILED):
        if isinstance(message, (msg.Halt, msg.Release)) and message.run == state.run:
            return True
        turn.set(dropped=state.dropped + 1)  # an ended run's late frames
        return False
    if message.run == state.run and message.epoch == state.active:
        return True
    if message.run == state.run and message.epoch > state.active:
        raise ProtocolError(
            f"{type(message).__name__} from {sender} is of epoch {message.epoch},"
            f" {state.device} was granted {state.active}"
        )
    turn.set(dropped=state.dropped + 1)
    reply = msg.StaleEpoch(run=message.run, epoch=message.epoch, active=state.active)
    turn.do(ev.SendMessage(to=DeviceId(sender), message=reply, lane="control"))
    return False


def _on_told_stale(turn: MemberTurn, message: msg.StaleEpoch) -> None:
    """R8: someone has moved on without this member; it stops and (later) joins as a newcomer."""
    state = turn.state
    current = message.run == state.run and message.epoch == state.active
    if current and message.active > state.active:
        error = StaleEpochError(
            f"{state.device} is of epoch {state.active}, its peers are in epoch {message.active}"
        )
        turn.fail(Fault.of(error))


def _on_install(turn: MemberTurn, install: msg.Install) -> None:
    state = turn.state
    new_run = install.run != state.run
    if new_run and state.phase is not Phase.IDLE:
        # Said to who asks, under the run it asks for: it would wait out its deadline for Ready.
        text = (
            f"{state.device} was to install a stage of run {install.run!r}, but holds one of run"
            f" {state.run!r} ({state.phase.value}); Release or Halt of that run comes first"
        )
        fault = Fault(kind="ProtocolError", text=text)
        turn.tell(msg.Error(run=install.run, epoch=install.epoch, fault=fault))
        return
    term, fence = (0, 0) if new_run else (state.term, state.fence)
    if (
        install.term < term
        or install.epoch < fence
        or install.epoch <= (0 if new_run else state.active)
    ):
        turn.set(dropped=state.dropped + 1)
        reply = msg.StaleEpoch(run=install.run, epoch=install.epoch, active=state.active)
        turn.tell(reply)
        return
    try:
        _check_install(state.device, install)
    except ProtocolError as exc:
        turn.tell(msg.Error(run=install.run, epoch=install.epoch, fault=Fault.of(exc)))
        return
    turn.set(
        phase=Phase.INSTALLING,
        run=install.run,
        term=install.term,
        fence=install.epoch,
        active=install.epoch,
        install=install,
        steps=0,
        version=install.base,
        step=install.base,
        verdicts=(),
        marks_asked=(),
        ending=None,
        tied_due=(),
        data_requested=install.base,
        data_ready=(),
        **NO_EVALUATION,
        heartbeat_s=turn.now_s,
        **FRESH_STEP,
    )
    slot = Slot(kind="install", step=install.base, layer=turn.state.layers.start)
    turn.do(ev.Keep(slots=(slot,)))
    turn.do(ev.LoadStage(install=install))


def _check_install(device: DeviceId, install: msg.Install) -> None:
    plan, stage = install.plan, install.stage
    if not 0 <= stage < len(plan.stages) or plan.stages[stage].device != device:
        raise ProtocolError(f"Install gives {device} stage {stage}; the plan does not")
    if install.base < 0:
        raise ProtocolError(f"Install from version {install.base}; versions start at 0")
    wanted = list(range(plan.microbatches))
    forwards = [op.microbatch for op in install.ops if op.kind is OpKind.FORWARD]
    backwards = [op.microbatch for op in install.ops if op.kind is OpKind.BACKWARD]
    if len(forwards) + len(backwards) != len(install.ops):
        raise ProtocolError(f"stage {stage}: its schedule has ops that are neither F nor B")
    if forwards != wanted or backwards != wanted:
        # Gradients and statistics are summed in microbatch order under every schedule.
        raise ProtocolError(
            f"stage {stage}: its schedule must run F and B of microbatches 0-{wanted[-1]} once"
            f" each, in order; it has F {forwards}, B {backwards}"
        )
    begun: set[int] = set()
    for op in install.ops:
        if op.kind is OpKind.FORWARD:
            begun.add(op.microbatch)
        elif op.microbatch not in begun:
            raise ProtocolError(f"stage {stage}: its schedule has B{op.microbatch} before its F")


def _on_measure(turn: MemberTurn, message: msg.Measure) -> None:
    expect_phase(turn.state, message, Phase.INSTALLED)
    turn.do(ev.MeasureStage(repeats=message.repeats))


def _on_resume(turn: MemberTurn, message: msg.Resume) -> None:
    state = turn.state
    expect_phase(state, message, Phase.INSTALLED)
    if message.steps <= state.version:
        raise ProtocolError(f"Resume to version {message.steps} from version {state.version}")
    turn.set(phase=Phase.RUN, steps=message.steps)
    request_data(turn)
    advance(turn)


def _on_ask_marks(turn: MemberTurn, message: msg.AskMarks) -> None:
    state = turn.state
    if state.stage != 0:
        raise ProtocolError(f"AskMarks is for stage 0; {state.device} has stage {state.stage}")
    if Mark.FINISH in message.marks:
        raise ProtocolError("AskMarks(finish): the last step is set by Resume")
    if Mark.EVALUATE in message.marks and not state.eval_microbatches:
        raise ProtocolError("AskMarks(evaluate): Install brought no evaluation")
    asked = {*state.marks_asked, *message.marks}
    turn.set(marks_asked=tuple(mark for mark in Mark if mark in asked))


def _on_release(turn: MemberTurn, message: msg.Release) -> None:
    _unload(turn, None)


def _on_halt(turn: MemberTurn, message: msg.Halt) -> None:
    _unload(turn, message.fault)


def _unload(turn: MemberTurn, fault: Fault | None) -> None:
    if turn.state.phase is Phase.IDLE:
        return
    turn.set(phase=Phase.IDLE, install=None)  # run, term, fence, active: what is over stays known
    turn.do(ev.Unload(fault=fault))


# The rest ---------------------------------------------------------------------------------------


def _on_installed(turn: MemberTurn, event: ev.Installed) -> None:
    if turn.state.phase is Phase.INSTALLING:
        turn.set(phase=Phase.INSTALLED)
        turn.tell(msg.Ready(**turn.of_epoch))


def _on_stage_measured(turn: MemberTurn, event: ev.StageMeasured) -> None:
    if turn.state.phase is Phase.INSTALLED:
        turn.tell(msg.Measured(**turn.of_epoch, seconds=event.seconds))


def _on_peer_lost(turn: MemberTurn, event: ev.PeerLost) -> None:
    """A neighbour is gone: say so, keep everything, wait. Without a coordinator: train on."""
    state = turn.state
    if state.phase not in (Phase.INSTALLING, Phase.INSTALLED, Phase.RUN):
        return
    if event.device in (state.upstream, state.downstream):
        turn.tell(msg.Suspect(**turn.of_epoch, device=event.device, reason=event.reason))


def _on_body_failed(turn: MemberTurn, event: ev.BodyFailed) -> None:
    turn.fail(event.fault)


def _on_tick(turn: MemberTurn, event: ev.Tick) -> None:
    state = turn.state
    if state.phase in (Phase.IDLE, Phase.FAILED) or state.install is None:
        return
    if turn.now_s - state.heartbeat_s < state.install.heartbeat_s:
        return
    turn.set(heartbeat_s=turn.now_s)
    beat = msg.Heartbeat(
        **turn.of_epoch,
        phase=state.phase.value,
        version=state.version,
        completed_ops=state.completed,
        waiting=waiting_for(state),
    )
    turn.tell(beat)


_FROM_COORDINATOR: dict[type, Callable[[MemberTurn, Any], None]] = {
    msg.Measure: _on_measure,
    msg.Resume: _on_resume,
    msg.AskMarks: _on_ask_marks,
    msg.Release: _on_release,
    msg.Halt: _on_halt,
}
_HANDLERS: dict[type, Callable[[MemberTurn, Any], None]] = {
    ev.MessageReceived: _on_message,
    ev.Installed: _on_installed,
    ev.StageMeasured: _on_stage_measured,
    ev.PeerLost: _on_peer_lost,
    ev.BodyFailed: _on_body_failed,
    ev.Tick: _on_tick,
    **STEP_HANDLERS,
}
