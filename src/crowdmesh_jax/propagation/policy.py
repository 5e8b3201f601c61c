"""Replication policies: what they may know, what they want, and the Protocol that joins them.

A policy is a pure function of a `PolicyView`. The view holds sightings of the past, heartbeats, and
what stands; no movement, no trace, no future. Rows of arrays belong to `ids`, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from ..core import Crowd, ModelProfile, PipelinePlan, ReplicaPlan
from ..errors import InvalidValueError
from ..mobility import Sessions, Sightings
from ..mobility.checks import Bools
from .budget import Budget
from .groups import HazardGroups
from .handover import Departure, Handover
from .report import Holding
from .seats import Unprotected


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What waves and losses cost, as measured or predicted. The same for every policy."""

    step_s: float
    snapshot_s: float = 0.05
    """Training time that a wave's snapshot takes."""
    slowdown: float = 0.1
    """Part of a second of training that is lost for each second of bulk transfer."""
    changed_share: float = 1.0
    """Part of a copy that a wave sends, when the holder has the last one."""
    detect_s: float = 3.0
    recovery_s: float = 5.0
    """Fence, decision, install, first frames; without redone work."""
    replay_share: float = 1.0
    """Time of a redone step, as a part of a step: below 1 where only lost stages are replayed."""
    crash_per_s: float = 1e-5
    """Of each device; what is believed before heartbeats tell."""

    def __post_init__(self) -> None:
        for name in ("step_s", "snapshot_s", "slowdown", "changed_share", "detect_s", "recovery_s",
                     "replay_share", "crash_per_s"):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name == "step_s" and value == 0):
                raise InvalidValueError(f"costs: {name} must be finite and >= 0, got {value}")
        if self.changed_share > 1:
            raise InvalidValueError(f"costs: changed_share must be <= 1, got {self.changed_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Heartbeats until now; rows as `PolicyView.ids`."""

    present: Bools
    sessions: Sessions


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyView:
    """All that a policy may know at one moment."""

    plan: PipelinePlan
    profile: ModelProfile
    crowd: Crowd
    costs: Costs
    ids: tuple[str, ...]
    """Whose the rows of `sightings` and `heard` are; each a device of the crowd."""
    sightings: Sightings | None = None
    heard: Heard | None = None
    range_m: float | None = None
    """Radio range; None: links do not depend on places."""
    budget: Budget = field(default_factory=Budget)
    groups: HazardGroups = field(default_factory=HazardGroups)
    holdings: tuple[Holding, ...] = ()
    standing: ReplicaPlan | None = None
    """What was decided last."""
    handovers: tuple[Handover, ...] = ()
    """Those that are under way."""
    departures: tuple[Departure, ...] = ()
    """That were announced: an empty battery, a user who said so."""
    row_of: Mapping[str, int] = field(init=False, repr=False, compare=False)
    """Device -> its row."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_of", {device: row for row, device in enumerate(self.ids)})
        if len(set(self.ids)) != len(self.ids):
            raise InvalidValueError("view: ids must differ")
        for device in (*self.ids, *self.plan.all_devices):
            self.crowd.device(device)
        rows = len(self.ids)
        for name, found in (
            ("sightings", None if self.sightings is None else len(self.sightings.seen_s)),
            ("heard.present", None if self.heard is None else len(self.heard.present)),
            ("heard.sessions", None if self.heard is None else self.heard.sessions.devices),
        ):
            if found is not None and found != rows:
                raise InvalidValueError(f"view: {name} has {found} rows, ids names {rows}")

    def is_present(self, device: str) -> bool:
        """Whether it was heard lately; True where nobody listens for it."""
        if self.heard is None or device not in self.row_of:
            return True
        return bool(np.asarray(self.heard.present)[self.row_of[device]])

    @property
    def owners(self) -> tuple[str, ...]:
        return self.plan.devices


Mode = Literal["take_over", "spread", "recut"]
"""What becomes of lost layers: "take_over": they go whole to an idle device, else all are cut anew.
"spread": to both neighbours in proportion to their speed (Asteroid). "recut": always a new cut
(FTPipeHD)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyWish:
    """Which losses a policy wants plans for, and of which kind: what its paper does. Runs do not
    ask: all of them go by the rule of `control`."""

    mode: Mode | None = None
    """None: it plans nothing ahead."""
    doubles: int = 0
    """How many of the likeliest pairs, beside each single loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyDecision:
    """What a policy wants."""

    replicas: ReplicaPlan
    handovers: tuple[Handover, ...] = ()
    standby: StandbyWish = field(default_factory=StandbyWish)
    unprotected: tuple[Unprotected, ...] = ()
    """Ranges that get no copy though the policy wants one, and why."""
    notes: tuple[str, ...] = ()


@runtime_checkable
class ReplicationPolicy(Protocol):
    """Chooses copies, intervals and hand-overs. Equal views, equal decisions, always.

    It keeps nothing between calls (what stands is in the view), draws no random numbers, reads no
    clock, and its decision does not depend on the order of devices.
    """

    @property
    def name(self) -> str: ...

    def decide(self, view: PolicyView) -> PolicyDecision:
        """The wishes for this moment."""
        ...


def check_decision(view: PolicyView, decision: PolicyDecision) -> Sequence[str]:
    """What is wrong with a decision of whatever policy; empty where nothing is.

    Limits hold for all policies alike: bytes in memory and on disk, bytes of a wave, holders that
    are in the crowd. That no two copies share a hazard is a promise of `mobility` only: the rivals'
    published rules know no hazards; the replica report shows what that means.
    """
    from .budget import copy_bytes, rooms

    faults = []
    has = rooms(view.plan, view.profile, view.crowd, view.budget)
    used: dict[tuple[str, str], int] = {}
    sent = 0
    for item in decision.replicas.ranges:
        size = copy_bytes(view.profile, item.first_layer, item.last_layer)
        for replica in item.replicas:
            if replica.device not in has:
                faults.append(f"holder {replica.device!r} is not in the crowd")
            key = (replica.device, replica.keep)
            used[key] = used.get(key, 0) + size * view.budget.held_versions
            sent += math.ceil(size * view.costs.changed_share)
    for (device, keep), size in sorted(used.items()):
        room = has.get(device)
        limit = 0 if room is None else getattr(room, f"{keep}_bytes")
        if size > limit:
            faults.append(f"{device}: {size} bytes of copies in {keep}, {limit} there")
    if view.budget.wave_bytes is not None and sent > view.budget.wave_bytes:
        faults.append(f"a wave sends {sent} bytes, {view.budget.wave_bytes} are allowed")
    return faults
