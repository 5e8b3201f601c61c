"""How long a stage's state takes from its owner to another device.

By what the link carried of copies while training went on, where that was measured; else by the
crowd's figures. A hand-over has to begin so long before its device leaves.
"""

from __future__ import annotations

from . import events as ev
from .state import ControlState
from .turn import Turn

KEPT_SHARE = 0.5
"""Of the old figure, when a new one comes: what one copy met says little of the next. Seconds for a
byte are averaged, not bytes in a second: pieces that a busy receiver takes from its queue at once
look like a link without limit, and can at most double the figure so."""


def on_link_measured(turn: Turn, event: ev.LinkMeasured) -> None:
    """A copy came over a link."""
    state = turn.state
    known = state.measured_bytes_per_s.get(event.sender, {})
    now, before = event.bytes_per_s, known.get(event.receiver)
    if before is not None:
        now = 1 / (KEPT_SHARE / before + (1 - KEPT_SHARE) / now)
    figures = {**state.measured_bytes_per_s, event.sender: {**known, event.receiver: now}}
    turn.set(measured_bytes_per_s=figures)


def moving_s(state: ControlState, stage: int, device: str) -> float:
    """Of the whole state of a stage of the plan in force; 0 where neither its size nor the link is
    known."""
    room, plan = state.terms.room, state.plan
    if room is None or plan is None:
        return 0.0
    owner = plan.stages[stage].device
    known = (state.measured_bytes_per_s, state.link_bytes_per_s)
    rates = [figures[owner][device] for figures in known if device in figures.get(owner, {})]
    return room.state_bytes(plan.stages[stage]) / rates[0] if rates else 0.0


def longest_move_s(state: ControlState) -> float:
    """Of all stages, each to the idle device that has it soonest."""
    idle = state.idle()
    if not idle or state.plan is None:
        return 0.0
    stages = range(len(state.plan.stages))
    return max(min(moving_s(state, stage, device) for device in idle) for stage in stages)
