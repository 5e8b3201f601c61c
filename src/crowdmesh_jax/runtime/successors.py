"""Who takes what was lost, and what is made ready for it ahead.

Idle devices get the programs and rows of the stages that they would take, holders of a stage's copy
first, and compile them while training goes on. Where no idle device can take a stage, the layers
are cut anew over the devices that are left, which needs a solver and new programs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from ..core import PipelinePlan
from ..core.crowd import DeviceId
from ..errors import CrowdMeshError
from ..programs import StageBundle
from ..protocol import OwnersChoice, OwnersNeed, choose_owners
from ..protocol import coordinator_events as ev
from ..protocol.evidence import LayerHolders
from ..protocol.owners import DeviceFacts, ring_holders
from .outfit import Outfitter

logger = logging.getLogger(__name__)

Replan = Callable[[Sequence[str]], tuple[PipelinePlan, Sequence[StageBundle]]]
"""Devices -> a plan over some of them, with its programs. Slow; runs in a thread."""
Range = tuple[int, int]


class Successors:
    """What is known of who could take over what.

    Args:
        copies: Holders per stage, besides its owner.
        replan: Cuts the layers anew.
    """

    def __init__(self, outfitter: Outfitter, *, copies: int, replan: Replan) -> None:
        self._outfitter = outfitter
        self._copies = copies
        self._replan = replan
        self.ready: dict[str, set[Range]] = {}
        """Device -> layers of the stages whose programs and rows it has."""
        self._asked: dict[str, set[Range]] = {}

    def holders(self, plan: PipelinePlan, devices: Sequence[str]) -> tuple[LayerHolders, ...]:
        """Who keeps the copies of whose layers."""
        return ring_holders(plan, [DeviceId(d) for d in devices], copies=self._copies)

    def has(self, device: str, layers: Range) -> bool:
        """Whether the stage's programs and rows need not be sent again."""
        return layers in self.ready.get(device, ())

    def note_ready(self, device: str, layers: Range) -> None:
        self.ready.setdefault(device, set()).add(layers)

    def forget(self, device: str) -> None:
        """Another process stands for it now, or none."""
        self.ready.pop(device, None)
        self._asked.pop(device, None)

    def to_prepare(
        self, plan: PipelinePlan, holders: Sequence[LayerHolders], devices: Sequence[str]
    ) -> list[tuple[str, int]]:
        """(device, stage) for all that idle devices lack, likeliest first; said once each."""
        idle = [device for device in devices if device not in plan.devices]
        holds = {(str(device), entry.first_layer) for entry in holders for device in entry.devices}
        wanted = []
        for index, stage in enumerate(plan.stages):
            layers = (stage.first_layer, stage.last_layer)
            for device in idle:
                if not self.has(device, layers) and layers not in self._asked.get(device, ()):
                    wanted.append(((device, stage.first_layer) not in holds, index, device))
                    self._asked.setdefault(device, set()).add(layers)
        return [(device, index) for _, index, device in sorted(wanted)]

    async def choose(self, need: OwnersNeed) -> ev.OwnersChosen:
        """The answer to a decision's question."""
        facts: Mapping[str, DeviceFacts] = {
            device: DeviceFacts(compiled=tuple(sorted(self.ready.get(device, ()))))
            for device in need.devices
        }
        choice = choose_owners(need, facts=facts, copies=self._copies)
        if choice.plan is None and need.devices:
            choice = await self._cut_anew(need, choice)
        return ev.OwnersChosen(epoch=need.epoch, choice=choice)

    async def _cut_anew(self, need: OwnersNeed, refused: OwnersChoice) -> OwnersChoice:
        try:
            plan, bundles = await asyncio.to_thread(self._replan, need.devices)
        except CrowdMeshError as exc:
            reason = f"{refused.reason}; and no other plan fits: {exc.message}"
            return OwnersChoice(plan=None, reason=reason)
        self._outfitter.learn(plan, bundles)
        logger.info("layers are cut anew over %s", ", ".join(plan.devices))
        stages = ", ".join(f"{s.device}: {s.first_layer}-{s.last_layer}" for s in plan.stages)
        return OwnersChoice(
            plan=plan,
            holders=self.holders(plan, need.devices),
            reason=f"{refused.reason}; the layers are cut anew ({stages})",
        )
