"""What came of each step, in the coordinator machine: filed as it arrives, shown once, in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import coordinator_events as ev
from . import records
from .coordinator_state import PendingStep
from .coordinator_turn import RunTurn


def file_step(turn: RunTurn, step: int, **known: Any) -> None:
    """Notes what came of a step; shows, in order, each step that is Done and has its values."""
    if step < turn.state.shown:
        return
    pending = {entry.step: entry for entry in turn.state.pending}
    pending[step] = replace(pending.get(step, PendingStep(step=step)), **known)
    shown = turn.state.shown
    last = turn.state.last_shown
    while (entry := pending.get(shown)) and entry.verdict and entry.values is not None:
        last = pending.pop(shown)
        record = records.StepCommitted(step=shown, verdict=entry.verdict, values=entry.values)
        turn.journal(record, sync=False)
        news = ev.StepShown(
            step=shown,
            verdict=entry.verdict,
            values=entry.values,
            step_s=entry.step_s,
            has_evaluated=entry.has_evaluated,
        )
        turn.do(ev.Announce(news=news))
        shown += 1
    left = tuple(pending[step] for step in sorted(pending))
    turn.set(shown=shown, pending=left, last_shown=last)
