"""All messages between members and the coordinator, and their plain (JSON-able) form.

The words are those of docs/protocol: run, term, epoch, step, version, cut. A message says nothing
about arrays: which ones travel with it is said by the `attach` of the action that sends it, and by
the `Keep` action where it arrives. Reading is strict: an unknown kind or field is a FormatError.

    lane       messages
    pipeline   Forward, Backward, Commit, Tied, EvalForward, EvalTaken (neighbours in the plan only)
    control    all others, StaleEpoch among them
    bulk       Install, StageState, Chunk, Seal (arrays of a whole stage)

Those of losses, copies and restarts stand in `recovery_messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..core import values
from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan
from ..core.schedule import Op
from ..errors import CrowdMeshError, FormatError
from .common import (
    EvaluationPlan,
    Fault,
    Mark,
    NonFinitePolicy,
    OfEpoch,
    Parts,
    StepVerdict,
    Tie,
    Verdict,
)
from .evidence import LayerHolders, Source
from .recovery_messages import (
    Assign,
    Attach,
    Attached,
    Chunk,
    CopyLost,
    Discard,
    Enlist,
    Fence,
    Fetch,
    FetchLog,
    Report,
    Seal,
    Stored,
    VerdictKnown,
    VerdictMade,
)

# Pipeline -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(OfEpoch):
    """F: the activation of a microbatch crosses `cut` (the boundary before that layer)."""

    step: int
    microbatch: int
    cut: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward(OfEpoch):
    """B: its cotangent comes back; sent even where it has no leaves (the commit point needs it)."""

    step: int
    microbatch: int
    cut: int
    parts: Parts | None = None
    """On the step's last B only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(OfEpoch):
    """Step `step` is committed: pass on first, then apply (R2)."""

    step: int
    verdict: Verdict
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tied(OfEpoch):
    """The value, at version `step` + 1, of the leaves that `layer` lends; follows the Commit."""

    step: int
    layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalForward(OfEpoch):
    """The activation of an evaluation microbatch at `version` crosses `cut`."""

    version: int
    microbatch: int
    cut: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalTaken(OfEpoch):
    """The sender is done with that EvalForward: its upstream may send one more."""

    version: int
    microbatch: int
    cut: int


# Coordinator to member ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Install(OfEpoch):
    """Grants the epoch: this stage, from version `base`, with these neighbours."""

    term: int
    base: int
    plan: PipelinePlan
    stage: int
    ops: tuple[Op, ...]
    """The stage's schedule of a step. Sent, not looked up: an agent has no schedule plug-ins."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Device id -> address of each member that listens."""
    ties: tuple[Tie, ...] = ()
    on_nonfinite: NonFinitePolicy = NonFinitePolicy.HALT
    evaluation: EvaluationPlan | None = None
    """When stage 0 puts the evaluate mark into a Commit, and how many microbatches follow it."""
    heartbeat_s: float = 0.5
    action: Literal["keep", "apply", "restore"] = "restore"
    """What becomes of the stage's state: it stays, at `base`; the gradient held leads there; or it
    is loaded from copies."""
    state_version: int | None = None
    """Of the copies; below `base` the stage replays. None: `base`."""
    sources: tuple[Source, ...] = ()
    """Of "restore": copies to fetch, or to take if they are held here; (): the frame brings all."""
    verdicts: tuple[StepVerdict, ...] = ()
    """Known ones of steps to replay or apply; their arrays follow "install"'s in the frame."""
    resend_ties: bool = False
    """Owners lend their leaves anew when the epoch starts: some borrowers may have old values."""
    holders: tuple[LayerHolders, ...] = ()
    """Who keeps copies of which layers."""
    log_steps: int | None = None
    """Boundary logs reach so many steps back (R17). None: a loss ends the run, no logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure(OfEpoch):
    """Time the stage's programs, alone: no other member computes meanwhile."""

    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(OfEpoch):
    """Every member is Ready: go. The commit of step `steps` - 1 carries the finish mark."""

    steps: int
    marks: tuple[Mark, ...] = ()
    """Carried out at `base` before any step, as if the Commit that led there had brought them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskMarks(OfEpoch):
    """Asks stage 0 to put these marks into its next Commit (R4)."""

    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(OfEpoch):
    """The result is safe: unload, wait for another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt(OfEpoch):
    """The run ended early: unload, wait for another run."""

    fault: Fault


# Member to coordinator ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A device offers itself. Said first on a new channel; its sender is the transport's word."""

    address: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)
    """`memory_bytes`, `cores`, `flops_per_s`, `speed`: what it knows of itself."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """`jax`, `calling_convention`, ...: which programs it can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(OfEpoch):
    """The stage is loaded, compiled, joined to its neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(OfEpoch):
    """Answer to Measure."""

    seconds: Mapping[str, float]
    """Program ("forward", "backward", "update", ...) -> seconds of one call; and `ROUND_TRIP`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(OfEpoch):
    """Stage 0 committed a step."""

    step: int
    verdict: Verdict
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss(OfEpoch):
    """The last stage's loss and metrics of a step; shown once the step is Done."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(OfEpoch):
    """The last stage's loss and metrics over all evaluation microbatches, at `version`."""

    version: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState(OfEpoch):
    """A shard of a wave: the stage's state at `version`, arrays attached."""

    version: int
    first_layer: int
    last_layer: int
    is_final: bool = False
    """Made for the finish mark: the run's result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Whom a member waits for, and for what."""

    device: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(OfEpoch):
    """Alive, and how far."""

    phase: str
    version: int
    completed_ops: int
    waiting: Waiting | None = None
    """None: it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect(OfEpoch):
    """The sender's channel to a neighbour broke."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Error(OfEpoch):
    """The sender cannot go on."""

    fault: Fault


# Either way -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleEpoch:
    """Your message was of an epoch that is over here; it was dropped (R7)."""

    run: str
    epoch: int
    """Of the message that was dropped."""
    active: int
    """The sender's own."""


PipelineMessage = Forward | Backward | Commit | Tied | EvalForward | EvalTaken
Message = (
    Forward | Backward | Commit | Tied | EvalForward | EvalTaken
    | Install | Measure | Resume | AskMarks | Release | Halt
    | Hello | Ready | Measured | Done | Loss | Evaluated | StageState | Heartbeat | Suspect | Error
    | StaleEpoch
    | Fence | Report | Enlist | VerdictMade | VerdictKnown | Chunk | Seal | Stored | Fetch
    | FetchLog | Discard | Assign | Attach | Attached | CopyLost
)  # fmt: skip

MESSAGES: tuple[type, ...] = (
    Forward, Backward, Commit, Tied, EvalForward, EvalTaken,
    Install, Measure, Resume, AskMarks, Release, Halt,
    Hello, Ready, Measured, Done, Loss, Evaluated, StageState, Heartbeat, Suspect, Error,
    StaleEpoch,
    Fence, Report, Enlist, VerdictMade, VerdictKnown, Chunk, Seal, Stored, Fetch, FetchLog,
    Discard, Assign, Attach, Attached, CopyLost,
)  # fmt: skip
_BY_KIND = {cls.__name__: cls for cls in MESSAGES}


def message_to_plain(message: Message) -> dict[str, Any]:
    """The message as dicts, lists and scalars; "kind" is its class name."""
    return {"kind": type(message).__name__, **values.to_plain(message)}


def message_from_plain(plain: Any) -> Message:
    """Reads what `message_to_plain` made.

    Raises:
        FormatError: Not a message, of unknown kind, or with unknown, missing or bad fields.
    """
    if not isinstance(plain, Mapping):
        raise FormatError(f"message: expected a table, got {str(plain)[:80]!r}")
    kind = plain.get("kind")
    cls = _BY_KIND.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise FormatError(
            f"message: unknown kind {str(kind)[:40]!r}; known: {', '.join(sorted(_BY_KIND))}"
        )
    fields = {name: item for name, item in plain.items() if name != "kind"}
    try:
        return values.from_plain(cls, fields, cls.__name__)
    except FormatError:
        raise
    except CrowdMeshError as exc:  # a value inside refuses itself, a plan say
        raise FormatError(f"{cls.__name__}: {exc.message}") from exc
