"""How a run is guarded against losses: what its machines are told of it before the first step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..control import ControlTerms
from ..core import PipelinePlan
from ..core.crowd import DeviceId
from ..model import TrainingJob
from ..programs import StageBundle
from ..protocol.coordinator_events import RecoveryTerms
from ..protocol.evidence import LayerHolders
from ..protocol.owners import CopyRoom, ring_holders
from .crew import Crew
from .placing import Placer, copy_room, unprotected
from .recovery import Recovery, logged_bytes

logger = logging.getLogger(__name__)

ATTACH_S = 10.0
"""A coordinator that started again waits so long for its members, who dial it all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """Of one run, by the user's terms, the crowd, and the plan that it begins with."""

    recovery: Recovery
    crew: Crew
    job: TrainingJob
    plan: PipelinePlan
    bundles: Sequence[StageBundle]
    hazards: Mapping[str, tuple[str, ...]]
    """Device -> names of the groups that are lost with it."""
    placer: Placer | None
    """None: copies go round the ring of devices."""
    planned_step_s: float

    def recovery_terms(self, warn: Callable[[str], None]) -> RecoveryTerms:
        """For the coordinator's machine.

        Args:
            warn: Told what stays without a copy, if something does.
        """
        planned = [str(device) for device in self.plan.devices]
        spares = [device for device in self.crew.hellos if device not in planned]
        holders, notes = self._first_holders(sorted([*planned, *spares]))
        if notes:
            rest = "a loss there takes everyone back to the newest checkpoint"
            detail = "; ".join([*notes, rest])
            logger.warning("%s", detail)
            warn(detail)
        return RecoveryTerms(
            holders=holders,
            wave_every=self.recovery.first_wave_every,
            log_steps=self._log_steps(),
            return_s=self.recovery.return_s,
            attach_s=ATTACH_S,
        )

    def control_terms(self) -> ControlTerms:
        """For the policy machine."""
        crowd = self.crew.crowd
        crash_per_s = self.recovery.crash_per_s
        rates = {str(d.id): d.leave_hazard_per_s + crash_per_s for d in crowd.devices}
        return ControlTerms(
            copies=self.recovery.copies,
            room=self._room(),
            is_ring=self.placer is None,
            learn_interval=self.recovery.wave_every is None,
            loss_per_s=math.fsum(rates[device] for device in self.plan.devices),
            losses_per_s=rates,
            hazards=self.hazards,
            most_steps=max(1, self._log_steps() // 2),
            standby=self.recovery.standby,
            replan=self.recovery.replan,
            speeds={str(device.id): device.speed for device in crowd.devices},
        )

    def _first_holders(self, party: list[str]) -> tuple[tuple[LayerHolders, ...], list[str]]:
        """Who keeps which copies at first, and what stays without one."""
        room = self._room()
        if self.placer is None:
            devices = [DeviceId(device) for device in party]
            holders = ring_holders(
                self.plan, devices, copies=self.recovery.copies, room=room, hazards=self.hazards
            )
            return holders, unprotected(self.plan, holders, room, self.hazards)
        for device in party:
            self.placer.presence.joined(device)
        decision = self.placer.decide(self.plan, self.planned_step_s)
        holders = self.placer.holders(decision, self.plan, party, room=room)
        bare = {entry.first_layer for entry in holders if not entry.devices}
        return holders, [
            f"layers {item.first_layer}-{item.last_layer} of {item.owner} have no copy:"
            f" {item.detail}"
            for item in decision.unprotected
            if item.first_layer in bare
        ]

    def _room(self) -> CopyRoom:
        leaves = [bundle.manifest.resident for bundle in self.bundles]
        names = [layer.name for layer in self.job.model.layers]
        return copy_room(leaves, self.crew.hellos, names)

    def _log_steps(self) -> int:
        manifests = [bundle.manifest for bundle in self.bundles]
        return self.recovery.logged_steps(logged_bytes(manifests, self.plan.microbatches))
