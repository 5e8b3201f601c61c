"""What one run took, cause by cause. The causes add up to the time on the clock."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Cause = Literal[
    "useful", "redone", "waiting", "detection", "transfer", "restart", "switching", "overhead"
]
CAUSES: tuple[Cause, ...] = (
    "useful", "redone", "waiting", "detection", "transfer", "restart", "switching", "overhead",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run of one policy over one seed. Seconds of virtual time."""

    policy: str
    scenario: str
    seed: int
    finished: bool
    """False: given up at the limit; `elapsed_s` is then too small."""
    elapsed_s: float
    useful_s: float
    """Steps, when they were done for the first time."""
    redone_s: float
    """Steps that were cut off, replayed, or done again after a rollback."""
    waiting_s: float
    """No four devices there that could go on."""
    detection_s: float
    transfer_s: float
    """State on its way to those who take over, while all wait for it."""
    restart_s: float
    switching_s: float
    """Planned hand-overs: the rest of the state, and the restart."""
    overhead_s: float
    """Snapshots, and training slowed down by copies."""
    steps: int
    commits: int
    """Of steps, repeated ones included."""
    losses: int
    rollbacks: int
    replays: int
    restores: int
    """Recoveries that took a stage from the checkpoint at the server."""
    handovers: int
    """Stages moved as planned."""
    switches: int
    """Stops in which they were moved."""
    waves: int
    sent_bytes: int
    """Of copies and checkpoints."""

    @property
    def split(self) -> dict[str, float]:
        """Cause -> seconds."""
        return {cause: getattr(self, f"{cause}_s") for cause in CAUSES}


def counters() -> tuple[str, ...]:
    """The names of what is counted."""
    return tuple(f.name for f in fields(Outcome) if f.type == "int" and f.name != "seed")
