"""Evaluation in the member machine: forward passes between a Commit and the next step's first op.

The evaluate mark of Commit(t) makes every stage run `eval_forward` on version t+1, microbatch after
microbatch, before anything of step t+1. Channels and the compute queue keep the order, so nobody
waits for the end: a stage that is through goes on with training. Nothing of the training state is
touched. A stage is at most `EVAL_AHEAD` microbatches ahead of the one below (EvalTaken), so that a
slow device is not buried under activations. Knows nothing of the training ops.
"""

from __future__ import annotations

from ..errors import ProtocolError
from . import member_events as ev
from . import messages as msg
from .common import Slot
from .member_state import MemberState, Phase
from .member_turn import NO_EVALUATION, MemberTurn

AT_WORK = (Phase.RUN, Phase.STOPPED, Phase.FINISHED)
EVAL_AHEAD = 4
"""EvalForwards sent and not yet taken, at each cut; rows requested ahead."""


def begin_evaluation(turn: MemberTurn, version: int) -> None:
    """After Apply (and Snapshot) were issued: the evaluation of the new version stands next."""
    state = turn.state
    count = state.eval_microbatches
    if not count:
        raise ProtocolError("Commit(evaluate), but Install brought no evaluation")
    if state.eval_version is not None and state.eval_done < count:
        raise ProtocolError(
            f"Commit(evaluate) for version {version} while {state.eval_done} of {count}"
            f" microbatches of version {state.eval_version} are done"
        )
    turn.set(**{**NO_EVALUATION, "eval_version": version})


def advance_evaluation(turn: MemberTurn) -> bool:
    """Issues what can be; True when nothing of an evaluation is left to issue."""
    state = turn.state
    if state.phase not in AT_WORK or state.eval_version is None:
        return True
    count, version = state.eval_microbatches, state.eval_version
    if state.eval_issued == count:
        return True
    _request_rows(turn)
    issued = state.eval_issued
    while issued < count and _has_inputs(state, issued):
        turn.do(ev.EvalCompute(version=version, microbatch=issued))
        issued += 1
    left = tuple(microbatch for microbatch in state.eval_ready if microbatch >= issued)
    turn.set(eval_issued=issued, eval_ready=left)
    _request_rows(turn)
    if issued == count and state.is_last:
        turn.do(ev.FinishEvaluation(version=version))
    return issued == count


def _has_inputs(state: MemberState, microbatch: int) -> bool:
    if state.downstream and microbatch - state.eval_taken >= EVAL_AHEAD:
        return False
    if (state.stage == 0 or state.is_last) and microbatch not in state.eval_ready:
        return False
    return state.stage == 0 or microbatch < state.eval_arrived


def _request_rows(turn: MemberTurn) -> None:
    state = turn.state
    if state.eval_version is None or (state.stage != 0 and not state.is_last):
        return
    upto = min(state.eval_issued + EVAL_AHEAD, state.eval_microbatches)
    for microbatch in range(state.eval_requested, upto):
        turn.do(ev.RequestEvalData(version=state.eval_version, microbatch=microbatch))
    turn.set(eval_requested=max(upto, state.eval_requested))


def on_eval_forward(turn: MemberTurn, message: msg.EvalForward) -> None:
    """Upstream's activation: in order, not too many, of this very version."""
    state = turn.state
    name = f"EvalForward {message.microbatch} at version {message.version}"
    waiting = state.eval_arrived - state.eval_done
    if (
        message.version != state.eval_version
        or message.microbatch != state.eval_arrived
        or message.microbatch >= state.eval_microbatches
        or message.cut != state.layers.start
        or waiting >= EVAL_AHEAD
    ):
        raise ProtocolError(
            f"stage {state.stage} got {name} at cut {message.cut}; it evaluates version"
            f" {state.eval_version} with {state.eval_arrived} of {state.eval_microbatches}"
            f" microbatches here, {waiting} of them waiting, at cut {state.layers.start}"
        )
    turn.set(eval_arrived=state.eval_arrived + 1)
    slot = Slot(kind="eval_x", step=message.version, microbatch=message.microbatch)
    turn.do(ev.Keep(slots=(slot,)))


def on_eval_taken(turn: MemberTurn, message: msg.EvalTaken) -> None:
    """Downstream is done with one: one more may go."""
    state = turn.state
    if (
        message.version != state.eval_version
        or message.microbatch != state.eval_taken
        or message.microbatch >= state.eval_done
        or message.cut != state.layers.stop
    ):
        raise ProtocolError(
            f"stage {state.stage} got EvalTaken {message.microbatch} at version {message.version},"
            f" cut {message.cut}; it sent {state.eval_done} of version {state.eval_version}, of"
            f" which {state.eval_taken} were taken"
        )
    turn.set(eval_taken=state.eval_taken + 1)


def on_eval_data_ready(turn: MemberTurn, event: ev.EvalDataReady) -> None:
    """The rows of a microbatch are here."""
    state = turn.state
    if not _is_at_work(state, event.version):
        return
    asked = range(state.eval_issued, state.eval_requested)
    if event.microbatch not in asked or event.microbatch in state.eval_ready:
        raise ProtocolError(f"the body answered {event}, which was not asked")
    turn.set(eval_ready=(*state.eval_ready, event.microbatch))


def on_eval_done(turn: MemberTurn, event: ev.EvalDone) -> None:
    """Sends the activation on, and tells upstream that its own was taken."""
    state = turn.state
    if not _is_at_work(state, event.version):
        return
    microbatch = event.microbatch
    if microbatch != state.eval_done or microbatch >= state.eval_issued:
        raise ProtocolError(f"the body answered {event}; next is {state.eval_done}")
    turn.set(eval_done=microbatch + 1)
    of = {**turn.of_epoch, "version": event.version, "microbatch": microbatch}
    if state.downstream:
        slot = Slot(kind="eval_y", step=event.version, microbatch=microbatch)
        turn.pass_on(state.downstream, msg.EvalForward(**of, cut=state.layers.stop), slot)
    if state.upstream:
        turn.pass_on(state.upstream, msg.EvalTaken(**of, cut=state.layers.start))


def on_evaluation_finished(turn: MemberTurn, event: ev.EvaluationFinished) -> None:
    """The last stage tells the coordinator."""
    state = turn.state
    if not _is_at_work(state, event.version):
        return
    if not state.is_last or state.eval_done != state.eval_microbatches:
        raise ProtocolError(f"the body answered {event} after {state.eval_done} microbatches")
    turn.tell(msg.Evaluated(**turn.of_epoch, version=event.version, values=event.values))


def _is_at_work(state: MemberState, version: int) -> bool:
    """False: an answer that nobody needs any more."""
    at_work = state.phase in AT_WORK
    if at_work and version != state.eval_version:
        raise ProtocolError(
            f"the body answered for the evaluation at version {version}; at work is"
            f" {state.eval_version}"
        )
    return at_work
