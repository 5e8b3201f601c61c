"""How a run begins, in the coordinator machine: who is here, the first Install, timing, Resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..core.crowd import DeviceId
from ..errors import ProtocolError
from . import coordinator_events as ev
from . import messages as msg
from . import records
from .coordinator_install import send_installs
from .coordinator_recovery import open_epoch, resume
from .coordinator_requests import ask_stop
from .coordinator_restart import on_hello_attaching
from .coordinator_state import MemberInfo, Phase, Wait
from .coordinator_turn import RunTurn, expect_phase, halt_lost
from .evidence import Base


def on_start(turn: RunTurn, start: ev.Start) -> None:
    state = turn.state
    if state.start is not None or state.is_over:
        raise ProtocolError(f"run {state.run!r} was started before")
    turn.set(
        start=start,
        base=start.base,
        committed=start.base,
        shown=start.base,
        checkpoint=start.base,
        wave_version=start.base,
        wave_from=start.base,
        durable=start.base,
        best=start.best,
    )
    term = records.Term(run=state.run, term=state.term, config_sha256=start.config_sha256)
    turn.journal(term)
    turn.enter(Phase.GATHERING, _gather_wait(turn))
    _install_when_gathered(turn)


def _gather_wait(turn: RunTurn) -> Wait:
    missing = tuple(d for d in turn.state.devices if d not in turn.state.members)
    deadline_s = turn.state.started.deadlines.gather_s
    return turn.wait_for("Hello", missing, deadline_s, "time for agents to start")


def on_hello(turn: RunTurn, sender: str, hello: msg.Hello) -> None:
    state = turn.state
    begun = state.phase is not Phase.GATHERING and not state.is_over
    if state.phase is Phase.ATTACHING:
        on_hello_attaching(turn, sender, hello)
        return
    if begun and state.recovery is not None:
        _on_hello_midway(turn, sender, hello)
        return
    if begun and sender in state.devices:
        halt_lost(turn, sender, "it started anew in the middle of the run")
        return
    members = {**state.members, sender: MemberInfo(hello=hello, heard_s=turn.now_s)}
    turn.set(members=members)
    if state.start is not None and state.phase is Phase.GATHERING:
        if state.wait is not None:
            left = tuple(device for device in state.wait.devices if device != sender)
            turn.set(wait=replace(state.wait, devices=left))
        _install_when_gathered(turn)


def _on_hello_midway(turn: RunTurn, sender: str, hello: msg.Hello) -> None:
    """A newcomer is a member from the next epoch on (R8). One that has a part in this epoch and
    says Hello started anew: what it had is gone."""
    state = turn.state
    had_part = sender in state.members and sender in state.party
    info = MemberInfo(hello=hello, heard_s=turn.now_s, is_newcomer=True)
    members = {**state.members, sender: info}
    turn.set(members=members)
    if state.phase is Phase.WAITING:
        open_epoch(turn, (), f"{sender} came while the run waited: {state.why_waiting}")
    elif had_part:
        open_epoch(turn, (), f"{sender} started anew in the middle of the run")


def _install_when_gathered(turn: RunTurn) -> None:
    state = turn.state
    if any(device not in state.members for device in state.devices):
        return
    start = state.started
    epoch = state.epoch + 1
    turn.set(epoch=epoch)
    turn.journal(records.Epoch(epoch=epoch))
    if state.recovery is not None:
        # Whoever is here by now is a member: with a stage, as a holder, or as a spare (R9).
        turn.set(
            crew=tuple(DeviceId(device) for device in sorted(state.members)),
            bases=(*state.bases, Base(epoch=epoch, base=state.base)),
        )
    decision = records.Decision(
        epoch=epoch,
        base=state.base,
        plan=start.plan,
        steps=start.steps,
        crew=turn.state.crew,
        holders=state.holders,
    )
    turn.journal(decision)
    send_installs(turn)


def on_ready(turn: RunTurn, sender: str, message: msg.Ready) -> None:
    state = turn.state
    expect_phase(state, sender, message, Phase.INSTALLING)
    turn.set_member(sender, is_ready=True)
    if state.wait is not None:
        left = tuple(device for device in state.wait.devices if device != sender)
        turn.set(wait=replace(state.wait, devices=left))
    if all(turn.state.members[device].is_ready for device in state.party):
        if state.started.measure_repeats and state.decided is None:
            _measure_next(turn)
        else:
            _resume(turn)


def _measure_next(turn: RunTurn) -> None:
    """One member at a time: on a shared machine they would slow each other down."""
    state = turn.state
    start = state.started
    for device in state.devices:
        if state.members[device].seconds is None:
            why = "set for timing the stage programs"
            wait = turn.wait_for("Measured", (device,), start.deadlines.measure_s, why)
            turn.enter(Phase.MEASURING, wait)
            turn.send(device, msg.Measure(**turn.of_epoch, repeats=start.measure_repeats))
            return
    seconds: dict[str, Mapping[str, float]] = {
        device: state.members[device].seconds or {} for device in state.devices
    }
    turn.journal(records.MembersMeasured(seconds=seconds), sync=False)
    turn.do(ev.Announce(news=ev.StageTimes(seconds=seconds)))
    _resume(turn)


def on_measured(turn: RunTurn, sender: str, message: msg.Measured) -> None:
    state = turn.state
    expect_phase(state, sender, message, Phase.MEASURING)
    if state.wait is None or sender not in state.wait.devices:
        raise ProtocolError(f"Measured from {sender}, which was not asked")
    turn.set_member(sender, seconds=message.seconds)
    _measure_next(turn)


def _resume(turn: RunTurn) -> None:
    resume(turn)
    state = turn.state
    if state.stop_reason is not None and state.phase is Phase.RUNNING:
        ask_stop(turn)
