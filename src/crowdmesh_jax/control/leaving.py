"""Who leaves, as announced or as a replication policy foresees, and hand-overs before that."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..core.crowd import DeviceId
from . import events as ev
from .holding import version_held
from .state import ControlState, Foreseen
from .turn import Turn, holders_of

BELIEVED_S = 60.0
"""Who handed its stage over because a policy wanted it is held to leave for so long after the
policy said so last; then it may have a stage and copies again."""


def not_leaving(turn: Turn, device: str) -> None:
    """It has come anew, or has gone: what was said of its leaving is of the past."""
    state = turn.state
    turn.set(
        departing={name: at for name, at in state.departing.items() if name != device},
        moves={name: move for name, move in state.moves.items() if name != device},
    )


def due(turn: Turn) -> set[str]:
    """Who departs within the lead, and whose stage a policy wants elsewhere: that is for now."""
    state = turn.state
    soon_s = turn.now_s + state.terms.lead_s
    return {d for d, leaves_s in state.departing.items() if leaves_s <= soon_s} | {*state.moves}


def on_departing(turn: Turn, event: ev.Departing) -> None:
    leaves_s = turn.now_s + event.leaves_in_s
    turn.set(departing={**turn.state.departing, event.device: leaves_s})
    hand_over_when_due(turn)


def on_moves_wanted(turn: Turn, event: ev.MovesWanted) -> None:
    """All of them at one stop. What the policy wanted before and does not want now is withdrawn,
    unless the stage has moved already."""
    state, now_s = turn.state, turn.now_s
    made = {device: move for device, move in state.moves.items() if not _has_stage(state, device)}
    wanted = {
        move.device: Foreseen(to=move.to, leaves_s=now_s + move.leaves_in_s, wanted_s=now_s)
        for move in event.moves
    }
    turn.set(moves={**made, **wanted})
    hand_over_when_due(turn)


def forget_old(turn: Turn) -> None:
    """Who should have left by what a policy foresaw, and is still here, counts again."""
    state = turn.state
    kept = {
        device: move
        for device, move in state.moves.items()
        if _has_stage(state, device) or turn.now_s - move.wanted_s <= BELIEVED_S
    }
    if len(kept) < len(state.moves):
        turn.set(moves=kept)


def hand_over_when_due(turn: Turn) -> None:
    """Moves stages off devices that leave, to idle ones that stay."""
    state = turn.state
    if not state.is_running or state.plan is None or state.wish is not None:
        return
    leaving = due(turn)
    idle = [device for device in state.idle() if not state.will_leave(device)]
    stages, words = list(state.plan.stages), []
    for index, stage in enumerate(stages):
        if stage.device not in leaving or not idle:
            continue
        holds, key = holders_of(state.holders, stage.first_layer), state.keys[index]
        move = state.moves.get(stage.device)
        leaves_s = min(
            state.departing.get(stage.device, math.inf), math.inf if move is None else move.leaves_s
        )
        heir = "" if move is None else move.to

        def rank(
            device: str, stage: Any = stage, holds: Any = holds, key: str = key, to: str = heir
        ) -> tuple[bool, bool, int, bool, int]:
            is_ready = key in state.ready.get(device, ())
            newest = -version_held(state, device, stage)
            return not is_ready, device != to, newest, device not in holds, idle.index(device)

        best = min(idle, key=rank)
        if rank(best)[0] and leaves_s - turn.now_s > state.terms.lead_s / 2:
            continue  # it compiles: there is time for that
        idle.remove(best)
        words.append(f"{stage.device} hands stage {index} over to {best}"
                     f" ({_why(state, best, stage, holds)}) before it leaves")  # fmt: skip
        stages[index] = replace(stage, device=DeviceId(best))
    if words:
        reason = "; ".join(words)
        turn.set(wish=replace(state.plan, stages=tuple(stages)), wish_reason=reason)
        turn.do(ev.AskChange(reason=reason))


def _has_stage(state: ControlState, device: str) -> bool:
    return state.plan is not None and state.plan.stage_of(device) is not None


def _why(state: ControlState, device: str, stage: Any, holds: Any) -> str:
    version = version_held(state, device, stage)
    if version >= 0:
        return f"it holds a copy of version {version}"
    return "it is to hold its copies" if device in holds else "it is idle"
