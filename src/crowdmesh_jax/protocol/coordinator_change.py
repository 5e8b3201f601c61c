"""Changes without a loss, in the coordinator machine: another plan, or newcomers as members.

    running --AskMarks(stop)--> Done(stop) --> pausing --all stand still at one version--> fencing

From there it is an epoch like any other, whose base is that version: states that move are restored
from their old owners, the others are kept, and nothing is computed twice (section 9).
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import ProtocolError
from . import coordinator_events as ev
from . import messages as msg
from .common import Mark, NonFinitePolicy
from .coordinator_recovery import open_epoch
from .coordinator_state import CoordinatorState, Phase
from .coordinator_turn import RunTurn

STOPPED = "stopped"
"""Phase of a member behind the commit with the stop mark, as its heartbeat says it."""


def on_change_asked(turn: RunTurn, event: ev.ChangeAsked) -> None:
    """The stop mark rides in a Commit, so that all stop at one version (R4)."""
    state = turn.state
    if state.recovery is None:
        raise ProtocolError("a plan is changed in runs with recovery only")
    is_ending = state.ending is not None or state.stop_reason is not None
    if state.phase is not Phase.RUNNING or state.change_reason is not None or is_ending:
        return  # an epoch is being opened anyway, or the end is near
    turn.set(change_reason=event.reason)
    turn.send(state.devices[0], msg.AskMarks(**turn.of_epoch, marks=(Mark.STOP,)))


def is_change(state: CoordinatorState, message: msg.Done) -> bool:
    """Whether this stop mark is for a change of plan, and for nothing else.

    A coordinator that started again does not know why one was asked for before; an epoch from here
    is right whatever the reason was."""
    halts = state.started.on_nonfinite is NonFinitePolicy.HALT and not message.verdict.is_finite
    is_ending = state.ending is not None or state.stop_reason is not None or halts
    return state.recovery is not None and Mark.STOP in message.marks and not is_ending


def pause(turn: RunTurn) -> None:
    """The stop mark is committed: whoever stands still says so in its next heartbeat."""
    state = turn.state
    why = "set for everyone to apply the last update"
    limit_s = state.started.deadlines.finish_s
    turn.enter(Phase.PAUSING, turn.wait_for("a standstill", state.devices, limit_s, why))
    open_when_still(turn)


def open_when_still(turn: RunTurn) -> None:
    """All stages are at the version of the stop mark: the epoch is opened."""
    state = turn.state
    if state.phase is not Phase.PAUSING:
        return
    moving = tuple(device for device in state.devices if not _is_still(state, device))
    if moving:
        turn.set(wait=state.wait and replace(state.wait, devices=moving))
        return
    open_epoch(turn, (), state.change_reason or "a change of plan")


def _is_still(state: CoordinatorState, device: str) -> bool:
    info = state.members.get(device)
    beat = info.heartbeat if info is not None else None
    return beat is not None and (beat.phase, beat.version) == (STOPPED, state.committed)
