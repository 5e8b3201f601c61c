"""Coalition structures: which devices train one copy of the model together.

A value that any process can read. It knows nothing of why devices are together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import InvalidCoalitionError
from .crowd import Crowd, DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class CoalitionStructure:
    """A partition of devices into coalitions.

    Members are kept sorted by id and coalitions by their first member, so that equal structures
    compare equal however they were written down.
    """

    coalitions: tuple[tuple[DeviceId, ...], ...]
    _home: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.coalitions:
            raise InvalidCoalitionError("a coalition structure needs at least one coalition")
        if not all(self.coalitions):
            raise InvalidCoalitionError("a coalition needs at least one member")
        ordered = tuple(sorted(tuple(sorted(members)) for members in self.coalitions))
        home: dict[str, int] = {}
        for index, members in enumerate(ordered):
            for device in members:
                if device in home:
                    raise InvalidCoalitionError(
                        f"device {device!r} stands twice; each belongs to one coalition"
                    )
                home[device] = index
        object.__setattr__(self, "coalitions", ordered)
        object.__setattr__(self, "_home", home)

    @classmethod
    def of(cls, groups: Iterable[Iterable[str]]) -> CoalitionStructure:
        """From any groups of ids; empty groups are dropped.

        Example:
            >>> CoalitionStructure.of([["b", "a"], [], ["c"]]).coalitions
            (('a', 'b'), ('c',))
        """
        made = (tuple(DeviceId(device) for device in group) for group in groups)
        return cls(coalitions=tuple(group for group in made if group))

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """All members of all coalitions, sorted."""
        return tuple(sorted(device for members in self.coalitions for device in members))

    def __len__(self) -> int:
        return len(self.coalitions)

    def coalition_of(self, device: str) -> tuple[DeviceId, ...]:
        """The coalition that a device belongs to.

        Raises:
            InvalidCoalitionError: It is in none.
        """
        try:
            return self.coalitions[self._home[device]]
        except KeyError:
            raise InvalidCoalitionError(f"device {device!r} is in no coalition") from None

    def check(self, crowd: Crowd) -> None:
        """Refuses a structure that is not one of this crowd.

        Raises:
            InvalidCoalitionError: A device of the crowd is in no coalition, or a member is unknown.
        """
        known = {device.id for device in crowd.devices}
        unknown = sorted(set(self._home) - known)
        if unknown:
            raise InvalidCoalitionError(f"device {unknown[0]!r} is not in the crowd")
        missing = sorted(known - set(self._home))
        if missing:
            raise InvalidCoalitionError(
                f"device {missing[0]!r} is in no coalition; each device of the crowd needs one,"
                " if only its own"
            )
