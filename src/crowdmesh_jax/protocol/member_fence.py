"""Fencing in the member machine: the promise, the report, leaving and coming back, a new term.

R6: a Fence is a promise, not a grant. Stop at once, keep everything, report; change nothing until
the Install of that very epoch.
"""

from __future__ import annotations

from ..core.crowd import DeviceId
from ..errors import StaleEpochError
from . import member_events as ev
from . import messages as msg
from .common import Fault, Slot
from .evidence import Evidence, StageReport
from .member_copies import own_state_copy
from .member_logs import spans
from .member_state import MemberState, Phase
from .member_turn import MemberTurn


def on_fence(turn: MemberTurn, message: msg.Fence) -> None:
    state = turn.state
    is_other_run = message.run != state.run
    if is_other_run and state.phase is not Phase.IDLE:
        return  # bound to another run; whoever fences will miss the report
    if is_other_run:
        turn.set(run=message.run, term=0, fence=0, active=0, copies=(), floor=0)
        state = turn.state
    if message.term < state.term or message.epoch <= state.fence or state.phase is Phase.FAILED:
        turn.set(dropped=state.dropped + 1)
        return
    # What peers asked for in the epoch before is over with it.
    turn.set(term=message.term, fence=message.epoch, fetching=(), log_asks=())
    if state.phase is Phase.FENCED:
        if state.is_frozen:
            report(turn)
        return
    turn.set(phase=Phase.FENCED, is_frozen=False)
    turn.do(ev.Freeze())


def on_frozen(turn: MemberTurn, event: ev.Frozen) -> None:
    state = turn.state
    if state.phase is not Phase.FENCED or state.is_frozen:
        return
    turn.set(is_frozen=True)
    if state.is_leaving:
        _leave(turn)
    if turn.state.fence > turn.state.active:
        report(turn)
    else:
        turn.set(phase=Phase.IDLE)
        turn.do(ev.Rejoin())


def report(turn: MemberTurn) -> None:
    """What this member has, to the coordinator; nothing of it changes until Install."""
    state = turn.state
    evidence = make_evidence(state)
    report = msg.Report(run=state.run, epoch=state.fence, evidence=evidence)
    slots = tuple(Slot(kind="verdict", step=entry.step) for entry in evidence.verdicts)
    action = ev.SendMessage(to=state.coordinator, message=report, lane="control", attach=slots)
    turn.do(action)


def make_evidence(state: MemberState) -> Evidence:
    """What this member has, once its body stands still."""
    stage = None
    if state.install is not None:
        # An Apply that was issued and not begun has left its gradient where it was.
        has_unapplied = state.step == state.version + 1
        stage = StageReport(
            first_layer=state.layers.start,
            last_layer=state.layers.stop - 1,
            version=state.version,
            tag=state.tag,
            is_full=has_unapplied or (state.is_full and state.step == state.version),
            is_restoring=state.is_restoring,
        )
    return Evidence(
        stage=stage,
        copies=state.copies,
        logs=spans(state) if state.install is not None else (),
        verdicts=state.verdicts,
        losses=state.losses,
        cannot_hear=state.deaf_to,
    )


def on_told_stale(turn: MemberTurn, sender: str, message: msg.StaleEpoch) -> None:
    """R8: the others have moved on without this member. It stops, and joins as a newcomer."""
    state = turn.state
    if message.run != state.run or state.phase in (Phase.IDLE, Phase.FAILED):
        return
    is_passed = message.epoch == state.active and message.active > state.fence
    # Its report came too late: lost for this epoch, whatever it says.
    is_late = sender == state.coordinator and message.epoch == state.fence > state.active
    if not is_passed and not is_late:
        return
    if not state.recovers and state.phase is not Phase.FENCED:
        error = StaleEpochError(
            f"{state.device} is of epoch {state.active}, its peers are in epoch {message.active}"
        )
        turn.fail(Fault.of(error))
        return
    turn.set(is_leaving=True)
    if state.phase is Phase.FENCED and state.is_frozen:
        _leave(turn)
        turn.set(phase=Phase.IDLE)
        turn.do(ev.Rejoin())
    elif state.phase is not Phase.FENCED:
        turn.set(phase=Phase.FENCED, is_frozen=False, fetching=(), log_asks=())
        turn.do(ev.Freeze())


def _leave(turn: MemberTurn) -> None:
    """Frees the stage into a copy. Logs and verdicts go: nothing else tells good ones from bad."""
    state = turn.state
    copy = own_state_copy(state)
    copies = state.copies
    if copy is not None and all(have.name != copy.name for have in copies):
        turn.do(ev.KeepState(copy=copy))
        copies = (*copies, copy)
    turn.do(ev.Rewind(step=0, gradient=True))
    turn.set(
        is_leaving=False,
        install=None,
        enlisted=None,
        copies=copies,
        logs=(),
        verdicts=(),
        losses=(),
        is_restoring=False,
    )


def on_attach(turn: MemberTurn, message: msg.Attach) -> None:
    """A coordinator came back: lower terms are refused from now on; nothing else changes."""
    state = turn.state
    is_here = message.run == state.run
    if is_here and message.term < state.term:
        turn.set(dropped=state.dropped + 1)
        return
    if is_here:
        turn.set(term=message.term)
    answer = msg.Attached(
        run=message.run,
        epoch=state.active if is_here else 0,
        term=message.term,
        fence=state.fence if is_here else 0,
        phase=state.phase.value,
        step=state.step,
        verdicts=state.verdicts if is_here else (),
        losses=state.losses if is_here else (),
    )
    turn.do(ev.SendMessage(to=DeviceId(state.coordinator), message=answer, lane="control"))
