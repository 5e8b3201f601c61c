"""Our policy: copies go to who will be there and can run them; departures are handed over ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...core import DeviceId, Replica, ReplicaPlan, ReplicaRange, Stage
from ...errors import InvalidValueError
from ..budget import copy_bytes, hosted_bytes, rooms, stage_need
from ..foresight import Ahead, ChainRule, rows_of
from ..handover import Departure, Handover, HandoverRule, Target, decide_handover
from ..interval import Interval, loss_rate_per_s
from ..placement import EXACT_NODES, place
from ..policy import PolicyDecision, PolicyView
from ..prospects import TURNS, UNKNOWN, Outlook
from ..seats import Placement, PlacementProblem, PlacementRange, Prospect
from .common import tuned_interval
from .planning import holds, is_safe, planned_moves, successors
from .spreading import spread

LEAST_HORIZON_S = 30.0
AHEAD_S = 60.0
"""Over so long departures count for the interval, where places are known."""
HOLDERS = 8
"""Devices that placement looks at for each stage, where all are in sight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MobilityPolicy:
    """Holders by predicted co-residence x speed, intervals by the hazard that remains, hand-overs.

    - **Co-residence** of a device with a stage: that it stays, and stays in range of the devices of
      the stages beside it (with which it would go on) until the horizon; 0 where the owner cannot
      send to it now.
    - **Horizon**: one interval and one recovery, at least 30 s. The interval comes first, from the
      hazard of the owners; with `horizon_s` it is fixed.
    - **Interval**: sqrt(2 cost / (crashes + missed departures)); departures that movement shows
      count with `missed_share`, since the others are handed over.
    - **Stickiness**: where a holder stands, the presence of others is divided by `stick`, so that
      copies do not move for a trifle: a new holder needs all bytes, an old one what changed.
    - **Newcomers**: where places are known and a stage has several copies, see `spreading`.
    - **Hand-over**: see `handover`; the target is a device without a stage that has room for it.
      Where places are known, see `foresight`; targets may then be owners that move as well.

    The numbers are choices of ours, untuned but for those of `chain`; all but `interval_scale` are
    the same everywhere.
    """

    name: str = "mobility"
    horizon_s: float | None = None
    missed_share: float = 0.3
    stick: float = 1.15
    turns: float = TURNS
    unknown: float = UNKNOWN
    handover: HandoverRule | None = field(default_factory=HandoverRule)
    """None: no hand-overs; every departure is then a loss."""
    chain: ChainRule | None = field(default_factory=ChainRule)
    """Where places are known: hand-overs of one or several stages by this rule instead."""
    spread: bool = True
    """Whether second holders are those that never had the stage, while there are such in range."""
    interval_scale: float = 1.0
    exact_nodes: int = EXACT_NODES

    def __post_init__(self) -> None:
        who = f"policy {self.name!r}"
        if self.horizon_s is not None and not 0 < self.horizon_s < math.inf:
            raise InvalidValueError(
                f"{who}: horizon_s must be finite and > 0, got {self.horizon_s}"
            )
        for name in ("missed_share", "unknown"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidValueError(
                    f"{who}: {name} must lie in 0..1, got {getattr(self, name)}"
                )
        if not 1 <= self.stick < math.inf:
            raise InvalidValueError(f"{who}: stick must be >= 1, got {self.stick}")

    def decide(self, view: PolicyView) -> PolicyDecision:
        """Copies, interval and hand-overs for this moment."""
        outlook = Outlook(view=view, turns=self.turns, unknown=self.unknown)
        ahead = None if self.chain is None else Ahead.of(view, self.chain)
        departures = {
            device: self._departure(outlook, device) if ahead is None else None
            for device in view.owners
        }
        loss_per_s = self._loss_per_s(outlook, departures, ahead)
        # The holders are not known yet: the horizon's interval is that of a copy at the next stage.
        stages = view.plan.stages
        chain = [
            (stage.device, after.device, copy_bytes(view.profile, *_ends(stage)))
            for stage, after in zip(stages, (*stages[1:], stages[0]), strict=True)
            if after is not stage
        ]
        first = tuned_interval(view, chain, loss_per_s, scale=self.interval_scale)
        horizon_s = self._horizon_s(view, first)
        prospects = [
            self._prospects(outlook, index, horizon_s, ahead)
            for index in range(len(view.plan.stages))
        ]
        placement = self._placed(outlook, prospects, horizon_s)
        if self.spread and ahead is not None:
            placement = spread(view, ahead, placement)
        hops = [
            (stage.device, device, copy_bytes(view.profile, stage.first_layer, stage.last_layer))
            for stage, seats in zip(view.plan.stages, placement.seats, strict=True)
            for device, _ in seats
        ]
        interval = tuned_interval(view, hops, loss_per_s, scale=self.interval_scale)
        replicas = self._plan(view, placement, prospects, interval, horizon_s)
        told = placement.tell()
        return PolicyDecision(
            replicas=replicas,
            handovers=self._handovers(outlook, departures, prospects, interval, ahead),
            unprotected=placement.unprotected,
            notes=(told,) if told else (),
        )

    def take_over(self, view: PolicyView, lost: Sequence[int]) -> tuple[str, ...] | None:
        """Devices of all stages after a loss; None: no chain of devices is in range.

        Args:
            lost: Stages whose state has to come from a copy, if another device takes them.
        """
        return successors(view, self.chain or ChainRule(), lost)

    def moves(self, view: PolicyView) -> tuple[Handover, ...]:
        """The hand-overs alone, as `decide` would have them: cheap, for the time between two
        decisions, when what is seen changes and copies need not."""
        if self.handover is None or self.chain is None:
            return view.handovers
        if not view.handovers and is_safe(view, self.chain):
            return ()
        steps = None if view.standing is None else view.standing.interval_steps
        return planned_moves(view, self.chain, (steps or 0) * view.costs.step_s)

    def _loss_per_s(
        self, outlook: Outlook, departures: Mapping[str, Departure | None], ahead: Ahead | None
    ) -> float:
        view = outlook.view
        crash, leave = [], []
        for device in sorted(view.plan.all_devices):
            learned = outlook.loss_rate_per_s(device)
            crashes = min(view.costs.crash_per_s, learned)
            departure = departures.get(device)
            seen = 0.0 if departure is None else 1 / max(departure.leaves_s, 1.0)
            crash.append(crashes)
            leave.append(max(learned - crashes, seen))
        if ahead is not None:
            rows = rows_of(ahead, view.plan.devices)
            if min(rows) >= 0:
                leave.append((1 - ahead.lasts_until(rows, AHEAD_S)) / AHEAD_S)
        missed = 1.0 if self.handover is None else self.missed_share
        return loss_rate_per_s(crash, leave, missed_share=missed)

    def _horizon_s(self, view: PolicyView, interval: Interval) -> float:
        if self.horizon_s is not None:
            return self.horizon_s
        costs = view.costs
        return max(LEAST_HORIZON_S, interval.seconds + costs.detect_s + costs.recovery_s)

    def _prospects(
        self, outlook: Outlook, index: int, horizon_s: float, ahead: Ahead | None
    ) -> tuple[Prospect, ...]:
        """What every device promises as holder of one stage."""
        view = outlook.view
        if ahead is not None and set(view.plan.all_devices) <= set(ahead.ids):
            return self._seen_prospects(outlook, index, horizon_s, ahead)
        stage = view.plan.stages[index]
        peers = [
            view.plan.stages[near].device
            for near in (index - 1, index + 1)
            if 0 <= near < len(view.plan.stages)
        ]
        fastest = max(device.flops_per_s for device in view.crowd.devices)
        found = []
        for device in view.crowd.devices:
            if device.id in stage.devices:
                continue
            presence = outlook.stays(device.id, horizon_s)
            if presence > 0 and outlook.rate_bytes_per_s(stage.device, device.id) == 0:
                presence = 0.0
            for peer in peers:
                if presence > 0:
                    linked = view.crowd.link(device.id, peer) or device.id == peer
                    presence *= outlook.in_range(device.id, peer, horizon_s) if linked else 0.0
            found.append(
                Prospect(device=device.id, presence=presence, speed=device.flops_per_s / fastest)
            )
        return tuple(sorted(found, key=lambda p: p.device))

    def _seen_prospects(
        self, outlook: Outlook, index: int, horizon_s: float, ahead: Ahead
    ) -> tuple[Prospect, ...]:
        """The same by the chain rule's chances, for devices that are in sight."""
        view = outlook.view
        stage, devices = view.plan.stages[index], view.plan.devices
        chance = ahead.chance_at(horizon_s)
        rows = rows_of(ahead, devices)
        fastest = max(device.flops_per_s for device in view.crowd.devices)
        found = []
        for row, name in enumerate(ahead.ids):
            if name in stage.devices:
                continue
            presence = 0.0
            if ahead.near[rows[index], row]:
                presence = outlook.stays(name, horizon_s)
                for near in (index - 1, index + 1):
                    if 0 <= near < len(rows):
                        # Who has the stage beside counts its own link to this one.
                        to = rows[near] if rows[near] != row else rows[index]
                        presence *= float(chance[row, to])
            device = view.crowd.device(name)
            found.append(
                Prospect(device=device.id, presence=presence, speed=device.flops_per_s / fastest)
            )
        # The most valuable ones: a placement of few copies needs no others.
        best = sorted(found, key=lambda p: (-p.presence * p.speed, p.device))[:HOLDERS]
        return tuple(sorted(best, key=lambda p: p.device))

    def _placed(
        self, outlook: Outlook, prospects: list[tuple[Prospect, ...]], horizon_s: float
    ) -> Placement:
        view = outlook.view
        ranges = []
        for stage, promised in zip(view.plan.stages, prospects, strict=True):
            size = copy_bytes(view.profile, stage.first_layer, stage.last_layer)
            standing = _standing(view, stage.first_layer)
            ranges.append(
                PlacementRange(
                    owner=stage.device,
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                    held_bytes=size * view.budget.held_versions,
                    wave_bytes=math.ceil(size * view.costs.changed_share),
                    prospects=tuple(
                        Prospect(
                            device=p.device,
                            presence=p.presence / self.stick,
                            speed=p.speed,
                        )
                        if standing and p.device not in standing
                        else p
                        for p in promised
                    ),
                    # A stage whose owner is sure to stay still counts a little.
                    weight=0.01 + 1 - outlook.stays(stage.device, horizon_s),
                )
            )
        return place(
            PlacementProblem(
                ranges=tuple(ranges),
                rooms=rooms(view.plan, view.profile, view.crowd, view.budget),
                groups=view.groups,
                copies=view.budget.copies,
                wave_bytes=view.budget.wave_bytes,
            ),
            exact_nodes=self.exact_nodes,
        )

    def _plan(
        self,
        view: PolicyView,
        placement: Placement,
        prospects: list[tuple[Prospect, ...]],
        interval: Interval,
        horizon_s: float,
    ) -> ReplicaPlan:
        ranges = []
        for stage, seats, promised in zip(
            view.plan.stages, placement.seats, prospects, strict=True
        ):
            by_device = {p.device: p for p in promised}
            ranges.append(
                ReplicaRange(
                    owner=stage.device,
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                    replicas=tuple(
                        Replica(
                            device=DeviceId(device),
                            interval_steps=interval.steps,
                            keep=keep,
                            why=(
                                f"there in {horizon_s:.0f} s with"
                                f" {by_device[DeviceId(device)].presence:.0%}, speed"
                                f" {by_device[DeviceId(device)].speed:.2f} of the fastest"
                                if device in by_device
                                else "has nothing of it yet, and may have to run it"
                            ),
                        )
                        for device, keep in seats
                    ),
                )
            )
        return ReplicaPlan(ranges=tuple(ranges), num_layers=view.plan.num_layers, policy=self.name)

    def _departure(self, outlook: Outlook, device: str) -> Departure | None:
        """When an owner goes: announced, or by losing a neighbour in the pipeline.

        Of two that drift apart, one leaves: the one that is less likely to stay with the others.
        """
        view = outlook.view
        found = [d for d in view.departures if d.device == device]
        devices = view.plan.devices
        index = devices.index(DeviceId(device))
        for near in (index - 1, index + 1):
            if not 0 <= near < len(devices):
                continue
            ends = outlook.link_ends(device, devices[near])
            if ends is None or ends.leaves_s == 0:
                continue
            company = [
                math.fsum(sorted(outlook.in_range(one, other, ends.leaves_s) for other in devices))
                for one in (device, devices[near])
            ]
            if (company[0], devices[near]) <= (company[1], device):
                found.append(ends)
        return min(found, key=lambda d: (d.leaves_s, d.sd_s), default=None)

    def _handovers(
        self,
        outlook: Outlook,
        departures: Mapping[str, Departure | None],
        prospects: list[tuple[Prospect, ...]],
        interval: Interval,
        ahead: Ahead | None,
    ) -> tuple[Handover, ...]:
        view, rule = outlook.view, self.handover
        if rule is None:
            return ()
        if self.chain is not None and ahead is not None:
            return planned_moves(view, self.chain, interval.seconds, ahead)
        costs = view.costs
        loss_s = costs.detect_s + costs.recovery_s + costs.replay_share * interval.seconds / 2
        taken: set[str] = set()
        made = []
        # The first to go is served first.
        order = sorted(
            range(len(view.plan.stages)),
            key=lambda i: (
                math.inf if (d := departures[view.plan.devices[i]]) is None else d.leaves_s,
                view.plan.devices[i],
            ),
        )
        for index in order:
            stage = view.plan.stages[index]
            departure = departures[stage.device]
            if departure is None or len(stage.devices) > 1:
                continue
            standing = next(
                (
                    h for h in view.handovers
                    if h.owner == stage.device and h.first_layer == stage.first_layer
                ),
                None,
            )  # fmt: skip
            targets = [
                target
                for promise in prospects[index]
                if promise.device not in taken
                and (target := self._target(outlook, index, promise)) is not None
            ]
            decided = decide_handover(
                departure,
                stage.first_layer,
                stage.last_layer,
                targets,
                rule=rule,
                step_s=costs.step_s,
                loss_s=loss_s,
                slowdown=costs.slowdown,
                standing=standing,
            )
            if decided is not None:
                taken.add(decided.target)
                made.append(decided)
        return tuple(sorted(made, key=lambda h: h.first_layer))

    def _target(self, outlook: Outlook, index: int, promise: Prospect) -> Target | None:
        """A device without a stage, in range, with room for the stage and what it hosts."""
        view = outlook.view
        stage, device = view.plan.stages[index], promise.device
        if device in view.plan.all_devices or promise.presence <= 0:
            return None
        hosted = (
            0
            if view.standing is None
            else hosted_bytes(
                view.standing, view.profile, device, versions=view.budget.held_versions
            )
        )
        need = stage_need(
            view.profile, view.plan, index, hosted_bytes=hosted,
            snapshots=view.budget.snapshots, log_steps=view.budget.log_steps,
        ).total_bytes  # fmt: skip
        if need > view.crowd.device(device).memory_bytes:
            return None
        size = copy_bytes(view.profile, stage.first_layer, stage.last_layer)
        has = any(holds(h, stage) for h in view.holdings if h.device == device)
        peers = [
            view.plan.stages[near].device
            for near in (index - 1, index + 1)
            if 0 <= near < len(view.plan.stages)
        ]
        stays = [
            ends for peer in peers if (ends := outlook.link_ends(device, peer)) is not None
        ] + [d for d in view.departures if d.device == device]
        return Target(
            device=device,
            lacks_bytes=math.ceil(size * view.costs.changed_share) if has else size,
            rate_bytes_per_s=outlook.rate_bytes_per_s(stage.device, device),
            stay=min(stays, key=lambda d: (d.leaves_s, d.sd_s), default=None),
            rank=promise.presence * promise.speed,
        )


def _ends(stage: Stage) -> tuple[int, int]:
    return stage.first_layer, stage.last_layer


def _standing(view: PolicyView, first_layer: int) -> tuple[str, ...]:
    if view.standing is None or first_layer >= view.standing.num_layers:
        return ()
    return view.standing.holders_of(first_layer)
