"""Who leaves, as announced or as a replication policy foresees, and hand-overs before that."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from ..core.crowd import DeviceId
from ..propagation.handover import SOON_S
from . import events as ev
from .holding import version_held
from .moving import longest_move_s, moving_s
from .state import ControlState, Foreseen
from .turn import Turn, holders_of


def not_leaving(turn: Turn, device: str) -> None:
    """It has come anew, or has gone: what was said of its leaving is of the past."""
    state = turn.state
    turn.set(
        departing={name: at for name, at in state.departing.items() if name != device},
        moves={name: move for name, move in state.moves.items() if name != device},
    )


def announced(turn: Turn) -> set[str]:
    """Who departs within the lead and the time that a stage takes to move, as it said."""
    if not turn.state.departing:
        return set()
    soon_s = turn.now_s + turn.state.terms.lead_s + longest_move_s(turn.state)
    return {d for d, leaves_s in turn.state.departing.items() if leaves_s <= soon_s}


def leaving(turn: Turn) -> set[str]:
    """These, and who is likely to be gone soon, as a policy foresees: they get nothing new."""
    soon_s = turn.now_s + SOON_S
    foreseen = {device for device, m in turn.state.moves.items() if m.leaves_s <= soon_s}
    return announced(turn) | foreseen


def on_departing(turn: Turn, event: ev.Departing) -> None:
    others = {d: at for d, at in turn.state.departing.items() if d != event.device}
    if event.leaves_in_s < math.inf:
        others[event.device] = turn.now_s + event.leaves_in_s
    turn.set(departing=others)
    hand_over_when_due(turn)


def on_moves_wanted(turn: Turn, event: ev.MovesWanted) -> None:
    """All of them at one stop. What the policy wanted before and does not want now is withdrawn;
    who had to leave and has handed over already is still held to leave."""
    state, now_s = turn.state, turn.now_s
    made = {
        device: move
        for device, move in state.moves.items()
        if not _has_stage(state, device) and move.leaves_s - move.wanted_s <= SOON_S
    }
    wanted = {
        move.device: Foreseen(to=move.to, leaves_s=now_s + move.leaves_in_s, wanted_s=now_s)
        for move in event.moves
    }
    turn.set(moves={**made, **wanted})
    if state.wish_moves and state.wish_moves != _meant(turn):
        turn.set(wish=None, wish_reason="", wish_moves=())
    hand_over_when_due(turn)


def forget_old(turn: Turn) -> None:
    """Who should have left by what a policy foresaw, and is still here so long after the policy
    said so last, counts again."""
    moves = turn.state.moves
    kept = {d: move for d, move in moves.items() if turn.now_s - move.wanted_s <= SOON_S}
    if len(kept) < len(moves):
        turn.set(moves=kept)


def settled(turn: Turn) -> None:
    """An epoch runs: a policy that still wants a stage moved says so again."""
    state = turn.state
    moves = {d: move for d, move in state.moves.items() if not _has_stage(state, d)}
    turn.set(moves=moves, wish_moves=())


def hand_over_when_due(turn: Turn) -> None:
    """Asks for the stop at which stages move: those that a policy wants elsewhere, to whom it
    says; those of who departs, to idle devices that stay."""
    state = turn.state
    if not state.is_running or state.plan is None or state.wish is not None:
        return
    meant = _meant(turn)
    moves = list(meant) if _is_time(turn, meant) else []
    moves += _to_idle(turn, moves)
    if not moves:
        return
    stages = list(state.plan.stages)
    for move in moves:
        stages[move.stage] = replace(stages[move.stage], device=DeviceId(move.to))
    reason = "; ".join(
        f"{move.owner} hands stage {move.stage} over to {move.to} ({_why(state, move)})"
        for move in moves
    )
    turn.set(wish=replace(state.plan, stages=tuple(stages)), wish_reason=reason)
    turn.set(wish_moves=meant if moves[: len(meant)] == list(meant) else ())
    turn.do(ev.AskChange(reason=reason))


class Handed(NamedTuple):
    """A stage's move."""

    stage: int
    owner: str
    to: str


def _meant(turn: Turn) -> tuple[Handed, ...]:
    """What the policy wants, if it can be: to members that stay and have no stage, or lose theirs
    at the same stop. One that cannot be takes none of the others with it, unless they need it."""
    state = turn.state
    plan = state.plan
    assert plan is not None
    gone = announced(turn)
    found = [
        Handed(index, str(stage.device), state.moves[stage.device].to)
        for index, stage in enumerate(plan.stages)
        if stage.device in state.moves
        and state.moves[stage.device].to in state.party
        and state.moves[stage.device].to not in gone
    ]
    while True:
        leave = {move.owner for move in found}
        targets = [move.to for move in found]
        fits = [
            move
            for move in found
            if targets.count(move.to) == 1 and (move.to in leave or not _has_stage(state, move.to))
        ]
        if len(fits) == len(found):
            return tuple(found)
        found = fits


def _is_time(turn: Turn, moves: tuple[Handed, ...]) -> bool:
    """Whether all takers have the programs, which are sent to those that lack them; or nobody has
    the time to wait."""
    state = turn.state
    assert state.plan is not None
    lacks = [m for m in moves if state.keys[m.stage] not in state.ready.get(m.to, ())]
    for move in lacks:
        turn.compile(move.to, state.plan, move.stage)
    ends_s = min((state.moves[m.owner].leaves_s for m in moves), default=math.inf)
    move_s = max((moving_s(state, m.stage, m.to) for m in moves), default=0.0)
    return not lacks or ends_s - turn.now_s <= state.terms.lead_s / 2 + move_s


def _to_idle(turn: Turn, moves: list[Handed]) -> list[Handed]:
    """Stages of those that depart, and are not moved already."""
    state = turn.state
    assert state.plan is not None
    barred = {*leaving(turn), *(move.to for move in moves), *state.departing}
    idle = [device for device in state.idle() if device not in barred]
    moved, found = {move.stage for move in moves}, []
    for index, stage in enumerate(state.plan.stages):
        leaves_s = state.departing.get(stage.device)
        if leaves_s is None or index in moved or not idle:
            continue
        left_s = leaves_s - turn.now_s
        ranked = [
            (*_rank(state, index, device, left_s), order, device)
            for order, device in enumerate(idle)
        ]
        _, lacks_programs, *_, best = min(ranked)
        # Until half of the lead it may compile.
        lead_s = state.terms.lead_s / 2 if lacks_programs else state.terms.lead_s
        if left_s <= lead_s + moving_s(state, index, best):
            idle.remove(best)
            found.append(Handed(index, str(stage.device), best))
    return found


def _rank(
    state: ControlState, index: int, device: str, left_s: float
) -> tuple[bool, bool, int, bool]:
    """Of a device that may take a stage whose owner leaves in `left_s`; the least is the best."""
    assert state.plan is not None
    stage = state.plan.stages[index]
    is_late = moving_s(state, index, device) > left_s
    lacks_programs = state.keys[index] not in state.ready.get(device, ())
    is_holder = device in holders_of(state.holders, stage.first_layer)
    return is_late, lacks_programs, -version_held(state, device, stage), not is_holder


def _has_stage(state: ControlState, device: str) -> bool:
    return state.plan is not None and state.plan.stage_of(device) is not None


def _why(state: ControlState, move: Handed) -> str:
    assert state.plan is not None
    stage = state.plan.stages[move.stage]
    version = version_held(state, move.to, stage)
    if version >= 0:
        return f"it holds a copy of version {version}"
    holds = holders_of(state.holders, stage.first_layer)
    return "it is to hold its copies" if move.to in holds else "it is idle"
