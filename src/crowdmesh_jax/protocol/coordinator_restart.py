"""The coordinator starts again from its journal (section 10): Term, Attach, and one question.

If the journal's last epoch was resumed and every member says that it runs in it, nothing else
happens: they trained on. Otherwise the next epoch is opened and decided afresh; an old one is never
finished, and no number is used twice. If the journal has the run's end, who says Hello is released.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..core.builders import schedule_for
from ..core.crowd import DeviceId
from ..errors import ProtocolError
from . import coordinator_events as ev
from . import messages as msg
from . import records
from .coordinator_recovery import fill_gaps, open_epoch
from .coordinator_state import (
    CoordinatorState,
    MemberInfo,
    PendingStep,
    Phase,
    Standing,
    step_wait,
)
from .coordinator_steps import file_step
from .coordinator_turn import RunTurn
from .coordinator_waves import on_stored
from .evidence import Base


def on_restart(turn: RunTurn, event: ev.Restart) -> None:
    """Journal first: the new term (I11)."""
    if turn.state.start is not None:
        raise ProtocolError(f"run {turn.state.run!r} was started before")
    terms = event.start.recovery
    if terms is None:
        raise ProtocolError("a run without recovery cannot be taken up again by its journal")
    turn.state = remember(turn.state, event.start, event.records)
    state = turn.state
    if state.finished is not None:
        why = "set for members to come and be released"
        turn.enter(Phase.ATTACHING, turn.wait_for("Hello", state.crew, terms.attach_s, why))
        return
    turn.journal(
        records.Term(run=state.run, term=state.term, config_sha256=event.start.config_sha256)
    )
    why = "set for members to attach"
    wait = turn.wait_for("Attached", state.crew, terms.attach_s, why)
    turn.enter(Phase.ATTACHING, wait)


def remember(
    fresh: CoordinatorState, start: ev.Start, journal: Iterable[records.Record]
) -> CoordinatorState:
    """The state that the journal's records of this run add up to.

    Raises:
        ProtocolError: The run is over, or had not begun.
    """
    state = replace(
        fresh,
        start=start,
        base=start.base,
        committed=start.base,
        shown=start.base,
        checkpoint=start.base,
        durable=start.base,
        wave_version=start.base,
        best=start.best,
        term=0,
    )
    ours = False
    for record in journal:
        if isinstance(record, records.Term):
            ours = record.run == fresh.run
        if ours:
            state = _apply(state, record)
    if not state.crew:
        raise ProtocolError(f"the journal has no decision of run {fresh.run!r}")
    return replace(state, term=state.term + 1, wave_from=max(state.durable, state.base))


def _apply(state: CoordinatorState, record: records.Record) -> CoordinatorState:
    match record:
        case records.Term(term=term):
            return replace(state, term=max(term, state.term))
        case records.Epoch(epoch=epoch):
            return replace(state, epoch=epoch, was_resumed=False, assigned=0)
        case records.Decision():
            plan = record.plan
            schedule = state.started.schedule
            if schedule.num_stages != len(plan.stages):
                schedule = schedule_for(plan)
            return replace(
                state,
                base=record.base,
                committed=record.base,
                crew=record.crew or plan.devices,
                standing=Standing(plan=plan, schedule=schedule, holders=record.holders),
                bases=(*state.bases, Base(epoch=record.epoch, base=record.base)),
            )
        case records.Assigned(number=seq, holders=holders):
            standing = state.standing
            assert standing is not None, "a Decision stands before it"
            return replace(state, assigned=seq, standing=replace(standing, holders=holders))
        case records.Resumed():
            return replace(state, was_resumed=True)
        case records.StepCommitted(step=step):
            entry = PendingStep(step=step, verdict=record.verdict, values=record.values)
            return replace(
                state,
                shown=step + 1,
                last_shown=entry,
                committed=max(step + 1, state.committed),
            )
        case records.Evaluation(version=version):
            return replace(state, evaluated=version)
        case records.Best(value=value):
            return replace(state, best=value)
        case records.Wave(version=version, ledger=ledger, epoch=epoch):
            if not ledger:
                state = replace(state, checkpoint=version, checkpoint_tag=epoch)
            return replace(state, durable=max(version, state.durable))
        case records.Finish():
            return replace(state, finished=record)
        case records.Halted():
            raise ProtocolError(f"run {state.run!r} is over: {type(record).__name__}")
        case _:
            return state


def on_hello_attaching(turn: RunTurn, sender: str, hello: msg.Hello) -> None:
    """A channel is open again: ask where its device is."""
    state = turn.state
    members = {**state.members, sender: MemberInfo(hello=hello, heard_s=turn.now_s)}
    turn.set(members=members)
    if state.finished is not None:
        _release(turn, sender)
        return
    turn.send(sender, msg.Attach(run=state.run, term=state.term))


def _release(turn: RunTurn, device: str) -> None:
    """The coordinator before ended between Finish and Release: the result is safe, and its members
    wait to hear of it. When all have, or may have, the run has ended."""
    turn.send(device, msg.Release(**turn.of_epoch))
    state = turn.state
    missing = tuple(member for member in state.crew if member not in state.members)
    if state.wait is not None:
        turn.set(wait=replace(state.wait, devices=missing))
    if not missing:
        _end(turn)


def _end(turn: RunTurn) -> None:
    finish = turn.state.finished
    assert finish is not None, "asked where the journal has it"
    turn.enter(Phase.DONE, None)
    turn.do(ev.Complete(version=finish.version, reason=finish.reason))


def on_lost_attaching(turn: RunTurn, device: str) -> None:
    """Its channel ended again; it has until the deadline."""
    turn.forget_member(device)
    state = turn.state
    attached = {name: said for name, said in state.attached.items() if name != device}
    wait = state.wait
    if wait is not None and device not in wait.devices:
        wait = replace(wait, devices=(*wait.devices, DeviceId(device)))
    turn.set(attached=attached, wait=wait)


def on_message_attaching(turn: RunTurn, sender: str, message: msg.Message) -> None:
    """Members train on while the others attach: what they say of it is noted, no more."""
    state = turn.state
    if isinstance(message, msg.Stored):
        on_stored(turn, sender, message)
    elif isinstance(message, msg.Loss):
        file_step(turn, message.step, values=message.values)
    elif isinstance(message, msg.Done):
        file_step(turn, message.step, verdict=message.verdict)
        said = state.attached.get(sender)
        if said is not None:  # later than its answer to Attach, on the same channel
            later = replace(said, step=max(said.step, message.step + 1))
            turn.set(attached={**state.attached, sender: later})


def on_attached(turn: RunTurn, sender: str, message: msg.Attached) -> None:
    state = turn.state
    is_here = sender in state.members  # it said Hello, and its channel stands
    if state.phase is not Phase.ATTACHING or message.term != state.term or not is_here:
        return
    attached = {**state.attached, sender: message}
    turn.set(attached=attached)
    if message.epoch == 0:
        turn.set_member(sender, is_newcomer=True)  # a new process: nothing of the old one is left
    missing = tuple(device for device in state.crew if device not in attached)
    if state.wait is not None:
        turn.set(wait=replace(state.wait, devices=missing))
    if missing:
        return
    if is_undisturbed(turn.state):
        _go_on(turn)
    else:
        open_epoch(turn, (), "the coordinator started again in the middle of a recovery")


def is_undisturbed(state: CoordinatorState) -> bool:
    """The last epoch was resumed, and everyone runs in it."""
    return state.was_resumed and all(
        (said.epoch, said.fence, said.phase) == (state.epoch, state.epoch, "run")
        for said in (state.attached[device] for device in state.crew)
    )


def _go_on(turn: RunTurn) -> None:
    state = turn.state
    committed = state.attached[state.devices[0]].step
    for said in state.attached.values():
        for entry in said.losses:  # of the step at work, too: it is not told again
            file_step(turn, entry.step, values=entry.values)
        for verdict in said.verdicts:
            if verdict.step < committed:
                file_step(turn, verdict.step, verdict=verdict.verdict)
    turn.set(committed=committed, done_s=None)
    fill_gaps(turn, committed)
    for device in state.crew:
        turn.set_member(device, heard_s=turn.now_s, gaps=())
    turn.enter(Phase.RUNNING, step_wait(turn.state, turn.now_s))


def on_attach_late(turn: RunTurn) -> None:
    """Who is not back is lost."""
    state = turn.state
    if state.finished is not None:
        _end(turn)
        return
    missing = tuple(device for device in state.crew if device not in state.attached)
    names = ", ".join(missing)
    open_epoch(turn, missing, f"the coordinator started again, and {names} did not attach")
