"""When each op and transfer of a step starts and ends, exactly, for any schedule.

Rules of the clock:

- A stage runs its ops one after another in schedule order, each as soon as what it needs is there.
- The outputs of op `F m` of stage `s` cross cut `s` (between stages `s` and `s + 1`) downstream,
  those of `B m` of stage `s + 1` cross it back. A transfer occupies its link direction for
  `transfer_s` (bytes / bandwidth) and arrives `latency_s` after it has left: latency delays, but
  does not occupy. Directions are independent (full duplex), each serves its transfers in the order
  in which they become ready, and none of it costs the stages time.
- After its last backward a stage takes `reduce_s` for the scalars that the optimizer mixes across
  layers (0 for most); they ride up the chain, paying latencies only.
- **Commit point**: stage 0 has ended its last backward and holds those scalars. `Commit` travels
  down, paying latencies only; each stage applies its update (`update_s`) when it arrives, and runs
  the next step's ops after that. So stage 0 starts the next step as soon as it has applied.

Every order above is fixed by the schedule, so start times are a longest path over the event graph;
the computation here is that path, not a simulation with a clock. It knows nothing of devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidValueError, ScheduleError
from .schedule import OpKind, Schedule

Direction = Literal["forward", "backward"]


def _check(value: object, *names: str) -> None:
    for name in names:
        seconds = getattr(value, name)
        if not 0 <= seconds < math.inf:
            kind = type(value).__name__
            raise InvalidValueError(f"{kind}: {name} must be finite and >= 0, got {seconds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage: per microbatch (forward, backward) and per step (the rest)."""

    forward_s: float
    backward_s: float
    update_s: float = 0.0
    reduce_s: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "forward_s", "backward_s", "update_s", "reduce_s")

    @property
    def compute_s(self) -> float:
        """C_s: forward and backward of one microbatch."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTimes:
    """Seconds of one cut per microbatch. Transfers occupy the link direction, latencies do not."""

    forward_latency_s: float = 0.0
    forward_transfer_s: float = 0.0
    backward_latency_s: float = 0.0
    backward_transfer_s: float = 0.0

    def __post_init__(self) -> None:
        _check(
            self,
            "forward_latency_s",
            "forward_transfer_s",
            "backward_latency_s",
            "backward_transfer_s",
        )

    @property
    def forward_s(self) -> float:
        """From the first byte sent downstream to the last one received."""
        return self.forward_latency_s + self.forward_transfer_s

    @property
    def backward_s(self) -> float:
        """The same on the way back."""
        return self.backward_latency_s + self.backward_transfer_s

    @property
    def round_trip_s(self) -> float:
        return self.forward_s + self.backward_s

    @property
    def busiest_s(self) -> float:
        """Seconds that the busier direction is occupied per microbatch."""
        return max(self.forward_transfer_s, self.backward_transfer_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOp:
    """An op and when it runs, in seconds since the step began."""

    stage: int
    kind: OpKind
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedTransfer:
    """A transfer: first byte sent at `start_s`, last received at `end_s` (latency included)."""

    cut: int
    direction: Direction
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step, with all stages and links free at 0.

    `ops` go stage by stage, `transfers` cut by cut (downstream, then back), each in time order.
    """

    ops: tuple[TimedOp, ...]
    transfers: tuple[TimedTransfer, ...]
    commit_s: float
    """The commit point of this step."""
    step_s: float
    """From one commit point to the next when step follows step. It is `commit_s` plus stage 0's
    update, plus what later stages still lack when the next step's first microbatch reaches them."""
    bubble_share: tuple[float, ...]
    """Per stage, the share of `step_s` in which it neither runs ops, reduces nor updates."""
    link_busy_share: tuple[tuple[float, float], ...]
    """Per cut, the share of `step_s` in which a direction is occupied: (downstream, back)."""

    def stage_ops(self, stage: int) -> tuple[TimedOp, ...]:
        """The ops of one stage, in time order."""
        return tuple(op for op in self.ops if op.stage == stage)


def evaluate(
    schedule: Schedule, stages: Sequence[StageTimes], cuts: Sequence[CutTimes]
) -> Timeline:
    """Computes the exact timeline of a schedule.

    Args:
        schedule: `S` stages, `M` microbatches; need not have been checked.
        stages: `S` entries.
        cuts: `S - 1` entries; cut `s` joins stages `s` and `s + 1`.

    Raises:
        ScheduleError: Lengths do not match, or the schedule is incomplete or deadlocks.

    Example:
        >>> from crowdmesh_jax.core import make_schedule
        >>> stages = [StageTimes(forward_s=1.0, backward_s=2.0)] * 2
        >>> timeline = evaluate(make_schedule("1f1b", 2, 4), stages, [CutTimes()])
        >>> timeline.step_s, timeline.commit_s  # 4 microbatches of 3 s, and a bubble of 3 s
        (15.0, 15.0)
    """
    ops: list[TimedOp] = []
    starts, commit_s = _longest_path(schedule, stages, cuts, [0.0] * len(stages), ops)
    step_s = _steady_step_s(schedule, stages, cuts, starts, commit_s)
    ops.sort(key=lambda op: op.stage)  # stable: time order within a stage
    transfers = _transfers(ops, cuts)
    microbatches = schedule.num_microbatches
    busy_s = [microbatches * t.compute_s + t.update_s + t.reduce_s for t in stages]
    return Timeline(
        ops=tuple(ops),
        transfers=tuple(transfers),
        commit_s=commit_s,
        step_s=step_s,
        bubble_share=tuple(max(0.0, 1.0 - _share(busy, step_s)) for busy in busy_s),
        link_busy_share=tuple(
            (
                _share(microbatches * cut.forward_transfer_s, step_s),
                _share(microbatches * cut.backward_transfer_s, step_s),
            )
            for cut in cuts
        ),
    )


def evaluate_step_s(
    schedule: Schedule, stages: Sequence[StageTimes], cuts: Sequence[CutTimes]
) -> float:
    """`evaluate(...).step_s` alone, several times faster: for solvers that rank many plans."""
    starts, commit_s = _longest_path(schedule, stages, cuts, [0.0] * len(stages), None)
    return _steady_step_s(schedule, stages, cuts, starts, commit_s)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _steady_step_s(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    cuts: Sequence[CutTimes],
    starts: list[float],
    commit_s: float,
) -> float:
    # At a commit point no op or transfer of the step is left, and from it each stage's release
    # is a fixed delay. So the second step already is the steady one: the same graph, released late.
    released, down_s = [], 0.0
    for stage, times in enumerate(stages):
        released.append(down_s + times.update_s)
        if stage < len(cuts):
            down_s += cuts[stage].forward_latency_s
    first = released[0]
    if all(late <= first + start for late, start in zip(released, starts, strict=True)):
        return first + commit_s  # nobody is later than the first microbatch: all shifts by stage 0
    return _longest_path(schedule, stages, cuts, released, None)[1]


def _longest_path(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    cuts: Sequence[CutTimes],
    released: list[float],
    timed: list[TimedOp] | None,
) -> tuple[list[float], float]:
    """Start of each stage's first op, and the commit point; appends to `timed` where given.

    `released[s]`: when stage `s` may start.
    """
    num_stages = schedule.num_stages
    if num_stages == 0 or len(stages) != num_stages or len(cuts) != num_stages - 1:
        raise ScheduleError(
            f"schedule {schedule.name!r} has {num_stages} stages, given are times of"
            f" {len(stages)} stages and {len(cuts)} cuts (one less than stages)"
        )
    last = num_stages - 1
    microbatches = schedule.num_microbatches
    # When a microbatch's input (gradient) is at hand; None: not sent yet.
    inputs: list[list[float | None]] = [[None] * microbatches for _ in range(num_stages)]
    gradients: list[list[float | None]] = [[None] * microbatches for _ in range(num_stages)]
    inputs[0] = [released[0]] * microbatches
    free = list(released)
    starts = list(released)
    position = [0] * num_stages
    down_free, back_free = [0.0] * num_stages, [0.0] * num_stages
    left = sum(len(ops) for ops in schedule.ops)
    forward = OpKind.FORWARD
    order = list(range(num_stages))
    while left:
        before = left
        for stage in order:
            ops = schedule.ops[stage]
            at, now = position[stage], free[stage]
            begin, times = at, stages[stage]
            my_inputs, my_gradients = inputs[stage], gradients[stage]
            while at < len(ops):
                op = ops[at]
                microbatch = op.microbatch
                is_forward = op.kind is forward
                ready = (my_inputs if is_forward else my_gradients)[microbatch]
                if ready is None:
                    break
                start = ready if ready > now else now
                if at == 0:
                    starts[stage] = start
                if is_forward:
                    now = start + times.forward_s
                    if stage == last:
                        my_gradients[microbatch] = now
                    else:
                        cut = cuts[stage]
                        sent = down_free[stage]
                        sent = (now if now > sent else sent) + cut.forward_transfer_s
                        down_free[stage] = sent
                        inputs[stage + 1][microbatch] = sent + cut.forward_latency_s
                else:
                    now = start + times.backward_s
                    if stage:
                        cut = cuts[stage - 1]
                        sent = back_free[stage]
                        sent = (now if now > sent else sent) + cut.backward_transfer_s
                        back_free[stage] = sent
                        gradients[stage - 1][microbatch] = sent + cut.backward_latency_s
                if timed is not None:
                    timed.append(
                        TimedOp(
                            stage=stage,
                            kind=op.kind,
                            microbatch=microbatch,
                            start_s=start,
                            end_s=now,
                        )
                    )
                at += 1
            left -= at - begin
            position[stage], free[stage] = at, now
        if left == before:
            stuck = ", ".join(
                f"stage {s} at {schedule.ops[s][position[s]]}"
                for s in range(num_stages)
                if position[s] < len(schedule.ops[s])
            )
            raise ScheduleError(f"schedule {schedule.name!r} deadlocks: {stuck}")
        order.reverse()
    scalars_s = 0.0
    for stage in range(last, -1, -1):
        scalars_s = max(scalars_s, free[stage] + stages[stage].reduce_s)
        if stage:
            scalars_s += cuts[stage - 1].backward_latency_s
    return starts, scalars_s


def _transfers(ops: list[TimedOp], cuts: Sequence[CutTimes]) -> list[TimedTransfer]:
    found: dict[tuple[int, Direction], list[TimedTransfer]] = {}
    free: dict[tuple[int, Direction], float] = {}
    for op in ops:
        direction: Direction = "forward" if op.kind is OpKind.FORWARD else "backward"
        cut = op.stage if direction == "forward" else op.stage - 1
        if not 0 <= cut < len(cuts):
            continue
        times = cuts[cut]
        if direction == "forward":
            transfer_s, latency_s = times.forward_transfer_s, times.forward_latency_s
        else:
            transfer_s, latency_s = times.backward_transfer_s, times.backward_latency_s
        key = (cut, direction)
        start_s = max(op.end_s, free.get(key, 0.0))
        free[key] = start_s + transfer_s
        found.setdefault(key, []).append(
            TimedTransfer(
                cut=cut,
                direction=direction,
                microbatch=op.microbatch,
                start_s=start_s,
                end_s=free[key] + latency_s,
            )
        )
    both: tuple[Direction, Direction] = ("forward", "backward")
    return [t for cut in range(len(cuts)) for d in both for t in found.get((cut, d), ())]
