"""Hazard groups: which devices one event takes together.

A device is a group of its own. Devices of one cell, vehicle, walking group or power socket are lost
at once when that goes; two copies in one such group are one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..core import Crowd
from ..errors import InvalidValueError


@dataclass(frozen=True, slots=True, kw_only=True)
class HazardGroups:
    """Name of a group ("cell A", "vehicle 7") -> its devices. A device may be in several."""

    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    common: tuple[str, ...] = ()
    """Groups that hold the whole crowd: no placement escapes them, so they exclude nobody. The
    replica report names them."""
    _of_device: Mapping[str, frozenset[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, devices in self.members.items():
            if not name or name.startswith("device "):
                raise InvalidValueError(
                    f"hazard group {name!r}: a name is needed, and not 'device ...':"
                    " each device is a group of that name already"
                )
            if len(set(devices)) != len(devices):
                raise InvalidValueError(f"hazard group {name!r} names a device twice: {devices}")
        names: dict[str, set[str]] = {}
        for name, devices in self.members.items():
            for device in devices:
                names.setdefault(device, {f"device {device}"}).add(name)
        object.__setattr__(self, "_of_device", {d: frozenset(own) for d, own in names.items()})

    @classmethod
    def of(
        cls,
        crowd: Crowd,
        more: Mapping[str, Iterable[str]] | None = None,
        *,
        cells: bool = True,
    ) -> HazardGroups:
        """The groups of a crowd: its cells, and those that the caller knows.

        Args:
            more: Name -> devices: vehicles, power, walking groups.
            cells: Whether a cell (`Access.cell`) is a hazard.

        Raises:
            InvalidCrowdError: A group names a device that is not in the crowd.
        """
        found: dict[str, set[str]] = {}
        if cells:
            for device in crowd.devices:
                if device.access is not None and device.access.cell:
                    found.setdefault(f"cell {device.access.cell}", set()).add(device.id)
        for name, devices in (more or {}).items():
            found.setdefault(name, set()).update(crowd.device(d).id for d in devices)
        everyone = {device.id for device in crowd.devices}
        common = sorted(name for name, devices in found.items() if devices == everyone)
        return cls(
            members={
                name: tuple(sorted(found[name])) for name in sorted(found) if name not in common
            },
            common=tuple(common),
        )

    def names_of(self, device: str) -> frozenset[str]:
        """All groups of a device, its own included."""
        return self._of_device.get(device) or frozenset((f"device {device}",))

    def together(self, one: str, other: str) -> frozenset[str]:
        """Hazards that take both."""
        return self.names_of(one) & self.names_of(other)

    def apart(self, devices: Sequence[str]) -> bool:
        """Whether no hazard takes two of them; the same device twice is not apart."""
        seen: set[str] = set()
        for device in devices:
            names = self.names_of(device)
            if seen & names:
                return False
            seen |= names
        return True
