"""Devices, links and the crowd they form: what the planner knows of the machines.

Knows nothing of models, plans or sockets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NewType, get_args

from ..errors import InvalidCrowdError
from . import values

DeviceId = NewType("DeviceId", str)

Medium = Literal["full_duplex", "half_duplex", "shared_cell"]
"""What transfers share: nothing, the two directions of a link, or the air of a radio cell."""

LOOPBACK_BYTES_PER_S = 1.0e9
LOOPBACK_LATENCY_S = 7.0e-4
"""What a frame takes from one agent's compute thread to another's on the same machine: gRPC, event
loops, threads. Measured (`round_trip` of a run's prediction); a real network adds its own."""
LOCAL_FLOPS_PER_S = 1.0e10
LOCAL_MEMORY_BYTES = 4 * 2**30


def _check(who: str, name: str, value: float, *, zero_ok: bool = False) -> None:
    fine = math.isfinite(value) and (value > 0 or (zero_ok and value == 0))
    if not fine:
        bound = ">= 0" if zero_ok else "> 0"
        raise InvalidCrowdError(f"{who}: {name} must be finite and {bound}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a device reaches the others through an access point or a base station.

    From `a` to `b` goes up from `a` and down to `b`: the slower of the two rates, both latencies.
    Between cells the crowd's `backhaul` comes in, if it has one. Under the crowd's medium
    `shared_cell` both ways take turns within a cell, see `Crowd`.
    """

    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    latency_s: float = 0.0
    """One way between the device and its access point."""
    cell: str = ""
    """Access point or base station; devices of one cell may share its air. "": none known."""

    def __post_init__(self) -> None:
        _check("access", "uplink_bytes_per_s", self.uplink_bytes_per_s)
        _check("access", "downlink_bytes_per_s", self.downlink_bytes_per_s)
        _check("access", "latency_s", self.latency_s, zero_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One machine of the crowd, as the planner sees it."""

    id: DeviceId
    flops_per_s: float = LOCAL_FLOPS_PER_S
    """Measured in float32, not the data sheet's figure."""
    memory_bytes: int = LOCAL_MEMORY_BYTES
    """Left for training once the system and the runtime have theirs."""
    speed: float = 1.0
    """Emulated speed: 1 runs at the machine's own pace, 0.25 four times slower. Real boards: 1."""
    address: str | None = None
    """`host:port` where its agent listens; None for agents that a launcher starts."""
    access: Access | None = None
    """Its way to every device that has one too; None: links are given pair by pair."""
    label_counts: tuple[int, ...] = ()
    """Rows of data that it holds, per class; (): it holds none, or nobody knows."""
    leave_hazard_per_s: float = 0.0
    """Rate at which it is expected to leave: 1 / mean seconds that it stays."""
    position_m: tuple[float, float] | None = None
    """Where it is, in metres, if known."""

    def __post_init__(self) -> None:
        if not self.id or len(self.id) > 64 or not self.id.isprintable():
            raise InvalidCrowdError(
                f"device id must have 1-64 printable characters, got {self.id!r}"
            )
        who = f"device {self.id!r}"
        _check(who, "flops_per_s", self.flops_per_s)
        _check(who, "memory_bytes", self.memory_bytes)
        _check(who, "speed", self.speed)
        _check(who, "leave_hazard_per_s", self.leave_hazard_per_s, zero_ok=True)
        if any(count < 0 for count in self.label_counts):
            raise InvalidCrowdError(f"{who}: label_counts must be >= 0, got {self.label_counts}")
        if self.position_m is not None:
            for coordinate in self.position_m:
                if not math.isfinite(coordinate):
                    raise InvalidCrowdError(f"{who}: position_m must be finite, got {coordinate}")

    @property
    def rows(self) -> int:
        """Rows of data that it holds."""
        return sum(self.label_counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A one-way link. A transfer of `n` bytes takes `latency_s + n / bandwidth_bytes_per_s`."""

    source: DeviceId
    target: DeviceId
    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        who = f"link {self.source!r} -> {self.target!r}"
        if self.source == self.target:
            raise InvalidCrowdError(f"{who}: a device needs no link to itself")
        _check(who, "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        _check(who, "latency_s", self.latency_s, zero_ok=True)

    def transfer_s(self, size_bytes: float) -> float:
        """Seconds from the first byte sent to the last byte received."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultLink:
    """What joins each pair that no `Link` names."""

    bandwidth_bytes_per_s: float = LOOPBACK_BYTES_PER_S
    latency_s: float = LOOPBACK_LATENCY_S

    def __post_init__(self) -> None:
        _check("default_link", "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        _check("default_link", "latency_s", self.latency_s, zero_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backhaul:
    """What lies between two cells: devices of different `Access.cell` go through it, too."""

    bandwidth_bytes_per_s: float
    """For each pair by itself; cuts that cross it at the same time are not added up."""
    latency_s: float = 0.0
    """On top of both devices' own."""

    def __post_init__(self) -> None:
        _check("backhaul", "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        _check("backhaul", "latency_s", self.latency_s, zero_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """A set of devices and the directed links between them.

    Pairs without a link of their own go through both devices' `access` (and through `backhaul`,
    where there is one and their cells differ), else use `default_link`; with `default_link=None`
    they cannot talk.

    **Medium.** `full_duplex`: each direction of each link is its own. `half_duplex`: both
    directions of a link share its time. `shared_cell`: all transfers of the devices of one
    `Access.cell` share the cell's air, one at a time. Within a cell the access point repeats what
    it hears, so a transfer has the air for its way up and its way down, one after the other:
    `n / up + n / down`. Between cells it streams at the slowest rate of its way and has the air of
    both cells while it does. Devices without a cell, and pairs with a link of their own, share
    nothing. It is the planner's view: emulated links do not share.
    """

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    default_link: DefaultLink | None = None
    backhaul: Backhaul | None = None
    """None: nothing between the cells is slower than the devices' own access."""
    medium: Medium = "full_duplex"
    """What transfers share; see the class."""
    _by_id: dict[str, Device] = field(init=False, repr=False, compare=False)
    _by_pair: dict[tuple[str, str], Link] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.medium not in get_args(Medium):
            raise InvalidCrowdError(
                f"medium must be one of {', '.join(get_args(Medium))}, got {self.medium!r}"
            )
        by_id = {device.id: device for device in self.devices}
        if not self.devices:
            raise InvalidCrowdError("a crowd needs at least one device")
        if len(by_id) != len(self.devices):
            ids = [device.id for device in self.devices]
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise InvalidCrowdError(f"device ids must differ; {twice[0]!r} stands twice")
        by_pair: dict[tuple[str, str], Link] = {}
        for link in self.links:
            for end in (link.source, link.target):
                if end not in by_id:
                    raise InvalidCrowdError(
                        f"link {link.source!r} -> {link.target!r}: no device {end!r};"
                        f" known: {', '.join(sorted(by_id))}"
                    )
            if (link.source, link.target) in by_pair:
                raise InvalidCrowdError(f"link {link.source!r} -> {link.target!r} stands twice")
            by_pair[link.source, link.target] = link
        object.__setattr__(self, "_by_id", by_id)
        object.__setattr__(self, "_by_pair", by_pair)

    @classmethod
    def local(
        cls,
        speeds: Sequence[float] = (1.0, 1.0),
        *,
        memory_bytes: int = LOCAL_MEMORY_BYTES,
        bandwidth_bytes_per_s: float = LOOPBACK_BYTES_PER_S,
        latency_s: float = LOOPBACK_LATENCY_S,
        flops_per_s: float = LOCAL_FLOPS_PER_S,
    ) -> Crowd:
        """Devices `device-0`, `device-1`, ... on this machine, with emulated speeds.

        Args:
            speeds: One per device, relative to the first-class one at 1.0.
            flops_per_s: Of a device at speed 1; `profile` replaces it by a measured figure.

        Example:
            >>> crowd = Crowd.local((1.0, 0.5))
            >>> [(device.id, device.speed) for device in crowd.devices]
            [('device-0', 1.0), ('device-1', 0.5)]
        """
        devices = tuple(
            Device(
                id=DeviceId(f"device-{i}"),
                flops_per_s=flops_per_s * speed,
                memory_bytes=memory_bytes,
                speed=float(speed),
            )
            for i, speed in enumerate(speeds)
        )
        link = DefaultLink(bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=latency_s)
        return cls(devices=devices, default_link=link)

    @classmethod
    def load(cls, path: str | Path) -> Crowd:
        """Reads a crowd from a TOML or JSON file.

        Raises:
            FormatError: The file is missing or is no crowd; names the path of the field.
            InvalidCrowdError: A value is out of range.
        """
        return values.load(cls, path)

    def device(self, device_id: str) -> Device:
        """The device of that id.

        Raises:
            InvalidCrowdError: There is none; names those there are.
        """
        try:
            return self._by_id[device_id]
        except KeyError:
            known = ", ".join(sorted(self._by_id))
            raise InvalidCrowdError(
                f"no device {device_id!r} in the crowd; known: {known}"
            ) from None

    def only(self, device_ids: Iterable[str]) -> Crowd:
        """The crowd of these devices, in this crowd's order, with their links.

        Raises:
            InvalidCrowdError: One is not in the crowd, or none is named.
        """
        kept = {self.device(device_id).id for device_id in device_ids}
        return replace(
            self,
            devices=tuple(device for device in self.devices if device.id in kept),
            links=tuple(k for k in self.links if k.source in kept and k.target in kept),
        )

    def link(self, source: str, target: str) -> Link | None:
        """The link from `source` to `target`; None where they cannot talk."""
        for end in (source, target):
            self.device(end)
        if (source, target) in self._by_pair:
            return self._by_pair[source, target]
        if source == target:
            return None
        up, down = self._by_id[source].access, self._by_id[target].access
        if up is not None and down is not None:
            bandwidth_bytes_per_s = min(up.uplink_bytes_per_s, down.downlink_bytes_per_s)
            if self.medium == "shared_cell" and up.cell and up.cell == down.cell:
                bandwidth_bytes_per_s = 1 / (
                    1 / up.uplink_bytes_per_s + 1 / down.downlink_bytes_per_s
                )
            latency_s = up.latency_s + down.latency_s
            if self.backhaul is not None and up.cell != down.cell:
                bandwidth_bytes_per_s = min(
                    bandwidth_bytes_per_s, self.backhaul.bandwidth_bytes_per_s
                )
                latency_s += self.backhaul.latency_s
            return Link(
                source=DeviceId(source),
                target=DeviceId(target),
                bandwidth_bytes_per_s=bandwidth_bytes_per_s,
                latency_s=latency_s,
            )
        if self.default_link is None:
            return None
        return Link(
            source=DeviceId(source),
            target=DeviceId(target),
            bandwidth_bytes_per_s=self.default_link.bandwidth_bytes_per_s,
            latency_s=self.default_link.latency_s,
        )

    def channels(self, source: str, target: str) -> tuple[str, ...]:
        """What a transfer from `source` to `target` has for itself while it lasts.

        Transfers with a channel in common take turns. (): it shares nothing.
        """
        if self.medium == "half_duplex":
            return (" - ".join(sorted((source, target))),)
        if self.medium == "full_duplex" or (source, target) in self._by_pair:
            return ()
        ends = (self.device(source).access, self.device(target).access)
        if None in ends:
            return ()
        cells = {access.cell for access in ends if access is not None and access.cell}
        return tuple(f"cell {cell}" for cell in sorted(cells))
