"""What a member knows: one device's part in a run, as a value.

Everything here is metadata; arrays are the body's. It knows nothing of what events do to it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan
from ..core.schedule import OpKind
from ..errors import ProtocolError
from . import messages as msg
from .common import Mark, Parts, StepVerdict, Verdict
from .evidence import Copy, Direction, LayerHolders, Logged, Source, StepValues


class Phase(enum.Enum):
    IDLE = "idle"
    INSTALLING = "installing"
    INSTALLED = "installed"
    CATCHING_UP = "catching up"
    """Applying a held gradient, or replaying steps from logs, before Ready."""
    RUN = "run"
    FENCED = "fenced"
    """Promised to a new epoch: nothing moves until its Install (R6)."""
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedStep:
    """So many microbatches of a step, from the first on, were sent across a cut and are kept."""

    direction: Logged
    cut: int
    step: int
    count: int
    parts: Parts | None = None
    """Of the last backward."""
    layers: tuple[int, ...] = ()
    """Of "tied": lending layers whose values went across."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogAsk:
    """A neighbour that replays wants a step's frames; `served` of them were sent."""

    sender: DeviceId
    direction: Direction
    cut: int
    step: int
    served: int = 0
    is_lent: bool = False
    """Lent values of the step before were sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberState:
    """One device's part in a run. `MemberState(device=..., coordinator=...)` is a new member."""

    device: DeviceId
    coordinator: DeviceId
    phase: Phase = Phase.IDLE
    run: str = ""
    term: int = 0
    """Highest seen; messages of lower terms are refused."""
    fence: int = 0
    """Highest epoch promised to; nothing below it is accepted."""
    active: int = 0
    """Epoch granted by Install; 0: none."""
    install: msg.Install | None = None
    steps: int = 0
    """The run's last version, from Resume."""
    version: int = 0
    """Version of the state: updates up to `version` - 1 have been applied."""
    step: int = 0
    """Step at work. Ahead of `version` by one between Apply's issue and its answer."""
    issued: int = 0
    """Ops of `step` given to the compute queue."""
    completed: int = 0
    """Ops of `step` that it answered."""
    arrived_x: tuple[int, ...] = ()
    arrived_dy: tuple[int, ...] = ()
    is_finishing: bool = False
    """FinishStep of `step` was issued."""
    is_full: bool = False
    """Full(step)."""
    parts: Parts = field(default_factory=Parts)
    """Of the stages below, then (once full) with the own."""
    tied_due: tuple[int, ...] = ()
    """Lending layers whose Tied(step - 1) must still pass here."""
    verdicts: tuple[StepVerdict, ...] = ()
    """Of the last two steps; where the run recovers, since the last Discard."""
    marks_asked: tuple[Mark, ...] = ()
    """By the coordinator, for the next Commit (stage 0)."""
    ending: Mark | None = None
    """STOP or FINISH, once committed: no further step begins."""
    data_requested: int = 0
    """First step whose batch was not yet requested."""
    data_ready: tuple[int, ...] = ()
    eval_version: int | None = None
    """Version of the evaluation at work, or of the last one; the counts below are of it."""
    eval_issued: int = 0
    eval_done: int = 0
    eval_arrived: int = 0
    """EvalForwards that came; they come in order."""
    eval_taken: int = 0
    """EvalForwards that the stage below is done with."""
    eval_requested: int = 0
    eval_ready: tuple[int, ...] = ()
    """Evaluation microbatches whose rows are in memory, not yet issued."""
    enlisted: msg.Enlist | None = None
    """The epoch's grant to a member without a stage."""
    tag: int = 0
    """Epoch that the state is of."""
    is_restoring: bool = False
    """The state is not yet that of `base`: no evidence (7.1)."""
    is_leaving: bool = False
    """Told that its epoch is over: it will free its stage and come back as a newcomer (R8)."""
    is_frozen: bool = False
    """While fenced: the body stands still, the report was made."""
    copies: tuple[Copy, ...] = ()
    """Whole ones, own snapshots among them."""
    fetching: tuple[Source, ...] = ()
    """Copies on their way to an install."""
    asked_again: tuple[tuple[int, int, int, int], ...] = ()
    """Names of copies that came damaged once in this epoch."""
    logs: tuple[LoggedStep, ...] = ()
    log_asks: tuple[LogAsk, ...] = ()
    losses: tuple[StepValues, ...] = ()
    """Told by this stage as the last one, since the last Discard."""
    floor: int = 0
    """Version of the last Discard."""
    waves_due: tuple[int, ...] = ()
    """Versions whose snapshot becomes a copy."""
    shards_due: tuple[int, ...] = ()
    """Versions whose snapshot goes to the coordinator's disk."""
    reassigned: msg.Assign | None = None
    deaf_to: tuple[DeviceId, ...] = ()
    """Peers whose channel broke in this epoch and that were not heard since."""
    heartbeat_s: float = float("-inf")
    """When the last one was sent."""
    dropped: int = 0
    """Frames dropped because their epoch was over."""

    @property
    def plan(self) -> PipelinePlan:
        return self.granted.plan

    @property
    def granted(self) -> msg.Install:
        """The Install in force.

        Raises:
            ProtocolError: There is none.
        """
        if self.install is None:
            raise ProtocolError(f"{self.device} holds no stage")
        return self.install

    @property
    def stage(self) -> int:
        return self.granted.stage

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.plan.stages) - 1

    @property
    def upstream(self) -> DeviceId | None:
        return self.plan.stages[self.stage - 1].device if self.stage > 0 else None

    @property
    def downstream(self) -> DeviceId | None:
        return None if self.is_last else self.plan.stages[self.stage + 1].device

    @property
    def microbatches(self) -> int:
        return self.plan.microbatches

    @property
    def eval_microbatches(self) -> int:
        """Of an evaluation; 0 where the run has none."""
        plan = self.granted.evaluation
        return plan.microbatches if plan is not None else 0

    @property
    def layers(self) -> range:
        return self.plan.stages[self.stage].layers

    @property
    def is_at_work(self) -> bool:
        """False: answers to what was asked before the end; nobody needs them any more."""
        if self.phase is Phase.FENCED:  # what was under way is let end, and counted
            return not self.is_frozen and self.install is not None
        return self.phase in (Phase.RUN, Phase.STOPPED, Phase.CATCHING_UP)

    @property
    def recovers(self) -> bool:
        """A loss opens a new epoch; otherwise it ends the run."""
        has_stage = self.install is not None and self.install.log_steps is not None
        return has_stage or self.enlisted is not None

    @property
    def is_catching_up(self) -> bool:
        """It replays, with everything taken from neighbours' logs and nothing sent."""
        return self.phase is Phase.CATCHING_UP and self.step < self.granted.base

    @property
    def holders(self) -> tuple[LayerHolders, ...]:
        """Who keeps which layers, by the last word of the coordinator."""
        if self.reassigned is not None:
            return self.reassigned.holders
        if self.install is not None:
            return self.install.holders
        return self.enlisted.holders if self.enlisted is not None else ()

    def verdict_of(self, step: int) -> Verdict | None:
        """The verdict of `step`, where it is known here."""
        return next((entry.verdict for entry in self.verdicts if entry.step == step), None)


def waiting_for(state: MemberState) -> msg.Waiting | None:
    """Whom this member waits for, and for what; None while it computes."""
    if state.phase is not Phase.RUN:
        return None
    upstream, downstream, step = state.upstream, state.downstream, state.step
    if state.version != step or state.completed < state.issued:
        return None
    if state.tied_due and upstream:
        return msg.Waiting(device=upstream, what=f"Tied of step {step - 1}")
    count = state.eval_issued
    if state.eval_version == step and count < state.eval_microbatches:
        return _waiting_in_evaluation(state, count)
    ops = state.granted.ops
    if state.issued < len(ops):
        op = ops[state.issued]
        needs_data = state.is_last if op.kind is OpKind.BACKWARD else state.stage == 0
        if needs_data:
            return msg.Waiting(device=state.device, what=f"the batch of step {step}")
        neighbour = downstream if op.kind is OpKind.BACKWARD else upstream
        kind = "Backward" if op.kind is OpKind.BACKWARD else "Forward"
        what = f"{kind} {op.microbatch} of step {step}"
        return msg.Waiting(device=neighbour or state.device, what=what)
    if state.is_full and upstream:
        return msg.Waiting(device=upstream, what=f"Commit of step {step}")
    return None


def _waiting_in_evaluation(state: MemberState, microbatch: int) -> msg.Waiting | None:
    if state.eval_done < state.eval_issued:
        return None
    what = f"{microbatch} of the evaluation at version {state.eval_version}"
    if state.upstream and state.eval_arrived <= microbatch:
        return msg.Waiting(device=state.upstream, what=f"EvalForward {what}")
    if state.downstream and microbatch > state.eval_taken:
        return msg.Waiting(device=state.downstream, what=f"EvalTaken {state.eval_taken}")
    return msg.Waiting(device=state.device, what=f"rows {what}")
