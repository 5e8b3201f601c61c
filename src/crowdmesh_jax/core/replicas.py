"""Replica plans: who keeps a second copy of which layers, how often it is refreshed, and why.

A value that any process can read, beside `PipelinePlan`. It knows nothing of versions, of what is
held at the moment, or of how holders were chosen (`propagation/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidPlanError
from .crowd import DeviceId

Keep = Literal["memory", "disk"]
"""Where a holder keeps its copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One wanted copy of a range of layers."""

    device: DeviceId
    """The holder."""
    interval_steps: int
    """Steps from one refresh to the next."""
    keep: Keep = "memory"
    why: str = ""
    """One line for people: why this device."""

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise InvalidPlanError(
                f"replica at {self.device!r}: interval_steps must be >= 1,"
                f" got {self.interval_steps}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRange:
    """Layers `first_layer .. last_layer` (both inside) of one owner, and their copies."""

    owner: DeviceId
    first_layer: int
    last_layer: int
    replicas: tuple[Replica, ...] = ()
    """(): these layers exist once only."""

    def __post_init__(self) -> None:
        who = f"replicas of layers {self.first_layer}-{self.last_layer} ({self.owner})"
        if not 0 <= self.first_layer <= self.last_layer:
            raise InvalidPlanError(f"{who}: they hold no layer")
        holders = [replica.device for replica in self.replicas]
        if len(set(holders)) != len(holders):
            twice = next(device for device in holders if holders.count(device) > 1)
            raise InvalidPlanError(f"{who}: {twice!r} holds two copies; one is lost with the other")
        if self.owner in holders:
            raise InvalidPlanError(f"{who}: the owner is named as holder of its own copy")

    @property
    def holders(self) -> tuple[DeviceId, ...]:
        return tuple(replica.device for replica in self.replicas)

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """The copies that a policy wants of all `num_layers` layers, range by range."""

    ranges: tuple[ReplicaRange, ...]
    """Consecutive: each layer is in exactly one, whether it has copies or not."""
    num_layers: int
    policy: str = ""
    """The name of the policy that made it."""

    def __post_init__(self) -> None:
        expected = 0
        for item in self.ranges:
            if item.first_layer != expected:
                raise InvalidPlanError(
                    f"replicas of layers {item.first_layer}-{item.last_layer} ({item.owner}):"
                    f" expected to start at layer {expected}"
                )
            expected = item.last_layer + 1
        if expected != self.num_layers:
            raise InvalidPlanError(
                f"replica ranges end before layer {expected}, the plan has {self.num_layers} layers"
            )

    @property
    def unprotected(self) -> tuple[ReplicaRange, ...]:
        """Ranges without any copy."""
        return tuple(item for item in self.ranges if not item.replicas)

    @property
    def interval_steps(self) -> int | None:
        """Steps between waves: the shortest interval of any copy; None where there is none."""
        return min((r.interval_steps for i in self.ranges for r in i.replicas), default=None)

    def holders_of(self, layer: int) -> tuple[DeviceId, ...]:
        """Who is to hold a copy of that layer.

        Raises:
            InvalidPlanError: No such layer.
        """
        for item in self.ranges:
            if layer in item.layers:
                return item.holders
        raise InvalidPlanError(f"layer {layer} is outside 0..{self.num_layers - 1}")

    def held_by(self, device: str) -> tuple[ReplicaRange, ...]:
        """Ranges of which that device is to hold a copy."""
        return tuple(item for item in self.ranges if device in item.holders)
