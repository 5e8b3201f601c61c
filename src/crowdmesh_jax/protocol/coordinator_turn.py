"""One call of the coordinator machine, and how a run ends: the result, a halt, a loss.

Shared by the parts of the machine (`coordinator`, `coordinator_watch`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core.crowd import DeviceId
from ..errors import (
    AgentLostError,
    NonFiniteLossError,
    ProtocolError,
)
from . import coordinator_events as ev
from . import messages as msg
from . import records
from .common import Fault
from .coordinator_state import (
    CoordinatorState,
    PendingStep,
    Phase,
    Wait,
    describe_progress,
    lost_text,
)


class RunTurn:
    """One call of `handle`: the state as it becomes, the actions as they come."""

    __slots__ = ("actions", "now_s", "state")

    def __init__(self, state: CoordinatorState, now_s: float) -> None:
        self.state = state
        self.now_s = now_s
        self.actions: list[ev.CoordinatorAction] = []

    def set(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)

    def set_member(self, device: str, **changes: Any) -> None:
        members = dict(self.state.members)
        members[device] = replace(members[device], **changes)
        self.set(members=members)

    def forget_member(self, device: str) -> None:
        """It is not here any more; until it says Hello again."""
        self.set(members={name: m for name, m in self.state.members.items() if name != device})

    def do(self, action: ev.CoordinatorAction) -> None:
        self.actions.append(action)

    def send(self, to: str, message: msg.Message) -> None:
        self.do(ev.SendMessage(to=DeviceId(to), message=message, lane="control"))

    def journal(self, record: records.Record, *, sync: bool = True) -> None:
        self.do(ev.Journal(record=record, sync=sync))

    def enter(self, phase: Phase, wait: Wait | None) -> None:
        self.set(phase=phase, wait=wait)
        news = ev.PhaseChanged(phase=phase.value, devices=wait.devices if wait else ())
        self.do(ev.Announce(news=news))

    def wait_for(
        self, what: str, devices: tuple[DeviceId, ...], deadline_s: float, why: str
    ) -> Wait:
        return Wait(what=what, devices=devices, since_s=self.now_s, deadline_s=deadline_s, why=why)

    @property
    def of_epoch(self) -> dict[str, Any]:
        return {"run": self.state.run, "epoch": self.state.epoch}


def is_closing(state: CoordinatorState) -> bool:
    return state.phase in (Phase.FINISHING, Phase.STOPPING)


def has_shard(state: CoordinatorState, version: int, stage: int | None) -> bool:
    have = any(shard.version == version and shard.stage == stage for shard in state.shards)
    return have or state.checkpoint == version


def is_through(state: CoordinatorState, stage: int | None) -> bool:
    """In closing: nothing more is awaited of that stage."""
    return has_shard(state, state.committed, stage) and not state.awaited


def is_evaluating(state: CoordinatorState) -> bool:
    """An evaluation is under way, or one is to be kept as the best."""
    return bool(state.awaited or state.writing_best is not None or best_candidates(state))


def best_candidates(state: CoordinatorState) -> list[int]:
    """Versions evaluated and held, oldest first."""
    return sorted({entry.version for entry in state.scored} & set(state.held))


def await_closing(turn: RunTurn) -> None:
    """Names whom a closing run still waits for: shards, the evaluation, its own disk."""
    state = turn.state
    if state.wait is None or not is_closing(state):
        return
    missing = tuple(
        device
        for stage, device in enumerate(state.devices)
        if not has_shard(state, state.committed, stage)
    )
    if not missing and state.awaited:
        missing = state.devices[-1:]
    turn.set(wait=replace(state.wait, devices=missing or (state.device,)))


def end_when_safe(turn: RunTurn) -> None:
    state = turn.state
    if not is_closing(state) or is_evaluating(state) or state.checkpoint != state.committed:
        return
    if state.phase is Phase.FINISHING and state.shown == state.started.steps:
        _complete(turn, "")
    elif state.phase is Phase.STOPPING:
        entry = _last_step(state)
        is_finite = entry.verdict is None or entry.verdict.is_finite
        if state.stop_reason is None or state.ending is not None or not is_finite:
            halt(turn, _why_stopped(state))
        elif state.shown == state.committed:
            _complete(turn, state.stop_reason)


def _complete(turn: RunTurn, reason: str) -> None:
    version = turn.state.committed
    turn.journal(records.Finish(version=version, reason=reason))
    for device in turn.state.party:
        turn.send(device, msg.Release(**turn.of_epoch))
    turn.enter(Phase.DONE, None)
    turn.do(ev.Complete(version=version, reason=reason))


def _last_step(state: CoordinatorState) -> PendingStep:
    step = state.committed - 1
    known = [*state.pending, state.last_shown] if state.last_shown else state.pending
    return next((p for p in known if p.step == step), PendingStep(step=step))


def _why_stopped(state: CoordinatorState) -> Fault:
    step, entry = state.committed - 1, _last_step(state)
    if state.ending is not None and (entry.verdict is None or entry.verdict.is_finite):
        where = f"; {describe_progress(state)}"
        return Fault(kind=state.ending.kind, text=state.ending.text + where)
    values = entry.values or {}
    shown = f"loss {values['loss']}" if "loss" in values else "loss or gradients not finite"
    error = NonFiniteLossError(
        f"step {step}: {shown}\n"
        f"  state    kept from before this step: {describe_progress(state)}\n"
        "  try      a lower learning rate, optax.clip_by_global_norm, float32 instead of bf16, a"
        " look at this step's batch (labels that the model has no class for?);"
        " on_nonfinite='continue' leaves it to the optimizer (optax.apply_if_finite)"
    )
    return Fault.of(error)


def halt(turn: RunTurn, fault: Fault) -> None:
    state = turn.state
    if state.is_over:
        return
    turn.journal(records.Halted(committed=state.committed, fault=fault))
    for device in state.members:
        if state.start is not None and (device in state.party or state.recovery is not None):
            turn.send(device, msg.Halt(**turn.of_epoch, fault=fault))
    turn.enter(Phase.HALTED, None)
    turn.do(ev.HaltRun(fault=fault))


def halt_lost(turn: RunTurn, device: str, reason: str) -> None:
    halt(turn, Fault.of(AgentLostError(lost_text(turn.state, device, reason))))


def expect_phase(
    state: CoordinatorState, sender: str, message: msg.Message, *phases: Phase
) -> None:
    if state.phase not in phases:
        what = type(message).__name__
        raise ProtocolError(f"{what} from {sender} while {state.phase.value}")
