"""Waves of copies in the coordinator machine: asked for, acknowledged, journalled, then discarded.

A wave is complete when each layer's owner and every holder assigned to it has acknowledged the same
version in this epoch (R13). It blocks nobody, and dies with its epoch (R16).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.crowd import DeviceId
from . import coordinator_events as ev
from . import messages as msg
from . import records
from .common import Mark
from .coordinator_state import Ack, CoordinatorState, Phase, Standing
from .coordinator_turn import RunTurn
from .evidence import Copy, LayerHolders


def ask_wave_when_due(turn: RunTurn) -> None:
    """After a Done: the mark rides in a later Commit, at a version that stage 0 chooses (R4)."""
    state = turn.state
    terms = state.recovery
    is_ending = state.ending is not None or state.stop_reason is not None
    if terms is None or state.wave_asked_s is not None or is_ending or not state.has_holders:
        return
    every = state.wave_every or terms.wave_every
    due = state.committed + 1 - state.wave_from >= every
    if due and state.committed + 1 < state.started.steps:
        turn.set(wave_asked_s=turn.now_s, wave_from=state.committed + 1)
        turn.send(state.devices[0], msg.AskMarks(**turn.of_epoch, marks=(Mark.WAVE,)))


def note_wave_mark(turn: RunTurn, message: msg.Done) -> None:
    if Mark.WAVE in message.marks:
        turn.set(wave_from=message.step + 1)


def on_stored(turn: RunTurn, sender: str, message: msg.Stored) -> None:
    """A member has a copy, whole. Of this epoch only: its own snapshots, and uploads of them."""
    state = turn.state
    copy = message.copy
    # The wave after a recovery may be at the durable version itself, and counts: holders are new.
    is_awaited = state.wave_asked_s is not None and copy.version == state.wave_from
    if copy.tag != state.epoch or (copy.version <= state.durable and not is_awaited):
        return
    ack = Ack(version=copy.version, first_layer=copy.first_layer, device=DeviceId(sender))
    if ack not in state.acks:
        came_bytes = state.wave_bytes + max(0, message.came_bytes)
        turn.set(acks=(*state.acks, ack), wave_bytes=came_bytes)
    if missing_acks(turn.state, copy.version) or not state.has_holders:
        return
    if copy.version >= state.durable:
        _complete_wave(turn, copy.version)
    else:  # a checkpoint was faster: the wave is of no use any more, and must not bar the next
        turn.set(wave_asked_s=None)
        ask_wave_when_due(turn)


def awaited_acks(state: CoordinatorState, version: int) -> set[Ack]:
    """Owners and assigned holders of all layers."""
    wanted = set()
    for stage in state.plan.stages:
        devices = [stage.device]
        for entry in state.holders:
            if entry.first_layer == stage.first_layer:
                devices += entry.devices
        wanted |= {
            Ack(version=version, first_layer=stage.first_layer, device=device) for device in devices
        }
    return wanted


def missing_acks(state: CoordinatorState, version: int) -> set[Ack]:
    return awaited_acks(state, version) - set(state.acks)


def who_did_not_store(state: CoordinatorState, missing: Sequence[DeviceId]) -> tuple[DeviceId, ...]:
    """Of the devices for which a wave was given up, the holders that lack a copy that its owner
    has. Where the owner has none itself nothing was sent, and no holder is to blame."""
    lacking = missing_acks(state, state.wave_from)
    unsent = {
        stage.first_layer
        for stage in state.plan.stages
        if Ack(version=state.wave_from, first_layer=stage.first_layer, device=stage.device)
        in lacking
    }
    found = {ack.device for ack in lacking if ack.first_layer not in unsent}
    return tuple(sorted(found & set(missing)))


def _complete_wave(turn: RunTurn, version: int) -> None:
    state = turn.state
    acked = awaited_acks(state, version)
    ledger = tuple(
        LayerHolders(
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
            devices=(
                stage.device,
                *sorted(
                    ack.device
                    for ack in acked
                    if ack.first_layer == stage.first_layer and ack.device != stage.device
                ),
            ),
        )
        for stage in state.plan.stages
    )
    turn.journal(
        records.Wave(epoch=state.epoch, version=version, ledger=ledger, sent_bytes=state.wave_bytes)
    )
    turn.set(
        durable=version,
        wave_asked_s=None,
        wave_bytes=0,
        acks=tuple(ack for ack in state.acks if ack.version > version),
    )
    for device in state.party:
        turn.send(device, msg.Discard(**turn.of_epoch, version=version))
    turn.do(ev.Announce(news=ev.WaveKept(version=version)))
    assign_when_quiet(turn)
    ask_wave_when_due(turn)


def give_up_late_wave(turn: RunTurn) -> None:
    """Trap (f): a holder that never acknowledges must not keep the next wave from being asked."""
    state = turn.state
    terms = state.recovery
    if terms is None or state.wave_asked_s is None or state.phase is not Phase.RUNNING:
        return
    if turn.now_s - state.wave_asked_s <= terms.wave_s:
        return
    _give_up_wave(turn, {ack.device for ack in missing_acks(state, state.wave_from)})


def _give_up_wave(turn: RunTurn, missing: set[DeviceId]) -> None:
    turn.set(wave_asked_s=None)
    turn.do(ev.Announce(news=ev.WaveGivenUp(missing=tuple(sorted(missing)))))
    assign_when_quiet(turn)


def give_up_wave_without(turn: RunTurn, device: str, copy: Copy) -> None:
    """A holder cannot keep its copy of the open wave: it will not be complete."""
    state = turn.state
    ack = Ack(version=copy.version, first_layer=copy.first_layer, device=DeviceId(device))
    is_open = state.wave_asked_s is not None and copy.version == state.wave_from
    if is_open and state.phase is Phase.RUNNING and ack in missing_acks(state, copy.version):
        _give_up_wave(turn, {ack.device})


def on_interval_asked(turn: RunTurn, event: ev.IntervalAsked) -> None:
    """Logs reach back a fixed number of steps: a wave never comes later than half of them."""
    terms = turn.state.recovery
    if terms is not None:
        most = max(1, terms.log_steps // 2)
        turn.set(wave_every=min(max(1, event.steps), most))


def on_holders_asked(turn: RunTurn, event: ev.HoldersAsked) -> None:
    """Taken at once, or when the open wave has ended: who must acknowledge it was settled then."""
    turn.set(holders_asked=event.holders)
    assign_when_quiet(turn)


def assign_when_quiet(turn: RunTurn) -> None:
    """Journals and tells the holders that are asked for, while no wave is open."""
    state = turn.state
    holders = state.holders_asked
    if holders is None or state.phase is not Phase.RUNNING or state.wave_asked_s is not None:
        return
    turn.set(holders_asked=None)
    known = {*state.party}
    if holders == state.holders or any(d not in known for e in holders for d in e.devices):
        return  # as it is; or of an epoch that is over
    seq = state.assigned + 1
    turn.journal(records.Assigned(epoch=state.epoch, number=seq, holders=holders))
    standing = state.standing or Standing(plan=state.plan, schedule=state.started.schedule)
    turn.set(
        assigned=seq,
        standing=Standing(plan=standing.plan, schedule=standing.schedule, holders=holders),
    )
    for device in state.party:
        turn.send(device, msg.Assign(**turn.of_epoch, seq=seq, holders=holders))
