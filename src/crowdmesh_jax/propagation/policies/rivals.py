"""The rivals' rules: chain and central (FTPipeHD), next stage (Asteroid), one place, none.

No full text of the papers could be read for these; what is known, and from where, is in each
docstring, with the choices that were left open. All get the room, the heartbeats, the interval rule
and its tuning that `mobility` gets. Their rules know no hazards, so two copies may share one: the
replica report names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core import ReplicaPlan, ReplicaRange
from ...errors import InvalidValueError
from ..policy import PolicyDecision, PolicyView
from .common import Wanted, by_rule


@dataclass(frozen=True, slots=True, kw_only=True)
class NonePolicy:
    """No copies: a loss goes back to the newest checkpoint. What everything is compared with."""

    name: str = "none"

    def decide(self, view: PolicyView) -> PolicyDecision:
        """Nothing."""
        plan = view.plan
        return PolicyDecision(
            replicas=ReplicaPlan(
                ranges=tuple(
                    ReplicaRange(owner=s.device, first_layer=s.first_layer, last_layer=s.last_layer)
                    for s in plan.stages
                ),
                num_layers=plan.num_layers,
                policy=self.name,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CentralPolicy:
    """All layers to one place, at one interval: a checkpoint server.

    Left open, and chosen here: the place is `device`; else the device with the lowest leave hazard,
    one without a stage before others, then the largest memory, then the id. The layers that it owns
    itself have no second copy. The interval is Young's and Daly's, as for all.
    """

    name: str = "central"
    device: str | None = None
    interval_scale: float = 1.0

    def decide(self, view: PolicyView) -> PolicyDecision:
        """Copies of every range at the one place."""
        place = self.device
        if place is None:
            owners = set(view.plan.all_devices)
            place = min(
                view.crowd.devices,
                key=lambda d: (
                    not view.is_present(d.id), d.leave_hazard_per_s, d.id in owners,
                    -d.memory_bytes, d.id,
                ),
            ).id  # fmt: skip
        view.crowd.device(place)
        want = Wanted(place, lambda steps: steps, "the one place")
        replicas, unprotected, notes = by_rule(
            view, self.name, lambda _: [want], scale=self.interval_scale
        )
        return PolicyDecision(
            replicas=replicas,
            unprotected=unprotected,
            notes=notes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourPolicy:
    """FTPipeHD (arXiv 2110.02781; TMC 2023): chain replication, and global to the central node.

    Each worker's layers go to the next worker, the last one's to the central node; at a longer
    interval all go to the central node. The rule is from code that the authors name (Confidant's
    repository, adapted from FTPipeHD), where it is never called; there the intervals are 100 and
    200 batches, by the paper (from memory, unverified) 50 and 100.

    Left open, and chosen here, for its benefit: the intervals are tuned (`chain_steps=None`:
    Young's and Daly's rule with the loss rate learned from heartbeats), the global one being
    `global_times` the chain's; the central node is the device of stage 0, which holds the data, or
    `central`; whole states are copied, not weights only, or no run could go on exactly. After a
    loss it cuts anew with its own planner, on the spot; a run here takes plans made ahead.
    """

    name: str = "neighbour"
    chain_steps: int | None = None
    global_steps: int | None = None
    global_times: int = 2
    central: str | None = None
    interval_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("chain_steps", "global_steps", "global_times"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidValueError(f"policy {self.name!r}: {name} must be >= 1, got {value}")

    def decide(self, view: PolicyView) -> PolicyDecision:
        """Chain, then central."""
        central = self.central or view.plan.devices[0]
        view.crowd.device(central)
        devices = view.plan.devices

        def chain(steps: int) -> int:
            return self.chain_steps or steps

        def all_to_central(steps: int) -> int:
            return self.global_steps or self.global_times * chain(steps)

        def rule(index: int) -> Sequence[Wanted]:
            last = index == len(devices) - 1
            to = central if last else devices[index + 1]
            why = "last stage's to the central node" if last else "the next stage"
            return [
                Wanted(to, chain, f"chain: {why}"),
                Wanted(central, all_to_central, "global: the central node"),
            ]

        replicas, unprotected, notes = by_rule(view, self.name, rule, scale=self.interval_scale)
        return PolicyDecision(
            replicas=replicas,
            unprotected=unprotected,
            notes=notes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStagePolicy:
    """Asteroid (MobiCom 2024, arXiv 2408.08015): replication by topology.

    A stage of several devices is its own backup; a stage of one device copies to the next stage,
    the last to the first. On a loss the lost layers move to the neighbours in proportion to
    compute, without planning anew ("spread"). Known from re-implementations only.

    Left open, and chosen here: the interval (unpublished) is tuned as for all; of a next stage of
    several devices the first holds the copy; the split goes by the devices' flops_per_s.
    """

    name: str = "next_stage"
    interval_steps: int | None = None
    interval_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.interval_steps is not None and self.interval_steps < 1:
            raise InvalidValueError(
                f"policy {self.name!r}: interval_steps must be >= 1, got {self.interval_steps}"
            )

    def decide(self, view: PolicyView) -> PolicyDecision:
        """To the next stage."""
        stages = view.plan.stages

        def rule(index: int) -> Sequence[Wanted]:
            if len(stages[index].devices) > 1:
                return []
            after = (index + 1) % len(stages)
            return [
                Wanted(
                    stages[after].device,
                    lambda steps: self.interval_steps or steps,
                    f"stage {after} backs up stage {index}",
                )
            ]

        replicas, unprotected, notes = by_rule(view, self.name, rule, scale=self.interval_scale)
        return PolicyDecision(
            replicas=replicas,
            unprotected=unprotected,
            notes=notes,
        )
