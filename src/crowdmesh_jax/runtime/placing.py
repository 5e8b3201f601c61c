"""Replication policies in a real run: what they may see here, and what becomes of their wishes.

A policy sees the plan, the crowd, who is here and for how long, and sightings if the user's code
has any; never the future. Its copies become the holders of the next wave; its hand-overs, announced
departures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core import Crowd, ModelProfile, PipelinePlan, ReplicaPlan
from ..core.crowd import DeviceId
from ..errors import InvalidValueError
from ..mobility import Sessions, Sightings
from ..programs.manifest import LeafSpec
from ..propagation import (
    Budget,
    Costs,
    Handover,
    HazardGroups,
    Heard,
    PolicyDecision,
    PolicyView,
    ReplicationPolicy,
)
from ..protocol.evidence import LayerHolders
from ..protocol.messages import Hello
from ..protocol.owners import CopyRoom, Hazards, ring_holders

logger = logging.getLogger(__name__)

Watch = Callable[[], Sightings | None]
"""What is known of places now; rows as the crowd's devices. None: nothing yet."""


@dataclass(slots=True)
class Presence:
    """Who was here from when to when, by the coordinator's clock."""

    devices: tuple[str, ...]
    _since_s: dict[str, float] = field(default_factory=dict)
    _ended: list[tuple[str, float]] = field(default_factory=list)

    def joined(self, device: str) -> None:
        self.lost(device)
        self._since_s[device] = time.monotonic()

    def lost(self, device: str) -> None:
        since_s = self._since_s.pop(device, None)
        if since_s is not None:
            self._ended.append((device, time.monotonic() - since_s))

    def heard(self) -> Heard:
        """As policies take it."""
        now_s, row = time.monotonic(), {name: i for i, name in enumerate(self.devices)}
        past = [(device, seconds, True) for device, seconds in self._ended]
        past += [(device, now_s - since_s, False) for device, since_s in self._since_s.items()]
        known = [entry for entry in past if entry[0] in row]
        return Heard(
            present=np.array([name in self._since_s for name in self.devices], bool),
            sessions=Sessions.of(
                [row[device] for device, _, _ in known],
                [seconds for _, seconds, _ in known],
                [ended for _, _, ended in known],
                devices=len(self.devices),
            ),
        )


class Placer:
    """One policy, asked again and again.

    Args:
        profile: Of the job; taken when it is first needed.
        watch: See `Watch`; None: nobody looks.
        range_m: Radio range; None: links do not depend on places.
        groups: See `Recovery.groups`.

    Raises:
        InvalidCrowdError: A group names a device that is not in the crowd.
    """

    def __init__(
        self,
        policy: ReplicationPolicy,
        crowd: Crowd,
        profile: Callable[[], ModelProfile],
        *,
        copies: int,
        crash_per_s: float,
        detect_s: float,
        watch: Watch | None = None,
        range_m: float | None = None,
        groups: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.policy = policy
        self.presence = Presence(tuple(str(device.id) for device in crowd.devices))
        self._crowd, self._profile = crowd, profile
        self._budget = Budget(copies=copies)
        self._crash_per_s, self._detect_s = crash_per_s, detect_s
        self._watch, self._range_m = watch, range_m
        self._groups = HazardGroups.of(crowd, groups)
        self._standing: ReplicaPlan | None = None
        self._handovers: tuple[Handover, ...] = ()

    def decide(self, plan: PipelinePlan, step_s: float) -> PolicyDecision:
        """The policy's wishes now.

        Raises:
            InvalidValueError: `watch` gave rows for another number of devices.
        """
        seen = self._watch() if self._watch is not None else None
        ids = self.presence.devices
        if seen is not None and len(seen.seen_s) != len(ids):
            raise InvalidValueError(
                f"recovery: watch gave {len(seen.seen_s)} rows, the crowd has {len(ids)} devices"
            )
        same_plan = self._standing is not None and self._standing.num_layers == plan.num_layers
        decision = self.policy.decide(
            PolicyView(
                plan=plan,
                profile=self._profile(),
                crowd=self._crowd,
                costs=Costs(
                    step_s=step_s, detect_s=self._detect_s, crash_per_s=self._crash_per_s
                ),
                ids=ids,
                sightings=seen,
                heard=self.presence.heard(),
                range_m=self._range_m,
                budget=self._budget,
                groups=self._groups,
                standing=self._standing if same_plan else None,
                handovers=self._handovers,
            )
        )  # fmt: skip
        self._standing, self._handovers = decision.replicas, decision.handovers
        return decision

    def holders(
        self, decision: PolicyDecision, plan: PipelinePlan, party: Sequence[str]
    ) -> tuple[LayerHolders, ...]:
        """The wishes as holders of stages, as far as they are members.

        A wave of which one stage has no copy does not count for any (R13), so a stage for which
        the policy finds nobody who will stay gets somebody who is here now.
        """
        wanted: dict[int, list[DeviceId]] = {}
        somebody = {i.first_layer for i in decision.unprotected if i.lack == "nobody"}
        for item in decision.replicas.ranges:
            devices = [r.device for r in item.replicas if str(r.device) in party]
            wanted[item.first_layer] = devices
            if item.replicas and not devices:
                somebody.add(item.first_layer)
        for index, stage in enumerate(plan.stages):
            if stage.first_layer in somebody and not wanted.get(stage.first_layer):
                wanted[stage.first_layer] = self._anyone(decision, plan, index, party)
        return tuple(
            LayerHolders(
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                devices=tuple(DeviceId(d) for d in wanted.get(stage.first_layer, ())),
            )
            for stage in plan.stages
        )

    def _anyone(
        self, decision: PolicyDecision, plan: PipelinePlan, index: int, party: Sequence[str]
    ) -> list[DeviceId]:
        """Members that may hold a stage, those without one first; not who hands its own over."""
        owner, leaving = plan.stages[index].device, {str(h.owner) for h in decision.handovers}
        here = [
            DeviceId(device)
            for device in party
            if device not in leaving and self._groups.apart([owner, DeviceId(device)])
        ]
        ring = ring_holders(plan, here, copies=len(plan.stages) + len(here))[index].devices
        return [device for device in ring if device in here][: self._budget.copies]


def known_hazards(
    crowd: Crowd, groups: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Device -> names of the hazards that take others with it: the crowd's cells, and `groups`
    (see `Recovery.groups`). One that holds the whole crowd is left out: nothing escapes it.

    Raises:
        InvalidCrowdError: A group names a device that is not in the crowd.
        InvalidValueError: A group has no name, or that of a device.
    """
    known = HazardGroups.of(crowd, groups)
    found: dict[str, tuple[str, ...]] = {}
    for name, devices in known.members.items():
        for device in devices:
            found[device] = (*found.get(device, ()), name)
    return found


def copy_room(
    layers: Sequence[Sequence[LeafSpec]], hellos: Mapping[str, Hello], names: Sequence[str]
) -> CopyRoom:
    """What copies of each layer take, and what each device said that it keeps for them.

    Args:
        layers: Per stage, in order, the leaves that it holds.
        names: Of the layers, in order.
    """
    sizes = dict.fromkeys(names, 0)
    for leaves in layers:
        for leaf in leaves:
            if leaf.layer in sizes and leaf.role != "borrowed":
                sizes[leaf.layer] += leaf.size_bytes
    limits = {
        device: hello.resources["copies_bytes"]
        for device, hello in hellos.items()
        if "copies_bytes" in hello.resources
    }
    return CopyRoom(layer_bytes=tuple(sizes[name] for name in names), device_bytes=limits)


def unprotected(
    plan: PipelinePlan,
    holders: Sequence[LayerHolders],
    room: CopyRoom,
    hazards: Hazards | None = None,
) -> list[str]:
    """What one event takes with all its copies, in words: where no copy fits anywhere, or all that
    fit are behind a hazard of their owner."""
    kept, behind = {entry.first_layer: entry.devices for entry in holders}, hazards or {}
    notes = []
    for stage in plan.stages:
        layers = f"layers {stage.first_layer}-{stage.last_layer} of {stage.device}"
        needs = f"{room.needs(stage) / 1e6:.3g} MB"
        devices = kept.get(stage.first_layer, ())
        shared = set(behind.get(stage.device, ())).intersection(
            *(behind.get(d, ()) for d in devices)
        )
        if not devices:
            notes.append(
                f"{layers} have no copy: it takes {needs}, and no other device keeps so much free"
                " for copies (--copies-mb of its agent)"
            )
        elif shared:
            notes.append(
                f"{layers} have copies ({', '.join(devices)}) only behind the same hazard"
                f" ({', '.join(sorted(shared))}): no device apart from it keeps {needs} free for"
                " copies"
            )
    return notes
