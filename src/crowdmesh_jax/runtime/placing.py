"""Replication policies in a real run: what they may see here, and what becomes of their wishes.

A policy sees the plan, the crowd, who is here and for how long, what copies there are, and where
devices are if the user's code knows; never the future. Its copies become the holders of the next
wave, and its hand-overs are what the policy machine is told to move.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..core import Crowd, ModelProfile, PipelinePlan, ReplicaPlan
from ..core.crowd import DeviceId
from ..errors import InvalidValueError
from ..mobility import Sessions, Sightings
from ..programs.manifest import LeafSpec
from ..propagation import (
    Budget,
    Costs,
    Departure,
    Handover,
    HazardGroups,
    Heard,
    Holding,
    PolicyDecision,
    PolicyView,
    ReplicationPolicy,
    copy_bytes,
)
from ..protocol.evidence import LayerHolders
from ..protocol.messages import Hello
from ..protocol.owners import CopyRoom, Hazards, ring_holders

logger = logging.getLogger(__name__)

Stored = Mapping[str, Sequence[tuple[int, tuple[int, int]]]]
"""Device -> (first layer, (last layer, version)) of the newest copies that it said it has."""
Rates = Mapping[str, Mapping[str, float]]
"""Sender -> receiver -> bytes per second."""
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
        room_bytes: What each device said that it keeps for copies, for those that said so.

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
        room_bytes: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.policy = policy
        self.presence = Presence(tuple(str(device.id) for device in crowd.devices))
        self._crowd, self._profile = crowd, profile
        self._rates: Rates = {}
        self._measured = crowd
        self._copies, self._room_bytes = copies, room_bytes
        self._crash_per_s, self._detect_s = crash_per_s, detect_s
        self._watch, self._range_m = watch, range_m
        self._groups = HazardGroups.of(crowd, groups)
        self._hazards = known_hazards(crowd, groups)
        self._standing: ReplicaPlan | None = None
        self._handovers: tuple[Handover, ...] = ()

    def decide(
        self,
        plan: PipelinePlan,
        step_s: float,
        *,
        stored: Stored | None = None,
        leave_in_s: Mapping[str, float] | None = None,
        measured_bytes_per_s: Rates | None = None,
    ) -> PolicyDecision:
        """The policy's wishes now.

        Args:
            stored: The copies that devices said they have.
            leave_in_s: Of devices that announced to leave.
            measured_bytes_per_s: Sender -> receiver -> what the link carried of copies; others are
                as the crowd says.

        Raises:
            InvalidValueError: `watch` gave rows for another number of devices.
        """
        seen = self._watch() if self._watch is not None else None
        ids = self.presence.devices
        if seen is not None and len(seen.seen_s) != len(ids):
            raise InvalidValueError(
                f"recovery: watch gave {len(seen.seen_s)} rows, the crowd has {len(ids)} devices"
            )
        profile = self._profile()
        same_plan = self._standing is not None and self._standing.num_layers == plan.num_layers
        decision = self.policy.decide(
            PolicyView(
                plan=plan,
                profile=profile,
                crowd=self._crowd_by(measured_bytes_per_s or {}),
                costs=Costs(
                    step_s=step_s, detect_s=self._detect_s, crash_per_s=self._crash_per_s
                ),
                ids=ids,
                sightings=seen,
                heard=self.presence.heard(),
                range_m=self._range_m,
                budget=self._budget(),
                groups=self._groups,
                holdings=_holdings(profile, ids, stored or {}),
                departures=tuple(
                    Departure(device=DeviceId(device), leaves_s=max(0.0, leaves_s))
                    for device, leaves_s in sorted((leave_in_s or {}).items())
                    if device in ids
                ),
                standing=self._standing if same_plan else None,
                handovers=self._handovers,
            )
        )  # fmt: skip
        self._standing, self._handovers = decision.replicas, decision.handovers
        return decision

    def _crowd_by(self, rates: Rates) -> Crowd:
        """The crowd, with the links as they were measured."""
        if rates != self._rates:
            self._rates, self._measured = rates, with_rates(self._crowd, rates)
        return self._measured

    def _budget(self) -> Budget:
        room = {device: int(size) for device, size in self._room_bytes().items()}
        return Budget(copies=self._copies, memory_bytes=room)

    def holders(
        self,
        decision: PolicyDecision,
        plan: PipelinePlan,
        party: Sequence[str],
        *,
        leaving: Collection[str] = (),
        failed: Collection[str] = (),
        room: CopyRoom | None = None,
    ) -> tuple[LayerHolders, ...]:
        """The wishes as holders of stages, as far as they are members that stay.

        A wave of which one stage has no copy does not count for any (R13). So a stage for which the
        policy finds nobody who will stay, or nobody apart from its hazards, has the ring's holders.

        Args:
            failed: Members that did not store what they should: asked where there is no other.
            room: For the ring.
        """
        best = self._holders(decision, plan, party, {*leaving, *failed}, room)
        if not failed:
            return best
        every = self._holders(decision, plan, party, {*leaving}, room)
        return tuple(b if b.devices else e for b, e in zip(best, every, strict=True))

    def _holders(
        self,
        decision: PolicyDecision,
        plan: PipelinePlan,
        party: Sequence[str],
        barred: Collection[str],
        room: CopyRoom | None,
    ) -> tuple[LayerHolders, ...]:
        here = [DeviceId(device) for device in party if device not in barred]
        wanted: dict[int, tuple[DeviceId, ...]] = {}
        ring = {i.first_layer for i in decision.unprotected if i.lack in ("nobody", "hazard")}
        for item in decision.replicas.ranges:
            devices = tuple(r.device for r in item.replicas if r.device in here)
            wanted[item.first_layer] = devices
            if item.replicas and not devices:
                ring.add(item.first_layer)
        moving = {h.owner for h in decision.handovers}
        staying = [device for device in here if device not in moving]
        others = ring_holders(plan, staying, copies=self._copies, room=room, hazards=self._hazards)
        return tuple(
            LayerHolders(
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                devices=wanted.get(stage.first_layer)
                or (others[index].devices if stage.first_layer in ring else ()),
            )
            for index, stage in enumerate(plan.stages)
        )


def with_rates(crowd: Crowd, rates: Rates) -> Crowd:
    """The crowd with other bandwidths of some links.

    Args:
        rates: Sender -> receiver -> bytes per second; of pairs that cannot talk nothing changes.
    """
    known = {(link.source, link.target): link for link in crowd.links}
    for sender, figures in rates.items():
        for receiver, bytes_per_s in figures.items():
            link = crowd.link(sender, receiver)
            if link is not None:
                found = replace(link, bandwidth_bytes_per_s=bytes_per_s)
                known[link.source, link.target] = found
    return replace(crowd, links=tuple(known.values()))


def _holdings(profile: ModelProfile, ids: Sequence[str], stored: Stored) -> tuple[Holding, ...]:
    return tuple(
        Holding(
            device=DeviceId(device),
            first_layer=first,
            last_layer=last,
            version=version,
            age_s=0.0,
            size_bytes=copy_bytes(profile, first, last),
        )
        for device, entries in sorted(stored.items())
        if device in ids
        for first, (last, version) in entries
    )


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
    layer_bytes = tuple(sizes[name] for name in names)
    return CopyRoom(layer_bytes=layer_bytes, device_bytes=room_bytes(hellos))


def room_bytes(hellos: Mapping[str, Hello]) -> dict[str, float]:
    """What each device said that it keeps for copies, of those that said so."""
    return {
        device: hello.resources["copies_bytes"]
        for device, hello in hellos.items()
        if "copies_bytes" in hello.resources
    }


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
