"""One call of the policy machine: the state as it changes, and what is wanted so far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core.plan import PipelinePlan
from ..protocol.evidence import LayerHolders
from . import events as ev
from .state import ControlState


class Turn:
    """Of one event."""

    def __init__(self, state: ControlState, now_s: float) -> None:
        self.state, self.now_s = state, now_s
        self.actions: list[ev.ControlAction] = []

    def set(self, **changes: Any) -> None:
        """Other values of the state's fields."""
        self.state = replace(self.state, **changes)

    def do(self, action: ev.ControlAction) -> None:
        """One more wish."""
        self.actions.append(action)

    def solve(self, devices: tuple[str, ...], *, urgent: bool = False) -> None:
        """Asks for a plan; not twice at once, unless everyone waits for it."""
        if devices in self.state.solving and not urgent:
            return
        self.set(solving=(*self.state.solving, devices))
        self.do(ev.Solve(devices=devices, urgent=urgent))

    def compile(self, device: str, plan: PipelinePlan, stage: int) -> None:
        """Sends a stage to a device, once."""
        asked = self.state.asked
        name = stage_name(plan, stage)
        if name in asked.get(device, ()):
            return
        self.set(asked={**asked, device: (*asked.get(device, ()), name)})
        self.do(ev.Compile(device=device, plan=plan, stage=stage))


def stage_name(plan: PipelinePlan, stage: int) -> str:
    """Tells a stage's programs from others', as far as a plan tells."""
    item = plan.stages[stage]
    place = f"{stage}/{len(plan.stages)}"
    return f"{item.first_layer}-{item.last_layer} {place}{' recomputed' if item.recompute else ''}"


def holders_of(holders: tuple[LayerHolders, ...], first_layer: int) -> tuple[str, ...]:
    """Who keeps copies of the stage that begins with this layer."""
    return next((e.devices for e in holders if e.first_layer == first_layer), ())
