"""Who really holds copies, and who should: the ring of devices without those that failed to store.

A holder that never stores keeps every wave from being complete. It is passed over until it stores a
copy for another device, or comes back as a new process; where nobody else has room, it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan, Stage
from ..protocol.evidence import LayerHolders
from ..protocol.owners import ring_holders
from . import events as ev
from .ahead import compile_for_idle
from .state import ControlState
from .turn import Turn


def on_copy_stored(turn: Turn, event: ev.CopyStored) -> None:
    """A device has a copy; if it is another's, it is a holder as good as any."""
    state = turn.state
    kept = dict(state.stored.get(event.device, ()))
    kept[event.first_layer] = event.last_layer, event.version
    turn.set(stored={**state.stored, event.device: tuple(sorted(kept.items()))})
    stage = state.plan.stage_of(event.device) if state.plan is not None else None
    is_own = stage is not None and state.plan is not None and (
        state.plan.stages[stage].first_layer == event.first_layer
    )  # fmt: skip
    if not is_own:
        turn.set(failed=tuple(device for device in state.failed if device != event.device))


def on_copy_gone(turn: Turn, event: ev.CopyGone) -> None:
    """It cannot be used, or is not there any more."""
    state = turn.state
    kept = dict(state.stored.get(event.device, ()))
    kept.pop(event.first_layer, None)
    turn.set(stored={**state.stored, event.device: tuple(sorted(kept.items()))})


def drop_beyond(turn: Turn, version: int) -> None:
    """An epoch begins there: copies of what was taken back are no copies any more."""
    turn.set(
        stored={
            device: tuple(entry for entry in kept if entry[1][1] <= version)
            for device, kept in turn.state.stored.items()
        }
    )


def on_transfer_failed(turn: Turn, event: ev.TransferFailed) -> None:
    """Copies go to others from the next wave on, if there are others, and no policy places them."""
    state = turn.state
    turn.set(failed=tuple(sorted({*state.failed, event.device})))
    if not (state.terms.is_ring and state.is_running) or state.plan is None:
        return
    holders = holders_for(turn.state, state.plan, [DeviceId(device) for device in state.party])
    if holders != state.holders:
        turn.set(holders=holders)
        turn.do(ev.AskHolders(holders=holders))
        compile_for_idle(turn)


def holders_for(
    state: ControlState, plan: PipelinePlan, devices: Sequence[DeviceId]
) -> tuple[LayerHolders, ...]:
    """The ring's, without those that failed to store; a stage that would have none keeps them."""
    terms = state.terms

    def ring(devices: Sequence[DeviceId]) -> tuple[LayerHolders, ...]:
        return ring_holders(
            plan, devices, copies=terms.copies, room=terms.room, hazards=terms.hazards
        )

    every = ring(devices)
    if not state.failed:
        return every
    best = ring([device for device in devices if device not in state.failed])
    return tuple(b if b.devices else e for b, e in zip(best, every, strict=True))


def version_held(state: ControlState, device: str, stage: Stage) -> int:
    """Of the newest copy of a stage that a device said it has; -1: none."""
    last_layer, version = dict(state.stored.get(device, ())).get(stage.first_layer, (-1, -1))
    return version if last_layer == stage.last_layer else -1


def forget(state: ControlState, device: str) -> ControlState:
    """The device's process is gone, and with it what it had and what it did."""
    return replace(
        state,
        stored={name: kept for name, kept in state.stored.items() if name != device},
        measured_bytes_per_s={
            sender: {name: rate for name, rate in rates.items() if name != device}
            for sender, rates in state.measured_bytes_per_s.items()
            if sender != device
        },
        failed=tuple(name for name in state.failed if name != device),
    )
