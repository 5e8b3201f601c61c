"""Checkpoints in the coordinator machine: asked for, gathered, written one by one, oldest first."""

from __future__ import annotations

from ..errors import ProtocolError
from . import coordinator_events as ev
from . import messages as msg
from . import records
from .common import Mark, Slot
from .coordinator_evaluation import hold_while_undecided, holds
from .coordinator_recovery import decide_when_heard
from .coordinator_state import Phase, Shard
from .coordinator_turn import (
    RunTurn,
    await_closing,
    end_when_safe,
    expect_phase,
    halt,
    has_shard,
    is_closing,
)


def ask_snapshot_when_due(turn: RunTurn) -> None:
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


def on_stage_state(turn: RunTurn, sender: str, message: msg.StageState) -> None:
    state = turn.state
    phases = (Phase.RUNNING, Phase.PAUSING, Phase.STOPPING, Phase.FINISHING)
    expect_phase(state, sender, message, *phases)
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


def on_checkpoint_failed(turn: RunTurn, event: ev.CheckpointFailed) -> None:
    """Without recovery, or where it is the result, the run ends with it. Otherwise it is said, the
    older one stands, and the next is asked for when it is due (section 10: agents train on)."""
    state = turn.state
    if state.is_over:
        return
    needs_it = is_closing(state) or event.version in state.held
    if state.recovery is None or needs_it:
        halt(turn, event.fault)
        return
    turn.set(
        wave_open=False,
        writing=None,
        missed=event.version,
        shards=tuple(shard for shard in state.shards if shard.version != event.version),
    )
    turn.do(ev.Announce(news=ev.CheckpointMissed(version=event.version, fault=event.fault)))
    if state.phase is Phase.FENCING:
        decide_when_heard(turn)


def on_checkpoint_written(turn: RunTurn, event: ev.CheckpointWritten) -> None:
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
        ask_snapshot_when_due(turn)
    elif state.phase is Phase.FENCING:
        decide_when_heard(turn)
    end_when_safe(turn)
