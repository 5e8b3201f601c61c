"""What is made ready ahead: stages at idle devices, and plans for losses that these could not take.

Such losses are single ones where nobody is idle, then the likeliest of several devices at once: a
hazard's event takes its whole group, idle devices in it too; others fail independently.
"""

from __future__ import annotations

from ..propagation.groups import HazardGroups
from ..propagation.losses import likely_losses
from .state import KEPT_PLANS, ControlState
from .turn import Turn, holders_of

AT_ONCE_S = 60.0
"""Losses within so long are looked at as one: until then the survivors of the first may not have
the plans for the second."""
LATER = 10
"""Times `settle_s` that an epoch has run before losses of several devices are planned for: they
are rare, and planning and compiling take time from training."""
LOOKED_AT = 1000
"""Losses of several devices, likeliest first, of which those are planned for that need it."""


def compile_for_idle(turn: Turn) -> None:
    """Idle devices make ready what they would take; what they hold a copy of comes first."""
    state = turn.state
    plan = state.plan
    assert plan is not None
    wanted = []
    for index, stage in enumerate(plan.stages):
        holds = holders_of(state.holders, stage.first_layer)
        for order, device in enumerate(state.idle()):
            wanted.append((device not in holds, index, order, device))
    for _, index, _, device in sorted(wanted):
        turn.compile(device, plan, index)


def plan_ahead(turn: Turn) -> None:
    """One plan at a time: for those who are here, if they are others than at first; then for
    losses. Not in the first seconds: a run may be short."""
    state = turn.state
    terms = state.terms
    since_s = turn.now_s - state.began_s
    if since_s < terms.settle_s or state.step + 1 >= state.steps:
        return
    wanted = []
    if terms.replan and state.is_disturbed:
        wanted.append(state.candidates())
    if terms.standby:
        is_late = since_s >= LATER * terms.settle_s
        wanted += [
            tuple(device for device in state.party if device not in lost)
            for lost in state.ahead
            if is_late or len(lost) == 1
        ]
    for devices in wanted[:KEPT_PLANS]:  # of more, the first would be forgotten and made again
        if devices and state.plan_for(devices) is None:
            turn.solve(devices)
            return


def losses_ahead(state: ControlState) -> tuple[tuple[str, ...], ...]:
    """Sets of members whose loss at once leaves fewer idle devices than stages without an owner:
    single losses, then at most `terms.doubles` of several; each likeliest first."""
    terms, plan = state.terms, state.plan
    assert plan is not None
    rates = {d: terms.losses_per_s.get(d, 0.0) for d in state.party}
    groups = HazardGroups(members=terms.groups())
    found = likely_losses(
        plan,
        rates,
        horizon_s=AT_ONCE_S,
        groups=groups,
        # Who named a group did not say how often it goes: as often as its frailest device.
        group_loss_per_s={
            name: max(rates.get(device, 0.0) for device in members)
            for name, members in groups.members.items()
        },
        here=state.party,
        doubles=LOOKED_AT,
    )
    needed = [loss.devices for loss in found if _is_beyond_idle(state, loss.devices)]
    singles = [lost for lost in needed if len(lost) == 1]
    several = [lost for lost in needed if len(lost) > 1]
    return (*singles, *several[: terms.doubles])


def _is_beyond_idle(state: ControlState, lost: tuple[str, ...]) -> bool:
    assert state.plan is not None
    stages = sum(stage.device in lost for stage in state.plan.stages)
    left = [device for device in state.idle() if device not in lost]
    return stages > len(left) and any(device not in lost for device in state.party)
