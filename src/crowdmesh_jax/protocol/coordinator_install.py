"""Granting an epoch: who gets which Install or Enlist. It does not know why the plan is so."""

from __future__ import annotations

from . import coordinator_events as ev
from . import messages as msg
from .common import Slot
from .coordinator_state import CoordinatorState, Phase
from .coordinator_turn import RunTurn


def send_installs(turn: RunTurn) -> None:
    """Grants the epoch to every member of it, and waits for Ready. The decision is journalled."""
    state = turn.state
    start, plan = state.started, state.plan
    schedule = state.standing.schedule if state.standing is not None else start.schedule
    addresses: dict[str, str] = {
        device: state.members[device].hello.address
        for device in state.party
        if device in state.members
    }
    decided, terms = state.decided, state.recovery
    for device in state.party:
        turn.set_member(device, is_ready=False, is_newcomer=False, heartbeat=None)
    for index, stage in enumerate(plan.stages):
        action = decided.actions[index] if decided is not None else None
        install = msg.Install(
            **turn.of_epoch,
            term=state.term,
            base=state.base,
            plan=plan,
            stage=index,
            ops=schedule.ops[index],
            addresses=addresses,
            ties=start.ties,
            on_nonfinite=start.on_nonfinite,
            evaluation=start.evaluation,
            heartbeat_s=start.heartbeat_s,
            action=action.act if action is not None else "restore",
            state_version=action.version if action is not None else None,
            sources=action.sources if action is not None else (),
            verdicts=decided.verdicts if decided is not None else (),
            resend_ties=decided is not None and bool(start.ties),
            holders=state.holders,
            log_steps=terms.log_steps if terms is not None else None,
        )
        turn.do(
            ev.SendMessage(
                to=stage.device, message=install, lane="bulk", attach=_attached(state, install)
            )
        )
    for device in state.party:
        if device not in plan.devices:
            enlist = msg.Enlist(
                **turn.of_epoch,
                term=state.term,
                base=state.base,
                plan=plan,
                holders=state.holders,
                addresses=addresses,
                heartbeat_s=start.heartbeat_s,
            )
            turn.do(ev.SendMessage(to=device, message=enlist, lane="bulk"))
    why = "set for loading and compiling"
    wait = turn.wait_for("Ready", state.party, start.deadlines.ready_s, why)
    turn.enter(Phase.INSTALLING, wait)


def _attached(state: CoordinatorState, install: msg.Install) -> tuple[Slot, ...]:
    """Slot "install": programs, and the state where the coordinator's disk is a source."""
    version = state.base if install.state_version is None else install.state_version
    layers = install.plan.stages[install.stage].layers
    slots = [Slot(kind="install", step=version, layer=layers.start)]
    slots += [Slot(kind="verdict", step=entry.step) for entry in install.verdicts]
    return tuple(slots)
