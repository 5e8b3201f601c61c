"""What the member machine is told (events) and what it demands of its body (actions).

The body has one *compute queue*: Compute, FinishStep, Reduce, Apply, Adopt, Snapshot, EvalCompute
and FinishEvaluation are carried out one after another in the order they were issued (the machine
issues them ahead, as soon as their inputs are there), and answered in that order. Everything else
is done at once, in list order, which is binding: a message is queued before the actions after it
begin. After `Unload` the body answers nothing that was issued before it. It knows no rules of its
own.

    action         the body must                                            answered by
    LoadStage      load bundle and state, compile, reach the neighbours      Installed
    MeasureStage   time each program alone                                   StageMeasured
    RequestData    read a step's inputs (first stage), targets (last)        DataReady
    Keep           file the frame's arrays under these slots                 -
    Compute        run one forward or backward of a microbatch               OpDone
    FinishStep     merge tied gradients, make scalars and parts; wait until
                   the gradients are ready                                   StepFinished
    Reduce         stage 0: new globals from all cut scalars                 Reduced
    Apply          take the stage from version t to t+1                      Applied
    Adopt          put new values of borrowed leaves in place                -
    Snapshot       keep an immutable copy of the stage's state               Snapshotted
    RequestEvalData  read an evaluation microbatch's rows                    EvalDataReady
    EvalCompute    run eval_forward of a microbatch                          EvalDone
    FinishEvaluation  last stage: sums over all its microbatches             EvaluationFinished
    SendMessage    send, with the arrays of `attach`                         -
    Freeze         let the op at work end, answer it; drop queue, uploads,
                   chunks                                                    Frozen
    Rewind         drop slots of a step and later, perhaps the gradient      -
    KeepState      make the stage's state a copy before it is replaced       -
    KeepCopy       make a snapshot a copy                                    -
    SendCopy       send a copy's Chunks and Seal                             -
    StoreChunk     add the frame's bytes to an incomplete copy               -
    SealCopy       check an incomplete copy, make it whole at once           CopySealed
    DropCopies     free copies                                               -
    LogFrame       keep the wire form of slots that are sent                 -
    DropLogs       free logged slots and verdicts of old steps               -
    LendTied       fill slots "tied" from the state                          TiedLent
    Rejoin         say Hello to the coordinator                              -
    Reject         log; a stranger: close the channel to it                  -
    Fail           log; the member stands still until Halt or Release        -
    Unload         drop the stage, its queue and its slots                   -
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.crowd import DeviceId
from ..core.schedule import OpKind
from .common import Fault, LaneName, Slot, Verdict
from .evidence import Copy
from .messages import Install, Message
from .recovery_messages import Manifest

# Events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageReceived:
    """A frame arrived from `sender` (the transport's word, not the frame's).

    The body holds the frame's arrays until `handle` returns: it files them if a `Keep` is among
    the actions, and drops them otherwise. Frames of one lane and sender are handed in in order.
    """

    sender: str
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """LoadStage is done: programs checked and compiled, state resident, both neighbours reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMeasured:
    """MeasureStage is done; the stage's state is as before."""

    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReady:
    """All microbatches of `step` are in memory (on the last stage the targets, too)."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpDone:
    """A Compute was carried out; its y or dx can be sent (arrays need not be ready)."""

    kind: OpKind
    step: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """FinishStep is done and the gradients are *ready*, not merely dispatched: the stage is Full.

    `values` (last stage): "loss" and the metrics. `is_finite`: loss, and whatever else was looked
    at. `has_weight` False: the step's loss weights sum to zero.
    """

    step: int
    is_finite: bool = True
    has_weight: bool = True
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """Reduce is done, slot "verdict" of the step is filled (it may be empty) and ready."""

    step: int
    is_finite: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """Apply is done; slots "tied" of the step are filled where this stage lends leaves."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshotted:
    """Snapshot is done: slot "state" of that version is filled and nobody writes to it."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDataReady:
    """The rows of an evaluation microbatch are in memory."""

    version: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDone:
    """EvalCompute is done; slot "eval_y" is filled (nothing on the last stage)."""

    version: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFinished:
    """FinishEvaluation is done: "loss" and the metrics, as means over the whole set."""

    version: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """Freeze is done. All that ended before was answered before; nothing else will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySealed:
    """SealCopy is done: `is_whole` says whether the copy matches its manifest.

    If so it is in place at once, on disk after fsync, and its verdict's arrays can be had."""

    copy: Copy
    epoch: int
    """Of the action."""
    is_whole: bool
    checksum: str = ""
    came_bytes: int = 0
    """Of it, what crossed the wire: all but what was here already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyDamaged:
    """A whole copy that is kept here cannot be read any more, or is not what it was."""

    copy: Copy
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TiedLent:
    """LendTied is done: slots "tied" of the step are filled where this stage lends leaves."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLost:
    """The channel to a peer is gone."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyFailed:
    """An action could not be carried out: a program raised, a file could not be read."""

    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passes; hand one in every quarter of a second or so."""


MemberEvent = (
    MessageReceived | Installed | StageMeasured | DataReady | OpDone | StepFinished | Reduced
    | Applied | Snapshotted | EvalDataReady | EvalDone | EvaluationFinished | PeerLost | BodyFailed
    | Tick | Frozen | CopySealed | CopyDamaged | TiedLent
)  # fmt: skip
MEMBER_EVENTS: tuple[type, ...] = (
    MessageReceived, Installed, StageMeasured, DataReady, OpDone, StepFinished, Reduced,
    Applied, Snapshotted, EvalDataReady, EvalDone, EvaluationFinished, PeerLost, BodyFailed, Tick,
    Frozen, CopySealed, CopyDamaged, TiedLent,
)  # fmt: skip

# Actions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SendMessage:
    """Send `message` to `to` on `lane`, with the arrays of the slots in `attach`, in order.

    Arrays may still be computing: the sender waits for them, not the caller. "y", "dx", "parts",
    "tied" and "eval_y" may be dropped once sent (logs come with recovery), "verdict" is kept for
    two steps. What a `LogFrame` named stays, and can be sent again, until `Rewind` or `DropLogs`.
    """

    to: DeviceId
    message: Message
    lane: LaneName
    attach: tuple[Slot, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStage:
    """Load what the Install frame brought (slot "install"; the `Keep` comes just before).

    Done when the programs passed their checks and are compiled, the state of version
    `install.base` is resident, and the channels to both neighbours in `install.plan` are open
    (either side may have dialled). Answer Installed, or BodyFailed.

    A copy that turns out to be damaged is answered by CopyDamaged, and by nothing else.

    `install.action`: "keep" and "apply" leave the state as it is (programs and neighbours may be
    the same, too). "restore" takes version `install.state_version` from the copies in
    `install.sources`, all held here by now but the coordinator's, which come with the frame; where
    a copy brings the verdict of the step before it, slot "verdict" of that step is filled.
    """

    install: Install


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureStage:
    """Run each program of the stage `repeats` times on made-up inputs and report medians."""

    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestData:
    """Read the batch of `step`: inputs on the first stage, targets on the last, both if it is both.

    At most two steps are requested ahead. The batch may be dropped when Apply(step) is done.
    """

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """File the arrays of the frame just handed in under these slots, split as it was attached."""

    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Run one op of the schedule on the compute queue. All its inputs are in their slots.

    FORWARD reads slot "x" (the batch on stage 0), fills "y"; on the last stage it only keeps its
    input, since loss_backward is one program. BACKWARD reads "dy" (the batch's targets on the last
    stage, weighed over the whole step first), adds to the gradients, fills "dx" (none on stage 0).
    Statistics change in a working copy only (R5).
    """

    kind: OpKind
    step: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishStep:
    """After the last backward: merge gradients from "parts_below" into own lent leaves, run
    `scalars`, fill slot "parts" with what goes up (own and later stages' cut scalars, tied
    gradients whose owner is further up). Wait until all gradients are ready, then answer."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Stage 0 only: run `reduce` over the cut scalars of all stages in layer order, fill slot
    "verdict" (nothing, where the optimizer has no reduce program)."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Run `update` with slot "verdict", make working statistics real, drop the step's slots.

    `verdict.skip`: drop gradients and working statistics instead; version grows all the same.
    Buffers of a snapshot whose upload is open must not be donated (R11). Where this stage lends
    leaves, fill a slot "tied" per lending layer before the answer.
    """

    step: int
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """Put the arrays of slot "tied" (`step`, `layer`) in place of the borrowed leaves."""

    step: int
    layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Keep the stage's state at `version` in slot "state" until its upload is done."""

    version: int
    layer: int
    """The stage's first layer, as in the slot's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvalData:
    """Read evaluation microbatch `microbatch`: inputs on the first stage, targets on the last.

    The same rows at every version. They may be dropped when EvalCompute is done.
    """

    version: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalCompute:
    """Run `eval_forward` with the parameters and statistics of `version`; change nothing of them.

    Reads slot "eval_x" (the rows on stage 0), fills "eval_y"; the last stage reads the rows'
    targets and adds loss, weight and metrics to the sums of this evaluation.
    """

    version: int
    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishEvaluation:
    """Last stage only, after the last EvalCompute: the means; the sums start anew."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """Stop computing into state, at once (R6): let the op that is running end and answer it, drop
    the rest of the compute queue, stop all uploads and loads, drop incomplete copies. State,
    gradients, whole copies and logs stay untouched. An Apply that had not begun is not done: its
    gradient and verdict stay. Then answer Frozen; nothing asked before is answered after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """Drop all slots of `step` and later, logged ones and verdicts too, and requested batches.

    `gradient`: drop the gradient and the working statistics as well."""

    step: int
    gradient: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepState:
    """The state resident now becomes a copy of this name; another will take its place."""

    copy: Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepCopy:
    """Slot "state" of the copy's version is from now on (also) a copy of this name (R15)."""

    copy: Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class SendCopy:
    """Send a copy to `to` on the bulk lane: Chunks in order, then a Seal, all of `epoch`.

    Where the copy is the resident state itself, that is sent: it is frozen."""

    to: DeviceId
    copy: Copy
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChunk:
    """Add the frame's bytes to the incomplete copy from `sender`; one that begins anew replaces."""

    sender: str
    copy: Copy
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SealCopy:
    """Check leaves, bytes and checksum; then make the copy whole and visible at once (R12)."""

    sender: str
    copy: Copy
    manifest: Manifest
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropCopies:
    """Free these copies; one under upload when that has ended."""

    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFrame:
    """Keep what is sent of these slots (after any lossy cast): a neighbour may ask for it again."""

    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DropLogs:
    """Free logged slots of steps below `step`, and verdicts of steps below `step` - 1."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LendTied:
    """On the compute queue: fill a slot "tied" (`step`) per lending layer from the state."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoin:
    """This member is out of its epoch: say Hello to the coordinator, as a newcomer (R8)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """`sender` is not entitled to what it sent; the run goes on."""

    sender: str
    fault: Fault
    is_stranger: bool = True
    """No part of this run: its channel is closed. The run lives by the channels of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """This member cannot go on (the coordinator was told just before)."""

    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Drop everything of the run; the member is free for another. `fault`: why, if it failed."""

    fault: Fault | None = None


MemberAction = (
    SendMessage | LoadStage | MeasureStage | RequestData | Keep | Compute | FinishStep | Reduce
    | Apply | Adopt | Snapshot | RequestEvalData | EvalCompute | FinishEvaluation | Reject | Fail
    | Unload | Freeze | Rewind | KeepState | KeepCopy | SendCopy | StoreChunk | SealCopy
    | DropCopies | LogFrame | DropLogs | LendTied | Rejoin
)  # fmt: skip
MEMBER_ACTIONS: tuple[type, ...] = (
    SendMessage, LoadStage, MeasureStage, RequestData, Keep, Compute, FinishStep, Reduce,
    Apply, Adopt, Snapshot, RequestEvalData, EvalCompute, FinishEvaluation, Reject, Fail, Unload,
    Freeze, Rewind, KeepState, KeepCopy, SendCopy, StoreChunk, SealCopy, DropCopies,
    LogFrame, DropLogs, LendTied, Rejoin,
)  # fmt: skip
