"""A stage's manifest and the bytes of its programs. Knows nothing of what the programs do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .manifest import StageManifest


@dataclass(frozen=True, slots=True)
class StageBundle:
    """Everything that a device needs to run a stage, but for the arrays."""

    manifest: StageManifest
    programs: Mapping[str, bytes]
    """Program name -> serialized export."""

    @property
    def size_bytes(self) -> int:
        return sum(len(data) for data in self.programs.values())
