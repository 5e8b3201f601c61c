"""The coordinator's clock: silence, waits that last too long, accusations, its own sleep.

Knows deadlines; what a run does otherwise stands in `coordinator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import (
    LaunchError,
    RecordError,
    RunError,
)
from . import coordinator_events as ev
from .common import Fault
from .coordinator_recovery import lose, on_nobody_returned, on_reports_late, open_epoch
from .coordinator_restart import on_attach_late
from .coordinator_state import (
    Phase,
    blame,
    heartbeat_deadline_s,
)
from .coordinator_turn import RunTurn, halt, halt_lost, is_closing, is_through
from .coordinator_waves import give_up_late_wave

SLEPT_S = 5.0
"""A gap between ticks from which the coordinator concludes that it slept itself."""


def on_tick(turn: RunTurn, event: ev.Tick) -> None:
    _forget_own_sleep(turn)
    state = turn.state
    if state.is_over or state.start is None:
        return
    grace_s = state.started.deadlines.suspect_grace_s
    for suspicion in state.suspicions:
        if turn.now_s - suspicion.since_s > grace_s:
            turn.set(suspicions=())
            lose(turn, suspicion.device, suspicion.reason)
            return
    if state.phase in (Phase.RUNNING, Phase.PAUSING, Phase.STOPPING, Phase.FINISHING):
        _check_heartbeats(turn)
    give_up_late_wave(turn)
    _check_wait(turn)


def _forget_own_sleep(turn: RunTurn) -> None:
    """A coordinator that was stopped itself has no right to call the others late."""
    state, now_s = turn.state, turn.now_s
    gap_s = 0.0 if state.tick_s is None else now_s - state.tick_s
    turn.set(tick_s=now_s)
    if gap_s <= SLEPT_S:
        return
    members = {
        name: replace(info, heard_s=info.heard_s + gap_s) for name, info in state.members.items()
    }
    wait = state.wait and replace(state.wait, since_s=state.wait.since_s + gap_s)
    turn.set(members=members, wait=wait, suspicions=())


def _check_heartbeats(turn: RunTurn) -> None:
    state = turn.state
    for device in state.party:
        member = state.members.get(device)
        if state.is_over or member is None:
            continue
        index = state.plan.stage_of(device)
        if is_closing(state) and (index is None or is_through(state, index)):
            continue  # its part of the last wave is here
        silent_s = turn.now_s - member.heard_s
        if silent_s <= state.started.deadlines.heartbeat_floor_s:
            continue  # whatever its usual gaps are
        deadline_s = heartbeat_deadline_s(state, member)
        if silent_s > deadline_s:
            every_s = state.started.heartbeat_s
            reason = (
                f"silent for {silent_s:.1f} s (heartbeats every {every_s:g} s,"
                f" deadline {deadline_s:.3g} s)"
            )
            lose(turn, device, reason)
            return


def _check_wait(turn: RunTurn) -> None:
    state = turn.state
    wait = state.wait
    if state.is_over or wait is None or turn.now_s - wait.since_s <= wait.deadline_s:
        return
    waited = f"waited {turn.now_s - wait.since_s:.1f} s for {wait.what}"
    reason = f"{waited} ({wait.why}; deadline {wait.deadline_s:.3g} s)"
    if state.phase is Phase.GATHERING:
        missing = ", ".join(wait.devices)
        text = f"no agent came up for {missing}: {reason}; see the agents' logs"
        halt(turn, Fault.of(LaunchError(text)))
        return
    expired = _ON_EXPIRED.get(state.phase)
    if expired is not None:
        expired(turn)
        return
    if state.phase is Phase.RUNNING:
        device, doing = blame(state)
        lose(turn, device, f"{reason}; {doing}")
        return
    if state.phase is Phase.DECIDING:
        halt(turn, Fault.of(RunError(f"no plan without the lost devices: {reason}")))
        return
    if wait.devices == (state.device,):
        text = f"writing the checkpoint of version {state.committed} took too long: {reason}"
        halt(turn, Fault.of(RecordError(text)))
        return
    if state.recovery is not None:
        open_epoch(turn, wait.devices, f"{', '.join(wait.devices)}: {reason}")
        return
    halt_lost(turn, wait.devices[0], reason)


_ON_EXPIRED: dict[Phase, Callable[[RunTurn], None]] = {
    Phase.FENCING: on_reports_late,
    Phase.WAITING: on_nobody_returned,
    Phase.ATTACHING: on_attach_late,
}
