"""One call of the member machine: the state as it becomes, the actions as they come.

Shared by the parts of the machine (`member`, `member_step`); knows no rules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core.crowd import DeviceId
from ..errors import ProtocolError
from . import member_events as ev
from . import messages as msg
from .common import Fault, Parts, Slot
from .member_state import MemberState, Phase, waiting_for

FRESH_STEP: dict[str, Any] = {
    "issued": 0,
    "completed": 0,
    "arrived_x": (),
    "arrived_dy": (),
    "is_finishing": False,
    "is_full": False,
    "parts": Parts(),
}

NO_EVALUATION: dict[str, Any] = {
    "eval_version": None,
    "eval_issued": 0,
    "eval_done": 0,
    "eval_arrived": 0,
    "eval_taken": 0,
    "eval_requested": 0,
    "eval_ready": (),
}


class MemberTurn:
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
        """Sends to the coordinator; a fenced member says nothing but its Report (R6)."""
        if self.state.phase is not Phase.FENCED:
            self.answer(message, lane, *attach)

    def answer(self, message: msg.Message, lane: Any = "control", *attach: Slot) -> None:
        """Sends to the coordinator, fenced or not."""
        to = self.state.coordinator
        self.do(ev.SendMessage(to=to, message=message, lane=lane, attach=attach))

    def pass_on(self, to: DeviceId, message: msg.PipelineMessage, *attach: Slot) -> None:
        if self.state.phase is not Phase.FENCED:
            self.do(ev.SendMessage(to=to, message=message, lane="pipeline", attach=attach))

    def request(self, to: DeviceId, message: msg.Message) -> None:
        """Asks a peer for a copy or a log."""
        self.do(ev.SendMessage(to=to, message=message, lane="control"))

    @property
    def of_epoch(self) -> dict[str, Any]:
        return {"run": self.state.run, "epoch": self.state.active}

    def fail(self, fault: Fault) -> None:
        if self.state.phase in (Phase.FAILED, Phase.IDLE):
            return
        self.set(phase=Phase.FAILED)
        self.tell(msg.Error(**self.of_epoch, fault=fault))
        self.do(ev.Fail(fault=fault))


def beat(turn: MemberTurn) -> None:
    """A sign of life, and of what this member does."""
    state = turn.state
    turn.set(heartbeat_s=turn.now_s)
    sign = msg.Heartbeat(
        **turn.of_epoch,
        phase=state.phase.value,
        version=state.version,
        completed_ops=state.completed,
        waiting=waiting_for(state) if state.install is not None else None,
    )
    turn.tell(sign)


def reject(turn: MemberTurn, sender: str, message: msg.Message, why: str) -> None:
    what = type(message).__name__
    text = f"{turn.state.device} got {what} from {sender}, refused: {why}"
    state = turn.state
    grant = state.install or state.enlisted
    members = {*grant.plan.devices, *grant.addresses} if grant is not None else set()
    is_stranger = sender != state.coordinator and sender not in members
    fault = Fault(kind="ProtocolError", text=text)
    turn.do(ev.Reject(sender=sender, fault=fault, is_stranger=is_stranger))


def expect_phase(state: MemberState, message: Any, *phases: Phase) -> None:
    if state.phase not in phases:
        what = type(message).__name__
        raise ProtocolError(f"{state.device} got {what} while {state.phase.value}")
