"""The data path of the member machine: frames of neighbours, ops of the step, commit, tied leaves.

Called by `member.handle`, after the epoch was checked. It knows nothing of installing or ending.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.schedule import OpKind
from ..errors import ProtocolError
from . import member_events as ev
from . import messages as msg
from .common import Mark, NonFinitePolicy, Parts, Slot, StepVerdict, Verdict
from .evidence import StepValues
from .member_copies import on_snapshotted
from .member_evaluation import (
    advance_evaluation,
    begin_evaluation,
    on_eval_data_ready,
    on_eval_done,
    on_eval_forward,
    on_eval_taken,
    on_evaluation_finished,
)
from .member_logs import ask_logs, cross, lend
from .member_state import MemberState, Phase
from .member_turn import FRESH_STEP, MemberTurn, beat, expect_phase, reject

PREFETCH_STEPS = 2
"""Batches requested: of the step at work and the next."""

# Pipeline frames --------------------------------------------------------------------------------


def on_pipeline(turn: MemberTurn, sender: str, message: msg.PipelineMessage) -> None:
    state = turn.state
    upward = isinstance(message, (msg.Backward, msg.EvalTaken))
    neighbour = state.downstream if upward else state.upstream
    if sender != neighbour:
        side = "downstream" if upward else "upstream"
        reject(turn, sender, message, f"stage {state.stage}'s {side} neighbour is {neighbour}")
        return
    # A neighbour may have got its Resume first: frames are kept (bounded by M) while installed.
    expect_phase(
        state,
        message,
        Phase.CATCHING_UP, Phase.INSTALLED, Phase.RUN, Phase.STOPPED, Phase.FINISHED,
    )  # fmt: skip
    ON_PIPELINE[type(message)](turn, message)


def _check_frame(state: MemberState, message: msg.Forward | msg.Backward, cut: int) -> None:
    name = f"{type(message).__name__} {message.microbatch} of step {message.step}"
    if message.step != state.step or state.ending is not None:  # I4
        ended = f", which ended with {state.ending.value}" if state.ending else ""
        raise ProtocolError(f"stage {state.stage} is at version {state.step}{ended}, got {name}")
    if not 0 <= message.microbatch < state.microbatches:
        raise ProtocolError(
            f"stage {state.stage} got {name}; microbatches are 0-{state.microbatches - 1}"
        )
    if message.cut != cut:
        raise ProtocolError(f"stage {state.stage} got {name} at cut {message.cut}, its is {cut}")


def _on_forward(turn: MemberTurn, message: msg.Forward) -> None:
    state = turn.state
    _check_frame(state, message, state.layers.start)
    if message.microbatch in state.arrived_x:
        raise ProtocolError(f"Forward {message.microbatch} of step {message.step} came twice")
    turn.set(arrived_x=(*state.arrived_x, message.microbatch))
    slot = Slot(kind="x", step=message.step, microbatch=message.microbatch)
    turn.do(ev.Keep(slots=(slot,)))
    advance(turn)


def _on_backward(turn: MemberTurn, message: msg.Backward) -> None:
    state = turn.state
    microbatch = message.microbatch
    _check_frame(state, message, state.layers.stop)
    name = f"Backward {microbatch} of step {message.step}"
    done = state.granted.ops[: state.completed]
    was_sent = any(op.kind is OpKind.FORWARD and op.microbatch == microbatch for op in done)
    if not was_sent and not state.is_catching_up:  # a log has all of them at once
        raise ProtocolError(f"{name} came before its Forward was sent")
    if microbatch in state.arrived_dy:
        raise ProtocolError(f"{name} came twice")
    is_last = microbatch == state.microbatches - 1
    if is_last != (message.parts is not None):
        raise ProtocolError(f"{name} {'lacks' if is_last else 'must not have'} parts")
    turn.set(arrived_dy=(*state.arrived_dy, microbatch))
    slots = [Slot(kind="dy", step=message.step, microbatch=microbatch)]
    if message.parts is not None:
        turn.set(parts=message.parts)
        slots.append(Slot(kind="parts_below", step=message.step))
    turn.do(ev.Keep(slots=tuple(slots)))
    advance(turn)


def _on_commit(turn: MemberTurn, message: msg.Commit) -> None:
    state = turn.state
    if message.step != state.step or not state.is_full or state.ending is not None:  # T1
        raise ProtocolError(
            f"stage {state.stage} got Commit of step {message.step} at version {state.step},"
            f" {'full' if state.is_full else 'not full'}"
        )
    turn.do(ev.Keep(slots=(Slot(kind="verdict", step=message.step),)))
    _take_commit(turn, message)


def _on_tied(turn: MemberTurn, message: msg.Tied) -> None:
    state = turn.state
    if message.step != state.step - 1 or message.layer not in state.tied_due:
        raise ProtocolError(
            f"stage {state.stage} at version {state.step} expects no Tied of step {message.step},"
            f" layer {message.layer}"
        )
    turn.do(ev.Keep(slots=(Slot(kind="tied", step=message.step, layer=message.layer),)))
    tie = next(tie for tie in state.granted.ties if tie.owner_layer == message.layer)
    _, borrowers = tie.stages(state.plan)
    if borrowers[-1] > state.stage:
        lend(turn, message.step, message.layer)
    if state.stage in borrowers:
        turn.do(ev.Adopt(step=message.step, layer=message.layer))
    turn.set(tied_due=tuple(layer for layer in state.tied_due if layer != message.layer))
    advance(turn)


# The step ---------------------------------------------------------------------------------------


def advance(turn: MemberTurn) -> None:
    """Issues every op whose turn and inputs have come, ahead of the compute queue."""
    if turn.state.tied_due:
        return  # borrowed leaves are still of the version before
    if not advance_evaluation(turn):
        return  # what it has not yet issued stands before all of the step
    state = turn.state
    runs = state.phase is Phase.RUN or state.is_catching_up
    if not runs or state.ending is not None or state.is_finishing:
        return
    ops = state.granted.ops
    issued = state.issued
    while issued < len(ops) and _has_inputs(state, ops[issued].kind, ops[issued].microbatch):
        op = ops[issued]
        turn.do(ev.Compute(kind=op.kind, step=state.step, microbatch=op.microbatch))
        issued += 1
    turn.set(issued=issued)
    if issued == len(ops):
        turn.set(is_finishing=True)
        turn.do(ev.FinishStep(step=state.step))
        if state.stage == 0 and state.verdict_of(state.step) is None:
            turn.do(ev.Reduce(step=state.step))


def _has_inputs(state: MemberState, kind: OpKind, microbatch: int) -> bool:
    if kind is OpKind.FORWARD:
        return state.step in state.data_ready if state.stage == 0 else microbatch in state.arrived_x
    # The last stage's loss needs the weights of the whole step, so all its targets.
    return state.step in state.data_ready if state.is_last else microbatch in state.arrived_dy


def _on_op_done(turn: MemberTurn, event: ev.OpDone) -> None:
    state = turn.state
    if not state.is_at_work:
        return
    ops = state.granted.ops
    due = ops[state.completed] if state.completed < state.issued else None
    if (
        due is None
        or event.step != state.step
        or (due.kind, due.microbatch)
        != (
            event.kind,
            event.microbatch,
        )
    ):
        raise ProtocolError(f"the body answered {event}; next is {due} of step {state.step}")
    turn.set(completed=state.completed + 1)
    microbatch = event.microbatch
    if event.kind is OpKind.FORWARD:
        cross(turn, "forward", microbatch, None)
    elif microbatch < state.microbatches - 1:
        cross(turn, "backward", microbatch, None)  # the last one waits for its parts


def _on_step_finished(turn: MemberTurn, event: ev.StepFinished) -> None:
    state = turn.state
    if not state.is_at_work:
        return
    all_done = state.is_finishing and state.completed == len(state.granted.ops)
    if event.step != state.step or not all_done or state.is_full:
        raise ProtocolError(f"the body answered StepFinished({event.step}) in step {state.step}")
    own = Parts(is_finite=event.is_finite, has_weight=event.has_weight)
    turn.set(is_full=True, parts=state.parts.plus(own))
    cross(turn, "backward", state.microbatches - 1, turn.state.parts)
    if state.is_last:
        if state.recovers:
            entry = StepValues(step=state.step, values=event.values)
            turn.set(losses=(*(e for e in state.losses if e.step != state.step), entry))
        turn.tell(msg.Loss(**turn.of_epoch, step=state.step, values=event.values))
    if state.phase is Phase.CATCHING_UP and state.verdict_of(state.step) is not None:
        take_known_verdict(turn)


def take_known_verdict(turn: MemberTurn) -> None:
    """Catching up, full, the verdict known: applies; the next step is replayed, or this was it."""
    state = turn.state
    verdict = state.verdict_of(state.step)
    assert verdict is not None
    turn.do(ev.Apply(step=state.step, verdict=verdict))
    turn.set(
        step=state.step + 1,
        data_ready=tuple(step for step in state.data_ready if step > state.step),
        **FRESH_STEP,
    )
    if turn.state.is_catching_up:
        turn.set(tied_due=lent_here(state))
    request_data(turn)
    ask_logs(turn)
    advance(turn)


def _on_reduced(turn: MemberTurn, event: ev.Reduced) -> None:
    state = turn.state
    if not state.is_at_work:
        return
    if state.phase is Phase.FENCED:
        return  # too late to be the commit; the decision speaks next
    if event.step != state.step or state.stage != 0 or not state.is_full:
        raise ProtocolError(f"the body answered Reduced({event.step}) in step {state.step}")
    # R1: stage 0's own last backward is done and all that rides up was part of its input.
    parts = state.parts.plus(Parts(is_finite=event.is_finite))
    halts = not parts.is_finite and state.granted.on_nonfinite is NonFinitePolicy.HALT
    verdict = Verdict(is_finite=parts.is_finite, skip=halts or not parts.has_weight)
    if state.phase is Phase.CATCHING_UP:
        # Nobody knew it. All who wait must get the same one, so it is journalled before it counts.
        made = msg.VerdictMade(**turn.of_epoch, step=state.step, verdict=verdict)
        turn.tell(made, "control", Slot(kind="verdict", step=state.step))
        return
    marks = set(state.marks_asked)
    if halts:
        marks = {Mark.SNAPSHOT, Mark.STOP}  # keep the state from before the bad step
    else:
        marks |= _marks_due(state)
    turn.set(marks_asked=())
    ordered = tuple(mark for mark in Mark if mark in marks)
    _take_commit(turn, msg.Commit(**turn.of_epoch, step=state.step, verdict=verdict, marks=ordered))


def _marks_due(state: MemberState) -> set[Mark]:
    """What rides in the Commit of this step without being asked for: known since Resume."""
    due: set[Mark] = set()
    version = state.step + 1
    if version == state.steps:
        due.add(Mark.FINISH)  # outweighs a stop
    plan = state.granted.evaluation
    stops = Mark.STOP in state.marks_asked and Mark.FINISH not in due  # soon: no evaluation first
    if plan is not None and plan.is_due(version, state.steps) and not stops:
        due.add(Mark.EVALUATE)
        if plan.keeps_state:
            due.add(Mark.SNAPSHOT)
    return due


def _take_commit(turn: MemberTurn, commit: msg.Commit) -> None:
    """Passes the commit on, applies, turns to the next step (R2)."""
    state = turn.state
    if state.downstream:
        turn.pass_on(state.downstream, commit, Slot(kind="verdict", step=commit.step))
    if state.stage == 0:
        done = msg.Done(
            **turn.of_epoch, step=commit.step, verdict=commit.verdict, marks=commit.marks
        )
        turn.tell(done)
    turn.do(ev.Apply(step=commit.step, verdict=commit.verdict))
    verdicts = (*state.verdicts, StepVerdict(step=commit.step, verdict=commit.verdict))
    turn.set(
        step=commit.step + 1,
        verdicts=verdicts if state.recovers else verdicts[-2:],
        tied_due=lent_here(state),
        data_ready=tuple(step for step in state.data_ready if step > commit.step),
        **FRESH_STEP,
    )
    carry_out_marks(turn, commit.step + 1, commit.marks)
    if turn.state.ending is None:
        request_data(turn)
    advance(turn)


def carry_out_marks(turn: MemberTurn, version: int, marks: tuple[Mark, ...]) -> None:
    """What every stage does at the same version (R4): after its Apply was issued, before any op."""
    state = turn.state
    to_disk = Mark.SNAPSHOT in marks or Mark.FINISH in marks
    if to_disk:
        turn.set(shards_due=(*state.shards_due, version))
    if Mark.WAVE in marks:
        turn.set(waves_due=(*state.waves_due, version))
    if to_disk or Mark.WAVE in marks:
        turn.do(ev.Snapshot(version=version, layer=state.layers.start))
    ending = next((mark for mark in (Mark.FINISH, Mark.STOP) if mark in marks), None)
    turn.set(ending=ending)
    if Mark.EVALUATE in marks:
        begin_evaluation(turn, version)


def lent_here(state: MemberState) -> tuple[int, ...]:
    """Lending layers whose new values come to this stage, for itself or stages below."""
    due = []
    for tie in state.granted.ties:
        owner, borrowers = tie.stages(state.plan)
        if borrowers and owner < state.stage <= borrowers[-1]:
            due.append(tie.owner_layer)
    return tuple(due)


def _on_applied(turn: MemberTurn, event: ev.Applied) -> None:
    state = turn.state
    if not state.is_at_work:
        return
    if event.step != state.version or state.step != state.version + 1:
        raise ProtocolError(f"the body answered Applied({event.step}) at version {state.version}")
    turn.set(version=event.step + 1)
    _lend_own(turn, event.step)
    if state.phase is Phase.CATCHING_UP:
        return
    if state.ending is Mark.STOP and state.phase is Phase.RUN:
        turn.set(phase=Phase.STOPPED)
        if state.recovers:
            beat(turn)  # a change of plan may wait for it


def _lend_own(turn: MemberTurn, step: int) -> None:
    """Before any F of the next step leaves here, so the channel keeps them in order."""
    state = turn.state
    for tie in state.granted.ties:
        owner, borrowers = tie.stages(state.plan)
        if owner == state.stage and borrowers:
            lend(turn, step, tie.owner_layer)


def _on_tied_lent(turn: MemberTurn, event: ev.TiedLent) -> None:
    if turn.state.is_at_work:
        _lend_own(turn, event.step)


def request_data(turn: MemberTurn) -> None:
    state = turn.state
    if state.stage != 0 and not state.is_last:
        return
    last = state.granted.base if state.phase is Phase.CATCHING_UP else state.steps
    upto = min(state.step + PREFETCH_STEPS, last)
    for step in range(state.data_requested, upto):
        turn.do(ev.RequestData(step=step))
    turn.set(data_requested=max(upto, state.data_requested))


def _on_data_ready(turn: MemberTurn, event: ev.DataReady) -> None:
    state = turn.state
    if state.phase not in (Phase.RUN, Phase.CATCHING_UP) or event.step < state.step:
        return
    if event.step >= state.data_requested or event.step in state.data_ready:
        raise ProtocolError(f"the body answered DataReady({event.step}), which was not asked")
    turn.set(data_ready=(*state.data_ready, event.step))
    advance(turn)


def _then_advance(
    handler: Callable[[MemberTurn, Any], None],
) -> Callable[[MemberTurn, Any], None]:
    def both(turn: MemberTurn, item: Any) -> None:
        handler(turn, item)
        advance(turn)

    return both


ON_PIPELINE: dict[type, Callable[[MemberTurn, Any], None]] = {
    msg.Forward: _on_forward,
    msg.Backward: _on_backward,
    msg.Commit: _on_commit,
    msg.Tied: _on_tied,
    msg.EvalForward: _then_advance(on_eval_forward),
    msg.EvalTaken: _then_advance(on_eval_taken),
}

STEP_HANDLERS: dict[type, Callable[[MemberTurn, Any], None]] = {
    ev.DataReady: _on_data_ready,
    ev.OpDone: _on_op_done,
    ev.StepFinished: _on_step_finished,
    ev.Reduced: _on_reduced,
    ev.Applied: _on_applied,
    ev.Snapshotted: on_snapshotted,
    ev.TiedLent: _on_tied_lent,
    ev.EvalDataReady: _then_advance(on_eval_data_ready),
    ev.EvalDone: on_eval_done,
    ev.EvaluationFinished: on_evaluation_finished,
}
