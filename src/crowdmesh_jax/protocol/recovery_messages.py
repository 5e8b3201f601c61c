"""Messages of losses, copies and restarts. `messages` has the others, and the plain form of all.

Chunk and Seal are made by the body that sends a copy, since only it knows bytes and checksums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan
from .common import OfEpoch, StepVerdict, Verdict
from .evidence import Copy, Direction, Evidence, LayerHolders, StepValues

# Fence, report, install -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence(OfEpoch):
    """Stop, keep everything, report; change nothing until the Install of `epoch` (R6)."""

    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(OfEpoch):
    """Answer to Fence. Attached: slots "verdict" of `evidence.verdicts`, in this order."""

    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Enlist(OfEpoch):
    """The Install of a member without a stage: a holder of copies, or a spare (R9)."""

    term: int
    base: int
    plan: PipelinePlan
    holders: tuple[LayerHolders, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    heartbeat_s: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictMade(OfEpoch):
    """A verdict that no survivor knew: stage 0 made it anew, or a copy's manifest has it. Attached:
    its slot "verdict"."""

    step: int
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictKnown(OfEpoch):
    """The verdict that members wait for, now in the journal. Attached: its slot "verdict"."""

    step: int
    verdict: Verdict


# Copies and logs --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a copy must be when it is whole."""

    leaves: int
    size_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(OfEpoch):
    """A piece of a copy, in order."""

    copy: Copy
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal(OfEpoch):
    """All chunks were sent."""

    copy: Copy
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(OfEpoch):
    """The sender holds this copy, whole: its own snapshot, or one that it keeps for another."""

    copy: Copy
    checksum: str = ""
    came_bytes: int = 0
    """Of it, what crossed the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch(OfEpoch):
    """Send me that copy: as Chunks and a Seal."""

    copy: Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLost(OfEpoch):
    """The copy that `device` said it had cannot be used: damaged on its disk, or whenever it comes.

    To the coordinator. An install that needs it is decided anew without it."""

    device: DeviceId
    copy: Copy
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLog(OfEpoch):
    """Send me what you sent across `cut` in `step`: as the Forwards or Backwards that they were."""

    direction: Direction
    cut: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard(OfEpoch):
    """The wave of `version` is in the journal: older copies and logs may go (R14)."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign(OfEpoch):
    """Other holders, within the epoch. The highest `seq` counts."""

    seq: int
    holders: tuple[LayerHolders, ...]


# The coordinator's restart ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """A coordinator of a new term takes over; lower terms are refused from now on."""

    run: str
    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached(OfEpoch):
    """Answer to Attach. `epoch` is the sender's active one."""

    term: int
    fence: int
    phase: str
    step: int
    """Steps that it has seen committed."""
    verdicts: tuple[StepVerdict, ...] = ()
    losses: tuple[StepValues, ...] = ()
