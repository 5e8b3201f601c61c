"""What the coordinator machine is told (events) and what it demands of its body (actions).

Actions are carried out in list order, which is binding: a `Journal` with `sync` is on disk before
what follows it begins (I11). It knows no rules of its own.

    action            the body must                                         answered by
    Journal           append a record; `sync`: fsync before going on         -
    SendMessage       send; Install takes the arrays of its `attach`         -
    Keep              hold the frame's arrays (a shard of a checkpoint)      -
    WriteCheckpoint   write shards and manifest of a version, atomically     CheckpointWritten,
                                                                             CheckpointFailed
    WriteBest         write the same shards once more, where the best stands BestWritten
    Forget            drop the shards of a version that was held             -
    Announce          show; demands nothing                                  -
    Reject            log; a stranger: close the channel to it               -
    Complete          the run has its result                                 -
    ChooseOwners      ask the policy who takes what was lost                 OwnersChosen
    HaltRun           raise `fault.error()` to the user, after tidying up    -
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan
from ..core.schedule import Schedule
from ..errors import InvalidValueError
from . import member_events, records
from .common import BestRule, EvaluationPlan, Fault, NonFinitePolicy, Tie, Verdict
from .evidence import LayerHolders
from .owners import OwnersChoice, OwnersNeed

# Both machines' bodies get messages, send them and keep arrays by the same rules.
Keep = member_events.Keep
MessageReceived = member_events.MessageReceived
Reject = member_events.Reject
SendMessage = member_events.SendMessage
Tick = member_events.Tick


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long each wait may last, in seconds. The run halts when one passes (I13)."""

    gather_s: float = 30.0
    """Until every device of the plan has said Hello."""
    ready_s: float = 300.0
    """Until every member has loaded and compiled its stage."""
    measure_s: float = 120.0
    """Until one member has timed its programs."""
    first_step_s: float = 120.0
    """Until the first step is Done; later steps are learned from those before."""
    step_floor_s: float = 10.0
    """A later step gets max(floor, `step_factor` x p99 of the last steps)."""
    step_factor: float = 8.0
    heartbeat_floor_s: float = 10.0
    """A running member's silence gets at least this; more if its usual gaps are longer."""
    phi: float = 8.0
    """A silence that would come by chance with 10^-phi is a loss."""
    finish_s: float = 120.0
    """Until all shards of a closing wave are here and written."""
    suspect_grace_s: float = 1.5
    """After a member accuses its neighbour: the neighbour may still say why it went."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise InvalidValueError(f"deadlines: {name} must be > 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryTerms:
    """That, and how, a run goes on after a loss. Times in seconds."""

    holders: tuple[LayerHolders, ...] = ()
    """In the first epoch; later the policy names them."""
    wave_every: int = 8
    """Steps between waves of copies."""
    log_steps: int = 16
    """How many steps boundary logs reach back (R17)."""
    data_from: int = 0
    """First step whose rows can be read again."""
    report_s: float = 10.0
    """From Fence to Report; who is later is lost for this epoch (R8)."""
    owners_s: float = 120.0
    """For the policy, solvers included."""
    wave_s: float = 120.0
    """A wave that is not complete by then is given up; the next one may be."""
    return_s: float = 600.0
    """A run that cannot go on waits so long for a device to return."""
    attach_s: float = 30.0
    """A coordinator that started again waits so long for its members."""

    def __post_init__(self) -> None:
        if self.wave_every < 1 or self.log_steps < 1:
            raise InvalidValueError(
                "recovery: wave_every and log_steps must be >= 1, got"
                f" {self.wave_every} and {self.log_steps}"
            )
        for name in ("report_s", "owners_s", "wave_s", "return_s", "attach_s"):
            if not getattr(self, name) > 0:
                raise InvalidValueError(f"recovery: {name} must be > 0, got {getattr(self, name)}")


# Events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Train under `plan` from version `base` to version `steps`.

    A checkpoint of `base` must already be safe: it is what Install restores from.
    """

    plan: PipelinePlan
    schedule: Schedule
    steps: int
    base: int = 0
    ties: tuple[Tie, ...] = ()
    layer_names: tuple[str, ...] = ()
    """For messages to people; may be empty."""
    on_nonfinite: NonFinitePolicy = NonFinitePolicy.HALT
    snapshot_every: int | None = None
    """Steps between checkpoints; None: only the final one."""
    evaluation: EvaluationPlan | None = None
    keep_best: BestRule | None = None
    """Keep the state of the best evaluation; needs an evaluation that keeps the state."""
    best: float | None = None
    """Value of the best version of an earlier start; None: there is none."""
    measure_repeats: int = 0
    """Time each stage's programs alone before the run, that often; 0: do not."""
    heartbeat_s: float = 0.5
    deadlines: Deadlines = Deadlines()
    recovery: RecoveryTerms | None = None
    """None: a loss ends the run."""
    config_sha256: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.base < self.steps:
            raise InvalidValueError(
                f"steps must be > the version to start from ({self.base}), got {self.steps}"
            )
        if self.schedule.num_stages != len(self.plan.stages):
            raise InvalidValueError(
                f"the schedule has {self.schedule.num_stages} stages,"
                f" the plan {len(self.plan.stages)}"
            )
        if self.snapshot_every is not None and self.snapshot_every < 1:
            raise InvalidValueError(f"snapshot_every must be >= 1, got {self.snapshot_every}")
        keeps_state = self.evaluation is not None and self.evaluation.keeps_state
        if (self.keep_best is not None) != keeps_state:
            raise InvalidValueError("keep_best and evaluations that keep the state go together")
        if self.measure_repeats < 0:
            raise InvalidValueError(f"measure_repeats must be >= 0, got {self.measure_repeats}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """The coordinator starts again and reads its journal; members train on meanwhile (section 10).

    Members say Hello again as their channels open; nothing is sent to anyone before."""

    start: Start
    """As in the journal's run: the same job."""
    records: tuple[records.Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnersChosen:
    """The policy's answer to ChooseOwners."""

    epoch: int
    choice: OwnersChoice
    schedule: Schedule | None = None
    """Of the plan, where its name is not a built-in one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberLost:
    """The coordinator's channel to a device is gone, or its process ended."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWritten:
    """WriteCheckpoint is done: manifest and folder are on disk."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed:
    """WriteCheckpoint could not be carried out: the disk is full, say. The older one stands, and
    the shards are free."""

    version: int
    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class BestWritten:
    """WriteBest is done: manifest and folder are on disk."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """The user's code wants no more steps: after the next commit the run completes as it is."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAsked:
    """The user's code wants a checkpoint: of the next commit's version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeAsked:
    """The policy wants another plan, or newcomers as members, though nobody was lost: everyone
    stops at the next commit, and an epoch is opened there; no work is lost (section 9)."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalAsked:
    """The policy has learned what a wave costs: so many steps from one to the next."""

    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldersAsked:
    """The policy wants copies elsewhere, from the next wave on; needs no epoch (section 9)."""

    holders: tuple[LayerHolders, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyFailed:
    """An action could not be carried out: the disk is full, a bundle cannot be read."""

    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupt:
    """The user wants to stop (Ctrl-C). Once: after the next commit, state kept. Twice: now."""


CoordinatorEvent = (
    MessageReceived | Start | MemberLost | CheckpointWritten | BestWritten | StopAsked
    | CheckpointAsked | BodyFailed | Interrupt | Tick | Restart | OwnersChosen | ChangeAsked
    | HoldersAsked | IntervalAsked | CheckpointFailed
)  # fmt: skip
COORDINATOR_EVENTS: tuple[type, ...] = (
    MessageReceived, Start, MemberLost, CheckpointWritten, BestWritten, StopAsked, CheckpointAsked,
    BodyFailed, Interrupt, Tick, Restart, OwnersChosen, ChangeAsked, HoldersAsked,
    IntervalAsked, CheckpointFailed,
)  # fmt: skip

# Actions ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Append `record`. `sync`: it must be on disk (fsync) before the next action begins."""

    record: records.Record
    sync: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteCheckpoint:
    """Write the kept shards (slots "state" of `version`, one per stage) as one checkpoint.

    Never two at a time. Temporary name, fsync, rename, fsync of the folder; then the slots are
    free. `is_final`: these arrays are also the run's result.
    """

    version: int
    is_final: bool
    hold: bool = False
    """The slots stay until WriteBest is done, or Forget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBest:
    """Write the held shards of `version` as the best checkpoint, as atomically; free the slots."""

    version: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Another version is better than this one: free its held slots."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChooseOwners:
    """Ask the policy. It may solve, export, compile; `owners.choose_owners` is a plain one."""

    need: OwnersNeed


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOpened:
    """A device was lost, or came back: everyone stops, and it is decided how to go on."""

    epoch: int
    lost: tuple[DeviceId, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Training goes on, from `base`; `redone` steps will be run a second time."""

    epoch: int
    base: int
    redone: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The run stands until a device returns with what is missing."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveKept:
    """Copies of all layers at `version` are with their owners and holders."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveGivenUp:
    """Not all copies came in time: redundancy is below plan."""

    missing: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged:
    """For people: "gathering", "installing", ... and whom the run now waits for."""

    phase: str
    devices: tuple[DeviceId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """For people and the prediction: program -> seconds, per device, in stage order."""

    seconds: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShown:
    """A step is committed and its values are here. In step order, once each."""

    step: int
    verdict: Verdict
    values: Mapping[str, float]
    step_s: float | None
    """From the Done before to this one, coordinator's clock; None for the first step."""
    has_evaluated: bool = False
    """An evaluation of the version before ran within `step_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointKept:
    """A checkpoint of `version` is safe."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMissed:
    """A checkpoint of `version` could not be written; training goes on, the older one stands."""

    version: int
    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationShown:
    """An evaluation at `version`; after the step that made this version."""

    version: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestKept:
    """`version` has the best evaluation so far, and is safe as such."""

    version: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Show it; nothing is awaited."""

    news: (
        PhaseChanged | StageTimes | StepShown | EvaluationShown | CheckpointKept | BestKept
        | EpochOpened | Recovered | Waiting | WaveKept | WaveGivenUp | CheckpointMissed
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """The result (version `steps`, or where it was asked to stop) is written, members released.

    These are the arrays of the checkpoint of `version`."""

    version: int
    reason: str = ""
    """Why it ended before the last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HaltRun:
    """The run ended early; members were told. The run folder stays as it is."""

    fault: Fault


CoordinatorAction = (
    Journal | SendMessage | Keep | WriteCheckpoint | WriteBest | Forget | Announce | Reject
    | Complete | HaltRun | ChooseOwners
)  # fmt: skip
COORDINATOR_ACTIONS: tuple[type, ...] = (
    Journal, SendMessage, Keep, WriteCheckpoint, WriteBest, Forget, Announce, Reject, Complete,
    HaltRun, ChooseOwners,
)  # fmt: skip
