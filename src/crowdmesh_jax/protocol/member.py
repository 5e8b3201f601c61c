"""The member machine: what one stage does on which message, and what it must never do.

`handle(state, event, now_s) -> (state, actions)` is pure: no clock, no sockets, no arrays. Rules
(R1-R7, T1-T3) and invariants (I1-I13) are numbered as in the protocol's description. What each
action demands of the body is said in `member_events`. Fencing and recovery will add messages and
phases to this machine; run, epoch, term, fence and versions are already carried and checked.

    idle --Install--> installing --Installed--> installed --Resume--> run --Commit(stop)--> stopped
                                                                        --Commit(finish)--> finished
    any --a broken rule, BodyFailed--> failed        any --Release, Halt--> idle

The commit point: stage 0's last backward of step t needs every later stage's last backward of t,
and that frame carries all that must ride up. So when stage 0 is done with t, every stage is
Full(t), and nobody still works on t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.crowd import DeviceId
from ..core.schedule import OpKind
from ..errors import ProtocolError, StaleEpochError
from . import member_events as ev
from . import messages as msg
from .common import Fault, Mark, NonFinitePolicy, Parts, Slot, Verdict
from .member_state import MemberState, Phase, StepVerdict, waiting_for

PREFETCH_STEPS = 2
"""Batches requested: of the step at work and the next."""


Result = tuple[MemberState, tuple[ev.MemberAction, ...]]


def handle(state: MemberState, event: ev.MemberEvent, now_s: float) -> Result:
    """What `event` does to a member, and what its body must do now.

    Never raises for what a peer or body did wrong: a neighbour or body that breaks a rule makes
    the member `Fail` (after telling the coordinator), a stranger is `Reject`ed, old epochs are
    dropped. After Fail the member stands still until Halt or Release.

    Args:
        now_s: Monotonic seconds of this device; only heartbeats depend on it.
    """
    turn = _Turn(state, now_s)
    try:
        _HANDLERS[type(event)](turn, event)
    except ProtocolError as exc:
        # The turn's own changes are dropped with it: state and actions start from what was.
        turn = _Turn(state, now_s)
        turn.fail(Fault.of(exc))
    return turn.state, tuple(turn.actions)


class _Turn:
    """One call of `handle`: the state as it becomes, the actions as they come."""

    __slots__ = ("actions", "now_s", "state")

    def __init__(self, state: MemberState, now_s: float) -> None:
        self.state = state
        self.now_s = now_s
        self.actions: list[ev.MemberAction] = []

    def set(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)

    def do(self, action: ev.MemberAction) -> None:
        self.actions.append(action)

    def tell(self, message: msg.Message, lane: Any = "control", *attach: Slot) -> None:
        """Sends to the coordinator."""
        to = self.state.coordinator
        self.do(ev.SendMessage(to=to, message=message, lane=lane, attach=attach))

    def pass_on(self, to: DeviceId, message: msg.PipelineMessage, *attach: Slot) -> None:
        self.do(ev.SendMessage(to=to, message=message, lane="pipeline", attach=attach))

    @property
    def of_epoch(self) -> dict[str, Any]:
        return {"run": self.state.run, "epoch": self.state.active}

    def fail(self, fault: Fault) -> None:
        if self.state.phase in (Phase.FAILED, Phase.IDLE):
            return
        self.set(phase=Phase.FAILED)
        self.tell(msg.Error(**self.of_epoch, fault=fault))
        self.do(ev.Fail(fault=fault))


# Messages ---------------------------------------------------------------------------------------


def _on_message(turn: _Turn, event: ev.MessageReceived) -> None:
    message, sender = event.message, event.sender
    if isinstance(message, msg.StaleEpoch):
        _on_told_stale(turn, message)
        return
    if isinstance(message, (msg.Forward, msg.Backward, msg.Commit, msg.Tied)):
        if _is_current(turn, sender, message):
            _on_pipeline(turn, sender, message)
        return
    if sender != turn.state.coordinator:
        _reject(turn, sender, message, f"only the coordinator ({turn.state.coordinator}) may")
        return
    if isinstance(message, msg.Install):
        _on_install(turn, message)
        return
    handler = _FROM_COORDINATOR.get(type(message))
    if handler is None:
        _reject(turn, sender, message, "no member takes that")
    elif _is_current(turn, sender, message):
        handler(turn, message)


def _reject(turn: _Turn, sender: str, message: msg.Message, why: str) -> None:
    what = type(message).__name__
    text = f"{turn.state.device} got {what} from {sender}, refused: {why}"
    turn.do(ev.Reject(sender=sender, fault=Fault(kind="ProtocolError", text=text)))


def _is_current(turn: _Turn, sender: str, message: Any) -> bool:
    """R7: the epoch is checked when the frame is processed. Old: dropped, and the sender told."""
    state = turn.state
    if state.phase in (Phase.IDLE, Phase.FAILED):
        if isinstance(message, (msg.Halt, msg.Release)) and message.run == state.run:
            return True
        turn.set(dropped=state.dropped + 1)  # an ended run's late frames
        return False
    if message.run == state.run and message.epoch == state.active:
        return True
    if message.run == state.run and message.epoch > state.active:
        raise ProtocolError(
            f"{type(message).__name__} from {sender} is of epoch {message.epoch},"
            f" {state.device} was granted {state.active}"
        )
    turn.set(dropped=state.dropped + 1)
    reply = msg.StaleEpoch(run=message.run, epoch=message.epoch, active=state.active)
    turn.do(ev.SendMessage(to=DeviceId(sender), message=reply, lane="control"))
    return False


def _on_told_stale(turn: _Turn, message: msg.StaleEpoch) -> None:
    """R8: someone has moved on without this member; it stops and (later) joins as a newcomer."""
    state = turn.state
    current = message.run == state.run and message.epoch == state.active
    if current and message.active > state.active:
        error = StaleEpochError(
            f"{state.device} is of epoch {state.active}, its peers are in epoch {message.active}"
        )
        turn.fail(Fault.of(error))


def _on_install(turn: _Turn, install: msg.Install) -> None:
    state = turn.state
    new_run = install.run != state.run
    if new_run and state.phase is not Phase.IDLE:
        why = f"it holds a stage of run {state.run!r} ({state.phase.value}); Release comes first"
        _reject(turn, state.coordinator, install, why)
        return
    term, fence = (0, 0) if new_run else (state.term, state.fence)
    if (
        install.term < term
        or install.epoch < fence
        or install.epoch <= (0 if new_run else state.active)
    ):
        turn.set(dropped=state.dropped + 1)
        reply = msg.StaleEpoch(run=install.run, epoch=install.epoch, active=state.active)
        turn.tell(reply)
        return
    try:
        _check_install(state.device, install)
    except ProtocolError as exc:
        turn.tell(msg.Error(run=install.run, epoch=install.epoch, fault=Fault.of(exc)))
        return
    turn.set(
        phase=Phase.INSTALLING,
        run=install.run,
        term=install.term,
        fence=install.epoch,
        active=install.epoch,
        install=install,
        steps=0,
        version=install.base,
        step=install.base,
        verdicts=(),
        marks_asked=(),
        ending=None,
        tied_due=(),
        data_requested=install.base,
        data_ready=(),
        heartbeat_s=turn.now_s,
        **_FRESH_STEP,
    )
    slot = Slot(kind="install", step=install.base, layer=turn.state.layers.start)
    turn.do(ev.Keep(slots=(slot,)))
    turn.do(ev.LoadStage(install=install))


_FRESH_STEP: dict[str, Any] = {
    "issued": 0,
    "completed": 0,
    "arrived_x": (),
    "arrived_dy": (),
    "is_finishing": False,
    "is_full": False,
    "parts": Parts(),
}


def _check_install(device: DeviceId, install: msg.Install) -> None:
    plan, stage = install.plan, install.stage
    if not 0 <= stage < len(plan.stages) or plan.stages[stage].device != device:
        raise ProtocolError(f"Install gives {device} stage {stage}; the plan does not")
    if install.base < 0:
        raise ProtocolError(f"Install from version {install.base}; versions start at 0")
    wanted = list(range(plan.microbatches))
    forwards = [op.microbatch for op in install.ops if op.kind is OpKind.FORWARD]
    backwards = [op.microbatch for op in install.ops if op.kind is OpKind.BACKWARD]
    if len(forwards) + len(backwards) != len(install.ops):
        raise ProtocolError(f"stage {stage}: its schedule has ops that are neither F nor B")
    if forwards != wanted or backwards != wanted:
        # Gradients and statistics are summed in microbatch order under every schedule.
        raise ProtocolError(
            f"stage {stage}: its schedule must run F and B of microbatches 0-{wanted[-1]} once"
            f" each, in order; it has F {forwards}, B {backwards}"
        )
    begun: set[int] = set()
    for op in install.ops:
        if op.kind is OpKind.FORWARD:
            begun.add(op.microbatch)
        elif op.microbatch not in begun:
            raise ProtocolError(f"stage {stage}: its schedule has B{op.microbatch} before its F")


def _on_measure(turn: _Turn, message: msg.Measure) -> None:
    _expect_phase(turn.state, message, Phase.INSTALLED)
    turn.do(ev.MeasureStage(repeats=message.repeats))


def _on_resume(turn: _Turn, message: msg.Resume) -> None:
    state = turn.state
    _expect_phase(state, message, Phase.INSTALLED)
    if message.steps <= state.version:
        raise ProtocolError(f"Resume to version {message.steps} from version {state.version}")
    turn.set(phase=Phase.RUN, steps=message.steps)
    _request_data(turn)
    _advance(turn)


def _on_ask_marks(turn: _Turn, message: msg.AskMarks) -> None:
    state = turn.state
    if state.stage != 0:
        raise ProtocolError(f"AskMarks is for stage 0; {state.device} has stage {state.stage}")
    if Mark.FINISH in message.marks:
        raise ProtocolError("AskMarks(finish): the last step is set by Resume")
    asked = {*state.marks_asked, *message.marks}
    turn.set(marks_asked=tuple(mark for mark in Mark if mark in asked))


def _on_release(turn: _Turn, message: msg.Release) -> None:
    _unload(turn, None)


def _on_halt(turn: _Turn, message: msg.Halt) -> None:
    _unload(turn, message.fault)


def _unload(turn: _Turn, fault: Fault | None) -> None:
    if turn.state.phase is Phase.IDLE:
        return
    turn.set(phase=Phase.IDLE, install=None)  # run, term, fence, active: what is over stays known
    turn.do(ev.Unload(fault=fault))


def _expect_phase(state: MemberState, message: Any, *phases: Phase) -> None:
    if state.phase not in phases:
        what = type(message).__name__
        raise ProtocolError(f"{state.device} got {what} while {state.phase.value}")


# Pipeline frames --------------------------------------------------------------------------------


def _on_pipeline(turn: _Turn, sender: str, message: msg.PipelineMessage) -> None:
    state = turn.state
    upward = isinstance(message, msg.Backward)
    neighbour = state.downstream if upward else state.upstream
    if sender != neighbour:
        side = "downstream" if upward else "upstream"
        _reject(turn, sender, message, f"stage {state.stage}'s {side} neighbour is {neighbour}")
        return
    # A neighbour may have got its Resume first: frames are kept (bounded by M) while installed.
    _expect_phase(state, message, Phase.INSTALLED, Phase.RUN, Phase.STOPPED, Phase.FINISHED)
    _ON_PIPELINE[type(message)](turn, message)


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


def _on_forward(turn: _Turn, message: msg.Forward) -> None:
    state = turn.state
    _check_frame(state, message, state.layers.start)
    if message.microbatch in state.arrived_x:
        raise ProtocolError(f"Forward {message.microbatch} of step {message.step} came twice")
    turn.set(arrived_x=(*state.arrived_x, message.microbatch))
    slot = Slot(kind="x", step=message.step, microbatch=message.microbatch)
    turn.do(ev.Keep(slots=(slot,)))
    _advance(turn)


def _on_backward(turn: _Turn, message: msg.Backward) -> None:
    state = turn.state
    microbatch = message.microbatch
    _check_frame(state, message, state.layers.stop)
    name = f"Backward {microbatch} of step {message.step}"
    done = state.granted.ops[: state.completed]
    if not any(op.kind is OpKind.FORWARD and op.microbatch == microbatch for op in done):
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
    _advance(turn)


def _on_commit(turn: _Turn, message: msg.Commit) -> None:
    state = turn.state
    if message.step != state.step or not state.is_full or state.ending is not None:  # T1
        raise ProtocolError(
            f"stage {state.stage} got Commit of step {message.step} at version {state.step},"
            f" {'full' if state.is_full else 'not full'}"
        )
    turn.do(ev.Keep(slots=(Slot(kind="verdict", step=message.step),)))
    _take_commit(turn, message)


def _on_tied(turn: _Turn, message: msg.Tied) -> None:
    state = turn.state
    if message.step != state.step - 1 or message.layer not in state.tied_due:
        raise ProtocolError(
            f"stage {state.stage} at version {state.step} expects no Tied of step {message.step},"
            f" layer {message.layer}"
        )
    slot = Slot(kind="tied", step=message.step, layer=message.layer)
    turn.do(ev.Keep(slots=(slot,)))
    tie = next(tie for tie in state.granted.ties if tie.owner_layer == message.layer)
    _, borrowers = tie.stages(state.plan)
    if state.downstream and borrowers[-1] > state.stage:
        turn.pass_on(state.downstream, message, slot)
    if state.stage in borrowers:
        turn.do(ev.Adopt(step=message.step, layer=message.layer))
    turn.set(tied_due=tuple(layer for layer in state.tied_due if layer != message.layer))
    _advance(turn)


# The step ---------------------------------------------------------------------------------------


def _advance(turn: _Turn) -> None:
    """Issues every op whose turn and inputs have come, ahead of the compute queue."""
    state = turn.state
    if state.phase is not Phase.RUN or state.ending is not None or state.is_finishing:
        return
    if state.tied_due:
        return  # borrowed leaves are still of the version before
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
        if state.stage == 0:
            turn.do(ev.Reduce(step=state.step))


def _has_inputs(state: MemberState, kind: OpKind, microbatch: int) -> bool:
    if kind is OpKind.FORWARD:
        return state.step in state.data_ready if state.stage == 0 else microbatch in state.arrived_x
    # The last stage's loss needs the weights of the whole step, so all its targets.
    return state.step in state.data_ready if state.is_last else microbatch in state.arrived_dy


def _on_op_done(turn: _Turn, event: ev.OpDone) -> None:
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
    if event.kind is OpKind.FORWARD and state.downstream:
        message = msg.Forward(
            **turn.of_epoch, step=state.step, microbatch=microbatch, cut=state.layers.stop
        )
        slot = Slot(kind="y", step=state.step, microbatch=microbatch)
        turn.pass_on(state.downstream, message, slot)
    if event.kind is OpKind.BACKWARD and microbatch < state.microbatches - 1:
        _send_backward(turn, microbatch, None)  # the last one waits for its parts


def _send_backward(turn: _Turn, microbatch: int, parts: Parts | None) -> None:
    state = turn.state
    if state.upstream is None:
        return
    message = msg.Backward(
        **turn.of_epoch,
        step=state.step,
        microbatch=microbatch,
        cut=state.layers.start,
        parts=parts,
    )
    slots = [Slot(kind="dx", step=state.step, microbatch=microbatch)]
    if parts is not None:
        slots.append(Slot(kind="parts", step=state.step))
    turn.pass_on(state.upstream, message, *slots)


def _on_step_finished(turn: _Turn, event: ev.StepFinished) -> None:
    state = turn.state
    if not state.is_at_work:
        return
    all_done = state.is_finishing and state.completed == len(state.granted.ops)
    if event.step != state.step or not all_done or state.is_full:
        raise ProtocolError(f"the body answered StepFinished({event.step}) in step {state.step}")
    own = Parts(is_finite=event.is_finite, has_weight=event.has_weight)
    turn.set(is_full=True, parts=state.parts.plus(own))
    _send_backward(turn, state.microbatches - 1, turn.state.parts)
    if state.is_last:
        turn.tell(msg.Loss(**turn.of_epoch, step=state.step, values=event.values))


def _on_reduced(turn: _Turn, event: ev.Reduced) -> None:
    state = turn.state
    if not state.is_at_work:
        return
    if event.step != state.step or state.stage != 0 or not state.is_full:
        raise ProtocolError(f"the body answered Reduced({event.step}) in step {state.step}")
    # R1: stage 0's own last backward is done and all that rides up was part of its input.
    parts = state.parts.plus(Parts(is_finite=event.is_finite))
    halts = not parts.is_finite and state.granted.on_nonfinite is NonFinitePolicy.HALT
    verdict = Verdict(is_finite=parts.is_finite, skip=halts or not parts.has_weight)
    marks = set(state.marks_asked)
    if halts:
        marks = {Mark.SNAPSHOT, Mark.STOP}  # keep the state from before the bad step
    elif state.step + 1 == state.steps:
        marks = {*marks, Mark.FINISH} - {Mark.STOP}
    turn.set(marks_asked=())
    ordered = tuple(mark for mark in Mark if mark in marks)
    _take_commit(turn, msg.Commit(**turn.of_epoch, step=state.step, verdict=verdict, marks=ordered))


def _take_commit(turn: _Turn, commit: msg.Commit) -> None:
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
    marks = commit.marks
    if Mark.SNAPSHOT in marks or Mark.FINISH in marks:
        turn.do(ev.Snapshot(version=commit.step + 1, layer=state.layers.start))
    ending = next((mark for mark in (Mark.FINISH, Mark.STOP) if mark in marks), None)
    verdicts = (*state.verdicts, StepVerdict(step=commit.step, verdict=commit.verdict))[-2:]
    turn.set(
        step=commit.step + 1,
        verdicts=verdicts,
        ending=ending,
        tied_due=_tied_passing(state),
        data_ready=tuple(step for step in state.data_ready if step > commit.step),
        **_FRESH_STEP,
    )
    if ending is None:
        _request_data(turn)
        _advance(turn)


def _tied_passing(state: MemberState) -> tuple[int, ...]:
    """Lending layers whose new values come to this stage, for itself or stages below."""
    due = []
    for tie in state.granted.ties:
        owner, borrowers = tie.stages(state.plan)
        if borrowers and owner < state.stage <= borrowers[-1]:
            due.append(tie.owner_layer)
    return tuple(due)


def _on_applied(turn: _Turn, event: ev.Applied) -> None:
    state = turn.state
    if not state.is_at_work:
        return
    if event.step != state.version or state.step != state.version + 1:
        raise ProtocolError(f"the body answered Applied({event.step}) at version {state.version}")
    turn.set(version=state.step)
    for tie in state.granted.ties:
        owner, borrowers = tie.stages(state.plan)
        if owner == state.stage and borrowers and state.downstream:
            # Before any F of the next step leaves here, so the channel keeps them in order.
            slot = Slot(kind="tied", step=event.step, layer=tie.owner_layer)
            message = msg.Tied(**turn.of_epoch, step=event.step, layer=tie.owner_layer)
            turn.pass_on(state.downstream, message, slot)
    if state.ending is Mark.STOP:
        turn.set(phase=Phase.STOPPED)


def _on_snapshotted(turn: _Turn, event: ev.Snapshotted) -> None:
    state = turn.state
    if not state.is_at_work:
        return
    if event.version != state.version:
        raise ProtocolError(f"the body answered {event} at version {state.version}")
    is_final = state.ending is Mark.FINISH and event.version == state.steps
    layers = state.layers
    shard = msg.StageState(
        **turn.of_epoch,
        version=event.version,
        first_layer=layers.start,
        last_layer=layers.stop - 1,
        is_final=is_final,
    )
    turn.tell(shard, "bulk", Slot(kind="state", step=event.version, layer=layers.start))
    if is_final:
        turn.set(phase=Phase.FINISHED)  # stays until the coordinator has the result: Release


# The rest ---------------------------------------------------------------------------------------


def _request_data(turn: _Turn) -> None:
    state = turn.state
    if state.stage != 0 and not state.is_last:
        return
    upto = min(state.step + PREFETCH_STEPS, state.steps)
    for step in range(state.data_requested, upto):
        turn.do(ev.RequestData(step=step))
    turn.set(data_requested=max(upto, state.data_requested))


def _on_data_ready(turn: _Turn, event: ev.DataReady) -> None:
    state = turn.state
    if state.phase is not Phase.RUN or event.step < state.step:
        return
    if event.step >= state.data_requested or event.step in state.data_ready:
        raise ProtocolError(f"the body answered DataReady({event.step}), which was not asked")
    turn.set(data_ready=(*state.data_ready, event.step))
    _advance(turn)


def _on_installed(turn: _Turn, event: ev.Installed) -> None:
    if turn.state.phase is Phase.INSTALLING:
        turn.set(phase=Phase.INSTALLED)
        turn.tell(msg.Ready(**turn.of_epoch))


def _on_stage_measured(turn: _Turn, event: ev.StageMeasured) -> None:
    if turn.state.phase is Phase.INSTALLED:
        turn.tell(msg.Measured(**turn.of_epoch, seconds=event.seconds))


def _on_peer_lost(turn: _Turn, event: ev.PeerLost) -> None:
    """A neighbour is gone: say so, keep everything, wait. Without a coordinator: train on."""
    state = turn.state
    if state.phase not in (Phase.INSTALLING, Phase.INSTALLED, Phase.RUN):
        return
    if event.device in (state.upstream, state.downstream):
        turn.tell(msg.Suspect(**turn.of_epoch, device=event.device, reason=event.reason))


def _on_body_failed(turn: _Turn, event: ev.BodyFailed) -> None:
    turn.fail(event.fault)


def _on_tick(turn: _Turn, event: ev.Tick) -> None:
    state = turn.state
    if state.phase in (Phase.IDLE, Phase.FAILED) or state.install is None:
        return
    if turn.now_s - state.heartbeat_s < state.install.heartbeat_s:
        return
    turn.set(heartbeat_s=turn.now_s)
    beat = msg.Heartbeat(
        **turn.of_epoch,
        phase=state.phase.value,
        version=state.version,
        completed_ops=state.completed,
        waiting=waiting_for(state),
    )
    turn.tell(beat)


_FROM_COORDINATOR: dict[type, Callable[[_Turn, Any], None]] = {
    msg.Measure: _on_measure,
    msg.Resume: _on_resume,
    msg.AskMarks: _on_ask_marks,
    msg.Release: _on_release,
    msg.Halt: _on_halt,
}
_ON_PIPELINE: dict[type, Callable[[_Turn, Any], None]] = {
    msg.Forward: _on_forward,
    msg.Backward: _on_backward,
    msg.Commit: _on_commit,
    msg.Tied: _on_tied,
}
_HANDLERS: dict[type, Callable[[_Turn, Any], None]] = {
    ev.MessageReceived: _on_message,
    ev.Installed: _on_installed,
    ev.StageMeasured: _on_stage_measured,
    ev.DataReady: _on_data_ready,
    ev.OpDone: _on_op_done,
    ev.StepFinished: _on_step_finished,
    ev.Reduced: _on_reduced,
    ev.Applied: _on_applied,
    ev.Snapshotted: _on_snapshotted,
    ev.PeerLost: _on_peer_lost,
    ev.BodyFailed: _on_body_failed,
    ev.Tick: _on_tick,
}
