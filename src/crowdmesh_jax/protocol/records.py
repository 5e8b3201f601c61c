"""What the coordinator journals, before it acts on it (I11), and its plain form.

The journal is the run's memory: read from the start, the records say what was promised. Knows
nothing of files; `Journal` actions say which records must be on disk before the next action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core import values
from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan
from ..errors import CrowdMeshError, FormatError
from .common import Fault, Verdict
from .decision import StageAction
from .evidence import LayerHolders
from .judgement import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A coordinator started."""

    run: str
    term: int
    config_sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """A new epoch was opened; `lost` are the devices it leaves out."""

    epoch: int
    lost: tuple[DeviceId, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """From which version, and under which plan, the epoch goes on."""

    epoch: int
    base: int
    plan: PipelinePlan
    steps: int
    crew: tuple[DeviceId, ...] = ()
    """All members of the epoch, with and without a stage; (): those of the plan."""
    holders: tuple[LayerHolders, ...] = ()
    actions: tuple[StageAction, ...] = ()
    """What becomes of each stage; (): all are restored from the checkpoint of `base`."""
    runs: tuple[Run, ...] = ()
    is_rollback: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictDecided:
    """The verdict of a step that no survivor knew, made anew; all who wait get this one."""

    epoch: int
    step: int
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class MembersMeasured:
    """Seconds per program, measured alone: device -> program -> seconds."""

    seconds: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Everyone was Ready; Resume follows."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted:
    """A step was Done. Need not be on disk at once."""

    step: int
    verdict: Verdict
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation at `version` came to. Need not be on disk at once."""

    version: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best version so far is kept, whole, beside the checkpoints."""

    version: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Every layer's state at `version` is safe: with its owner and the holders, or on disk."""

    epoch: int
    version: int
    ledger: tuple[LayerHolders, ...] = ()
    """Who has which layers, owners first; (): the coordinator's disk has all, with a manifest."""
    sent_bytes: int = 0
    """What crossed the wire for it: holders ask only for what they have not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """Other holders from here on, in the same epoch."""

    epoch: int
    number: int
    """Of this Assign within the epoch."""
    holders: tuple[LayerHolders, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The run reached its last version and the result is safe."""

    version: int
    reason: str = ""
    """Why it ended before the last step, where the user's code asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Halted:
    """The run ended early."""

    committed: int
    """Steps committed."""
    fault: Fault


Record = (
    Term | Epoch | Decision | MembersMeasured | Resumed | StepCommitted | Evaluation | Best | Wave
    | Finish | Halted | VerdictDecided | Assigned
)  # fmt: skip
RECORDS: tuple[type, ...] = (
    Term, Epoch, Decision, MembersMeasured, Resumed, StepCommitted, Evaluation, Best, Wave, Finish,
    Halted, VerdictDecided, Assigned,
)  # fmt: skip
JOURNAL_FIELDS = ("seq", "at_s")
"""What a journal adds to a record: its number, and when it was written (Unix time)."""
_BY_KIND = {cls.__name__: cls for cls in RECORDS}


def record_to_plain(record: Record) -> dict[str, Any]:
    """The record as dicts, lists and scalars; "kind" is its class name."""
    return {"kind": type(record).__name__, **values.to_plain(record)}


def record_from_plain(plain: Any) -> Record:
    """Reads what `record_to_plain` made, with or without the journal's own fields.

    Raises:
        FormatError: Not a record, of unknown kind, or with unknown, missing or bad fields.
    """
    kind = plain.get("kind") if isinstance(plain, Mapping) else None
    cls = _BY_KIND.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise FormatError(
            f"record: unknown kind {str(kind)[:40]!r}; known: {', '.join(sorted(_BY_KIND))}"
        )
    fields = {name: item for name, item in plain.items() if name not in ("kind", *JOURNAL_FIELDS)}
    try:
        return values.from_plain(cls, fields, cls.__name__)
    except FormatError:
        raise
    except CrowdMeshError as exc:
        raise FormatError(f"{cls.__name__}: {exc.message}") from exc
