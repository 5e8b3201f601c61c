"""What the coordinator knows of a run, as a value, and the texts that it says of waits and losses.

Knows nothing of what events do to it.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan
from ..core.schedule import Schedule
from ..errors import ProtocolError
from . import messages as msg
from . import records
from .common import Fault, Verdict
from .coordinator_events import RecoveryTerms, Start
from .decision import Decision
from .evidence import Base, Evidence, LayerHolders

WINDOW = 64
"""Observed times that a deadline is learned from."""


class Phase(enum.Enum):
    GATHERING = "gathering"
    INSTALLING = "installing"
    MEASURING = "measuring"
    RUNNING = "running"
    STOPPING = "stopping"
    """A stop mark was committed; the shards of its wave are awaited."""
    PAUSING = "pausing"
    """A stop mark was committed for a change of plan; all are to stand still at that version."""
    FENCING = "fencing"
    """Epoch opened, members told to stop and report."""
    DECIDING = "deciding"
    """All reports are here; the policy is asked for owners."""
    WAITING = "waiting"
    """Nothing can be decided with who is here: a device may return."""
    ATTACHING = "attaching"
    """Started again: members are asked where they are."""
    FINISHING = "finishing"
    """The finish mark was committed; the result is awaited."""
    DONE = "done"
    HALTED = "halted"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberInfo:
    """A device that said Hello."""

    hello: msg.Hello
    is_ready: bool = False
    is_newcomer: bool = False
    """Said Hello in the middle of the run and had no part in an epoch since."""
    seconds: Mapping[str, float] | None = None
    """Measured alone, per program."""
    heard_s: float = 0.0
    gaps: tuple[float, ...] = ()
    """Between its last messages, in seconds."""
    heartbeat: msg.Heartbeat | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What the run waits for, since when, how long at most, and why that long (I13)."""

    what: str
    devices: tuple[DeviceId, ...]
    since_s: float
    deadline_s: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingStep:
    """A step of which Done, Loss or both have arrived, not yet shown."""

    step: int
    verdict: Verdict | None = None
    values: Mapping[str, float] | None = None
    step_s: float | None = None
    has_evaluated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """An evaluation's values."""

    version: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A stage's state has arrived."""

    version: int
    stage: int
    is_final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A member's channel to a neighbour broke."""

    device: DeviceId
    reason: str
    since_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The plan in force, once a decision replaced the one of Start."""

    plan: PipelinePlan
    schedule: Schedule
    holders: tuple[LayerHolders, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """`device` has layers `first_layer ..` at `version`, whole, in this epoch."""

    version: int
    first_layer: int
    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorState:
    """A run, as its coordinator sees it. `CoordinatorState(device=, run=, term=)` is a new one."""

    device: DeviceId
    run: str
    term: int = 1
    epoch: int = 0
    base: int = 0
    phase: Phase = Phase.GATHERING
    start: Start | None = None
    members: Mapping[str, MemberInfo] = field(default_factory=dict)
    committed: int = 0
    """Version that the whole run has reached: steps Done."""
    shown: int = 0
    """Steps shown to the user."""
    pending: tuple[PendingStep, ...] = ()
    last_shown: PendingStep | None = None
    done_s: float | None = None
    """When the last step was Done."""
    step_times: tuple[float, ...] = ()
    shards: tuple[Shard, ...] = ()
    writing: int | None = None
    """Version whose checkpoint is being written; one at a time."""
    wave_open: bool = False
    """A snapshot was asked for and its checkpoint is not yet written."""
    wave_version: int = 0
    """Version at which the last wave was asked for."""
    checkpoint: int = 0
    """Newest version that is safe."""
    missed: int = 0
    """Newest version whose checkpoint could not be written."""
    awaited: tuple[int, ...] = ()
    """Versions whose evaluate mark was committed and whose values have not come."""
    last_evaluated: int | None = None
    """Newest version whose evaluate mark was committed."""
    early: tuple[Evaluated, ...] = ()
    """Values that came before the Done of their version's step."""
    scored: tuple[Evaluated, ...] = ()
    """Evaluations on which it was not yet decided whether they are the best."""
    held: tuple[int, ...] = ()
    """Versions written and kept in memory until that is decided."""
    best: float | None = None
    writing_best: int | None = None
    change_reason: str | None = None
    """Why the policy wants an epoch though nobody was lost."""
    holders_asked: tuple[LayerHolders, ...] | None = None
    """Wanted by the policy; taken when no wave is open."""
    assigned: int = 0
    """Highest `seq` of an Assign in this epoch."""
    stop_reason: str | None = None
    """The user's code wants to stop."""
    ending: Fault | None = None
    """Why a stop mark was asked for."""
    interrupts: int = 0
    suspicions: tuple[Suspicion, ...] = ()
    wait: Wait | None = None
    tick_s: float | None = None
    standing: Standing | None = None
    crew: tuple[DeviceId, ...] = ()
    """Where the run recovers: all members of this epoch, with and without a stage."""
    reports: Mapping[str, Evidence] = field(default_factory=dict)
    damaged: tuple[tuple[str, tuple[int, int, int, int]], ...] = ()
    """(device, name) of copies that cannot be used, whatever reports say."""
    bases: tuple[Base, ...] = ()
    """Of all decided epochs."""
    decided: Decision | None = None
    """Of this epoch; None for a first one."""
    durable: int = 0
    """Newest version of which a wave or checkpoint is complete."""
    checkpoint_tag: int = 0
    """Epoch in which the newest checkpoint was made."""
    writing_tag: int = 0
    wave_asked_s: float | None = None
    """Since when a wave of copies is open; one at a time."""
    wave_every: int | None = None
    """Steps between waves, where the policy has set them; else as the terms say."""
    wave_from: int = 0
    """Version of the last one that was asked for or begun."""
    wave_bytes: int = 0
    """What crossed the wire for the open wave, as far as its holders have acknowledged."""
    acks: tuple[Ack, ...] = ()
    evaluated: int = -1
    """Newest version whose evaluation was shown."""
    attached: Mapping[str, msg.Attached] = field(default_factory=dict)
    was_resumed: bool = False
    """The journal's last epoch had been resumed."""
    finished: records.Finish | None = None
    """The journal has the run's end: its members have only to be let go."""
    why_waiting: str = ""
    opened_at: int = 0
    """Steps committed when this epoch was opened."""

    @property
    def started(self) -> Start:
        """What Start said.

        Raises:
            ProtocolError: There was none.
        """
        if self.start is None:
            raise ProtocolError(f"run {self.run!r} has not started")
        return self.start

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """The plan's devices, in stage order."""
        return self.plan.devices

    @property
    def plan(self) -> PipelinePlan:
        """The plan in force."""
        return self.standing.plan if self.standing is not None else self.started.plan

    @property
    def recovery(self) -> RecoveryTerms | None:
        return self.start.recovery if self.start is not None else None

    @property
    def party(self) -> tuple[DeviceId, ...]:
        """Who may speak in this epoch."""
        return self.crew if self.recovery is not None and self.crew else self.devices

    @property
    def holders(self) -> tuple[LayerHolders, ...]:
        if self.standing is not None:
            return self.standing.holders
        return self.recovery.holders if self.recovery is not None else ()

    @property
    def has_holders(self) -> bool:
        """Every stage has a holder beside its owner. Where one has none, a wave would be lost with
        its owner, and must not count as safe: the checkpoint is what stands."""
        kept = {(entry.first_layer, device) for entry in self.holders for device in entry.devices}
        return all(
            any(layer == stage.first_layer and device != stage.device for layer, device in kept)
            for stage in self.plan.stages
        )

    @property
    def is_over(self) -> bool:
        return self.phase in (Phase.DONE, Phase.HALTED)


def p99(times: tuple[float, ...]) -> float:
    """The smallest of `times` that 99 % of them do not exceed."""
    return sorted(times)[math.ceil(0.99 * len(times)) - 1]


def step_wait(state: CoordinatorState, now_s: float) -> Wait:
    """The wait for the next step's Done: learned from the steps before, with a floor."""
    limits = state.started.deadlines
    if not state.step_times:
        deadline_s, why = limits.first_step_s, "set for the first step"
    else:
        usual_s = p99(state.step_times)
        learned_s = limits.step_factor * usual_s
        deadline_s = max(limits.step_floor_s, learned_s)
        rule = f"usual step {usual_s:.3g} s (p99), deadline {limits.step_factor:g} x p99"
        why = rule if learned_s >= limits.step_floor_s else f"{rule}, at least {deadline_s:g} s"
    if state.awaited:
        share = evaluation_share(state)
        deadline_s *= 1 + share
        why += f"; x {1 + share:.3g}, as an evaluation stands before it"
    return Wait(
        what=f"step {state.committed} to be done",
        devices=state.devices[:1],
        since_s=now_s,
        deadline_s=deadline_s,
        why=why,
    )


def evaluation_share(state: CoordinatorState) -> float:
    """How many steps an evaluation is worth at most: it runs forwards only."""
    plan = state.started.evaluation
    return plan.microbatches / state.plan.microbatches if plan is not None else 0.0


def closing_deadline_s(state: CoordinatorState) -> float:
    """For the last wave, and the evaluation that may stand before it."""
    deadline_s = state.started.deadlines.finish_s
    if state.awaited:
        deadline_s += step_wait(state, 0.0).deadline_s
    return deadline_s


def heartbeat_deadline_s(state: CoordinatorState, member: MemberInfo) -> float:
    """How long a running member may be silent.

    Phi-accrual (Hayashibara et al., SRDS 2004), as a deadline: with gaps between messages taken as
    normal, a silence of this length would come by chance with 10^-phi. Gaps of training have a
    heavier tail than that (a compile, a collection of garbage), so twice the longest one seen
    counts too.
    """
    limits = state.started.deadlines
    if len(member.gaps) < 2:
        return limits.heartbeat_floor_s
    count = len(member.gaps)
    mean_s = math.fsum(member.gaps) / count
    sd_s = math.sqrt(math.fsum((gap - mean_s) ** 2 for gap in member.gaps) / count)
    z = statistics.NormalDist().inv_cdf(1 - 10**-limits.phi)
    accrued_s = mean_s + z * max(sd_s, mean_s / 4)
    return max(limits.heartbeat_floor_s, accrued_s, 2 * max(member.gaps))


def describe_stage(state: CoordinatorState, device: str) -> str:
    """`stage 2, layers 5-7 (conv4 .. head)`."""
    start = state.started
    index = state.plan.stage_of(device)
    if index is None:
        return "no stage"
    stage = state.plan.stages[index]
    names = start.layer_names[stage.first_layer : stage.last_layer + 1]
    named = f" ({names[0]} .. {names[-1]})" if len(names) > 1 else f" ({names[0]})" if names else ""
    return f"stage {index}, layers {stage.first_layer}-{stage.last_layer}{named}"


def describe_progress(state: CoordinatorState) -> str:
    """`17 of 100 steps committed, newest checkpoint: version 10`."""
    return (
        f"{state.committed} of {state.started.steps} steps committed,"
        f" newest checkpoint: version {state.checkpoint}"
    )


def lost_text(state: CoordinatorState, device: str, reason: str) -> str:
    """What a person is told when a device is lost."""
    return (
        f"{device} was lost: {reason}\n"
        f"  held     {describe_stage(state, device)}\n"
        f"  run      {describe_progress(state)}\n"
        "  next     the other members are told to stop; the run folder stays as it is."
        " Start again from its checkpoint, without this device if it does not return"
    )


def blame(state: CoordinatorState) -> tuple[str, str]:
    """Who holds a running pipeline up: follows who waits for whom, from stage 0.

    Returns:
        The device at the end of the chain, and what it was last doing.
    """
    device: str = state.devices[0]
    seen: set[str] = set()
    while device not in seen:
        seen.add(device)
        info = state.members.get(device)
        beat = info.heartbeat if info else None
        if beat is None:
            return device, "it has sent no heartbeat"
        if beat.waiting is None:
            return device, f"at version {beat.version}, {beat.completed_ops} ops done, computing"
        if beat.waiting.device in seen or beat.waiting.device not in state.members:
            return device, f"it waits for {beat.waiting.what} from {beat.waiting.device}"
        device = beat.waiting.device
    return device, "everyone waits for someone else"
