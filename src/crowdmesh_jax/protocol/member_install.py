"""Installing in the member machine: the grant of an epoch, and the stage's way to Ready.

    Install --(copies fetched)--> LoadStage --Installed--> keep: Ready
                                                           apply: verdict known? Apply, Ready
                                                           restore below the base: replay, Ready

A replayed step is an ordinary step whose frames come from logs and whose verdict is known, so each
stage applies it by itself as soon as it is full. Only the last step's verdict may be unknown; then
stage 0 makes it from all parts, the coordinator journals it, and all who wait get the same.
"""

from __future__ import annotations

from ..core.crowd import DeviceId
from ..core.schedule import OpKind
from ..errors import ProtocolError
from . import member_events as ev
from . import messages as msg
from .common import Fault, Mark, Slot, StepVerdict
from .evidence import Source
from .member_copies import own_state_copy
from .member_logs import ask_logs, serve
from .member_state import MemberState, Phase
from .member_step import advance, carry_out_marks, lent_here, request_data, take_known_verdict
from .member_turn import FRESH_STEP, NO_EVALUATION, MemberTurn, expect_phase

# The grant --------------------------------------------------------------------------------------


def is_grantable(turn: MemberTurn, message: msg.Install | msg.Enlist) -> bool:
    """Whether the epoch may be granted here; if not, who asked is told why."""
    state = turn.state
    new_run = message.run != state.run
    if new_run and state.phase is not Phase.IDLE:
        # Said to who asks, under the run it asks for: it would wait out its deadline for Ready.
        text = (
            f"{state.device} was to install a stage of run {message.run!r}, but holds one of run"
            f" {state.run!r} ({state.phase.value}); Release or Halt of that run comes first"
        )
        fault = Fault(kind="ProtocolError", text=text)
        turn.answer(msg.Error(run=message.run, epoch=message.epoch, fault=fault))
        return False
    if not new_run:
        active, fence = state.active, state.fence
        is_promised = state.phase is Phase.FENCED and state.is_frozen and message.epoch == fence
        is_free = state.phase is Phase.IDLE and message.epoch > max(active, fence)
        if message.term < state.term or not (is_promised or is_free):
            turn.set(dropped=state.dropped + 1)
            reply = msg.StaleEpoch(run=message.run, epoch=message.epoch, active=active)
            turn.answer(reply)
            return False
    try:
        if isinstance(message, msg.Install):
            _check_install(state.device, message)
    except ProtocolError as exc:
        turn.answer(msg.Error(run=message.run, epoch=message.epoch, fault=Fault.of(exc)))
        return False
    return True


def on_install(turn: MemberTurn, install: msg.Install) -> None:
    if not is_grantable(turn, install):
        return
    state = turn.state
    base = install.base
    action = install.action
    if action != "restore":
        try:
            _check_held(state, install)
        except ProtocolError as exc:
            turn.answer(msg.Error(run=install.run, epoch=install.epoch, fault=Fault.of(exc)))
            return
    verdicts = tuple(entry for entry in state.verdicts if entry.step < base)
    is_full, parts = state.is_full or state.step == state.version + 1, state.parts
    _begin_epoch(turn, install)
    if action == "restore":
        _give_up_state(turn, state, base)
        version = base if install.state_version is None else install.state_version
        verdicts = ()
        turn.set(logs=(), losses=())
        if state.install is not None:
            turn.do(ev.Rewind(step=0, gradient=True))
    else:
        version = state.version
        turn.set(logs=tuple(entry for entry in state.logs if entry.step < base))
        turn.do(ev.Rewind(step=base, gradient=action == "keep"))
    for entry in install.verdicts:
        if all(known.step != entry.step for known in verdicts):
            verdicts = (*verdicts, entry)
    turn.set(
        install=install,
        enlisted=None,
        version=version,
        step=version,
        is_restoring=action == "restore",
        verdicts=tuple(sorted(verdicts, key=lambda entry: entry.step)),
        data_requested=version,
        **FRESH_STEP,
    )
    if action == "apply":
        ops = len(install.ops)
        turn.set(is_full=is_full, parts=parts, is_finishing=True, issued=ops, completed=ops)
    slots = [Slot(kind="install", step=version, layer=turn.state.layers.start)]
    slots += [Slot(kind="verdict", step=entry.step) for entry in install.verdicts]
    turn.do(ev.Keep(slots=tuple(slots)))
    _fetch(turn, install)
    if not turn.state.fetching:
        turn.do(ev.LoadStage(install=install))


def _begin_epoch(turn: MemberTurn, message: msg.Install | msg.Enlist) -> None:
    state = turn.state
    if message.run != state.run:
        turn.set(copies=(), floor=0)
    # This epoch starts at `base`: whatever is beyond is of a history that is over.
    beyond = tuple(copy for copy in turn.state.copies if copy.version > message.base)
    if beyond:
        turn.do(ev.DropCopies(copies=beyond))
    turn.set(
        phase=Phase.INSTALLING,
        run=message.run,
        term=message.term,
        fence=message.epoch,
        active=message.epoch,
        tag=message.epoch,
        steps=0,
        is_frozen=False,
        copies=tuple(copy for copy in turn.state.copies if copy.version <= message.base),
        fetching=(),
        asked_again=(),
        waves_due=(),
        shards_due=(),
        reassigned=None,
        deaf_to=(),
        marks_asked=(),
        ending=None,
        tied_due=(),
        data_ready=(),
        **NO_EVALUATION,
        heartbeat_s=turn.now_s,
    )


def _give_up_state(turn: MemberTurn, before: MemberState, base: int) -> None:
    """State that is replaced becomes a copy first: it may be the only one of its version."""
    copy = own_state_copy(before)
    if copy is None or copy.version > base:
        return
    if all(have.name != copy.name for have in turn.state.copies):
        turn.set(copies=(*turn.state.copies, copy))
        turn.do(ev.KeepState(copy=copy))


def _fetch(turn: MemberTurn, install: msg.Install) -> None:
    """Asks other devices for what is neither here nor in the frame."""
    state = turn.state
    held = {copy.name for copy in state.copies}
    away: tuple[Source, ...] = tuple(
        source
        for source in install.sources
        if source.device not in (state.device, state.coordinator) and source.copy.name not in held
    )
    turn.set(fetching=away)
    for source in away:
        turn.request(source.device, msg.Fetch(**turn.of_epoch, copy=source.copy))


def _check_held(state: MemberState, install: msg.Install) -> None:
    stage = install.plan.stages[install.stage]
    is_here = (
        state.install is not None
        and state.layers == stage.layers
        and not state.is_restoring
        and install.run == state.run
    )
    wanted = install.base - (install.action == "apply")
    is_full = state.is_full or state.step == state.version + 1
    if not is_here or state.version != wanted or (install.action == "apply" and not is_full):
        raise ProtocolError(
            f"{state.device} is to {install.action} layers {stage.first_layer}-{stage.last_layer}"
            f" to start at version {install.base}, which is not what it holds"
        )


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


def on_enlist(turn: MemberTurn, message: msg.Enlist) -> None:
    """The grant to a holder or spare: nothing to load."""
    if not is_grantable(turn, message):
        return
    before = turn.state
    _begin_epoch(turn, message)
    if before.install is not None:
        _give_up_state(turn, before, message.base)
        turn.do(ev.Rewind(step=0, gradient=True))
    turn.set(
        install=None,
        enlisted=message,
        phase=Phase.INSTALLED,
        logs=(),
        verdicts=(),
        losses=(),
        is_restoring=False,
        version=0,
        step=0,
        **FRESH_STEP,
    )
    turn.tell(msg.Ready(**turn.of_epoch))


# From loaded to ready ---------------------------------------------------------------------------


def on_copy_fetched(turn: MemberTurn) -> None:
    """All copies are here."""
    if turn.state.phase is Phase.INSTALLING and turn.state.install is not None:
        turn.do(ev.LoadStage(install=turn.state.install))


def on_installed(turn: MemberTurn, event: ev.Installed) -> None:
    state = turn.state
    if state.phase is not Phase.INSTALLING:
        return
    install = state.granted
    if state.version == install.base:
        _tell_manifests_verdict(turn)
        _get_ready(turn)
        return
    turn.set(phase=Phase.CATCHING_UP)
    if state.is_restoring:
        turn.set(tied_due=lent_here(state))
        _lend_own_again(turn)
        request_data(turn)
        ask_logs(turn)
        advance(turn)
    elif state.verdict_of(state.step) is not None:
        take_known_verdict(turn)
    elif state.stage == 0:
        turn.do(ev.Reduce(step=state.step))
    serve(turn)


def _tell_manifests_verdict(turn: MemberTurn) -> None:
    """A copy may bring the verdict of the step before it, which others wait for."""
    state = turn.state
    install = state.granted
    if install.action != "restore" or state.verdict_of(state.version - 1) is not None:
        return
    verdict = next((s.copy.verdict for s in install.sources if s.copy.verdict is not None), None)
    if verdict is None or all(source.device == state.coordinator for source in install.sources):
        return
    entry = StepVerdict(step=state.version - 1, verdict=verdict)
    turn.set(verdicts=(*state.verdicts, entry))
    made = msg.VerdictMade(**turn.of_epoch, step=entry.step, verdict=verdict)
    turn.tell(made, "control", Slot(kind="verdict", step=entry.step))


def _get_ready(turn: MemberTurn) -> None:
    turn.set(phase=Phase.INSTALLED, is_restoring=False)
    if turn.state.granted.resend_ties:
        turn.set(tied_due=lent_here(turn.state))  # an owner may hear Resume before this stage does
    turn.tell(msg.Ready(**turn.of_epoch))
    serve(turn)


def on_caught_up(turn: MemberTurn) -> None:
    """Applied while catching up: on to the next step, or Ready."""
    if turn.state.version == turn.state.granted.base:
        _get_ready(turn)


def on_verdict_known(turn: MemberTurn, message: msg.VerdictKnown) -> None:
    """The verdict of the last step before `base`, the same for all who wait for it."""
    state = turn.state
    slot = Slot(kind="verdict", step=message.step)
    if state.install is None or state.verdict_of(message.step) is not None:
        return
    expect_phase(state, message, Phase.INSTALLING, Phase.CATCHING_UP, Phase.INSTALLED)
    turn.do(ev.Keep(slots=(slot,)))
    entry = StepVerdict(step=message.step, verdict=message.verdict)
    turn.set(verdicts=(*state.verdicts, entry))
    is_waiting = state.phase is Phase.CATCHING_UP and state.is_full and state.step == message.step
    if is_waiting:
        take_known_verdict(turn)


def on_resume(turn: MemberTurn, message: msg.Resume) -> None:
    state = turn.state
    expect_phase(state, message, Phase.INSTALLED)
    if state.install is None:
        turn.set(phase=Phase.RUN, steps=message.steps)
        return
    ends = {Mark.FINISH, Mark.STOP} & set(message.marks)
    if message.steps < state.version or (message.steps == state.version and not ends):
        raise ProtocolError(f"Resume to version {message.steps} from version {state.version}")
    turn.set(phase=Phase.RUN, steps=message.steps, log_asks=())
    if state.granted.resend_ties:
        _lend_own_again(turn)
    carry_out_marks(turn, state.version, message.marks)
    if turn.state.ending is Mark.STOP:
        turn.set(phase=Phase.STOPPED)
    if turn.state.ending is None:
        request_data(turn)
    advance(turn)


def _lend_own_again(turn: MemberTurn) -> None:
    """What this stage lends goes down once more: copies have no borrowed leaves."""
    state = turn.state
    if any(tie.stages(state.plan)[0] == state.stage for tie in state.granted.ties):
        turn.do(ev.LendTied(step=state.version - 1))
