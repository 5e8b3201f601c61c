"""Losses and returns in the coordinator machine: fence, reports, decision, install, resume.

    lose, return --journal Epoch--> fencing --all Reports--> deciding --owners--> journal Decision
    --> installing --all Ready--> journal Resumed --> running

Interrupted at any point it opens the next epoch and decides afresh; no number is used twice and
nothing is resumed by hand. Without `Start.recovery` a loss ends the run.
"""

from __future__ import annotations

from dataclasses import replace

from ..core.builders import schedule_for
from ..core.crowd import DeviceId
from ..errors import AgentLostError, ProtocolError
from . import coordinator_events as ev
from . import messages as msg
from . import records
from .common import Fault, Mark, NonFinitePolicy, Slot, Verdict
from .coordinator_install import send_installs
from .coordinator_state import CoordinatorState, PendingStep, Phase, Standing, step_wait
from .coordinator_steps import file_step
from .coordinator_turn import RunTurn, end_when_safe, halt, halt_lost, is_closing
from .coordinator_waves import give_up_wave_without
from .decision import Decision, Halt, conclude, no_base
from .evidence import Base, Copy, Evidence, Past
from .judgement import Judgement, weigh

# Opening an epoch -------------------------------------------------------------------------------


def lose(turn: RunTurn, device: str, reason: str) -> None:
    """A device of the run is gone, or is held to be."""
    state = turn.state
    if state.recovery is None:
        halt_lost(turn, device, reason)
        return
    turn.forget_member(device)
    if state.phase is Phase.GATHERING:
        if state.wait is not None and device in state.devices:
            devices = (*state.wait.devices, DeviceId(device))
            turn.set(wait=replace(state.wait, devices=devices))
    elif state.phase is Phase.WAITING:
        reports = {name: said for name, said in state.reports.items() if name != device}
        turn.set(reports=reports)
    elif state.phase is Phase.FENCING:
        # Nothing is decided yet: it is merely left out of this epoch (R8).
        reports = {name: said for name, said in state.reports.items() if name != device}
        turn.set(crew=tuple(d for d in state.crew if d != device), reports=reports)
        decide_when_heard(turn)
    else:
        open_epoch(turn, (DeviceId(device),), f"{device} was lost: {reason}")


def open_epoch(turn: RunTurn, lost: tuple[DeviceId, ...], reason: str) -> None:
    """Everyone who is here and not lost stops and reports."""
    state = turn.state
    terms = state.recovery
    assert terms is not None
    for device in lost:
        turn.forget_member(device)
    epoch = state.epoch + 1
    crew = tuple(DeviceId(device) for device in sorted(turn.state.members))
    for version in sorted({shard.version for shard in state.shards} - {state.writing}):
        turn.do(ev.Forget(version=version))  # an open wave dies with its epoch (R16)
    scored = {entry.version for entry in state.scored}
    for version in state.held:
        if version not in scored:
            turn.do(ev.Forget(version=version))
    turn.set(
        epoch=epoch,
        crew=crew,
        reports={},
        decided=None,
        suspicions=(),
        shards=tuple(shard for shard in state.shards if shard.version == state.writing),
        held=tuple(version for version in state.held if version in scored),
        awaited=(),
        early=(),
        wave_open=False,
        wave_asked_s=None,
        change_reason=None,
        assigned=0,
        acks=(),
        wave_bytes=0,
        was_resumed=False,
        opened_at=max(state.committed, state.opened_at),
    )
    turn.journal(records.Epoch(epoch=epoch, lost=lost, reason=reason))
    for device in crew:
        turn.send(device, msg.Fence(**turn.of_epoch, term=state.term))
    turn.do(ev.Announce(news=ev.EpochOpened(epoch=epoch, lost=lost, reason=reason)))
    why = "set for reports"
    turn.enter(Phase.FENCING, turn.wait_for("Report", crew, terms.report_s, why))
    decide_when_heard(turn)


def on_report(turn: RunTurn, sender: str, message: msg.Report) -> None:
    state = turn.state
    if state.phase is not Phase.FENCING:
        return
    slots = [Slot(kind="verdict", step=entry.step) for entry in message.evidence.verdicts]
    if slots:
        turn.do(ev.Keep(slots=tuple(slots)))
    turn.set(reports={**state.reports, sender: message.evidence})
    decide_when_heard(turn)


def on_reports_late(turn: RunTurn) -> None:
    """R8: who has not reported by the deadline is lost for this epoch, whatever it says later."""
    state = turn.state
    if state.writing is not None and all(device in state.reports for device in state.crew):
        text = f"writing the checkpoint of version {state.writing} took too long"
        halt(turn, Fault(kind="RecordError", text=text))
        return
    for device in state.crew:
        if device not in state.reports:
            turn.forget_member(device)
    turn.set(crew=tuple(device for device in state.crew if device in state.reports))
    decide_when_heard(turn)


def on_copy_lost(turn: RunTurn, sender: str, message: msg.CopyLost) -> None:
    """A copy that cannot be used: an install that takes it is decided anew, without it."""
    state = turn.state
    entry = (str(message.device), message.copy.name)
    if sender not in state.party or entry in state.damaged:
        return
    turn.set(damaged=(*state.damaged, entry))
    give_up_wave_without(turn, entry[0], message.copy)
    sources = [s for a in (state.decided.actions if state.decided else ()) for s in a.sources]
    is_taken = any((str(s.device), s.copy.name) == entry for s in sources)
    if state.phase is Phase.INSTALLING and is_taken:
        layers = f"layers {message.copy.first_layer}-{message.copy.last_layer}"
        text = f"the copy of {layers} on {message.device} cannot be used: {message.reason}"
        open_epoch(turn, (), text)


# Deciding ---------------------------------------------------------------------------------------


def decide_when_heard(turn: RunTurn) -> None:
    """All reports are here, and the disk is at rest: weigh them, ask for owners."""
    state = turn.state
    missing = tuple(device for device in state.crew if device not in state.reports)
    if state.wait is not None:
        turn.set(wait=replace(state.wait, devices=missing or (state.device,)))
    if state.phase is not Phase.FENCING or missing or state.writing is not None:
        return
    judgement = judge(state)
    if judgement.must_halt:
        wait_for_return(turn, no_base(judgement))
        return
    terms = state.recovery
    assert terms is not None
    why = "set for the policy"
    wait = turn.wait_for("owners", (state.device,), terms.owners_s, why)
    turn.enter(Phase.DECIDING, wait)
    turn.do(ev.ChooseOwners(need=judgement.need(state.crew)))


def judge(state: CoordinatorState) -> Judgement:
    """What journal and reports come to; the coordinator's disk reports like a device."""
    start, terms = state.started, state.recovery
    assert terms is not None
    disk = Copy(
        first_layer=0,
        last_layer=start.plan.num_layers - 1,
        tag=state.checkpoint_tag,
        version=state.checkpoint,
    )
    past = Past(
        epoch=state.epoch,
        plan=state.plan,
        bases=state.bases,
        durable=state.durable,
        checkpoint=state.checkpoint,
        coordinator=state.device,
        data_from=terms.data_from,
        ties=start.ties,
        layer_names=start.layer_names,
    )
    # A complaint about a process that is no more says nothing of the one that took its place.
    heard = {
        device: replace(
            said,
            cannot_hear=tuple(
                peer
                for peer in said.cannot_hear
                if peer in state.members and not state.members[peer].is_newcomer
            ),
            copies=tuple(c for c in said.copies if (device, c.name) not in state.damaged),
        )
        for device, said in state.reports.items()
    }
    return weigh(past, {**heard, state.device: Evidence(copies=(disk,))})


def wait_for_return(turn: RunTurn, impossible: Halt) -> None:
    """A halt is a wait: who comes back may bring what is missing."""
    state = turn.state
    terms = state.recovery
    assert terms is not None
    turn.set(why_waiting=impossible.reason)
    turn.do(ev.Announce(news=ev.Waiting(reason=impossible.reason)))
    why = "set for devices to return"
    wait = turn.wait_for("a device to return", (), terms.return_s, why)
    turn.enter(Phase.WAITING, wait)


def on_nobody_returned(turn: RunTurn) -> None:
    state = turn.state
    halt(turn, Fault.of(AgentLostError(f"the run cannot go on: {state.why_waiting}")))


def on_owners_chosen(turn: RunTurn, event: ev.OwnersChosen) -> None:
    """Journal the decision, then tell it (I11)."""
    state = turn.state
    if state.phase is not Phase.DECIDING or event.epoch != state.epoch:
        return  # answered too late: that epoch is over
    judgement = judge(state)
    decision = conclude(judgement, event.choice)
    if isinstance(decision, Halt):
        wait_for_return(turn, decision)
        return
    schedule = event.schedule
    if schedule is None:
        is_same = decision.plan.schedule == state.started.plan.schedule
        kept = state.standing.schedule if state.standing else state.started.schedule
        same_size = kept.num_stages == len(decision.plan.stages)
        schedule = kept if is_same and same_size else schedule_for(decision.plan)
    record = records.Decision(
        epoch=state.epoch,
        base=decision.base,
        plan=decision.plan,
        steps=state.started.steps,
        crew=state.crew,
        holders=decision.holders,
        actions=decision.actions,
        runs=decision.runs,
        is_rollback=decision.is_rollback,
        reason=decision.reason,
    )
    turn.journal(record)
    _take_decision(turn, decision, judgement)
    turn.set(
        standing=Standing(plan=decision.plan, schedule=schedule, holders=decision.holders),
        bases=(*state.bases, Base(epoch=state.epoch, base=decision.base)),
        decided=decision,
        base=decision.base,
    )
    send_installs(turn)


def _take_decision(turn: RunTurn, decision: Decision, judgement: Judgement) -> None:
    """Steps below the base are committed, whether their Done came or not; others are not."""
    state = turn.state
    base = decision.base
    pending = tuple(entry for entry in state.pending if entry.step < base)
    turn.set(pending=pending, committed=base, done_s=None)
    for evidence in state.reports.values():
        for entry in evidence.losses:
            if entry.step < base:
                file_step(turn, entry.step, values=entry.values)
    for entry in judgement.verdicts:
        if entry.step < base:
            file_step(turn, entry.step, verdict=entry.verdict)


# Resuming ---------------------------------------------------------------------------------------


def on_verdict_made(turn: RunTurn, sender: str, message: msg.VerdictMade) -> None:
    """The one verdict that nobody knew, journalled before anyone may use it."""
    state = turn.state
    decided = state.decided
    if state.phase is not Phase.INSTALLING or decided is None or not decided.verdict_pending:
        return
    if message.step != decided.base - 1:
        raise ProtocolError(f"VerdictMade of step {message.step} from {sender}")
    record = records.VerdictDecided(epoch=state.epoch, step=message.step, verdict=message.verdict)
    turn.journal(record)
    slot = Slot(kind="verdict", step=message.step)
    turn.do(ev.Keep(slots=(slot,)))
    turn.set(decided=replace(decided, verdict_pending=False))
    file_step(turn, message.step, verdict=message.verdict)
    known = msg.VerdictKnown(**turn.of_epoch, step=message.step, verdict=message.verdict)
    for device in state.devices:
        # On the lane of the Install, which it must not overtake.
        turn.do(ev.SendMessage(to=device, message=known, lane="bulk", attach=(slot,)))


def resume_marks(state: CoordinatorState) -> tuple[Mark, ...]:
    """What every stage does at the base before any step: R16's wave, and what a Commit would have
    brought that may not have reached everyone."""
    base, start = state.base, state.started
    marks = {Mark.WAVE} if state.recovery is not None and state.has_holders else set()
    plan = start.evaluation
    if state.decided is None:
        return ()  # the first epoch: the checkpoint it starts from is safe, holders have nothing
    stops = state.stop_reason is not None or state.ending is not None or _is_bad(state)
    if base == start.steps:
        marks |= {Mark.FINISH, Mark.SNAPSHOT}
    elif stops:
        marks |= {Mark.STOP} | ({Mark.SNAPSHOT} if state.checkpoint < base else set())
    due = plan is not None and base > 0 and plan.is_due(base, start.steps)
    if due and plan is not None and state.evaluated < base and Mark.STOP not in marks:
        marks.add(Mark.EVALUATE)
        if plan.keeps_state and state.checkpoint < base:
            marks.add(Mark.SNAPSHOT)
    return tuple(mark for mark in Mark if mark in marks)


def _is_bad(state: CoordinatorState) -> bool:
    """The last committed step was not finite, and the job says halt: its stop mark may be lost."""
    if state.started.on_nonfinite is not NonFinitePolicy.HALT:
        return False
    known = [*state.pending, *([state.last_shown] if state.last_shown else [])]
    return any(
        entry.step == state.base - 1 and entry.verdict and not entry.verdict.is_finite
        for entry in known
    )


def resume(turn: RunTurn) -> None:
    """Everyone is Ready. Journal first (I11)."""
    state = turn.state
    turn.journal(records.Resumed(epoch=state.epoch))
    fill_gaps(turn, state.base)
    marks = resume_marks(turn.state)
    for device in state.party:
        turn.set_member(device, heard_s=turn.now_s, gaps=())
        turn.send(device, msg.Resume(**turn.of_epoch, steps=state.started.steps, marks=marks))
    if state.decided is not None:
        news = ev.Recovered(
            epoch=state.epoch,
            base=state.base,
            redone=max(0, state.opened_at - state.base),
            reason=state.decided.reason,
        )
        turn.do(ev.Announce(news=news))
    turn.set(was_resumed=True, opened_at=0)
    _enter_running(turn, marks)


def _enter_running(turn: RunTurn, marks: tuple[Mark, ...]) -> None:
    state = turn.state
    if Mark.WAVE in marks:
        turn.set(wave_asked_s=turn.now_s, wave_from=state.base)
    if Mark.EVALUATE in marks:
        turn.set(awaited=(state.base,), last_evaluated=state.base)
    if Mark.SNAPSHOT in marks:
        turn.set(wave_open=True, wave_version=state.base)
    limit_s = state.started.deadlines.finish_s
    if Mark.FINISH in marks:
        wait = turn.wait_for("the result", state.devices, limit_s, "set for the last wave")
        turn.enter(Phase.FINISHING, wait)
    elif Mark.STOP in marks:
        why = "set for the last wave"
        wait = turn.wait_for("the state at the stop", state.devices, limit_s, why)
        turn.enter(Phase.STOPPING, wait)
    else:
        turn.enter(Phase.RUNNING, step_wait(turn.state, turn.now_s))
    if is_closing(turn.state):
        end_when_safe(turn)


def fill_gaps(turn: RunTurn, below: int) -> None:
    """Steps that are committed and whose loss died with its messenger: shown as not a number."""
    for step in range(turn.state.shown, below):
        pending = next((e for e in turn.state.pending if e.step == step), PendingStep(step=step))
        values = pending.values if pending.values is not None else {"loss": float("nan")}
        file_step(turn, step, verdict=pending.verdict or Verdict(), values=values)
