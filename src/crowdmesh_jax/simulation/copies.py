"""Who holds which version of which stage. A device is a row number, the server the row after all.

Two kinds of copies: *versions*, complete copies that a recovery may start from, and *old bytes*: a
device that ever held a stage has bytes that have not changed since, so that it needs the changed
share only. It knows no time and no policy.
"""

from __future__ import annotations

from collections.abc import Iterable


class Copies:
    """Copies of all stages."""

    def __init__(self, stages: int) -> None:
        self.versions: list[dict[int, set[int]]] = [{} for _ in range(stages)]
        self.old_bytes: list[set[int]] = [set() for _ in range(stages)]

    def add(self, stage: int, device: int, version: int) -> None:
        self.versions[stage].setdefault(device, set()).add(version)
        self.old_bytes[stage].add(device)

    def holds(self, stage: int, device: int, version: int) -> bool:
        return version in self.versions[stage].get(device, ())

    def wipe(self, device: int) -> None:
        """The device lost all that it held."""
        for stage, held in enumerate(self.versions):
            held.pop(device, None)
            self.old_bytes[stage].discard(device)

    def discard(self, stage: int, device: int, below: int, keep: int) -> None:
        """Drops versions before `below`, but not `keep`, the newest checkpoint's."""
        held = self.versions[stage].get(device)
        if held:
            held -= {version for version in held if version < below and version != keep}

    def keep_newest(self, stage: int, device: int, keep: int) -> None:
        """Drops all but the newest version there, and `keep`."""
        held = self.versions[stage].get(device)
        if held:
            newest = max(held)
            held -= {version for version in held if version not in (newest, keep)}

    def drop_after(self, version: int) -> None:
        """After a rollback nothing beyond its base is valid."""
        for held in self.versions:
            for own in held.values():
                own -= {each for each in own if each > version}

    def sources(self, stage: int, version: int, usable: Iterable[int]) -> list[int]:
        """Devices among `usable` that hold that version, in order."""
        held = self.versions[stage]
        return [device for device in sorted(usable) if version in held.get(device, ())]

    def common(self, stages: Iterable[int], usable: set[int], *, least: int = -1) -> int | None:
        """The newest version, at least `least`, of which every one of the stages has a copy at one
        of the usable devices; None: there is none."""
        found: set[int] | None = None
        for stage in stages:
            versions: set[int] = set()
            for device, own in self.versions[stage].items():
                if device in usable:
                    versions |= own
            found = versions if found is None else found & versions
        newest = max((v for v in found or () if v >= least), default=None)
        return newest
