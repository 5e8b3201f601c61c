"""The policy machine with a clock, for tests that tell it one event after another."""

from __future__ import annotations

from typing import Any

from crowdmesh_jax import control
from crowdmesh_jax.core import PipelinePlan
from crowdmesh_jax.protocol import OwnersNeed
from crowdmesh_jax.protocol.owners import ring_holders

PARTY = ("d0", "d1", "d2", "s0", "s1")
PLAN = PipelinePlan.even(6, ["d0", "d1", "d2"], microbatches=4)
KEYS = ("k0", "k1", "k2")


class Policy:
    """The machine with a clock, and what it wanted since the last look."""

    def __init__(self, party: Any = PARTY, plan: PipelinePlan = PLAN, **terms: Any) -> None:
        self.state = control.ControlState(terms=control.ControlTerms(**terms))
        self.now_s = 0.0
        self.entries: list[Any] = []
        self.party, self.plan = party, plan

    def tell(self, event: Any, after_s: float = 0.0) -> list[Any]:
        self.now_s += after_s
        self.state, actions = control.handle(self.state, event, self.now_s)
        self.entries.append((self.now_s, event, actions))
        return list(actions)

    def running(self, **changes: Any) -> list[Any]:
        fields: dict[str, Any] = {
            "epoch": 1, "plan": self.plan, "party": self.party, "step": 0, "steps": 1000,
            "keys": KEYS, "holders": ring_holders(self.plan, self.party, copies=1),
        }  # fmt: skip
        return self.tell(control.Running(**{**fields, **changes}))

    def need(self, lost: tuple[int, ...] = (), gone: tuple[str, ...] = (), **more: Any) -> Any:
        devices = tuple(d for d in self.party if d not in gone)
        need = OwnersNeed(epoch=2, plan=self.plan, lost_stages=lost, devices=devices, **more)
        return self.tell(control.OwnersNeeded(need=need, keys=KEYS[: len(self.plan.stages)]))


def solved(devices: Any, plan: PipelinePlan | None, **more: Any) -> control.PlanSolved:
    keys = tuple(f"{d}-new" for d in plan.devices) if plan else ()
    return control.PlanSolved(devices=tuple(devices), plan=plan, keys=keys, **more)
