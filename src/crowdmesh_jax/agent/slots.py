"""The sets of arrays that an agent keeps by name: of frames that came, of what goes out, of logs.

What is sent once is freed then, unless it was logged: a neighbour may ask for it again. It knows
nothing of what the arrays mean.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..protocol.common import Slot
from .envelope import Group

SENT_ONCE = ("y", "dx", "parts", "state", "tied", "eval_y")


class Slots:
    """Slot -> arrays."""

    def __init__(self) -> None:
        self._groups: dict[Slot, Group] = {}
        self._logged: set[Slot] = set()

    def fill(self, slot: Slot, group: Group) -> None:
        """Files arrays; what was there goes."""
        self._groups[slot] = group

    def fill_all(self, slots: Iterable[Slot], groups: tuple[Group, ...]) -> None:
        """Files a frame's groups, in order; a slot without one is empty."""
        for index, slot in enumerate(slots):
            self._groups[slot] = groups[index] if index < len(groups) else {}

    def get(self, slot: Slot) -> Group:
        """Its arrays; none if nobody filled it."""
        return self._groups.get(slot, {})

    def take(self, slot: Slot) -> Group:
        """Its arrays, which are not kept any longer.

        Raises:
            KeyError: Nobody filled it.
        """
        return self._groups.pop(slot)

    def drop(self, slot: Slot) -> None:
        self._groups.pop(slot, None)

    def drop_unlogged(self, slot: Slot) -> None:
        """Frees it, unless a neighbour may ask for it again."""
        if slot not in self._logged:
            self._groups.pop(slot, None)

    def log(self, slots: Iterable[Slot]) -> None:
        """Keeps these beyond their sending."""
        self._logged.update(slots)

    def rewind(self, step: int) -> None:
        """Drops all of `step` and later but snapshots: those are of versions, and done."""
        self._free(slot for slot in self._groups if slot.step >= step and slot.kind != "state")

    def drop_logs(self, step: int) -> None:
        """Drops logged slots that steps below `step` need, and verdicts below `step` - 1. What was
        lent by a step is needed by the next one."""
        self._free(s for s in self._logged if s.step + (s.kind == "tied") < step)
        self._free(s for s in self._groups if s.kind == "verdict" and s.step < step - 1)

    def clear(self) -> None:
        self._groups.clear()
        self._logged.clear()

    @property
    def logged_bytes(self) -> int:
        """What logs hold."""
        return sum(int(array.nbytes) for slot in self._logged for array in self.get(slot).values())

    def _free(self, slots: Iterable[Slot]) -> None:
        for slot in list(slots):
            self._groups.pop(slot, None)
            self._logged.discard(slot)
