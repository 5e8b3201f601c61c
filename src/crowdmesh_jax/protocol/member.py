"""The member machine: what one stage does on which message, and what it must never do.

`handle(state, event, now_s) -> (state, actions)` is pure: no clock, no sockets, no arrays. Rules
(R1-R7, T1-T3) and invariants (I1-I13) are numbered as in the protocol's description. What each
action demands of the body is said in `member_events`.

    idle --Install--> installing --Installed--> installed --Resume--> run --Commit(stop)--> stopped
                      \\--> catching up --Applied--/                    --Commit(finish)--> finished
    any --Fence--> fenced --Frozen: Report-- Install, Enlist--> installing, installed
    any --its epoch went on without it--> fenced --Frozen: Rejoin--> idle
    any --a broken rule, BodyFailed--> failed        any --Release, Halt--> idle

The commit point: stage 0's last backward of step t needs every later stage's last backward of t,
and that frame carries all that must ride up. So when stage 0 is done with t, every stage is
Full(t), and nobody still works on t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.crowd import DeviceId
from ..errors import ProtocolError
from . import member_events as ev
from . import messages as msg
from .common import Fault, Mark
from .member_copies import (
    on_assign,
    on_chunk,
    on_copy_damaged,
    on_copy_sealed,
    on_discard,
    on_fetch,
    on_seal,
)
from .member_fence import on_attach, on_fence, on_frozen, on_told_stale, report
from .member_install import (
    on_caught_up,
    on_copy_fetched,
    on_enlist,
    on_install,
    on_installed,
    on_resume,
    on_verdict_known,
)
from .member_logs import on_fetch_log
from .member_state import MemberState, Phase
from .member_step import STEP_HANDLERS, on_pipeline
from .member_turn import MemberTurn, beat, expect_phase, reject

__all__ = ["DeviceId", "MemberState", "Result", "handle"]

REPORT_AGAIN_S = 2.0
"""A fenced member says its report again: who was given up meanwhile is told so (R8)."""
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
    if sender in turn.state.deaf_to:
        turn.set(deaf_to=tuple(peer for peer in turn.state.deaf_to if peer != sender))
    if isinstance(message, msg.StaleEpoch):
        on_told_stale(turn, sender, message)
        return
    if isinstance(message, msg.PipelineMessage):
        if _is_current(turn, sender, message):
            on_pipeline(turn, sender, message)
        return
    peer_handler = _FROM_PEER.get(type(message))
    if peer_handler is not None:
        if _is_current(turn, sender, message):
            peer_handler(turn, sender, message)
        return
    if sender != turn.state.coordinator:
        reject(turn, sender, message, f"only the coordinator ({turn.state.coordinator}) may")
        return
    grant = _GRANTS.get(type(message))
    if grant is not None:
        grant(turn, message)
        return
    handler = _FROM_COORDINATOR.get(type(message))
    if handler is None:
        reject(turn, sender, message, "no member takes that")
    elif _is_current(turn, sender, message):
        handler(turn, message)


def _is_current(turn: MemberTurn, sender: str, message: Any) -> bool:
    """R7: the epoch is checked when the frame is processed. Old: dropped, and the sender told."""
    state = turn.state
    is_here = message.run == state.run
    if isinstance(message, (msg.Halt, msg.Release)) and is_here and message.epoch >= state.active:
        return True
    if state.phase in (Phase.IDLE, Phase.FAILED):
        turn.set(dropped=state.dropped + 1)  # an ended run's late frames
        return False
    if is_here and message.epoch == state.active == state.fence and not state.is_leaving:
        return True
    if is_here and message.epoch == state.fence and isinstance(message, _FOR_FENCED):
        return True  # of the epoch promised to; what it asks for stands still
    if is_here and message.epoch > state.fence:
        raise ProtocolError(
            f"{type(message).__name__} from {sender} is of epoch {message.epoch},"
            f" {state.device} was granted {state.active}"
        )
    turn.set(dropped=state.dropped + 1)
    if state.phase is not Phase.FENCED:
        reply = msg.StaleEpoch(run=message.run, epoch=message.epoch, active=state.active)
        turn.do(ev.SendMessage(to=DeviceId(sender), message=reply, lane="control"))
    return False


def _on_measure(turn: MemberTurn, message: msg.Measure) -> None:
    expect_phase(turn.state, message, Phase.INSTALLED)
    turn.do(ev.MeasureStage(repeats=message.repeats))


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
    if turn.state.phase is Phase.IDLE and not turn.state.copies:
        return
    turn.set(  # run, term, fence, active: what is over stays known
        phase=Phase.IDLE,
        install=None,
        enlisted=None,
        is_leaving=False,
        copies=(),
        logs=(),
        log_asks=(),
        fetching=(),
        asked_again=(),
        verdicts=(),
        losses=(),
        floor=0,
    )
    turn.do(ev.Unload(fault=fault))


# The rest ---------------------------------------------------------------------------------------


def _on_copy_sealed(turn: MemberTurn, event: ev.CopySealed) -> None:
    if on_copy_sealed(turn, event):
        on_copy_fetched(turn)


def _on_applied(turn: MemberTurn, event: ev.Applied) -> None:
    STEP_HANDLERS[ev.Applied](turn, event)
    if turn.state.phase is Phase.CATCHING_UP:
        on_caught_up(turn)


def _on_stage_measured(turn: MemberTurn, event: ev.StageMeasured) -> None:
    if turn.state.phase is Phase.INSTALLED:
        turn.tell(msg.Measured(**turn.of_epoch, seconds=event.seconds))


def _on_peer_lost(turn: MemberTurn, event: ev.PeerLost) -> None:
    """A neighbour is gone: say so, keep everything, wait. Without a coordinator: train on."""
    state = turn.state
    if event.device not in state.deaf_to:
        turn.set(deaf_to=(*state.deaf_to, event.device))
    if state.install is None or state.phase not in (
        Phase.INSTALLING, Phase.CATCHING_UP, Phase.INSTALLED, Phase.RUN,
    ):  # fmt: skip
        return
    sources = [source.device for source in state.fetching]
    if event.device in (state.upstream, state.downstream, *sources):
        turn.tell(msg.Suspect(**turn.of_epoch, device=event.device, reason=event.reason))


def _on_body_failed(turn: MemberTurn, event: ev.BodyFailed) -> None:
    turn.fail(event.fault)


def _on_tick(turn: MemberTurn, event: ev.Tick) -> None:
    state = turn.state
    grant = state.install or state.enlisted
    if state.phase is Phase.FENCED and state.is_frozen:
        if turn.now_s - state.heartbeat_s >= REPORT_AGAIN_S:
            turn.set(heartbeat_s=turn.now_s)
            report(turn)
        return
    if state.phase in (Phase.IDLE, Phase.FAILED, Phase.FENCED) or grant is None:
        return
    if turn.now_s - state.heartbeat_s < grant.heartbeat_s:
        return
    beat(turn)


_FROM_COORDINATOR: dict[type, Callable[[MemberTurn, Any], None]] = {
    msg.Measure: _on_measure,
    msg.Resume: on_resume,
    msg.VerdictKnown: on_verdict_known,
    msg.Discard: on_discard,
    msg.Assign: on_assign,
    msg.AskMarks: _on_ask_marks,
    msg.Release: _on_release,
    msg.Halt: _on_halt,
}
_GRANTS: dict[type, Callable[[MemberTurn, Any], None]] = {
    msg.Fence: on_fence,
    msg.Install: on_install,
    msg.Enlist: on_enlist,
    msg.Attach: on_attach,
}
"""Each checks term, epoch and phase by itself."""
_FROM_PEER: dict[type, Callable[[MemberTurn, str, Any], None]] = {
    msg.Chunk: on_chunk,
    msg.Seal: on_seal,
    msg.Fetch: on_fetch,
    msg.FetchLog: on_fetch_log,
}
_FOR_FENCED = (msg.Fetch, msg.FetchLog)
_HANDLERS: dict[type, Callable[[MemberTurn, Any], None]] = {
    ev.MessageReceived: _on_message,
    ev.Installed: on_installed,
    ev.Frozen: on_frozen,
    ev.CopySealed: _on_copy_sealed,
    ev.CopyDamaged: on_copy_damaged,
    ev.StageMeasured: _on_stage_measured,
    ev.PeerLost: _on_peer_lost,
    ev.BodyFailed: _on_body_failed,
    ev.Tick: _on_tick,
    **STEP_HANDLERS,
    ev.Applied: _on_applied,
}
