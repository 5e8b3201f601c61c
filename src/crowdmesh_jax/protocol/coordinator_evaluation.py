"""Evaluation in the coordinator machine: what came of it, and which version is the best.

Evaluations run on the members, ordered by the evaluate mark; here their values are filed, shown
once the step before is committed, and compared. The best version is written from the shards that
its checkpoint was written from, so it needs no second upload. Knows nothing of how one evaluates.
"""

from __future__ import annotations

from ..errors import ProtocolError
from . import coordinator_events as ev
from . import messages as msg
from . import records
from .common import Mark
from .coordinator_state import CoordinatorState, Evaluated
from .coordinator_turn import RunTurn, await_closing, best_candidates, end_when_safe


def note_evaluate_mark(turn: RunTurn, done: msg.Done) -> None:
    """A step is Done: is the version that it made evaluated? Its values may be here already."""
    state, version = turn.state, done.step + 1
    early = next((entry for entry in state.early if entry.version == version), None)
    if Mark.EVALUATE not in done.marks:
        if early is not None:
            raise ProtocolError(f"an evaluation of version {version}, which has no evaluate mark")
        return
    turn.set(awaited=(*state.awaited, version), last_evaluated=version)
    if early is not None:
        turn.set(early=tuple(entry for entry in state.early if entry is not early))
        _take(turn, early)


def on_evaluated(turn: RunTurn, sender: str, message: msg.Evaluated) -> None:
    """The last stage's values. They may overtake stage 0's Done, which has its own channel."""
    state, version = turn.state, message.version
    if sender != state.devices[-1]:
        raise ProtocolError(f"Evaluated from {sender}; the last stage is {state.devices[-1]}")
    plan = state.started.evaluation
    if plan is None or version > state.started.steps:
        raise ProtocolError(f"Evaluated of version {version}, which nobody asked for")
    entry = Evaluated(version=version, values=message.values)
    if version > state.committed:
        if all(known.version != version for known in state.early):
            turn.set(early=(*state.early, entry))
    elif version in state.awaited:
        _take(turn, entry)
        await_closing(turn)
        end_when_safe(turn)


def _take(turn: RunTurn, entry: Evaluated) -> None:
    state, version = turn.state, entry.version
    awaited = tuple(awaited for awaited in state.awaited if awaited != version)
    turn.set(awaited=awaited, evaluated=version)
    turn.journal(records.Evaluation(version=version, values=entry.values), sync=False)
    turn.do(ev.Announce(news=ev.EvaluationShown(version=version, values=entry.values)))
    rule = state.started.keep_best
    if rule is None:
        return
    if rule.metric not in entry.values:
        known = ", ".join(sorted(entry.values))
        raise ProtocolError(f"the evaluation has no {rule.metric!r}, only {known}")
    turn.set(scored=(*state.scored, entry))
    _decide(turn)


def holds(state: CoordinatorState, version: int) -> bool:
    """Whether a version's shards are needed beyond its checkpoint: it may become the best."""
    plan = state.started.evaluation
    due = plan is not None and plan.is_due(version, state.started.steps)
    return due and state.started.keep_best is not None


def hold_while_undecided(turn: RunTurn, version: int) -> None:
    """A checkpoint is written: with its evaluation here, too, one can decide."""
    if holds(turn.state, version):
        turn.set(held=(*turn.state.held, version))
        _decide(turn)


def _decide(turn: RunTurn) -> None:
    """Writes the oldest undecided version if it is the best; one at a time, in order."""
    rule = turn.state.started.keep_best
    while rule is not None and turn.state.writing_best is None:
        state = turn.state
        candidates = best_candidates(state)
        if not candidates:
            return
        version = candidates[0]
        value = next(e.values[rule.metric] for e in state.scored if e.version == version)
        turn.set(
            scored=tuple(entry for entry in state.scored if entry.version != version),
            held=tuple(held for held in state.held if held != version),
        )
        if rule.is_better(value, state.best):
            turn.set(best=value, writing_best=version)
            turn.do(ev.WriteBest(version=version, metric=rule.metric, value=value))
        else:
            turn.do(ev.Forget(version=version))


def on_best_written(turn: RunTurn, event: ev.BestWritten) -> None:
    """The best version is safe."""
    state, rule = turn.state, turn.state.started.keep_best
    if state.is_over:
        return
    if rule is None or state.best is None or event.version != state.writing_best:
        raise ProtocolError(f"the body wrote {event.version}, asked: {state.writing_best}")
    turn.set(writing_best=None)
    told = {"version": event.version, "metric": rule.metric, "value": state.best}
    turn.journal(records.Best(**told))
    turn.do(ev.Announce(news=ev.BestKept(**told)))
    _decide(turn)
    await_closing(turn)
    end_when_safe(turn)
